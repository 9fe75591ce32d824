"""Programs for a few threads of a CPU: tables of steps, each of which is a number of independent tasks.

Every thread takes the next task of a step until none is left, waits until all of them are done, and goes on to the next
step. So a thread that the system holds up delays the others by one task at most. What a task writes does not depend on
the thread, nor on how many there are.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
import zlib
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from importlib import resources
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from . import direct, nhwc, products, winograd
from .vector import BLOCK, keep_marked

log = logging.getLogger(__name__)

# What a step does:
FIRST, CONVOLVE, DIRECT_FIRST, DIRECT, POOL, MASK, UNPOOL, LAST = range(8)
CONTENT_LOSS, CONTENT_GRADIENT, GRAM, GRAM_SUM, HALVE, STYLE, RECTIFY, ADD = range(8, 16)
_FIELDS = (
    "op tasks source target height width c_in c_out weights extra bits winners adds mean turned halves ending tiles "
    "groups largest padding"
)
_STEP = np.dtype([(name, np.int64) for name in _FIELDS.split()])
Step = dict[str, int | str]  # the fields of a step; addresses may be names of buffers
_compiling = threading.Lock()
_PATIENCE = 200  # looks at a counter before the processor is offered to others


class Threads:
    """`count` threads, the caller's own among them, that run programs; they sleep in between.

    They are `summed.Products` too, for fp32 features in NHWC order whose channels are a multiple of BLOCK; with
    `halves` the factors of `style_gradient` are rounded to bf16.
    """

    def __init__(self, count: int, *, halves: bool = False) -> None:
        self.count, self._halves = count, halves
        self._begin()

    def _begin(self) -> None:
        most = max(self.count, torch.get_num_threads()) - 1  # callers at the same time have programs of their own
        self._others, self._process = ThreadPoolExecutor(max(1, most), "stylize"), os.getpid()

    def run(self, table: NDArray[Any], scratch: list[Tensor]) -> None:
        """Run the program; `scratch` is memory for each thread, as much as its steps need."""
        taken, done = np.zeros(len(table), np.int64), np.zeros(len(table), np.int64)
        places = [each.data_ptr() for each in scratch]
        work, others = _entry(), list[Future[None]]()
        if self._process != os.getpid():  # a forked process has none of its parent's threads
            self._begin()
        try:
            others.extend(self._others.submit(work, table, taken, done, place) for place in places[1:])
            work(table, taken, done, places[0])
        finally:  # of a Ctrl-C, too: the memory that they work on may be gone afterwards
            # Who has not begun, behind another caller's maybe, has nothing left to do.
            begun = [other for other in others if not other.cancel()]
            wait(begun)
        for other in begun:
            other.result()

    def content_loss(self, features: Tensor, target: Tensor) -> Tensor:
        """The loss, 0-dim fp32, of features and target (C, M)."""
        count = features.numel()
        sums = torch.empty(-(-count // products.LENGTH))
        step = {"op": CONTENT_LOSS, "tasks": len(sums), "width": count, "extra": sums.data_ptr()}
        step |= {"source": features.data_ptr(), "weights": target.data_ptr()}
        self._run_steps([features, target], [step])
        return sums.double().sum().float() / count

    def content_gradient(self, features: Tensor, target: Tensor, factor: float, out: Tensor) -> None:
        """Write factor * (F - P) into `out`; all (C, M)."""
        count, scale = features.numel(), torch.tensor([factor])
        step = {"op": CONTENT_GRADIENT, "tasks": -(-count // products.LENGTH), "width": count}
        step |= {"source": features.data_ptr(), "weights": target.data_ptr(), "target": out.data_ptr()}
        self._run_steps([features, target, out], [step | {"extra": scale.data_ptr()}])

    def gram(self, features: Tensor, out: Tensor) -> Tensor:
        """Write F F^T / M into `out` (C, C) and return it."""
        channels, positions = features.shape
        shares = products.gram_shares(positions, channels)
        partial = torch.empty(shares, channels, channels)
        shared = {"width": positions, "c_out": channels, "groups": shares}
        tasks = products.gram_tasks(channels, shares)
        block = {"op": GRAM, "tasks": tasks, "source": features.data_ptr(), "target": partial.data_ptr()}
        total = {"op": GRAM_SUM, "tasks": channels, "source": partial.data_ptr(), "target": out.data_ptr()}
        self._run_steps([features], [shared | block, shared | total])
        return out

    def style_gradient(
        self, features: Tensor, difference: Tensor, factor: float, out: Tensor, accumulate: bool
    ) -> None:
        """Write (or add) factor * (G - A) F into `out` (C, M)."""
        channels, positions = features.shape
        panels = torch.empty(channels // BLOCK, channels, BLOCK)
        torch.mul(difference.view(channels, -1, BLOCK).transpose(0, 1), factor, out=panels)
        shared = {"weights": panels.data_ptr(), "c_out": channels, "halves": int(self._halves)}
        round_off = [shared | {"op": HALVE, "tasks": len(panels)}] * self._halves
        step = {"op": STYLE, "tasks": -(-positions // products.STRETCH), "adds": int(accumulate), "width": positions}
        step |= {"source": features.data_ptr(), "target": out.data_ptr()}
        self._run_steps([features, out], [*round_off, shared | step])

    def _run_steps(self, tensors: list[Tensor], steps: Sequence[Mapping[str, int | str]]) -> None:
        assert all(tensor.dtype == torch.float32 and tensor.T.is_contiguous() for tensor in tensors)
        rows = table(steps)
        floats = scratch_size(rows)
        self.run(rows, [torch.empty(floats) for _ in range(self.count)])


def table(steps: Sequence[Mapping[str, int | str]], addresses: Mapping[str, int] | None = None) -> NDArray[Any]:
    """The program of these steps, whose buffers stand at `addresses`; what a step leaves out is zero."""
    rows = np.zeros(len(steps), _STEP)
    for row, step in zip(rows, steps, strict=True):
        for name, value in step.items():
            row[name] = (addresses or {})[value] if isinstance(value, str) else value
    return rows


def layout(
    steps: Sequence[Mapping[str, int | str]], sizes: Mapping[str, int], kept: Collection[str]
) -> tuple[dict[str, int], int]:
    """Where the buffers that `steps` name begin in one piece of memory, and how long it is; all in floats.

    A buffer is in use from the first step that names it to the last one, or to the end if it is `kept`; two that are
    never in use together may share memory. The largest are placed first, each as far in front as it can (Pisarchyk,
    Lee 2020).
    """
    lives: dict[str, tuple[int, int]] = {}
    for i, step in enumerate(steps):
        for name in step.values():
            if isinstance(name, str):
                lives[name] = lives.get(name, (i, i))[0], len(steps) if name in kept else i
    places: dict[str, int] = {}
    for name in sorted(lives, key=lambda each: -sizes[each]):
        first, last = lives[name]
        place = 0
        for begin, other in sorted((begin, other) for other, begin in places.items()):
            if lives[other][0] > last or lives[other][1] < first:
                continue
            if place + sizes[name] <= begin:
                break
            place = max(place, begin + sizes[other])
        places[name] = place
    return places, max(place + sizes[name] for name, place in places.items())


def scratch_size(rows: NDArray[Any]) -> int:
    """Floats of scratch memory that each thread needs for the program."""
    needed = [1]
    for step in rows:
        op, wide = step["op"], int(step["c_out"])
        if op == CONVOLVE:
            wide //= int(step["groups"])
            needed.append(winograd.scratch_size(int(step["c_in"]), wide, int(step["tiles"])))
        elif op == DIRECT:
            needed.append(direct.scratch_size(int(step["c_in"])))
        elif op in (FIRST, LAST):
            needed.append(nhwc.scratch_size(int(step["width"])))
        elif op == STYLE:
            needed.append(products.scratch_size(wide))
        elif op == UNPOOL:
            needed.append(wide)
    return max(needed)


@intrinsic
def _take(context, counters, index):  # type: ignore[no-untyped-def]
    """Atomically add one to a counter; its value before."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.gep(_data(context, builder, signature, arguments), [arguments[1]])
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "seq_cst")

    return types.int64(counters, types.int64), codegen


