"""The sections of `benchmarks.gpu`. Each takes the rows to fill in and the device, which tests set to the CPU."""

from __future__ import annotations

import importlib.util
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from importlib import metadata
from itertools import islice

import torch
from torch import Tensor

from engine import BackendError, kernels, provider
from engine.export import vgg
from engine.features import DTYPES
from engine.kernels import _cuda
from engine.kernels.lbfgs import GPU_HISTORY
from engine.losses import Objective
from engine.optimize import State, minimise
from engine.stylizer import Stylizer

from . import cases, machine, timing
from .gpu import Rows

WHEELS = ("torch", "cupy-cuda13x", "onnxruntime-gpu", "onnxruntime", "tensorrt-cu13")
WHEELS += ("nvidia-cudnn-cu13", "nvidia-cudnn-frontend")
GPU_ENGINES = tuple(name for name, (device, _) in cases.ENGINES.items() if device in provider.GPUS)
STYLE, CONTENT = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1"), ("relu4_2",)
GRADIENT_ERROR = {"fp32": 1e-4, "fp16": 3e-2, "bf16": 3e-2}  # relative, of the pixels, against float64
VALUE_ERROR = {"fp32": 2e-3, "fp16": 3e-3, "bf16": 1.2e-2}  # relative, of the loss, against float64
ROUNDING = {"fp32": 1e-4, "fp16": 2e-3, "bf16": 1.6e-2}  # relative, of cotangents
# Relative, of losses whose Gram matrices nearly agree. Tensor cores cut their sums off instead of rounding them.
LOSS_ROUNDING = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 1e-3}
LOSS_ERROR = 0.01  # relative, of the end of a run against fp32
TIMED = ("eager", "autocast", "engine-cudnn-fp16", "engine-cuda-fp16", "engine-tensorrt-fp16")
# What the host does to wait or to allocate; an event that is asked whether it has come is none of these.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize")
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


def ceilings(device: str, side: int = 4096) -> dict[str, float]:
    """Measured: GB/s of a copy (read and written), TFLOP/s of matrix products."""
    found = {}
    if device == "cpu":
        side //= 16
    source = torch.rand(8 * side * side, device=device)
    target = torch.empty_like(source)
    found["copy GB/s"] = 2 * source.nbytes / seconds(lambda: target.copy_(source), device) / 1e9
    for name, dtype in DTYPES.items():
        a, b = (torch.rand(side, side, device=device, dtype=dtype) for _ in range(2))
        found[f"{name} products TFLOP/s"] = 2 * side**3 / seconds(partial(torch.mm, a, b), device) / 1e12
    return found


def recorded(work: Callable[[], None], device: str) -> Callable[[], None]:
    """The work as the loop does it: a replay of its launches."""
    graph = kernels.Recorded(torch.device(device))
    return partial(graph, work)


def seconds(work: Callable[[], object], device: str, repeats: int = 5, calls: int = 10) -> float:
    """Median time of one call, of several that are queued together, after a warm-up."""
    times = []
    for _ in range(3):
        work()
    for _ in range(repeats):
        begin = machine.now(device)
        for _ in range(calls):
            work()
        times.append((machine.now(device) - begin) / calls)
    return statistics.median(times)


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


def needs_cupy(rows: Rows, device: str) -> bool:
    """Whether the kernels can be launched; says so if not."""
    if device == "cpu" or importlib.util.find_spec("cupy"):
        return True
    rows.skip("all", "cupy is not installed")
    return False


def layer_group(size: int, dtype: torch.dtype, nhwc: bool, device: str) -> dict[str, kernels.Layer]:
    """Random layers with the shapes of a square picture of this size."""
    generator = torch.Generator(device).manual_seed(0)

    def random(channels: int, positions: int) -> Tensor:
        found = torch.rand(channels, positions, generator=generator, device=device).to(dtype)
        return found.T.contiguous().T if nhwc else found

    layers = {}
    for name, (_, channels, height, width) in vgg.shapes(vgg.CONVS, size, size).items():
        if name not in STYLE + CONTENT:
            continue
        f, p, a = (random(channels, height * width) for _ in range(3))
        target = (a.double() @ a.double().T / a.shape[1]).float() if name in STYLE else None
        layers[name] = kernels.Layer(f, torch.empty_like(f), p if name in CONTENT else None, target)
    return layers


