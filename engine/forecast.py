"""How much memory a run will take, told before anything of it is allocated."""

from __future__ import annotations

import contextlib
import logging
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import image as images
from . import kernels, optimize, provider, windows
from .cache import Cache
from .config import FITTED, MATCHED, Config
from .export import vgg
from .features import DTYPES
from .goal import Goal, canvas, final_size, style_size
from .networks import spec_of

log = logging.getLogger(__name__)

DEVICES = ("cpu", "cudnn")  # where all memory is ours; what ONNX Runtime and TensorRT take is theirs to know
_SYSTEM = Path("/")
_AT_MOST = 16384  # bytes of a pixel that a run hardly takes for a region
_SURE = 0.9  # of what is free: forecasts are not exact, and others take memory meanwhile
# Iterations to a loss with so few pairs, over those with 50 (benchmarks/README.md).
_SLOWER = {20: 1.2, 10: 1.5, 5: 2.0}
_RECOLOURED = 136  # bytes of a pixel of a picture while its colours are changed
_BACK = 80  # bytes of a pixel while the content's colours come back


@dataclass(frozen=True)
class Forecast:
    """The bytes that a run takes at its peak, by what takes them; `size` (width, height) is that of the picture.

    On `cpu` they come on top of what the process holds that has opened the weights and read the pictures; on `cudnn`
    they are memory of the GPU beside the context of CUDA, and the host is not counted. What it takes to change the
    colours of big pictures is known roughly only.
    """

    size: tuple[int, int]
    device: str
    precision: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {short(value)}" for name, value in self.parts.items())
        width, height = self.size
        return f"{self.device}, {self.precision}, {width} x {height}: {short(self.total)} ({parts})"


@dataclass(frozen=True)
class Setup:
    """What a `Stylizer` paints with, and where it keeps networks for later runs, if it does.

    `lent` are the bytes of the host that will be given back before the run needs them.
    """

    device: str
    precision: str
    threads: int
    cache: Cache | None
    lent: int = 0


def fit(setup: Setup, goal: Goal, *, same_pairs: bool = False) -> Goal:
    """The goal, fitted to the memory that there is, where its run would take more and this is forecast; it is logged.

    The options FITTED make room if they are `auto`, in the way that slows the run down least: the network gets a
    window, L-BFGS fewer pairs, unless they are to stay the `same_pairs`. If nothing helps there is a warning. Runs side
    by side do not know of each other. What is kept for later runs counts as free.
    """
    left, config = _free(setup), goal.config
    if left is not None and setup.cache is not None:
        left += setup.cache.bytes
    needed = _too_much(left, setup, goal)
    if left is None or needed is None:
        return goal
    seen, pairs = [config.window], [(config.history, 1.0)]
    if config.window == "auto":
        seen += windows.choices(max(map(max, _sizes(goal))), goal.layers, wrap=config.tile)
    if config.history == "auto" and config.optimizer == "lbfgs" and not same_pairs:
        usual = kernels.pairs("auto", setup.device == "cudnn")
        pairs += [(count, slower) for count, slower in _SLOWER.items() if count < usual]
    for most in (_SURE * left, left) if needed > left else (_SURE * left,):
        choices = []
        for history, slower in pairs:
            given = [replace(goal, config=replace(config, window=window, history=history)) for window in seen]
            if forecast(setup, given[-1]).total <= most:  # and of the windows that fit, the largest
                found = given[bisect_left(given, -most, key=lambda each: -forecast(setup, each).total)]
                choices.append((slower * _cost(setup, found), found))
        if choices:
            return _chosen(setup, goal, min(choices, key=lambda each: each[0])[1], needed, left)
    if needed > left:
        text = "this will take about %s of memory, and %s are free"
        least = replace(goal, config=replace(config, window=seen[-1], history=pairs[-1][0]))
        if least != goal:
            text += f", where {_changes(goal, least)} would take {short(forecast(setup, least).total)}"
        text += ": less is needed with a smaller --size"
        text += ", a smaller --window" if config.window != "auto" else ""
        if config.optimizer == "lbfgs":
            text += ", a --history of few pairs" if config.history != "auto" else ""
            text += " or --optimizer adam"
        log.warning(text, short(needed), short(left))
    return goal


def _chosen(setup: Setup, asked: Goal, found: Goal, needed: int, left: int) -> Goal:
    """What was found, which the log is told."""
    text = "this would take about %s of memory, more than nine tenths of the %s that are free: with %s it takes %s"
    times = _cost(setup, found) / _cost(setup, asked)
    text += f", an evaluation some {times:.1f} times as long" if found.config.window != asked.config.window else ""
    if found.config.history != asked.config.history:
        text += f", and the same loss some {_SLOWER[int(found.config.history)]} times the iterations"
    log.info(text, short(needed), short(left), _changes(asked, found), short(forecast(setup, found).total))
    return found