@intrinsic
def _look(context, counters, index):  # type: ignore[no-untyped-def]
    """Atomically read a counter."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.gep(_data(context, builder, signature, arguments), [arguments[1]])
        return builder.load_atomic(place, "seq_cst", 8)

    return types.int64(counters, types.int64), codegen


def _data(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return context.make_array(signature.args[0])(context, builder, arguments[0]).data


@intrinsic
def _offer(context):  # type: ignore[no-untyped-def]
    """Offer the processor to another thread."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        name = "SwitchToThread" if sys.platform == "win32" else "sched_yield"
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(builder.module.globals.get(name) or ir.Function(builder.module, kind, name), [])
        return context.get_dummy_value()

    return types.void(), codegen


@njit(nogil=True, error_model="numpy", inline="always")  # else all it calls is optimised once more on its own
def _do(step, task, scratch):  # type: ignore[no-untyped-def]
    source, target, height, width = step.source, step.target, step.height, step.width
    channels, weights, extra, bits = step.c_out, step.weights, step.extra, step.bits
    least = np.float32(-np.inf if step.ending == winograd.BIASED else 0)
    if step.op == CONVOLVE:
        first = task // step.groups * step.tiles
        tiles = ((height + 3) // 4) * ((width + 3) // 4)
        count = min(step.tiles, tiles - first)
        winograd.convolve(
            source, target, height, width, step.c_in, channels, weights, extra, bits, step.turned, step.ending,
            step.halves, step.padding, first, count, task % step.groups, step.groups, scratch,
        )  # fmt: skip
    elif step.op == DIRECT_FIRST:
        direct.first(source, target, bits, height, width, channels, weights, extra, step.padding, least, task)
    elif step.op == DIRECT:
        direct.convolve(
            source, target, bits, height, width, step.c_in, channels, weights, extra, step.padding, least,
            task // step.groups, task % step.groups, step.groups, scratch,
        )  # fmt: skip
    elif step.op == FIRST:
        nhwc.first(
            source, step.mean, target, bits, height, width, channels, weights, extra, step.padding, least, task, scratch
        )
    elif step.op == POOL:
        nhwc.pool(source, target, step.winners, height, width, channels, step.largest, task)
    elif step.op == UNPOOL:
        nhwc.unpool(source, target, bits, step.winners, step.adds, height, width, channels, step.largest, task, scratch)
    elif step.op == MASK:
        place = task * width * channels
        keep_marked(target + 4 * place, bits + place // 8, width * channels)
    elif step.op == RECTIFY:
        nhwc.rectify(source, target, width, channels, task)
    elif step.op == ADD:
        nhwc.add(source, target, width, channels, task)
    elif step.op == CONTENT_LOSS:
        products.content_loss(source, weights, width, extra, task)
    elif step.op == CONTENT_GRADIENT:
        products.content_gradient(source, weights, target, extra, width, task)
    elif step.op == GRAM:
        products.gram(source, target, width, channels, step.groups, task)
    elif step.op == GRAM_SUM:
        products.gram_sum(source, target, width, channels, step.groups, task)
    elif step.op == HALVE:
        products.halve(weights, channels, task)
    elif step.op == STYLE:
        products.style_gradient(source, weights, target, width, channels, step.adds, step.halves, task, scratch)
    else:
        nhwc.last(source, target, height, width, step.c_in, weights, step.padding, task, scratch)


def _compile(sources: int, cached: bool = True) -> Any:
    """The entry. numba caches machine code by file and closure of a function; `sources` stands for the other files."""

    @njit(nogil=True, cache=cached, error_model="numpy")
    def work(table, taken, done, scratch):  # type: ignore[no-untyped-def]
        """Do tasks of the program until it is finished."""
        if sources < 0:
            return
        for i in range(len(table)):
            step = table[i]
            while True:
                task = _take(taken, i)
                if task >= step.tasks:
                    break
                _do(step, task, scratch)
                _take(done, i)
            looks = 0
            while _look(done, i) < step.tasks:
                looks += 1
                if looks > _PATIENCE:
                    _offer()

    return work


def _sources() -> int:
    """A checksum of the code that goes into `work`."""
    folder = resources.files(__package__)
    names = ("vector", "winograd", "direct", "nhwc", "products", "program")
    return zlib.crc32(b"".join((folder / f"{name}.py").read_bytes() for name in names))


def _entry() -> Any:
    """The entry, which the first call of a process loads or compiles."""
    with _compiling:
        return _compiled()


@functools.cache
def _compiled() -> Any:
    """The entry as numba keeps it, or where it can keep nothing, one that every process compiles."""
    counters = np.zeros(0, np.int64)
    try:
        work = _compile(_sources())
        work(np.zeros(0, _STEP), counters, counters, 0)  # now its files are read, or written
    except Exception as error:  # no folder, a full disk, or files that are damaged, which raise nearly anything
        log.info("device cpu: compiled for seconds, and not kept; $NUMBA_CACHE_DIR names a folder for it (%s)", error)
        work = _compile(_sources(), cached=False)
    return work
