"""`Stylizer`: loads a network once, then stylises any number of pictures, coarse to fine."""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
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
from .losses import Objective
from .optimize import Iterate, State, minimise

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
    def stages(self) -> dict[str, float]:
        """Seconds of this iteration by stage: forward, losses, cotangents, vjp, optimiser; empty on a GPU."""
        return self._iterate.stages

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
class Score:
    """Losses of a picture and the gradient of the total.

    `loss` is the weighted total; `content_loss`, `style_loss` (by layer) and `tv_loss` are unweighted; `gradient` is
    float32 (H, W, 3): d loss / d pixel, for pixels in [0, 1].
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
        self._open: tuple[int, bool, str, Open] | None = None
        self._networks: OrderedDict[Hashable, Features] = OrderedDict()
        self._grams: OrderedDict[Hashable, dict[str, Tensor]] = OrderedDict()
        self._network(Config())

    @property
    def weights_name(self) -> str:
        """`embedded`, `imagenet` or the name of the weights file."""
        return self._network(Config())[0]

    def __call__(self, content: Any, style: Any, config: Config | None = None) -> Result:
        """Stylise `content` (path, bytes, PIL image or array) with `style`, one such or a list of them.

        Several styles share equally: their Gram matrices are averaged. The result has the content's aspect and
        `config.size` as its long side.

        Raises ValueError, TypeError or OSError for pictures and options that cannot be used, FloatingPointError if the
        run meets a NaN or an infinity (`steps` then still has the last good picture).
        """
        start = time.perf_counter()
        trace = []
        for step in self.steps(content, style, config):
            trace.append((step.scale, step.loss, time.perf_counter() - start))
        return Result(step.image, step, tuple(trace))

    def steps(self, content: Any, style: Any, config: Config | None = None) -> Iterator[Step]:
        """The same run as an iterator over its iterations: leave it, and it stops.

        Pictures and options are checked now, the work is done as the iterator advances.
        """
        config = config or Config()
        picture = images.load(content)
        styles = _load_styles(style)
        schedule = config.schedule(picture.aspect)
        start = images.load(config.init) if config.init not in ("content", "noise") else None
        return self._run(picture, styles, start, schedule, config)

    def evaluate(self, image: Any, content: Any, style: Any, config: Config | None = None) -> Score:
        """Losses and pixel gradient of `image` at its own size, without optimising it.

        The content is resized to the image, the styles so that their long side equals the image's.
        """
        config = config or Config()
        picture = images.load(image)
        size = picture.size
        objective = self._objective(images.resize(images.load(content), size), _load_styles(style), config)
        terms, gradient = objective.evaluate(images.to_tensor(picture).to(objective.network.image.device))
        if not torch.isfinite(terms.total) and self._fall_back("a loss or a gradient that is not finite"):
            return self.evaluate(picture, content, style, config)
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
        styles: list[images.Picture],
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
            end = iteration + iterations
            while iteration < end:
                try:
                    for iterate in self._minimise(scaled, styles, config, pixels, end - iteration, state):
                        iteration += 1
                        pixels = iterate.best
                        yield Step(scale, iteration, total, iterate, content.alpha)
                except FloatingPointError as error:
                    if not self._fall_back(error):
                        raise

    def _minimise(
        self,
        content: images.Picture,
        styles: list[images.Picture],
        config: Config,
        start: Tensor,
        iterations: int,
        state: State,
    ) -> Iterator[Iterate]:
        """The run at one scale, that of `content`, whose network is let go at its end."""
        objective = self._objective(content, styles, config)
        start = start.to(objective.network.image.device)
        run = minimise(objective.write, start, config.optimizer, iterations, state, objective.stages)
        yield from within(objective.network, run)

    def _fall_back(self, reason: object) -> bool:
        """Go on in fp32 if the precision was ours to choose: whether it was."""
        if not self._automatic or self.precision == "fp32":
            return False
        log.info("precision: fp32 from here on, as fp16 cannot hold this run: %s", reason)
        self.precision = "fp32"
        return True

    def _objective(self, content: images.Picture, styles: list[images.Picture], config: Config) -> Objective:
        """The objective at the size of the content picture."""
        grams = [self._style_grams(style, max(content.size), config) for style in styles]  # whose memory is free again
        network = self._features(content.size, config)
        with network.use():
            network.image.copy_(images.to_tensor(content))
            network.forward()
            targets = {layer: network.features[layer].clone() for layer in config.content_layers}
        mean = {layer: torch.stack([each[layer] for each in grams]).mean(0) for layer in config.style_layers}
        return Objective(network, targets, mean, config)

    def _style_grams(self, style: images.Picture, long_side: int, config: Config) -> dict[str, Tensor]:
        """Gram matrices of a style whose long side is that of the image, or longer where its short side needs it."""
        size = style.fit(max(long_side, math.ceil(MIN_SIDE * style.aspect)))
        digest = hashlib.sha256(style.rgb.tobytes()).digest()
        key = (digest, style.size, size, config.style_layers, config.pooling, self.precision)

        def make() -> dict[str, Tensor]:
            features = self._open_features(size, config.style_layers, config, forward_only=True)
            with features.use():
                features.image.copy_(images.to_tensor(images.resize(style, size)))
                features.forward()
                flat = {layer: features.features[layer].flatten(2)[0] for layer in config.style_layers}
                return {layer: kernels.gram(each, features.products) for layer, each in flat.items()}

        return self._cached(self._grams, key, _STYLES, make)

    def _features(self, size: tuple[int, int], config: Config) -> Features:
        if self.device == "cpu":  # opens in milliseconds: better to give the memory back than to keep it
            return self._open_features(size, config.layers, config)
        key = (size, config.layers, config.pooling, self.precision)
        return self._cached(self._networks, key, _NETWORKS, lambda: self._open_features(size, config.layers, config))

    def _open_features(
        self, size: tuple[int, int], layers: tuple[str, ...], config: Config, forward_only: bool = False
    ) -> Features:
        precision = self.precision
        blocked = self.device == "onnxruntime" and precision == "fp32"
        nhwc = self.device in provider.GPUS and precision != "fp32"
        spec = vgg.Spec(size[1], size[0], layers, config.pooling, precision, blocked, nhwc)
        return self._network(config)[1](spec, forward_only=forward_only)

    def _network(self, config: Config) -> tuple[str, Open]:
        """Name and opener of the network down to the deepest layer, made anew only for what it cannot do yet."""
        depth, with_max = len(vgg.cut(config.layers)), config.pooling == "max"
        with self._lock:
            had = self._open[:2] if self._open else (0, False)
            if had[0] < depth or had[1] < with_max:
                self._open = None  # before the new one is made: they need not stand side by side
                depth, with_max = max(had[0], depth), had[1] or with_max
                layers = vgg.LAYERS[:depth]
                weights = load_weights(self._source, layers)
                opened = open_network(weights, layers, self.device, self._threads, with_max=with_max)
                self._open = depth, with_max, weights.name, opened
            assert self._open
            return self._open[2:]

    def _cached(self, cache: OrderedDict[Hashable, _T], key: Hashable, limit: int, make: Callable[[], _T]) -> _T:
        """The entry of a least-recently-used cache; one thread at a time makes a new one."""
        with self._lock:
            if key not in cache:
                cache[key] = make()
            cache.move_to_end(key)
            while len(cache) > limit:
                cache.popitem(last=False)
            return cache[key]


def _load_styles(style: Any) -> list[images.Picture]:
    sources = list(style) if isinstance(style, list | tuple) else [style]
    if not sources:
        raise ValueError("give at least one style")
    return [images.load(source) for source in sources]


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
