"""Adam (Kingma, Ba 2015) on pixels, which it keeps in [0, 1]. The arithmetic is torch's.

A loss that is not finite stops it: the image does not change any more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import _cuda
from .trail import Trail

RATE, BETAS, EPSILON = 0.03, (0.9, 0.99), 1e-8


class Adam:
    """Moves `image` by what `gradient` and `loss` hold after each evaluation.

    Image and gradient are fp32 of one shape, contiguous, the loss is a 0-dim fp32 tensor; all are kept and used again.
    Each step leaves its loss and the best image in the `trail`. `moments`, the first and the second of the gradient,
    may be started from those of a run of `steps` steps.
    """

    def __init__(
        self,
        image: Tensor,
        gradient: Tensor,
        loss: Tensor,
        trail: Trail,
        moments: Sequence[Tensor] = (),
        steps: int = 0,
        rate: float = RATE,
    ) -> None:
        self._trail = trail
        self.moments = [each.contiguous() for each in moments] or [torch.zeros_like(image) for _ in range(2)]
        self.steps, self._rate = steps, rate
        self._image, self._gradient, self._loss = image, gradient, loss
        self._lowest = math.inf
        if image.is_cuda:
            powers = [math.inf, *(beta**steps for beta in BETAS)]
            self._state = torch.tensor(powers, dtype=torch.float64, device=image.device)
            self._arrived = torch.zeros(1, dtype=torch.int32, device=image.device)

    def step(self) -> None:
        """Move on from the evaluation."""
        self.steps += 1
        if not self._image.is_cuda:
            self._step_cpu(float(self._loss))
            return
        vectors = (self._image, self._gradient, *self.moments, *self._trail.arguments)
        scalars = (self._loss, self._state, self._arrived, self._image.numel(), self._rate, *BETAS, EPSILON)
        _cuda.launch("adam", "adam_step", (_cuda.blocks(self._image.numel()),), *vectors, *scalars)

    def save(self) -> dict[str, Tensor]:
        """All that the next steps depend on, in host memory; on a CPU partly the memory in use, so to be copied."""
        first, second = self.moments
        saved = {"image": self._image, "best": self._trail.best, "first": first, "second": second}
        saved = {name: tensor.cpu() for name, tensor in saved.items()}
        saved["steps"] = torch.tensor(self.steps)
        saved["state"] = self._state.cpu() if self._image.is_cuda else torch.tensor(self._lowest, dtype=torch.float64)
        return saved

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Go on where another optimiser of this shape and device was when `saved` was its `save`."""
        names = ("image", "best", "first", "second")
        for name, tensor in zip(names, (self._image, self._trail.best, *self.moments), strict=True):
            tensor.copy_(saved[name])
        self.steps = int(saved["steps"])
        if self._image.is_cuda:
            self._state.copy_(saved["state"])
        else:
            self._lowest = float(saved["state"])

    def _step_cpu(self, loss: float) -> None:
        improved = math.isfinite(loss) and loss < self._lowest
        self._trail.leave(self._image, loss, improved)
        if not math.isfinite(loss):
            return
        if improved:
            self._lowest = loss
        gradient, (first, second), (rate1, rate2) = self._gradient, self.moments, BETAS
        first.lerp_(gradient, 1 - rate1)
        second.mul_(rate2).addcmul_(gradient, gradient, value=1 - rate2)
        # The gradient is read no more: its memory saves one as large.
        root = torch.sqrt(second, out=gradient).div_(math.sqrt(1 - rate2**self.steps)).add_(EPSILON)
        self._image.addcdiv_(first, root, value=-self._rate / (1 - rate1**self.steps)).clamp_(0, 1)
