"""What a run works towards: the pictures, targets and masks of a call, loaded and checked together."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import colour
from . import image as images
from .config import MAX_SIZE, Config, least_side
from .export.vgg import LOSS_LAYERS
from .motion import Carried
from .regions import Mask, fitted, load_freeze, load_mask, report_coverage
from .targets import Targets, is_targets

log = logging.getLogger(__name__)

_STRETCHED = 0.02  # of a side, from which on it is told


@dataclass(frozen=True)
class Goal:
    """What a run works towards.

    `config` has a size and a start that suit the pictures. `content` is None for a texture; `styles` holds pictures and
    targets, none for an inversion. `masks` has a pair for each style, in the content and in the style (None: all of
    it), or is empty; `freeze` is a mask of the content; `carried` is the frame before, for a frame of a video.
    """

    config: Config
    content: images.Picture | None
    styles: tuple[images.Picture | Targets, ...]
    masks: tuple[tuple[Mask, Mask | None], ...]
    freeze: Mask | None
    carried: Carried | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers of its loss."""
        if self.content is not None and self.styles:
            return self.config.layers
        config = self.config
        used = config.content_layer_weights if self.content is not None else config.style_layer_weights
        return tuple(layer for layer in LOSS_LAYERS if layer in used)

    @property
    def own(self) -> tuple[Config, ...]:
        """The options of each style."""
        return tuple(self.config.for_styles(len(self.styles))) if self.styles else ()

    @property
    def detailed(self) -> bool:
        """Whether finer scales begin with details of the content: not if a run is to find them, or to do without."""
        return self.content is not None and bool(self.styles) and self.config.content_weight > 0

    @property
    def parts(self) -> tuple[tuple[Mask | None, Mask | None], ...]:
        """The pair of masks of each style; both are None where there are no masks."""
        return self.masks or ((None, None),) * len(self.styles)

    def coloured(self) -> Goal:
        """The goal as the objective sees it with its `Config.colour`."""
        if self.content is None or self.config.colour == "none":
            return self
        pictures, masks = [], []
        for style, (part, own) in zip(self.styles, self.parts, strict=True):
            if isinstance(style, images.Picture):
                pictures.append(style)
                masks.append((_fitted(part, self.content), _fitted(own, style)))
        content, prepared = colour.prepare(self.config.colour, self.content, pictures, masks)
        following = iter(prepared)
        styles = tuple(each if isinstance(each, Targets) else next(following) for each in self.styles)
        return replace(self, content=content, styles=styles)

    def digests(self) -> dict[str, Any]:
        """sha256 of each picture, target and mask, by what it is for; None for what there is not."""
        found = {
            "content": None if self.content is None else self.content.digest,
            "style": [each.digest for each in self.styles],
            "mask": [[_digest(plane) for plane in pair] for pair in self.masks],
            "freeze": _digest(self.freeze),
        }
        return found if self.carried is None else found | {"carried": self.carried.digest}


def _fitted(mask: Mask | None, picture: images.Picture) -> Mask | None:
    """The mask with a number for each pixel of its picture."""
    return None if mask is None else fitted(mask, picture.size)[0, 0].numpy()


def _digest(mask: Mask | None) -> str | None:
    return None if mask is None else hashlib.sha256(repr(mask.shape).encode() + mask.tobytes()).hexdigest()


def load(
    content: Any, style: Any, config: Config, masks: Any, freeze: Any, image: images.Picture | None = None
) -> Goal:
    """Load and check the pictures of a call; raises ValueError, TypeError or OSError.

    `image`, if there is one already, has the size that counts instead of that of `config`, and without content the
    masks are of it.
    """
    if content is None and style is None:
        raise ValueError("give a content or a style: with neither there is nothing to aim at")
    picture = None if content is None else images.load(content)
    styles = load_styles(style)
    if styles:
        config.style_shares(len(styles))
    if config.init == "style" and not (styles and all(isinstance(each, images.Picture) for each in styles)):
        raise ValueError("init style draws the colours of the styles: give their pictures, not targets or none")
    if picture is None:
        if config.size == "original" and image is None:
            raise ValueError("size original is that of the content, and there is none: give a number or WxH")
        if config.colour != "none":
            raise ValueError(f"colour {config.colour} needs the colours of a content: give one")
        if config.init == "content":
            config = replace(config, init="noise")
    else:
        config.check_for_content()
        config = config.sized(max(picture.size))
    if config.colour not in ("none", "keep-after") and any(isinstance(each, Targets) for each in styles):
        raise ValueError(f"colour {config.colour} needs the pictures of the styles, not their targets")
    pairs = () if masks is None else _load_masks(masks, picture or image or canvas(config), styles)
    if freeze is not None and picture is None:
        raise ValueError("freeze keeps pixels of the content: give one")
    held = None
    if freeze is not None and picture is not None:
        held = load_freeze(freeze, picture, final_size(picture, config))
    size = image.size if image else final_size(picture or canvas(config), config)
    side = max(size)
    goal = Goal(config, picture, styles, pairs, held)
    for each, (_, part), own in zip(goal.styles, goal.parts, goal.own, strict=True):
        if isinstance(each, images.Picture):  # what cannot be used is told now
            visible(each, part)
            style_size(each, side, own)
    return goal


