"""Content loss of one layer and its gradient (Gatys et al. 2015, eq. 1 and 2, as a mean over the C M elements).

L = 1 / (C M) * sum_ij (F_ij - P_ij)^2            dL/dF = 2 / (C M) * (F - P)
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def content_loss_reference(features: NDArray[Any], target: NDArray[Any]) -> Any:
    """L for features and target (C, M), in their dtype."""
    return ((features - target) ** 2).mean()


def content_gradient_reference(features: NDArray[Any], target: NDArray[Any]) -> NDArray[Any]:
    """dL/dF (C, M), in the dtype of the features."""
    return 2 * (features - target) / features.size


def content_loss_blas(features: Tensor, target: Tensor) -> Tensor:
    """L of features and target (C, M) as a 0-dim fp32 tensor."""
    return torch.linalg.vector_norm(features - target, dtype=torch.float64).square().float() / features.numel()


def content_gradient_blas(features: Tensor, target: Tensor, factor: float, out: Tensor) -> None:
    """Write factor * (F - P) into `out` (C, M)."""
    torch.sub(features, target, out=out).mul_(factor)
