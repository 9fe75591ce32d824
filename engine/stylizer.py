"""`Stylizer`: loads a network once, then stylises any number of pictures, coarse to fine."""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import colour, kernels, provider
from . import image as images
from .cache import Cache
from .checkpoint import Checkpoint, dump
from .checkpoint import load as load_checkpoint
from .config import Config
from .export import vgg
from .export.weights import load as load_weights
from .features import Features, Open, give_back_freed_memory, within
from .features import network as open_network
from .goal import Goal, canvas, style_size
from .goal import load as load_goal
from .losses import Objective, Region
from .optimize import Iterate, Stall, State, minimise, resized
from .regions import Mask, frozen, guide, load_mask, statistic_of
from .start import first_pixels
from .targets import Statistic, Statistics, Targets, blend

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

# Bytes kept for later runs, $STYLIZE_CACHE_BYTES: style targets, 2.4 MB a scale with the default layers; and networks,
# 0.8 kB a pixel in fp16, but on `cpu`, where they open in milliseconds.
_CACHE, _NETWORK_CACHE = 2**28, 2**32


@dataclass(frozen=True)
class Step:
    """State of a run after one iteration.

    `scale` is the long side in pixels; `iteration` counts from 1 over the whole run, `total` is the last one as far as
    is known: a scale that stops early makes it smaller. `loss`, that of this iteration, and `image`, the best picture
    of this scale so far (the average of its pictures with `Config.average`), are converted when they are asked for, by
    the thread that takes the steps: a GPU works ahead, and asking waits for it.
    """

    scale: int
    iteration: int
    total: int
    _iterate: Iterate = field(repr=False)
    _content: images.Picture = field(repr=False)
    _config: Config = field(repr=False)
    _checkpoint: Callable[[], Checkpoint] = field(repr=False)

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
        """The best (or the average) picture of this scale so far, RGB or (if the content has alpha) RGBA."""
        alpha, pixels = self._content.alpha, self._iterate.best
        if alpha is not None:
            height, width = pixels.shape[2:]
            rgb = np.zeros((*alpha.shape, 3), np.float32)
            alpha = images.resize(images.Picture(rgb, alpha), (width, height)).alpha
        own = self._config
        shown = colour.finish(own.colour, images.from_tensor(pixels), self._content, own.tile)
        return images.to_pil(images.to_tensor(shown), alpha)

    def checkpoint(self) -> bytes:
        """The run so far, for `Stylizer.steps(.., resume=..)`: 1.2 kB a pixel with L-BFGS (GPU: 0.3), else 60 bytes.

        To be called before the next step is asked for, or after the iterator was closed at this step; raises
        RuntimeError later, when the optimiser has moved on. On a GPU it waits for the iterations under way.
        """
        return dump(self._checkpoint())


@dataclass(frozen=True)
class Result:
    """A finished run: the picture, the last step, and (scale, loss, seconds since the start) of each iteration."""

    image: Image.Image
    last: Step
    trace: tuple[tuple[int, float, float], ...]


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


@dataclass(frozen=True)
class _Network:
    """An open network: its convolutions, whether it pools by maximum, its weights' name and digests by depth."""

    depth: int
    with_max: bool
    name: str
    digests: tuple[str, ...]
    open: Open


