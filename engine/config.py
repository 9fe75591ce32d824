"""The options of one stylisation. Standard library only, so that `--help` answers at once."""

from __future__ import annotations

import math
import numbers
import os
import sys
from collections.abc import Iterable
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any

from .export.commands import choice
from .export.vgg import LOSS_LAYERS, MIN_SIDE, WHOLE

COARSEST = 128  # pixels; about the long side of the first scale
COARSE = 0.4  # iterations of each coarse scale over those of the last one
FRAME_ITERATIONS = 30  # of a frame of a video that begins as the one before it
TEMPORAL_WEIGHT = 3.0  # of the loss that holds it to that
TV_FORMS = ("mean", "sum", "block", "nine-point")
PIXEL_RANGES = ("auto", "0-255", "0-256")
STARTS = ("content", "noise", "style")
COLOURS = ("none", "keep-after", "keep-before", "match", "histogram")
MATCHED = ("match", "histogram")  # of them, those that bring the style to the content
MAX_SIZE = 16384  # pixels; the longest side of a result or a style
MIN_WINDOW = 320  # pixels; a window has the surroundings of what it is for, up to 128 pixels on each side
FITTED = ("window", "history")  # options that may change to fit the memory, where they are auto
EMBEDDED_CONTENT, PAPERS_CONTENT = "relu2_2", "relu4_2"  # layers of the content loss, see `Config.for_weights`
DEVICES = ("auto", "cpu", "onnxruntime", "cudnn", "cuda", "tensorrt")
PRECISIONS = ("auto", "fp32", "fp16", "bf16")


