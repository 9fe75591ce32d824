"""Temporal loss of a frame of a video and its gradient (Ruder, Dosovitskiy, Brox 2016, eq. 4, as a mean).

L = 1 / (3 H W) * sum over pixels p and colours of c_p (x_p - y_p)^2       dL/dx_p = 2 / (3 H W) * c_p (x_p - y_p)

y is the picture of the frame before, carried along by the motion between the frames, and c how certain it is there.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from . import _cuda


def temporal_reference(pixels: NDArray[Any], carried: NDArray[Any], certain: NDArray[Any]) -> tuple[Any, NDArray[Any]]:
    """L and dL/dx of pixels x and carried y (3, H, W) with certainties c (H, W), in their dtype."""
    part = certain * (pixels - carried)
    return (part * (pixels - carried)).mean(), 2 * part / pixels.size


class Temporal:
    """The loss by this weight for pixels like `carried` (1, 3, H, W); `certain` is (1, 1, H, W). All are fp32."""

    def __init__(self, carried: Tensor, certain: Tensor, weight: float) -> None:
        self._carried, self._certain, self._weight = carried.contiguous(), certain.contiguous(), float(weight)
        self._blocks = _cuda.blocks(carried.numel())
        self._sums = torch.empty(self._blocks, dtype=torch.float64, device=carried.device)
        self._arrived = torch.zeros(1, dtype=torch.int32, device=carried.device)

    def add(self, pixels: Tensor, gradient: Tensor | None, total: Tensor) -> None:
        """Add weight * L to `total`, 0-dim fp32, and its derivative to the gradient, if there is one."""
        if pixels.is_cuda:
            vectors = (pixels, self._carried, self._certain, gradient)
            size = self._certain.numel(), self._weight
            _cuda.launch("temporal", "temporal", (self._blocks,), *vectors, *size, self._sums, self._arrived, total)
            return
        difference = pixels - self._carried
        part = self._certain * difference
        total += self._weight / pixels.numel() * torch.dot(part.flatten(), difference.flatten())
        if gradient is not None:
            gradient.add_(part, alpha=2 * self._weight / pixels.numel())
