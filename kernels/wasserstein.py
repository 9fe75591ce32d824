"""Squared Wasserstein-2 distance of two normal distributions, those of the features of the image and of the style.

    L = mean_i (m_i - n_i)^2 + 1 / C * tr(S + T - 2 (T^1/2 S T^1/2)^1/2)

for means m, n (C,) and covariances S, T (C, C), EPSILON on both diagonals, of the image and the style (Olkin,
Pukelsheim 1982). With T = R R^T, T^1/2 S T^1/2 has the eigenvalues of A = R^T S R, so that
dL/dS = 1 / C * (I - R A^-1/2 R^T).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

EPSILON = 1e-4


def wasserstein_reference(
    mean: NDArray[Any], covariance: NDArray[Any], target_mean: NDArray[Any], target: NDArray[Any]
) -> Any:
    """L for means (C,) and covariances (C, C) without EPSILON, in their dtype."""
    ridge = EPSILON * np.eye(len(mean), dtype=mean.dtype)
    values, vectors = np.linalg.eigh(target + ridge)
    root = vectors * np.sqrt(values) @ vectors.T
    crossed = np.linalg.eigvalsh(root @ (covariance + ridge) @ root)
    traces = np.trace(covariance + ridge) + np.trace(target + ridge)
    return ((mean - target_mean) ** 2).mean() + (traces - 2 * np.sqrt(crossed.clip(0)).sum()) / len(mean)


class Wasserstein:
    """L to a style's mean n and covariance T (C, C) fp32; computed in fp64, where the tensors are.

    X are the image's features less n, which is known before they are. `away` (C,) fp32 is where their mean, m - n, has
    to stand when the object is called; the gradient of L with respect to it is 1 / C times the `slope` (C,) fp32 that a
    call leaves. The eigenvalues are the host's to wait for, so that a call cannot be part of a CUDA graph. Raises
    FloatingPointError for a target that is not finite, and gives NaN for a covariance of the image that is not.
    """

    def __init__(self, away: Tensor, target: Tensor) -> None:
        self.away, self.slope = away, torch.zeros_like(away)
        self._ridge = EPSILON * torch.eye(len(away), dtype=torch.float64, device=away.device)
        covariance = target.double() + self._ridge
        if not torch.isfinite(covariance).all():
            raise FloatingPointError("the covariance of a style is not finite")
        # Not Cholesky's: with fewer positions than channels rounding makes eigenvalues negative.
        values, vectors = torch.linalg.eigh(covariance)
        self._root, self._trace = vectors * values.clamp_min(EPSILON).sqrt(), covariance.trace()

    def __call__(self, moment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L, D and mean (m - n)^2 for X X^T / M (C, C) fp32: dL/dX = D X / (C^2 M) beside what the slope gives."""
        away, channels = self.away.double(), len(moment)
        own = moment.double() - torch.outer(away, away) + self._ridge
        try:
            values, vectors = torch.linalg.eigh(self._root.T @ own @ self._root)
        except LinAlgError:  # of a covariance that is not finite
            nothing = torch.full_like(own, torch.nan).float()
            self.slope = nothing[0]
            return nothing[0, 0], nothing, nothing[0, 0]
        roots = values.clamp_min(EPSILON**2).sqrt()  # no eigenvalue is smaller but by rounding
        means = away.square().mean()
        loss = (means + (own.trace() + self._trace - 2 * roots.sum()) / channels).clamp_min(0)  # but for rounding
        turned = self._root @ vectors
        identity = torch.eye(channels, dtype=torch.float64, device=own.device)
        matrix = 2 * channels * (identity - turned / roots @ turned.T)
        self.slope = (2 * away - matrix @ away / channels).float()
        return loss.float(), matrix.float(), means.float()
