"""Squared Wasserstein-2 distance of two normal distributions, those of the features of the image and of the style.

    L = mean_i (m_i - n_i)^2 + 1 / C * tr(S + T - 2 (T^1/2 S T^1/2)^1/2)

for means m, n (C,) and covariances S, T (C, C), EPSILON on both diagonals, of the image and the style (Olkin,
Pukelsheim 1982). With T = R R^T, T^1/2 S T^1/2 has the eigenvalues of A = R^T S R, so that
dL/dS = 1 / C * (I - R A^-1/2 R^T).

All of it is fp64. With fewer positions than channels, in a small layer or mask, many eigenvalues of S are zero but for
EPSILON: sums in fp32 would leave noise in their places, by whose roots the gradient divides. There dL/dS is large, and
the features are zero, which it is multiplied with: that part is left out, as it would be lost in rounding else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

EPSILON = 1e-4
STRIP = 1 << 20  # elements that are fp64 at once
_NOTHING = 1e-12  # share of the trace of X X^T / M under which an eigenvalue of S is zero but for rounding


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


def exact_gram(features: Tensor) -> Tensor:
    """F F^T / M (C, C) fp64 of features (C, M)."""
    found = torch.zeros(len(features), len(features), dtype=torch.float64, device=features.device)
    for wide in _strips(features):
        found.addmm_(wide, wide.T)
    return found / features.shape[1]


def exact_mean(features: Tensor, guide: Tensor | None = None) -> Tensor:
    """F g / M (C,) fp64 of features (C, M) and a guide (M,), by default ones."""
    found = torch.zeros(len(features), dtype=torch.float64, device=features.device)
    guides = torch.ones(1, device=features.device).expand(features.shape[1]) if guide is None else guide
    for wide, own in zip(_strips(features), guides.split(_length(features)), strict=True):
        found.addmv_(wide, own.double())
    return found / features.shape[1]


def _length(features: Tensor) -> int:
    """Positions of one strip of features (C, M)."""
    return STRIP // len(features) + 1


def _strips(features: Tensor) -> Iterator[Tensor]:
    """Features (C, M) in fp64, one strip after the other, all in the same memory: malloc kept that of several."""
    room = torch.empty_like(features[:, : _length(features)], dtype=torch.float64)
    for strip in features.split(_length(features), dim=1):
        yield room[:, : strip.shape[1]].copy_(strip)


class Wasserstein:
    """L to a style's mean n and covariance T (C, C), where the tensor is.

    X are the image's features less n, which is known before they are. `away` (C,) fp64 is where their mean, m - n, has
    to be put before the object is called; the gradient of L with respect to it is 1 / C times the `slope` (C,) fp32
    that a call leaves. The eigenvalues are the host's to wait for, so that a call cannot be part of a CUDA graph.
    Raises FloatingPointError for a target that is not finite, and gives NaN for a covariance of the image that is not.
    """

    def __init__(self, target: Tensor) -> None:
        self.away = torch.zeros(len(target), dtype=torch.float64, device=target.device)
        self.slope = self.away.float()
        self._ridge = EPSILON * torch.eye(len(target), dtype=torch.float64, device=target.device)
        covariance = target.double() + self._ridge
        if not torch.isfinite(covariance).all():
            raise FloatingPointError("the covariance of a style is not finite")
        # Not Cholesky's: rounding makes eigenvalues negative that are zero.
        values, vectors = torch.linalg.eigh(covariance)
        self._root, self._trace = vectors * values.clamp_min(EPSILON).sqrt(), covariance.trace()

    def __call__(self, moment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L, D and mean (m - n)^2, fp32, for X X^T / M (C, C) fp64.

        dL/dX = D X / (C^2 M) beside what the slope gives.
        """
        away, channels = self.away, len(moment)
        seen = moment - torch.outer(away, away)
        own = seen + self._ridge
        identity = torch.eye(channels, dtype=torch.float64, device=seen.device)
        unseen, lowered = identity[:, :0], seen - _NOTHING * moment.trace() * identity
        try:
            if torch.linalg.cholesky_ex(lowered).info:  # some are zero; this takes a tenth of the time of the next
                spectrum, basis = torch.linalg.eigh(seen)
                unseen = basis[:, spectrum <= _NOTHING * moment.trace()]
            values, vectors = torch.linalg.eigh(self._root.T @ own @ self._root)
        except LinAlgError:  # of a covariance that is not finite
            nothing = torch.full_like(own, torch.nan).float()
            self.slope = nothing[0]
            return nothing[0, 0], nothing, nothing[0, 0]
        roots = values.clamp_min(EPSILON**2).sqrt()  # no eigenvalue is smaller but by rounding
        means = away.square().mean()
        loss = (means + (own.trace() + self._trace - 2 * roots.sum()) / channels).clamp_min(0)  # but for rounding
        turned = self._root @ vectors
        matrix = 2 * channels * (identity - turned / roots @ turned.T)
        matrix -= unseen @ (unseen.T @ matrix @ unseen) @ unseen.T
        self.slope = (2 * away - matrix @ away / channels).float()
        return loss.float(), matrix.float(), means.float()
