"""L-BFGS (Nocedal 1980) with unit steps, fed one evaluation a step, in its vector-free form (Chen, Wang, Zhou, NIPS
2014): nothing but dot products decides where to go, so that a GPU needs no word from the host.

With s_k = x_{k+1} - x_k and y_k = g_{k+1} - g_k the step is -H g for Nocedal's inverse Hessian H, a combination of the
s_k, the y_k and g. Each evaluation takes three passes:

    dots    the products of all s_k, y_k with the newest y and with g: one skinny matrix product
    plan    the two-loop recursion on these numbers alone, and what to do
    move    one combination of the vectors

The history is a ring of some pairs and the one being made: row 2k holds s_k, row 2k + 1 holds y_k, and of
the pair being made the move and minus the gradient before it. A pair counts if the curvature s y is positive. On a GPU
the rows are fp16, which halves the bytes that a step reads, and the gradient before is kept beside them in fp32; a y_k
is rounded before anything is computed with it, so the products are those of the rows kept. With rows rounded
like that on a CPU the lowest loss of 300 iterations moves by 0.1 to 0.6 %, either way (bundled pair, 128 pixels, with
a SCALING of 1).

What the plan does besides:
- Gradients are divided by the root mean square of the first one, so the weights of the loss do not matter, and the
  first step has the root mean square FIRST_STEP.
- H starts from SCALING times s y / y y of the newest pair, which is the usual choice (Nocedal, Wright 2006, eq. 7.20)
  and the inverse of a large curvature: that of the highest frequencies is a twentieth of most others'. Over eight
  pairs of pictures at 128 pixels, SCALING and FIRST_STEP need 10 to 17 % fewer iterations than 1 and 0.01 for the loss
  of 60, 100 and 150; over four at 256, of three scales, 22 to 28 %. With a SCALING of 7 steps are taken back again and
  again.
- No pixel value moves by more than LARGEST_MOVE in a step: early steps, whose curvature is that of a neighbourhood,
  else leave the valley, and iterations are lost on the way back. s_k is the move that was made. Over eight pairs of
  pictures at 113 pixels, with pixels in a box and without, and a SCALING of 1, this bound and DIVERGED end 100
  iterations on average 1 % lower than a bound of 0.1 and steps taken back only above twice the lowest loss; with those,
  one pair in a box was at 23 after 12 iterations and still at 42 after 39. A bound of 0.03 loses time.
- A loss above DIVERGED times the lowest one takes half of the step back, up to HALVINGS times; then L-BFGS starts again
  from the best image, with a smaller first step.
- A loss that is not finite stops everything: neither image changes any more.

In a box [0, 1] it is a two-metric projection (Bertsekas 1982): where the image lies on a bound and the gradient points
out of the box, the gradient counts as zero and the image stays. Among the rest -H g is a descent direction, as H is
positive definite there; the move is cut off at the bounds, and s_k is what was moved indeed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import _cuda, _graphs
from .trail import Trail

HISTORY = 50  # pairs on a CPU: 1.2 kB a pixel, where torch's default of 100 takes 2.4 kB
GPU_HISTORY = 20  # pairs on a GPU, at most: a warp plans the step, and a lane of it holds one pair
SCALING = 2.5  # of the inverse Hessian that H starts from
FIRST_STEP = 0.02  # root mean square of the first step, in pixel values
LARGEST_MOVE = 0.07  # of a pixel value in one step, of the range from 0 to 1
DIVERGED = 1.1  # a loss this many times the lowest one has diverged
HALVINGS = 4  # of one step, before starting afresh
HALT, STEP, HALVE, RESTART = range(4)  # actions of a plan
_GPU_SLOTS = GPU_HISTORY + 1
_GPU_ROWS, _GROUP = 2 * _GPU_SLOTS + 2, 16  # of dot products; those that one block computes, as in lbfgs.cu
_AT_ONCE = 8  # elements that a thread reads at once, as in lbfgs.cu
_LINES = 64 * 8  # elements of a row that a block of the dot products takes at once
_SHARED = 39 << 10  # bytes of shared memory that such a block takes
_RESIDENT = 3  # of them on a multiprocessor, if there is room: one wave of them fills it
_CHUNKS = 128  # of the elements at most, as in lbfgs.cu


def pairs(history: int | str, gpu: bool) -> int:
    """How many pairs are kept where `history`, a number or auto, is asked for; ValueError if a GPU has no room."""
    if history == "auto":
        return GPU_HISTORY if gpu else HISTORY
    count = int(history)
    if gpu and count > GPU_HISTORY:
        raise ValueError(f"history {count}: on a GPU lbfgs remembers at most {GPU_HISTORY} pairs")
    return count


def memory(count: int, history: int | str, gpu: bool, steps: int) -> int:
    """Bytes that `Lbfgs` takes for `count` elements; on a CPU the history is memory once it is written."""
    slots = pairs(history, gpu) + 1
    if gpu:
        return count * (2 * slots * 2 + 4)
    return count * (2 * min(slots, steps) * 4 + 4 + 1)


def state_type(slots: int) -> np.dtype[np.void]:
    """The type of the state for `slots` places in the ring, one more than pairs; all fp64.

    `unit` is what gradients are multiplied with, `to` the slot of the pair being made; a plan says whether the loss
    `improved`, the `action`, whether the pair in slot `from` was `accepted`, and the coefficients of the move.
    """
    run, planned = "unit first_step lowest pairs halvings moved", "improved action accepted from to of_gradient"
    tables = [("of_history", "f8", (2 * slots,)), ("products", "f8", (slots, slots)), ("squares", "f8", (slots, slots))]
    return np.dtype([(name, "f8", ()) for name in (*run.split(), *planned.split())] + tables)


def initial_state(slots: int) -> NDArray[Any]:
    """The state before the first evaluation."""
    state = np.zeros((), state_type(slots))
    state["unit"], state["first_step"], state["lowest"] = 1, FIRST_STEP, np.inf
    return state


def rows_in_use(state: NDArray[Any], slots: int) -> int:
    """Rows of the history that hold something: those of the pairs and of the one being made."""
    return 2 * min(int(state["pairs"]) + 1, slots) if state["moved"] else 0


def decide(state: NDArray[Any], loss: float) -> int:
    """The action after an evaluation with this loss, which is all that it depends on."""
    state["of_history"] = 0
    state["from"], state["accepted"], state["action"] = state["to"], 0, HALT
    state["improved"] = math.isfinite(loss) and loss < state["lowest"]
    if not math.isfinite(loss):
        return HALT
    if state["improved"]:
        state["lowest"] = loss
    elif loss > DIVERGED * state["lowest"]:
        if state["halvings"] < HALVINGS:
            state["halvings"] += 1
            state["action"] = HALVE
            return HALVE
        for name in ("pairs", "moved", "halvings", "to"):
            state[name] = 0
        state["unit"] = 1
        state["first_step"] /= 4
        state["action"] = RESTART
        return RESTART
    state["action"], state["halvings"] = STEP, 0
    return STEP


def plan(state: NDArray[Any], dots: NDArray[np.float64], count: int, slots: int) -> None:
    """The coefficients of a step for `dots` (rows, 2): the products of the history, y and g, in this order, with y, g.

    The state, and so the history, has room for `slots` places in the ring at least.
    """
    moved, made = bool(state["moved"]), int(state["to"])
    state["moved"] = 1
    if not moved:
        size = math.sqrt(dots[-1, 1] / count)
        state["unit"] = 1 / size if size > 0 else 1
        state["of_gradient"] = -state["first_step"]
        return
    along, across = dots[0:-2:2].copy(), dots[1:-2:2].copy()  # products of s_k, of y_k
    if along[made, 0] > 1e-10:
        across[made] = dots[-2]
        state["products"][:, made] = along[:, 0]
        state["squares"][:, made] = state["squares"][made] = across[:, 0]
        state["accepted"] = 1
        state["pairs"] += 1
        state["to"] = state["pairs"] % slots
    _two_loops(state, along[:, 1], across[:, 1], slots)


def _two_loops(state: NDArray[Any], along: NDArray[np.float64], across: NDArray[np.float64], places: int) -> None:
    """The coefficients of -H g, where `along` holds the s_k g and `across` the y_k g."""
    pairs, products, squares = int(state["pairs"]), state["products"], state["squares"]
    slots = [k % places for k in range(max(0, pairs - places + 1), pairs)]
    curvature = products.diagonal()
    along, across = -along, -across  # s_k q and y_k q, where q starts as -g
    alpha = np.zeros(len(products))
    for j in reversed(slots):
        alpha[j] = along[j] / curvature[j]
        along -= alpha[j] * products[:, j]
        across -= alpha[j] * squares[:, j]
    gamma = SCALING * curvature[slots[-1]] / squares[slots[-1], slots[-1]] if slots else 1.0
    across *= gamma
    for j in slots:
        share = alpha[j] - across[j] / curvature[j]
        across += share * products[j]
        state["of_history"][2 * j] = share
        state["of_history"][2 * j + 1] = -gamma * alpha[j]
    state["of_gradient"] = -gamma


class Lbfgs:
    """Moves `image` by what `gradient` and `loss` hold after each evaluation.

    Image and gradient are fp32 of one shape, contiguous, the loss is a 0-dim fp32 tensor; all are kept and used again.
    Each step leaves its loss and the best image in the `trail`. `history` pairs are kept, see `pairs`. With `boxed` the
    image, which has to start in [0, 1], stays there.
    """

    def __init__(
        self,
        image: Tensor,
        gradient: Tensor,
        loss: Tensor,
        trail: Trail,
        history: int | str = "auto",
        boxed: bool = False,
    ) -> None:
        self._trail = trail
        self._slots, self._boxed = pairs(history, image.is_cuda) + 1, boxed
        self._image, self._gradient, self._loss = image, gradient, loss
        self._count = image.numel()
        rows = 2 * self._slots
        self._state = initial_state(_GPU_SLOTS if image.is_cuda else self._slots)
        if image.is_cuda:
            width = -(-self._count // _AT_ONCE) * _AT_ONCE
            self._history = torch.zeros((rows, width), dtype=torch.float16, device=image.device)
            self._before = torch.zeros(self._count, device=image.device)  # the last gradient times the unit
            flat = torch.from_numpy(self._state.reshape(1).view("f8"))
            self._device_state = flat.to(image.device)
            self._groups = -(-_GPU_ROWS // _GROUP)
            resident = min(_RESIDENT, _cuda.shared_memory(image.device) // _SHARED)
            wave = max(1, resident * _cuda.processors(image.device) // self._groups)
            chunks = min(-(-self._count // _LINES), wave, _CHUNKS)
            self._sums = torch.empty((_GPU_ROWS, 2, chunks), dtype=torch.float64, device=image.device)
            self._recorded = _graphs.Recorded(image.device)
        else:
            self._history = image.new_empty((rows, self._count))
            self._rows = list(self._history)
            self._newest = image.new_empty(self._count)  # the gradient times the unit
            self._held = torch.zeros(self._count if boxed else 0, dtype=torch.bool)  # on a bound, pulled outwards
            self._dots = np.zeros((2 * self._slots + 2, 2))

    def step(self) -> None:
        """Move on from the evaluation, which on a GPU has launched something since the last step: see `_launch`."""
        if self._image.is_cuda:
            self._recorded(self._launch)
        else:
            self._step_cpu(float(self._loss))

    def save(self) -> dict[str, Tensor]:
        """All that the next steps depend on, in host memory; on a CPU partly the memory in use, so to be copied."""
        state = self._state
        if self._image.is_cuda:
            state = self._device_state.cpu().numpy().view(state.dtype)[0]
        saved = {
            "image": self._image,
            "best": self._trail.best,
            "history": self._history[: rows_in_use(state, self._slots)],
        }
        if self._image.is_cuda:
            saved["before"] = self._before
        saved = {name: tensor.cpu() for name, tensor in saved.items()}
        saved["state"] = torch.from_numpy(state.reshape(1).view("f8"))
        if not self._image.is_cuda:
            saved["dots"] = torch.from_numpy(self._dots)
        return saved

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Go on where another optimiser of this shape and device was when `saved` was its `save`."""
        self._image.copy_(saved["image"])
        self._trail.best.copy_(saved["best"])
        self._history[: len(saved["history"])].copy_(saved["history"])
        if self._image.is_cuda:
            self._before.copy_(saved["before"])
            self._device_state.copy_(saved["state"])
        else:
            self._state[()] = saved["state"].numpy().view(self._state.dtype)[0]
            self._dots[:] = saved["dots"].numpy()

    def _launch(self) -> None:
        # Each of the kernels reads ahead of its turn what is older than the kernel before it: the vectors, the state.
        image, gradient, history, state = self._image, self._gradient, self._history, self._device_state
        count, chunks = self._count, self._sums.shape[2]
        size = (count, history.shape[1], self._slots, int(self._boxed))
        grid = (chunks, self._groups)
        _cuda.launch("lbfgs", "lbfgs_dots", grid, history, self._before, image, gradient, state, *size, self._sums)
        sums = (self._sums, chunks, count, self._slots)
        trail = self._trail.arguments
        _cuda.launch("lbfgs", "lbfgs_plan", (1,), state, self._loss, *trail[3:], *sums, DIVERGED, HALVINGS, SCALING)
        vectors = (image, gradient, history, self._before)
        blocks = -(-history.shape[1] // (_AT_ONCE * _cuda.THREADS))
        _cuda.launch("lbfgs", "lbfgs_move", (blocks,), *vectors, state, *size, LARGEST_MOVE, *trail[:4])

    def _step_cpu(self, loss: float) -> None:
        state, rows = self._state, self._rows
        image = self._image.view(-1)
        action, made = decide(state, loss), int(state["to"])
        self._trail.leave(self._image, loss, bool(state["improved"]))
        if self._boxed:
            gradient = self._gradient.view(-1)
            self._held = ((image <= 0) & (gradient > 0)) | ((image >= 1) & (gradient < 0))
            gradient.masked_fill_(self._held, 0)
        if action == STEP:
            self._multiply()
            plan(state, self._dots, self._count, self._slots)
            to = int(state["to"])
            move = torch.mul(self._unit_gradient(), float(state["of_gradient"]), out=rows[2 * to])
            for row in np.flatnonzero(state["of_history"]):
                move.add_(rows[row], alpha=float(state["of_history"][row]))
            torch.neg(self._newest, out=rows[2 * to + 1])
            move.clamp_(-LARGEST_MOVE, LARGEST_MOVE)
            if self._boxed:
                move.masked_fill_(self._held, 0)
                torch.sub(torch.add(image, move, out=self._newest).clamp_(0, 1), image, out=move)
            image.add_(move)
        elif action == HALVE:
            image.sub_(rows[2 * made].mul_(0.5))
            if self._boxed:
                image.clamp_(0, 1)
        elif action == RESTART:
            self._image.copy_(self._trail.best)

    def _unit_gradient(self) -> Tensor:
        return torch.mul(self._gradient.view(-1), float(self._state["unit"]), out=self._newest)

    def _multiply(self) -> None:
        """The dot products for the plan. Those with y are differences of those with g for all but the newest pair."""
        dots, rows, made = self._dots, self._rows, int(self._state["to"])
        if not self._state["moved"]:  # the first gradient's squares may be beyond fp32
            dots[-1, 1] = float(self._gradient.double().square().sum())
            return
        gradient = self._unit_gradient()
        move, change = rows[2 * made], rows[2 * made + 1].add_(gradient)
        before = dots[:, 1].copy()
        for row in range(rows_in_use(self._state, self._slots)):
            dots[row, 1] = float(torch.dot(rows[row], gradient))
        dots[:, 0] = dots[:, 1] - before
        dots[2 * made, 0] = float(torch.dot(move, change))
        dots[-2] = float(torch.dot(change, change)), dots[2 * made + 1, 1]
