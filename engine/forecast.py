"""How much memory a run will take, told before anything of it is allocated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from . import optimize
from .config import Config
from .export import vgg
from .features import DTYPES
from .goal import canvas
from .goal import load as load_goal
from .image import Picture
from .stylizer import Stylizer

DEVICES = ("cpu", "cudnn")  # where all memory is ours; what ONNX Runtime and TensorRT take is theirs to know


@dataclass(frozen=True)
class Forecast:
    """The bytes that a run takes at its peak, at its last scale of `size` (width, height), by what takes them.

    On `cpu` they come on top of what the process holds that has opened the weights and read the pictures; on `cudnn`
    they are all of the GPU's memory that it takes, and the host is not counted.
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
        parts = ", ".join(f"{name} {_short(value)}" for name, value in self.parts.items())
        width, height = self.size
        return f"{self.device}, {self.precision}, {width} x {height}: {_short(self.total)} ({parts})"


def forecast(
    stylizer: Stylizer, content: Any, style: Any, config: Config | None = None, *, masks: Any = None
) -> Forecast:
    """What the same call of the stylizer will take.

    Raises ValueError, TypeError or OSError as the run would, and ValueError for a device that is not one of DEVICES.
    """
    if stylizer.device not in DEVICES:
        raise ValueError(f"device {stylizer.device}: memory is forecast for {' and '.join(DEVICES)} only")
    goal = load_goal(content, style, config or Config(), masks, None)
    config, picture = goal.config, goal.content or canvas(goal.config)
    side, steps = config.schedule(picture.aspect)[-1]
    size = config.whole(picture.fit(side))
    padding = "circular" if config.tile else config.padding
    spec = vgg.Spec(size[1], size[0], goal.layers, config.pooling, stylizer.precision, padding=padding)
    element = DTYPES[stylizer.precision].itemsize
    count, gpu = 3 * math.prod(size), stylizer.device == "cudnn"
    contents = [name for name in config.content_layer_weights if goal.content is not None]
    styles = [name for name in config.style_layer_weights if goal.styles]
    plain = config.style_loss == "gram" and not goal.masks
    parts = {"network": 0, "optimiser": optimize.memory(count, config, steps, gpu), "targets": 0}
    if gpu:
        from . import fused

        made = [name for name in styles if plain and fused.chains(spec, name, style=True, content=name in contents)]
        made += [
            name for name in contents if name not in styles and fused.chains(spec, name, style=False, content=True)
        ]
        parts["network"] = fused.memory(spec, made) + fused.LIBRARIES
    else:
        from . import winograd

        parts["network"] = winograd.memory(spec, stylizer._threads)
        sources = [each for each in (picture, *goal.styles) if isinstance(each, Picture)]
        parts["pictures"] = 12 * sum(math.prod(each.size) for each in sources) + 3 * 4 * count
    features = {name: math.prod(shape) for name, shape in spec.shapes.items()}
    matrices = sum(spec.shapes[name][1] ** 2 for name in styles)
    regions = 1 if not goal.masks else len(goal.styles)
    parts["targets"] = element * sum(features[name] for name in contents) + 12 * regions * matrices
    if not plain and styles:  # each region has a view of the features and its cotangent, made by way of others
        parts["targets"] += 2 * element * regions * sum(features[name] for name in styles)
        parts["targets"] += (2 if goal.masks else 1) * element * max(features[name] for name in styles)
    return Forecast(size, stylizer.device, stylizer.precision, parts)


def _short(value: int) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
