"""The cuDNN runtime without cuDNN: torch makes its convolutions, the CUDA sources run on the CPU, autograd is right."""

import contextlib
import gc
import itertools
import json
import random
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import check_alone
from filelock import FileLock

from engine import BackendError, Config, convolutions, features, fused, kernels
from engine.export import vgg, weights
from engine.features import network as open_network
from engine.kernels import _blas, _cuda
from engine.losses import Objective, Region
from engine.targets import Statistic

CONVOLUTION = fused.Convolution
STYLE_AND_CONTENT = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu4_2", "relu5_1")


@pytest.fixture(scope="module")
def net():
    return weights.load("embedded", ("relu5_2",))


SPECS = [
    vgg.Spec(33, 47, STYLE_AND_CONTENT),
    vgg.Spec(46, 37, STYLE_AND_CONTENT, "max"),
    vgg.Spec(48, 64, STYLE_AND_CONTENT, padding="circular"),
    vgg.Spec(35, 32, ("relu1_1", "relu2_2", "relu3_1"), padding="reflect"),
    vgg.Spec(32, 33, ("relu1_2", "conv2_2", "relu3_1"), padding="replicate"),
    vgg.Spec(32, 37, ("conv1_1", "conv2_1", "relu2_1", "conv3_1")),
    vgg.Spec(34, 32, ("relu1_1",), "max"),
]


@pytest.mark.parametrize(
    ("spec", "precision"),
    [(spec, "fp32") for spec in SPECS] + [(spec, "fp16") for spec in SPECS] + [(SPECS[4], "bf16")],
)
def test_features_and_gradient_are_those_of_autograd(on_cpu, net, spec, precision):
    check_features(net, spec, precision)


def check_features(net, spec, precision):
    spec = vgg.Spec(spec.height, spec.width, spec.layers, spec.pooling, precision, padding=spec.padding)
    generator = torch.Generator().manual_seed(3)
    image = torch.rand(1, 3, spec.height, spec.width, generator=generator)
    own = fused.Features(spec, fused.Network(net))
    exact = image.double().requires_grad_()
    truth = net.module(spec.layers, spec.pooling, torch.float64, spec.padding)(exact)
    cotangents = {name: torch.randn(x.shape, generator=generator) / x.numel() ** 0.5 for name, x in truth.items()}

    def write(layers):
        assert layers == spec.layers
        for name in layers:
            own.cotangents[name].copy_(cotangents[name])

    with own.use():
        own.image.copy_(image)
        for _ in range(2):  # the memory is used again
            own.forward()
            own.vjp(write)
    (slope,) = torch.autograd.grad([truth[name] for name in spec.layers], exact, list(cotangents.values()))
    limit, flips = {"fp32": (1e-6, 2e-3), "fp16": (2e-3, 5e-2), "bf16": (1.5e-2, 1.5e-1)}[precision]
    for name in spec.layers:
        assert relative(own.features[name], truth[name].detach()) < limit
    assert relative(own.gradient, slope) < flips


def relative(value, truth):
    return float((value.double() - truth).norm() / truth.norm())


class Graph:
    """A graph of cuDNN's that computes what it is told by torch, in the order in which it is told, with one plan."""

    def __init__(self, io_data_type, intermediate_data_type, compute_data_type, handle):
        assert (intermediate_data_type, compute_data_type) == ("FLOAT", "FLOAT")
        self.io, self.handle, self.said = io_data_type, handle, {}

    def tensor(self, dim, stride, data_type):
        assert data_type == self.io
        return Node(lambda memory, own: memory[own].double(), dim=dim, stride=stride)

    def conv_fprop(self, image, weight, padding, stride, dilation):
        options = {"padding": padding, "stride": stride, "dilation": dilation}
        return Node(lambda memory, own: torch.nn.functional.conv2d(image(memory), weight(memory), **options))

    def bias(self, input, bias):
        return Node(lambda memory, own: input(memory) + bias(memory))

    def relu(self, input):
        return Node(lambda memory, own: input(memory).relu())

    def __getattr__(self, name):
        return lambda *given: self.said.update({name: given})

    def get_execution_plan_count(self):
        return 1

    def get_plan_name_at_index(self, plan):
        return f"plan {plan}"

    def get_workspace_size_plan_at_index(self, plan):
        return 0

    def execute_plan_at_index(self, memory, workspace, plan, handle):
        assert (plan, handle) == (0, self.handle)
        for node, tensor in memory.items():
            assert (node.dim, node.stride) == (list(tensor.shape), list(tensor.stride()))
        (result,) = (node for node in memory if node.is_output)
        memory[result].copy_(result(memory))


