"""The bridge: a torch function from pixels to the scalar loss, whose backward is our VJP.

Forward and VJP graph share one memory, which another evaluation may overwrite before `backward` is called. So the
gradient is computed together with the loss, and `backward` multiplies it with the incoming cotangent. Under
`torch.no_grad()` the VJP is not computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .losses import Objective


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pixels: Tensor, objective: Objective, with_gradient: bool) -> Tensor:
        terms, gradient = objective.evaluate(pixels, with_gradient)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return terms.total.clone()  # torch lets nobody add to a view

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return cotangent * gradient, None, None


def loss(pixels: Tensor, objective: Objective) -> Tensor:
    """The total loss of pixels (1, 3, H, W) float32 as a 0-dim tensor that any torch optimiser can differentiate.

    It can be added to other torch terms. It is differentiable once. Raises ValueError for another shape or dtype.
    """
    wanted = objective.network.image
    if pixels.shape != wanted.shape or pixels.dtype != wanted.dtype or pixels.device != wanted.device:
        raise ValueError(
            f"pixels {tuple(pixels.shape)} {pixels.dtype} on {pixels.device}: "
            f"the objective takes {tuple(wanted.shape)} {wanted.dtype} on {wanted.device}"
        )
    with_gradient = torch.is_grad_enabled() and pixels.requires_grad
    result: Tensor = _Loss.apply(pixels, objective, with_gradient)
    return result
