"""Gram matrix of one layer: G = F F^T / M, for features F of C channels x M positions (Gatys et al. 2015, eq. 3).

Dividing by the number of positions makes the matrix independent of the picture's size, and keeps it far from overflow.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from . import _cuda

_TILE = 64  # rows and columns of G that one block computes
_TARGET_BLOCKS = 512  # enough to fill the largest chip; the positions are shared out until there are as many


def gram_reference(features: NDArray[Any]) -> NDArray[Any]:
    """G (C, C) of features (C, M), in the dtype of the features."""
    return features @ features.T / features.shape[1]


def gram(features: Tensor, out: Tensor) -> Tensor:
    """Write G (C, C) fp32 of features (C, M), fp32 or fp16, contiguous, into `out` and return it."""
    if features.is_cuda:
        return _gram_cuda(features, out)
    features = features.float()
    return torch.addmm(out, features, features.T, beta=0, alpha=1 / features.shape[1], out=out)


def _gram_cuda(features: Tensor, out: Tensor) -> Tensor:
    channels, positions = features.shape
    tiles = -(-channels // _TILE)
    shares = min(-(-positions // _TILE), max(1, _TARGET_BLOCKS // (tiles * tiles)))
    share = -(-positions // shares)
    partial = torch.empty((shares, channels, channels), dtype=torch.float32, device=features.device)
    kernel = f"gram_partial<{_cuda.ELEMENTS[features.dtype]}>"
    _cuda.launch("gram", kernel, (tiles, tiles, shares), features, partial, channels, positions, share)
    blocks = -(-channels * channels // _cuda.THREADS)
    _cuda.launch("gram", "gram_reduce", (blocks,), partial, out, channels, shares, 1 / positions)
    return out