def check_kernels(rows: Rows, device: str, sizes: Iterable[int] = (64, 100, 256)) -> None:
    """Losses, cotangents, total variation and L-BFGS of the device against float64."""
    if not needs_cupy(rows, device):
        return
    for size in sizes:
        for precision, dtype in DTYPES.items():
            for nhwc in (False, True):
                name = f"layers {size} {precision} {'NHWC' if nhwc else 'NCHW'}"
                with rows.attempt(name):
                    given = layer_group(size, dtype, nhwc, device)
                    layers = kernels.Layers(given, 1.0, 100.0)
                    for way, losses in ways(layers, device)[0].items():
                        layers.terms.fill_(torch.nan)  # what is not written is seen
                        losses()
                        for other, gradients in ways(layers, device)[1].items():
                            for layer in given.values():
                                assert layer.cotangent is not None
                                layer.cotangent.fill_(torch.nan)
                            gradients()
                            loss, worst = layer_errors(layers, given)
                            passed = loss < LOSS_ROUNDING[precision] and worst < ROUNDING[precision]
                            rows.add(f"{name} {way}, {other}", passed, loss_error=loss, cotangent_error=worst)
    with rows.attempt("L-BFGS against the CPU's"):
        difference = lbfgs_error(device)
        rows.add("L-BFGS against the CPU's", difference < 1e-3, image_error=difference)


def ways(layers: kernels.Layers, device: str) -> tuple[dict[str, Callable[[], None]], dict[str, Callable[[], None]]]:
    """The ways to the losses and to the gradients: there is a choice on a GPU only."""
    if device == "cuda":
        return layers.ways(), layers.ways_to_gradients()
    return {"losses by BLAS": layers.losses}, {"cotangents by BLAS": layers.gradients}


def layer_errors(layers: kernels.Layers, given: dict[str, kernels.Layer]) -> tuple[float, float]:
    """Relative errors of the losses, at most, and of the cotangents, at most."""
    losses, worst = [], 0.0
    for i, layer in enumerate(given.values()):
        f, elements, channels = layer.features.double(), layer.features.numel(), len(layer.features)
        truth = torch.zeros_like(f)
        if layer.content is not None:
            difference = f - layer.content.double()
            losses.append((layers.terms[1], difference.square().mean()))
            truth += 2 / elements * difference
        if layer.target is not None:
            difference = f @ f.T / f.shape[1] - layer.target.double()
            losses.append((layers.terms[3 + i], difference.square().sum() / (4 * channels**2)))
            truth += 100 / (channels * elements) * (difference @ f)
        assert layer.cotangent is not None
        truth *= layers.scale.double()
        worst = max(worst, float((layer.cotangent.double() - truth).norm() / truth.norm()))
    return max(float((found - truth).abs() / truth) for found, truth in losses), worst


def lbfgs_error(device: str, steps: int = 30) -> float:
    """Relative difference of the images after some steps on a quadratic, the device's and the CPU's."""
    ends = []
    for place in ("cpu", device):
        generator = torch.Generator().manual_seed(1)
        start, curvature = torch.rand(2, 1, 3, 40, 50, generator=generator).to(place)
        curvature = 10 ** (2 * curvature)

        def evaluate(pixels: Tensor, gradient: Tensor, curvature: Tensor = curvature) -> Tensor:
            away = pixels - 0.5
            torch.mul(curvature, away, out=gradient)
            return (away * gradient).sum() / 2

        *_, last = minimise(evaluate, start, "lbfgs", steps, State(), history=GPU_HISTORY)
        ends.append(last.best.cpu())
    return float((ends[1] - ends[0]).norm() / ends[0].norm())


