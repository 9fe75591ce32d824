"""The CPU's program of Winograd convolutions against float64."""

import contextlib
import os
import platform
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numba
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from engine import Config, Stylizer, winograd
from engine.export import validate, vgg, weights
from engine.kernels import direct, nhwc, program, vector
from engine.kernels import winograd as kernel
from engine.kernels.network import PADDINGS
from engine.kernels.program import Threads

DEFAULT = Config().for_weights("embedded").layers


def error(value, truth):
    return float((value.double() - truth).norm() / truth.norm())


def address(array):
    return array.ctypes.data


def bits_of(values):
    """A bit for each float: whether it is positive."""
    return np.packbits(values.flatten() > 0, bitorder="little")


def convolve(source, weight, bias, bits, target, turned, ending, tiles=24, groups=1, padding=0, halves=False):
    """Every task of one convolution; `weight` (C_out, C_in, 3, 3) is that of the forward direction."""
    height, width, c_in = source.shape
    c_out = target.shape[2]
    u = kernel.transform_kernel(weight)
    u = vector.in_halves(u) if halves else u
    scratch = np.full(kernel.scratch_size(c_in, c_out, tiles), 7, np.float32)
    count = -(-height // 4) * -(-width // 4)
    for first in range(0, count, tiles):
        for group in range(groups):
            kernel.convolve(
                address(source), address(target), height, width, c_in, c_out, address(u), address(bias), address(bits),
                int(turned), ending, int(halves), padding, first, min(tiles, count - first), group, groups,
                address(scratch),
            )  # fmt: skip


def of_a_convolution(size, c_in, c_out):
    """Source, weight, bias, and memory for the results and their bits."""
    generator = np.random.default_rng(0)
    source = generator.standard_normal((*size, c_in), np.float32)
    weight = generator.standard_normal((c_out, c_in, 3, 3), np.float32)
    bias = generator.standard_normal(c_out, np.float32)
    target = np.full((*size, c_out), np.nan, np.float32)
    bits = np.zeros(target.size // 8, np.uint8)
    return source, weight, bias, target, bits


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (4, 4), (5, 6), (13, 22)])
@pytest.mark.parametrize(("c_in", "c_out", "groups"), [(64, 128, 1), (128, 64, 1), (64, 128, 2)])
def test_forward_convolution(size, c_in, c_out, groups):
    source, weight, bias, target, bits = of_a_convolution(size, c_in, c_out)
    convolve(source, weight, bias, bits, target, False, kernel.RELU, groups=groups)
    np.testing.assert_array_equal(bits, bits_of(target))
    x = torch.from_numpy(source).double().permute(2, 0, 1)[None]
    truth = functional.conv2d(x, torch.from_numpy(weight).double(), torch.from_numpy(bias).double(), padding=1).relu()
    assert error(torch.from_numpy(target).permute(2, 0, 1)[None], truth) < 2e-6


