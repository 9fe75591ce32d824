"""Total variation of the pixels and its gradient: mean power of the difference of neighbours, across and down.

L = mean |x[.., j+1] - x[.., j]|^p + mean |x[i+1, ..] - x[i, ..]|^p,  p >= 1; p = 2 by default, the field's other is 1

With `wrap` the last column and row have the first ones as neighbours. At p = 1 the slope of a difference of zero is 0.

It is the last term of the loss, so its pass over the pixels also finishes the gradient of the whole.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import _cuda


def total_variation_reference(pixels: NDArray[Any], power: float = 2, wrap: bool = False) -> tuple[Any, NDArray[Any]]:
    """L and dL/dx of pixels (3, H, W), in their dtype."""
    gradient = np.zeros_like(pixels)
    loss = 0
    for axis in (1, 2):
        difference = np.roll(pixels, -1, axis) - pixels
        if not wrap:
            difference = np.delete(difference, -1, axis)
        loss = loss + (np.abs(difference) ** power).mean()
        slope = power * np.sign(difference) * np.abs(difference) ** (power - 1) / difference.size
        if not wrap:
            slope = np.concatenate([slope, np.zeros_like(np.take(pixels, [0], axis))], axis)
        gradient += np.roll(slope, 1, axis) - slope
    return loss, gradient


class Pixels:
    """Finishes loss and gradient at `pixels` (1, 3, H, W) fp32, H, W >= 2, with total variation of this weight.

    `power` and `wrap` are those of the formula. `vjp`, like the pixels, is the gradient of the other terms times
    `scale`, a 0-dim fp32 tensor; `terms` is what `Layers.losses` writes. All are kept, and used again at each call.
    """

    def __init__(
        self,
        pixels: Tensor,
        vjp: Tensor,
        scale: Tensor,
        weight: float,
        terms: Tensor,
        power: float = 2,
        wrap: bool = False,
    ) -> None:
        self._pixels, self._vjp, self._scale, self._weight, self._terms = pixels, vjp, scale, float(weight), terms
        self._power, self._wrap = float(power), wrap
        self._blocks = _cuda.blocks(pixels.numel())
        self._sums = torch.empty((self._blocks, 2), dtype=torch.float64, device=pixels.device)
        self._arrived = torch.zeros(1, dtype=torch.int32, device=pixels.device)

    def finish(self, gradient: Tensor | None) -> None:
        """Put L in its place among the terms and add it to the total; write the gradient of the total if wanted.

        The total becomes NaN if an element of the gradient is not finite.
        """
        if not self._pixels.is_cuda:
            self._finish_cpu(gradient)
            return
        height, width = self._pixels.shape[2:]
        vectors = (self._pixels, self._vjp, gradient, self._scale)
        scratch = (self._sums, self._arrived)
        size = (height, width, self._weight, self._power, int(self._wrap))
        _cuda.launch("pixels", "pixel_gradient", (self._blocks,), *vectors, *size, *scratch, self._terms)

    def _finish_cpu(self, gradient: Tensor | None) -> None:
        if gradient is not None:
            torch.div(self._vjp, self._scale, out=gradient)
        loss = 0.0
        for axis in (2, 3):
            size = self._pixels.shape[axis] - 1
            pairs = [(1, 0, size), (0, size, 1)] if self._wrap else [(1, 0, size)]  # begins of both sides, length
            count = self._pixels.numel() // (size + 1) * sum(length for *_, length in pairs)
            for right, left, length in pairs:
                difference = self._pixels.narrow(axis, right, length) - self._pixels.narrow(axis, left, length)
                sharp = difference  # |d|^p / d
                if self._power != 2:
                    sharp = difference.sign() * difference.abs().pow_(self._power - 1)
                loss += float(torch.dot(sharp.flatten(), difference.flatten())) / count
                if gradient is not None:
                    slope = self._power * self._weight / count
                    gradient.narrow(axis, right, length).add_(sharp, alpha=slope)
                    gradient.narrow(axis, left, length).sub_(sharp, alpha=slope)
        self._terms[2] = loss
        self._terms[0] += self._weight * loss
        if gradient is not None and not torch.isfinite(gradient).all():
            self._terms[0] = math.nan
