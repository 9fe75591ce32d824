"""Sections of `benchmarks.gpu` for the kernels alone: what they compute, and how long they take."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from engine import kernels
from engine.export import vgg
from engine.features import DTYPES
from engine.kernels import lbfgs
from engine.kernels.pixels import FORMS, total_variation_reference
from engine.kernels.temporal import temporal_reference
from engine.optimize import State, minimise

from . import machine
from .gpu import Rows

STYLE, CONTENT = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1"), ("relu4_2",)
ROUNDING = {"fp32": 1e-4, "fp16": 2e-3, "bf16": 1.6e-2}  # relative, of cotangents
Losses = kernels.Layers | kernels.Summed
# Relative, of losses whose Gram matrices nearly agree. Tensor cores cut their sums off instead of rounding them.
LOSS_ROUNDING = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 1e-3}
# By name: the optimiser, whether it keeps to [0, 1], and how far from a CPU's, relative, the losses of steps 5 to 15
# and the last image may be. On a GPU the history of L-BFGS is fp16, which turns its steps a little.
OPTIMISERS = {
    "L-BFGS": ("lbfgs", False, 1e-2),
    "L-BFGS in a box": ("lbfgs", True, 1e-3),
    "Adam": ("adam", True, 1e-5),
}


def recorded(work: Callable[[], None], device: str) -> Callable[[], None]:
    """The work as the loop does it: a replay of its launches."""
    graph = kernels.Recorded(torch.device(device))
    return partial(graph, work)


def seconds(work: Callable[[], object], device: str, repeats: int = 5, calls: int = 10) -> float:
    """Median time of one call, of several that are queued together, after a warm-up."""
    times = []
    for _ in range(3):
        work()
    for _ in range(repeats):
        begin = machine.now(device)
        for _ in range(calls):
            work()
        times.append((machine.now(device) - begin) / calls)
    return statistics.median(times)


def worst(errors: Iterable[float]) -> float:
    """The largest, or NaN if there is one, which `max` may leave out."""
    return float(np.max(list(errors)))


def needs_cupy(rows: Rows, device: str) -> bool:
    """Whether the kernels can be launched; says so if not."""
    if device == "cpu" or importlib.util.find_spec("cupy"):
        return True
    rows.skip("all", "cupy is not installed")
    return False


def layer_group(size: int, dtype: torch.dtype, nhwc: bool, device: str) -> dict[str, kernels.Layer]:
    """Random layers with the shapes of a square picture of this size."""
    generator = torch.Generator(device).manual_seed(0)

    def random(channels: int, positions: int) -> Tensor:
        found = torch.rand(channels, positions, generator=generator, device=device).to(dtype)
        return found.T.contiguous().T if nhwc else found

    layers = {}
    for name, (_, channels, height, width) in vgg.shapes(vgg.CONVS, size, size).items():
        if name not in STYLE + CONTENT:
            continue
        f, p, a = (random(channels, height * width) for _ in range(3))
        target = (a.double() @ a.double().T / a.shape[1]).float() if name in STYLE else None
        layers[name] = kernels.Layer(f, torch.empty_like(f), p if name in CONTENT else None, target)
    return layers


def check_kernels(rows: Rows, device: str, sizes: Iterable[int] = (64, 100, 256)) -> None:
    """Losses, cotangents and total variation of the device against float64, and its optimisers against the CPU's."""
    if not needs_cupy(rows, device):
        return
    for size in sizes:
        for precision, dtype in DTYPES.items():
            for nhwc in (False, True):
                name = f"layers {size} {precision} {'NHWC' if nhwc else 'NCHW'}"
                with rows.attempt(name):
                    given = layer_group(size, dtype, nhwc, device)
                    layers = kernels.losses([given], 1.0, 100.0)
                    for way, losses in ways(layers)[0].items():
                        layers.terms.fill_(torch.nan)  # what is not written is seen
                        losses()
                        for other, gradients in ways(layers)[1].items():
                            for layer in given.values():
                                assert layer.cotangent is not None
                                layer.cotangent.fill_(torch.nan)
                            gradients()
                            loss, cotangent = layer_errors(layers, given)
                            passed = loss < LOSS_ROUNDING[precision] and cotangent < ROUNDING[precision]
                            rows.add(f"{name} {way}, {other}", passed, loss_error=loss, cotangent_error=cotangent)
    for form in FORMS:
        with rows.attempt(f"total variation, {form}"):
            loss, gradient = variation_errors(form, device)
            passed = loss < LOSS_ROUNDING["fp32"] and gradient < ROUNDING["fp32"]
            rows.add(f"total variation, {form}", passed, loss_error=loss, gradient_error=gradient)
    with rows.attempt("temporal loss"):
        loss, gradient = temporal_errors(device)
        passed = loss < LOSS_ROUNDING["fp32"] and gradient < ROUNDING["fp32"]
        rows.add("temporal loss", passed, loss_error=loss, gradient_error=gradient)
    for name, (optimizer, boxed, most) in OPTIMISERS.items():
        with rows.attempt(f"{name} against the CPU's"):
            loss, image = optimiser_errors(device, optimizer, boxed)
            rows.add(f"{name} against the CPU's", loss < most and image < most, loss_error=loss, image_error=image)


