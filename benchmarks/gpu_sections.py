"""The sections of `benchmarks.gpu`. Each takes the rows to fill in and the device, which tests set to the CPU."""

from __future__ import annotations

import gc
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib import metadata
from itertools import islice, product
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from engine import fused, kernels, provider
from engine.export.ort import MissingError
from engine.features import DTYPES, Features
from engine.kernels import _cuda
from engine.kernels.lbfgs import GPU_HISTORY
from engine.losses import Objective
from engine.stylizer import Stylizer

from . import cases, gpu_kernels, gpu_options, machine, timing
from .baseline import tf32
from .gpu import Rows
from .gpu_kernels import ROUNDING, recorded, seconds, worst

WHEELS = ("torch", "cupy-cuda13x", "onnxruntime-gpu", "onnxruntime", "tensorrt-cu13")
WHEELS += ("nvidia-cudnn-cu13", "nvidia-cudnn-frontend")
GPU_ENGINES = tuple(name for name, (device, _) in cases.ENGINES.items() if device in provider.GPUS)
HALF_ENGINES = ("engine-cudnn-fp16", "engine-cuda-fp16", "engine-tensorrt-fp16")
TIMED = ("eager", "autocast", *HALF_ENGINES)
# Relative, against float64: of the gradient of the pixels, where a few ReLUs flip in fp32 too; of the loss; of the
# features of a layer; of the VJP of random cotangents.
GRADIENT_ERROR = {"fp32": cases.LOOSE, "fp16": 3e-2, "bf16": 3e-2}
VALUE_ERROR = {"fp32": 2e-3, "fp16": 3e-3, "bf16": 1.2e-2}
FEATURES_ERROR = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 4e-2}
VJP_ERROR = {"fp32": cases.LOOSE, "fp16": 3e-2, "bf16": 1e-1}
SIDES = {"cuda": 4096, "cpu": 256}  # of the matrices whose products are timed
LOSS_ERROR = 0.01  # relative, of the end of a run against fp32
FORECAST_ERROR = 0.15  # relative, of the memory of a run
# What the host does to wait or to allocate; an event that is asked whether it has come is none of these.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize")
WAITS += ("cudaMemcpy", "cuMemcpyDtoH_v2", "cuMemcpyHtoD_v2")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
ALLOCATIONS = ("cudaMalloc", "cudaMallocAsync", "cudaFree", "cudaFreeAsync", "cudaHostAlloc", "cuMemAlloc_v2")


def environment(rows: Rows, device: str) -> None:
    """What is installed and what the device can do at most."""
    rows.add("device", model=machine.device_name(device))
    for wheel in WHEELS:
        try:
            rows.add(wheel, version=metadata.version(wheel))
        except metadata.PackageNotFoundError:
            rows.skip(wheel, "not installed")
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        properties = torch.cuda.get_device_properties(0)
        rows.add("capability", value=f"{major}.{minor}")
        rows.add("processors", value=properties.multi_processor_count)
        rows.add("memory", gib=properties.total_memory / 2**30)
    for name, value in ceilings(device).items():
        rows.add(name, value=value)


def ceilings(device: str) -> dict[str, float]:
    """Measured: GB/s of a copy (read and written), TFLOP/s of matrix products."""
    found, side = {}, SIDES[device]
    source = torch.rand(8 * side * side, device=device)
    target = torch.empty_like(source)
    found["copy GB/s"] = 2 * source.nbytes / seconds(lambda: target.copy_(source), device) / 1e9
    for precision in DTYPES:
        found[f"{precision} products TFLOP/s"] = products(precision, device) / 1e12
    return found


def products(precision: str, device: str) -> float:
    """Measured: FLOP/s of matrix products; `tf32` is what fp32 can be rounded to on a GPU."""
    dtype, side = DTYPES.get(precision, torch.float32), SIDES[device]
    a, b = (torch.rand(side, side, device=device, dtype=dtype) for _ in range(2))
    with tf32(device, precision == "tf32"):
        return 2 * side**3 / seconds(partial(torch.mm, a, b), device)


