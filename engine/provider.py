"""Devices: what runs on them, whether it can run here, and the options of ONNX Runtime's providers.

Nothing heavy is imported before the cheap checks have passed, so that a missing library is reported at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import logging
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from .config import DEVICES, PRECISIONS
from .export.commands import choice, install_line
from .export.ort import BackendError, MissingError, onnxruntime
from .export.weights import cache_folder

log = logging.getLogger(__name__)

PROVIDERS = {  # of ONNX Runtime; the device `cpu` is the program of `winograd`, `cudnn` that of `fused`
    "onnxruntime": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_CAPABILITY = (7, 5)  # of a GPU, the least for CUDA 13
GPUS = ("cudnn", "cuda", "tensorrt")
_EXTRA = {"onnxruntime": "cpu", "cudnn": "cudnn", "cuda": "gpu", "tensorrt": "tensorrt"}
_LIBRARIES = {
    "cudnn": ["libcudnn.so.9"],
    "cuda": ["libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10", "libcudart.so.13", "libcudnn.so.9"],
}
_LIBRARIES["tensorrt"] = [*_LIBRARIES["cuda"], "libnvinfer.so.10"]


def resolve(device: str, precision: str) -> tuple[str, str]:
    """Turn `auto` into what works best here and check what was named: (device, precision).

    Raises ValueError for an unknown name, or a precision that the named device does not have, BackendError for a device
    that cannot run here, or a precision that the one taken for `auto` does not have.
    """
    choice("device", device, DEVICES)
    choice("precision", precision, PRECISIONS)
    mistake: type[Exception] = BackendError if device == "auto" else ValueError
    if device == "auto":
        device = next(each for each in ("cudnn", "cuda", "cpu") if _is_here(each))
        log.info("device: %s", device)
    else:
        check(device)
    if precision == "bf16" and device in ("onnxruntime", "cuda"):
        raise mistake(
            f"precision bf16: ONNX Runtime has no bf16 convolutions for device {device}, --device cpu, cudnn and "
            f"tensorrt have; {'--precision fp16' if device == 'cuda' else '--precision fp32'} is what runs best here"
        )
    if precision == "auto":  # the fastest one whose runs end within a percent of fp32's loss
        low = "fp16" if device in GPUS else "bf16" if device == "cpu" and _multiplies_halves() else None
        precision = low or "fp32"  # see `Stylizer` for runs that fp16 cannot hold
    elif precision == "bf16" and device == "cpu" and not _multiplies_halves():
        log.info("precision bf16: this processor multiplies it no faster than fp32, as AMD's from Zen 4 on do")
    elif precision == "fp16" and device == "cpu":
        raise mistake("precision fp16: device cpu has fp32 and bf16; --device onnxruntime runs fp16 graphs by casts")
    return device, precision


def _multiplies_halves() -> bool:
    from .kernels.vector import halves_are_faster

    return halves_are_faster()


def works(device: str) -> bool:
    """Whether the device takes work: some errors of CUDA stay with the process, and would fail all that follows."""
    import torch

    try:
        return bool(torch.ones(1, device=place(device)).item())  # waits for the device
    except Exception:
        return False


def place(device: str) -> str:
    """Where torch has the tensors of a device: the first GPU, whichever is current."""
    return "cuda:0" if device in GPUS else "cpu"


def _is_here(device: str) -> bool:
    try:
        check(device)
    except BackendError as error:
        log.debug("not on %s: %s", device, error)
        return False
    return True


def check(device: str) -> None:
    """Raise MissingError, naming the missing library and the install line, unless `device` can run here."""
    if device == "cpu":
        return
    extra = _EXTRA[device]
    line = install_line(extra)
    if device == "cudnn":
        if importlib.util.find_spec("cudnn") is None:
            raise MissingError(f"device cudnn: nvidia-cudnn-frontend is missing: {line}")
    else:
        ort = onnxruntime(extra)
        if device == "onnxruntime":
            return
        if PROVIDERS[device] not in ort.get_available_providers():
            raise MissingError(
                f"device {device}: onnxruntime-gpu is missing, the CPU wheel onnxruntime is installed: "
                f"pip uninstall -y onnxruntime && {line}"
            )
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise MissingError(f"device {device}: the NVIDIA driver (libcuda.so.1) is missing; then {line}") from error
    for package, module in (("cupy", "cupy"), ("cuda-bindings", "cuda")):
        if importlib.util.find_spec(module) is None:
            raise MissingError(f"device {device}: {package} is missing: {line}")
    import torch  # before preload_dlls: it brings most of the CUDA libraries

    if not torch.cuda.is_available():
        raise MissingError(f"device {device}: torch {torch.__version__} finds no CUDA device; builds for CPUs never do")
    try:
        found, name = torch.cuda.get_device_capability(0), torch.cuda.get_device_name(0)
    except RuntimeError as error:  # in a process that was forked behind the first use of CUDA, say
        raise MissingError(f"device {device}: {error}") from error
    if found < _CAPABILITY:
        needed = ".".join(map(str, _CAPABILITY))
        raise MissingError(f"device {device}: {name} has compute capability {found[0]}.{found[1]}, {needed} is needed")
    if device == "cudnn":
        try:
            import cudnn

            cudnn.backend_version()
        except Exception as error:  # its import fails in many ways
            raise MissingError(f"device cudnn: nvidia-cudnn-frontend does not load ({error}): {line}") from error
    else:
        ort.preload_dlls()
    if device == "tensorrt":
        _preload_tensorrt(line)
    for library in _LIBRARIES[device]:
        try:
            ctypes.CDLL(library)
        except OSError as error:
            raise MissingError(f"device {device}: {library} is missing: {line}") from error


def _preload_tensorrt(line: str) -> None:
    """Load the libraries of the tensorrt wheel, which are on no search path."""
    found = importlib.util.find_spec("tensorrt_libs")
    if found is None or not found.submodule_search_locations:
        raise MissingError(f"device tensorrt: tensorrt_libs (libnvinfer.so.10) is missing: {line}")
    folder = found.submodule_search_locations[0]
    for library in ("libnvinfer.so.10", "libnvonnxparser.so.10"):
        try:
            ctypes.CDLL(f"{folder}/{library}", mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise MissingError(f"device tensorrt: {library} does not load ({error}): {line}") from error


def attempts(device: str, precision: str, stream: int, model: bytes, captured: bool = True) -> Iterator[dict[str, Any]]:
    """Provider options for a serialised graph, to be tried in turn; `stream` is the CUDA stream that all work shares.

    CUDA: as a CUDA graph, which ONNX Runtime captures in the third run, unless `captured` is False; then launch by
    launch. TensorRT: with the engine of an earlier run, then, as that may be corrupt, without it.
    """
    if device == "onnxruntime":
        yield {}
        return
    shared = {"device_id": "0", "user_compute_stream": str(stream)}
    if device == "tensorrt":
        folder = _engine_folder(model)
        known = any(folder.glob("*.engine")) if folder.is_dir() else False
        for last in (False, True) if known else (True,):
            if not any(folder.glob("*.engine")):
                log.info("device tensorrt: building an engine, which takes a while; it is kept in %s", folder)
            folder.mkdir(parents=True, exist_ok=True)
            yield {
                **shared,  # graphs are strongly typed: no precision flags
                "trt_engine_cache_enable": "1",
                "trt_engine_cache_path": str(folder),
                "trt_timing_cache_enable": "1",
                "trt_timing_cache_path": str(folder.parent),
            }
            if not last:  # other processes may have the same idea
                shutil.rmtree(folder, ignore_errors=True)
        return
    low = precision != "fp32"
    settings = {
        **shared,
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "use_tf32": "1" if low else "0",  # 0 takes the tensor cores from fp16 too
        "prefer_nhwc": "1" if low else "0",
        "arena_extend_strategy": "kSameAsRequested",
    }
    if captured:
        yield {**settings, "enable_cuda_graph": "1"}
    yield settings


def _engine_folder(model: bytes) -> Path:
    """Where TensorRT's engine for this graph is kept: another graph, weights, shape, version or GPU has another one.

    A graph names its weights by their digest. The folder above holds the timings, which TensorRT ties to the GPU.
    """
    import torch

    parts = [model, torch.cuda.get_device_name(0).encode(), str(torch.cuda.get_device_capability(0)).encode()]
    for wheel in ("tensorrt-cu13", "tensorrt-cu13-libs", "onnxruntime-gpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            parts.append(f"{wheel} {metadata.version(wheel)}".encode())
    return cache_folder() / "tensorrt" / hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def verify(session: Any, device: str) -> None:
    """Raise BackendError unless the session runs on the provider of `device`."""
    running = session.get_providers()
    if running[0] != PROVIDERS[device]:
        line = install_line(_EXTRA[device])
        raise BackendError(f"device {device}: {PROVIDERS[device]} did not start, {running[0]} did: {line}")