def ways(layers: Losses) -> tuple[dict[str, Callable[[], None]], dict[str, Callable[[], None]]]:
    """The ways to the losses and to the gradients: there is a choice on a GPU only."""
    if isinstance(layers, kernels.Layers):
        return layers.ways(), layers.ways_to_gradients()
    return {"losses by BLAS": layers.losses}, {"cotangents by BLAS": layers.gradients}


def layer_errors(layers: Losses, given: dict[str, kernels.Layer]) -> tuple[float, float]:
    """Relative errors of the losses, at most, and of the cotangents, at most."""
    losses, cotangents = [], []
    for i, layer in enumerate(given.values()):
        f, elements, channels = layer.features.double(), layer.features.numel(), len(layer.features)
        truth = torch.zeros_like(f)
        if layer.content is not None:
            difference = f - layer.content.double()
            losses.append((layers.terms[1], difference.square().mean()))
            truth += 2 / elements * difference
        if layer.target is not None:
            difference = f @ f.T / f.shape[1] - layer.target.double()
            losses.append((layers.terms[3 + i], difference.square().sum() / (4 * channels**2)))
            truth += 100 / (channels * elements) * (difference @ f)
        assert layer.cotangent is not None
        truth *= layers.scale.double()
        cotangents.append(float((layer.cotangent.double() - truth).norm() / truth.norm()))
    return worst(float((found - truth).abs() / truth) for found, truth in losses), worst(cotangents)


def variation_errors(form: str, device: str) -> tuple[float, float]:
    """Relative errors of total variation, at most, and of the gradient that it finishes, at most."""
    losses, gradients = [], []
    generator = torch.Generator().manual_seed(2)
    pixels, rest = torch.rand(2, 1, 3, 45, 62, generator=generator).to(device)
    rest = rest / pixels.numel()  # of the other terms, as loud as that of a mean
    scale, weight = torch.full((), 4.0, device=device), 3.0
    for power in (1.25, 2.0):
        for wrap in (False, True):
            terms, gradient = torch.zeros(4, device=device), torch.full_like(pixels, torch.nan)
            kernels.Pixels(4 * rest, scale, weight, terms, power, wrap, form).finish(pixels, gradient)
            value, slope = total_variation_reference(pixels[0].cpu().double().numpy(), power, wrap, form)
            truth = rest[0].cpu().double() + weight * torch.from_numpy(slope)
            losses += [abs(float(terms[2]) / value - 1), abs(float(terms[0]) / (weight * value) - 1)]
            gradients.append(float((gradient[0].cpu() - truth).norm() / truth.norm()))
    return worst(losses), worst(gradients)


def temporal_errors(device: str) -> tuple[float, float]:
    """Relative errors of the temporal loss and of the gradient to which it adds its own."""
    generator = torch.Generator().manual_seed(3)
    pixels, carried, rest = torch.rand(3, 1, 3, 45, 62, generator=generator)
    certain, weight, total = torch.rand(1, 1, 45, 62, generator=generator), 3.0, torch.zeros((), device=device)
    gradient = (rest / rest.numel()).to(device)
    kernels.Temporal(carried.to(device), certain.to(device), weight).add(pixels.to(device), gradient, total)
    value, slope = temporal_reference(*(each[0].double().numpy() for each in (pixels, carried)), certain[0, 0].numpy())
    truth = rest[0].double() / rest.numel() + weight * torch.from_numpy(slope)
    return abs(float(total) / (weight * value) - 1), float((gradient[0].cpu() - truth).norm() / truth.norm())