def seconds_of_gpu(work: Callable[[], object], device: str, rounds: int = 5, calls: int = 20) -> float:
    """Median time of one call on the clock of the GPU, to which its host is well ahead; on a CPU see `seconds`."""
    if device == "cpu":
        return seconds(work, device)
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(calls // 4):  # what the GPU is at while the host goes ahead
            work()
        begin.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000 / calls)
    return statistics.median(times)


def providers(rows: Rows, device: str, engines: Iterable[str] = GPU_ENGINES, size: int = 128) -> None:
    """Each engine opens where it was asked to, and its losses and gradient are those of float64.

    So are both passes of its network alone. Replays differ by rounding at most, kernels ahead of their turn not at all.
    """
    problem = cases.load(size, device=device)
    point = problem.point(0)
    oracle = cases.build("float64", problem)
    truth, slope = oracle.loss_and_gradient(point)
    for name in engines:
        own_device, precision = cases.ENGINES[name]
        with rows.attempt(name):
            engine = cases.Engine(problem, *cases.ENGINES[name])
            loss, gradient = engine.loss_and_gradient(point)
            errors = {
                "loss_error": (abs(loss / truth - 1), VALUE_ERROR[precision]),
                "gradient_error": (cases.relative_error(gradient, slope), GRADIENT_ERROR[precision]),
                "replay_error": (replay_error(engine, problem), ROUNDING[precision]),
                "early_error": (early_error(engine, problem), 0.0),  # a race, unless it is zero
            }
            features, vjp = network_errors(engine._objective.network, problem, point)
            errors |= {
                "features_error": (features, FEATURES_ERROR[precision]),
                "vjp_error": (vjp, VJP_ERROR[precision]),
            }
            if precision == "fp32":
                errors["strict_error"] = cases.strict_error(name, problem), cases.STRICT
            passed = all(error <= limit for error, limit in errors.values())
            found = {key: error for key, (error, _) in errors.items()}
            rows.add(name, passed, provider=provider.PROVIDERS.get(own_device, own_device), **found)


def network_errors(network: Features, problem: cases.Problem, point: Tensor) -> tuple[float, float]:
    """Relative errors against float64 of the features, in the worst layer, and of the VJP of random cotangents."""
    layers = network.spec.layers
    pixels = point.double().requires_grad_()
    truths = cases.weights(problem).module(layers, problem.config.pooling, torch.float64)(pixels)
    generator = torch.Generator().manual_seed(3)
    cotangents = {name: 0.1 * torch.randn(truths[name].shape, generator=generator) for name in layers}

    def write(names: tuple[str, ...]) -> None:
        for name in names:
            network.parts[0].cotangents[name].copy_(cotangents[name])

    with network.use():
        network.image.copy_(point)
        network.forward()
        features = {name: network.parts[0].features[name].clone() for name in layers}  # cotangents may take their place
        network.vjp(write)
        gradient = network.gradient.cpu()
    slope = torch.autograd.grad(list(truths.values()), pixels, [cotangents[name].double() for name in truths])[0]
    apart = worst(cases.relative_error(features[name], truths[name].detach()) for name in layers)
    return apart, cases.relative_error(gradient, slope)


def replay_error(engine: cases.Engine, problem: cases.Problem, points: int = 6) -> float:
    """The largest relative difference between gradients at some points as the loop computes them, which replays what it
    has captured, and as they are computed once."""
    objective = engine._objective
    pixels = problem.start.to(objective.network.image.device)
    gradient = torch.empty_like(pixels)

    def at(seed: int, compute: Callable[[Tensor, Tensor], object]) -> Tensor:
        with objective.network.use():
            pixels.copy_(problem.point(seed))
            compute(pixels, gradient)
            return gradient.clone()

    replayed = [at(seed, objective.write) for seed in range(points)]
    for owner in (objective, objective.network):
        for name, value in vars(owner).items():
            if isinstance(value, kernels.Recorded):
                setattr(owner, name, kernels.Recorded(torch.device("cpu")))  # which captures nothing
    truths = [at(seed, objective._write) for seed in range(points)]
    return worst(float((found - truth).norm() / truth.norm()) for found, truth in zip(replayed, truths, strict=True))


