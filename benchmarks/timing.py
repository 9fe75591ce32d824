"""Measures the loops of `cases` in turns, their memory, and the time to equal loss."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from engine import image as images
from engine.export.ort import MissingError
from engine.kernels.lbfgs import GPU_HISTORY, pairs

from . import cases, machine
from .baseline import Baseline
from .cases import Loop, Problem

TURN = 3  # timings of one variant before the next one has its turn
BATCH = {"cpu": 1, "cuda": 20}  # iterations to a timing: a GPU's host runs ahead, as in a run, and waits at the end
WARM_UP = {"cpu": 3, "cuda": GPU_HISTORY + 2}  # iterations after the first one that are not timed
MEMORY_ITERATIONS = 100  # torch's L-BFGS history grows until then


def start(
    rows: dict[str, dict[str, Any]],
    problem: Problem,
    strict: bool = True,
    required: Collection[str] = ("eager", *cases.ENGINES),
) -> dict[str, Iterator[object]]:
    """Build every variant, compare its gradient, run its first iterations; what cannot run says so in its row.

    All remember as many pairs of L-BFGS as the engine does, so that an iteration is the same work.

    `strict` asks for the error at the small picture as well. Of those `required` only a device that is missing is no
    reason to stop.
    """
    import torch._dynamo  # torch.optim imports it in its first step, which is to be charged to no variant

    point = problem.point(0)
    oracle = cases.build("float64", problem).loss_and_gradient(point)[1]
    loops: dict[str, Iterator[object]] = {}
    for name, row in rows.items():
        try:
            before = _memory_in_use(problem.device)
            begin = machine.now(problem.device)
            loop: Loop = cases.build(name, problem, pairs("auto", problem.device == "cuda"))
            row["setup_s"] = machine.now(problem.device) - begin
            iterator = loop.iterate(problem.start)
            begin = machine.now(problem.device)
            next(iterator)
            row["first_s"] = machine.now(problem.device) - begin
            row["error"] = cases.relative_error(loop.loss_and_gradient(point)[1], oracle)
            if strict:
                row["strict_error"] = cases.strict_error(name, problem)
            for _ in range(WARM_UP[problem.device]):
                next(iterator)
            if problem.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                next(iterator)
                after = (torch.cuda.max_memory_allocated() / 2**20, _memory_in_use(problem.device)[1])
                row["memory_mib"] = max(now - then for now, then in zip(after, before, strict=True))
        except Exception as error:  # torch.compile has too many ways to fail
            if name in required and not isinstance(error, MissingError):
                raise
            row["failed"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            continue
        loops[name] = iterator
    return loops


def _memory_in_use(device: str) -> tuple[float, float]:
    """MiB of a GPU in use by torch's tensors, and by anybody: ONNX Runtime's arena is outside of torch's books."""
    if device != "cuda":
        return 0.0, 0.0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated() / 2**20, machine.device_mib()


def in_turns(
    rows: dict[str, dict[str, Any]], loops: dict[str, Iterator[object]], problem: Problem, rounds: int
) -> tuple[float, float]:
    """Fill in the times of an iteration and what follows from their median.

    Returns the rate of matrix products, and the number of cores that other processes kept busy meanwhile.
    """
    batch = BATCH[problem.device]
    runners: dict[str, Iterator[Any]] = {**loops, "mm": machine.matrix_products(problem.device)}
    next(runners["mm"])
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    begin, (own, everybody) = machine.now(problem.device), machine.cpu_seconds()
    for _ in range(rounds):
        for name, runner in runners.items():
            for _ in range(TURN):
                before = machine.now(problem.device)
                for _ in range(batch):
                    next(runner)
                seconds[name].append((machine.now(problem.device) - before) / batch)
    own, everybody = machine.cpu_seconds()[0] - own, machine.cpu_seconds()[1] - everybody
    others = max(0.0, everybody - own) / (machine.now(problem.device) - begin)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    rate = machine.MATRIX_GFLOP / median["mm"]
    for name in loops:
        gflop_per_s = problem.gflop / median[name]
        rows[name] |= {
            "iterations_per_s": 1 / median[name],
            "ratio": median["eager"] / median[name],
            "ratio_of_fastest": min(seconds["eager"]) / min(seconds[name]),
            "gflop_per_s": gflop_per_s,
            "share_of_mm": gflop_per_s / rate,
            "seconds": seconds[name],
        }
    return rate, others


