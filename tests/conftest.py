from __future__ import annotations

import contextlib
import functools
import os
import platform
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from blas import Cublas
from cuda_host import Host
from hypothesis import settings
from oracle import random_state

from engine import Config, Stylizer
from engine.kernels import _blas, _cuda, _graphs

# On tiny pictures nearly all of the time goes into reading the weights of the deep layers.
SHALLOW = ("relu1_1", "relu3_1")
TINY = Config(size=48, iterations=3, scales=1, style_layers=SHALLOW, content_layers=("relu2_2",))
settings.register_profile("own", deadline=None)  # a busy machine is no reason to fail
settings.load_profile("own")


def check_alone(network) -> None:
    """Whoever uses a network has it for itself, and may use it in the middle of that."""
    inside = threading.Event()

    def use():
        with network.use():
            inside.set()

    thread = threading.Thread(target=use)
    with network.use(), network.use():
        thread.start()
        assert not inside.wait(0.05)
    thread.join(10)
    assert inside.is_set()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep every test off the user's cache folder."""
    folder = tmp_path_factory.mktemp("cache", numbered=True)
    monkeypatch.setenv("STYLIZE_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict]]:
    """Random networks: {naming: (file, state dict)}."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("weights")
    torchvision, caffe = random_state(1), random_state(2, caffe=True)
    save_file(torchvision, folder / "torchvision.safetensors")
    torch.save(caffe, folder / "caffe.pth")
    return {
        "torchvision": (folder / "torchvision.safetensors", torchvision),
        "caffe": (folder / "caffe.pth", caffe),
    }


@pytest.fixture(scope="module")
def stylizers(states: dict[str, tuple[Path, dict]]) -> Callable[..., Stylizer]:
    """Those of the random networks, by naming, device and precision; each is loaded once."""
    return functools.cache(
        lambda naming, device="cpu", precision="fp32": Stylizer(states[naming][0], device, precision)
    )


@pytest.fixture(scope="session")
def stylizer() -> Stylizer:
    """In the precision of this processor: what it paints is what the command line paints."""
    return Stylizer(weights="embedded", device="cpu")


@pytest.fixture(scope="session")
def exact() -> Stylizer:
    """In fp32, to be compared with others."""
    return Stylizer(weights="embedded", device="cpu", precision="fp32")


@pytest.fixture(scope="session")
def pictures() -> dict[str, np.ndarray]:
    """A content and a style picture, uint8 (H, W, 3)."""
    y, x = np.mgrid[0:40, 0:56]
    content = np.stack([x * 4, y * 6, 255 * ((x // 8 + y // 8) % 2)], axis=2).astype(np.uint8)
    style = np.random.default_rng(0).integers(0, 256, (44, 36, 3), dtype=np.uint8)
    return {"content": content, "style": style}


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """The CUDA sources as programs of this CPU."""
    if shutil.which("g++") is None or platform.machine() != "x86_64":
        pytest.skip("the CUDA sources are executed on x86-64 with g++ only")
    built = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        built = built.parent  # of all workers
    host = Host(tmp_path_factory.mktemp("cuda"), built)
    yield host
    host.close()


@pytest.fixture
def host(programs: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    """Tensors on the CPU are taken for CUDA tensors, of a chip with three multiprocessors."""
    import torch

    library = Cublas()
    monkeypatch.setattr(_blas, "_library", lambda: library)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    handle = _blas._Handle(7, torch.device("cpu"))
    monkeypatch.setattr(_blas, "_handle", lambda device: handle)
    monkeypatch.setattr(_cuda, "launch", programs.launch)
    monkeypatch.setattr(_cuda, "processors", lambda device: 3)
    monkeypatch.setattr(_cuda, "shared_memory", lambda device: 100 << 10)
    monkeypatch.setattr(_graphs, "fastest", lambda ways, device, key: next(iter(ways)))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    return programs


@pytest.fixture
def on_cpu(host, monkeypatch):
    """A library whose convolutions torch makes, on a device that is the CPU."""
    import torch

    from engine import convolutions, fused, kernels

    class Convolution:
        def __init__(self, library, source, kernel, target, padding, bias=None, rectified=False):
            assert library.handle == "handle"
            self._given = source, kernel, target, padding, bias, rectified

        def run(self):
            source, kernel, target, padding, bias, rectified = self._given
            wide = torch.float64 if source.dtype == torch.float32 else torch.float32  # as cuDNN adds up 16 bits
            found = torch.nn.functional.conv2d(source.to(wide), kernel.to(wide), padding=padding)
            found = found if bias is None else found + bias.to(wide)
            target.copy_(found.relu() if rectified else found)

    @contextlib.contextmanager
    def same_stream(stream):
        yield

    library = SimpleNamespace(create_handle=lambda: "handle", set_stream=lambda handle, stream: None)
    monkeypatch.setitem(sys.modules, "cudnn", library)
    monkeypatch.setattr(fused, "Convolution", Convolution)
    monkeypatch.setattr(convolutions, "_free_handles", [])
    monkeypatch.setattr(fused, "PLACE", torch.device("cpu"))
    stream = SimpleNamespace(cuda_stream=1, wait_stream=lambda other: None)
    monkeypatch.setattr(kernels, "own_stream", lambda owner, place: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda place: stream)
    monkeypatch.setattr(torch.cuda, "stream", same_stream)
    monkeypatch.setattr(fused, "on_stream", same_stream)
