"""Content loss of one layer and its gradient (Gatys et al. 2015, eq. 1 and 2, as a mean over the C M elements).

    L = 1 / (C M) * sum_ij (F_ij - P_ij)^2            dL/dF = 2 / (C M) * (F - P)

The loss writes F - P; the gradient scales that in place, once the scale is known.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from . import _cuda


def content_loss_reference(features: NDArray[Any], target: NDArray[Any]) -> Any:
    """L for features and target (C, M), in their dtype."""
    return ((features - target) ** 2).mean()


def content_gradient_reference(features: NDArray[Any], target: NDArray[Any]) -> NDArray[Any]:
    """dL/dF (C, M), in the dtype of the features."""
    return 2 * (features - target) / features.size


def content_loss(features: Tensor, target: Tensor, difference: Tensor) -> Tensor:
    """Write F - P into `difference` and return L as a 0-dim fp32 tensor; all (C, M) of one dtype, fp32 or fp16."""
    if features.is_cuda:
        blocks, partials = _cuda.partial_sums(features, features.numel())
        kernel = f"content_difference<{_cuda.ELEMENTS[features.dtype]}>"
        _cuda.launch("content", kernel, (blocks,), features, target, difference, features.numel(), partials)
        return _cuda.finish_sum("content", partials, 1 / features.numel())
    torch.sub(features, target, out=difference)
    return torch.linalg.vector_norm(difference, dtype=torch.float32).square() / features.numel()


def content_gradient(difference: Tensor, factor: Tensor) -> None:
    """Turn F - P (C, M) into factor * dL/dF in place; `factor` is a 0-dim fp32 tensor."""
    factor = factor * (2 / difference.numel())
    if difference.is_cuda:
        blocks = min(_cuda.MAX_BLOCKS, -(-difference.numel() // _cuda.THREADS))
        kernel = f"content_gradient<{_cuda.ELEMENTS[difference.dtype]}>"
        _cuda.launch("content", kernel, (blocks,), difference, difference.numel(), factor)
    else:
        difference.mul_(float(factor))
