"""How much memory a run will take, told before anything of it is allocated."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import image as images
from . import kernels, optimize, provider
from .config import Config
from .export import vgg
from .features import DTYPES
from .goal import Goal, canvas, style_size, visible
from .goal import load as load_goal
from .stylizer import Stylizer

log = logging.getLogger(__name__)

DEVICES = ("cpu", "cudnn")  # where all memory is ours; what ONNX Runtime and TensorRT take is theirs to know
_SYSTEM = Path("/")
_RECOLOURED = 8 * 12  # bytes of a pixel of the pictures while their colours are changed


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


def forecast(
    stylizer: Stylizer, content: Any, style: Any, config: Config | None = None, *, masks: Any = None, freeze: Any = None
) -> Forecast:
    """What the same call of the stylizer will take, at whichever scale it takes the most.

    Raises ValueError, TypeError or OSError as the call would, and ValueError for a device that is not one of DEVICES.
    """
    if stylizer.device not in DEVICES:
        raise ValueError(f"device {stylizer.device}: memory is forecast for {' and '.join(DEVICES)} only")
    goal = load_goal(content, style, config or Config(), masks, freeze)
    config, picture = goal.config, goal.content or canvas(goal.config)
    if config.optimizer == "lbfgs":
        kernels.pairs(config.history, stylizer.device == "cudnn")
    if config.start_file is not None:
        images.load(config.start_file)
    phases, kept, limit = list[dict[str, int]](), list[int](), stylizer._cache.limit
    for side, steps in config.schedule(picture.aspect):
        size = config.whole(picture.fit(side))
        style_phase, run_phase = _style_phase(stylizer, goal, side), _run_phase(stylizer, goal, size, steps)
        if stylizer.keeps_networks:  # those of the scales before
            style_phase["other networks"] = sum(kept)
            shared = {name: run_phase[name] for name in ("network", "weights", "libraries")}
            phases.append({**shared, "other networks": sum(kept)})  # it is opened before others make room for it
            own = run_phase["network"] + run_phase["libraries"]
            if own <= limit:
                kept.append(own)
            while sum(kept) > limit:
                kept.pop(0)
            run_phase["other networks"] = sum(kept) - (own if own <= limit else 0)
        phases += [style_phase, run_phase]
    if stylizer.device == "cpu" and config.colour not in ("none", "keep-after"):
        sources = [each for each in (picture, *goal.styles) if isinstance(each, images.Picture)]
        phases.append({"colours": _RECOLOURED * max(math.prod(each.size) for each in sources)})
    most = max(phases, key=lambda parts: sum(parts.values()))
    return Forecast(size, stylizer.device, stylizer.precision, {name: value for name, value in most.items() if value})


def warn(
    stylizer: Stylizer, content: Any, style: Any, configs: Sequence[Config], *, masks: Any = None, freeze: Any = None
) -> None:
    """Say so where one of such runs is forecast to take more memory than there is."""
    if stylizer.device not in DEVICES:
        return
    needed = max(forecast(stylizer, content, style, each, masks=masks, freeze=freeze).total for each in configs)
    left = available(stylizer.device)
    if left is not None and needed > left:
        text = "this will take about %s of memory, and %s are free: less is needed with a smaller --size"
        if any(each.optimizer == "lbfgs" for each in configs):
            text += ", a --history of few pairs or --optimizer adam"
        log.warning(text, short(needed), short(left))


def available(device: str) -> int | None:
    """Bytes of memory that a device of DEVICES has left; None where the system does not tell.

    Of a CPU's memory that is what Linux holds to be available, or less where a cgroup (v2), that of a container, has a
    limit.
    """
    if device == "cudnn":
        place = provider.place(device)
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


def _style_phase(stylizer: Stylizer, goal: Goal, side: int) -> dict[str, int]:
    """While the statistics of a style are taken: the network at its size."""
    config, most, spec = goal.config, 0, None
    for style, (_, mask), own_config in zip(goal.styles, goal.parts, goal.own, strict=True):
        if isinstance(style, images.Picture):
            size = style_size(style, side, own_config)
            spec = stylizer._spec(size, tuple(config.style_layer_weights), config, config.padding, stylizer.precision)
            own = _network(stylizer, spec, (), forward_only=True) + 3 * 4 * math.prod(size)
            if stylizer.device == "cudnn":
                own += max(_products(spec, [layer], 1) for layer in spec.layers)
            mask = visible(style, mask)
            if config.style_loss != "gram" or mask is not None:  # what is made of the features; with a mask, on a way
                element = DTYPES[spec.precision].itemsize + 4 * (mask is not None)
                own += element * max(math.prod(spec.shapes[layer]) for layer in spec.layers)
            most = max(most, own)
        else:
            stylizer._saved(style, side, config)  # or it is refused
    return {"network of the style": most, **(_beside(stylizer, spec, config) if spec else {})}


def _run_phase(stylizer: Stylizer, goal: Goal, size: tuple[int, int], steps: int) -> dict[str, int]:
    """While one scale is optimised."""
    config, gpu, count = goal.config, stylizer.device == "cudnn", 3 * math.prod(size)
    spec = stylizer._spec(size, goal.layers, config, "circular" if config.tile else config.padding, stylizer.precision)
    own, made = _losses(goal, spec, gpu)
    return {
        "network": _network(stylizer, spec, made) + (20 * count if config.pixel_range != "auto" else 0),  # see `Ranged`
        **_beside(stylizer, spec, config),
        "optimiser": optimize.memory(count, config, steps, gpu),
        "targets": own,
        "pictures": 0 if gpu else 3 * 4 * count,
    }


def _losses(goal: Goal, spec: vgg.Spec, gpu: bool) -> tuple[int, tuple[str, ...]]:
    """Bytes of what the losses compare with and work in; layers whose cotangent the VJP makes itself."""
    config, element = goal.config, DTYPES[spec.precision].itemsize
    features = {name: element * math.prod(shape) for name, shape in spec.shapes.items()}
    contents = [name for name in config.content_layer_weights if goal.content is not None]
    styles = [name for name in config.style_layer_weights if goal.styles]
    regions, views = (len(goal.styles) if goal.masks else 1), bool(goal.masks) or config.style_loss != "gram"
    total = sum(features[name] for name in contents)
    total += 3 * 4 * regions * sum(spec.shapes[name][1] ** 2 for name in styles)  # G, A and their difference
    if views and styles:  # each region has a view of the features and its cotangent, made by way of others
        total += 2 * regions * sum(features[name] for name in styles)
        wide = 4 if config.style_loss == "wasserstein" else element  # the slope of a mean is fp32
        total += (2 if goal.masks else 1) * wide // element * max(features[name] for name in styles)
    if gpu:
        from . import fused

        total += _products(spec, styles, regions)
        if config.style_loss == "wasserstein":  # roots of covariances, fp64
            total += 16 * regions * sum(spec.shapes[name][1] ** 2 for name in styles)
        asked = {name: {"style": name in styles, "content": name in contents} for name in spec.layers}
        made = [name for name in asked if not (views and name in styles) and fused.chains(spec, name, **asked[name])]
        return total, tuple(made)
    # Where both losses look at a layer, the cotangent takes the place of features that are still to be read.
    return total + max((features[name] for name in contents if name in styles), default=0), ()


def _products(spec: vgg.Spec, styles: Sequence[str], regions: int) -> int:
    """Bytes of the products on their way to the Gram matrices of these layers on a GPU."""
    from . import fused

    shapes = [(spec.shapes[name][1], math.prod(spec.shapes[name][2:])) for name in styles]
    return kernels.memory_of_products(shapes * regions, kernels.processors(fused.PLACE))


def _network(stylizer: Stylizer, spec: vgg.Spec, made: tuple[str, ...], *, forward_only: bool = False) -> int:
    if stylizer.device == "cudnn":
        from . import fused

        return fused.memory(spec, made, forward_only=forward_only)
    from . import winograd

    return winograd.memory(spec, stylizer._threads, forward_only=forward_only)


def _beside(stylizer: Stylizer, spec: vgg.Spec, config: Config) -> dict[str, int]:
    """The weights, which all networks share, and the workspaces of one; on a CPU the process holds them before."""
    if stylizer.device == "cpu":
        return {}
    from . import fused

    libraries = fused.LIBRARIES + (fused.TORCHS_CUBLAS if config.style_loss == "wasserstein" else 0)
    return {"weights": fused.memory_of_weights(spec), "libraries": libraries}


def short(value: int) -> str:
    """Bytes for a reader."""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
