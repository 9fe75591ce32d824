"""Minimise a loss over the pixels of an image at one scale, one evaluation at a time."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from . import kernels
from .config import Config
from .stages import Stages

WINDOW = 20  # evaluations over which a stalled loss is told
AHEAD = 2  # iterations that a GPU has been given when one is yielded: who reads its loss does not leave the GPU idle
_HELD = 2  # best images that a caller may hold: of the iterate yielded, and of the one before


@dataclass
class State:
    """What is carried from one scale to the next: Adam's step count and moments (1, 3, H, W)."""

    steps: int = 0
    moments: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class _Late:
    """A loss that is on its way to host memory."""

    memory: Tensor
    arrival: torch.cuda.Event | None = None  # None on a CPU

    @property
    def arrived(self) -> bool:
        """Whether `value` would not wait."""
        return self.arrival is None or self.arrival.query()

    @property
    def value(self) -> float:
        """The loss; on a GPU this waits until the evaluation has come so far."""
        if self.arrival is not None and not self.arrived:
            self.arrival.synchronize()
        return float(self.memory)


@dataclass(eq=False)
class Iterate:
    """Result of one evaluation: its loss, the best or the average image (1, 3, H, W) of this scale so far, and the
    seconds of each stage.

    The memory of the image is used again: an iterate that is kept gets a copy of its own then, but a caller who keeps
    the image alone has to copy it.
    """

    best: Tensor
    _loss: _Late = field(repr=False)
    stages: dict[str, float] = field(default_factory=dict)
    # How to save the run; empty unless this is its newest iterate, so that a kept one holds no optimiser.
    _saving: list[Callable[[], dict[str, Tensor]]] = field(default_factory=list, repr=False)

    @property
    def loss(self) -> float:
        """The loss; on a GPU this waits until the evaluation has come so far."""
        return self._loss.value

    def save(self) -> dict[str, Tensor]:
        """What `minimise` needs to go on after this iterate, to be copied; RuntimeError once it was asked for more."""
        if not self._saving:
            raise RuntimeError("the run has moved on: a checkpoint is taken before the next step is asked for")
        return self._saving[0]()

    def release(self) -> None:
        """Let go of the optimiser: the run moves on."""
        self._saving.clear()


