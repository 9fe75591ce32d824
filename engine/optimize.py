"""Minimise a loss over the pixels of an image at one scale, one evaluation at a time."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from . import kernels
from .stages import Stages

AHEAD = 2  # iterations that a GPU has been given when one is yielded: who reads its loss does not leave the GPU idle


@dataclass
class State:
    """What is carried from one scale to the next: Adam's step count and moments (1, 3, H, W)."""

    steps: int = 0
    moments: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Iterate:
    """Result of one evaluation: its loss, the best image (1, 3, H, W) of this scale so far, seconds by stage."""

    best: Tensor
    _loss: Tensor = field(repr=False)  # in host memory
    _arrival: torch.cuda.Event | None = field(repr=False)  # of the loss, None on a CPU
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """The loss; on a GPU this waits until the evaluation has come so far."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return float(self._loss)

    @property
    def arrived(self) -> bool:
        """Whether `loss` would not wait."""
        return self._arrival is None or self._arrival.query()


def minimise(
    evaluate: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    optimizer: str,
    iterations: int,
    state: State,
    stages: Stages | None = None,
) -> Iterator[Iterate]:
    """Yield an `Iterate` after each of `iterations` evaluations of loss and gradient.

    `evaluate` gets pixels (1, 3, H, W) fp32 and a tensor of that shape, into which it writes the gradient of the loss
    that it returns, 0-dim. `lbfgs` takes full quasi-Newton steps without a line search (one evaluation a step) and
    takes a step back, half by half, when it has diverged; `adam` keeps the pixels in [0, 1]. On a GPU iterations are
    queued AHEAD of those that are yielded, and the host waits only where it reads a loss or an image. `stages` is what
    `evaluate` counts its time in.

    Raises FloatingPointError when a loss is not finite, on a GPU when the host comes to know it; the image has not
    moved since then, and what was yielded before stays good.
    """
    image = start.detach().clone()
    stages = stages or Stages(measures=not image.is_cuda)
    gradient, loss = torch.empty_like(image), image.new_zeros(())
    runner = kernels.Lbfgs(image, gradient, loss) if optimizer == "lbfgs" else _adam(image, gradient, loss, state)
    losses = torch.empty(iterations, pin_memory=image.is_cuda)
    queued: deque[Iterate] = deque()
    unchecked: deque[tuple[int, Iterate]] = deque()
    for i in range(iterations):
        loss.copy_(evaluate(image, gradient))
        losses[i].copy_(loss, non_blocking=True)
        arrival = torch.cuda.current_stream(image.device).record_event() if image.is_cuda else None
        with stages.stage("optimiser"):
            runner.step()
            best = runner.best.clone()
        queued.append(Iterate(best, losses[i], arrival, stages.take()))
        unchecked.append((i + 1, queued[-1]))
        while unchecked and unchecked[0][1].arrived:
            _check(*unchecked.popleft())
        if not image.is_cuda or i >= AHEAD:
            yield queued.popleft()
    for each in unchecked:
        _check(*each)
    yield from queued
    if isinstance(runner, kernels.Adam):
        state.steps, state.moments = runner.steps, tuple(runner.moments)


def _check(iteration: int, iterate: Iterate) -> None:
    if not math.isfinite(iterate.loss):
        raise FloatingPointError(
            f"loss or gradient is not finite at iteration {iteration} (loss {iterate.loss}); "
            "smaller weights or --precision fp32 keep the numbers in range"
        )


def _adam(image: Tensor, gradient: Tensor, loss: Tensor, state: State) -> kernels.Adam:
    """Adam, started with the moments of the coarser scale."""
    size = image.shape[2:]
    moments = [functional.interpolate(each, size=size, mode="bilinear") for each in state.moments]
    return kernels.Adam(image, gradient, loss, moments, state.steps)