class Stylizer:
    """Stylises pictures on one device with one set of weights; safe to call from several threads (on a
    GPU, with one current stream).

    `weights`: auto, embedded, imagenet or a file (see `engine.export.weights.load`); `device`: auto, cpu, onnxruntime,
    cudnn, cuda or tensorrt; `precision`: auto, fp32, fp16 or (cudnn, tensorrt) bf16; `threads`: on a CPU, torch's by
    default. On a GPU `auto` is fp16, with scaled gradients, and fp32 from the first run on that meets a number fp16
    cannot hold.

    Raises ValueError for an unknown name or a file that holds no VGG-19, OSError if it cannot be read, BackendError if
    the device cannot run here.

    Style targets and, but on `cpu`, networks are kept for later runs, up to the environment's STYLIZE_CACHE_BYTES.
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
        self._opened: _Network | None = None
        self._cache = Cache(images.limit("STYLIZE_CACHE_BYTES", _CACHE if self.device == "cpu" else _NETWORK_CACHE))
        self._network(Config().layers)

    @property
    def weights_name(self) -> str:
        """`embedded`, `imagenet` or the name of the weights file."""
        return self._network(Config().layers).name

    def weights_digest(self, layers: tuple[str, ...]) -> str:
        """sha256 of the weights down to the deepest of `layers`, and of the normalisation before them."""
        return self._network(layers).digests[len(vgg.cut(layers)) - 1]

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
        self,
        content: Any,
        style: Any,
        config: Config | None = None,
        *,
        masks: Any = None,
        freeze: Any = None,
        resume: bytes | None = None,
    ) -> Iterator[Step]:
        """The same run as an iterator over its iterations: leave it, and it stops.

        `resume`, the `Step.checkpoint()` of such a run, makes it go on behind that step; on a CPU every later step is
        that of the uninterrupted run, bit for bit. Pictures and options are checked now, the work is done as the
        iterator advances. Raises ValueError for a checkpoint that is damaged or of other pictures, options, weights,
        device or precision.
        """
        given = load_goal(content, style, config or Config(), masks, freeze)
        config = given.config
        picture = given.content or canvas(config)
        schedule = config.schedule(picture.aspect)
        kernels.pairs(config.history, self.device in provider.GPUS)  # too many are told now
        start = images.load(config.init) if config.init not in ("content", "noise", "style") else None
        identity = functools.cache(lambda: self._identity(given, start))
        resumed = None if resume is None else self._resumed(resume, identity)
        if resumed and resumed.iteration == int(resumed.tensors["schedule"].sum()):
            raise ValueError("the run of the checkpoint is finished")
        return self._run(picture, given.coloured(), start, schedule, identity, resumed)

    def evaluate(
        self, image: Any, content: Any, style: Any, config: Config | None = None, *, masks: Any = None
    ) -> Score:
        """Losses and pixel gradient of `image` at its own size, without optimising it.

        The content is resized to the image, the styles so that their long side equals the image's (or as
        `config.style_scale` and `config.style_size` have it). With `keep-before` the objective sees all of them in
        grey, and the gradient is that at the grey image.
        """
        goal = load_goal(content, style, config or Config(), masks, None).coloured()
        picture, _ = colour.prepare(goal.config.colour, images.load(image), [])
        objective = self._objective(images.resize(goal.content or picture, picture.size, goal.config.tile), goal)
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
        identity: Callable[[], dict[str, Any]],
        resumed: Checkpoint | None,
    ) -> Iterator[Step]:
        """The run; `content` is what was given, `goal` what the objective sees."""
        config, seen = goal.config, goal.content or content
        iteration = resumed.iteration if resumed else 0
        state = State()
        counts = resumed.tensors["schedule"].tolist() if resumed else [iterations for _, iterations in schedule]
        pixels: Tensor | None = resumed.tensors["average.value" if config.average else "best"] if resumed else None
        for index, (scale, _) in enumerate(schedule):
            if resumed and index < resumed.scale:
                continue
            size = config.whole(content.fit(scale))
            scaled = images.resize(seen, size, config.tile)
            if pixels is None:
                pixels = first_pixels(scaled, goal.styles, start, config)
            elif not resumed:
                pixels = resized(pixels, size[::-1], "bicubic", config.tile)
            if goal.freeze is not None and not resumed:
                held = frozen(goal.freeze, size).to(pixels.device)
                pixels = torch.where(held, images.to_tensor(scaled).to(pixels.device), pixels)
            stall = Stall(config.stop, resumed.tensors["stall"].tolist() if resumed else ())
            while iteration < sum(counts[: index + 1]) or resumed:
                tensors, resumed = resumed.tensors if resumed else None, None
                left = sum(counts[: index + 1]) - iteration
                try:
                    for iterate in self._minimise(scaled, goal, pixels, left, state, tensors):
                        iteration += 1
                        pixels = iterate.best
                        stops = config.stop > 0 and stall(iterate.loss)
                        if stops:
                            counts[index] = iteration - sum(counts[:index])
                        save = functools.partial(self._checkpoint, identity, index, iteration, iterate, counts, stall)
                        yield Step(scale, iteration, sum(counts), iterate, content, config, save)
                        if stops:
                            iterate.release()
                            break
                except FloatingPointError as error:
                    if not self._fall_back(error):
                        raise

    def _identity(self, given: Goal, start: images.Picture | None) -> dict[str, Any]:
        """What a run is made of: its options and device by value, its pictures and weights by their sha256."""
        config = given.config
        options = asdict(config) | {"init": config.init if start is None else images.digest(start)}
        own = {"weights": self.weights_digest(given.layers), "device": self.device}
        return {name.replace("_", "-"): value for name, value in options.items()} | given.digests() | own

    def _checkpoint(
        self,
        identity: Callable[[], dict[str, Any]],
        scale: int,
        iteration: int,
        iterate: Iterate,
        counts: list[int],
        stall: Stall,
    ) -> Checkpoint:
        """The run behind `iterate`, the newest of it."""
        tensors = iterate.save() | {"schedule": torch.tensor(counts), "stall": stall.save()}
        return Checkpoint(identity() | {"precision": self.precision}, scale, iteration, tensors)

    def _resumed(self, data: bytes, identity: Callable[[], dict[str, Any]]) -> Checkpoint:
        """The checkpoint, checked; one that has fallen back to fp32 makes us do so too."""
        checkpoint = load_checkpoint(data)
        if checkpoint.identity["precision"] == "fp32":
            self._fall_back("so was the run of the checkpoint")
        checkpoint.check(identity() | {"precision": self.precision})
        return checkpoint

    def _minimise(
        self,
        content: images.Picture,
        goal: Goal,
        start: Tensor,
        iterations: int,
        state: State,
        saved: Mapping[str, Tensor] | None,
    ) -> Iterator[Iterate]:
        """The run at one scale, that of `content`, whose network is let go at its end."""
        objective = self._objective(content, goal)
        start = start.to(objective.network.image.device)
        config = goal.config
        iterates = minimise(
            objective.write,
            start,
            config.optimizer,
            iterations,
            state,
            saved,
            stages=objective.stages,
            rate=config.learning_rate,
            history=config.history,
            clamp=config.clamp,
            average=config.average,
            wrap=config.tile,
            recorded=objective.recorded,
        )
        yield from within(objective.network, iterates)

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

    def _objective(self, content: images.Picture, goal: Goal) -> Objective:
        """The objective at the size of the content picture, which stands in for a missing content."""
        config = goal.config
        regions = self._regions(goal, max(content.size))  # the memory of this is free again
        network = self._features(content.size, goal.layers, config)
        targets = {}
        if goal.content is not None:
            with network.use():
                network.image.copy_(images.to_tensor(content))
                network.forward()
                targets = {layer: network.features[layer].clone() for layer in config.content_layer_weights}
        return Objective(
            network, targets, regions, config, None if goal.freeze is None else frozen(goal.freeze, content.size)
        )

    def _regions(self, goal: Goal, side: int) -> list[Region]:
        """What the parts of an image with this long side are compared with."""
        if not goal.styles:
            return []
        config = goal.config
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
        weights = f"{self.weights_name} {self.weights_digest(layers or vgg.LAYERS)[:16]}"
        weights += "" if config.pixel_range == "auto" else f" fed {config.pixel_range}"
        return {
            "weights": weights,
            "pooling": config.pooling,
            "padding": config.padding,
            "style loss": config.style_loss,
        }

    def _statistics(self, style: images.Picture, side: int, config: Config, mask: Mask | None) -> Statistics:
        """The statistics of a style, or of its part in a mask, for an image with this long side.

        A style is not expected to tile: it has borders even where the image has none.
        """
        size = style_size(style, side, config)
        digest = hashlib.sha256(style.rgb.tobytes())
        digest.update(b"" if mask is None else mask.tobytes())
        layers = tuple(config.style_layer_weights)
        kinds = (config.pixel_range, config.pooling, config.padding, config.style_loss, self.precision)
        key = (digest.digest(), style.size, size, layers, *kinds)

        def make() -> Statistics:
            features = self._open_features(size, layers, config, config.padding, forward_only=True)
            found = {}
            with features.use():
                features.image.copy_(images.to_tensor(images.resize(style, size)))
                features.forward()
                for layer in layers:
                    own = features.features[layer]
                    part = None if mask is None else guide(mask, (own.shape[2], own.shape[3]))
                    seen, mean = statistic_of(own.flatten(2)[0], config.style_loss, part)
                    found[layer] = Statistic(kernels.gram(seen, features.products), mean)
            return found

        return self._cache.get(("style", *key), make, _of_statistics)

    def _features(self, size: tuple[int, int], layers: tuple[str, ...], config: Config) -> Features:
        padding = "circular" if config.tile else config.padding
        make = functools.partial(self._open_features, size, layers, config, padding)
        if self.device == "cpu":  # opens in milliseconds: better to give the memory back than to keep it
            return make()
        key = ("network", size, layers, config.pixel_range, config.pooling, padding, self.precision)
        return self._cache.get(key, make, lambda network: network.memory)

    def _spec(self, size: tuple[int, int], layers: tuple[str, ...], config: Config, padding: str) -> vgg.Spec:
        blocked = self.device == "onnxruntime" and self.precision == "fp32"
        nhwc = self.device in provider.GPUS and self.precision != "fp32"
        return vgg.Spec(size[1], size[0], layers, config.pooling, self.precision, blocked, nhwc, padding)

    def _open_features(
        self,
        size: tuple[int, int],
        layers: tuple[str, ...],
        config: Config,
        padding: str,
        forward_only: bool = False,
    ) -> Features:
        spec, network = self._spec(size, layers, config, padding), self._network(layers, config.pooling)
        return network.open(spec, forward_only=forward_only, pixel_range=config.pixel_range)

    def _network(self, layers: tuple[str, ...], pooling: str = "avg") -> _Network:
        """The network down to the deepest of `layers`, made anew only for what it cannot do yet."""
        depth, with_max = len(vgg.cut(layers)), pooling == "max"
        with self._lock:
            had = (self._opened.depth, self._opened.with_max) if self._opened else (0, False)
            if had[0] < depth or had[1] < with_max:
                self._opened = None  # before the new one is made: they need not stand side by side
                depth, with_max = max(had[0], depth), had[1] or with_max
                layers = vgg.LAYERS[:depth]
                weights = load_weights(self._source, layers)
                opener = open_network(weights, layers, self.device, self._threads, with_max=with_max)
                self._opened = _Network(depth, with_max, weights.name, weights.digests, opener)
                del weights
                give_back_freed_memory()
            assert self._opened
            return self._opened


def _of_statistics(found: Statistics) -> list[Tensor]:
    return [tensor for each in found.values() for tensor in (each.matrix, each.mean)]