def minimise(
    evaluate: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    optimizer: str,
    iterations: int,
    state: State,
    saved: Mapping[str, Tensor] | None = None,
    *,
    stages: Stages | None = None,
    rate: float = kernels.RATE,
    history: int | str = "auto",
    clamp: bool = False,
    average: float = 0,
    wrap: bool = False,
    frozen: Tensor | None = None,
    recorded: Tensor | None = None,
) -> Generator[Iterate, None, None]:
    """Yield an `Iterate` after each of `iterations` evaluations of loss and gradient.

    `evaluate` gets pixels (1, 3, H, W) fp32 and a tensor of that shape, into which it writes the gradient of the loss
    that it returns, 0-dim. `lbfgs` takes full quasi-Newton steps without a line search (one evaluation a step), takes a
    step back, half by half, when it has diverged, and keeps the pixels in [0, 1] if `clamp`, as `adam` always does.
    `rate` is Adam's, `history` the pairs of L-BFGS (see `kernels.pairs`); with `wrap` the borders of the image see each
    other. Pixels that are `frozen`, bools (1, 1, H, W), whose gradient has to be zero, take no moments over from the
    scale before. With a decay `average` in (0, 1) the images that are yielded are averages (see `_Average`). On a GPU
    iterations are queued AHEAD of those that are yielded, and the host waits only where it reads a loss or an image.
    `stages` is what `evaluate` counts its time in. Where `evaluate` makes the same launches on a GPU each time, and
    leaves the loss in `recorded`, an iteration with L-BFGS is one CUDA graph.

    With `saved`, an iterate's `save`, it goes on behind that iterate, for `iterations` more; a GPU's queued ones count.

    Raises FloatingPointError when a loss is not finite, on a GPU when the host comes to know it; the image has not
    moved since then, and what was yielded before stays good.
    """
    image = start.detach().clone(memory_format=torch.contiguous_format)
    if clamp:
        image.clamp_(0, 1)
    stages = stages or Stages(measures=not image.is_cuda)
    gradient, loss = torch.empty_like(image), image.new_zeros(()) if recorded is None else recorded
    known = saved["queued.losses"][:iterations] if saved else torch.empty(0)
    kept = _HELD + AHEAD * image.is_cuda
    trail = kernels.Trail(image, iterations, 1 if average else kept, first=len(known))
    if optimizer == "lbfgs":
        runner: kernels.Lbfgs | kernels.Adam = kernels.Lbfgs(image, gradient, loss, trail, history, clamp)
    else:
        moments = [resized(each, image.shape[2:], "bilinear", wrap) for each in state.moments]
        if frozen is not None:
            moments = [each.masked_fill(frozen, 0) for each in moments]
        runner = kernels.Adam(image, gradient, loss, trail, moments, state.steps, rate)
    mean = _Average(image, average, kernels.DIVERGED if optimizer == "lbfgs" else math.inf) if average else None
    queued: deque[Iterate] = deque()
    if saved:
        runner.restore(saved)
        if mean is not None:
            mean.restore(saved)
        if isinstance(runner, kernels.Adam):
            state.steps, state.moments = runner.steps, tuple(runner.moments)
        bests = saved["queued.best"].to(image.device)[:iterations]
        queued.extend(Iterate(best, _Late(each)) for best, each in zip(bests, known, strict=True))
        saved = None  # a history as long as our own

    def save() -> dict[str, Tensor]:
        bests = [each.best for each in queued]
        return (
            runner.save()
            | ({} if mean is None else mean.save())
            | {
                "queued.best": torch.stack(bests).cpu() if bests else torch.empty(0),
                "queued.losses": torch.tensor([each.loss for each in queued]),
            }
        )

    def hand_out() -> Iterator[Iterate]:
        iterate = queued.popleft()
        iterate._saving.append(save)
        yield iterate
        iterate.release()

    # Not the iterates: a host that is far ahead must not hold all their images.
    unchecked = deque(each._loss for each in queued)

    def advance() -> None:
        found = evaluate(image, gradient)
        if found is not loss:
            loss.copy_(found)
        with stages.stage("optimiser"):
            if mean is not None:
                mean.add(image, loss)
            runner.step()

    # Adam's steps differ by their number.
    graph = kernels.Recorded(image.device) if recorded is not None and optimizer == "lbfgs" else None
    step = partial(graph, advance) if graph else advance
    lent: deque[weakref.ref[Iterate]] = deque()  # those whose images lie in the trail
    stream = torch.cuda.current_stream(image.device) if image.is_cuda else None
    try:
        for i in range(len(queued), iterations):
            if len(lent) == kept and (oldest := lent.popleft()()):
                oldest.best = oldest.best.clone()  # somebody keeps it
            step()
            arrival = stream.record_event() if stream else None
            if isinstance(runner, kernels.Adam):
                state.steps, state.moments = runner.steps, tuple(runner.moments)
            with stages.stage("optimiser"):
                result = trail.image(i) if mean is None else mean.value.clone()
            late = _Late(trail.losses[i], arrival)
            queued.append(Iterate(result, late, stages.take()))
            if mean is None:
                lent.append(weakref.ref(queued[-1]))
            unchecked.append(late)
            while unchecked and unchecked[0].arrived:
                _check(unchecked.popleft())
            if not image.is_cuda or i >= AHEAD:
                yield from hand_out()
        for each in unchecked:
            _check(each)
        while queued:
            yield from hand_out()
    finally:  # of a run that is given up as well, in the middle of anything
        with torch.cuda.stream(stream):
            trail.hold()
            for iterate in filter(None, (each() for each in lent)):
                iterate.best = iterate.best.clone()  # nobody has to keep all of them
        if stream:
            torch.cuda.current_stream(image.device).wait_stream(stream)