def _changes(asked: Goal, found: Goal) -> str:
    pairs = [(name, getattr(asked.config, name), getattr(found.config, name)) for name in FITTED]
    return " and ".join(f"--{name} {new}" for name, old, new in pairs if new != old)


def _free(setup: Setup) -> int | None:
    """Bytes that are free; None where memory is not forecast, or the system does not tell."""
    left = available(setup.device) if setup.device in DEVICES else None
    return None if left is None else left + setup.lent * (setup.device == "cpu")


def begin(setup: Setup, goal: Goal, identity: Mapping[str, Any] | None) -> Goal:
    """The goal as its run begins: fitted, and what is kept for later ones let go, if it needs the memory.

    A frame behind another has what was chosen for the first one; with the `identity` of a checkpoint the run goes on.
    """
    if identity is not None:
        setup = replace(setup, precision=identity["precision"])  # it may have fallen back
    if goal.carried is None:
        goal = fit(setup, goal, same_pairs=identity is not None)
    if setup.cache is not None and _too_much(_free(setup), setup, goal) is not None:
        setup.cache.clear()
    return goal


def fitted_again(config: Config, identity: Mapping[str, Any]) -> Config:
    """The options as they were chosen for the run of a checkpoint with this identity, where they are `auto`."""
    return replace(config, **{name: identity[name] for name in FITTED if getattr(config, name) == "auto"})


def _too_much(left: int | None, setup: Setup, goal: Goal) -> int | None:
    """The bytes that the run takes, if that is more than is surely free: None if not, or if nobody knows.

    A forecast takes some time, and small pictures need none.
    """
    if left is None or _rough(goal) < left:
        return None
    needed = forecast(setup, goal).total
    return needed if needed > _SURE * left else None


def _rough(goal: Goal) -> int:
    """Bytes that the run takes with uncommon options only."""
    regions = max(1, len(goal.masks))
    sources = [each for each in (goal.content, *goal.styles) if isinstance(each, images.Picture)]
    return _AT_MOST * regions * max(map(math.prod, _sizes(goal))) + _RECOLOURED * max(
        (math.prod(each.size) for each in sources), default=0
    )


def _sizes(goal: Goal) -> list[tuple[int, int]]:
    """(width, height) of the result, and of the styles at its scale."""
    size = _size(goal)
    styles = zip(goal.styles, goal.own, strict=True)
    return [size, *(style_size(each, max(size), own) for each, own in styles if isinstance(each, images.Picture))]


def _cost(setup: Setup, goal: Goal) -> float:
    """How many times as long an evaluation at the last scale takes as without windows."""
    size = _size(goal)
    return windows.cost(_spec_of_run(setup, goal, size), goal.config.window_for(size))


def _size(goal: Goal) -> tuple[int, int]:
    return final_size(goal.content or canvas(goal.config), goal.config)


def forecast(setup: Setup, goal: Goal) -> Forecast:
    """What a run takes at whichever scale it takes the most; with the window `auto` without one.

    Raises ValueError for a device that is not one of DEVICES.
    """
    if setup.device not in DEVICES:
        raise ValueError(f"device {setup.device}: memory is forecast for {' and '.join(DEVICES)} only")
    config, picture = goal.config, goal.content or canvas(goal.config)
    phases, kept = list[dict[str, int]](), list[int]()
    for side, steps in config.schedule(picture.aspect):
        size = config.whole(picture.fit(side))
        style_phase, run_phase = _style_phase(setup, goal, size), _run_phase(setup, goal, size, steps)
        if setup.cache is not None:  # those of the scales before
            style_phase["other networks"] = sum(kept)
            shared = {name: run_phase[name] for name in ("network", "weights", "libraries")}
            phases.append({**shared, "other networks": sum(kept)})  # it is opened before others make room for it
            own = run_phase["network"] + run_phase["libraries"]
            if own <= setup.cache.limit:
                kept.append(own)
            while sum(kept) > setup.cache.limit:
                kept.pop(0)
            run_phase["other networks"] = sum(kept) - (own if own <= setup.cache.limit else 0)
        phases += [style_phase, run_phase]
    if setup.device == "cpu":
        sources = [each for each in (picture, *goal.styles) if isinstance(each, images.Picture)]
        recoloured = [math.prod(each.size) for each in _recoloured(goal)]
        beside = 3 * 4 * sum(recoloured)
        phases = [{**phase, "colours": beside} for phase in phases]
        taken = (math.prod(each.size) * (_RECOLOURED if recoloured else _resized(each)) for each in sources)
        earlier = beside - 3 * 4 * max(recoloured, default=0)  # they are there while the largest is made
        phases.append({"colours" if recoloured else "sources": max(taken) + earlier})
    most = max(phases, key=lambda parts: sum(parts.values()))
    found = {name: value for name, value in most.items() if value}
    return Forecast(_size(goal), setup.device, setup.precision, found)