def early_error(engine: cases.Engine, problem: cases.Problem, steps: int = 25) -> float:
    """The largest difference between the losses of two runs, with kernels that come to the device ahead of their turn
    and without."""

    def losses() -> list[float]:
        return [iterate.loss for iterate in islice(engine.iterate(problem.start), steps)]

    early, kept = losses(), _cuda._OVERLAPPING
    _cuda._OVERLAPPING = (99, 0)
    try:
        return worst(abs(one - other) for one, other in zip(early, losses(), strict=True))
    finally:
        _cuda._OVERLAPPING = kept


def loop(rows: Rows, device: str, engines: Iterable[str] = GPU_ENGINES, size: int = 256, count: int = 10) -> None:
    """After the warm-up an iteration makes the host wait for nothing and allocates nothing on the device."""
    problem = cases.load(size, device=device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for name in engines:
        with rows.attempt(name):
            running = cases.Engine(problem, *cases.ENGINES[name]).iterate(problem.start)
            for _ in islice(running, 8):  # sessions and kernels are captured in the third
                pass
            machine.now(device)
            with torch.profiler.profile(activities=activities) as profile:
                before = requests(device)
                with torch.profiler.record_function(name):  # the profiler itself waits at its end
                    for _ in islice(running, count):
                        pass
                requested = requests(device) - before
                machine.now(device)
            events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CPU]
            span = next(event.time_range for event in events if event.name == name)
            calls = Counter(event.name for event in events if span.start <= event.time_range.start < span.end)
            passed, found = judged(calls, requested, device)
            rows.add(name, passed, **found, launches_per_iteration=sum(named(calls, LAUNCHES).values()) / count)


def requests(device: str) -> int:
    """How often memory of the device was asked for so far, which torch mostly has at hand."""
    return int(torch.cuda.memory_stats()["allocation.all.allocated"]) if device == "cuda" else 0


def judged(calls: Counter[str], requested: int, device: str) -> tuple[bool, dict[str, object]]:
    """Whether the host neither waited nor allocated; on a GPU that had launches, or the profiler has seen nothing."""
    found = {"waits": named(calls, WAITS), "allocations": named(calls, ALLOCATIONS), "requests": requested}
    return not any(found.values()) and (device == "cpu" or bool(named(calls, LAUNCHES))), found


def named(calls: Counter[str], names: Iterable[str]) -> dict[str, int]:
    """How often those of these that were called were called."""
    return {name: calls[name] for name in names if calls[name]}


def our_part(rows: Rows, device: str, engines: Iterable[str] = HALF_ENGINES, size: int = 512) -> None:
    """What losses, cotangents and L-BFGS add to the two passes of the network, as a share of the iteration."""
    problem = cases.load(size, device=device)
    for name in engines:
        with rows.attempt(name):
            engine = cases.Engine(problem, *cases.ENGINES[name])
            whole = seconds_of_iteration(engine, problem, device)
            network = seconds_of_network(engine._objective, device)
            rows.add(name, iteration_us=1e6 * whole, network_us=1e6 * network, our_part=1 - network / whole)


# What `gram_matrices` changes in `kernels.layers`, or of the network.
WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "VJP after all losses": {"overlapping": None},
    "losses beside the deepest convolution": {"_fork": staticmethod(lambda ready: ready[-1][1] - 1)},
    "losses behind it": {"_fork": staticmethod(lambda ready: ready[-1][1])},
    "by our kernels": {"_CUBLAS_WAVES": 2},
    "wide ones with a rest": {"_share": lambda positions, wanted: wanted},
    "wide ones in twice as many shares": {"_CUBLAS_WAVES": 2},
    "narrow ones in 10 turns": {"_LEAST": 10},
    "narrow ones in 10 turns, 128 channels by as many blocks as 64": {"_LEAST": 10, "_NARROW": {64: 1.0, 128: 1.0}},
}


