"""`Stylizer`: loads a network once, then stylises any number of pictures, coarse to fine."""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from . import image as images
from . import kernels, provider
from .config import MIN_SIDE, Config
from .export import vgg
from .export.weights import load as load_weights
from .features import Features, Open
from .features import network as open_network
from .losses import Objective, Region
from .optimize import Iterate, State, minimise
from .regions import Mask, View, frozen, guide, load_mask, report_coverage
from .targets import Statistic, Statistics, Targets, blend, is_targets

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_NETWORKS = 8  # graph pairs kept open: the scales of one run
_STYLES = 64  # style targets kept, 2.4 MB each with the default layers


@dataclass(frozen=True)
class Step:
    """State of a run after one iteration.

    `scale` is the long side in pixels; `iteration` counts from 1 over the whole run, `total` is the last one. `loss`,
    that of this iteration, and `image`, the best picture of this scale so far, are converted when they are asked for:
    a GPU works ahead, and asking waits for it.
    """

    scale: int
    iteration: int
    total: int
    _iterate: Iterate = field(repr=False)
    _alpha: NDArray[np.float32] | None = field(repr=False)

    @property
    def loss(self) -> float:
        """The weighted total loss of this iteration's picture."""
        return self._iterate.loss

    @property
    def image(self) -> Image.Image:
        """The best picture of this scale so far, RGB or (if the content has alpha) RGBA."""
        alpha, pixels = self._alpha, self._iterate.best
        if alpha is not None:
            height, width = pixels.shape[2:]
            rgb = np.zeros((*alpha.shape, 3), np.float32)
            alpha = images.resize(images.Picture(rgb, alpha), (width, height)).alpha
        return images.to_pil(pixels, alpha)


@dataclass(frozen=True)
class Result:
    """A finished run: the picture, the last step, and (scale, loss, seconds since the start) of each iteration."""

    image: Image.Image
    last: Step
    trace: tuple[tuple[int, float, float], ...]


@dataclass(frozen=True)
class Goal:
    """What a run works towards, loaded and checked.

    `content` is None for a texture; `styles` holds pictures and targets, none for an inversion. `masks` has a pair for
    each style, in the content and in the style (None: all of it), or is empty; `freeze` is a mask of the content.
    """

    content: images.Picture | None
    styles: tuple[images.Picture | Targets, ...]
    masks: tuple[tuple[Mask, Mask | None], ...]
    freeze: Mask | None

    def layers(self, config: Config) -> tuple[str, ...]:
        """The layers of its loss."""
        if self.content is not None and self.styles:
            return config.layers
        used = config.content_layer_weights if self.content is not None else config.style_layer_weights
        return tuple(layer for layer in vgg.LAYERS if layer in used)


@dataclass(frozen=True)
class Score:
    """Losses of a picture and the gradient of the total.

    `loss` is the weighted total; `content_loss` is the sum over its layers by their weights, `style_loss` (by layer)
    and `tv_loss` are unweighted; `gradient` is float32 (H, W, 3): d loss / d pixel, for pixels in [0, 1].
    """

    loss: float
    content_loss: float
    style_loss: dict[str, float]
    tv_loss: float
    gradient: NDArray[np.float32]


