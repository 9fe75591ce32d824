"""Minimise a loss over the pixels of an image at one scale, one evaluation at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

HISTORY = 20  # pairs of the L-BFGS history: 0.5 kB a pixel, where torch's default of 100 would take 2.4 kB
FIRST_STEP = 0.01  # root mean square of the first L-BFGS step, in pixel values
DIVERGED = 2.0  # a loss this many times the best one makes L-BFGS take its step back
HALVINGS = 4  # of one step, before L-BFGS starts afresh
ADAM_RATE, ADAM_BETAS = 0.03, (0.9, 0.99)


@dataclass
class State:
    """What is carried from one scale to the next: Adam's step count and moments (1, 3, H, W)."""

    moments: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Iterate:
    """Result of one evaluation: its loss, and the best image (1, 3, H, W) of this scale so far."""

    loss: float
    best: Tensor


def minimise(
    loss: Callable[[Tensor], Tensor], start: Tensor, optimizer: str, iterations: int, state: State
) -> Iterator[Iterate]:
    """Yield an `Iterate` after each of `iterations` evaluations of loss and gradient.

    `loss` maps pixels (1, 3, H, W) to a 0-dim tensor with a gradient. `lbfgs` takes full quasi-Newton steps without a
    line search (one evaluation a step) and takes a step back, half by half, when it has diverged; `adam` keeps the
    pixels in [0, 1]. Raises FloatingPointError when loss or gradient is not finite; what was yielded before stays good.
    """
    image = start.detach().clone().requires_grad_()
    runner = _Lbfgs(image) if optimizer == "lbfgs" else _Adam(image, state)
    best, lowest = image.detach().clone(), math.inf
    for iteration in range(1, iterations + 1):
        image.grad = None
        value = loss(image)
        value.backward()
        current = float(value.detach())
        assert image.grad is not None
        if not (math.isfinite(current) and bool(torch.isfinite(image.grad).all())):
            raise FloatingPointError(
                f"loss or gradient is not finite at iteration {iteration} (loss {current}); "
                "smaller weights or --precision fp32 keep the numbers in range"
            )
        if current < lowest:
            best, lowest = image.detach().clone(), current
        if current > DIVERGED * lowest:
            runner.retreat(best)
        else:
            runner.step()
        yield Iterate(current, best)
    runner.save(state)


class _Lbfgs:
    """L-BFGS (Nocedal 1980) with unit steps, fed one evaluation a step, and a first step of a size that fits pixels.

    The steps are those of torch.optim.LBFGS, whose import of its compiler would take seconds and 120 MB.
    """

    def __init__(self, image: Tensor) -> None:
        self._image = image
        self._first_step = FIRST_STEP
        self._moves = image.new_empty((HISTORY, image.numel()))  # s_k
        self._changes = torch.empty_like(self._moves)  # y_k, of the gradient
        self._curvatures = [0.0] * HISTORY  # s_k y_k
        self._forget()

    def _forget(self) -> None:
        self._count = 0  # pairs stored since; slot k % HISTORY holds pair k
        self._unit = 1.0
        self._gradient = torch.empty(0)
        self._move: Tensor | None = None
        self._halvings = 0

    def step(self) -> None:
        """Move the image by one quasi-Newton step for the gradient in `image.grad`."""
        assert self._image.grad is not None
        if self._move is None:
            # fp32 sums of squares hold any weights of the loss if the gradient is of order one.
            size = float(self._image.grad.double().square().mean().sqrt())
            self._unit = 1 / size if size > 0 else 1.0
            gradient = self._image.grad.flatten() * self._unit
            self._move = gradient * -self._first_step
        else:
            gradient = self._image.grad.flatten() * self._unit
            self._remember(self._move, gradient - self._gradient)
            self._move = self._direction(gradient)
        self._gradient = gradient
        with torch.no_grad():
            self._image.add_(self._move.view_as(self._image))
        self._halvings = 0

    def _remember(self, move: Tensor, change: Tensor) -> None:
        """Store a pair unless the curvature along it is not positive."""
        curvature = float(move @ change)
        if curvature > 1e-10:
            slot = self._count % HISTORY
            self._moves[slot], self._changes[slot], self._curvatures[slot] = move, change, curvature
            self._count += 1

    def _direction(self, gradient: Tensor) -> Tensor:
        """-H g by the two-loop recursion."""
        direction = -gradient
        slots = [k % HISTORY for k in range(max(0, self._count - HISTORY), self._count)]
        shares = {}
        for slot in reversed(slots):
            shares[slot] = float(self._moves[slot] @ direction) / self._curvatures[slot]
            direction.sub_(self._changes[slot], alpha=shares[slot])
        if slots:
            newest = self._changes[slots[-1]]
            direction.mul_(self._curvatures[slots[-1]] / float(newest @ newest))
        for slot in slots:
            share = float(self._changes[slot] @ direction) / self._curvatures[slot]
            direction.add_(self._moves[slot], alpha=shares[slot] - share)
        return direction

    def retreat(self, best: Tensor) -> None:
        """Take back half of the last step; after several halves, forget the history and start from `best`."""
        assert self._move is not None
        with torch.no_grad():
            if self._halvings < HALVINGS:
                self._move /= 2  # the next pair has to know the step that was really made
                self._image.sub_(self._move.view_as(self._image))
                self._halvings += 1
                return
            self._image.copy_(best)
        self._first_step /= 4
        self._forget()

    def save(self, state: State) -> None:
        """Nothing is carried on: the history belongs to the resolution it was made at."""


class _Adam:
    """torch's Adam (Kingma, Ba 2015), started with the moments of the coarser scale."""

    def __init__(self, image: Tensor, state: State) -> None:
        self._image = image
        self._torch = torch.optim.Adam([image], lr=ADAM_RATE, betas=ADAM_BETAS)
        if state.moments:
            size = image.shape[2:]
            moments: dict[str, Any] = {"step": state.moments["step"]}
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = functional.interpolate(state.moments[name], size=size, mode="bilinear")
            self._torch.state[image] = moments

    def step(self) -> None:
        """Move the image by one step for the gradient in `image.grad`, then clamp it."""
        self._torch.step()
        with torch.no_grad():
            self._image.clamp_(0, 1)

    def retreat(self, best: Tensor) -> None:
        """Step on: Adam's steps are bounded, and it comes back by itself."""
        self.step()

    def save(self, state: State) -> None:
        """Hand the moments to the next scale."""
        state.moments = dict(self._torch.state[self._image])