class Node:
    def __init__(self, value, dim=None, stride=None):
        self._value, self.dim, self.stride, self.is_output = value, dim, stride, False

    def __call__(self, memory):
        return self._value(memory, self)

    def set_output(self, value):
        self.is_output = value
        return self

    def set_data_type(self, kind):
        return self

    def set_dim(self, dim):
        self.dim = dim
        return self

    def set_stride(self, stride):
        self.stride = stride
        return self


def choices(monkeypatch, home, gpu="GPU A", processors=132):
    """As a new process has them, with this folder for what is kept."""
    monkeypatch.setenv("STYLIZE_HOME", str(home))
    monkeypatch.setattr(convolutions, "_choices", convolutions.Choices())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    device = SimpleNamespace(name=gpu, multi_processor_count=processors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)


@pytest.fixture
def told(on_cpu, monkeypatch, tmp_path):
    """cuDNN with `Graph`s in the place of `on_cpu`'s convolutions: the graphs that were made, and what was timed."""
    made, timed = [], []
    notes = SimpleNamespace(RUNTIME_COMPILATION="compiles", TENSOR_CORE="rounds")
    library = SimpleNamespace(
        pygraph=lambda **given: (made.append(Graph(**given)), made[-1])[1], create_handle=lambda: "handle",
        set_stream=lambda handle, stream: None, heur_mode=SimpleNamespace(A=0, FALLBACK=1), behavior_note=notes,
        backend_version=lambda: 91900, __version__="1.22",
        data_type=SimpleNamespace(FLOAT="FLOAT", HALF="HALF", BFLOAT16="BFLOAT16"), numerical_note=notes,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "cudnn", library)
    monkeypatch.setattr(fused, "Convolution", CONVOLUTION)
    choices(monkeypatch, tmp_path)
    monkeypatch.setattr(kernels, "seconds", lambda *given: (timed.append(given), 1.0)[1])
    return made, timed


@pytest.mark.parametrize(
    ("spec", "precision"),
    [*itertools.product([SPECS[i] for i in (0, 2, 3, 5)], ["fp32", "fp16"]), (SPECS[4], "bf16")],
)
def test_what_cudnn_is_told_is_vgg(told, net, monkeypatch, tmp_path, spec, precision):
    made, timed = told
    spec = replace(spec, precision=precision)
    check_features(net, spec, precision)
    for each in made:
        assert each.said["deselect_workspace_greater_than"] == (convolutions.WORKSPACE,)
        assert each.said["deselect_behavior_notes"] == (["compiles"],)
        assert ("deselect_numeric_notes" in each.said) == (each.io == "FLOAT")
    assert {each.io for each in made} == {{"fp32": "FLOAT", "fp16": "HALF", "bf16": "BFLOAT16"}[precision]}
    before = len(timed)
    for _ in range(2):  # in this process, and in the next one
        fused.Features(spec, fused.Network(net))
        assert len(timed) == before <= len(made) / 2
        choices(monkeypatch, tmp_path)


def test_convolutions_that_differ_have_plans_of_their_own(told):
    _, timed = told
    library = convolutions.Library(SimpleNamespace(cuda_stream=1), fused.PLACE)

    def make(size=5, padding=1, bias=False, rectified=False, dtype=torch.float32):
        grown = size + 2 * padding - 2
        tensors = torch.zeros(1, 8, size, size), torch.zeros(8, 8, 3, 3), torch.zeros(1, 8, grown, grown)
        line = torch.zeros(1, 8, 1, 1, dtype=dtype) if bias else None
        CONVOLUTION(library, *(each.to(dtype) for each in tensors), padding, line, rectified)

    variations = [
        {}, {"padding": 2}, {"bias": True}, {"bias": True, "rectified": True}, {"size": 6}, {"dtype": torch.float16}
    ]  # fmt: skip
    for _ in range(2):
        for given in variations:
            make(**given)
    assert len(timed) == len(variations)


