"""The CUDA sources without a GPU: compiled by NVRTC for every architecture, and executed on the CPU (`cuda_host`).

The classes of `engine.kernels` run unchanged, with `launch` replaced; so what they pass is tested as well.
"""

import contextlib
import ctypes
import functools
import gc
import itertools
import re
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from blas import Cublas
from cuda_host import Shifted

from engine import kernels
from engine.kernels import _blas, _cuda, _graphs, lbfgs, network, summed
from engine.kernels import layers as layers_module
from engine.kernels.content import content_gradient_reference, content_loss_reference
from engine.kernels.gram import gram_reference
from engine.kernels.layers import Layers, Term
from engine.kernels.pixels import FORMS, Pixels, total_variation_reference
from engine.kernels.style import style_gradient_reference, style_loss_reference
from engine.kernels.summed import Blas, Layer, Summed
from engine.kernels.temporal import Temporal, temporal_reference
from engine.kernels.trail import Trail
from engine.kernels.wasserstein import Wasserstein, exact_mean

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
ROUNDING = {SINGLE: 1e-6, HALF: 5e-4, BRAIN: 4e-3}  # of one number, relative
# Two blocks of 256 threads have 128 registers a thread and, on the smallest chip, 48 kB of static shared memory.
REGISTERS, SHARED, SPILLS = 128, 48 << 10, {75: 200, 80: 64, 86: 64, 89: 64, 100: 32, 120: 32}


def include_folder() -> str:
    import nvidia

    for root in nvidia.__path__:
        for found in Path(root).glob("*/include/cuda_fp16.h"):
            return str(found.parent)
    pytest.fail("cuda_fp16.h is missing: the torch wheel brings it with nvidia-cuda-runtime")