def gram_matrices(
    rows: Rows, device: str, engine: str = "engine-cudnn-fp16", sizes: Iterable[int] = (512, 1024, 256)
) -> None:
    """Our part of an iteration by ways and shares of the Gram matrices, by when the losses of all layers but the
    deepest are computed, and by when the VJP begins.

    Timings of each way alone do not tell.
    """
    for size in sizes:
        problem = cases.load(size, device=device)
        with rows.attempt(f"{engine} {size}"):
            network = seconds_of_network(cases.Engine(problem, *cases.ENGINES[engine])._objective, device)
            for name, changes in WAYS.items():
                with rows.attempt(f"{size}: {name}"), ExitStack() as stack:
                    for constant, value in changes.items():
                        owner = kernels.layers if hasattr(kernels.layers, constant) else fused.Features
                        stack.enter_context(mock.patch.object(owner, constant, value))
                    loop = cases.Engine(problem, *cases.ENGINES[engine])
                    layers = loop._objective._layers
                    if name == "by our kernels" and isinstance(layers, kernels.Layers):
                        layers._way = next(iter(layers.ways()))
                    whole = seconds_of_iteration(loop, problem, device)
                    rows.add(f"{size}: {name}", iteration_us=1e6 * whole, our_part=1 - network / whole)


def seconds_of_iteration(engine: cases.Engine, problem: cases.Problem, device: str) -> float:
    """Of one with a full history."""
    running = engine.iterate(problem.start)
    for _ in islice(running, GPU_HISTORY + 2):
        pass
    return seconds_of_gpu(partial(next, running), device)


def seconds_of_network(objective: Objective, device: str) -> float:
    """Of both passes, as one CUDA graph where they can be one."""
    alone = network_alone(objective)
    if objective.network.recordable:  # others capture for themselves
        alone = recorded(alone, device)
    for _ in range(kernels.Recorded.WARM_UP + 1):
        alone()
    return seconds_of_gpu(alone, device)


def network_alone(objective: Objective) -> Callable[[], None]:
    """Both passes with cotangents that nobody writes; those that the VJP makes are zero, but for the deepest."""
    network = objective.network
    nothing = kernels.Term(torch.zeros(3, device=network.image.device))
    terms = {name: nothing for name in objective._chained if name != network.spec.layers[-1]}
    network.image.uniform_()
    for name in network.spec.layers:
        if name not in terms:
            network.parts[0].cotangents[name].normal_()

    def both() -> None:
        with network.use():
            network.forward()
            network.vjp(lambda layers: None, terms)

    return both


def iteration(rows: Rows, device: str, size: int, names: Iterable[str] = TIMED, rounds: int = 3) -> None:
    """One iteration of the rivals and of ours in turns: iterations per second, ratio to eager, memory."""
    problem = cases.load(size, device=device)
    found: dict[str, dict[str, Any]] = {name: {"variant": name} for name in names}
    loops = timing.start(found, problem, strict=False, required=("eager",))
    timing.in_turns(found, loops, problem, rounds)
    loops.clear()
    rates = {precision: products(precision, device) for precision in {cases.precision(name, device) for name in names}}
    for name, row in found.items():
        if "failed" in row:
            if name in cases.ENGINES and not row["failed"].startswith(MissingError.__name__):
                rows.add(name, False, failed=row["failed"])
            else:
                rows.skip(name, row["failed"])
            continue
        kept = {
            key: row[key]
            for key in ("iterations_per_s", "ratio", "gflop_per_s", "error", "first_s", "memory_mib")
            if key in row
        }
        precision = cases.precision(name, device)
        passed = row["error"] < GRADIENT_ERROR[precision] if name in cases.ENGINES else None
        share = 1e9 * row["gflop_per_s"] / rates[precision]
        rows.add(name, passed, **kept, share_of_products=share, products=precision)