@pytest.mark.parametrize("fails", ["", "early", "late"])
def test_losses_are_read_beside_the_network(on_cpu, net, monkeypatch, fails):
    """In the order in which a GPU may take it up: the side stream waits for what it reads, and is waited for."""
    own = fused.Features(SPECS[0], fused.Network(net))
    order = []

    def make(i):
        order.append(i)
        if fails == "early":
            raise FloatingPointError

    own._forward = [lambda *given, i=i: make(i) for i in range(len(own._forward))]
    ours = SimpleNamespace(wait_stream=lambda other: order.append("join" if other is own._beside else other))
    own._beside = SimpleNamespace(wait_stream=lambda other: order.append("fork" if other is ours else other))

    @contextlib.contextmanager
    def stream(which):
        order.append("beside" if which is own._beside else which)
        yield
        order.append("back")

    def read(layers):
        order.append(layers)
        if fails:
            raise FloatingPointError

    monkeypatch.setattr(torch.cuda, "current_stream", lambda place: ours)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    with pytest.raises(FloatingPointError) if fails else contextlib.nullcontext():
        own.forward(read)
    *others, deepest = SPECS[0].layers
    if fails == "early":  # a stream that is not part of a capture cannot be joined with it
        assert order == [0]
        return
    fork = next(steps for name, steps in own._ready if name == others[-1])
    head = [*range(fork), "fork", "beside", tuple(others)]
    assert order == head + (["join"] if fails else ["back", *range(fork, len(own._forward)), (deepest,), "join"])


class Streams:
    """Streams whose work is done when it is asked for, in any order that they allow."""

    def __init__(self):
        self.all = [SimpleNamespace(wait_stream=partial(self._wait, i), queue=[]) for i in range(2)]
        self.current, self.waits, self.ignored = self.all[0], 0, None

    def _wait(self, waiting, other):
        if self.waits != self.ignored:
            self.all[waiting].queue.append((other, len(other.queue)))
        self.waits += 1

    @contextlib.contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def later(self, function):
        return lambda *given, **options: self.current.queue.append(partial(function, *given, **options))

    def run(self, choose):
        """Make all of it; `choose` picks one of the streams that can go on."""
        done = [0, 0]

        def able(i):
            if done[i] == len(self.all[i].queue):
                return False
            item = self.all[i].queue[done[i]]
            return not isinstance(item, tuple) or done[self.all.index(item[0])] >= item[1]

        while streams := [i for i in range(2) if able(i)]:
            i = choose(streams)
            item = self.all[i].queue[done[i]]
            if not isinstance(item, tuple):
                item()
            done[i] += 1
        assert done == [len(stream.queue) for stream in self.all]
        for stream in self.all:
            stream.queue.clear()


def test_the_losses_may_come_in_any_order_beside_the_network(on_cpu, net, monkeypatch):
    """Which a GPU does with two streams: first one as far as it gets, first the other, and at random.

    Without any of the three waits for each other there is an order that tells.
    """
    config = Config(content_layers=("relu2_2",), style_layers=("relu1_1", "relu2_1", "relu3_1"), style_weight=1e3)
    spec = vgg.Spec(32, 33, config.layers, precision="fp16")
    *points, content, style = torch.rand(4, 1, 3, 32, 33, generator=torch.Generator().manual_seed(6))
    own = objective(fused.Features(spec, fused.Network(net)), content, style, config, None)
    gradient = torch.empty_like(content)
    expected = [(float(own.write(point, gradient)), gradient.clone()) for point in points]
    streams = Streams()
    own.network._beside = streams.all[1]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda place: streams.current)
    monkeypatch.setattr(torch.cuda, "stream", streams.on)
    monkeypatch.setattr(_cuda, "launch", streams.later(_cuda.launch))
    for name in ("products", "multiply"):
        monkeypatch.setattr(_blas, name, streams.later(getattr(_blas, name)))
    own.network._forward, own.network._vjp = (
        [streams.later(step) if getattr(step, "__name__", "") == "run" else step for step in steps]
        for steps in (own.network._forward, own.network._vjp)
    )

    def right(choose, *given):
        streams.waits = 0
        for point in given:
            own.write(points[point], gradient)
        streams.run(choose)
        loss, slope = expected[given[-1]]
        return float(own._total) == loss and torch.equal(gradient, slope)

    assert right(min, 1)
    assert right(max, 0)
    assert streams.waits == 3
    assert right(random.Random(1).choice, 0, 1)  # an iteration waits for the one before
    for streams.ignored, choose in enumerate((max, max, min)):  # the second stream is ahead of what it needs, or late
        assert not right(choose, streams.ignored % 2)