def memory(count: int, config: Config, steps: int, gpu: bool) -> int:
    """Bytes that `minimise` takes for an image of `count` elements: the optimiser, and images."""
    moments = 2 * 4 * count
    own = kernels.lbfgs.memory(count, config.history, gpu, steps) if config.optimizer == "lbfgs" else moments
    averages = 2 if config.average else 0  # the running one, and that of an iterate which is let go for the next
    images = 2 + _HELD + averages + AHEAD * gpu  # with the gradient, and those of the iterates
    return own + images * 4 * count


class Stall:
    """Tells when the best loss has stalled: WINDOW evaluations lowered it by the share `least` at most; never if 0."""

    def __init__(self, least: float, saved: Iterable[float] = ()) -> None:
        self._least = least
        self._best = deque(saved, WINDOW + 1)

    def __call__(self, loss: float) -> bool:
        """Whether it has, after an evaluation with this loss."""
        if not math.isfinite(loss):  # which on a GPU is seen later
            return False
        self._best.append(min(loss, self._best[-1]) if self._best else loss)
        before = self._best[0]
        return self._least > 0 and len(self._best) > WINDOW and before - self._best[-1] <= self._least * before

    def save(self) -> Tensor:
        """The best losses it remembers, fp64, for another one to go on."""
        return torch.tensor(list(self._best), dtype=torch.float64)


class _Average:
    """The exponential moving average of the images evaluated, free of the bias of its start.

    After k images x_i it is sum_i d^(k-i) x_i / sum_i d^(k-i). An image whose loss is not finite, or more than
    `diverged` times the lowest one, has no share: the optimiser takes that step back. Nothing waits for a GPU.
    """

    def __init__(self, image: Tensor, decay: float, diverged: float) -> None:
        self.value = image.clone()
        self._decay, self._diverged = decay, diverged
        self._mass = image.new_zeros((), dtype=torch.float64)
        self._lowest = image.new_full((), math.inf)

    def add(self, image: Tensor, loss: Tensor) -> None:
        """Take the image of this loss in."""
        torch.fmin(self._lowest, loss, out=self._lowest)  # in place, as a graph wants it
        taken = torch.isfinite(loss) & (loss <= self._diverged * self._lowest)
        self._mass.copy_(torch.where(taken, self._decay * self._mass + 1, self._mass))
        self.value.lerp_(image, (taken / self._mass.clamp(min=1)).float())

    def save(self) -> dict[str, Tensor]:
        """All that the next averages depend on, in host memory; on a CPU the memory in use, so to be copied."""
        saved = {"value": self.value, "mass": self._mass, "lowest": self._lowest}
        return {f"average.{name}": tensor.cpu() for name, tensor in saved.items()}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Go on where another one was when `saved` was its `save`."""
        self.value.copy_(saved["average.value"])
        self._mass.copy_(saved["average.mass"])
        self._lowest.copy_(saved["average.lowest"])


def _check(loss: _Late) -> None:
    if not math.isfinite(loss.value):
        raise FloatingPointError(f"the loss is {loss.value}, or its gradient is not finite")


def resized(tensor: Tensor, size: Sequence[int], mode: str, wrap: bool) -> Tensor:
    """A tensor (1, 3, h, w) at the (height, width) of a finer scale, by torch's interpolation of that mode.

    With `wrap` its borders see each other; all sides are multiples of 16 then, so that a frame of one sixteenth of the
    sides, 2 pixels at least, becomes one of one sixteenth.
    """
    if not wrap:
        return functional.interpolate(tensor, size=tuple(size), mode=mode)
    high, broad = (side // 16 for side in tensor.shape[2:])
    framed = functional.pad(tensor, (broad, broad, high, high), mode="circular")
    fine = functional.interpolate(framed, size=tuple(side + side // 8 for side in size), mode=mode)
    height, width = size
    return fine[:, :, height // 16 :, width // 16 :][:, :, :height, :width].contiguous()
