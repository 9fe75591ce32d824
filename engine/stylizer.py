"""`Stylizer`: loads a network once, then stylises any number of pictures, coarse to fine."""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import colour, kernels, manifest, provider
from . import image as images
from .cache import Cache
from .checkpoint import Checkpoint
from .checkpoint import load as load_checkpoint
from .config import Config
from .export import vgg
from .features import Features, features_of, within
from .forecast import Forecast, Setup, begin, fit, fitted_again, forecast
from .goal import Goal, canvas, final_size, load_part, report_stretched, style_size, visible
from .goal import load as load_goal
from .losses import Objective, Region, Terms
from .motion import Carried
from .networks import Networks, spec_of
from .optimize import Iterate, Stall, State, minimise
from .regions import Mask, frozen, statistics_of
from .result import Result, Score, Step, checkpoint_of
from .start import enlarged, first_pixels
from .targets import Statistic, Statistics, Targets, blend
from .windows import Windowed

log = logging.getLogger(__name__)
_T = TypeVar("_T")

# Bytes kept for later runs, $STYLIZE_CACHE_BYTES: style targets, 2.4 MB a scale with the default layers; and networks,
# 0.8 kB a pixel in fp16, but on `cpu`.
_CACHE, _NETWORK_CACHE = 2**28, 2**32
_USUAL = tuple(Config().style_layer_weights)  # layers down to the deepest that most runs need