class Stylizer:
    """Stylises pictures on one device with one set of weights; safe to call from several threads.

    `weights`: auto, embedded, imagenet or a file (see `engine.export.weights.load`); `device`: auto, cpu, onnxruntime,
    cuda or tensorrt; `precision`: auto, fp32 or fp16; `threads`: on a CPU, torch's own number by default. On a GPU
    `auto` is fp16, with scaled gradients, and fp32 from the first run on that meets a number fp16 cannot hold.

    Raises ValueError for an unknown name or a file that holds no VGG-19, OSError if it cannot be read, BackendError if
    the device cannot run here.
    """

    def __init__(
        self,
        weights: str | Path = "auto",
        device: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
    ) -> None:
        self.device, self.precision = provider.resolve(device, precision)
        self._automatic = precision == "auto"
        if threads is not None and threads < 1:
            raise ValueError(f"threads {threads}: give a number from 1")
        self._threads = threads or torch.get_num_threads()
        self._source = weights
        self._lock = threading.RLock()
        self._open: tuple[int, str, Open] | None = None
        self._networks: OrderedDict[Hashable, Features] = OrderedDict()
        self._targets: OrderedDict[Hashable, Statistics] = OrderedDict()
        self._digests: dict[tuple[str, ...], str] = {}
        self._network(Config().layers)

    @property
    def weights_name(self) -> str:
        """`embedded`, `imagenet` or the name of the weights file."""
        return self._network(Config().layers)[0]

    def __call__(
        self, content: Any, style: Any, config: Config | None = None, *, masks: Any = None, freeze: Any = None
    ) -> Result:
        """Stylise `content` (path, bytes, PIL image or array) with `style`, one such or a list of them.

        A style may also be its `Targets` or their file. Several styles share by `config.style_blend`: their statistics
        are averaged. The result has the content's aspect and `config.size` as its long side. Without content (None) a
        texture is made, of `config.size`; without style (None) the content's features are inverted.

        `masks`, one for each style, keeps a style to a part of the content: a mask of the content, or a pair of masks
        of the content and the style. A mask is a picture or an array (H, W), white inside, hard or soft, or the word
        `alpha`, the picture's own. `freeze` is a mask of the content whose pixels stay as they are.

        Raises ValueError, TypeError or OSError for pictures and options that cannot be used, FloatingPointError if the
        run meets a NaN or an infinity (`steps` then still has the last good picture).
        """
        start = time.perf_counter()
        trace = []
        for step in self.steps(content, style, config, masks=masks, freeze=freeze):
            trace.append((step.scale, step.loss, time.perf_counter() - start))
        return Result(step.image, step, tuple(trace))

    def steps(
        self, content: Any, style: Any, config: Config | None = None, *, masks: Any = None, freeze: Any = None
    ) -> Iterator[Step]:
        """The same run as an iterator over its iterations: leave it, and it stops.

        Pictures and options are checked now, the work is done as the iterator advances.
        """
        config = config or Config()
        goal = _load(content, style, config, masks, freeze)
        if goal.content is None and config.init == "content":
            config = replace(config, init="noise")
        picture = goal.content or _canvas(config)
        schedule = config.schedule(picture.aspect)
        start = images.load(config.init) if config.init not in ("content", "noise") else None
        return self._run(picture, goal, start, schedule, config)

    def evaluate(
        self, image: Any, content: Any, style: Any, config: Config | None = None, *, masks: Any = None
    ) -> Score:
        """Losses and pixel gradient of `image` at its own size, without optimising it.

        The content is resized to the image, the styles so that their long side equals the image's (or as
        `config.style_scale` and `config.style_size` have it).
        """
        config = config or Config()
        picture = images.load(image)
        goal = _load(content, style, config, masks, None)
        objective = self._objective(images.resize(goal.content or picture, picture.size), goal, config)
        terms, gradient = objective.evaluate(images.to_tensor(picture).to(objective.network.image.device))
        if not torch.isfinite(terms.total) and self._fall_back("a loss or a gradient that is not finite"):
            return self.evaluate(picture, content, style, config, masks=masks)
        assert gradient is not None
        return Score(
            float(terms.total),
            float(terms.content),
            {layer: float(value) for layer, value in terms.style.items()},
            float(terms.tv),
            gradient[0].permute(1, 2, 0).cpu().numpy(),
        )

    def _run(
        self,
        content: images.Picture,
        goal: Goal,
        start: images.Picture | None,
        schedule: list[tuple[int, int]],
        config: Config,
    ) -> Iterator[Step]:
        total = sum(iterations for _, iterations in schedule)
        iteration = 0
        state = State()
        pixels: Tensor | None = None
        for scale, iterations in schedule:
            size = content.fit(scale)
            scaled = images.resize(content, size)
            if pixels is None:
                pixels = _first_pixels(scaled, start, config)
            else:
                pixels = functional.interpolate(pixels, size=(size[1], size[0]), mode="bicubic")
            if goal.freeze is not None:
                held = frozen(goal.freeze, size).to(pixels.device)
                pixels = torch.where(held, images.to_tensor(scaled).to(pixels.device), pixels)
            end = iteration + iterations
            while iteration < end:
                try:
                    for iterate in self._minimise(scaled, goal, config, pixels, end - iteration, state):
                        iteration += 1
                        pixels = iterate.best
                        yield Step(scale, iteration, total, iterate, content.alpha)
                except FloatingPointError as error:
                    if not self._fall_back(error):
                        raise

    def _minimise(
        self,
        content: images.Picture,
        goal: Goal,
        config: Config,
        start: Tensor,
        iterations: int,
        state: State,
    ) -> Iterator[Iterate]:
        """The run at one scale, that of `content`, whose network is let go at its end."""
        objective = self._objective(content, goal, config)
        start = start.to(objective.network.image.device)
        yield from within(objective.network, minimise(objective.write, start, config.optimizer, iterations, state))

    def _fall_back(self, reason: object) -> bool:
        """Go on in fp32 if the precision was ours to choose: whether it was."""
        if not self._automatic or self.precision == "fp32":
            return False
        log.info("precision: fp32 from here on, as fp16 cannot hold this run: %s", reason)
        self.precision = "fp32"
        return True

    def targets(self, style: Any, config: Config | None = None, *, mask: Any = None) -> Targets:
        """The targets of a style for the scales of a run with `config`, to be saved or given in the place of the style.

        `mask` is a part of the style, as in a call. Raises ValueError, TypeError or OSError.
        """
        config = config or Config()
        picture = images.load(style)
        plane = None if mask is None else load_mask(mask, picture, "mask of the style")
        sides = [side for side, _ in config.schedule(1.0)]
        return Targets(
            self._made_for(tuple(config.style_layer_weights), config),
            {side: self._statistics(picture, side, config, plane) for side in sides},
        )

    def _objective(self, content: images.Picture, goal: Goal, config: Config) -> Objective:
        """The objective at the size of the content picture, which stands in for a missing content."""
        regions = self._regions(goal, max(content.size), config)  # the memory of this is free again
        network = self._features(content.size, goal.layers(config), config)
        targets = {}
        if goal.content is not None:
            with network.use():
                network.image.copy_(images.to_tensor(content))
                network.forward()
                targets = {layer: network.features[layer].clone() for layer in config.content_layer_weights}
        return Objective(
            network, targets, regions, config, None if goal.freeze is None else frozen(goal.freeze, content.size)
        )

    def _regions(self, goal: Goal, side: int, config: Config) -> list[Region]:
        """What the parts of an image with this long side are compared with."""
        if not goal.styles:
            return []
        layers = tuple(config.style_layer_weights)
        masks = goal.masks or ((None, None),) * len(goal.styles)
        found = [
            style.at(side, layers, self._made_for(style.layers, config))
            if isinstance(style, Targets)
            else self._statistics(style, side, config, mask)
            for style, (_, mask) in zip(goal.styles, masks, strict=True)
        ]
        device = "cpu" if self.device not in provider.GPUS else "cuda"
        found = [
            {layer: Statistic(each.matrix.to(device), each.mean.to(device)) for layer, each in one.items()}
            for one in found
        ]
        shares = config.style_shares(len(found))
        if not goal.masks:
            return [Region(blend(found, shares, config.style_loss))]
        return [Region(one, share, mask) for one, share, (mask, _) in zip(found, shares, goal.masks, strict=True)]

    def _made_for(self, layers: tuple[str, ...], config: Config) -> dict[str, str]:
        """What statistics of these layers depend on besides the picture and its size."""
        with self._lock:
            if layers not in self._digests:
                self._digests[layers] = load_weights(self._source, layers or vgg.LAYERS).digest[:16]
        weights = f"{self.weights_name} {self._digests[layers]}"
        return {"weights": weights, "pooling": config.pooling, "style loss": config.style_loss}

    def _statistics(self, style: images.Picture, side: int, config: Config, mask: Mask | None) -> Statistics:
        """The statistics of a style, or of its part in a mask, for an image with this long side.

        The style's long side follows the image's, and is longer where its short side needs it.
        """
        own = config.style_side(side)
        size = style.fit(max(own, math.ceil(MIN_SIDE * style.aspect)))
        digest = hashlib.sha256(style.rgb.tobytes())
        digest.update(b"" if mask is None else mask.tobytes())
        layers = tuple(config.style_layer_weights)
        key = (digest.digest(), style.size, size, layers, config.pooling, config.style_loss, self.precision)

        def make() -> Statistics:
            features = self._open_features(size, layers, config, forward_only=True)
            found = {}
            with features.use():
                features.image.copy_(images.to_tensor(images.resize(style, size)))
                features.forward()
                for layer in layers:
                    own = features.features[layer]
                    part = None if mask is None else guide(mask, (own.shape[2], own.shape[3]))
                    view = View(own.flatten(2)[0], config.style_loss, part)
                    view.read()
                    found[layer] = Statistic(kernels.gram(view.features, features.products), view.mean)
            return found

        return self._cached(self._targets, key, _STYLES, make)

    def _features(self, size: tuple[int, int], layers: tuple[str, ...], config: Config) -> Features:
        if self.device == "cpu":  # opens in milliseconds: better to give the memory back than to keep it
            return self._open_features(size, layers, config)
        key = (size, layers, config.pooling, self.precision)
        return self._cached(self._networks, key, _NETWORKS, lambda: self._open_features(size, layers, config))

    def _open_features(
        self, size: tuple[int, int], layers: tuple[str, ...], config: Config, forward_only: bool = False
    ) -> Features:
        precision = self.precision
        blocked = self.device == "onnxruntime" and precision == "fp32"
        nhwc = self.device in provider.GPUS and precision != "fp32"
        spec = vgg.Spec(size[1], size[0], layers, config.pooling, precision, blocked, nhwc)
        return self._network(layers)[1](spec, forward_only=forward_only)

    def _network(self, layers: tuple[str, ...]) -> tuple[str, Open]:
        """Name and opener of the network down to the deepest of `layers`, made anew only for a deeper one."""
        depth = len(vgg.cut(layers))
        with self._lock:
            if self._open is None or self._open[0] < depth:
                self._open = None  # before the deeper one is made: they need not stand side by side
                weights = load_weights(self._source, layers)
                self._open = depth, weights.name, open_network(weights, layers, self.device, self._threads)
            return self._open[1:]

    def _cached(self, cache: OrderedDict[Hashable, _T], key: Hashable, limit: int, make: Callable[[], _T]) -> _T:
        """The entry of a least-recently-used cache; one thread at a time makes a new one."""
        with self._lock:
            if key not in cache:
                cache[key] = make()
            cache.move_to_end(key)
            while len(cache) > limit:
                cache.popitem(last=False)
            return cache[key]