def test_a_replayed_vjp_is_that_of_its_terms(on_cpu, net, monkeypatch):
    """Another objective's have another memory."""
    made = []
    own = fused.Features(SPECS[3], fused.Network(net))
    own._vjp = []
    monkeypatch.setattr(kernels, "Recorded", lambda place: (made.append(place), lambda launches: launches())[1])
    one, other = (kernels.Term(torch.zeros(3)) for _ in range(2))
    counts = []
    for terms in ({"relu1_1": one}, {"relu1_1": one}, {"relu1_1": other}, {"relu2_2": other}, {"relu1_1": one}):
        own.vjp(lambda layers: None, terms)
        counts.append(len(made))
    assert counts == [1, 1, 2, 3, 4]
    assert not own._terms


def test_what_the_vjp_may_make_itself(on_cpu, net):
    spec = vgg.Spec(32, 32, ("relu1_1", "relu2_1", "relu3_1"), precision="fp16")
    assert not fused.chains(spec, "relu1_1", style=True, content=True)
    network = fused.Features(spec, fused.Network(net))
    content = {"relu2_1": torch.zeros_like(network.features["relu2_1"])}
    styles = ("relu1_1", "relu2_1", "relu3_1")
    statistics = {
        name: Statistic(torch.eye(spec.shapes[name][1]), torch.zeros(spec.shapes[name][1])) for name in styles
    }
    config = Config(content_layers=("relu2_1",), style_layers=styles)
    mask = np.ones((32, 32), np.float32)
    plain = Objective(network, [content], [Region(statistics)], config)
    assert set(plain._chained) == {"relu1_1"}  # both losses look at relu2_1, and cuBLAS is faster at relu3_1
    masked = Objective(network, [content], [Region(statistics, 1.0, mask)], config)
    assert masked._chained == {}
    assert (
        Objective(network, [content], [Region(statistics)], replace(config, style_loss="wasserstein")).recorded is None
    )
    assert plain.recorded is not None


@pytest.mark.parametrize(
    ("layers", "precision", "begins"),
    [
        (("relu1_1", "relu2_1"), "fp16", True),
        (("relu1_1", "conv2_1"), "bf16", True),
        (("relu1_1", "relu2_1"), "fp32", False),
        (("relu2_1",), "fp16", False),
        (("relu1_1", "conv2_1", "relu2_1"), "fp16", False),
    ],
)
def test_where_the_vjp_begins_before_all_is_measured(on_cpu, net, layers, precision, begins):
    spec = vgg.Spec(32, 32, layers, precision=precision)
    own = fused.Features(spec, fused.Network(net))
    assert own.overlapping is (own if begins else None)
    assert fused.Features(spec, fused.Network(net), forward_only=True).overlapping is None
    ranged = features.Ranged(own, (0.5,) * 3, (0.2,) * 3, 255)
    assert ranged.overlapping is (ranged if begins else None)
    statistics = {name: Statistic(torch.eye(each[1]), torch.zeros(each[1])) for name, each in spec.shapes.items()}
    given = Config(style_layers=layers).for_weights("embedded")
    mask = np.ones((32, 32), np.float32)
    for region, config, way in (
        (Region(statistics), given, begins),
        (Region(statistics, 1.0, mask), given, False),
        (Region(statistics), replace(given, style_loss="shifted"), False),
        (Region(statistics), replace(given, style_loss="wasserstein"), False),
    ):
        found = Objective(own, [], [region], config)
        assert (found._overlapping is own) == way == (found._layers.ratio is not None)


