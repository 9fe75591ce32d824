"""Style loss of one layer and its gradient (Gatys et al. 2015, eq. 4 and 6, with Grams divided by their positions).

    L = 1 / (4 C^2) * sum_ij (G_ij - A_ij)^2          dL/dF = 1 / (C^2 M) * (G - A) F

for Gram matrices G (of the image) and A (of the style), both divided by their number of positions.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from . import _cuda

_TILE = 64  # rows and columns of the gradient that one block computes


def style_loss_reference(gram: NDArray[Any], target: NDArray[Any]) -> Any:
    """L for Gram matrices (C, C), in their dtype."""
    return ((gram - target) ** 2).sum() / (4 * len(gram) ** 2)


def style_gradient_reference(features: NDArray[Any], gram: NDArray[Any], target: NDArray[Any]) -> NDArray[Any]:
    """dL/dF (C, M) for features (C, M), in their dtype."""
    channels, positions = features.shape
    return (gram - target) @ features / (channels**2 * positions)


def style_loss(gram: Tensor, target: Tensor, difference: Tensor) -> Tensor:
    """Write G - A (C, C) into `difference` and return L as a 0-dim tensor; all fp32."""
    factor = 1 / (4 * len(gram) ** 2)
    if gram.is_cuda:
        blocks, partials = _cuda.partial_sums(gram, gram.numel())
        _cuda.launch("style", "style_difference", (blocks,), gram, target, difference, gram.numel(), partials)
        return _cuda.finish_sum("style", partials, factor)
    flat = torch.sub(gram, target, out=difference).flatten()
    return torch.dot(flat, flat) * factor


def style_gradient(features: Tensor, difference: Tensor, factor: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """Write (or add) factor * dL/dF (C, M) into `out`, which has the dtype of the features.

    `difference` is G - A from `style_loss`; `factor` is a 0-dim fp32 tensor: the weight of the layer times the scale
    that keeps fp16 gradients in range.
    """
    channels, positions = features.shape
    factor = factor / (channels**2 * positions)
    if features.is_cuda:
        tiles = (-(-positions // _TILE), -(-channels // _TILE))
        kernel = f"style_gradient<{_cuda.ELEMENTS[features.dtype]}>"
        _cuda.launch("style", kernel, tiles, difference, features, factor, out, channels, positions, int(accumulate))
    elif features.dtype == torch.float32:
        torch.addmm(out, difference, features, beta=int(accumulate), alpha=float(factor), out=out)
    else:  # half precision on the CPU is for checks, not for speed: round once, at the end
        gradient = (difference @ features.float()) * factor
        out.copy_(gradient + out if accumulate else gradient)
