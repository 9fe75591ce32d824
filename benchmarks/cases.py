"""What is measured: one problem (pictures, weights, options), the loops that solve it, and whether they agree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from engine import Config, provider
from engine import image as images
from engine.export import vgg
from engine.export.weights import Weights
from engine.export.weights import load as load_weights

from .baseline import VARIANTS, Baseline

if TYPE_CHECKING:
    from engine.optimize import Iterate

ENGINES = {
    "engine-cpu": ("cpu", "fp32"),
    "engine-cpu-bf16": ("cpu", "bf16"),
    "engine-onnxruntime": ("onnxruntime", "fp32"),
    "engine-cudnn": ("cudnn", "fp32"),
    "engine-cudnn-fp16": ("cudnn", "fp16"),
    "engine-cudnn-bf16": ("cudnn", "bf16"),
    "engine-cuda": ("cuda", "fp32"),
    "engine-cuda-fp16": ("cuda", "fp16"),
    "engine-tensorrt": ("tensorrt", "fp32"),
    "engine-tensorrt-fp16": ("tensorrt", "fp16"),
    "engine-tensorrt-bf16": ("tensorrt", "bf16"),
}
RIVALS = tuple(name for name in VARIANTS if name not in ("float64", "compile-graphs"))
STRICT = 1e-4  # relative L2 error of an exact variant's gradient where no ReLU has flipped
LOOSE = 2e-2  # and at any size, where a few have
_STRICT_SIZE = 48
_STRICT_POINTS = 6
_cached_weights = cache(load_weights)  # the embedded ones take seconds to make


class Loop(Protocol):
    """One implementation of the optimisation."""

    def loss_and_gradient(self, pixels: Tensor) -> tuple[float, Tensor]:
        """Loss of pixels (1, 3, H, W) and its gradient."""

    def iterate(self, start: Tensor) -> Iterator[object]:
        """One evaluation and one optimiser step each, without end; a GPU may still be at it."""


@dataclass(frozen=True)
class Problem:
    """The pictures as given, the name of the weights and the options; `device` is that of the rivals, cpu or cuda."""

    content: images.Picture
    style: images.Picture
    weights: str
    config: Config
    device: str = "cpu"

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the output."""
        return self.content.fit(self.config.size)

    @property
    def start(self) -> Tensor:
        """The content picture (1, 3, H, W), which is also the start."""
        return images.to_tensor(images.resize(self.content, self.size))

    @property
    def gflop(self) -> float:
        """GFLOP of one iteration: the convolutions, forward and VJP."""
        width, height = self.size
        return vgg.flops(vgg.cut(self.config.layers), height, width) / 1e9

    def point(self, seed: int) -> Tensor:
        """Pixels away from the optimum: content and noise, half each."""
        content = self.start
        return (content + torch.rand(content.shape, generator=torch.Generator().manual_seed(seed))) / 2


class Engine:
    """Our loop at one scale, put together as `Stylizer` does it."""

    def __init__(self, problem: Problem, device: str, precision: str) -> None:
        from engine.stylizer import Stylizer

        stylizer = Stylizer(problem.weights, device, precision)
        self._objective = stylizer.objective(problem.content, problem.style, problem.config)
        self._device, self._clamp = self._objective.network.image.device, problem.config.clamp

    def loss_and_gradient(self, pixels: Tensor) -> tuple[float, Tensor]:
        terms, gradient = self._objective.evaluate(pixels.to(self._device))
        assert gradient is not None
        return float(terms.total), gradient

    def iterate(self, start: Tensor) -> Iterator[Iterate]:
        """The loop: nobody waits for a loss unless the caller reads it."""
        from engine.features import within
        from engine.optimize import State, minimise

        options = {"clamp": self._clamp, "recorded": self._objective.recorded}
        run = minimise(self._objective.write, start.to(self._device), "lbfgs", 10**6, State(), **options)
        return within(self._objective.network, run)


def options(size: int, **others: Any) -> Config:
    """Those of the problems: the layers of the embedded features, and the border that the rivals see."""
    return Config(size=size, padding="zero", **others).for_weights("embedded")


def load(
    size: int, weights: str = "embedded", content: Path | None = None, style: Path | None = None, device: str = "cpu"
) -> Problem:
    """The problem for these pictures, by default the bundled pair."""
    samples = resources.files("engine.samples")
    pictures = [
        images.load(path if path else (samples / name).read_bytes())
        for path, name in ((content, "content.jpg"), (style, "style.jpg"))
    ]
    return Problem(pictures[0], pictures[1], weights, options(size), device)


def weights(problem: Problem) -> Weights:
    """The rivals' weights, loaded once."""
    return _cached_weights(problem.weights, problem.config.layers)


def build(name: str, problem: Problem, history: int = 100, exact: bool = False) -> Loop:
    """The loop `name` of `VARIANTS`, see `Baseline`, or of `ENGINES`, with its own history of L-BFGS."""
    if name in ENGINES:
        return Engine(problem, *ENGINES[name])
    style = images.to_tensor(images.resize(problem.style, problem.style.fit(problem.config.size)))
    return Baseline(weights(problem), problem.start, style, problem.config, name, problem.device, history, exact)


def by_default(device: str) -> str:
    """The name of the engine on a device, in the precision that it takes by itself."""
    taken = provider.resolve(device, "auto")
    return next(name for name, each in ENGINES.items() if each == taken)


def precision(name: str, device: str) -> str:
    """What its matrix products are computed in on this device, cpu or cuda."""
    if name in ENGINES:
        return ENGINES[name][1]
    if VARIANTS[name].autocast:
        return "fp16" if device == "cuda" else "bf16"
    return "tf32" if device == "cuda" else "fp32"


def exact(name: str) -> bool:
    """Whether the variant computes in fp32 throughout, if it is told to be exact."""
    return ENGINES[name][1] == "fp32" if name in ENGINES else not VARIANTS[name].autocast


def relative_error(gradient: Tensor, oracle: Tensor) -> float:
    """Relative L2 error against a float64 gradient."""
    return float((gradient.cpu().double() - oracle.cpu()).norm() / oracle.cpu().norm())


def strict_error(name: str, problem: Problem) -> float:
    """The smallest relative error of the gradient over a few points of a small picture, against float64.

    fp32 rounding moves an activation across zero about once in a million, and one such flip changes the gradient by
    some 1e-3, in plain PyTorch as in the engine. A small picture has points without a flip, and there only rounding is
    left; a wrong formula would show at all points.
    """
    small = replace(problem, config=replace(problem.config, size=_STRICT_SIZE))
    loop, oracle = build(name, small, exact=True), build("float64", small)
    points = [small.point(seed) for seed in range(_STRICT_POINTS)]
    return min(relative_error(loop.loss_and_gradient(x)[1], oracle.loss_and_gradient(x)[1]) for x in points)
