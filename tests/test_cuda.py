"""The CUDA sources without a GPU: compiled by NVRTC for every architecture, and executed on the CPU.

For execution g++ compiles a source together with `cuda_host.h`; the Python launchers run unchanged, with `launch`
replaced by a call into that library.
"""

import ctypes
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import kernels
from engine.kernels import _cuda
from engine.kernels.content import content_gradient_reference, content_loss_reference
from engine.kernels.gram import gram_reference
from engine.kernels.style import style_gradient_reference, style_loss_reference
from engine.kernels.total_variation import total_variation_reference

NAMES = ("gram", "style", "content", "total_variation")
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
HALF, SINGLE = torch.float16, torch.float32


def include_folder() -> str:
    import nvidia

    for root in nvidia.__path__:
        for found in Path(root).glob("*/include/cuda_fp16.h"):
            return str(found.parent)
    pytest.fail("cuda_fp16.h is missing: the torch wheel brings it with nvidia-cuda-runtime")


def test_every_source_is_compiled_here():
    files = {
        path.name.removesuffix(".cu") for path in resources.files("engine.kernels").iterdir() if path.suffix == ".cu"
    }
    assert files == set(NAMES)
    for name in NAMES:
        declared = set(re.findall(r"__global__ void (\w+)\(", _cuda.source(name)))
        assert declared == {expression.split("<")[0] for expression in _cuda.expressions(name)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles(name, architecture):
    from cuda.bindings import nvrtc

    def call(result, *values):
        assert result == nvrtc.nvrtcResult.NVRTC_SUCCESS, result
        return values[0] if values else None

    program = call(*nvrtc.nvrtcCreateProgram(_cuda.source(name).encode(), f"{name}.cu".encode(), 0, [], []))
    for expression in _cuda.expressions(name):
        call(*nvrtc.nvrtcAddNameExpression(program, expression.encode()))
    options = [f"-arch=sm_{architecture}", "-std=c++17", f"-I{include_folder()}", "-Werror=all-warnings"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    log = b" " * call(*nvrtc.nvrtcGetProgramLogSize(program))
    nvrtc.nvrtcGetProgramLog(program, log)
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    assert call(*nvrtc.nvrtcGetCUBINSize(program)) > 1000


class Host:
    """`_cuda.launch` on the CPU."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.libraries: dict[str, ctypes.CDLL] = {}

    def library(self, name: str) -> ctypes.CDLL:
        if name not in self.libraries:
            (self.folder / "cuda_fp16.h").write_text("")  # cuda_host.h stands in for it
            entries = []
            for i, expression in enumerate(_cuda.expressions(name)):
                parameters = self.parameters(name, expression)
                names = [f"p{k}" for k in range(len(parameters))]
                signature = ", ".join(f"{kind} {p}" for kind, p in zip(parameters, names, strict=True))
                call = f"{expression}({', '.join(names)})"
                entries.append(
                    f'extern "C" void entry{i}(unsigned x, unsigned y, unsigned z, {signature}) '
                    f"{{ run_grid({{x, y, z}}, THREADS, [=] {{ {call}; }}); }}"
                )
            code = self.folder / f"{name}.cpp"
            code.write_text('#include "cuda_host.h"\n' + _cuda.source(name) + "\n".join(entries))
            target = self.folder / f"{name}.so"
            include = [f"-I{self.folder}", f"-I{Path(__file__).parent}"]
            flags = ["-std=c++20", "-O1", "-g", "-fsanitize=undefined", "-fno-sanitize-recover", "-shared", "-fPIC"]
            build = ["g++", *flags, "-pthread", *include, str(code), "-o", str(target)]
            subprocess.run(build, check=True, capture_output=True, text=True)
            self.libraries[name] = ctypes.CDLL(str(target))
        return self.libraries[name]

    @staticmethod
    def parameters(name: str, expression: str) -> list[str]:
        kernel, _, element = expression.rstrip(">").partition("<")
        found = re.search(rf"__global__ void {kernel}\(([^)]*)\)", _cuda.source(name))
        assert found
        kinds = [" ".join(part.split()[:-1]) for part in found[1].split(",")]
        return [kind.replace("T*", f"{element}*") for kind in kinds]

    def launch(self, name, kernel, grid, *arguments):
        index = _cuda.expressions(name).index(kernel)
        kinds = self.parameters(name, kernel)
        assert len(kinds) == len(arguments)
        values = []
        for kind, argument in zip(kinds, arguments, strict=True):
            if isinstance(argument, torch.Tensor):
                assert kind.endswith("*")
                assert argument.is_contiguous()
                element = {SINGLE: "float", HALF: "__half"}[argument.dtype]
                assert element in kind
                values.append(ctypes.c_void_p(argument.data_ptr()))
            elif isinstance(argument, int):
                assert kind == "long long"
                values.append(ctypes.c_longlong(argument))
            else:
                assert kind == "float"
                values.append(ctypes.c_float(argument))
        entry = getattr(self.library(name), f"entry{index}")
        entry(*(*grid, 1, 1)[:3], *values)


@pytest.fixture(scope="module")
def library_folder(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed: the CUDA sources cannot be executed on this CPU")
    return Host(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def host(library_folder, monkeypatch):
    """Tensors on the CPU that the launchers take for CUDA tensors."""
    monkeypatch.setattr(_cuda, "launch", library_folder.launch)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    return library_folder


def random(*shape, seed=0, dtype=SINGLE):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def error(value, truth):
    return np.linalg.norm(value.double().numpy() - truth) / max(np.linalg.norm(truth), 1e-30)


GRAM_SHAPES = [(1, 1), (3, 5), (64, 64), (65, 70), (130, 33)]


@pytest.mark.parametrize("shape", GRAM_SHAPES)
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_gram_runs(host, shape, dtype):
    features = random(*shape, dtype=dtype)
    out = kernels.gram(features, torch.full((shape[0], shape[0]), torch.nan))
    assert error(out, gram_reference(features.double().numpy())) < 1e-6
    assert torch.equal(out, out.T)


def test_gram_does_not_overflow_in_half_precision(host):
    features = torch.full((2, 300), 65504.0, dtype=HALF)
    assert torch.isfinite(kernels.gram(features, torch.empty(2, 2))).all()


def test_gram_gives_the_same_bits_again(host):
    features = random(70, 200)
    first, second = (kernels.gram(features, torch.empty(70, 70)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("shape", GRAM_SHAPES)
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("accumulate", [False, True])
def test_style_runs(host, shape, dtype, accumulate):
    features = random(*shape, dtype=dtype)
    matrix = gram_reference(features.double().numpy())
    target = gram_reference(random(*shape, seed=1).double().numpy())
    difference = torch.full(matrix.shape, torch.nan)
    loss = kernels.style_loss(torch.from_numpy(matrix).float(), torch.from_numpy(target).float(), difference)
    assert error(loss, style_loss_reference(matrix, target)) < 1e-5
    out = torch.ones(shape, dtype=dtype) if accumulate else torch.full(shape, torch.nan, dtype=dtype)
    factor = 2.0 * shape[0] ** 2 * shape[1]
    kernels.style_gradient(features, difference, torch.tensor(factor), out, accumulate)
    truth = factor * style_gradient_reference(features.double().numpy(), matrix, target)
    assert error(out, truth + (1 if accumulate else 0)) < (1e-5 if dtype == SINGLE else 2e-3)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000])
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_content_runs(host, count, dtype):
    features, target = random(1, count, dtype=dtype), random(1, count, seed=1, dtype=dtype)
    difference = torch.full_like(features, torch.nan)
    f, p = features.double().numpy(), target.double().numpy()
    assert error(kernels.content_loss(features, target, difference), content_loss_reference(f, p)) < 1e-5
    kernels.content_gradient(difference, torch.tensor(0.5 * count))
    truth = 0.5 * count * content_gradient_reference(f, p)
    assert error(difference, truth) < (1e-6 if dtype == SINGLE else 1e-3)


@pytest.mark.parametrize("size", [(2, 2), (2, 300), (17, 31)])
def test_total_variation_runs(host, size):
    pixels, gradient = random(1, 3, *size), random(1, 3, *size, seed=1)
    truth, slope = total_variation_reference(pixels[0].double().numpy())
    expected = gradient[0].double().numpy() + 7 * slope
    loss = kernels.total_variation(pixels, 7.0, gradient)
    assert error(loss, truth) < 1e-5
    assert error(gradient[0], expected) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_kernels_on_a_gpu(dtype):
    """The launchers and CuPy themselves, against the same references."""
    features, target = random(130, 1000, dtype=dtype).cuda(), random(130, 1000, seed=1, dtype=dtype).cuda()
    f, p = features.double().cpu().numpy(), target.double().cpu().numpy()
    tolerance = 1e-5 if dtype == SINGLE else 2e-3
    matrix = kernels.gram(features, torch.empty(130, 130, device="cuda"))
    wanted = kernels.gram(target, torch.empty(130, 130, device="cuda"))
    assert error(matrix.cpu(), gram_reference(f)) < 1e-5
    difference, out = torch.empty_like(matrix), torch.empty_like(features)
    loss = kernels.style_loss(matrix, wanted, difference)
    assert error(loss.cpu(), style_loss_reference(gram_reference(f), gram_reference(p))) < 1e-4
    factor = torch.tensor(130.0**2 * 1000, device="cuda")
    kernels.style_gradient(features, difference, factor, out)
    truth = float(factor) * style_gradient_reference(f, gram_reference(f), gram_reference(p))
    assert error(out.cpu(), truth) < 10 * tolerance
    assert error(kernels.content_loss(features, target, out).cpu(), content_loss_reference(f, p)) < 1e-4