@pytest.mark.parametrize("size", [(1, 1), (5, 6), (13, 22)])
@pytest.mark.parametrize(("c_in", "c_out", "groups"), [(64, 128, 2), (128, 64, 1)])
@pytest.mark.parametrize("padding", ["zero", "circular"])
def test_convolution_with_factors_in_bf16(size, c_in, c_out, groups, padding):
    """Against float64, where U and V are rounded by torch as they are here."""
    source, weight, bias, target, bits = of_a_convolution(size, c_in, c_out)
    beyond = PADDINGS.index(padding)
    convolve(source, weight, bias, bits, target, False, kernel.PLAIN, groups=groups, padding=beyond, halves=True)
    found = torch.from_numpy(target).permute(2, 0, 1)[None]

    a, b = kernel._POINT
    points, mixed = (a, -a, b, -b), a * a + b * b
    lines = [[1, 0, -mixed, 0, 1, 0], *([0, -1 / p, -1 / p**2, p, 1, 0] for p in points), [0, 1, 0, -mixed, 0, 1]]
    back = torch.tensor([[1, *(p**i for p in points), int(i == 3)] for i in range(4)], dtype=torch.float64)
    back[1:, 0] = 0
    forth = torch.tensor(lines, dtype=torch.float64)
    tall, broad = (-(-side // 4) * 4 for side in size)
    if padding == "circular":
        x = source[np.arange(-1, tall + 1) % size[0]][:, np.arange(-1, broad + 1) % size[1]]
    else:
        x = np.pad(source, ((1, tall + 1 - size[0]), (1, broad + 1 - size[1]), (0, 0)))
    x = torch.from_numpy(x).double().permute(2, 0, 1)[None]
    tiles = x[0].unfold(1, 6, 4).unfold(2, 6, 4)
    v = torch.einsum("ia,cyxab,jb->ijcyx", forth, tiles, forth).bfloat16().double()
    u = torch.from_numpy(kernel.transform_kernel(weight)).bfloat16().double()
    u = u.transpose(2, 3).reshape(6, 6, c_out, c_in)
    products = torch.einsum("ijoc,ijcyx->ijoyx", u, v)
    truth = torch.einsum("ai,ijoyx,bj->oyaxb", back, products, back).reshape(1, c_out, tall, broad)
    truth = truth[:, :, : size[0], : size[1]]
    plain = functional.conv2d(x, torch.from_numpy(weight).double())[:, :, : size[0], : size[1]]
    assert error(truth, plain) < 2e-2
    # An element of V that fp32 computes to the other side of a middle between two bf16 makes more than fp32 rounds.
    assert error(found, truth) < 5e-4


def test_values_are_rounded_to_bf16_as_torch_does_it():
    values = torch.randn(1 << 12, generator=torch.Generator().manual_seed(0))
    values[:16] = torch.tensor([0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, torch.inf, -torch.inf, torch.nan] * 2)
    source, target = values.numpy(), np.zeros(len(values), np.int16)

    @numba.njit
    def copy(source, target, count):
        vector.copy_halves(source, target, count)

    copy(address(source), address(target), len(source))
    found, truth = torch.from_numpy(target).view(torch.bfloat16), values.bfloat16()
    assert torch.equal(found.isnan(), truth.isnan())
    assert torch.equal(found[~found.isnan()], truth[~truth.isnan()])


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (5, 6), (13, 27)])
@pytest.mark.parametrize(("c_in", "c_out", "groups"), [(64, 128, 2), (256, 64, 1)])
@pytest.mark.parametrize("padding", ["zero", "circular"])
def test_direct_convolution_hardly_rounds(size, c_in, c_out, groups, padding):
    source, weight, bias, target, bits = of_a_convolution(size, c_in, c_out)
    panels, scratch = direct.panels(weight), np.full(direct.scratch_size(c_in), np.nan, np.float32)
    for tile in range(direct.tiles(*size)):
        for group in range(groups):
            direct.convolve(
                address(source), address(target), address(bits), *size, c_in, c_out, address(panels), address(bias),
                PADDINGS.index(padding), np.float32(0), tile, group, groups, address(scratch),
            )  # fmt: skip
    x = torch.from_numpy(source).double().permute(2, 0, 1)[None]
    x = functional.pad(x, (1, 1, 1, 1), "constant" if padding == "zero" else padding)
    truth = functional.conv2d(x, torch.from_numpy(weight).double(), torch.from_numpy(bias).double()).relu()
    assert error(torch.from_numpy(target).permute(2, 0, 1)[None], truth) < 1e-7  # plain fp32 sums: 2e-7 to 5e-7
    np.testing.assert_array_equal(bits, bits_of(target))


@pytest.mark.parametrize("size", [(1, 1), (5, 6), (13, 22)])
@pytest.mark.parametrize("ending", [kernel.MASKED, kernel.MASKED_SUM, kernel.PLAIN])
@pytest.mark.parametrize(("c_in", "c_out", "groups"), [(64, 128, 1), (128, 64, 1), (128, 128, 2)])
def test_vjp_convolution(size, ending, c_in, c_out, groups):
    generator = np.random.default_rng(0)
    cotangent = generator.standard_normal((*size, c_out), np.float32)
    weight = generator.standard_normal((c_out, c_in, 3, 3), np.float32)
    below = np.maximum(generator.standard_normal((*size, c_in), np.float32), 0)
    own = generator.standard_normal((*size, c_in), np.float32)
    target = own.copy()
    convolve(cotangent, weight, own, bits_of(below), target, True, ending, groups=groups)
    x = torch.zeros(1, c_in, *size, dtype=torch.float64, requires_grad=True)
    result = functional.conv2d(x, torch.from_numpy(weight).double(), padding=1)
    (truth,) = torch.autograd.grad(result, x, torch.from_numpy(cotangent).double().permute(2, 0, 1)[None])
    truth = truth[0].permute(1, 2, 0)
    if ending == kernel.MASKED_SUM:
        truth = truth + torch.from_numpy(own).double()
    if ending != kernel.PLAIN:
        truth = truth * torch.from_numpy(below > 0)
    assert error(torch.from_numpy(target), truth) < 2e-6