@pytest.mark.parametrize(
    ("frozen", "precision", "pixel_range"),
    [(False, "fp32", "auto"), (True, "fp16", "auto"), (False, "bf16", "auto"), (False, "fp16", "0-255")],
)
def test_the_objective_on_it_is_that_of_the_cpu(on_cpu, net, monkeypatch, frozen, precision, pixel_range):
    """All of it is one sequence of launches for pixels and a gradient in the same memory, and one of its own else."""
    config = Config(content_layers=("relu3_2",), style_layers=("relu1_1", "relu3_1"), tv_weight=0.1)
    layers = config.layers
    pixels, content, style = torch.rand(3, 1, 3, 32, 33, generator=torch.Generator().manual_seed(5))
    held = torch.zeros(1, 1, 32, 33, dtype=torch.bool)
    held[..., :7] = frozen
    runs = []
    with pytest.MonkeyPatch.context() as patch:  # not for the truth
        patch.setattr(torch.Tensor, "is_cuda", property(lambda self: False))
        exact = open_network(net, layers, "cpu", "fp32", 1)(vgg.Spec(32, 33, layers), pixel_range=pixel_range)
        truth = objective(exact, content, style, config, held)
        wanted, slope = truth.evaluate(pixels)

    class Counted(kernels.Recorded):
        def __call__(self, launches):
            runs.append(self)
            super().__call__(launches)

    monkeypatch.setattr(kernels, "Recorded", Counted)
    spec = vgg.Spec(32, 33, layers, precision=precision)
    seen = open_network(net, layers, "cudnn", "fp32", 1)(spec, pixel_range=pixel_range)
    own = objective(seen, content, style, config, held)
    assert set(own.network.parts[0].cotangents) == ({"relu3_1"} if precision != "fp32" else set(layers))
    runs.clear()
    gradient, other = torch.empty(2, *pixels.shape)
    found = [float(own.write(pixels, each)) for each in (gradient, gradient, other, gradient)]
    limits = {"fp32": (1e-4, 1e-2), "fp16": (2e-3, 3e-2), "bf16": (1e-2, 1e-1)}[precision]
    assert found == pytest.approx([float(wanted.total)] * 4, rel=limits[0])
    assert relative(gradient, slope.double()) < limits[1]
    assert torch.equal(gradient, other)
    assert bool(gradient[..., :7].any()) != frozen
    first, second, *others = runs[::2] if precision == "fp32" else runs  # all, and the VJP inside
    assert first is second
    assert len({first, *others}) == 3


def objective(network, content, style, config, held):
    """The objective of a content and a style as large as the image."""
    found = {}
    for name, picture in (("style", style), ("content", content)):
        with network.use():
            network.image.copy_(picture)
            network.forward()
            found[name] = {layer: each.clone() for layer, each in network.parts[0].features.items()}
    flat = {layer: found["style"][layer].flatten(2)[0] for layer in config.style_layer_weights}
    grams = {
        layer: Statistic(each.float() @ each.float().T / each.shape[1], each.mean(1)) for layer, each in flat.items()
    }
    targets = {layer: found["content"][layer] for layer in config.content_layer_weights}
    return Objective(network, [targets], [Region(grams)], config, held)


def test_a_network_is_used_by_one_thread_at_a_time(on_cpu, net):
    check_alone(fused.Features(SPECS[4], fused.Network(net)))


def test_a_network_that_is_dropped_is_gone_at_once(on_cpu, net):
    """With its memory: no cycle keeps it until the next garbage collection."""
    own = fused.Features(SPECS[2], fused.Network(net))
    assert sum(each.nbytes for each in own.memory) > 256 * 48 * 64
    gone = weakref.ref(own)
    gc.disable()
    try:
        del own
        assert gone() is None
    finally:
        gc.enable()


def test_two_threads_get_the_same_cotangents(monkeypatch):
    meeting, zeros_like = threading.Barrier(2), torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda x: (meeting.wait(10), zeros_like(x))[1])
    cotangents = fused._Cotangents({"relu3_1": torch.ones(1, 2, 3, 4)}, ["relu3_1"])
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(cotangents.__getitem__, ["relu3_1"] * 2)
    assert one is other is cotangents.of("relu3_1")
    assert cotangents.of("conv3_1") is None


def test_a_style_needs_no_way_back(on_cpu, net):
    own = fused.Features(vgg.Spec(32, 40, ("relu2_1",)), fused.Network(net), forward_only=True)
    own.image.fill_(0.5)
    own.forward()
    assert own.features["relu2_1"].any()
    assert not hasattr(own, "gradient")


class Plans:
    """A graph of cuDNN's with some plans, of which the first is not to be had and the third is the fastest."""

    def __init__(self, seconds):
        self.seconds, self.built = seconds, []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self

    def tensor(self, **given):
        return object()

    def get_execution_plan_count(self):
        return len(self.seconds)

    def get_plan_name_at_index(self, plan):
        return f"plan {plan}"

    def build_plan_at_index(self, plan):
        if self.seconds[plan] is None:
            raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED")
        self.built.append(plan)

    def get_workspace_size_plan_at_index(self, plan):
        return 10 * plan

    def execute_plan_at_index(self, memory, workspace, plan, handle):
        assert len(workspace) >= max(10 * plan, 1)
        clock.append(self.seconds[plan])


clock, times = [], []  # seconds that have passed, and those of the plans of the next graphs


