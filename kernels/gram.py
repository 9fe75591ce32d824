"""Gram matrix of one layer: G = F F^T / M, for features F of C channels x M positions (Gatys et al. 2015, eq. 3).

Dividing by the number of positions makes the matrix independent of the picture's size, and keeps it far from overflow.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def gram_reference(features: NDArray[Any]) -> NDArray[Any]:
    """G (C, C) of features (C, M), in the dtype of the features."""
    return features @ features.T / features.shape[1]


def gram_blas(features: Tensor, out: Tensor) -> Tensor:
    """Write G (C, C) fp32 of features (C, M) of any precision into `out` and return it."""
    features = features.float()
    return torch.addmm(out, features, features.T, beta=0, alpha=1 / features.shape[1], out=out)