def kernel_times(rows: Rows, device: str, size: int = 512) -> None:
    """Each launch at its shapes: time, GB/s of what has to be moved, TFLOP/s, and the time of torch's own route."""
    if not needs_cupy(rows, device):
        return
    for precision in ("fp32", "fp16"):
        dtype = DTYPES[precision]
        given = layer_group(size, dtype, precision == "fp16", device)
        layers = kernels.Layers(given, 1.0, 100.0)
        styles = [layer for layer in given.values() if layer.target is not None]
        moved = sum(layer.features.nbytes for layer in given.values())
        flop = sum(2 * len(layer.features) * layer.features.numel() for layer in styles)
        grams = [layer.target.to(dtype) for layer in styles if layer.target is not None]

        def torchs_grams(styles: list[kernels.Layer] = styles) -> None:
            for layer in styles:
                torch.mm(layer.features, layer.features.T)

        def torchs_gradients(styles: list[kernels.Layer] = styles, grams: list[Tensor] = grams) -> None:
            for layer, gram in zip(styles, grams, strict=True):
                assert layer.cotangent is not None
                layer.cotangent.copy_(gram @ layer.features)

        def timed(
            name: str,
            work: Callable[[], None],
            theirs: Callable[[], None],
            traffic: int,
            precision: str = precision,
            flop: int = flop,
        ) -> None:
            ours, other = seconds(recorded(work, device), device), seconds(recorded(theirs, device), device)
            rates = {"gb_per_s": traffic / ours / 1e9, "tflop_per_s": flop / ours / 1e12}
            rows.add(f"{name} {precision}", us=1e6 * ours, torch_us=1e6 * other, **rates)

        with rows.attempt(f"losses {precision}"):
            for way, losses in ways(layers, device)[0].items():
                timed(way, losses, torchs_grams, moved)
            timed("chosen losses", layers.losses, torchs_grams, moved)
        with rows.attempt(f"cotangents {precision}"):
            for way, gradients in ways(layers, device)[1].items():
                timed(way, gradients, torchs_gradients, 2 * moved)
            timed("chosen cotangents", layers.gradients, torchs_gradients, 2 * moved)
    image, curvature = (torch.rand(1, 3, size, size, device=device) for _ in range(2))
    gradient, loss = torch.empty_like(image), torch.zeros((), device=device)
    trail = kernels.Trail(image)
    # And the vectors that a step reads and writes; those of the history are half as long.
    runners: dict[str, tuple[kernels.Lbfgs | kernels.Adam, int]] = {
        "L-BFGS": (kernels.Lbfgs(image, gradient, loss, trail), 2 * GPU_HISTORY + 12),
        "Adam": (kernels.Adam(image, gradient, loss, trail), 9),
    }
    for name, (runner, vectors) in runners.items():
        for _ in range(GPU_HISTORY + 2):  # a full history
            torch.mul(curvature, image, out=gradient)
            runner.step()
        taken = seconds(runner.step, device)
        rows.add(name, us=1e6 * taken, gb_per_s=vectors * image.nbytes / taken / 1e9)


def providers(rows: Rows, device: str, engines: Iterable[str] = GPU_ENGINES, size: int = 128) -> None:
    """Each engine opens where it was asked to, and its losses and gradient are those of float64."""
    problem = cases.load(size, device=device)
    point = problem.point(0)
    oracle = cases.build("float64", problem)
    truth, slope = oracle.loss_and_gradient(point)
    for name in engines:
        own_device, precision = cases.ENGINES[name]
        with rows.attempt(name):
            engine = cases.Engine(problem, *cases.ENGINES[name])
            loss, gradient = engine.loss_and_gradient(point)
            errors = {"loss_error": abs(loss / truth - 1), "gradient_error": cases.relative_error(gradient, slope)}
            errors["replay_error"] = replay_error(engine, problem)
            limit = GRADIENT_ERROR[precision] if precision != "fp32" else cases.LOOSE  # a few ReLUs flip in fp32
            passed = errors["gradient_error"] < limit and errors["loss_error"] < VALUE_ERROR[precision]
            passed = passed and errors["replay_error"] < ROUNDING[precision]
            errors["early_error"] = early_error(engine, problem)  # a race, unless it is zero
            passed = passed and errors["early_error"] == 0
            if precision == "fp32":
                errors["strict_error"] = cases.strict_error(name, problem)
                passed = passed and errors["strict_error"] < GRADIENT_ERROR["fp32"]
            rows.add(name, passed, provider=provider.PROVIDERS.get(own_device, own_device), **errors)


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
    worst = 0.0
    for seed, found in enumerate(replayed):
        truth = at(seed, objective._write)
        worst = max(worst, float((found - truth).norm() / truth.norm()))
    return worst


def early_error(engine: cases.Engine, problem: cases.Problem, steps: int = 25) -> float:
    """The largest difference between the losses of two runs, with kernels that come to the device ahead of their turn
    and without."""

    def losses() -> list[float]:
        return [iterate.loss for iterate in islice(engine.iterate(problem.start), steps)]

    early, kept = losses(), _cuda._OVERLAPPING
    _cuda._OVERLAPPING = (99, 0)
    try:
        return max(abs(one - other) for one, other in zip(early, losses(), strict=True))
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
                with torch.profiler.record_function(name):  # the profiler itself waits at its end
                    for _ in islice(running, count):
                        pass
                machine.now(device)
            events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CPU]
            span = next(event.time_range for event in events if event.name == name)
            calls = Counter(event.name for event in events if span.start <= event.time_range.start < span.end)
            found = {"waits": named(calls, WAITS), "allocations": named(calls, ALLOCATIONS)}
            launches = sum(named(calls, LAUNCHES).values()) / count
            rows.add(name, not any(found.values()), **found, launches_per_iteration=launches)