def runs(rows: Rows, device: str, size: int = 256, iterations: int = 100, engines: Iterable[str] = GPU_ENGINES) -> None:
    """Whole runs end at the loss of the first one in fp32, both computed again by the CPU from unrounded pixels."""
    problem = cases.load(size, device=device)
    config = replace(problem.config, iterations=iterations)
    judge = Stylizer(problem.weights, "cpu", "fp32").objective(problem.content, problem.style, config)
    reference = None
    for name in engines:
        with rows.attempt(name):
            result = Stylizer(problem.weights, *cases.ENGINES[name])(problem.content, problem.style, config)
            if reference is None and result.last.precision != "fp32":
                raise ValueError("no run in fp32 came before it, to compare it with")
            loss = float(judge.evaluate(result.last._iterate.best.cpu(), with_gradient=False)[0].total)
            reference = reference or loss
            error, told = abs(loss / reference - 1), min(each for scale, each, _ in result.trace if scale == size)
            rows.add(name, error < LOSS_ERROR, error=error, loss=loss, told=told, seconds=result.trace[-1][2])


def equal_loss(
    rows: Rows, device: str, size: int, engines: Iterable[str] = HALF_ENGINES, iterations: int = 500
) -> None:
    """How long the engine takes to eager's lowest loss of many iterations."""
    problem = cases.load(size, device=device)
    for name in engines:
        with rows.attempt(name):
            found, _ = timing.equal_loss(problem, name, iterations)
            rows.add(name, **{key: found[key] for key in ("loss", "baseline_s", "engine_s", "ratio")})


def forecast(
    rows: Rows,
    device: str,
    engine: str = "engine-cudnn-fp16",
    sizes: Iterable[int] = (256, 512, 1024),
    iterations: int = 30,
    window: int = 512,
) -> None:
    """What runs over all scales have in use at their peaks, by torch's books, against their forecasts.

    The largest one also through windows.
    """
    before = torch.cuda.memory_allocated()  # once: workspaces of a size serve the next one
    runs = [(kept, size, "auto") for kept, size in product((False, True), sizes)]
    for kept, size, seen in (*runs, (False, runs[-1][1], window)):  # in this order: cuBLAS's handles stay with streams
        name = (
            f"{engine} {size}" + ("" if kept else ", networks let go") + ("" if seen == "auto" else f", window {seen}")
        )
        with rows.attempt(name):
            problem = cases.load(size, device=device)
            config = replace(problem.config, iterations=iterations, window=seen)
            stylizer = Stylizer(problem.weights, *cases.ENGINES[engine], keep_networks=kept)
            told = stylizer.forecast(problem.content, problem.style, config).total / 2**20
            gc.collect()  # what went before is gone
            torch.cuda.reset_peak_memory_stats()
            stylizer(problem.content, problem.style, config)
            taken = (torch.cuda.max_memory_allocated() - before) / 2**20
            rows.add(name, abs(told / taken - 1) < FORECAST_ERROR, forecast_mib=told, peak_mib=taken)
            del stylizer


SECTIONS: dict[str, Callable[[Rows, str], None]] = {
    "environment": environment,
    "providers": providers,
    "loop": loop,
    **gpu_kernels.SECTIONS,
    **gpu_options.SECTIONS,
    "our-part": our_part,
    "gram-matrices": gram_matrices,
    "runs": runs,
    "forecast": forecast,
    **{f"iteration-{size}": partial(iteration, size=size) for size in (256, 512, 1024)},
    "iteration-2048": partial(iteration, size=2048, rounds=2),
    **{f"equal-{size}": partial(equal_loss, size=size) for size in (256, 512)},
    "compiled-512": partial(iteration, size=512, names=("eager", "compile-graphs", "engine-cudnn-fp16")),
    "autotuned-512": partial(iteration, size=512, names=("eager", "compile-autocast", "engine-cudnn-fp16")),
}
