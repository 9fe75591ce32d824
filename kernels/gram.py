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


def products_cublas(features: Tensor, share: int, out: Tensor) -> None:
    """Write F F^T fp32 of each `share` positions of features (C, M) on a GPU into `out` (shares, C, C).

    Sums and results are fp32 for 16-bit features as well: cuBLAS would round fp16 results, and overflow. Shares keep
    the sums of the tensor cores short, which cut off what does not fit, and fill the chip where C x C is little work.
    """
    full = features.shape[1] // share
    whole = features[:, : full * share].unflatten(1, (full, share)).movedim(1, 0)
    torch.bmm(whole, whole.transpose(1, 2), out=out[:full], **_sums_of(features))
    if full < len(out):
        rest = features[:, full * share :]
        torch.mm(rest, rest.T, out=out[full], **_sums_of(features))


def _sums_of(features: Tensor) -> dict[str, Any]:
    return {} if features.dtype == torch.float32 else {"out_dtype": torch.float32}