@pytest.fixture
def plans(monkeypatch, tmp_path):
    """cuDNN with `Plans`, and events that tell the time from the plans that ran between them."""

    class Event:
        def __init__(self, enable_timing):
            self.at = 0.0

        def record(self):
            self.at = sum(clock)

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    made = []

    def pygraph(**options):
        made.append(Plans(times.pop(0) if times else [None, 3.0, 1.0, 2.0]))
        return made[-1]

    names = SimpleNamespace(FLOAT=0, HALF=1, BFLOAT16=2)
    notes = SimpleNamespace(RUNTIME_COMPILATION=0, TENSOR_CORE=0)
    library = SimpleNamespace(
        pygraph=pygraph, create_handle=itertools.count(1).__next__,
        set_stream=lambda handle, stream: None, data_type=names,
        heur_mode=SimpleNamespace(A=0, FALLBACK=1), behavior_note=notes, numerical_note=notes,
        backend_version=lambda: 91900, __version__="1.22",
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "cudnn", library)
    monkeypatch.setattr(fused, "PLACE", torch.device("cpu"))
    choices(monkeypatch, tmp_path)
    monkeypatch.setattr(convolutions, "_free_handles", [])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock.clear()
    times.clear()
    return made


def test_the_fastest_plan_is_taken_and_remembered(plans):
    times[:] = [None, 3.0, 1.0, 2.0], [None, 1.0, 9.0, 9.0], [None, None]
    library = convolutions.Library(SimpleNamespace(cuda_stream=1), fused.PLACE)
    tensors = [torch.zeros(1, 8, 5, 5), torch.zeros(8, 8, 3, 3), torch.zeros(1, 8, 5, 5)]
    convolutions.Convolution(library, *tensors, 1).run()
    first = len(clock)
    assert plans[0].built[-1] == 2
    assert plans[0].built[:3] == [1, 2, 3]
    convolutions.Convolution(library, *tensors, 1).run()
    assert plans[1].built == [2]
    assert len(clock) == first + 1
    with pytest.raises(BackendError, match="none of the plans"):
        convolutions.Convolution(library, *tensors, 1, torch.zeros(1, 8, 1, 1), rectified=True)


@pytest.fixture
def convolution(plans):
    """Makes one, always the same."""
    library = convolutions.Library(SimpleNamespace(cuda_stream=1), fused.PLACE)
    tensors = [torch.zeros(1, 8, 5, 5), torch.zeros(8, 8, 3, 3), torch.zeros(1, 8, 5, 5)]
    return partial(convolutions.Convolution, library, *tensors, 1)


ABOUT = "FLOAT 1 (1, 8, 5, 5) (8, 8, 3, 3) (1, 8, 5, 5)"


def kept(home):
    (file,) = (home / "cudnn").glob("*.json")
    return file, json.loads(file.read_text())


def test_plans_are_kept_for_the_next_process(plans, convolution, monkeypatch, tmp_path):
    convolution()
    assert kept(tmp_path)[1] == {ABOUT: "plan 2"}
    timed = len(clock)
    choices(monkeypatch, tmp_path)
    convolution()
    assert plans[1].built == [2, 2]
    assert len(clock) == timed + 1  # it was run once, to see whether it can be
    for other in ({"gpu": "GPU B"}, {"processors": 114}):
        choices(monkeypatch, tmp_path, **other)
        convolution()
    monkeypatch.setattr(sys.modules["cudnn"], "backend_version", lambda: 92000)
    convolution()
    assert len(list((tmp_path / "cudnn").glob("*.json"))) == 4


@pytest.mark.parametrize("damage", ["", "[]", "[" * 100000, json.dumps({ABOUT: 2}), json.dumps({ABOUT: "plan 9"})])
def test_a_file_that_is_none_of_ours_is_written_anew(convolution, monkeypatch, tmp_path, damage):
    convolution()
    file, whole = kept(tmp_path)
    file.write_text(damage)
    choices(monkeypatch, tmp_path)
    convolution()
    assert kept(tmp_path)[1] == whole