def optimiser_errors(device: str, optimizer: str, boxed: bool, steps: int = 30) -> tuple[float, float]:
    """Relative differences between device and CPU on a quadratic: of losses on the way, at most, and of the image."""
    losses, ends = [], []
    given = torch.rand(3, 1, 3, 40, 50, generator=torch.Generator().manual_seed(1))
    given[1] = 10 ** (2 * given[1])
    given[2] = 2 * given[2] - 0.5  # half of it outside of the box
    for place in ("cpu", device):
        start, curvature, goal = given.to(place)

        def evaluate(pixels: Tensor, gradient: Tensor, curvature: Tensor = curvature, goal: Tensor = goal) -> Tensor:
            away = pixels - goal
            torch.mul(curvature, away, out=gradient)
            return (away * gradient).sum() / 2

        with mock.patch.object(lbfgs, "SCALING", 1.0):  # with more what is rounded otherwise grows past all bounds
            *run, last = minimise(evaluate, start, optimizer, steps, State(), history=lbfgs.GPU_HISTORY, clamp=boxed)
        losses.append([each.loss for each in run[4:15]])
        ends.append(last.best.cpu())
    apart = worst(abs(one / other - 1) for one, other in zip(*losses, strict=True))
    return apart, float((ends[1] - ends[0]).norm() / ends[0].norm())


def kernel_times(rows: Rows, device: str, size: int = 512) -> None:
    """Each launch at its shapes: time, GB/s of what has to be moved, TFLOP/s, and the time of torch's own route."""
    if not needs_cupy(rows, device):
        return
    for precision in ("fp32", "fp16"):
        dtype = DTYPES[precision]
        given = layer_group(size, dtype, precision == "fp16", device)
        layers = kernels.losses([given], 1.0, 100.0)
        styles = [layer for layer in given.values() if layer.target is not None]
        moved = sum(layer.features.nbytes for layer in given.values())
        flop = sum(2 * len(layer.features) * layer.features.numel() for layer in styles)
        grams = [layer.target.to(dtype) for layer in styles if layer.target is not None]

        def torchs_grams(styles: list[kernels.Layer] = styles) -> None:
            for layer in styles:
                torch.mm(layer.features, layer.features.T)

        def torchs_gradients(styles: list[kernels.Layer] = styles, grams: list[Tensor] = grams) -> None:
            for layer, gram in zip(styles, grams, strict=True):
                assert layer.cotangent is not None
                torch.mm(gram, layer.features, out=layer.cotangent)  # in its layout: nothing is transposed

        def timed(
            name: str,
            work: Callable[[], None],
            theirs: Callable[[], None],
            traffic: int,
            precision: str = precision,
            flop: int = flop,
        ) -> None:
            ours, other = seconds(recorded(work, device), device), seconds(recorded(theirs, device), device)
            rates = {"gb_per_s": traffic / ours / 1e9, "tflop_per_s": flop / ours / 1e12}
            rows.add(f"{name} {precision}", us=1e6 * ours, torch_us=1e6 * other, **rates)

        with rows.attempt(f"losses {precision}"):
            for way, losses in ways(layers)[0].items():
                timed(way, losses, torchs_grams, moved)
            timed("chosen losses", layers.losses, torchs_grams, moved)
        with rows.attempt(f"cotangents {precision}"):
            for way, gradients in ways(layers)[1].items():
                timed(way, gradients, torchs_gradients, 2 * moved)
            timed("chosen cotangents", layers.gradients, torchs_gradients, 2 * moved)
    image, curvature = (torch.rand(1, 3, size, size, device=device) for _ in range(2))
    gradient, loss = torch.empty_like(image), torch.zeros((), device=device)
    trail = kernels.Trail(image)
    # And the vectors that a step reads and writes; those of the history are half as long.
    runners: dict[str, tuple[kernels.Lbfgs | kernels.Adam, int]] = {
        "L-BFGS": (kernels.Lbfgs(image, gradient, loss, trail), 2 * lbfgs.GPU_HISTORY + 12),
        "Adam": (kernels.Adam(image, gradient, loss, trail), 9),
    }
    for name, (runner, vectors) in runners.items():
        with rows.attempt(name):
            for _ in range(lbfgs.GPU_HISTORY + 2):  # a full history
                torch.mul(curvature, image, out=gradient)
                runner.step()
            taken = seconds(recorded(runner.step, device), device)
            rows.add(name, us=1e6 * taken, gb_per_s=vectors * image.nbytes / taken / 1e9)


SECTIONS: dict[str, Callable[[Rows, str], None]] = {"kernels": check_kernels, "kernel-times": kernel_times}