def test_the_transform_turns_with_the_kernel():
    """The U of a turned kernel is a permutation of U with factors that are powers of two: nothing is stored twice."""
    weight = np.random.default_rng(0).standard_normal((64, 32, 3, 3), np.float32)
    u = kernel.transform_kernel(weight)
    turned = kernel.transform_kernel(weight[:, :, ::-1, ::-1].copy())
    for i, (line, factor) in enumerate(kernel._FLIP):
        for j, (column, other) in enumerate(kernel._FLIP):
            np.testing.assert_allclose(turned[6 * i + j], factor * other * u[6 * line + column], atol=1e-6)


@pytest.fixture(scope="module")
def net():
    class Quiet(weights.Weights):
        """Hypothesis prints a failed example without all its numbers."""

        def _repr_pretty_(self, printer, cycle):
            printer.text(self.name)

    found = weights.load("embedded", ("relu5_4",))
    return Quiet(found.name, found.parameters, found.mean, found.std)


@pytest.fixture(scope="module")
def network(net):
    return winograd.Network(net, ("relu5_4",), 2, with_max=True)


@pytest.fixture(scope="module")
def low_network(net):
    return winograd.Network(net, ("relu5_4",), 2, precision="bf16", with_max=True)


def every_relu(spec, network, image):
    """The ReLU outputs down to the deepest of the spec: a program that keeps all of them."""
    every = replace(spec, layers=tuple(spec.shapes))
    found = winograd.Features(every, network, forward_only=True)
    with found.use():
        found.image.copy_(image)
        found.forward()
    return found.features


def forward_and_vjp(spec, network, seed=0):
    """Features, cotangents and gradient of one program; the memory is used once before, so that it holds leftovers."""
    found = winograd.Features(spec, network)
    with found.use():
        found.image.fill_(0.9)
        found.forward()
        found.vjp(lambda layers: [found.cotangents[layer].fill_(1e3) for layer in layers])
        found.image.copy_(validate.picture(spec.height, spec.width, seed))
        read = every_relu(spec, network, found.image)
        found.forward()
        assert list(found.features) == list(spec.layers)
        assert all(torch.equal(found.features[name], read[name]) for name in spec.layers)
        generator = torch.Generator().manual_seed(seed)
        cotangents = {}
        for name, tensor in found.cotangents.items():
            cotangents[name] = torch.randn(tensor.shape, generator=generator)

        def write(layers):
            for layer in layers:  # what the losses read is still there
                assert torch.equal(found.features[layer], read[layer])
                found.cotangents[layer].copy_(cotangents[layer])

        found.vjp(write)
        return found.image.clone(), read, cotangents, found.gradient.clone()


@settings(max_examples=15)
@given(
    height=st.integers(32, 75),
    width=st.integers(32, 75),
    layers=st.sets(st.sampled_from(vgg.LOSS_LAYERS), min_size=1, max_size=5),
    pooling=st.sampled_from(["avg", "max"]),
)
@example(height=33, width=40, layers={"relu5_4"}, pooling="avg")
def test_any_size_and_any_layers(net, network, height, width, layers, pooling):
    spec = vgg.Spec(height, width, tuple(layer for layer in vgg.LOSS_LAYERS if layer in layers), pooling)
    image, features, cotangents, gradient = forward_and_vjp(spec, network)
    plain = net.module(spec.layers, pooling, torch.float32)(image)
    bound, share = (5e-6, 2) if pooling == "avg" else (3e-7, 0.5)
    for layer, truth in net.module(spec.layers, pooling, torch.float64)(image.double()).items():
        # Few values are left of a small picture in relu5_4, and any fp32 rounds them by more than the usual bound.
        assert error(features[layer], truth) < max(bound, share * error(plain[layer], truth))
    relus = {name: value.contiguous().numpy() for name, value in features.items()}
    exact = {name: value.double() for name, value in cotangents.items()}
    assert error(gradient, validate.linear_piece_vjp(spec, net, relus, exact)) < 5e-6