def test_what_a_full_gpu_chose_is_not_kept(plans, convolution, monkeypatch, tmp_path):
    reserve, full = convolutions.Library.reserve, [True]

    def reserving(self, size):
        if full and size > 1500:
            raise torch.OutOfMemoryError("CUDA out of memory")
        reserve(self, size)

    monkeypatch.setattr(Plans, "get_workspace_size_plan_at_index", lambda self, plan: 1000 * plan)
    monkeypatch.setattr(
        Plans, "execute_plan_at_index", lambda self, *given, handle: clock.append(self.seconds[given[2]])
    )
    monkeypatch.setattr(convolutions.Library, "reserve", reserving)
    convolution()
    convolution()
    assert [each.built[-1] for each in plans] == [1, 1]
    assert not list((tmp_path / "cudnn").glob("*.json"))
    full.clear()
    choices(monkeypatch, tmp_path)  # the next process
    convolution()
    assert kept(tmp_path)[1] == {ABOUT: "plan 2"}


def test_a_kept_plan_that_does_not_run_here_is_chosen_anew(plans, convolution, monkeypatch, tmp_path, caplog):
    convolution()
    file, _ = kept(tmp_path)
    file.write_text(json.dumps({ABOUT: "plan 0", "another": "plan 7"}))
    choices(monkeypatch, tmp_path)
    with caplog.at_level("INFO"):
        convolution()
    assert "plan 0 for FLOAT" in caplog.text
    assert "does not run here: CUDNN_STATUS_NOT_SUPPORTED" in caplog.text
    assert kept(tmp_path)[1] == {ABOUT: "plan 2", "another": "plan 7"}
    # Where there is no room for it that is no fault of the plan's.
    choices(monkeypatch, tmp_path)
    monkeypatch.setattr(convolutions.Library, "reserve", lambda self, size: torch.zeros(2**60))
    monkeypatch.setattr(Plans, "get_workspace_size_plan_at_index", lambda self, plan: 2**40)
    monkeypatch.setattr(torch, "OutOfMemoryError", RuntimeError)
    with pytest.raises(BackendError, match="cannot be had again"):
        convolution()
    assert kept(tmp_path)[1] == {ABOUT: "plan 2", "another": "plan 7"}


def test_what_another_process_adds_meanwhile_stays(convolution, monkeypatch, tmp_path):
    convolution()
    file, whole = kept(tmp_path)
    file.unlink()
    choices(monkeypatch, tmp_path)
    made = kernels.seconds

    def busy(*given):
        file.write_text(json.dumps({"another": "plan 7"}))
        return made(*given)

    monkeypatch.setattr(kernels, "seconds", busy)
    convolution()
    assert kept(tmp_path)[1] == whole | {"another": "plan 7"}


def test_processes_time_one_after_the_other(plans, convolution, monkeypatch, tmp_path):
    """What another one has found meanwhile is taken."""
    convolution()
    file, whole = kept(tmp_path)
    file.unlink()
    choices(monkeypatch, tmp_path)
    timed = len(clock)
    lock = FileLock(f"{file}.lock")
    lock.acquire()
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(convolution) for _ in range(2)]
        time.sleep(0.3)
        assert len(clock) == timed
        file.write_text(json.dumps(whole))
        lock.release()
        for each in waiting:
            each.result()
    assert len(clock) == timed + 1


def test_nothing_is_kept_of_a_convolution_without_a_plan(convolution, monkeypatch, tmp_path):
    times[:] = [[None, None], [None, 3.0, 1.0, 2.0]]
    with pytest.raises(BackendError, match="none of the plans"):
        convolution()
    assert not list((tmp_path / "cudnn").glob("*.json"))
    convolution()
    assert kept(tmp_path)[1] == {ABOUT: "plan 2"}


