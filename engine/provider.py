"""Devices: what runs on them, whether it can run here, and the options of ONNX Runtime's providers.

Nothing heavy is imported before the cheap checks have passed, so that a missing library is reported at once.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
from typing import Any

from .config import choice
from .export.ort import INSTALL, BackendError, onnxruntime

log = logging.getLogger(__name__)

PROVIDERS = {  # of ONNX Runtime; the device `cpu` is the program of `winograd`
    "onnxruntime": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
GPUS = ("cuda", "tensorrt")
DEVICES = ("auto", "cpu", *PROVIDERS)
_EXTRA = {"cpu": "cpu", "onnxruntime": "cpu", "cuda": "gpu", "tensorrt": "tensorrt"}
PRECISIONS = ("auto", "fp32", "fp16", "bf16")


def resolve(device: str, precision: str) -> tuple[str, str]:
    """Turn `auto` into what works best here and check what was named: (device, precision).

    Raises ValueError for an unknown name, BackendError for a device or precision that cannot run here.
    """
    choice("device", device, DEVICES)
    choice("precision", precision, PRECISIONS)
    if device == "auto":
        try:
            check("cuda")
            device = "cuda"
        except BackendError as error:
            log.debug("not on the GPU: %s", error)
            check("cpu")
            device = "cpu"
        log.info("device: %s", device)
    else:
        check(device)
    if precision == "bf16":
        raise BackendError("precision bf16: ONNX Runtime has no bf16 kernels for these graphs; choose fp32 or fp16")
    if precision == "auto":
        precision = "fp32"  # the reference everywhere, until fp16 has shown on a device that it holds the numerics
    elif precision == "fp16" and device == "cpu":
        raise BackendError(
            "precision fp16: device cpu computes in fp32; --device onnxruntime runs fp16 graphs by casts"
        )
    return device, precision


def check(device: str) -> None:
    """Raise BackendError, naming the missing library and the install line, unless `device` can run here."""
    extra = _EXTRA[device]
    line = INSTALL.format(extra=extra)
    if device == "cpu":
        if importlib.util.find_spec("numba") is None:
            raise BackendError(f"device cpu: numba is missing: {line}")
        return
    ort = onnxruntime(extra)
    if device == "onnxruntime":
        return
    if PROVIDERS[device] not in ort.get_available_providers():
        raise BackendError(
            f"device {device}: onnxruntime-gpu is missing, the CPU wheel onnxruntime is installed: "
            f"pip uninstall -y onnxruntime && {line}"
        )
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendError(f"device {device}: the NVIDIA driver (libcuda.so.1) is missing; then {line}") from error
    if importlib.util.find_spec("cupy") is None:
        raise BackendError(f"device {device}: cupy is missing: {line}")
    import torch  # before preload_dlls: it brings most of the CUDA libraries

    if not torch.cuda.is_available():
        raise BackendError(f"device {device}: torch {torch.__version__} finds no CUDA device")
    ort.preload_dlls()
    libraries = ["libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10", "libcudart.so.13", "libcudnn.so.9"]
    if device == "tensorrt":
        _preload_tensorrt(line)
        libraries.append("libnvinfer.so.10")
    for library in libraries:
        try:
            ctypes.CDLL(library)
        except OSError as error:
            raise BackendError(f"device {device}: {library} is missing: {line}") from error


def _preload_tensorrt(line: str) -> None:
    """Load the libraries of the tensorrt wheel, which are on no search path."""
    found = importlib.util.find_spec("tensorrt_libs")
    if found is None or not found.submodule_search_locations:
        raise BackendError(f"device tensorrt: tensorrt_libs (libnvinfer.so.10) is missing: {line}")
    folder = found.submodule_search_locations[0]
    for library in ("libnvinfer.so.10", "libnvonnxparser.so.10"):
        try:
            ctypes.CDLL(f"{folder}/{library}", mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise BackendError(f"device tensorrt: {library} does not load ({error}): {line}") from error


def options(device: str, precision: str, stream: int) -> dict[str, Any]:
    """Provider options; `stream` is the CUDA stream that all work shares."""
    if device == "onnxruntime":
        return {}
    shared = {"device_id": "0", "user_compute_stream": str(stream)}
    if device == "tensorrt":
        return shared  # graphs are strongly typed: no precision flags
    return {
        **shared,
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "use_tf32": "0" if precision == "fp32" else "1",  # 0 takes the tensor cores from fp16 too
        "arena_extend_strategy": "kSameAsRequested",
    }


def verify(session: Any, device: str) -> None:
    """Raise BackendError unless the session runs on the provider of `device`."""
    running = session.get_providers()
    if running[0] != PROVIDERS[device]:
        line = INSTALL.format(extra=_EXTRA[device])
        raise BackendError(f"device {device}: {PROVIDERS[device]} did not start, {running[0]} did: {line}")