@settings(max_examples=8)
@given(
    height=st.integers(32, 75),
    width=st.integers(32, 75),
    layers=st.sets(st.sampled_from(vgg.LOSS_LAYERS), min_size=1, max_size=5),
    pooling=st.sampled_from(["avg", "max"]),
    padding=st.sampled_from(["zero", "replicate"]),
)
@example(height=33, width=32, layers={"relu5_4"}, pooling="avg", padding="zero")
@example(height=33, width=40, layers={"relu4_2", "relu5_1"}, pooling="avg", padding="replicate")
@example(height=33, width=40, layers={"relu4_2", "relu5_1"}, pooling="max", padding="replicate")
def test_any_size_and_any_layers_in_bf16(net, low_network, height, width, layers, pooling, padding):
    """Features within what bf16 rounds; before what is in bf16, and with max pooling everywhere, as in fp32."""
    layers = tuple(layer for layer in vgg.LOSS_LAYERS if layer in layers)
    deep = vgg.CONVS[-3:]  # of which few values are left: deeper than any layer of a default run
    spec = vgg.Spec(height, width, layers, pooling, "bf16", padding=padding)
    image, features, cotangents, gradient = forward_and_vjp(spec, low_network)
    for layer, truth in net.module(spec.layers, pooling, torch.float64, padding)(image.double()).items():
        exact = pooling == "max" or layer[4] in "12"
        assert error(features[layer], truth) < (2e-5 if exact else 0.15 if vgg.cut((layer,))[-1] in deep else 3e-2)
    relus = {name: value.contiguous().numpy() for name, value in features.items()}
    exact = {name: value.double() for name, value in cotangents.items()}
    found = error(gradient, validate.linear_piece_vjp(spec, net, relus, exact))
    alone, deepest = len(vgg.cut(layers)) == 1, vgg.cut(layers)[-1]  # the layer at the pixels is in fp32
    assert found < (5e-6 if alone else 6e-2 if deepest in deep else 3e-2)


EDGES = [("reflect", 33, 46), ("replicate", 47, 32), ("reflect", 36, 37), ("circular", 48, 32), ("circular", 32, 80)]


@pytest.mark.parametrize(("padding", "height", "width"), EDGES)
@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_what_lies_beyond_the_border(net, network, padding, height, width, pooling):
    """Against float64 autograd; and it is not what zeros give."""
    spec = vgg.Spec(height, width, ("relu1_1", "relu3_1", "relu5_2"), pooling, padding=padding)
    image, features, cotangents, gradient = forward_and_vjp(spec, network)
    for layer, truth in net.module(spec.layers, pooling, torch.float64, padding)(image.double()).items():
        assert error(features[layer], truth) < 5e-6
    relus = {name: value.contiguous().numpy() for name, value in features.items()}
    exact = {name: value.double() for name, value in cotangents.items()}
    truth = validate.linear_piece_vjp(spec, net, relus, exact)
    assert error(gradient, truth) < 5e-6
    zeros = validate.linear_piece_vjp(vgg.Spec(height, width, spec.layers, pooling), net, relus, exact)
    assert error(zeros, truth) > 1e-3


