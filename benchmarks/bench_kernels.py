"""Each operation of `engine.kernels` against the plain torch expression, at the layer shapes of the picture."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional

from engine import kernels
from engine.export import vgg

from . import cases

STYLE = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
CONTENT = ("relu4_2",)
CASES = [(op, layer) for op in ("gram", "style_loss", "style_gradient") for layer in STYLE]
CASES += [(op, layer) for op in ("content_loss", "content_gradient") for layer in CONTENT]
CASES += [("total_variation", "image")]


@pytest.mark.parametrize("side", ["torch", "engine"])
@pytest.mark.parametrize(("operation", "layer"), CASES)
def test_kernel(benchmark: BenchmarkFixture, problem: cases.Problem, operation: str, layer: str, side: str) -> None:
    width, height = problem.size
    shapes = {**vgg.shapes(vgg.CONVS, height, width), "image": (1, 3, height, width)}
    _, channels, *positions = shapes[layer]
    plain, ours, flop = OPERATIONS[operation](channels, *positions)
    torch.testing.assert_close(ours(), plain(), rtol=1e-4, atol=1e-6)
    benchmark.group = f"{operation} {layer}"
    benchmark(ours if side == "engine" else plain)
    benchmark.extra_info |= {"size": problem.size, "gflop": flop / 1e9}
    if benchmark.stats:
        benchmark.extra_info["gflop_per_s"] = flop / 1e9 / benchmark.stats.stats.median


# What an operation needs is allocated once, as in the engine; each pair returns the same values from the same inputs.
Pair = tuple[Callable[[], Tensor], Callable[[], Tensor], int]


def _gram(channels: int, height: int, width: int) -> Pair:
    features, out = torch.rand(channels, height * width), torch.empty(channels, channels)
    return (
        lambda: features @ features.T / features.shape[1],
        lambda: kernels.gram(features, out),
        2 * channels * features.numel(),
    )


def _style_loss(channels: int, height: int, width: int) -> Pair:
    gram, target, difference = torch.rand(3, channels, channels)
    return (
        lambda: (gram - target).square().sum() / (4 * channels**2),
        lambda: kernels.style_loss(gram, target, difference),
        3 * gram.numel(),
    )


def _style_gradient(channels: int, height: int, width: int) -> Pair:
    features, difference = torch.rand(channels, height * width), torch.rand(channels, channels)
    out, factor = torch.empty_like(features), torch.tensor(100.0 * channels)

    def ours() -> Tensor:
        kernels.style_gradient(features, difference, factor, out)
        return out

    return lambda: factor / (channels * features.numel()) * (difference @ features), ours, 2 * channels * out.numel()


def _content_loss(channels: int, height: int, width: int) -> Pair:
    features, target, difference = torch.rand(3, channels, height * width)
    return (
        lambda: functional.mse_loss(features, target),
        lambda: kernels.content_loss(features, target, difference),
        3 * features.numel(),
    )


def _content_gradient(channels: int, height: int, width: int) -> Pair:
    """Ours scales the difference in place; a factor that leaves it as it is keeps the rounds alike."""
    difference = torch.rand(channels, height * width)
    factor = torch.tensor(difference.numel() / 2)

    def ours() -> Tensor:
        kernels.content_gradient(difference, factor)
        return difference

    return lambda: difference * (factor * (2 / difference.numel())), ours, difference.numel()


def _total_variation(channels: int, height: int, width: int) -> Pair:
    pixels = torch.rand(1, channels, height, width)

    def plain() -> Tensor:
        leaf = pixels.clone().requires_grad_()
        loss = leaf.diff(dim=2).square().mean() + leaf.diff(dim=3).square().mean()
        return torch.autograd.grad(loss, leaf)[0]

    def ours() -> Tensor:
        gradient = torch.zeros_like(pixels)
        kernels.total_variation(pixels, 1.0, gradient)
        return gradient

    return plain, ours, 10 * pixels.numel()


OPERATIONS: dict[str, Callable[[int, int, int], Pair]] = {
    "gram": _gram,
    "style_loss": _style_loss,
    "style_gradient": _style_gradient,
    "content_loss": _content_loss,
    "content_gradient": _content_gradient,
    "total_variation": _total_variation,
}