def _recoloured(goal: Goal) -> list[images.Picture]:
    """The pictures that a run has in other colours beside their own."""
    if goal.content is None or goal.config.colour in ("none", "keep-after"):
        return []
    styles = [each for each in goal.styles if isinstance(each, images.Picture)]
    return styles if goal.config.colour in MATCHED else [goal.content, *styles]


def _resized(picture: images.Picture) -> int:
    """Bytes of a pixel of a picture while it is brought to the size of a scale: copies of what is seen of it."""
    return 8 if picture.opaque else 28


def available(device: str) -> int | None:
    """Bytes of memory that a device of DEVICES has left; None where the system does not tell.

    Of a CPU's memory that is what Linux holds to be available, or less where a cgroup (v2), that of a container, has a
    limit.
    """
    if device == "cudnn":
        place = provider.place(device)
        kernels.stand_captures(place)
        kept = torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
        return int(torch.cuda.mem_get_info(place)[0]) + kept
    try:
        left = [1024 * _numbers(_SYSTEM / "proc/meminfo")["MemAvailable:"]]
    except (OSError, KeyError):
        return None
    with contextlib.suppress(OSError):  # there are no cgroups
        own = (_SYSTEM / "proc/self/cgroup").read_text().rpartition("0::/")[2].partition("\n")[0]
        root = _SYSTEM / "sys/fs/cgroup"
        for group in (each for each in (root / own, *(root / own).parents) if each.is_relative_to(root)):
            with contextlib.suppress(OSError, ValueError, KeyError):  # one without a limit
                used = int((group / "memory.current").read_text()) - _numbers(group / "memory.stat")["inactive_file"]
                left.append(int((group / "memory.max").read_text()) - used)
    return max(0, min(left))


def _numbers(file: Path) -> dict[str, int]:
    """The first number of each line by its first word."""
    return {words[0]: int(words[1]) for words in map(str.split, file.read_text().splitlines()) if words}


def _style_phase(setup: Setup, goal: Goal, run: tuple[int, int]) -> dict[str, int]:
    """While the statistics of a style are taken for a run of this (width, height): the network at the style's size."""
    config, gpu, most, spec = goal.config, setup.device == "cudnn", 0, None
    for style, (_, mask), own_config in zip(goal.styles, goal.parts, goal.own, strict=True):
        if not isinstance(style, images.Picture):
            continue
        size = style_size(style, max(run), own_config)
        spec = _spec(setup, size, tuple(config.style_layer_weights), config, config.padding)
        own = _network(setup, spec, config, (), forward_only=True)
        own += (1 if gpu else 2) * 3 * 4 * math.prod(size)  # the style, and on a CPU its tensor
        window = config.window_for(size)
        most_places = max(windows.largest(spec, window).values())
        own += 8 * min(kernels.STRIP, most_places)
        if gpu:
            own += max(_products(spec, window, [layer], 1) for layer in spec.layers)
        masked = mask is not None or style.alpha is not None
        if config.style_loss != "gram" or masked:  # what is made of the features; with a mask, on a way
            element = _element(spec, gpu) + 4 * masked
            own += element * most_places
        most = max(most, own)
    pictures = 0 if gpu else 3 * 3 * 4 * math.prod(run)  # the content, the start, those before them
    return {"network of the style": most, **(_beside(setup, spec, config) if spec else {}), "pictures": pictures}


def _element(spec: vgg.Spec, gpu: bool) -> int:
    """Bytes of a feature: on a CPU it is fp32 whatever the products are made of."""
    return DTYPES[spec.precision].itemsize if gpu else 4


def _spec(setup: Setup, size: tuple[int, int], layers: tuple[str, ...], config: Config, padding: str) -> vgg.Spec:
    return spec_of(setup.device, setup.precision, size, layers, config.pooling, padding)


def _spec_of_run(setup: Setup, goal: Goal, size: tuple[int, int]) -> vgg.Spec:
    config = goal.config
    return _spec(setup, size, goal.layers, config, "circular" if config.tile else config.padding)