def test_a_cache_folder_that_cannot_be_written_is_said_once(plans, convolution, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    choices(monkeypatch, tmp_path / "file")
    with caplog.at_level("INFO"):
        convolution()
        convolution()
        times[:] = [[None, 1.0]]
        monkeypatch.setattr(convolutions._choices, "_known", {})
        convolution()
    assert caplog.text.count("not kept for the next process") == 1
    assert [each.built[-1] for each in plans] == [2, 2, 1]


def test_handles_are_used_again(plans):
    first = convolutions.Library(SimpleNamespace(cuda_stream=1), fused.PLACE)
    handle = first.handle
    assert convolutions.Library(SimpleNamespace(cuda_stream=2), fused.PLACE).handle == handle + 1
    del first
    assert handle in convolutions._free_handles
    assert convolutions.Library(SimpleNamespace(cuda_stream=3), fused.PLACE).handle in (handle, handle + 1)


def test_what_the_library_refuses_is_said(plans, monkeypatch):
    def refuse(self):
        raise RuntimeError("CUDNN_STATUS_BAD_PARAM")

    monkeypatch.setattr(Plans, "validate", refuse, raising=False)
    library = convolutions.Library(SimpleNamespace(cuda_stream=1), fused.PLACE)
    tensors = [torch.zeros(1, 8, 5, 5), torch.zeros(8, 8, 3, 3), torch.zeros(1, 8, 5, 5)]
    with pytest.raises(BackendError, match=r"device cudnn: no convolution \(8, 8, 3, 3\) in FLOAT .*BAD_PARAM"):
        convolutions.Convolution(library, *tensors, 1)


def test_streams_are_nobody_elses(monkeypatch):
    class Stream:
        def __init__(self, non_blocking):
            assert non_blocking
            self.ptr = next(pointers)

    pointers = itertools.count(100)
    cupy = SimpleNamespace(cuda=SimpleNamespace(Device=lambda index: contextlib.nullcontext(), Stream=Stream))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda pointer, place: pointer)
    for name in ("_free_streams", "_cupys_streams"):
        monkeypatch.setattr(_cuda, name, [])

    class Owner:
        pass

    owners = [Owner() for _ in range(40)]
    assert len({kernels.own_stream(owner, torch.device("cuda:0")) for owner in owners}) == 40
    del owners[3]
    assert kernels.own_stream(Owner(), torch.device("cuda:0")) == 103


@pytest.mark.parametrize("fails", [False, True])
def test_the_callers_stream_waits_after_an_error_too(monkeypatch, fails):
    waits, standing = [], []
    caller, own = (SimpleNamespace(device=0, wait_stream=lambda other, name=name: waits.append(name)) for name in "ab")
    monkeypatch.setattr(kernels, "stand_captures", standing.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: caller)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    with pytest.raises(FloatingPointError) if fails else contextlib.nullcontext(), features.on_stream(own):
        if fails:
            raise FloatingPointError
    assert waits == ["b", "a"]
    assert standing == ["0"]  # a thread that only uses what another one has made has to stand captures as well


def test_each_thread_learns_once_to_stand_the_captures_of_others(monkeypatch):
    from cuda.bindings import driver

    modes = []

    def exchange(mode):
        modes.append(mode)
        return driver.CUresult.CUDA_SUCCESS, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL

    monkeypatch.setattr(driver, "cuThreadExchangeStreamCaptureMode", exchange)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)

    def use():
        for place in ("cpu", "cuda:0", "cuda:0"):
            kernels.stand_captures(place)

    for _ in range(2):
        with ThreadPoolExecutor(1) as thread:
            thread.submit(use).result()
    assert modes == 2 * [driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL]


def test_kernels_are_filled_up_with_zeros(net, monkeypatch):
    monkeypatch.setattr(fused, "PLACE", torch.device("cpu"))
    spec = vgg.Spec(32, 32, ("relu2_1",), precision="fp16")
    own = fused.Network(net)
    made = own.parameters(spec)
    assert own.parameters(spec) is made
    first = made["conv1_1.weight"]
    assert own.parameters(replace(spec, layers=("relu3_1",)))["conv3_1.vjp"].shape == (128, 256, 3, 3)
    assert own.parameters(spec)["conv1_1.weight"] is first  # networks of all depths share it
    assert made["conv1_1.weight"].shape == (64, 32)
    assert not made["conv1_1.weight"][:, 27:].any()
    assert made["conv1_1.vjp"].shape == (32, 64)
    assert not made["conv1_1.vjp"][27:].any()
    single = own.parameters(vgg.Spec(32, 32, ("relu2_1",)))
    assert single["conv1_1.weight"].shape == (64, 4, 3, 3)
    assert not single["conv1_1.weight"][:, 3].any()
    exact = single["conv1_1.vjp"]
    assert exact.shape == (8, 64, 3, 3)
    assert not exact[3:].any()
    torch.testing.assert_close(
        made["conv1_1.weight"][:, 3 * 5 + 1].float(), single["conv1_1.weight"][:, 1, 1, 2], rtol=1e-3, atol=1e-6
    )
    torch.testing.assert_close(made["conv1_1.vjp"][3 * 5 + 1].float(), exact[1, :, 1, 2], rtol=1e-3, atol=1e-6)
    assert made["conv2_1.bias"].stride() == (128, 1, 128, 128)
    assert all(each.dtype == torch.float16 for name, each in made.items() if name != "mean")
    np.testing.assert_allclose(made["mean"].numpy(), net.mean, rtol=1e-6)