def report_stretched(content: images.Picture, size: tuple[int, int]) -> None:
    """Warn of a content that is brought to another shape: (width, height) are rounded up to tile."""
    if abs(content.size[0] * size[1] / (content.size[1] * size[0]) - 1) > _STRETCHED:
        log.warning("to tile, the content of %d x %d pixels is stretched to the shape of %d x %d", *content.size, *size)


def load_styles(style: Any) -> tuple[images.Picture | Targets, ...]:
    """The styles of a call, one or a list: pictures as `image.load` takes them, targets or their files; none for None.

    Raises ValueError for an empty list.
    """
    sources = [] if style is None else list(style) if isinstance(style, list | tuple) else [style]
    if style is not None and not sources:
        raise ValueError("give at least one style")
    return tuple(
        (each if isinstance(each, Targets) else Targets.load(each)) if is_targets(each) else images.load(each)
        for each in sources
    )


def _load_masks(
    masks: Any, content: images.Picture, styles: Sequence[images.Picture | Targets]
) -> tuple[tuple[Mask, Mask | None], ...]:
    given = list(masks) if isinstance(masks, list | tuple) else [masks]
    if len(given) != len(styles):
        raise ValueError(f"{len(given)} masks for {len(styles)} styles: give one for each style")
    pairs = []
    for i, (mask, style) in enumerate(zip(given, styles, strict=True), 1):
        if isinstance(mask, tuple | list) and len(mask) != 2:
            raise ValueError(f"mask {i} has {len(mask)} parts: give a mask of the content, or it and one of the style")
        own, theirs = mask if isinstance(mask, tuple | list) else (mask, None)
        plane, part = load_mask(own, content, f"content mask {i}"), None
        if theirs is not None:
            if isinstance(style, Targets):
                raise ValueError(f"mask {i}: style targets have their mask in them; give the mask of the content alone")
            part = load_part(theirs, style, f"style mask {i}")
        pairs.append((plane, part))
    if pairs:
        report_coverage([plane for plane, _ in pairs])
    return tuple(pairs)


def load_part(source: Any, style: images.Picture, name: str) -> Mask | None:
    """A mask of a style, as `load_mask` has it. None for the word alpha, which counts anyway."""
    mask = load_mask(source, style, name)
    return None if isinstance(source, str) and source == "alpha" else mask


def visible(style: images.Picture, mask: Mask | None) -> Mask | None:
    """What counts of a style: what it shows, in its mask; None is all of it. Raises ValueError if nothing is left."""
    if style.alpha is None or style.opaque:
        return mask
    seen: Mask = style.alpha if mask is None else style.alpha * fitted(mask, style.size)[0, 0].numpy()
    if not seen.any():
        where = "everywhere" if mask is None else "wherever its mask is white"
        raise ValueError(f"{style.name or 'the style'} is transparent {where}: there is nothing to see of it")
    return seen


def final_size(content: images.Picture, config: Config) -> tuple[int, int]:
    """(width, height) of the result for a content, or for a canvas; `config` has a size."""
    side, _ = config.schedule(content.aspect)[-1]
    return config.whole(content.fit(side))


def style_size(style: images.Picture, side: int, config: Config) -> tuple[int, int]:
    """(width, height) at which a style is looked at for an image with this long side.

    The style's long side follows the image's, and is longer where its short side needs it. Raises ValueError for a
    style whose long side would have more than MAX_SIZE pixels.
    """
    needed = least_side(style.size)
    if needed > MAX_SIZE:
        width, height = style.size
        raise ValueError(f"a style of {width} x {height} pixels would have to be {needed} long: crop it")
    wanted = max(config.style_side(side), needed)
    if wanted > MAX_SIZE:
        raise ValueError(f"style_scale {config.style_scale}: styles would have to be {wanted} pixels long: give less")
    return style.fit(wanted)


def canvas(config: Config) -> images.Picture:
    """A black picture in the shape of a run without content."""
    width, height = config.canvas
    return images.Picture(np.zeros((height, width, 3), np.float32))
