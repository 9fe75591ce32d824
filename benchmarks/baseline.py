"""The plain PyTorch Gatys loop as a good user writes it: torchvision's VGG-19, autograd, torch.optim.LBFGS.

`eager` is the baseline, `float64` the oracle; the other entries of `VARIANTS` are the same loop with what a user tries
next. Objective, weights, layers, pictures and start are those of the engine; the formulas are written again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from engine import Config
from engine.export.weights import Weights


@dataclass(frozen=True)
class Variant:
    """How the network is run; `autocast` is bf16 on a CPU and fp16 on a GPU, `mode` that of torch.compile on a GPU."""

    channels_last: bool = False
    autocast: bool = False
    compiled: bool = False
    mode: str = "max-autotune"
    dtype: torch.dtype = torch.float32  # of the parameters and of the loss


VARIANTS = {
    "eager": Variant(),
    "channels-last": Variant(channels_last=True),
    "autocast": Variant(channels_last=True, autocast=True),
    "compile": Variant(compiled=True),
    "compile-autocast": Variant(channels_last=True, autocast=True, compiled=True),
    "compile-graphs": Variant(channels_last=True, autocast=True, compiled=True, mode="reduce-overhead"),  # for a GPU
    "float64": Variant(dtype=torch.float64),
}
SCALE = 2.0**12  # of the loss that is optimised: keeps L-BFGS off torch's absolute thresholds, fp16 cotangents off zero


@contextlib.contextmanager
def tf32(device: str, allowed: bool) -> Iterator[None]:
    """On a GPU, whether torch may round the factors of fp32 products to TF32, and the fastest of its convolutions."""
    if device != "cuda":
        yield
        return
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32, convolutions.benchmark
    products.allow_tf32, convolutions.allow_tf32, convolutions.benchmark = allowed, allowed, True
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32, convolutions.benchmark = before


class Baseline:
    """The objective of one content and one style picture, both (1, 3, H, W) in [0, 1].

    On a GPU a good user lets fp32 be rounded to TF32, so that happens unless it is to be `exact`.
    """

    def __init__(
        self,
        weights: Weights,
        content: Tensor,
        style: Tensor,
        config: Config | None = None,
        variant: str = "eager",
        device: str = "cpu",
        history: int = 100,
        exact: bool = False,
    ) -> None:
        self._history, self._exact = history, exact  # pairs of L-BFGS, torch's default
        self._variant, self._device = VARIANTS[variant], torch.device(device)
        self._config = (config or Config()).for_weights(weights.kind)
        self._network = weights.module(self._config.layers, self._config.pooling, self._variant.dtype).to(device)
        if self._variant.channels_last:
            self._network = self._network.to(memory_format=torch.channels_last)
        with torch.no_grad(), self._rounding():
            features = self._features(self._place(content))
            self._targets = {layer: features[layer] for layer in self._config.content_layer_weights}
            features = self._features(self._place(style))
            self._grams = {layer: _gram(features[layer]) for layer in self._config.style_layer_weights}
        mode = self._variant.mode if self._device.type == "cuda" else None
        self._objective = torch.compile(self._loss, mode=mode, dynamic=False) if self._variant.compiled else self._loss

    def loss_and_gradient(self, pixels: Tensor) -> tuple[float, Tensor]:
        """Loss of pixels (1, 3, H, W) and its gradient."""
        pixels = self._place(pixels).requires_grad_()
        with self._rounding():  # as in the loop: torch.compile would compile again
            loss = SCALE * self._objective(pixels)
            (gradient,) = torch.autograd.grad(loss, pixels)
        return float(loss.detach()) / SCALE, gradient / SCALE

    def iterate(self, start: Tensor) -> Iterator[float]:
        """Optimise from `start` for ever: the loss after each iteration, one evaluation and one L-BFGS step.

        The picture so far is `pixels`. With `Config.clamp` each evaluation brings it back into range, unknown to the
        optimiser, as PyTorch's tutorial does it.
        `max_iter=1` hands every iteration out; torch carries the history from call to call, so the steps are those of
        one long call.
        """
        pixels = self.pixels = self._place(start).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [pixels], max_iter=1, tolerance_grad=0, tolerance_change=0, history_size=self._history
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            if self._config.clamp:
                with torch.no_grad():
                    pixels.clamp_(0, 1)
            loss = SCALE * self._objective(pixels)
            loss.backward()
            return loss.detach()

        while True:
            with self._rounding():
                loss = optimizer.step(closure)
            yield float(loss) / SCALE

    def _rounding(self) -> contextlib.AbstractContextManager[None]:
        return tf32(self._device.type, not self._exact)

    def _place(self, pixels: Tensor) -> Tensor:
        return pixels.detach().to(self._device, self._variant.dtype, copy=True)

    def _features(self, pixels: Tensor) -> dict[str, Tensor]:
        if self._variant.channels_last:  # here, because L-BFGS takes contiguous pixels only
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        half = torch.float16 if self._device.type == "cuda" else torch.bfloat16
        with torch.autocast(self._device.type, dtype=half, enabled=self._variant.autocast):
            features: dict[str, Tensor] = self._network(pixels)
        return {layer: each.to(self._variant.dtype) for layer, each in features.items()}  # Grams need fp32's range

    def _loss(self, pixels: Tensor) -> Tensor:
        config, features = self._config, self._features(pixels)
        content = pixels.new_zeros(())
        for layer, target in self._targets.items():
            content = content + functional.mse_loss(features[layer], target)
        style = pixels.new_zeros(())
        for layer, target in self._grams.items():
            style = style + (_gram(features[layer]) - target).square().sum() / (4 * len(target) ** 2)
        loss = config.content_weight * content + config.style_weight * style / len(self._grams)
        if config.tv_weight:
            loss = loss + config.tv_weight * sum(pixels.diff(dim=axis).square().mean() for axis in (2, 3))
        return loss


def run(baseline: Baseline, start: Tensor, iterations: int = 500) -> list[tuple[float, float]]:
    """A whole run at one scale: (loss, seconds since its start) of each iteration."""
    begin = time.perf_counter()
    return [
        (loss, time.perf_counter() - begin) for loss, _ in zip(baseline.iterate(start), range(iterations), strict=False)
    ]


def _gram(features: Tensor) -> Tensor:
    """F F^T / M of features (1, C, H, W)."""
    flat = features.flatten(2)[0]
    return flat @ flat.T / flat.shape[1]