def _run_phase(setup: Setup, goal: Goal, size: tuple[int, int], steps: int) -> dict[str, int]:
    """While one scale is optimised."""
    config, gpu, count = goal.config, setup.device == "cudnn", 3 * math.prod(size)
    spec = _spec_of_run(setup, goal, size)
    own, made = _losses(goal, spec, gpu)
    back = _BACK * math.prod(size) * (config.colour in ("keep-after", "keep-before"))
    return {
        "network": _network(setup, spec, config, made),
        **_beside(setup, spec, config),
        "optimiser": optimize.memory(count, config, steps, gpu),
        "targets": own,
        "pictures": 0 if gpu else 6 * 4 * count + back,  # the content, the start, and the result on its way to 8 bits
    }


def _losses(goal: Goal, spec: vgg.Spec, gpu: bool) -> tuple[int, tuple[str, ...]]:
    """Bytes of what the losses compare with and work in; layers whose cotangent the VJP makes itself."""
    config, element = goal.config, _element(spec, gpu)
    window = config.window_for((spec.width, spec.height))
    # What stands in memory at once, of features and of what is made of them.
    places = {name: element * count for name, count in windows.largest(spec, window).items()}
    contents = [name for name in config.content_layer_weights if goal.content is not None]
    styles = [name for name in config.style_layer_weights if goal.styles]
    regions, views = (len(goal.styles) if goal.masks else 1), bool(goal.masks) or config.style_loss != "gram"
    total = sum(element * math.prod(spec.shapes[name]) for name in contents)
    total += 3 * 4 * regions * sum(spec.shapes[name][1] ** 2 for name in styles)  # G, A and their difference
    if views and styles:  # each region has a view of the features and its cotangent, made by way of others
        total += 2 * regions * sum(places[name] for name in styles)
        wide = 4 if config.style_loss == "wasserstein" else element  # the slope of a mean is fp32
        total += (2 if goal.masks else 1) * wide // element * max(places[name] for name in styles)
    if config.style_loss == "wasserstein" and styles:  # fp64: covariances, roots; of one, its eigenvectors; a strip
        squares = [spec.shapes[name][1] ** 2 for name in styles]
        total += 24 * regions * sum(squares) + 64 * max(squares) + 8 * kernels.STRIP
    if gpu:
        from . import fused

        total += _products(spec, window, styles, regions)
        if window is not None:
            return total + kernels.SCRATCH, ()
        asked = {name: {"style": name in styles, "content": name in contents} for name in spec.layers}
        made = [name for name in asked if not (views and name in styles) and fused.chains(spec, name, **asked[name])]
        return total, tuple(made)
    # Where both losses look at a layer, the cotangent takes the place of features that are still to be read.
    return total + max((places[name] for name in contents if name in styles), default=0), ()


def _products(spec: vgg.Spec, window: int | None, styles: Sequence[str], regions: int) -> int:
    """Bytes of the products on their way to the Gram matrices of these layers on a GPU."""
    from . import fused

    places = windows.largest(spec, window)
    shapes = [(spec.shapes[name][1], places[name] // spec.shapes[name][1]) for name in styles]
    return kernels.memory_of_products(shapes * regions, kernels.processors(fused.PLACE))


def _network(setup: Setup, spec: vgg.Spec, config: Config, made: tuple[str, ...], *, forward_only: bool = False) -> int:
    """Bytes of a network, or of that of the windows and of what is handed on of them."""
    window, own = config.window_for((spec.width, spec.height)), 0
    if window is not None:
        gpu = setup.device == "cudnn"
        element, copies = _element(spec, gpu), 2 if gpu and not forward_only else 1
        own = copies * element * sum(windows.largest(spec, window).values())
        own += (1 if forward_only else 2) * 3 * 4 * spec.height * spec.width
        spec = windows.spec_of(spec, window)
    if config.pixel_range != "auto":
        own += 20 * 3 * spec.height * spec.width  # see `Ranged`
    if setup.device == "cudnn":
        from . import fused

        return own + fused.memory(spec, made, forward_only=forward_only)
    from . import winograd

    return own + winograd.memory(spec, setup.threads, forward_only=forward_only)


def _beside(setup: Setup, spec: vgg.Spec, config: Config) -> dict[str, int]:
    """The weights, which all networks share, and the workspaces of one; on a CPU the process holds them before."""
    if setup.device == "cpu":
        return {}
    from . import fused

    libraries = fused.LIBRARIES + (fused.TORCHS_CUBLAS if config.style_loss == "wasserstein" else 0)
    return {"weights": fused.memory_of_weights(spec), "libraries": libraries}


def short(value: int) -> str:
    """Bytes for a reader."""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
