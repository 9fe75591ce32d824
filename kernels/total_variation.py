"""Total variation of the pixels and its gradient: mean squared difference of neighbours, across and down.

L = mean (x[.., j+1] - x[.., j])^2 + mean (x[i+1, ..] - x[i, ..])^2
"""

from __future__ import annotations

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


def total_variation(pixels: Tensor, factor: float, gradient: Tensor) -> Tensor:
    """Add factor * dL/dx to `gradient` and return L as a 0-dim tensor; both tensors (1, 3, H, W) fp32, H, W >= 2."""
    if pixels.is_cuda:
        height, width = pixels.shape[2:]
        blocks, partials = _cuda.partial_sums(pixels, pixels.numel())
        _cuda.launch("total_variation", "tv_gradient", (blocks,), pixels, gradient, height, width, factor, partials)
        return _cuda.finish_sum("total_variation", partials, 1.0)
    loss = pixels.new_zeros(())
    for axis in (2, 3):
        size = pixels.shape[axis] - 1
        difference = pixels.narrow(axis, 1, size) - pixels.narrow(axis, 0, size)
        flat = difference.flatten()
        loss += torch.dot(flat, flat) / flat.numel()
        slope = 2 * factor / flat.numel()
        gradient.narrow(axis, 1, size).add_(difference, alpha=slope)
        gradient.narrow(axis, 0, size).sub_(difference, alpha=slope)
    return loss
