"""Total variation of the pixels and its gradient: mean squared difference of neighbours, across and down.

L = mean (x[.., j+1] - x[.., j])^2 + mean (x[i+1, ..] - x[i, ..])^2

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


def total_variation_reference(pixels: NDArray[Any]) -> tuple[Any, NDArray[Any]]:
    """L and dL/dx of pixels (3, H, W), in their dtype."""
    gradient = np.zeros_like(pixels)
    loss = 0
    for axis in (1, 2):
        difference = np.diff(pixels, axis=axis)
        loss = loss + (difference**2).mean()
        slope = np.moveaxis(2 * difference / difference.size, axis, 0)
        view = np.moveaxis(gradient, axis, 0)
        view[1:] += slope
        view[:-1] -= slope
    return loss, gradient


class Pixels:
    """Finishes loss and gradient at `pixels` (1, 3, H, W) fp32, H, W >= 2, with total variation of this weight.

    `vjp`, like the pixels, is the gradient of the other terms times `scale`, a 0-dim fp32 tensor; `terms` is what
    `Layers.losses` writes. All are kept, and used again at each call.
    """

    def __init__(self, pixels: Tensor, vjp: Tensor, scale: Tensor, weight: float, terms: Tensor) -> None:
        self._pixels, self._vjp, self._scale, self._weight, self._terms = pixels, vjp, scale, float(weight), terms
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
        size = (height, width, self._weight)
        _cuda.launch("pixels", "pixel_gradient", (self._blocks,), *vectors, *size, *scratch, self._terms)

    def _finish_cpu(self, gradient: Tensor | None) -> None:
        if gradient is not None:
            torch.div(self._vjp, self._scale, out=gradient)
        loss = 0.0
        for axis in (2, 3):
            size = self._pixels.shape[axis] - 1
            difference = self._pixels.narrow(axis, 1, size) - self._pixels.narrow(axis, 0, size)
            flat = difference.flatten()
            loss += float(torch.dot(flat, flat)) / flat.numel()
            if gradient is not None:
                slope = 2 * self._weight / flat.numel()
                gradient.narrow(axis, 1, size).add_(difference, alpha=slope)
                gradient.narrow(axis, 0, size).sub_(difference, alpha=slope)
        self._terms[2] = loss
        self._terms[0] += self._weight * loss
        if gradient is not None and not torch.isfinite(gradient).all():
            self._terms[0] = math.nan