def our_part(rows: Rows, device: str, engines: Iterable[str] = TIMED[2:], size: int = 512) -> None:
    """What losses, cotangents and L-BFGS add to the two passes of the network, as a share of the iteration."""
    problem = cases.load(size, device=device)
    for name in engines:
        with rows.attempt(name):
            engine = cases.Engine(problem, *cases.ENGINES[name])
            running = engine.iterate(problem.start)
            for _ in islice(running, GPU_HISTORY + 2):  # a full history
                pass
            whole = seconds_of_gpu(partial(next, running), device)
            alone = recorded(network_alone(engine._objective), device)
            for _ in range(kernels.Recorded.WARM_UP + 1):
                alone()
            network = seconds_of_gpu(alone, device)
            rows.add(name, iteration_us=1e6 * whole, network_us=1e6 * network, our_part=1 - network / whole)


def network_alone(objective: Objective) -> Callable[[], None]:
    """Both passes with cotangents that nobody writes; those that the VJP makes are zero, but for the deepest."""
    network = objective.network
    nothing = kernels.Term(torch.zeros(3, device=network.image.device))
    terms = {name: nothing for name in objective._chained if name != network.spec.layers[-1]}
    network.image.uniform_()
    for name in network.spec.layers:
        if name not in terms:
            network.cotangents[name].normal_()

    def both() -> None:
        with network.use():
            network.forward()
            network.vjp(lambda layers: None, terms)

    return both


def named(calls: Counter[str], names: Iterable[str]) -> dict[str, int]:
    """How often those of these that were called were called."""
    return {name: calls[name] for name in names if calls[name]}


def iteration(rows: Rows, device: str, size: int, names: Iterable[str] = TIMED, rounds: int = 3) -> None:
    """One iteration of the rivals and of ours in turns: iterations per second, ratio to eager, memory."""
    problem = cases.load(size, device=device)
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = True  # eager fp32 as a good user runs it
    found = {name: {"variant": name} for name in names}
    loops = timing.start(found, problem, strict=False, required=("eager",))
    rate, _ = timing.in_turns(found, loops, problem, rounds)
    for name, row in found.items():
        if "failed" in row:
            if name in cases.ENGINES and not row["failed"].startswith(BackendError.__name__):
                rows.add(name, False, failed=row["failed"])
            else:
                rows.skip(name, row["failed"])
            continue
        kept = {
            key: row[key]
            for key in ("iterations_per_s", "ratio", "gflop_per_s", "error", "first_s", "memory_mib")
            if key in row
        }
        rows.add(name, **kept, share_of_fp32_products=row["gflop_per_s"] / rate)


def runs(rows: Rows, device: str, size: int = 256, iterations: int = 100, engines: Iterable[str] = GPU_ENGINES) -> None:
    """Whole runs end at the loss of fp32, and how long the engine takes to eager's loss after many iterations."""
    problem = cases.load(size, device=device)
    config = replace(problem.config, iterations=iterations)
    reference = None
    for name in engines:
        with rows.attempt(name):
            result = Stylizer(problem.weights, *cases.ENGINES[name])(problem.content, problem.style, config)
            lowest = min(loss for scale, loss, _ in result.trace if scale == size)
            reference = reference or lowest  # the first is fp32
            rows.add(name, abs(lowest / reference - 1) < LOSS_ERROR, loss=lowest, seconds=result.trace[-1][2])
    for name in engines:
        if "fp16" in name and "loss" in next(row for row in rows.rows if row["name"] == name):
            found, _ = timing.equal_loss(problem, name, 5 * iterations)
            rows.add(f"{name} to eager's loss", **{key: found[key] for key in ("baseline_s", "engine_s", "ratio")})


SECTIONS: dict[str, Callable[[Rows, str], None]] = {
    "environment": environment,
    "kernels": check_kernels,
    "providers": providers,
    "loop": loop,
    "kernel-times": kernel_times,
    "our-part": our_part,
    "runs": runs,
    **{f"iteration-{size}": partial(iteration, size=size) for size in (256, 512, 1024, 2048)},
    "compiled-512": partial(iteration, size=512, names=("eager", "compile-graphs", "engine-cudnn-fp16")),
    "autotuned-512": partial(iteration, size=512, names=("eager", "compile-autocast", "engine-cudnn-fp16")),
}