@pytest.mark.parametrize("largest", [0, 1])
@pytest.mark.parametrize("size", [(4, 6), (5, 7), (3, 2)])
@pytest.mark.parametrize("with_own", [False, True])
def test_pooling_and_its_vjp(largest, size, with_own):
    """Values from a handful of numbers, so that ties are common: the first of them takes all, as in torch."""
    generator = np.random.default_rng(0)
    a = generator.integers(0, 3, (*size, 64)).astype(np.float32)
    own = generator.standard_normal(a.shape, np.float32)
    pooled = np.empty((size[0] // 2, size[1] // 2, 64), np.float32)
    cotangent = generator.standard_normal(pooled.shape, np.float32)
    x = torch.from_numpy(a.copy()).permute(2, 0, 1)[None].requires_grad_()
    positive = x.relu()  # relu's own gradient at zero is zero, as in the network
    truth = (functional.max_pool2d if largest else functional.avg_pool2d)(positive, 2)
    value = (truth * torch.from_numpy(cotangent).permute(2, 0, 1)).sum()
    if with_own:
        value = value + (positive * torch.from_numpy(own).permute(2, 0, 1)).sum()
    (gradient,) = torch.autograd.grad(value, x)
    winners, target = np.zeros(a.size // 8, np.uint8), own.copy()
    for row in range(size[0] // 2):
        nhwc.pool(address(a), address(pooled), address(winners), *size, 64, largest, row)
    np.testing.assert_allclose(pooled, truth[0].detach().permute(1, 2, 0).numpy(), rtol=1e-6)
    scratch = np.full(64, np.nan, np.float32)
    bits = bits_of(a)
    for row in range(-(-size[0] // 2)):
        marks = address(bits), address(winners)
        nhwc.unpool(
            address(cotangent), address(target), *marks, int(with_own), *size, 64, largest, row, address(scratch)
        )
    np.testing.assert_allclose(target, gradient[0].permute(1, 2, 0).numpy(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("positions", [1, 5, 48, 257, 3000])
@pytest.mark.parametrize("channels", [64, 128, 256])
@pytest.mark.parametrize("threads", [1, 3])
def test_gram(positions, channels, threads):
    features = torch.randn(positions, channels, generator=torch.Generator().manual_seed(0)).T
    out = torch.full((channels, channels), torch.nan)
    assert Threads(threads).gram(features, out) is out
    assert error(out, features.double() @ features.double().T / positions) < 1e-6
    assert torch.equal(out, out.T)


@pytest.mark.parametrize("positions", [1, 300, 5000])
def test_content_loss_and_gradient(positions):
    generator = torch.Generator().manual_seed(0)
    features, target = (torch.randn(positions, 64, generator=generator).T for _ in range(2))
    loss, gradient = Threads(2).content_loss(features, target), torch.full((positions, 64), torch.nan).T
    Threads(2).content_gradient(features, target, 0.5, gradient)
    assert torch.equal(gradient, 0.5 * (features - target))
    assert float(loss) == pytest.approx(float((features.double() - target.double()).square().mean()), rel=1e-6)


@pytest.mark.parametrize("positions", [1, 5, 48, 257])
@pytest.mark.parametrize("channels", [64, 256])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("halves", [False, True])
def test_style_gradient(positions, channels, accumulate, halves):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(positions, channels, generator=generator).T
    matrix = torch.randn(channels, channels, generator=generator)
    matrix = matrix + matrix.T
    guarded = torch.full((positions + 1, channels), 3.0)
    if not accumulate:
        guarded[:positions] = torch.nan
    threads = Threads(2, halves=halves)
    threads.style_gradient(features, matrix, 0.5, guarded[:positions].T, accumulate)
    factors = [each.bfloat16().double() if halves else each.double() for each in (0.5 * matrix, features)]
    truth = factors[0] @ factors[1] + (3 if accumulate else 0)
    assert error(guarded[:positions].T, truth) < 1e-6
    assert (guarded[positions] == 3).all()
    if not accumulate:
        threads.style_gradient(features, matrix, 0.5, features, False)  # in place
        assert torch.equal(features, guarded[:positions].T)


@pytest.mark.parametrize(("pooling", "precision"), [("avg", "fp32"), ("max", "fp32"), ("avg", "bf16"), ("max", "bf16")])
def test_the_number_of_threads_does_not_change_a_bit(net, pooling, precision):
    spec, with_max = vgg.Spec(61, 90, DEFAULT, pooling, precision), pooling == "max"
    networks = [
        winograd.Network(net, DEFAULT, threads, precision=precision, with_max=with_max) for threads in (1, 2, 5)
    ]
    results = [forward_and_vjp(spec, network) for network in networks]
    for other in results[1:]:
        assert torch.equal(results[0][3], other[3])
        assert all(torch.equal(results[0][1][name], value) for name, value in other[1].items())


def test_forward_only_gives_the_same_features(network):
    spec = vgg.Spec(50, 41, ("relu1_1", "relu3_1", "relu4_2"))
    both, only = winograd.Features(spec, network), winograd.Features(spec, network, forward_only=True)
    for found in (both, only):
        found.image.copy_(validate.picture(50, 41, 3))
        found.forward()
    assert list(only.features) == list(spec.layers)
    assert all(torch.equal(only.features[layer], both.features[layer]) for layer in spec.layers)


@given(
    uses=st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=3), min_size=1, max_size=12),
    sizes=st.lists(st.integers(1, 50), min_size=8, max_size=8),
    kept=st.sets(st.sampled_from("abcdefgh")),
)
def test_buffers_in_use_together_have_memory_of_their_own(uses, sizes, kept):
    steps = [dict(zip(("source", "target", "bits"), names, strict=False)) for names in uses]
    sizes = dict(zip("abcdefgh", sizes, strict=True))
    places, floats = program.layout(steps, sizes, kept)
    assert set(places) == {name for names in uses for name in names}
    owners = np.full(floats, "", object)
    last = {name: i for i, names in enumerate(uses) for name in names}
    for i, names in enumerate(uses):
        for name in names:
            own = owners[places[name] : places[name] + sizes[name]]
            assert len(own) == sizes[name]
            assert all(other in ("", name) or (last[other] < i and other not in kept) for other in own)
            own[:] = name
    together = [sum(sizes[n] for n in places if n in names) for names in uses]
    assert max(together) <= floats <= sum(sizes[name] for name in places)


def test_the_memory_of_a_default_run(network):
    """What the losses read of all layers, and two more activations at once: 1.2 times the former, where all are 1.9."""
    spec = vgg.Spec(96, 128, DEFAULT)
    found = winograd.Features(spec, network)
    read = sum(found.features[layer].numel() for layer in DEFAULT)
    assert found._memory.numel() < 1.3 * read


def test_scratch_rows_cover_the_rows_that_multiply_takes():
    assert kernel.TILES % vector.ROWS == kernel.TILES % vector.SQUARE == 0


def test_without_a_folder_for_its_cache_the_program_is_compiled_anew(monkeypatch, caplog):
    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])
    with caplog.at_level("INFO", logger="engine"):
        entry = program._compiled.__wrapped__()
    assert "$NUMBA_CACHE_DIR" in caplog.text
    assert isinstance(entry._cache, numba.core.caching.NullCache)


@pytest.mark.parametrize("error", [EOFError("Ran out of input"), OSError(28, "No space left on device")])
def test_a_damaged_or_full_cache_of_machine_code_stops_nobody(monkeypatch, caplog, error):
    def broken(*arguments):
        raise error

    monkeypatch.setattr(numba.core.caching.IndexDataCacheFile, "load", broken)
    with caplog.at_level("INFO", logger="engine"):
        entry = program._compiled.__wrapped__()
    assert str(error) in caplog.text
    assert isinstance(entry._cache, numba.core.caching.NullCache)


def test_a_helper_that_never_begins_is_not_waited_for():
    """It may stand behind another caller's."""
    threads, gate, features = program.Threads(2), threading.Event(), torch.randn(1000, 64).T
    expected = threads.gram(features, torch.empty(64, 64))
    busy = [threads._others.submit(gate.wait) for _ in range(threads._others._max_workers)]
    assert torch.equal(threads.gram(features, torch.empty(64, 64)), expected)
    gate.set()
    assert all(each.result(10) for each in busy)


def test_callers_at_the_same_time_have_helpers_of_their_own(monkeypatch):
    monkeypatch.setattr(program.torch, "get_num_threads", lambda: 8)
    assert program.Threads(4)._others._max_workers == 7  # two of them keep eight processors busy


def test_a_forked_process_goes_on_alone():
    """None of the threads of its parent is with it."""
    code = """if True:
        import os, torch
        from engine.kernels.program import Threads
        torch.set_num_threads(1)
        threads, features = Threads(2), torch.randn(1000, 64).T
        expected = threads.gram(features, torch.empty(64, 64))
        if os.fork() == 0:
            same = all(torch.equal(threads.gram(features, torch.empty(64, 64)), expected) for _ in range(3))
            os._exit(0 if same else 1)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
    """
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_an_interrupted_program_leaves_no_thread_at_work(monkeypatch):
    """Ctrl-C before our own share: the others work on memory that the caller may give back."""
    working = []

    def work(table, taken, done, place):
        if place == 1:
            raise KeyboardInterrupt
        working.append(place)
        time.sleep(0.1)
        working.remove(place)

    monkeypatch.setattr(program, "_entry", lambda: work)
    scratch = [SimpleNamespace(data_ptr=lambda place=place: place) for place in (1, 2)]
    with pytest.raises(KeyboardInterrupt):
        program.Threads(2).run(np.zeros(1), scratch)
    assert not working


def test_no_thread_works_on_after_a_call(pictures):
    stylizer = Stylizer(weights="embedded", device="cpu", threads=2)
    stylizer(pictures["content"], pictures["style"], Config(size=64, iterations=3, scales=1))
    time.sleep(0.2)

    def worked():
        """Seconds of processor time of our threads."""
        ours = [each.native_id for each in threading.enumerate() if each.name.startswith("stylize")]
        assert ours
        stats = [Path(f"/proc/self/task/{each}/stat").read_text().rsplit(")", 1)[1].split() for each in ours]
        return sum(int(each[11]) + int(each[12]) for each in stats) / os.sysconf("SC_CLK_TCK")

    before = worked()
    time.sleep(0.5)
    assert worked() - before < 0.05


def test_openmp_has_one_thread_while_the_program_runs(monkeypatch, stylizer, pictures):
    """Its own would wait for each other beside those of the program."""
    limits = []

    class Controller:
        @contextlib.contextmanager
        def limit(self, **given):
            limits.append(given)
            yield
            limits.append("over")

    monkeypatch.setattr(winograd, "_openmp", Controller)
    stylizer(pictures["content"], pictures["style"], Config(size=48, iterations=1, scales=1))
    assert limits[:2] == [{"limits": 1, "user_api": "openmp"}, "over"]


def test_a_stylizer_that_is_let_go_ends_its_threads(pictures):
    import gc

    gc.collect()  # those of other tests
    time.sleep(0.2)
    before = set(threading.enumerate())
    stylizer = Stylizer(weights="embedded", device="cpu", threads=3)
    stylizer(pictures["content"], pictures["style"], Config(size=48, iterations=1, scales=1))
    assert set(threading.enumerate()) - before
    del stylizer
    gc.collect()
    deadline = time.monotonic() + 10  # on a busy machine
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not set(threading.enumerate()) - before


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="compiles for another x86-64")
def test_a_processor_without_avx512_computes_the_same(tmp_path):
    """In parts that fit into its registers, which changes no sum: bit for bit, in either pooling and precision.

    Products of bf16 are added up step by step there, as the instructions of newer processors add them.
    """
    code = (
        "import sys, numpy as np\n"
        "from engine import Config, Stylizer\n"
        "from engine.kernels import vector\n"
        "pictures = [np.random.default_rng(i).random((40, 56, 3)).astype(np.float32) for i in range(3)]\n"
        "cases = [('fp32', 'avg'), ('fp32', 'max'), ('bf16', 'avg'), ('bf16', 'max')]\n"
        "stylizers = {each: Stylizer('embedded', 'cpu', each, threads=1) for each in ('fp32', 'bf16')}\n"
        "found = [stylizers[each].evaluate(*pictures, Config(pooling=pooling)).gradient for each, pooling in cases]\n"
        "parts = [np.full_like(found[0], each) for each in (vector._STRIP, vector.HAS_HALVES)]\n"
        "np.save(sys.argv[1], np.stack([*found, *parts]))\n"
    )
    features = "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+popcnt,+sse,+sse2,+sse3,+sse4.1,+sse4.2,+ssse3"
    other = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    results = []
    for environment in ({}, other):
        path = tmp_path / "found.npy"
        subprocess.run([sys.executable, "-c", code, str(path)], check=True, env={**os.environ, **environment})
        results.append(np.load(path))
    assert (results[1][4].max(), results[1][5].max()) == (1, 0)
    np.testing.assert_array_equal(results[0][:4], results[1][:4])
    assert all((results[0][i] != results[0][i + 2]).any() for i in range(2))