def test_every_source_is_compiled_here():
    files = {
        path.name.removesuffix(".cu") for path in resources.files("engine.kernels").iterdir() if ".cu" in path.name[-3:]
    }
    assert files == set(_cuda.NAMES)
    for name in _cuda.NAMES:
        declared = set(re.findall(r"__global__ void (?:__launch_bounds__\(.*?\) )?(\w+)\(", _cuda.text(f"{name}.cu")))
        assert declared == {expression.split("<")[0] for expression in _cuda.expressions(name)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_within_its_budget(architecture):
    with ThreadPoolExecutor() as compilers:
        for _ in compilers.map(lambda name: compile_within_budget(name, architecture), _cuda.NAMES):
            pass


def compile_within_budget(name, architecture):
    from cuda.bindings import nvrtc

    def call(result, *values):
        assert result == nvrtc.nvrtcResult.NVRTC_SUCCESS, result
        return values[0] if values else None

    program = call(*nvrtc.nvrtcCreateProgram(_cuda.text(f"{name}.cu").encode(), f"{name}.cu".encode(), 0, [], []))
    for expression in _cuda.expressions(name):
        call(*nvrtc.nvrtcAddNameExpression(program, expression.encode()))
    options = [f"-arch=sm_{architecture}", "-std=c++17", f"-I{include_folder()}", "--ptxas-options=-v"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    log = b" " * call(*nvrtc.nvrtcGetProgramLogSize(program))
    nvrtc.nvrtcGetProgramLog(program, log)
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    assert b"warning" not in log, log.decode()
    assert call(*nvrtc.nvrtcGetCUBINSize(program)) > 1000
    pattern = r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?"
    used = re.findall(pattern, log.decode(), re.DOTALL)
    assert len(used) == len(_cuda.expressions(name))
    for kernel, spills, registers, shared in used:
        assert int(registers) <= REGISTERS, kernel
        assert int(shared or 0) <= SHARED, kernel
        assert "lbfgs_dots" not in kernel or int(shared) + 1024 <= lbfgs._SHARED
        assert int(spills) <= SPILLS.get(architecture, 0), kernel


@pytest.fixture
def cublas(host, monkeypatch):
    """cuBLAS is taken to be faster."""
    monkeypatch.setattr(_graphs, "fastest", lambda ways, device, key: list(ways)[-1])


def random(*shape, seed=0, dtype=SINGLE):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def features(channels, positions, seed=0, dtype=SINGLE, nhwc=False):
    found = random(channels, positions, seed=seed, dtype=dtype)
    return found.T.contiguous().T if nhwc else found


def numbers(tensor):
    return tensor.double().numpy()


def error(value, truth):
    return np.linalg.norm(numbers(value) - truth) / max(np.linalg.norm(truth), 1e-30)


SHAPES = [(1, 1), (3, 5), (65, 70), (130, 33), (136, 200), (64, 1000)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [SINGLE, HALF, BRAIN])
@pytest.mark.parametrize("nhwc", [False, True])
def test_gram(host, shape, dtype, nhwc):
    given = features(*shape, dtype=dtype, nhwc=nhwc)
    found = kernels.gram(given)
    assert error(found, gram_reference(numbers(given))) < 1e-6
    assert torch.equal(found, found.T)


@pytest.mark.parametrize(
    ("channels", "positions", "blocks", "dtype"),
    [(64, 1, 1, HALF), (64, 2500, 1, BRAIN), (64, 2688, 2, HALF), (128, 63, 1, BRAIN), (128, 4160, 2, HALF)],
)
def test_gram_of_few_channels(host, channels, positions, blocks, dtype):
    """Some, none, all positions in the turns of a block; several blocks; most turns; nothing behind is read."""
    given = torch.full((positions + 200, channels), torch.nan, dtype=dtype)[:positions].T
    given.copy_(features(channels, positions, dtype=dtype))
    layers = Layers({"": Layer(given, None, None, torch.zeros(channels, channels))}, 0, 1)
    layers.losses()
    found = layers._differences[0]
    assert len(layers._partial[0]) == blocks
    assert error(found, gram_reference(numbers(given))) < 1e-5  # up to 2048 numbers are added up in fp32 one by one
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("positions", [1, 63, 168, 2688, 10880, 10375, 174592, 10**8])
def test_shares_of_the_positions(positions):
    """Not too long, even of the largest pictures; of equal length where that is possible."""
    wanted = layers_module._wanted([(256, positions)], 128, 132)
    share = layers_module._share(positions, wanted)
    assert share <= layers_module.LONGEST
    if positions in (168, 2688):
        assert positions % share == 0
    narrow = layers_module._share_narrow(64, positions, 132)
    assert layers_module._LEAST <= narrow * 64 // layers_module._ELEMENTS <= layers_module._MOST


@pytest.mark.parametrize("regions", [1, 2])
def test_memory_of_products_is_what_they_take(host, regions):
    shapes = [(64, 5000), (128, 1300), (256, 2000), (512, 40)]
    layers = {
        f"{c} {region}": Layer(features(c, m, dtype=HALF, nhwc=True), None, None, torch.zeros(c, c))
        for region in range(regions)
        for c, m in shapes
    }
    taken = sum(each.nbytes for each in Layers(layers, 0, 1)._partial)
    assert layers_module.memory_of_products(shapes * regions, 3) == taken


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("channels", [2, 64])
def test_gram_of_the_loudest_features_is_finite(host, channels, dtype):
    loudest = 65504.0 if dtype == HALF else 1e18
    given = torch.full((channels, 300), loudest, dtype=dtype)
    for each in (given, given.T.contiguous().T):
        assert torch.isfinite(kernels.gram(each)).all()


STYLE, CONTENT, BOTH = (True, False), (False, True), (True, True)
GROUPS = {
    "one pixel": {(1, 1): BOTH},
    "odd": {(3, 5): STYLE, (65, 71): BOTH, (5, 9001): CONTENT},
    "tiles": {(64, 300): STYLE, (128, 128): BOTH, (136, 8): STYLE, (200, 264): CONTENT},
}
LAST = {
    "style last": {(64, 300): CONTENT, (128, 50): BOTH, (136, 40): STYLE},
    "both last": {(64, 300): STYLE, (40, 72): BOTH},
    "content last": {(64, 300): STYLE, (200, 64): CONTENT},
}
WEIGHTS = (0.7, 30.0)  # content, style
OWN = ((1.0, 0.5), (3.0, 2.0), (0.2, 1.0), (1.0, 1.0))  # of each layer


def group(name, dtype, nhwc, ahead=False):
    """The `Layers` of a group, and what each is made of in float64."""
    layers, truth = {}, []
    for i, (shape, (style, content)) in enumerate((GROUPS | LAST)[name].items()):
        f, p, a = (features(*shape, seed=3 * i + k, dtype=dtype, nhwc=nhwc) for k in range(3))
        target = torch.from_numpy(gram_reference(numbers(a))).float() if style else None
        layers[str(i)] = Layer(f, torch.full_like(f, torch.nan), p if content else None, target, *OWN[i])
        truth.append((numbers(f), numbers(p) if content else None, numbers(target) if style else None))
    return Layers(layers, *WEIGHTS, ahead=ahead), list(layers.values()), truth


@pytest.mark.parametrize("dtype", [SINGLE, HALF, BRAIN])
@pytest.mark.parametrize("nhwc", [False, True])
def test_gram_matrices_by_cublas_give_the_same_losses(cublas, dtype, nhwc):
    """With whole shares and a rest, next to a layer that has no style."""
    layers, *_ = group("odd", dtype, nhwc)
    layers.losses()
    found = layers.terms.clone()
    layers.ways()["Gram matrices by our kernels"]()
    torch.testing.assert_close(found, layers.terms, rtol=1e-5, atol=0)
    assert len(layers._partial[1]) == -(-71 // layers._part[1]) > 1


@pytest.mark.parametrize("way", ["our kernels", "cuBLAS"])
@pytest.mark.parametrize(("dtype", "nhwc"), [(SINGLE, False), (HALF, True)])
def test_losses_measured_in_parts_are_the_same(host, monkeypatch, way, dtype, nhwc):
    """As a network reads them, with style layers in both parts."""
    layers, *_ = group("tiles", dtype, nhwc)
    (layers._way,) = (each for each in layers.ways() if way in each)
    layers.losses()
    expected = [layers.terms.clone(), layers._factors.clone(), layers._sums.clone()]
    for memory in (
        layers.terms,
        layers._factors,
        layers._sums,
        *filter(lambda each: each is not None, layers._partial),
    ):
        memory.fill_(torch.nan)
    layers.measure(("0", "1"))
    layers.measure(("2", "3"))
    layers.conclude()
    assert all(map(torch.equal, expected, (layers.terms, layers._factors, layers._sums)))


@pytest.mark.parametrize("name", LAST)
@pytest.mark.parametrize(("dtype", "loudness", "first"), [(HALF, 1, True), (HALF, 1e-4, False), (BRAIN, 1e4, True)])
def test_the_cotangent_of_the_last_layer_may_be_ahead(cublas, name, dtype, loudness, first):
    """It is that of the layer alone, whether its factors are found before those of all or after, as on a GPU."""
    _, given, _ = group(name, dtype, True)
    given[-1] = replace(given[-1], style_weight=loudness, content_weight=loudness)

    def made(some, ahead=False):
        own = {str(i): replace(layer, cotangent=torch.full_like(layer.features, torch.nan)) for i, layer in some}
        return Layers(own, *WEIGHTS, ahead=ahead), [layer.cotangent for layer in own.values()]

    every = list(enumerate(given))
    (plain, truth), (alone, (wanted,)), (layers, found) = made(every), made(every[-1:]), made(every, True)
    for each in (plain, alone):
        each.losses()
        each._gradients_by_cublas()
    layers.measure(layers.names)
    steps = [layers.conclude_last, lambda: layers.gradients(layers.names[-1:])]
    others = [layers.conclude, lambda: layers.gradients(layers.names[:-1])]
    for step in steps + others if first else others + steps:
        step()
    assert torch.equal(layers.terms, plain.terms)
    assert torch.equal(layers.scale, plain.scale)
    assert float(layers.ratio) == float(plain.scale / alone.scale) <= 1
    assert all(map(torch.equal, found, [*truth[:-1], wanted]))
    assert (
        error(layers.ratio * found[-1].float(), numbers(truth[-1])) < 3e-3
    )  # at the scale of all faint ones lose digits
    last = layers.term(layers.names[-1])
    assert torch.equal(last.factors, alone.term(layers.names[-1]).factors)
    assert last.lifted is None or torch.equal(last.lifted, plain._lifted[-1])


@pytest.mark.parametrize("name", ["style last", "content last"])
def test_a_last_layer_without_a_loss_left_has_a_ratio(host, name):
    """One that has arrived at its target has no cotangent, whatever its scale and its weight."""
    _, given, _ = group(name, HALF, True)
    given[-1] = replace(given[-1], content_weight=1e12, style_weight=1e12)
    given[-1].features.zero_()
    for target in (given[-1].target, given[-1].content):
        if target is not None:
            target.zero_()
    layers = Layers({str(i): layer for i, layer in enumerate(given)}, *WEIGHTS, ahead=True)
    layers.measure(layers.names)
    layers.conclude_last()
    layers.gradients(layers.names[-1:])
    layers.conclude()
    assert not given[-1].cotangent.any()
    assert 0 < float(layers.ratio) < 1e-20
    assert layers.terms.isfinite().all()


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("nhwc", [False, True])
def test_cotangents_by_cublas_are_the_same(cublas, name, dtype, nhwc):
    layers, given, _ = group(name, dtype, nhwc)
    layers.losses()
    layers.gradients()
    found = [layer.cotangent.clone() for layer in given]
    for layer in given:
        layer.cotangent.fill_(torch.nan)
    layers._gradients_by_kernel()
    for one, layer in zip(found, given, strict=True):
        assert error(one, numbers(layer.cotangent)) < max(1e-5, 2 * ROUNDING[dtype])


def test_gram_matrices_by_cublas_do_not_overflow(cublas):
    loud = torch.full((2, 300), 65504.0, dtype=HALF)
    layers = Layers({"only": Layer(loud, None, None, torch.zeros(2, 2))}, 0, 1)
    layers.losses()
    assert float(layers._differences[0][0, 1]) == pytest.approx(65504.0**2, rel=1e-5)


def test_cublas_tells_what_it_refuses(host):
    given = features(3, 5)
    _blas._library().workspace = None
    with pytest.raises(RuntimeError, match="cublasGemmStridedBatchedEx: status 1"):
        _blas.products(given, 5, torch.zeros(1, 3, 3))


def test_each_stream_has_a_handle_of_its_own(monkeypatch):
    library, streams = Cublas(), iter((7, 9, 7))
    monkeypatch.setattr(_blas, "_library", lambda: library)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=next(streams)))
    _blas._of_stream.cache_clear()
    one, other, again = (_blas._handle(torch.device("cpu")) for _ in range(3))
    assert one is again is not other
    assert library.streams == [7, 9]
    _blas._of_stream.cache_clear()


@pytest.mark.parametrize("dtype", [SINGLE, HALF, BRAIN])
@pytest.mark.parametrize("nhwc", [False, True])
@pytest.mark.parametrize("share", [8, 16, 40])
def test_products_by_cublas(host, dtype, nhwc, share):
    """Whole shares and a rest; whole ones alone; one that is not whole. Nothing else is written."""
    given = features(24, 32 if share == 16 else 29, dtype=dtype, nhwc=nhwc)
    shares = -(-given.shape[1] // share)
    out = torch.full((shares + 1, 24, 24), torch.nan)
    _blas.products(given, share, out[:-1])
    for i in range(shares):
        part = numbers(given)[:, i * share : (i + 1) * share]
        assert error(out[i], part @ part.T) < 1e-6
    assert out[-1].isnan().all()


def test_the_faster_way_is_chosen_once(monkeypatch, caplog):
    """The first unless another one is clearly faster; what fails is out and said."""

    def broken():
        raise OSError("not here")

    seconds = {"a": 2.0, "b": 1.9, "c": 1.0, "d": 9.0}
    ways = {name: (lambda name=name: name) for name in seconds} | {"e": broken}
    timed = []
    monkeypatch.setattr(_graphs, "seconds", lambda way, device: (timed.append(way), seconds[way()])[1])
    monkeypatch.setattr(_graphs, "_fastest", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU A")
    with caplog.at_level("INFO", logger="engine"):
        assert _graphs.fastest(ways, torch.device("cuda"), "shapes") == "c"
    assert "e: not possible here: not here" in caplog.text
    assert _graphs.fastest(ways, torch.device("cuda"), "shapes") == "c"
    assert len(timed) == 5
    assert _graphs.fastest({"a": ways["a"], "b": ways["b"]}, torch.device("cuda"), "shapes") == "a"
    with pytest.raises(RuntimeError, match="none of e works on GPU A"):
        _graphs.fastest({"e": broken}, torch.device("cuda"), "shapes")


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("dtype", [SINGLE, HALF, BRAIN])
@pytest.mark.parametrize("nhwc", [False, True])
def test_losses_and_gradients_of_all_layers(host, name, dtype, nhwc):
    layers, given, truth = group(name, dtype, nhwc)
    layers.losses()
    layers.gradients()
    contents = [
        own * content_loss_reference(f, p) for (f, p, _), (own, _) in zip(truth, OWN, strict=False) if p is not None
    ]
    styles = [0 if a is None else style_loss_reference(gram_reference(f), a) for f, _, a in truth]
    total = WEIGHTS[0] * sum(contents) + WEIGHTS[1] * sum(own * s for s, (_, own) in zip(styles, OWN, strict=False))
    assert numbers(layers.terms) == pytest.approx([total, sum(contents), 0, *styles], rel=1e-5)
    scale = float(layers.scale)
    loudest = 0
    for layer, (f, p, a), own in zip(given, truth, OWN, strict=False):
        gradient = np.zeros_like(f)
        if p is not None:
            gradient += WEIGHTS[0] * own[0] * content_gradient_reference(f, p)
        if a is not None:
            gradient += WEIGHTS[1] * own[1] * style_gradient_reference(f, gram_reference(f), a)
        assert error(layer.cotangent, scale * gradient) < max(1e-5, 2 * ROUNDING[dtype])
        loudest = max(loudest, scale * np.sqrt(np.mean(gradient**2)))
    assert scale == 1 if dtype == SINGLE else 0.02 < loudest < 2
    assert scale == 2 ** round(np.log2(scale))


def test_the_same_features_give_the_same_bits_and_no_memory_is_left_in_use(host):
    layers, given, _ = group("odd", HALF, True)
    found = []
    for _ in range(2):
        layers.losses()
        layers.gradients()
        found.append([layers.terms.clone(), *(layer.cotangent.clone() for layer in given)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_offsets_beyond_32_bits(host, dtype):
    """The last share of a layer with more than 2^32 elements; only its memory exists, the pointers are moved."""

    class Moved(_cuda.Table):
        def __init__(self, row):
            self.rows, self.tensor = [row], torch.zeros(1, len(row), dtype=torch.int64)
            for i, cell in enumerate(row):
                if isinstance(cell, int):
                    self.tensor[0, i] = cell

    channels, share, tile = 8, 64, {SINGLE: 64, HALF: 128}[dtype]
    before = 2**29 // share * share  # positions, of eight channels
    f = features(channels, share, dtype=dtype, nhwc=True)
    partial, cotangent, difference = torch.empty(8, 8), torch.full_like(f, torch.nan), random(8, 8)
    difference += difference.T.clone()
    size = f.element_size()
    pointers = [Shifted(f, -before * channels * size), 0, Shifted(cotangent, -before * channels * size), difference]
    pointers += [difference, Shifted(partial, -(before // share) * channels**2 * 4)]
    blocks = (-(before // share), 0, -(before // tile))
    row = (channels, before + share, *pointers, before // share + 1, share, 32, 8192, *blocks, 1.0, 1.0, None)
    element = _cuda.ELEMENTS[dtype]
    _cuda.launch("gram", f"gram<{element}, true>", (1,), Moved(row), 0, 1, 0)
    _cuda.launch("gradients", f"layer_gradients<{element}, true>", (1,), Moved(row), 1, torch.tensor([1.0, 1, 1, 0]))
    assert error(partial.triu(), np.triu(share * gram_reference(numbers(f)))) < 1e-6
    assert error(cotangent, numbers(difference) @ numbers(f)) < max(1e-5, 2 * ROUNDING[dtype])


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("factor", [1e-3, 300.0])
def test_gradients_of_faint_and_loud_features(host, dtype, factor):
    """The scale and the lift of G - A bring everything into fp16's range."""
    f, a = (factor * random(40, 50, seed=seed) for seed in (0, 1))
    f = f.to(dtype)
    target = torch.from_numpy(gram_reference(numbers(a))).float()
    layer = Layer(f, torch.empty_like(f), None, target)
    layers = Layers({"only": layer}, 0, 1e-6)
    layers.losses()
    layers.gradients()
    truth = (
        1e-6 * float(layers.scale) * style_gradient_reference(numbers(f), gram_reference(numbers(f)), numbers(target))
    )
    assert error(layer.cotangent, truth) < 2 * max(ROUNDING[dtype], 1e-5)


@pytest.mark.parametrize("dtype", [SINGLE, HALF, BRAIN])
@pytest.mark.parametrize("nhwc", [False, True])
@pytest.mark.parametrize("factor", [1e-3, 3e4])
def test_losses_and_gradients_by_cublas(cublas, monkeypatch, dtype, nhwc, factor):
    """Of features in pieces, in strips; G - A may be as large as no 16 bits hold."""
    monkeypatch.setattr(summed, "_STRIP", 240)
    f, p = (features(24, 70, seed=seed, dtype=dtype, nhwc=nhwc) for seed in (0, 1))
    x, y, own = numbers(f), numbers(p), summed.Cublas()
    assert float(own.content_loss(f, p)) == pytest.approx(content_loss_reference(x, y), rel=2 * ROUNDING[dtype])
    assert error(own.gram(f, torch.full((24, 24), torch.nan)), gram_reference(x)) < 1e-5
    difference = factor * torch.from_numpy(gram_reference(y) - gram_reference(x)).float()
    out = torch.full_like(f, torch.nan)
    own.style_gradient(f, difference, 0.5 / factor, out, False)
    truth = 0.5 / factor * numbers(difference) @ x
    assert error(out, truth) < 3 * max(ROUNDING[dtype], 1e-6)
    own.style_gradient(f, difference, 0.5 / factor, out, True)
    assert error(out, 2 * truth) < 4 * max(ROUNDING[dtype], 1e-6)


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("weight", [1e-2, 30.0])
def test_a_wasserstein_distance_beside_a_gram_matrix(host, dtype, weight):
    """It joins the total and the scale of the others; `Summed` in fp32 is the truth."""
    f, a = features(24, 60, dtype=dtype), features(24, 50, seed=1)
    x = f - a.mean(1, keepdim=True).to(dtype)
    target = torch.from_numpy(gram_reference(numbers(a))).float()

    def make(dtype, group):
        distance = Wasserstein(torch.cov(a))
        distance.away = exact_mean(x)
        given = [each.to(dtype, copy=True) for each in (f, x)]
        return group({
            "gram": Layer(given[0], torch.full_like(given[0], torch.nan), None, target),
            "distance": Layer(
                given[1], torch.full_like(given[1], torch.nan), None, torch.zeros(24, 24), 0.0, weight, distance
            ),
        }, 1.0, 2.0)  # fmt: skip

    found, truth = make(dtype, Layers), make(SINGLE, lambda layers, *weights: Summed([layers], *weights, Blas()))
    found.losses()
    found.gradients()
    truth.losses()
    truth.gradients()
    np.testing.assert_allclose(numbers(found.terms), numbers(truth.terms), rtol=1e-4 if dtype == HALF else 1e-5)
    for one, other in zip(found._layers, truth._pieces[0], strict=True):
        wanted = float(found.scale) * numbers(other.cotangent)
        assert error(one.cotangent, wanted) < max(1e-5, 4 * ROUNDING[dtype])
    assert max(float(layer.cotangent.double().square().mean().sqrt()) for layer in found._layers) < 2


def channels_last(tensor, dtype):
    """(1, C, H, W) in NHWC order."""
    return tensor.to(dtype).contiguous(memory_format=torch.channels_last)


def image_of(padding, size):
    """Leaf image and its framed, centred form by torch, in fp64."""
    means = torch.tensor([0.5, 0.4, 0.3], dtype=torch.float64)
    image = torch.rand(1, 3, *size, dtype=torch.float64, requires_grad=True)
    framed = image - means.view(1, 3, 1, 1)
    if padding != "zero":
        framed = torch.nn.functional.pad(framed, (1, 1, 1, 1), padding)
    return image, means, framed


@pytest.mark.parametrize("dtype", [SINGLE, HALF, BRAIN])
@pytest.mark.parametrize("padding", network.PADDINGS)
@pytest.mark.parametrize("size", [(2, 3), (33, 47)])
def test_the_image_gets_its_frame_and_the_gradient_comes_back_through_it(host, dtype, padding, size):
    image, means, framed = image_of(padding, size)
    height, width = framed.shape[2:]
    out = channels_last(torch.full((1, network.COLOURS, height, width), torch.nan), dtype)
    network.centre(image.detach().float(), means.float(), out, padding)
    assert error(out[:, :3], numbers(framed.detach())) < max(1e-6, ROUNDING[dtype])
    assert not out[:, 3].any()
    cotangent = channels_last(random(1, network.EIGHT, height, width), dtype)
    (truth,) = torch.autograd.grad(framed, image, cotangent[:, :3].double())
    gradient = torch.full(image.shape, torch.nan)
    network.uncentre(cotangent, gradient, padding)
    assert error(gradient, numbers(truth)) < 1e-6


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("padding", network.PADDINGS)
@pytest.mark.parametrize(("size", "rectified"), [((2, 3), True), ((33, 47), False), ((16, 16), True)])
def test_the_first_convolution(host, dtype, padding, size, rectified):
    """Against torch's convolution of the framed image, rounded as that of cuDNN is given it."""
    image, means, framed = image_of(padding, size)
    kernel, bias = random(64, 3, 3, 3, dtype=dtype), random(64, seed=1, dtype=dtype)
    rounded = framed.detach().float().to(dtype).double()
    truth = torch.nn.functional.conv2d(rounded, kernel.double(), bias.double(), padding=int(padding == "zero"))
    truth = truth.relu() if rectified else truth
    out = channels_last(torch.full((1, 64, *size), torch.nan), dtype)
    taps = torch.nn.functional.pad(kernel.permute(0, 2, 3, 1).flatten(1), (0, network.FILLED - network.TAPS))
    network.convolve(image.detach().float(), means.float(), taps, bias, out, padding, rectified)
    assert error(out, numbers(truth)) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", [SINGLE, HALF, BRAIN])
@pytest.mark.parametrize("size", [(2, 2), (9, 12)])
@pytest.mark.parametrize("pooling", ["", "avg", "max"])
@pytest.mark.parametrize(
    "shares",
    [
        *("incoming", "incoming own", "incoming own behind", "own", "own behind", "incoming content", "content"),
        "incoming own ratio",
    ],
)
def test_pooling_and_the_masks_on_the_way_back(host, dtype, size, pooling, shares):
    """Against autograd of torch's own ReLU and pooling; few values, so that maxima are ties."""
    channels = 24
    generator = torch.Generator().manual_seed(2)
    before = torch.randint(-2, 3, (1, channels, *size), generator=generator).double().requires_grad_()
    relu = before.relu()
    above = {
        "": lambda x: x,
        "avg": lambda x: torch.nn.functional.avg_pool2d(x, 2) * 4,
        "max": lambda x: torch.nn.functional.max_pool2d(x, 2),
    }[pooling](relu)
    features = channels_last(relu.detach(), dtype)
    if pooling:
        pooled = channels_last(torch.full(above.shape, torch.nan), dtype)
        network.pool(features, pooled, pooling)
        assert error(pooled, numbers(above.detach() / (4 if pooling == "avg" else 1))) < max(1e-6, ROUNDING[dtype])
    shapes = {"incoming": above.shape, "own": relu.shape, "behind": relu.shape}
    given = {name: channels_last(random(*shape, seed=7), dtype) for name, shape in shapes.items() if name in shares}
    at = {"incoming": above, "own": relu, "behind": before}
    ratio = torch.tensor(0.125) if "ratio" in shares else None
    weight = {"incoming": 0.125 if "ratio" in shares else 1.0}
    total = sum((at[name] * given[name].double()).sum() * weight.get(name, 1.0) for name in given)
    term = None
    if "content" in shares:
        wanted = channels_last(random(*relu.shape, seed=8), dtype)
        term = Term(torch.tensor([torch.nan, torch.nan, 0.75]), content=wanted.flatten(2)[0])
        total = total + (relu * 0.75 * (features.double() - wanted.double())).sum()
    (truth,) = torch.autograd.grad(total, before)
    out = channels_last(torch.full(relu.shape, torch.nan), dtype)
    network.mask(*map(given.get, shapes), features, out, pooling, term, ratio)
    assert error(out, numbers(truth)) < max(1e-6, ROUNDING[dtype])


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize(("channels", "size", "style", "shares"), [
    (64, (1, 1), True, ""), (64, (9, 31), True, "incoming"), (128, (12, 11), True, "incoming behind"),
    (128, (2, 65), True, "incoming own"), (64, (40, 41), False, "incoming own behind"),
    (64, (9, 31), True, "incoming ratio"), (128, (12, 11), True, "incoming ratio"),
])  # fmt: skip
def test_the_style_joins_the_cotangent_on_its_way(host, dtype, channels, size, style, shares):
    """What a `Term` stands for, made behind the mask, is what the cotangent in memory of its own gives there."""
    shape = (1, channels, *size)
    relu = channels_last(random(*shape).relu(), dtype)
    flat = relu.flatten(2)[0]
    gram = torch.from_numpy(gram_reference(numbers(random(channels, 40, seed=2)))).float()
    names = ("incoming", "own", "behind")
    given = {
        name: channels_last(random(*shape, seed=3 + i), dtype) for i, name in enumerate(shares.split()) if name in names
    }
    ratio = torch.tensor(0.25) if "ratio" in shares else None
    layers = Layers({"only": Layer(flat, None, None, gram)}, 0.0, 300.0)
    layers.losses()
    layers.gradients()
    term = layers.term("only") if style else None
    exact, scale = numbers(flat), float(layers.scale)
    cotangent = 300 * scale * style * style_gradient_reference(exact, gram_reference(exact), numbers(gram))
    own = torch.from_numpy(cotangent).float().view(shape)
    own = own + given["own"].float() if "own" in given else own
    wide = {name: channels_last(each, SINGLE) for name, each in (given | {"own": own}).items()}
    if ratio is not None:
        wide["incoming"] *= ratio
    truth = channels_last(torch.full(shape, torch.nan), SINGLE)
    network.mask(*map(wide.get, names), channels_last(relu, SINGLE), truth)
    if channels == 64:  # its products with the first convolution
        taps = random(network.FILLED, 64, seed=9, dtype=dtype)
        plane = -(-size[0] * size[1] // 8) * 8
        found = torch.full((network.TAPS, plane), torch.nan, dtype=dtype)
        network.first(*map(given.get, names), relu, taps, found, term, ratio)
        found, truth = found[:, : size[0] * size[1]], taps[: network.TAPS].double() @ truth.double().flatten(2)[0]
    else:
        found = channels_last(torch.full(shape, torch.nan), dtype)
        network.mask(*map(given.get, names), relu, found, term=term, ratio=ratio)
    assert error(found, numbers(truth)) < 3 * ROUNDING[dtype]


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("padding", network.PADDINGS)
@pytest.mark.parametrize("size", [(2, 3), (13, 29)])
def test_the_first_convolution_is_undone_from_its_products(host, dtype, padding, size):
    """Against autograd of torch's convolution of the framed image, for products of whole cotangents."""
    image, _, framed = image_of(padding, size)
    kernel = random(64, 3, 3, 3, dtype=torch.float64)
    cotangent = random(1, 64, *size, seed=4, dtype=torch.float64)
    out = torch.nn.functional.conv2d(framed, kernel, padding=int(padding == "zero"))
    (truth,) = torch.autograd.grad(out, image, cotangent)
    taps = kernel.flip(2, 3).permute(2, 3, 1, 0).reshape(network.TAPS, 64)
    plane = -(-size[0] * size[1] // 8) * 8
    products = torch.full((network.TAPS, plane), torch.nan, dtype=dtype)
    products[:, : size[0] * size[1]] = (taps @ cotangent.flatten(2)[0]).to(dtype)
    gradient = torch.full(image.shape, torch.nan)
    network.gather(products, gradient, padding)
    assert error(gradient, numbers(truth)) < 2 * ROUNDING[dtype]


def test_a_picture_that_tiles_sees_its_other_side(host):
    source = channels_last(random(1, 16, 5, 3), HALF)
    out = channels_last(torch.full((1, 16, 7, 5), torch.nan), HALF)
    network.wrap(source, out)
    torch.testing.assert_close(out, torch.nn.functional.pad(source, (1, 1, 1, 1), "circular"), rtol=0, atol=0)


VARIATIONS = [(2, False, "mean"), (1, False, "mean"), (1.5, True, "mean"), (2, True, "mean")]
VARIATIONS += [(power, wrap, form) for form in FORMS[1:] for power, wrap in ((1, False), (2, True))]


@pytest.mark.parametrize(("power", "wrap", "form"), VARIATIONS)
@pytest.mark.parametrize("size", [(2, 2), (2, 300), (17, 31), (8, 5)])
def test_pixels(host, size, power, wrap, form):
    check_pixels(size, power, wrap, form)


@pytest.mark.parametrize("size", [(1, 1), (17, 31), (8, 256)])
def test_temporal(host, size):
    check_temporal(size)


def check_temporal(size):
    pixels, carried, before = (random(1, 3, *size, seed=seed) for seed in range(3))
    certain = random(1, 1, *size, seed=3).abs()
    truth, slope = temporal_reference(*(numbers(each[0]) for each in (pixels, carried)), numbers(certain[0, 0]))
    total, gradient = torch.tensor(5.0), before.clone()
    term = Temporal(carried, certain, 7)
    term.add(pixels, gradient, total)
    assert float(total) == pytest.approx(5 + 7 * truth, rel=1e-6)
    assert error(gradient[0], numbers(before[0]) + 7 * slope) < 1e-6
    term.add(pixels, None, total)
    assert float(total) == pytest.approx(5 + 14 * truth, rel=1e-6)
    total.fill_(torch.nan)  # a gradient that is not finite
    term.add(pixels, gradient, total)
    assert total.isnan()


def test_kernels_of_few_blocks_take_all_elements(host, monkeypatch):
    """One block, as if the picture were larger than the most of them."""
    monkeypatch.setattr(_cuda, "MAX_BLOCKS", 1)
    check_pixels((17, 31), 2, False, "mean")
    check_temporal((17, 31))
    check_optimisers(kernels.Adam, 1e-6, FALL[:4])


def check_pixels(size, power, wrap, form):
    pixels, vjp = random(1, 3, *size), random(1, 3, *size, seed=1)
    truth, slope = total_variation_reference(numbers(pixels[0]), power, wrap, form)
    terms, gradient = torch.tensor([5.0, 1.0, 0.0, 2.0]), torch.full_like(pixels, torch.nan)
    finish = Pixels(vjp, torch.tensor(8.0), 7, terms, power, wrap, form)
    finish.finish(pixels, gradient)
    assert numbers(terms) == pytest.approx([5 + 7 * truth, 1, truth, 2], rel=1e-6)
    assert error(gradient[0], numbers(vjp[0]) / 8 + 7 * slope) < 1e-6
    finish.finish(pixels, None)
    assert numbers(terms)[0] == pytest.approx(5 + 14 * truth, rel=1e-6)
    free = Pixels(vjp, torch.tensor(8.0), 0, terms, power, wrap, form)
    free.finish(torch.full_like(pixels, torch.nan), gradient, measured=False)
    assert error(gradient, numbers(vjp) / 8) < 1e-6
    assert numbers(terms)[[0, 2]] == pytest.approx([5 + 14 * truth, 0], rel=1e-6)
    finish.finish(pixels, gradient, measured=False)  # it has a weight
    assert numbers(terms)[2] == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_makes_the_loss_nan(host, value):
    vjp, terms = random(1, 3, 20, 30), torch.ones(3)
    vjp[0, 2, 19, 29] = value
    for measured in (True, False):
        terms = torch.ones(3)
        finish = Pixels(vjp, torch.tensor(1.0), 0, terms)
        finish.finish(random(1, 3, 20, 30), torch.empty_like(vjp), measured=measured)
        assert terms.isnan().tolist() == [True, False, measured]


def optimisers(make, losses, count=700, gradients=None):
    """A run on a CPU and one of the CUDA source, fed the same losses and gradients: images and best after each step.

    The losses, and the best images of the last three steps, are those of the trail.
    """
    found = []
    for cuda in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", property(lambda self, cuda=cuda: cuda))
            image, gradient, loss = random(count), torch.empty(count), torch.zeros(())
            trail, trace = Trail(image, len(losses) + 2, 3, first=2), []
            runner = make(image, gradient, loss, trail)
            for i, value in enumerate(losses):
                # of a quadratic with its own curvature for each element
                gradient.copy_((1 + torch.arange(count) / count * 5) * image * 100 + random(count, seed=i))
                loss.fill_(value)
                runner.step()
                trace.append((image.clone(), trail.image(2 + i).clone()))
                for back in range(min(3, len(trace))):
                    assert torch.equal(trail.image(2 + i - back), trace[-1 - back][1])
            np.testing.assert_array_equal(numbers(trail.losses[2:]), np.float32(losses))
        found.append(trace)
    return found


class Lbfgs(lbfgs.Lbfgs):
    """On a CPU with the rows of the history rounded as on a GPU, and all their products computed anew."""

    def _multiply(self):
        made, used = int(self._state["to"]), lbfgs.rows_in_use(self._state, self._slots)
        gradient, change = self._unit_gradient(), torch.zeros(self._count)
        if used:
            change = self._rows[2 * made + 1].add_(gradient)
            for row, scale in ((2 * made, 2.0**19), (2 * made + 1, 2.0**6)):
                self._rows[row].copy_((self._rows[row] * scale).clamp(-65504, 65504).half() / scale)
        pair = torch.stack([change, gradient], 1).double()
        self._dots[:used] = self._history[:used].double() @ pair
        self._dots[-2:] = pair.T @ pair


FULL = functools.partial(Lbfgs, history=lbfgs.GPU_HISTORY)
# The tolerances leave room for numbers that fall between two fp16 ones, and are rounded up here and down there.
# Falls; diverges and comes back; diverges for good, which starts afresh; is not finite.
FALL = [100.0 - i for i in range(24)]
TROUBLE = [9.0, 8.0, 7.0, 20.0, 30.0, 6.0, 5.0, *[40.0] * 6, 4.0, 3.5, 3.0, torch.nan, torch.inf]


@pytest.mark.parametrize("losses", [FALL, TROUBLE])
@pytest.mark.parametrize(("make", "tolerance"), [(FULL, 5e-3), (kernels.Adam, 1e-6)])
def test_optimisers_do_what_they_do_on_a_cpu(host, monkeypatch, make, tolerance, losses):
    monkeypatch.setattr(lbfgs, "SCALING", 1.0)  # with more what is rounded otherwise grows past all bounds in 24 steps
    check_optimisers(make, tolerance, losses)


def test_adam_goes_on_from_the_moments_of_a_run(host):
    moments = [random(700, seed=1), random(700, seed=2).square()]

    def make(image, gradient, loss, trail):
        return kernels.Adam(image, gradient, loss, trail, [each.clone() for each in moments], steps=5)

    check_optimisers(make, 1e-6, FALL[:4])


def check_optimisers(make, tolerance, losses):
    on_cpu, on_cuda = optimisers(make, losses)
    for i, ((image, best), (cuda_image, cuda_best)) in enumerate(zip(on_cpu, on_cuda, strict=True)):
        limit = min(tolerance, 2e-5) if i < 5 else tolerance  # what is rounded otherwise grows from there
        assert error(cuda_image, numbers(image)) < limit
        assert error(cuda_best, numbers(best)) < limit


@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize(("count", "chunks", "pairs"), [(1, 1, 3), (129, 2, 20), (700, 1, 0), (5003, 3, 40)])
def test_lbfgs_dot_products(host, count, chunks, pairs, boxed):
    """Of gradients from 1e-7 to 3000 times their first root mean square, in float64, with y as it is kept."""
    slots, width = 21, -(-count // 8) * 8
    state = lbfgs.initial_state(slots)
    state["unit"], state["pairs"], state["moved"] = 0.25, pairs, pairs > 0
    used = 2 * min(pairs + 1, slots) if pairs else 0
    history = torch.full((2 * slots, width), torch.nan, dtype=HALF)
    history[:used] = random(used, width, seed=1).clamp(-3, 3) * 20000
    history[1:used:2] = random(len(history[1:used:2]), width, seed=2)
    history[:, count:] = 0
    before, image = random(count, seed=3), random(count, seed=4)
    gradient = random(count, seed=5) * 10.0 ** torch.linspace(-7, 1, count)
    gradient[count // 2] = 12000
    sums = torch.full((2 * slots + 2, 2, chunks), torch.nan, dtype=torch.float64)
    device = torch.from_numpy(state.reshape(1).view("f8"))
    given = (history, before, image, gradient, device, count, width, slots, int(boxed), sums)
    _cuda.launch("lbfgs", "lbfgs_dots", (chunks, 3), *given)
    held = ((image <= 0) & (gradient > 0)) | ((image >= 1) & (gradient < 0))
    g = torch.where(held & boxed, 0, gradient / 4)
    y = ((g - before) * 64).clamp(-65504, 65504).half().double() / 64 if pairs else torch.zeros(count).double()
    scales = torch.tensor([2.0**19, 2.0**6], dtype=torch.float64).repeat(slots)[:, None]
    rows = torch.zeros(2 * slots + 2, count, dtype=torch.float64)
    rows[:used] = (history[:used, :count].double()) / scales[:used]
    rows[-2], rows[-1] = y, g.double()
    truth, size = rows @ torch.stack([y, g.double()], 1), rows.abs() @ torch.stack([y, g.double()], 1).abs()
    found = sums.sum(2)
    assert ((found - truth).abs() <= 1e-6 * size + 1e-12).all()
    assert torch.equal(found[used:-2], torch.zeros(2 * slots - used, 2))


@pytest.mark.parametrize("make", [functools.partial(lbfgs.Lbfgs, history=3), kernels.Adam])
@pytest.mark.parametrize("cut", [1, 9])
def test_an_optimiser_goes_on_from_what_it_saved(host, make, cut):
    """With L-BFGS's rounded rows and the gradient before, bit for bit: before and after the short history is full."""
    count = 37

    def steps(runner, image, gradient, loss, numbers):
        for i in numbers:
            gradient.copy_((1 + torch.arange(count) / 7) * image + random(count, seed=i) / 10)
            loss.fill_(9 - i / 10)
            runner.step()

    def fresh():
        image, gradient, loss = random(count), torch.empty(count), torch.zeros(())
        return make(image, gradient, loss, Trail(image)), image, gradient, loss

    whole, again = fresh(), fresh()
    steps(*whole, range(cut))
    saved = {name: tensor.clone() for name, tensor in whole[0].save().items()}
    again[1].zero_()
    again[0].restore(saved)
    for each in (whole, again):
        steps(*each, range(cut, cut + 3))
    assert torch.equal(again[1], whole[1])
    assert torch.equal(again[0].save()["best"], whole[0].save()["best"])


@pytest.mark.parametrize("losses", [FALL, TROUBLE])
def test_lbfgs_in_a_box_with_a_short_history_does_what_it_does_on_a_cpu(host, losses):
    def make(image, gradient, loss, trail):
        image.clamp_(0, 1)  # half of the elements start on the lower bound
        return Lbfgs(image, gradient, loss, trail, 3, boxed=True)

    on_cpu, on_cuda = optimisers(make, losses)
    for (image, best), (cuda_image, cuda_best) in zip(on_cpu, on_cuda, strict=True):
        for found, truth in ((cuda_image, image), (cuda_best, best)):  # a few may be held here, and not there
            assert ((found - truth).abs() > 2e-3).double().mean() < 0.02
        assert cuda_image.min() >= 0
        assert cuda_image.max() <= 1


@pytest.mark.parametrize(("slots", "chunks"), [(21, 128), (4, 33)])
def test_the_plan_is_that_of_the_reference(host, slots, chunks):
    """The state after each step of a long history, field by field, from the same dot products in fp64."""
    generator = np.random.default_rng(0)
    state = lbfgs.initial_state(lbfgs.GPU_HISTORY + 1)
    device = torch.from_numpy(state.copy().reshape(1).view("f8"))
    for step in range(30):
        vectors = generator.standard_normal((2 * lbfgs.GPU_HISTORY + 4, 60))
        dots = vectors @ vectors[-2:].T
        made = int(state["to"])
        dots[2 * made, 0] = abs(dots[2 * made, 0]) if step != 7 else -1  # one pair is refused
        sums = torch.from_numpy(dots[..., None] * generator.dirichlet(np.ones(chunks)))
        loss, steps = 1.0 - step / 100, torch.tensor([step], dtype=torch.int32)
        given = (device, torch.tensor(loss), steps, None, sums, chunks, 60, slots)
        _cuda.launch("lbfgs", "lbfgs_plan", (1,), *given, lbfgs.DIVERGED, lbfgs.HALVINGS, lbfgs.SCALING)
        assert int(steps) == step + 1
        if lbfgs.decide(state, float(torch.tensor(loss))) == lbfgs.STEP:
            lbfgs.plan(state, dots, 60, slots)
        found = device.numpy().view(state.dtype)[0]
        for name in state.dtype.names:
            np.testing.assert_allclose(found[name], state[name], rtol=1e-7, atol=1e-9, err_msg=f"{name} {step}")
    assert found["pairs"] == 28


PROBE = """
namespace fallback {
template <typename T> void mma(float (&)[4], const unsigned (&)[4], unsigned, unsigned);
FALLBACK
}
__global__ void probe(const float* left, const float* right, float* plain, float* shuffled) {
    if (threadIdx.x >= 32) return;
    const int lane = threadIdx.x;
    unsigned a[4], b[2];
    for (int i = 0; i < 4; ++i) std::memcpy(&a[i], left + 4 * lane + i, 4);
    for (int i = 0; i < 2; ++i) std::memcpy(&b[i], right + 2 * lane + i, 4);
    float one[4] = {}, other[4] = {};
    mma<__nv_bfloat16>(one, a, b[0], b[1]);
    fallback::mma<__nv_bfloat16>(other, a, b[0], b[1]);
    for (int i = 0; i < 4; ++i) plain[4 * lane + i] = one[i], shuffled[4 * lane + i] = other[i];
}
"""


def test_a_launch_that_goes_astray_is_told_and_the_next_one_runs(programs):
    """By the sanitizer, and by the other order of threads."""
    source = "\n__global__ void astray(float* out, long long place) { take_turn(); if (threadIdx.x < 2) out[place] = "
    programs.extra["astray"] = (_cuda.text("ptx.cuh") + source + "threadIdx.x; }\n", ("astray",))
    out = torch.zeros(64)
    for place, words in ((64, "heap-buffer-overflow"), (3, "depends on the order of threads"), (64, "overflow")):
        with pytest.raises(AssertionError, match=words):
            programs.launch("astray", "astray", (1,), out, place)
    assert not out.any()


def test_bf16_products_without_tensor_cores(programs):
    """The detour of the oldest architecture gives each lane the same elements as the instruction does."""
    functions = _cuda.text("ptx.cuh")
    bf16 = functions[functions.index("template <>\n__device__ inline void mma<__nv_bfloat16>") :]
    bf16 = re.sub(r"#if .*?#else.*?\n", "", bf16, flags=re.DOTALL).replace("#endif", "")
    programs.extra["probe"] = (functions + PROBE.replace("FALLBACK", bf16), ("probe",))
    left, right = (random(count, seed=count).to(BRAIN).view(SINGLE) for count in (256, 128))
    plain, shuffled = torch.empty(128), torch.empty(128)
    programs.launch("probe", "probe", (1,), left, right, plain, shuffled)
    torch.testing.assert_close(plain, shuffled, rtol=1e-5, atol=1e-5)
    assert plain.abs().min() > 0


@pytest.mark.parametrize(("capability", "early"), [((9, 0), 1), ((8, 9), 0), ((10, 0), 1)])
def test_what_a_launch_hands_to_the_driver(monkeypatch, capability, early):
    from cuda.bindings import driver

    seen, result = [], driver.CUresult.CUDA_SUCCESS

    def launched(launching, function, parameters, extra):
        if result != driver.CUresult.CUDA_SUCCESS:
            return (result,)
        cells = (ctypes.c_void_p * 6).from_address(parameters)
        values = [ctypes.string_at(cell, 8) for cell in cells]
        grid = launching.gridDimX, launching.gridDimY, launching.gridDimZ
        block = launching.blockDimX, launching.blockDimY, launching.blockDimZ
        seen.append((values, grid, block, int(launching.hStream), launching.numAttrs, int(function), extra))
        if launching.numAttrs:
            (attribute,) = launching.attrs
            assert attribute.id.name == "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION"
            assert attribute.value.programmaticStreamSerializationAllowed == 1
        return (result,)

    cupy = SimpleNamespace(cuda=SimpleNamespace(Device=lambda index: contextlib.nullcontext()))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(driver, "cuLaunchKernelEx", launched)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=55))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    function = SimpleNamespace(kernel=SimpleNamespace(ptr=77))
    monkeypatch.setattr(_cuda, "_function", lambda name, kernel, device: function)
    tensor = torch.arange(6.0)[2:]
    table = _cuda.Table([(tensor, 3, None, 0.5)], torch.device("cpu"))
    _cuda.launch("adam", "adam_step", (3, 2), tensor, table, -3, 0.5, None, 2**40)
    ((values, *others),) = seen
    assert others == [(3, 2, 1), (_cuda.THREADS, 1, 1), 55, early, 77, 0]
    assert [int.from_bytes(values[i], "little", signed=True) for i in (0, 1, 2, 4, 5)] == [
        tensor.data_ptr(), table.tensor.data_ptr(), -3, 0, 2**40
    ]  # fmt: skip
    assert struct.unpack("<f", values[3][:4]) == (0.5,)
    assert table.tensor.tolist() == [[tensor.data_ptr(), 3, 0, *struct.unpack("<q", struct.pack("<d", 0.5))]]
    result = driver.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(RuntimeError, match="kernel adam_step: CUDA_ERROR_INVALID_VALUE"):
        _cuda.launch("adam", "adam_step", (3,), tensor)


def test_each_kernel_is_in_one_module(monkeypatch):
    """Those of an element type are compiled when one of them is asked for."""
    compiled = []

    class Module:
        def __init__(self, code, options, name_expressions):
            assert code == _cuda.text("losses.cu")
            assert "-std=c++17" in options
            compiled.append(name_expressions)
            self.get_function = name_expressions.index

    cupy = SimpleNamespace(cuda=SimpleNamespace(Device=lambda index: contextlib.nullcontext()), RawModule=Module)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    for cached in (_cuda._module, _cuda._function):
        cached.cache_clear()
    for _ in range(2):
        for kernel in _cuda.expressions("losses"):
            _cuda._function("losses", kernel, 0)
    assert sorted(itertools.chain(*compiled)) == sorted(_cuda.expressions("losses"))
    assert len(compiled) == 3
    for cached in (_cuda._module, _cuda._function):
        cached.cache_clear()


class Runtime:
    """Stands in for `cuda.bindings.runtime`: a graph is a dict of nodes, each with what it clears, and its edges."""

    def __init__(self, cleared, edges):
        self.cleared, self.edges, self.value = dict(cleared), set(edges), 0
        self.cudaError_t = SimpleNamespace(cudaSuccess=0)
        self.cudaGraphNodeType = SimpleNamespace(cudaGraphNodeTypeMemset="memset")
        self.cudaMemsetParams = SimpleNamespace

    def cudaGraph_t(self, init_value):  # noqa: N802
        return init_value

    def listed(self, nodes, count):
        return (0, nodes[:count], len(nodes)) if count else (0, [], len(nodes))

    def cudaGraphGetNodes(self, graph, count=0):  # noqa: N802
        return self.listed(list(self.cleared), count)

    def cudaGraphGetRootNodes(self, graph, count=0):  # noqa: N802
        return self.listed([node for node in self.cleared if all(node != after for _, after in self.edges)], count)

    def cudaGraphNodeGetDependencies(self, node, count=0):  # noqa: N802
        found = [before for before, after in self.edges if after == node]
        return (0, found[:count], [None] * count, len(found)) if count else (0, [], [], len(found))

    def cudaGraphNodeGetDependentNodes(self, node, count=0):  # noqa: N802
        found = [after for before, after in self.edges if before == node]
        return (0, found[:count], [None] * count, len(found)) if count else (0, [], [], len(found))

    def cudaGraphNodeGetType(self, node):  # noqa: N802
        return 0, "kernel" if self.cleared[node] is None else "memset"

    def cudaGraphMemsetNodeGetParams(self, node):  # noqa: N802
        return 0, SimpleNamespace(dst=self.cleared[node], value=self.value)

    def cudaGraphAddDependencies(self, graph, before, after, data, count):  # noqa: N802
        self.edges |= set(zip(before, after, strict=True))
        return (0,)

    def cudaGraphDestroyNode(self, node):  # noqa: N802
        del self.cleared[node]
        self.edges = {edge for edge in self.edges if node not in edge}
        return (0,)

    def cudaGraphAddMemsetNode(self, graph, before, count, parameters):  # noqa: N802
        assert (before, count) == (None, 0)
        self.cleared["new"] = parameters
        return 0, "new"


def test_counters_are_cleared_at_once(monkeypatch):
    """Their nodes go, what stood around them is still in order, and others stay; without counters nothing changes."""
    import cuda.bindings

    counters = _graphs.Counters(3, torch.device("cpu"))
    pieces = [counters.take().data_ptr() for _ in range(3)]
    assert len({*pieces}) == 3
    assert all(0 <= piece - counters.memory.data_ptr() < counters.memory.nbytes for piece in pieces)
    nodes = {"a": None, "m1": pieces[0], "b": None, "other": 8, "m2": pieces[1], "c": None}
    line = set(itertools.pairwise(nodes)) | {("a", "c")}
    runtime = Runtime(nodes, line)
    monkeypatch.setattr(cuda.bindings, "runtime", runtime, raising=False)
    _graphs.Counters.clear_at_once(SimpleNamespace(raw_cuda_graph=lambda: "graph"))
    assert list(runtime.cleared) == ["a", "b", "other", "c", "new"]
    assert runtime.edges == {("a", "b"), ("b", "other"), ("other", "c"), ("a", "c"), ("new", "a")}
    cleared = runtime.cleared["new"]
    assert (cleared.dst, cleared.value) == (counters.memory.data_ptr(), 0)
    assert cleared.elementSize * cleared.width * cleared.height == counters.memory.nbytes
    plain = Runtime({"a": None, "other": 8, "preset": pieces[2]}, {("a", "other"), ("other", "preset")})
    plain.value = 1
    monkeypatch.setattr(cuda.bindings, "runtime", plain)
    _graphs.Counters.clear_at_once(SimpleNamespace(raw_cuda_graph=lambda: "graph"))
    assert list(plain.cleared) == ["a", "other", "preset"]


# Kernels that read ahead of their turn: what the kernel before them does not write.
AHEAD = {"gram", "gram_narrow", "layer_losses", "layer_factors", "lbfgs_dots", "lbfgs_plan", "lbfgs_move"}


def test_every_kernel_takes_its_turn():
    """Or it would run beside the one before it."""
    pattern = r"__global__ void (?:__launch_bounds__\(.*?\) )?(\w+)\([^{]*\{\n(.*?)\n\}\n"
    for name in _cuda.NAMES:
        text = _cuda.text(f"{name}.cu")
        kernels = re.findall(pattern, text, re.DOTALL)
        assert len(kernels) == text.count("__global__ void")
        for kernel, body in kernels:
            before, *after = re.split(r"(?:^|\n)    (?:take|await)_turn\(\);", body)
            assert len(after) == 1, kernel
            assert ("let_next_come();" in body) == (kernel == "lbfgs_plan"), kernel
            assert kernel in AHEAD or not before, kernel
            assert not re.search(r"keep\(|store\(|atomic|(sums|state->\w+|image|history|gradient)\[[^;]*\] = ", before)


@pytest.mark.parametrize("failing", [None, "capture", "replay"])
def test_launches_are_captured_after_a_warm_up(monkeypatch, caplog, failing):
    """With a stand-in for CUDA's graphs: two rounds of launches, one that is recorded, then replays.

    Where capture or replay is refused, every round is launched, none is lost, and the reason is said once.
    """
    seen = []

    class Graph:
        def __init__(self, keep_graph):
            assert keep_graph

        def instantiate(self):
            seen.append("ready")

        def replay(self):
            if failing == "replay":
                raise RuntimeError("not on this stream")
            seen.append("replay")

    @contextlib.contextmanager
    def capture(graph, stream, capture_error_mode):
        assert _graphs.capturing.locked()
        assert not gc.isenabled()
        mark = len(seen)
        yield
        seen[mark:] = ["capture"]  # what is recorded does not run
        if failing == "capture":
            raise RuntimeError("not on this stream")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(_graphs.Counters, "clear_at_once", lambda graph: seen.append("cleared"))
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    kernels.announce_no_graph.cache_clear()
    runs = [kernels.Recorded(torch.device("cuda")) for _ in range(2)]
    with caplog.at_level("INFO", logger="engine"):
        for recorded in runs:
            seen.clear()
            for _ in range(5):
                recorded(lambda: seen.append("launch"))
            made = [] if failing == "capture" else ["cleared", "ready"]
            assert gc.isenabled()
            assert not _graphs.capturing.locked()
            repeated = "launch" if failing else "replay"
            assert seen == ["launch", "launch", "capture", *made, *[repeated] * 3]
    assert [record.message for record in caplog.records] == (
        [f"no CUDA graph, kernels are launched one by one: {failing}: not on this stream"] if failing else []
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for part in (*runs, kernels.Recorded(torch.device("cuda"))):  # of a larger sequence
        seen.clear()
        for _ in range(4):
            part(lambda: seen.append("launch"))
        assert seen == ["launch"] * 4
    on_cpu = kernels.Recorded(torch.device("cpu"))
    seen.clear()
    for _ in range(4):
        on_cpu(lambda: seen.append("launch"))
    assert seen == ["launch"] * 4


@pytest.mark.parametrize(
    ("positions", "wanted", "share"),
    [
        (174592, 1088, 992),
        (43520, 1088, 1088),
        (672, 1088, 672),
        (71, 32, 32),
        (1, 32, 32),
        (10880, 256, 272),
        (2688, 256, 224),
        (672, 256, 224),
        (8 * 8200, 8192, 5 * 8 * 164),
        (9 * 8192, 8192, 8192),
    ],
)
def test_shares_are_equal_where_they_can_be(positions, wanted, share):
    assert layers_module._share(positions, wanted) == share
