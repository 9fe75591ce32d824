"""Matrix products by cuBLAS, with a handle and a little workspace for each stream.

torch has a handle for each thread, and keeps 32 MiB for each stream that it was ever used on; nor does it hand pointers
to numbers on the device on, as CuPy does not in a stream that is captured.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

_WORKSPACE = 4 << 20  # bytes for each stream
_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}  # cudaDataType; what follows are cuBLAS's own numbers
_AS_IT_IS, _TRANSPOSED, _IN_FP32, _ANY_ALGORITHM, _ON_DEVICE, _FULL_REDUCTION = 0, 1, 68, -1, 1, 16


@functools.cache
def _library() -> ctypes.CDLL:
    """The library that torch has loaded."""
    return ctypes.CDLL(f"libcublas.so.{(torch.version.cuda or '').partition('.')[0]}")


class _Handle:
    """cuBLAS on one stream: factors are on the device, fp32 is not rounded to TF32, and 16 bits add up in fp32."""

    def __init__(self, stream: int, device: torch.device) -> None:
        self._device, self._pointer = device, ctypes.c_void_p()
        self._workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=device)
        numbers = torch.tensor([0.0, 1.0], device=device)
        self.zero, self.one = numbers
        self.call("cublasCreate_v2", pointer=ctypes.byref(self._pointer))
        self.call("cublasSetStream_v2", ctypes.c_void_p(stream))  # which takes the workspace away
        self.call("cublasSetWorkspace_v2", _address(self._workspace), ctypes.c_size_t(_WORKSPACE))
        self.call("cublasSetPointerMode_v2", _ON_DEVICE)
        self.call("cublasSetMathMode", _FULL_REDUCTION)

    def call(self, function: str, *arguments: object, pointer: object = None) -> None:
        """Raises RuntimeError if cuBLAS refuses."""
        with torch.cuda.device(self._device):
            status = getattr(_library(), function)(self._pointer if pointer is None else pointer, *arguments)
        if status:
            raise RuntimeError(f"{function}: status {status}")


@functools.cache
def _of_stream(stream: int, device: torch.device) -> _Handle:
    return _Handle(stream, device)


def _handle(device: torch.device) -> _Handle:
    return _of_stream(torch.cuda.current_stream(device).cuda_stream, device)


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def multiply(symmetric: Tensor, features: Tensor, factor: Tensor, share: Tensor, out: Tensor) -> None:
    """out (C, M) = factor * symmetric (C, C) features (C, M) + share * out, for numbers on the device, fp32.

    Matrices have one dtype; features and out are contiguous, or the transposes of contiguous ones. Sums are fp32.
    """
    channels, positions = features.shape
    # cuBLAS stands columns side by side: to it all are transposed, and (M, C) in memory is C x M.
    if features.stride(0) == 1:
        size, left, right = (channels, positions), (symmetric, channels), (features, channels)
    else:
        size, left, right = (positions, channels), (features, positions), (symmetric, channels)
    kind = _TYPES[features.dtype]
    operands = [each for tensor, rows in (left, right) for each in (_address(tensor), kind, rows)]
    target = _address(out), kind, size[0]
    _handle(features.device).call(
        "cublasGemmEx", _AS_IT_IS, _AS_IT_IS, *size, channels, _address(factor), *operands, _address(share), *target,
        _IN_FP32, _ANY_ALGORITHM,
    )  # fmt: skip


def products(features: Tensor, share: int, out: Tensor) -> None:
    """Write F F^T of each `share` positions of features (C, M) into `out` (shares, C, C), fp32.

    Features are contiguous, or the transpose of such. Sums and results are fp32 for 16-bit features as well: fp16 would
    overflow. Shares keep the sums of the tensor cores short, which cut off what does not fit, and fill the chip where
    C x C is little work.
    """
    channels, positions = features.shape
    lies_well = features.stride(0) == 1
    rows, ways = (channels, (_AS_IT_IS, _TRANSPOSED)) if lies_well else (positions, (_TRANSPOSED, _AS_IT_IS))
    handle, kind, square = _handle(features.device), _TYPES[features.dtype], channels * channels
    full, rest = divmod(positions, share)
    for first, count, length in ((0, full, share), (full, 1, rest)):
        if not count * length:
            continue
        begin = ctypes.c_void_p(features[:, first * share :].data_ptr())
        operand = begin, kind, rows, ctypes.c_longlong(share * (channels if lies_well else 1))
        target = _address(out[first]), _TYPES[out.dtype], channels, ctypes.c_longlong(square)
        handle.call(
            "cublasGemmStridedBatchedEx", *ways, channels, channels, length, _address(handle.one), *operand, *operand,
            _address(handle.zero), *target, count, _IN_FP32, _ANY_ALGORITHM,
        )  # fmt: skip
