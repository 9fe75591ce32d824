"""Style loss of one layer and its gradient (Gatys et al. 2015, eq. 4 and 6, with Grams divided by their positions).

    L = 1 / (4 C^2) * sum_ij (G_ij - A_ij)^2          dL/dF = 1 / (C^2 M) * (G - A) F

for Gram matrices G (of the image) and A (of the style), both divided by their number of positions.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def style_loss_reference(gram: NDArray[Any], target: NDArray[Any]) -> Any:
    """L for Gram matrices (C, C), in their dtype."""
    return ((gram - target) ** 2).sum() / (4 * len(gram) ** 2)


def style_gradient_reference(features: NDArray[Any], gram: NDArray[Any], target: NDArray[Any]) -> NDArray[Any]:
    """dL/dF (C, M) for features (C, M), in their dtype."""
    channels, positions = features.shape
    return (gram - target) @ features / (channels**2 * positions)


def style_gradient_blas(features: Tensor, difference: Tensor, factor: float, out: Tensor, accumulate: bool) -> None:
    """Write (or add) factor * (G - A) F into `out` (C, M), which has the dtype of the features; G - A is fp32."""
    if features.dtype == torch.float32:
        torch.addmm(out, difference, features, beta=int(accumulate), alpha=factor, out=out)
    else:  # half precision on the CPU is for checks, not for speed: round once, at the end
        gradient = (difference @ features.float()) * factor
        out.copy_(gradient + out if accumulate else gradient)