def _load(content: Any, style: Any, config: Config, masks: Any, freeze: Any) -> Goal:
    """Load and check the pictures of a call."""
    if content is None and style is None:
        raise ValueError("give a content or a style: with neither there is nothing to aim at")
    picture = None if content is None else images.load(content)
    sources = [] if style is None else list(style) if isinstance(style, list | tuple) else [style]
    if style is not None and not sources:
        raise ValueError("give at least one style")
    styles = tuple(
        (each if isinstance(each, Targets) else Targets.load(each)) if is_targets(each) else images.load(each)
        for each in sources
    )
    if styles:
        config.style_shares(len(styles))
    if picture is not None and isinstance(config.size, tuple):
        raise ValueError("size WxH is for runs without content: give the long side, the content has the shape")
    pairs = () if masks is None else _load_masks(masks, picture or _canvas(config), styles)
    if freeze is not None and picture is None:
        raise ValueError("freeze keeps pixels of the content: give one")
    held = None if freeze is None or picture is None else load_mask(freeze, picture, "freeze mask")
    return Goal(picture, styles, pairs, held)


def _load_masks(
    masks: Any, content: images.Picture, styles: Sequence[images.Picture | Targets]
) -> tuple[tuple[Mask, Mask | None], ...]:
    given = list(masks) if isinstance(masks, list | tuple) else [masks]
    if len(given) != len(styles):
        raise ValueError(f"{len(given)} masks for {len(styles)} styles: give one for each style")
    pairs = []
    for i, (mask, style) in enumerate(zip(given, styles, strict=True), 1):
        own, theirs = mask if isinstance(mask, tuple | list) else (mask, None)
        if theirs is not None and isinstance(style, Targets):
            raise ValueError(f"mask {i}: style targets have their mask in them; give the mask of the content alone")
        plane = load_mask(own, content, f"content mask {i}")
        assert not isinstance(style, Targets) or theirs is None
        part = None if theirs is None or isinstance(style, Targets) else load_mask(theirs, style, f"style mask {i}")
        pairs.append((plane, part))
    report_coverage([plane for plane, _ in pairs])
    return tuple(pairs)


def _canvas(config: Config) -> images.Picture:
    """A black picture in the shape of a run without content."""
    width, height = config.size if isinstance(config.size, tuple) else (config.size, config.size)
    return images.Picture(np.zeros((height, width, 3), np.float32))


def within(network: Features, iterates: Iterator[Iterate]) -> Iterator[Iterate]:
    """Advance the iterator on the stream of `network`, whose memory is free for others between two iterations."""
    while True:
        with network.use():
            iterate = next(iterates, None)
        if iterate is None:
            return
        yield iterate


def _first_pixels(content: images.Picture, start: images.Picture | None, config: Config) -> Tensor:
    """The pixels (1, 3, H, W) that the first scale starts from."""
    if start is not None:
        return images.to_tensor(images.resize(start, content.size))
    if config.init == "content":
        return images.to_tensor(content)
    generator = torch.Generator().manual_seed(config.seed)
    width, height = content.size
    return torch.rand(1, 3, height, width, generator=generator)
