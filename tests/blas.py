"""cuBLAS on this CPU: the calls of `kernels._blas`, read as its manual has them, on memory of the host."""

import ctypes
import re

import numpy as np
import torch

TYPES = {0: torch.float32, 2: torch.float16, 14: torch.bfloat16}


class Cublas:
    """Column by column; sums are fp64."""

    def __init__(self):
        self.workspace, self.streams = None, []

    def __getattr__(self, name):
        own = re.sub("([A-Z])", r"_\1", name.removeprefix("cublas").removesuffix("_v2")).lower()
        return object.__getattribute__(self, own)

    def _create(self, handle):
        handle._obj.value = 4096
        return 0

    def _set_stream(self, handle, stream):
        self.workspace = None
        self.streams.append(stream.value)
        return 0

    def _set_workspace(self, handle, memory, size):
        self.workspace = size.value
        return 0

    def _set_pointer_mode(self, handle, mode):
        assert mode == 1  # on the device
        return 0

    def _set_math_mode(self, handle, mode):
        assert mode == 16  # no TF32, and no sums in 16 bits
        return 0

    def _gemm_ex(self, handle, opa, opb, m, n, k, alpha, a, ta, lda, b, tb, ldb, beta, c, tc, ldc, kind, algo):
        left, right, target = (a, ta, lda, 0), (b, tb, ldb, 0), (c, tc, ldc, 0)
        return self._gemm(handle, opa, opb, (m, n, k), alpha, left, right, beta, target, 1, kind)

    def _gemm_strided_batched_ex(
        self, handle, opa, opb, m, n, k, alpha, a, ta, lda, sa, b, tb, ldb, sb, beta, c, tc, ldc, sc, count, kind, algo
    ):
        left, right, target = (a, ta, lda, sa.value), (b, tb, ldb, sb.value), (c, tc, ldc, sc.value)
        return self._gemm(handle, opa, opb, (m, n, k), alpha, left, right, beta, target, count, kind)

    def _gemm(self, handle, opa, opb, size, alpha, left, right, beta, target, count, kind):
        if handle.value != 4096 or self.workspace is None:
            return 1
        assert kind == 68  # sums in fp32
        m, n, k = size
        factor, share = (float(_view(each, 0, 1, 1, 1)[0, 0]) for each in (alpha, beta))
        for i in range(count):
            a, b = _operand(left, i, opa, m, k), _operand(right, i, opb, k, n)
            out = _matrix(target, i, m, n)
            product = factor * (a.double() @ b.double())
            out.copy_(product if share == 0 else product + share * out.double())  # what is there may be NaN
        return 0


def _operand(given, index, transposed, rows, columns):
    return _matrix(given, index, columns, rows).T if transposed else _matrix(given, index, rows, columns)


def _matrix(given, index, rows, columns):
    address, kind, leading, stride = given
    assert leading >= rows
    element = torch.empty(0, dtype=TYPES[kind]).itemsize
    return _view(ctypes.c_void_p(address.value + index * stride * element), kind, rows, columns, leading)


def _view(address, kind, rows, columns, leading):
    """(rows, columns) at an address, columns side by side."""
    dtype = TYPES[kind]
    length = leading * (columns - 1) + rows
    size = torch.empty(0, dtype=dtype).itemsize
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * (length * size)).from_address(address.value))
    return torch.from_numpy(memory).view(dtype).as_strided((rows, columns), (1, leading))
