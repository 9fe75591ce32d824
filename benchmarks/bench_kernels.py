"""The parts of `engine.kernels` against the plain torch expressions, at the layer shapes of the picture."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional

from engine import kernels
from engine.export import vgg
from engine.kernels.lbfgs import HISTORY
from engine.kernels.program import Threads

from . import cases

STYLE = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
CONTENT = ("relu4_2",)
Run = Callable[[], list[Tensor]]  # allocates nothing that the engine would not; gives what it has computed


@pytest.mark.parametrize("side", ["torch", "engine"])
@pytest.mark.parametrize("part", ["layers", "pixels"])
def test_part(benchmark: BenchmarkFixture, problem: cases.Problem, part: str, side: str) -> None:
    plain, ours = PARTS[part](problem)
    for found, wanted in zip(ours(), plain(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    benchmark.group = part
    benchmark(ours if side == "engine" else plain)
    benchmark.extra_info["size"] = problem.size


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True:UserWarning")  # torch's own line
@pytest.mark.parametrize("side", ["torch", "engine"])
@pytest.mark.parametrize("history", [20, HISTORY])
def test_lbfgs(benchmark: BenchmarkFixture, problem: cases.Problem, history: int, side: str) -> None:
    """One step with a full history, the evaluation of a quadratic included."""
    image = torch.rand(problem.start.shape)
    curvature = 10 ** (torch.rand(image.shape) * 4 - 2)
    make = _torch_lbfgs if side == "torch" else _our_lbfgs
    step = make(image, curvature, history)
    for _ in range(history + 2):
        step()
    benchmark.group = f"lbfgs, {history} pairs"
    benchmark(step)
    benchmark.extra_info["size"] = problem.size


def _layers(problem: cases.Problem) -> tuple[Run, Run]:
    width, height = problem.size
    shapes = vgg.shapes(vgg.CONVS, height, width)
    layers = {}
    for name in (*STYLE, *CONTENT):
        _, channels, *size = shapes[name]
        features, cotangent, content = torch.rand(3, size[0] * size[1], channels).mT  # NHWC, as `--device cpu` has it
        target = torch.rand(channels, channels)
        own = name in STYLE
        layers[name] = kernels.Layer(
            features, cotangent, None if own else content, (target + target.T) if own else None
        )
    together = kernels.Summed([layers], 1.0, 1.0, Threads(torch.get_num_threads()))

    def plain() -> list[Tensor]:
        found = []
        for layer in layers.values():
            f, (channels, positions) = layer.features, layer.features.shape
            if layer.target is not None:
                difference = f @ f.T / positions - layer.target
                found += [difference.square().sum() / (4 * channels**2), difference @ f / (channels**2 * positions)]
            else:
                assert layer.content is not None
                found += [functional.mse_loss(f, layer.content), 2 / f.numel() * (f - layer.content)]
        return found

    def ours() -> list[Tensor]:
        together.losses()
        together.gradients()
        _, content, _, *style = together.terms
        losses = [*style[: len(STYLE)], content]
        cotangents = [layer.cotangent for layer in layers.values()]
        return [tensor for pair in zip(losses, cotangents, strict=True) for tensor in pair if tensor is not None]

    return plain, ours


def _pixels(problem: cases.Problem) -> tuple[Run, Run]:
    pixels, vjp, terms = problem.start, torch.rand(problem.start.shape), torch.zeros(3)
    gradient = torch.empty_like(pixels)
    finish = kernels.Pixels(vjp, torch.tensor(2.0), 3.0, terms)

    def plain() -> list[Tensor]:
        leaf = pixels.clone().requires_grad_()
        loss = leaf.diff(dim=2).square().mean() + leaf.diff(dim=3).square().mean()
        return [loss.detach(), vjp / 2 + 3 * torch.autograd.grad(loss, leaf)[0]]

    def ours() -> list[Tensor]:
        finish.finish(pixels, gradient)
        return [terms[2], gradient]

    return plain, ours


PARTS: dict[str, Callable[[cases.Problem], tuple[Run, Run]]] = {"layers": _layers, "pixels": _pixels}


def _torch_lbfgs(image: Tensor, curvature: Tensor, history: int) -> Callable[[], None]:
    leaf = image.clone().requires_grad_()
    rate, options = 1e-3, {"tolerance_grad": 0.0, "tolerance_change": 0.0}
    optimiser = torch.optim.LBFGS([leaf], lr=rate, max_iter=1, history_size=history, **options)

    def closure() -> Tensor:
        leaf.grad = curvature * leaf.detach()
        return (leaf.detach() * leaf.grad).sum()

    return lambda: optimiser.step(closure)  # type: ignore[arg-type, func-returns-value]


def _our_lbfgs(image: Tensor, curvature: Tensor, history: int) -> Callable[[], None]:
    gradient, loss = torch.empty_like(image), torch.zeros(())
    optimiser = kernels.Lbfgs(image, gradient, loss, kernels.Trail(image), history)

    def step() -> None:
        torch.mul(curvature, image, out=gradient)
        loss.copy_((image * gradient).sum())
        optimiser.step()

    return step