def least_side(size: tuple[int, int]) -> int:
    """Long side at which the short one of a picture of this (width, height) has MIN_SIDE pixels."""
    return math.ceil(MIN_SIDE * max(size) / min(size))


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of one call; each field is a command line option of the same name. Raises ValueError or TypeError.

    Layers are given as names, "name:weight" or (name, weight), and kept as (name, weight) pairs; the weight is 1 where
    none is given. `relu4_2` is a ReLU's output, `conv4_2` that of the convolution before it. Style weights act divided
    by their sum, content weights as they are.
    """

    size: int | str | tuple[int, int] = _option(
        512, "long side of the result in pixels, or original for the content's own; without content a square, or WxH"
    )
    iterations: int | tuple[int | str, ...] = _option(
        250,
        "evaluations at the last scale, those before it get two fifths of them; or N,N,N for each scale; in N,N,... "
        "the last number holds for the rest",
    )
    scales: int | str = _option(
        "auto", "number of scales, each sqrt(2) larger than the one before; auto starts near 128"
    )
    content_weight: float = _option(1.0, "weight of the content loss")
    style_weight: float = _option(1e4, "weight of the style loss")
    tv_weight: float = _option(0.0, "weight of the total variation loss")
    tv_power: float = _option(2.0, "power of a difference of neighbours in the total variation loss, from 1")
    tv_form: str = _option(
        "mean",
        "total variation is the mean or the sum of the differences of neighbours; block: their sum without the last "
        "row and column; nine-point: mean, with the diagonals",
    )
    content_layers: str | tuple[Any, ...] = _option(
        "auto",
        "layers (relu4_2, or conv4_2: before its ReLU) of the content loss, NAME or NAME:WEIGHT; their weighted losses "
        "are added up; auto: relu4_2, as in the paper, with embedded weights relu2_2",
    )
    style_layers: tuple[Any, ...] = _option(
        tuple((f"relu{block}_1", 1.0) for block in range(1, 6)),
        "layers of the style loss, NAME or NAME:WEIGHT; the weights are divided by their sum",
    )
    content_loss: str = _option(
        "mean",
        "mean of the squared differences of a layer's features, or sum: half of their sum, which grows with the size",
    )
    style_loss: str = _option(
        "gram",
        "gram matrices; wasserstein: distance of normal distributions by mean and covariance, for a style weight near "
        "10; shifted: gram of F - 1",
    )
    style_blend: tuple[float, ...] = _option((), "weights of the styles, divided by their sum; equal by default")
    style_scale: float | tuple[float, ...] = _option(
        1.0, "long side of the styles over that of the image; several: of each style"
    )
    style_size: int | str = _option("auto", "long side of the styles in pixels at every scale; auto follows the image")
    pixel_range: str = _option(
        "auto", "pixels that the network sees: as its weights want them (auto), or in 0-255 or 0-256 less their mean"
    )
    pooling: str = _option("avg", "pooling of the network: avg or max")
    # The paper's network sees zeros there, a grey frame, and the style is painted up to a pixel or three from it.
    padding: str = _option(
        "replicate",
        "what the first layer sees beyond the border, with tile beyond that of the styles: replicate, reflect or zero",
    )
    tile: bool = _option(
        False, "wrap around at the borders, so that a texture tiles, or a content that does; sides are multiples of 16"
    )
    init: str = _option(
        "content",
        "start from content, noise (without STYLE a trace on grey), style (its colours, drawn) or a picture (PATH)",
    )
    init_noise: float = _option(0.0, "share of noise in the start, from 0 to 1")
    optimizer: str = _option("lbfgs", "lbfgs or adam")
    learning_rate: float = _option(0.03, "step of adam, in pixel values from 0 to 1")
    history: int | str = _option(
        "auto",
        "pairs that lbfgs remembers, from 1 to 100, on a GPU to 20; auto: 50, on a GPU 20, fewer if memory is short",
    )
    window: int | str = _option(
        "auto",
        "let the network see so many pixels of a side at a time, for less memory and about 1.5 times the time or more; "
        "auto: all of them, unless that needs more memory than there is",
    )
    clamp: bool = _option(
        True, "keep the pixels of lbfgs in range at every step, as adam does; without, they are cut off at the end"
    )
    average: float = _option(0.0, "decay of the running average of the pictures, which is then the result; 0 is off")
    stop: float = _option(0.0, "end a scale when 20 evaluations improve the best loss by a smaller share; 0 is off")
    seed: int = _option(0, "seed of the noise")
    colour: str = _option(
        "none",
        "keep the content's colours (keep-after: from the result; keep-before: stylise in grey), or bring the style's "
        "to them (match: mean and covariance; histogram)",
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            object.__setattr__(self, option.name, _plain(getattr(self, option.name)))
        if isinstance(self.size, tuple):
            if len(self.size) != 2:
                raise ValueError(f"size {self.size}: give the long side, or width and height")
        elif isinstance(self.size, str) and self.size != "original":
            raise ValueError(f"size {self.size!r}: give original or a number")
        if self.size != "original":
            for side in self.size if isinstance(self.size, tuple) else (self.size,):
                _whole("size", side, MIN_SIDE, MAX_SIZE)
        _whole_or_auto("style_size", self.style_size, MIN_SIDE, MAX_SIZE)
        if self.style_size != "auto" and self.style_scale != 1:
            raise ValueError("style_scale and style_size exclude each other: one follows the image, one does not")
        if isinstance(self.style_scale, tuple):
            if not self.style_scale:
                raise ValueError("style_scale: give a number, or one for each style")
            object.__setattr__(self, "style_scale", tuple(map(_scale, self.style_scale)))
        else:
            _scale(self.style_scale)
        if not isinstance(self.style_blend, tuple):
            raise TypeError(f"style_blend has to be a tuple of numbers, not {self.style_blend!r}")
        for weight in self.style_blend:
            _weight("style_blend", weight)
        if self.style_blend:
            _shared("style_blend", self.style_blend)
        object.__setattr__(self, "style_blend", tuple(float(weight) for weight in self.style_blend))
        _whole("seed", self.seed, 0, 2**63 - 1)
        counts = self.iterations if isinstance(self.iterations, tuple) else (self.iterations,)
        if self.iterations in ((), ("...",)):
            raise ValueError("iterations: give at least one number")
        for count in counts[:-1] if counts[1:] and counts[-1] == "..." else counts:
            _whole("iterations", count, 1, 10**6)
        _whole_or_auto("scales", self.scales, 1, 32)
        for name in ("content_weight", "style_weight", "tv_weight"):
            _weight(name, getattr(self, name))
        if not (isinstance(self.content_layers, str) and self.content_layers == "auto"):
            object.__setattr__(self, "content_layers", _weighted_layers("content_layers", self.content_layers))
        object.__setattr__(self, "style_layers", _weighted_layers("style_layers", self.style_layers))
        _shared("style_layers", [weight for _, weight in self.style_layers])
        choice("content_loss", self.content_loss, ("mean", "sum"))
        choice("style_loss", self.style_loss, ("gram", "wasserstein", "shifted"))
        choice("tv_form", self.tv_form, TV_FORMS)
        choice("pixel_range", self.pixel_range, PIXEL_RANGES)
        choice("pooling", self.pooling, ("avg", "max"))
        choice("padding", self.padding, ("replicate", "reflect", "zero"))
        choice("optimizer", self.optimizer, ("lbfgs", "adam"))
        _number("init_noise", self.init_noise, 0, 1)
        _number("tv_power", self.tv_power, 1, 16)
        _number("learning_rate", self.learning_rate, 1e-6, 1)
        _number("average", self.average, 0, 0.9999)
        _number("stop", self.stop, 0, 1)
        _whole_or_auto("history", self.history, 1, 100)
        _whole_or_auto("window", self.window, MIN_WINDOW, MAX_SIZE)
        for name in ("clamp", "tile"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} has to be True or False, not {getattr(self, name)!r}")
        choice("colour", self.colour, COLOURS)
        if not isinstance(self.init, str | os.PathLike):
            raise TypeError(f"init has to be a word or the path of a picture, not {type(self.init).__name__}")
        object.__setattr__(self, "init", str(self.init))
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(option.default, float) and not isinstance(value, tuple):  # kernels take arguments by type
                object.__setattr__(self, option.name, float(value))

    @property
    def content_layer_weights(self) -> dict[str, float]:
        """Weight of each content layer. Raises ValueError while they are auto."""
        if isinstance(self.content_layers, str):
            raise ValueError("content_layers auto: the weights choose, see Config.for_weights")
        return dict(self.content_layers)

    @property
    def style_layer_weights(self) -> dict[str, float]:
        """Weight of each style layer, divided by their sum."""
        total = sum(weight for _, weight in self.style_layers)
        return {layer: weight / total for layer, weight in self.style_layers}

    @property
    def layers(self) -> tuple[str, ...]:
        """All loss layers, from the shallowest to the deepest. Raises as `content_layer_weights`."""
        used = self.content_layer_weights | dict(self.style_layers)
        return tuple(layer for layer in LOSS_LAYERS if layer in used)

    @property
    def start_file(self) -> str | None:
        """The picture that `init` names, if it is no word."""
        return None if self.init in STARTS else self.init

    def idle(self, *, content: bool, styles: int) -> dict[str, str]:
        """The options that others, or a run without content or with so many styles, leave without effect, and why."""
        found: dict[str, str] = {}

        def leave(names: str, reason: str) -> None:
            found.update(dict.fromkeys(names.split(), reason))

        if self.init == "content" and not (content and styles):
            leave("init", "there is no content" if styles else "the content is what is to be found")
        if self.init == "noise" or "init" in found:
            leave("init_noise", "the start is noise")
        elif not self.init_noise and self.init != "style":
            leave("seed", "nothing of the start is drawn at random")
        if not self.tv_weight:
            leave("tv_power tv_form", "tv_weight is 0")
        if not content:
            leave("content_weight content_layers content_loss", "there is no content")
        elif not self.content_weight:
            leave("content_layers content_loss", "content_weight is 0")
        if styles == 1:
            leave("style_blend", "there is one style")
        if not styles:
            leave("style_weight style_layers style_loss style_scale style_size style_blend", "there is no style")
            if self.colour in MATCHED:
                leave("colour", "there is no style")
            if self.tile:
                leave("padding", "a picture that tiles has no border")
        elif not self.style_weight:
            leave("style_layers style_loss style_scale style_size", "style_weight is 0")
            if self.init != "style":  # which draws by them
                leave("style_blend" + " colour" * (self.colour in MATCHED), "style_weight is 0")
        if self.optimizer == "adam":
            leave("history clamp", "the optimizer is adam")
        else:
            leave("learning_rate", f"the optimizer is {self.optimizer}")
        return found

    def for_weights(self, kind: str) -> Config:
        """These options with layers of the content, if they are auto, that suit a kind of weights.

        The kind is `Stylizer.weights_kind`. The paper's relu4_2 knows objects in networks that learned to tell them;
        the embedded one did not, and would let a face dissolve there.
        """
        layer = EMBEDDED_CONTENT if kind == "embedded" else PAPERS_CONTENT
        return replace(self, content_layers=(layer,)) if self.content_layers == "auto" else self

    def check_for_content(self) -> None:
        """Raise ValueError for a size that is for runs without content."""
        if isinstance(self.size, tuple):
            raise ValueError("size WxH is for runs without content: give the long side, the content has the shape")

    def sized(self, long_side: int) -> Config:
        """These options for a content with this long side in pixels, which takes the place of `original`."""
        return replace(self, size=long_side) if self.size == "original" else self

    @property
    def long_side(self) -> int:
        """Long side of the result in pixels; the size may not be `original` any more."""
        return max(self.size) if isinstance(self.size, tuple) else int(self.size)

    @property
    def canvas(self) -> tuple[int, int]:
        """(width, height) of a run without content."""
        width, height = self.size if isinstance(self.size, tuple) else (self.long_side, self.long_side)
        return width, height

    def style_shares(self, count: int) -> list[float]:
        """The share of each of `count` styles; their sum is one. Raises ValueError if style_blend has other ones."""
        blend = self.style_blend or (1.0,) * count
        if len(blend) != count:
            raise ValueError(f"style_blend has {len(blend)} weights, there are {count} styles")
        return [weight / sum(blend) for weight in blend]

    def for_styles(self, count: int) -> list[Config]:
        """These options for each of `count` styles, with its own style_scale. Raises ValueError for another number."""
        scales = self.style_scale if isinstance(self.style_scale, tuple) else (self.style_scale,) * count
        if len(scales) != count:
            raise ValueError(f"style_scale has {len(scales)} numbers, there are {count} styles")
        return [replace(self, style_scale=scale) for scale in scales]

    def style_side(self, side: int) -> int:
        """Long side of a style for an image with this long side; of several, see `for_styles`."""
        assert isinstance(self.style_scale, float)
        return max(1, round(self.style_scale * side)) if self.style_size == "auto" else int(self.style_size)

    def whole(self, size: tuple[int, int]) -> tuple[int, int]:
        """A (width, height) that can be optimised: to tile, both are rounded up to multiples of WHOLE."""
        width, height = (-(-side // WHOLE) * WHOLE for side in size) if self.tile else size
        return width, height

    def window_for(self, size: tuple[int, int]) -> int | None:
        """The most pixels on a side of what the network sees of a picture of this size; None is all of it."""
        if self.window == "auto":
            return None
        most = int(self.window) // WHOLE * WHOLE
        return most if max(size) // WHOLE * WHOLE > most else None

    def schedule(self, aspect: float) -> list[tuple[int, int]]:
        """(long side, iterations) of each scale, coarse to fine, for a picture of this aspect (long / short side >= 1).

        Coarse iterations are cheap and settle the large strokes; what they find of details is lost at the next scale,
        which starts far above the loss of a run at that scale alone, so the last scale decides. Each one before it gets
        the share COARSE of its iterations. Scales whose short side would fall under MIN_SIDE are left out. The size has
        to be a number.
        """
        auto = 1 + max(0, round(2 * math.log2(self.long_side / COARSEST)))
        count = auto if self.scales == "auto" else int(self.scales)
        sides = [round(self.long_side / math.sqrt(2) ** i) for i in reversed(range(count))]
        sides = [max(self.whole((side, side))) for side in sides if round(side / aspect) >= MIN_SIDE]
        sides = list(dict.fromkeys(sides))  # two may be one when they are rounded up to tile
        if not sides:
            raise ValueError(
                f"a picture {aspect:.1f} times as long as it is wide has a short side under {MIN_SIDE} pixels "
                f"at size {self.long_side}: choose a larger size or crop it"
            )
        if isinstance(self.iterations, tuple):
            counts = [int(count) for count in self.iterations if count != "..."]
            if len(counts) < len(self.iterations) or len(counts) == 1:
                counts = (counts + counts[-1:] * len(sides))[: len(sides)]
            if len(counts) != len(sides):
                raise ValueError(f"iterations names {len(counts)} scales, there are {len(sides)}: {sides}")
            return list(zip(sides, counts, strict=True))
        coarse = max(1, round(COARSE * self.iterations))
        return [(side, coarse) for side in sides[:-1]] + [(sides[-1], self.iterations)]


def options() -> Iterable[Field[Any]]:
    """The fields of `Config`, for building a command line."""
    return fields(Config)


def check_option(name: str) -> None:
    """Raise ValueError unless `Config` has a field of this name."""
    choice("option", name, [option.name for option in options()])


def _shared(name: str, weights: Iterable[float]) -> None:
    """Raise ValueError for weights that cannot be divided by their sum."""
    total = sum(weights)
    if not total > 0:
        raise ValueError(f"{name}: give one weight at least that is not zero")
    if not math.isfinite(total):
        raise ValueError(f"{name}: the sum of the weights is beyond all numbers, give smaller ones")


def _weight(name: str, weight: object) -> None:
    number = _float(name, weight)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} {weight}: give a finite number that is not negative")


def _scale(value: object) -> float:
    number = float(_float("style_scale", value))
    if not 1 / 64 <= number <= 64:
        raise ValueError(f"style_scale {value}: give a number from 1/64 to 64")
    return number


def _weighted_layers(option: str, layers: object) -> tuple[tuple[str, float], ...]:
    """The layers as (name, weight) pairs."""
    if not isinstance(layers, tuple):
        kind = "auto or a tuple" if option == "content_layers" else "a tuple"
        raise TypeError(f"{option} has to be {kind} of layers, not {layers!r}")
    if not layers:
        raise ValueError(f"{option}: give at least one layer")
    found: dict[str, float] = {}
    for layer in layers:
        name, weight = layer, 1.0
        if isinstance(layer, str):
            name, colon, text = layer.partition(":")
            try:
                weight = float(text) if colon else 1.0
            except ValueError as error:
                raise ValueError(f"{option}: {layer}: give NAME:WEIGHT") from error
        elif isinstance(layer, tuple) and len(layer) == 2:
            name, weight = layer
        choice(f"{option}: layer", name, LOSS_LAYERS)
        _weight(f"{option}: weight of {name}", weight)
        if name in found:
            raise ValueError(f"{option}: {name} is named twice")
        found[name] = float(weight)
    return tuple(found.items())


def _plain(value: Any) -> Any:
    """Numbers, NumPy's among them, as Python's own, and sequences as tuples."""
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} has to be a whole number, not {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} {value}: give a number from {low} to {high}")


def _whole_or_auto(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, str) and value != "auto":
        raise ValueError(f"{name} {value!r}: give auto or a number")
    if value != "auto":
        _whole(name, value, low, high)


def _float(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} has to be a number, not {value!r}")
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError(f"{name}: the number is beyond all that can be computed with, give a smaller one")
    return value


def _number(name: str, value: object, low: float, high: float) -> None:
    if not low <= _float(name, value) <= high:
        raise ValueError(f"{name} {value}: give a number from {low:g} to {high:g}")
