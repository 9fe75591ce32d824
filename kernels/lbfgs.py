"""L-BFGS (Nocedal 1980) with unit steps, fed one evaluation a step, in its vector-free form (Chen, Wang, Zhou, NIPS
2014): nothing but dot products decides where to go, so that a GPU needs no word from the host.

With s_k = x_{k+1} - x_k and y_k = g_{k+1} - g_k the step is -H g for Nocedal's inverse Hessian H, a combination of the
s_k, the y_k and g. Each evaluation takes three passes:

    dots    the products of all s_k, y_k with the newest y and with g: one skinny matrix product
    plan    the two-loop recursion on these numbers alone, and what to do
    move    one combination of the vectors

The history is a ring of at most HISTORY pairs and the one being made: row 2k holds s_k, row 2k + 1 holds y_k, and of
the pair being made the move and minus the gradient before it. A pair counts if the curvature s y is positive.

What the plan does besides:
- Gradients are divided by the root mean square of the first one, so the weights of the loss do not matter, and the
  first step has the root mean square FIRST_STEP.
- No pixel value moves by more than LARGEST_MOVE in a step: early steps, whose curvature is that of a neighbourhood,
  else leave the valley, and iterations are lost on the way back. On the bundled pair at 96 pixels and a style weight of
  3000 the loss after 20, 40 and 80 iterations is 0.66, 0.41 and 0.37 with this bound, 1.6, 0.54 and 0.39 without, and
  4.9, 0.52 and 0.38 with torch's L-BFGS; in a box 0.82, 0.41 and 0.37 with it, 7.8, 7.8 and 3.2 without. Which valley a
  run ends in is decided by then: without the bound it may end some 2 % lower, or higher. s_k is the move that was made.
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

from . import _cuda

HISTORY = 20  # pairs: 0.5 kB a pixel, where torch's default of 100 would take 2.4 kB
FIRST_STEP = 0.01  # root mean square of the first step, in pixel values
LARGEST_MOVE = 0.1  # of a pixel value in one step, of the range from 0 to 1
DIVERGED = 2.0  # a loss this many times the lowest one has diverged
HALVINGS = 4  # of one step, before starting afresh
HALT, STEP, HALVE, RESTART = range(4)  # actions of a plan
_SLOTS = HISTORY + 1
_CHANGE, _GRADIENT = 2 * _SLOTS, 2 * _SLOTS + 1  # rows of y and g among the dot products
_ROWS, _GROUP = 2 * _SLOTS + 2, 11  # of dot products; those that one block computes
_RUN = 64  # elements that a thread adds up in fp32
# All fp64: `unit` is what gradients are multiplied with, `to` the slot of the pair being made; a plan says whether the
# loss `improved`, the `action`, whether the pair in slot `from` was `accepted`, and the coefficients of the move.
STATE = np.dtype(
    [(name, "f8") for name in ("unit", "first_step", "lowest", "pairs", "halvings", "moved")]
    + [(name, "f8") for name in ("improved", "action", "accepted", "from", "to", "of_gradient")]
    + [("of_history", "f8", 2 * _SLOTS), ("products", "f8", (_SLOTS, _SLOTS)), ("squares", "f8", (_SLOTS, _SLOTS))]
)


def initial_state() -> NDArray[Any]:
    """A record of type STATE before the first evaluation."""
    state = np.zeros((), STATE)
    state["unit"], state["first_step"], state["lowest"] = 1, FIRST_STEP, np.inf
    return state


def rows_in_use(state: NDArray[Any], slots: int = _SLOTS) -> int:
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


def plan(state: NDArray[Any], dots: NDArray[np.float64], count: int, slots: int = _SLOTS) -> None:
    """The coefficients of a step for `dots` (2 HISTORY + 4, 2): the products of the history, y and g with y and g.

    The ring has `slots` places, one more than pairs.
    """
    moved, made = bool(state["moved"]), int(state["to"])
    state["moved"] = 1
    if not moved:
        size = math.sqrt(dots[_GRADIENT, 1] / count)
        state["unit"] = 1 / size if size > 0 else 1
        state["of_gradient"] = -state["first_step"]
        return
    along, across = dots[0:_CHANGE:2].copy(), dots[1:_CHANGE:2].copy()  # products of s_k, of y_k
    if along[made, 0] > 1e-10:
        across[made] = dots[_CHANGE]
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
    alpha = np.zeros(_SLOTS)
    for j in reversed(slots):
        alpha[j] = along[j] / curvature[j]
        along -= alpha[j] * products[:, j]
        across -= alpha[j] * squares[:, j]
    gamma = curvature[slots[-1]] / squares[slots[-1], slots[-1]] if slots else 1.0
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
    `best` is the image of the lowest loss so far, in memory of its own. `history` pairs are kept, at most HISTORY. With
    `boxed` the image, which has to start in [0, 1], stays there.
    """

    def __init__(
        self, image: Tensor, gradient: Tensor, loss: Tensor, history: int = HISTORY, boxed: bool = False
    ) -> None:
        self.best = image.clone()
        self._slots, self._boxed = history + 1, boxed
        self._image, self._gradient, self._loss = image, gradient, loss
        self._count = image.numel()
        self._history = image.new_empty((2 * self._slots, self._count))
        self._state = initial_state()
        if image.is_cuda:
            flat = torch.from_numpy(self._state.reshape(1).view("f8"))
            self._device_state = flat.to(image.device)
            self._chunks = -(-self._count // (_RUN * _cuda.THREADS))
            self._sums = torch.empty((self._chunks, _ROWS, 2), dtype=torch.float64, device=image.device)
            self._recorded = _cuda.Recorded(image.device)
        else:
            self._rows = list(self._history)
            self._newest = image.new_empty(self._count)  # the gradient times the unit
            self._held = torch.zeros(self._count if boxed else 0, dtype=torch.bool)  # on a bound, pulled outwards
            self._dots = np.zeros((_ROWS, 2))

    def step(self) -> None:
        """Move on from the evaluation."""
        if self._image.is_cuda:
            self._recorded(self._launch)
        else:
            self._step_cpu(float(self._loss))

    def save(self) -> dict[str, Tensor]:
        """All that the next steps depend on, in host memory; on a CPU partly the memory in use, so to be copied."""
        state = self._state
        if self._image.is_cuda:
            state = self._device_state.cpu().numpy().view(STATE)[0]
        saved = {"image": self._image, "best": self.best, "history": self._history[: rows_in_use(state, self._slots)]}
        saved = {name: tensor.cpu() for name, tensor in saved.items()}
        saved["state"] = torch.from_numpy(state.reshape(1).view("f8"))
        if not self._image.is_cuda:
            saved["dots"] = torch.from_numpy(self._dots)
        return saved

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Go on where another optimiser of this shape and device was when `saved` was its `save`."""
        self._image.copy_(saved["image"])
        self.best.copy_(saved["best"])
        self._history[: len(saved["history"])].copy_(saved["history"])
        if self._image.is_cuda:
            self._device_state.copy_(saved["state"])
        else:
            self._state[()] = saved["state"].numpy().view(STATE)[0]
            self._dots[:] = saved["dots"].numpy()

    def _launch(self) -> None:
        image, gradient, history, state = self._image, self._gradient, self._history, self._device_state
        count, chunks = self._count, self._chunks
        size = (count, self._slots, int(self._boxed))
        _cuda.launch(
            "lbfgs", "lbfgs_dots", (chunks, _ROWS // _GROUP), history, image, gradient, state, *size, self._sums
        )
        sums = (self._sums, chunks, count, self._slots)
        _cuda.launch("lbfgs", "lbfgs_plan", (1,), state, self._loss, *sums, DIVERGED, HALVINGS)
        vectors = (image, gradient, self.best, history)
        _cuda.launch("lbfgs", "lbfgs_move", (_cuda.blocks(count),), *vectors, state, *size, LARGEST_MOVE)

    def _step_cpu(self, loss: float) -> None:
        state, rows = self._state, self._rows
        image = self._image.view(-1)
        action, made = decide(state, loss), int(state["to"])
        if state["improved"]:
            self.best.copy_(self._image)
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
                torch.sub((image + move).clamp_(0, 1), image, out=move)
            image.add_(move)
        elif action == HALVE:
            image.sub_(rows[2 * made].mul_(0.5))
            if self._boxed:
                image.clamp_(0, 1)
        elif action == RESTART:
            self._image.copy_(self.best)

    def _unit_gradient(self) -> Tensor:
        return torch.mul(self._gradient.view(-1), float(self._state["unit"]), out=self._newest)

    def _multiply(self) -> None:
        """The dot products for the plan. Those with y are differences of those with g for all but the newest pair."""
        dots, rows, made = self._dots, self._rows, int(self._state["to"])
        if not self._state["moved"]:  # the first gradient's squares may be beyond fp32
            dots[_GRADIENT, 1] = float(self._gradient.double().square().sum())
            return
        gradient = self._unit_gradient()
        move, change = rows[2 * made], rows[2 * made + 1].add_(gradient)
        before = dots[:, 1].copy()
        for row in range(rows_in_use(self._state, self._slots)):
            dots[row, 1] = float(torch.dot(rows[row], gradient))
        dots[:, 0] = dots[:, 1] - before
        dots[2 * made, 0] = float(torch.dot(move, change))
        dots[_CHANGE] = float(torch.dot(change, change)), dots[2 * made + 1, 1]