class Stylizer:
    """Stylises pictures on one device with one set of weights; safe to call from several threads (on a GPU, with one
    current stream).

    `weights`: auto, embedded, imagenet or a file (see `engine.export.weights.load`); `device`: auto, cpu, onnxruntime,
    cudnn, cuda or tensorrt; `precision`: auto, fp32, fp16 or (cpu, cudnn, tensorrt) bf16; `threads`: on a CPU, torch's
    by default. `auto` is fp16 on a GPU, with scaled gradients, where a run that meets a number fp16 cannot hold goes on
    in fp32; on `cpu` bf16, if the processor multiplies it faster.

    Raises ValueError for an unknown name, a precision that the named device does not have or a file that holds no
    VGG-19, OSError if it cannot be read, BackendError if the device, or for `auto` the precision, cannot run here.

    Style targets and, but on `cpu`, networks are kept for later runs, up to the environment's STYLIZE_CACHE_BYTES.
    Without `keep_networks` a network is let go at the end of its scale, for those who have one picture to paint.
    """

    def __init__(
        self,
        weights: str | Path = "auto",
        device: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        keep_networks: bool = True,
    ) -> None:
        self.device, self.precision = provider.resolve(device, precision)
        self._automatic = precision == "auto" and self.device != "cpu"  # bf16 has the range of fp32
        if threads is not None and threads < 1:
            raise ValueError(f"threads {threads}: give a number from 1")
        self._threads = threads or torch.get_num_threads()
        self._network = Networks(weights, self.device, self.precision, self._threads)
        # On a CPU they open in milliseconds: better to give the memory back.
        self.keeps_networks = keep_networks and self.device != "cpu"
        self._cache = Cache(images.limit("STYLIZE_CACHE_BYTES", _CACHE if self.device == "cpu" else _NETWORK_CACHE))
        self._network(_USUAL)

    @property
    def weights_name(self) -> str:
        """`embedded`, `imagenet` or the name of the weights file."""
        return self._network(_USUAL).name

    @property
    def weights_kind(self) -> str:
        """The network that the weights are of: see `engine.export.weights.Weights`."""
        return self._network(_USUAL).kind

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
        `alpha`, the picture's own. `freeze` is a mask of the content whose pixels stay as they are; the next two fade.

        Raises ValueError, TypeError or OSError for pictures and options that cannot be used, FloatingPointError if the
        run meets a NaN or an infinity (`steps` then still has the last good picture).
        """
        start, trace = time.perf_counter(), list[tuple[int, float, float]]()
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
        carried: Carried | None = None,
    ) -> Iterator[Step]:
        """The same run as an iterator over its iterations: leave it, and it stops.

        `resume`, the `Step.checkpoint()` of such a run, makes it go on behind that step; on a CPU every later step is
        that of the uninterrupted run, bit for bit (but for a window that memory asks for by now). Pictures and options
        are checked now, the work is done as the iterator advances. Raises ValueError for a checkpoint that is damaged
        or of other pictures, options, weights, device or precision.

        `carried`, of the size of the result, is what a frame of a video begins with and is held to: see `engine.video`.
        """
        asked, checkpoint = self._asked(config), None if resume is None else load_checkpoint(resume)
        asked = asked if checkpoint is None else fitted_again(asked, checkpoint.identity)
        given = replace(self._goal(content, style, asked, masks, freeze), carried=carried)
        setup = replace(self._setup, lent=len(resume or b""))
        given = begin(setup, given, None if checkpoint is None else checkpoint.identity)
        config, picture = given.config, given.content or canvas(given.config)
        asked = replace(asked, window=config.window, history=config.history)
        schedule = config.schedule(picture.aspect)
        start = None if config.start_file is None else images.load(config.start_file)
        file = None if start is None else start.digest
        if carried is not None:
            if len(schedule) > 1 or carried.picture.size != final_size(picture, config) or config.init != "content":
                raise ValueError("a frame is carried to one scale, in the size of its result, and begins as content")
            start = carried.picture
        elif config.tile and given.content is not None:
            report_stretched(given.content, final_size(given.content, config))
        identity = functools.cache(lambda: self._identity(given, file))
        resumed = None if checkpoint is None else self._resumed(checkpoint, identity)
        if resumed and resumed.iteration == int(resumed.tensors["schedule"].sum()):
            raise ValueError("the run of the checkpoint is finished")
        describe = functools.partial(self._manifest, given, manifest.inputs(asked, masks, freeze))
        return self._run(picture, given.coloured(), start, schedule, identity, resumed, describe)

    def _asked(self, config: Config | None) -> Config:
        """The options of a call, as the weights have them."""
        if not isinstance(config, Config | None):
            raise TypeError(f"config has to be a Config, not {config!r}")
        return (config or Config()).for_weights(self.weights_kind)

    def _goal(self, content: Any, style: Any, config: Config, masks: Any, freeze: Any) -> Goal:
        """The goal of a run, checked: too many pairs of L-BFGS are told now, and so are targets of other scales."""
        goal = load_goal(content, style, config, masks, freeze)
        config = goal.config
        if config.optimizer == "lbfgs":
            kernels.pairs(config.history, self.device in provider.GPUS)
        sides = [side for side, _ in config.schedule((goal.content or canvas(config)).aspect)]
        for each, own in zip(goal.styles, goal.own, strict=True):
            if isinstance(each, Targets):
                [self._saved(each, side, own) for side in sides]
        return goal

    @property
    def _setup(self) -> Setup:
        return Setup(self.device, self.precision, self._threads, self._cache if self.keeps_networks else None)

    def forecast(
        self, content: Any, style: Any, config: Config | None = None, *, masks: Any = None, freeze: Any = None
    ) -> Forecast:
        """The memory that the same call will take, at whichever scale it takes the most.

        Raises ValueError, TypeError or OSError as the call would, and ValueError for a device other than cpu and cudnn.
        """
        goal = self._goal(content, style, self._asked(config), masks, freeze)
        if goal.config.start_file is not None:
            images.load(goal.config.start_file)
        return forecast(self._setup, fit(self._setup, goal))

    def fitted(
        self, content: Any, style: Any, config: Config | None = None, *, masks: Any = None, freeze: Any = None
    ) -> Config:
        """The options that the same call will have: content layers; a window or fewer pairs if memory is short."""
        asked = self._asked(config)
        chosen = fit(self._setup, self._goal(content, style, asked, masks, freeze)).config
        return replace(asked, window=chosen.window, history=chosen.history)

    def evaluate(
        self, image: Any, content: Any, style: Any, config: Config | None = None, *, masks: Any = None
    ) -> Score:
        """Losses and pixel gradient of `image` at its own size, without optimising it.

        The content is resized to the image, the styles so that their long side equals the image's (or as
        `config.style_scale` and `config.style_size` have it). With `keep-before` the objective sees all of them in
        grey, and the gradient is that at the grey image. Raises as a call does.
        """
        picture = images.load(image)
        goal = load_goal(content, style, self._asked(config), masks, None, picture).coloured()
        picture, _ = colour.prepare(goal.config.colour, picture, [])
        seen = images.resize(goal.content or picture, picture.size, goal.config.tile)

        def found(precision: str) -> tuple[Terms, Tensor | None]:
            objective = self._objective(seen, goal, precision)
            terms, gradient = objective.evaluate(images.to_tensor(picture).to(objective.network.image.device))
            if not torch.isfinite(terms.total):
                raise FloatingPointError(f"the loss is {float(terms.total)}, or its gradient is not finite")
            return terms, gradient

        terms, gradient = self._fitting(found)
        assert gradient is not None
        return Score(
            float(terms.total),
            float(terms.content),
            {layer: float(value) for layer, value in terms.style.items()},
            float(terms.tv),
            gradient[0].permute(1, 2, 0).cpu().numpy(),
        )

    def objective(
        self, content: Any, style: Any, config: Config | None = None, *, masks: Any = None, freeze: Any = None
    ) -> Objective:
        """The loss at the last scale of such a run, for an optimiser of your own: `engine.autograd.loss` takes it.

        `objective.network.image` (1, 3, H, W) has the shape and the device of the pixels. Raises as a call does.
        """
        goal = load_goal(content, style, self._asked(config), masks, freeze).coloured()
        picture = goal.content or canvas(goal.config)
        picture = images.resize(picture, final_size(picture, goal.config), goal.config.tile)
        return self._fitting(functools.partial(self._objective, picture, goal))

    def _run(
        self,
        content: images.Picture,
        goal: Goal,
        start: images.Picture | None,
        schedule: list[tuple[int, int]],
        identity: Callable[[], dict[str, Any]],
        resumed: Checkpoint | None,
        describe: Callable[..., dict[str, Any]],
    ) -> Iterator[Step]:
        """The run; `content` is what was given, `goal` what the objective sees."""
        config = goal.config
        seen = scaled = goal.content or content
        precision = resumed.identity["precision"] if resumed else self.precision
        iteration = resumed.iteration if resumed else 0
        state = State()
        counts = resumed.tensors["schedule"].tolist() if resumed else [iterations for _, iterations in schedule]
        pixels: Tensor | None = resumed.tensors["average.value" if config.average else "best"] if resumed else None
        for index, (scale, _) in enumerate(schedule):
            if resumed and index < resumed.scale:
                continue
            size = config.whole(content.fit(scale))
            coarser, scaled = scaled, images.resize(seen, size, config.tile)
            if pixels is None:
                pixels = first_pixels(scaled, goal.styles, start, config)
                start = None  # it may be larger than all else
            elif not resumed:
                pixels = enlarged(pixels, (coarser, scaled) if goal.detailed else None, size, config.tile)
            if goal.freeze is not None and not resumed:
                held = frozen(goal.freeze, size).to(pixels.device)
                pixels = torch.where(held, images.to_tensor(scaled).to(pixels.device), pixels)
            stall = Stall(config.stop, resumed.tensors["stall"].tolist() if resumed else ())
            while iteration < sum(counts[: index + 1]) or resumed:
                handed = [resumed.tensors if resumed else None]  # they are large: nobody else is to hold them
                resumed = None
                left = sum(counts[: index + 1]) - iteration
                try:
                    for iterate in self._minimise(scaled, goal, precision, pixels, left, state, handed.pop()):
                        iteration += 1
                        pixels = iterate.best
                        stops = config.stop > 0 and stall(iterate.loss)
                        if stops:
                            counts[index] = iteration - sum(counts[:index])
                        behind = index, iteration, iterate, counts, stall
                        save = functools.partial(checkpoint_of, identity, precision, *behind)
                        shown = content, config, goal.freeze
                        yield Step(scale, iteration, sum(counts), precision, iterate, *shown, save, describe)
                        if stops:
                            iterate.release()
                            break
                except FloatingPointError as error:
                    if not self._falls_back(precision, error):
                        ways = "smaller weights" + (" or --precision fp32" if precision == "fp16" else "")
                        raise FloatingPointError(f"{error}, after iteration {iteration}: try {ways}") from error
                    precision = "fp32"

    def _identity(self, given: Goal, file: str | None) -> dict[str, Any]:
        """What a run is made of: its options and device by value, its pictures, `file` too, and weights by sha256."""
        config = given.config
        options = asdict(config) | {"init": config.init if file is None else file}
        own = {"weights": self.weights_digest(given.layers), "device": self.device}
        return {name.replace("_", "-"): value for name, value in options.items()} | given.digests() | own

    def _manifest(
        self,
        given: Goal,
        inputs: Mapping[str, Any],
        losses: Sequence[tuple[int, float]],
        seconds: float,
        precision: str,
        total: int,
    ) -> dict[str, Any]:
        """The manifest of a run of these pictures as far as it came, at this precision: see `manifest.describe`."""
        if given.carried is not None:
            raise ValueError("a frame of a video has no manifest: it is not made again without those before it")
        engine = {"device": self.device, "precision": precision, "weights": self.weights_name}
        engine["sha256"] = self.weights_digest(given.config.layers)
        if precision != self.precision:
            engine["began"] = self.precision  # and fell back
        content = None if given.content is None else manifest.named(given.content)
        styles = [manifest.named(style) for style in given.styles]
        return manifest.describe(inputs, content, styles, engine, losses, seconds, total)

    def _resumed(self, checkpoint: Checkpoint, identity: Callable[[], dict[str, Any]]) -> Checkpoint:
        """The checkpoint, checked; it may be of a run that fell back to fp32, and goes on through any window."""
        own = checkpoint.identity
        fell_back = self._automatic and own["precision"] == "fp32"
        may = {"precision": "fp32" if fell_back else self.precision, "window": own["window"]}
        checkpoint.check(identity() | may)
        return checkpoint

    def _minimise(
        self,
        content: images.Picture,
        goal: Goal,
        precision: str,
        start: Tensor,
        iterations: int,
        state: State,
        saved: Mapping[str, Tensor] | None,
    ) -> Iterator[Iterate]:
        """The run at one scale, that of `content`, whose network is let go at its end."""
        objective = self._objective(content, goal, precision)
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
            frozen=objective.frozen,
            recorded=objective.recorded,
        )
        del saved
        yield from within(objective.network, iterates)

    def _falls_back(self, precision: str, reason: object) -> bool:
        """Whether a run that failed in this precision goes on in fp32: the precision was ours to choose."""
        if not self._automatic or precision == "fp32":
            return False
        log.info("precision: this run goes on in fp32, as %s cannot hold it: %s", precision, reason)
        return True

    def _fitting(self, make: Callable[[str], _T]) -> _T:
        """What is made in our precision, or in fp32 where that cannot hold it: FloatingPointError."""
        try:
            return make(self.precision)
        except FloatingPointError as error:
            if not self._falls_back(self.precision, error):
                raise
        return make("fp32")

    def targets(self, style: Any, config: Config | None = None, *, mask: Any = None) -> Targets:
        """The targets of a style for the scales of a run with `config`, to be saved or given in the place of the style.

        `mask` is a part of the style, as in a call. Raises ValueError, TypeError or OSError.
        """
        (config,) = replace(self._asked(config), iterations=1).for_styles(1)  # a square's may have other scales
        if config.size == "original":
            raise ValueError("size original is that of a content, and there is none: give a number")
        picture = images.load(style)
        plane = None if mask is None else load_part(mask, picture, "mask of the style")
        sides = [side for side, _ in config.schedule(1.0)]
        statistics = self._fitting(
            lambda precision: {side: self._statistics(picture, side, config, plane, precision) for side in sides}
        )
        return Targets(self._made_for(tuple(config.style_layer_weights), config), statistics)

    def _saved(self, targets: Targets, side: int, config: Config) -> Statistics:
        """What targets hold for an image with this long side; ValueError if they were made for something else."""
        return targets.at(side, tuple(config.style_layer_weights), self._made_for(targets.layers, config))

    def _objective(self, content: images.Picture, goal: Goal, precision: str) -> Objective:
        """The objective at the size of the content picture, which stands in for a missing content.

        Raises FloatingPointError where the precision cannot hold the statistics of a style.
        """
        config = goal.config
        kernels.stand_captures(provider.place(self.device))
        regions = self._regions(goal, max(content.size), precision)  # the memory of this is free again
        network = self._features(content.size, goal.layers, config, precision)
        targets = []
        if goal.content is not None:
            targets = features_of(network, images.to_tensor(content), config.content_layer_weights)
        held = None if goal.freeze is None else frozen(goal.freeze, content.size)
        temporal = None if goal.carried is None else goal.carried.loss(network.image.device)
        return Objective(network, targets, regions, config, held, temporal)

    def _regions(self, goal: Goal, side: int, precision: str) -> list[Region]:
        """What the parts of an image with this long side are compared with."""
        if not goal.styles:
            return []
        config = goal.config
        found = [
            self._saved(style, side, own)
            if isinstance(style, Targets)
            else self._statistics(style, side, own, mask, precision)
            for style, (_, mask), own in zip(goal.styles, goal.parts, goal.own, strict=True)
        ]
        device = provider.place(self.device)
        found = [
            {layer: Statistic(each.matrix.to(device), each.mean.to(device)) for layer, each in one.items()}
            for one in found
        ]
        shares = config.style_shares(len(found))
        if not goal.masks:
            return [Region(blend(found, shares, config.style_loss))]
        return [Region(one, share, mask) for one, share, (mask, _) in zip(found, shares, goal.masks, strict=True)]

    def _made_for(self, layers: tuple[str, ...], config: Config) -> dict[str, str]:
        """What statistics of these layers depend on besides the picture and the image's size."""
        weights = f"{self.weights_name} {self.weights_digest(layers or vgg.LAYERS)[:16]}"
        weights += "" if config.pixel_range == "auto" else f" fed {config.pixel_range}"
        return {
            "weights": weights,
            "pooling": config.pooling,
            "padding": config.padding,
            "style loss": config.style_loss,
            "style scale": str(config.style_scale),
            "style size": str(config.style_size),
        }

    def _statistics(
        self, style: images.Picture, side: int, config: Config, mask: Mask | None, precision: str
    ) -> Statistics:
        """The statistics of what a style shows, or of its part in a mask, for an image with this long side.

        A style is not expected to tile: it has borders even where the image has none.
        """
        size, mask = style_size(style, side, config), visible(style, mask)
        of_mask = None if mask is None else hashlib.sha256(mask.tobytes()).digest()
        layers = tuple(config.style_layer_weights)
        kinds = (config.pixel_range, config.pooling, config.padding, config.style_loss, precision)
        key = (style.digest, of_mask, size, layers, config.window_for(size), *kinds)

        def make() -> Statistics:
            kernels.stand_captures(provider.place(self.device))
            picture = images.resize(images.shown(style), size)  # before there is a network beside it
            network = self._open_features(size, layers, config, config.padding, precision, forward_only=True)
            return statistics_of(network, picture, layers, config.style_loss, mask)

        return self._cache.get(
            ("style", *key), make, lambda found: [own for each in found.values() for own in (each.matrix, each.mean)]
        )

    def _features(self, size: tuple[int, int], layers: tuple[str, ...], config: Config, precision: str) -> Features:
        padding = "circular" if config.tile else config.padding
        make = functools.partial(self._open_features, size, layers, config, padding, precision)
        if not self.keeps_networks:
            return make()
        key = ("network", size, layers, config.window_for(size), config.pixel_range, config.pooling, padding, precision)
        return self._cache.get(key, make, lambda network: network.memory)

    def _open_features(
        self,
        size: tuple[int, int],
        layers: tuple[str, ...],
        config: Config,
        padding: str,
        precision: str,
        forward_only: bool = False,
    ) -> Features:
        spec, most = spec_of(self.device, precision, size, layers, config.pooling, padding), config.window_for(size)
        opened = self._network(layers, config.pooling).open
        opened = functools.partial(opened, forward_only=forward_only, pixel_range=config.pixel_range)
        return opened(spec) if most is None else Windowed(spec, most, opened, forward_only=forward_only)