def memory(name: str, problem: Problem) -> dict[str, float]:
    """Peak memory of this process after some iterations, and what the imports alone took of it; of a GPU what it took
    beside CUDA's context and other processes.
    """
    before = machine.device_mib() if problem.device == "cuda" else 0.0
    if name in cases.ENGINES:
        import engine.stylizer  # noqa: F401
    else:
        import torchvision  # noqa: F401
    imports = machine.resident_mib()
    for _ in itertools.islice(cases.build(name, problem).iterate(problem.start), MEMORY_ITERATIONS):
        pass
    found = {"imports_mib": imports, "peak_mib": machine.resident_mib(peak=True)}
    if problem.device == "cuda":
        found["device_mib"] = machine.device_mib() - before
    return found


def equal_loss(
    problem: Problem, engine: str, iterations: int
) -> tuple[dict[str, Any], tuple[Image.Image, Image.Image]]:
    """Time until the engine has, at full size, the lowest loss of `iterations` eager iterations.

    Both keep their pixels in range, or neither does, as `Config.clamp` has it. The engine runs coarse to fine: a
    default run, whose last scale may go on for as many iterations as eager has. Also the pictures of eager's lowest
    loss and of a default run of the engine.

    Loading the weights and what a process does once, like compiling kernels, counts for nobody, making graphs and
    targets for both. The runs advance in turns, whichever has used less time so far; so a busy spell of the machine
    hits both.
    """
    from engine.stylizer import Stylizer

    stylizer, first = (Stylizer(problem.weights, *cases.ENGINES[engine]) for _ in range(2))
    first(problem.content, problem.style, replace(problem.config, iterations=3))
    for _ in itertools.islice(cases.build("eager", problem).iterate(problem.start), 3):
        pass
    del first
    begin = machine.now(problem.device)
    eager = cases.build("eager", problem)
    built = machine.now(problem.device) - begin
    assert isinstance(eager, Baseline)
    counts = [count for _, count in problem.config.schedule(problem.content.aspect)]
    config = replace(problem.config, iterations=(*counts[:-1], iterations))
    pictures = []

    def ours() -> Iterator[float | None]:
        for step in stylizer.steps(problem.content, problem.style, config):
            yield step.loss if step.scale == config.size else None
            if step.iteration == min(sum(counts), step.total):
                pictures.append(step.image)

    running: dict[str, Iterator[float | None]] = {
        "baseline": itertools.islice(eager.iterate(problem.start), iterations),
        "engine": ours(),
    }
    clock = {"baseline": built, "engine": 0.0}
    traces: dict[str, list[tuple[float, float]]] = {name: [] for name in running}
    best = problem.start
    while running:
        name = min(running, key=lambda each: clock[each])
        evaluated = eager.pixels.detach().clone() if name == "baseline" and traces[name] else problem.start
        begin = machine.now(problem.device)
        try:
            loss = next(running[name])
        except StopIteration:
            del running[name]
            continue
        clock[name] += machine.now(problem.device) - begin
        if loss is not None:
            traces[name].append((loss, clock[name]))
        if name == "baseline" and loss == min(traces[name])[0]:
            best = evaluated
    return _reached(traces["baseline"], traces["engine"]), (images.to_pil(images.from_tensor(best)), *pictures)


def _reached(baseline: Sequence[tuple[float, float]], engine: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """When either has the lowest loss of the baseline, from (loss, seconds) of each."""
    target, baseline_s = min(baseline)
    iteration, engine_s = next(
        ((count, seconds) for count, (loss, seconds) in enumerate(engine, 1) if loss <= target), (None, None)
    )
    return {
        "loss": target,
        "baseline_s": baseline_s,
        "engine_s": engine_s,
        "engine_iteration": iteration,  # of the last scale
        "ratio": baseline_s / engine_s if engine_s else None,
        "engine_lowest_loss": min(engine)[0],
        "engine_total_s": engine[-1][1],
    }
