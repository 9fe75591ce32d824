"""3x3 convolutions on a CPU by Winograd's minimal filtering F(4x4, 3x3) (Lavin, Gray 2016), compiled by LLVM.

    Y = A^T [ (G g G^T) * (B^T d B) ] A

A tile d of 6x6 positions gives 4x4 results Y with 36 products a channel pair, where direct convolution takes 144. The
interpolation points are 0, +-a, +-b and infinity with a b = 1, which rounds three times better than the usual 1 and 2.
Summed over the input channels the products are 36 matrix products: tiles x channels in, times U = G g G^T.

Arrays are fp32 in NHWC order, addresses are integers in bytes, strides are counted in floats, channels come in
multiples of `BLOCK`. Nothing here checks a bound: `engine.winograd` lays out the memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit
from numba.extending import intrinsic
from numpy.typing import NDArray

from .nhwc import inside
from .vector import (
    BLOCK,
    LANES,
    ROWS,
    SQUARE,
    ZERO,
    Code,
    clear,
    copy,
    multiply,
    multiply_halves,
    multiply_transposed,
    procedure,
)

TILES = 12  # tiles are worked on in multiples of this
_POINT = (math.sqrt(0.5), math.sqrt(2))  # a, b
# Turning a kernel by 180 degrees inverts the points: line i of its U is _FLIP[i][1] times line _FLIP[i][0].
_FLIP = ((5, 1.0), (3, -2.0), (4, -2.0), (1, -0.5), (2, -0.5), (0, 1.0))
_TURNED = tuple(line for line, _ in _FLIP)


def transform_kernel(kernel: NDArray[np.float32]) -> NDArray[np.float32]:
    """U of a kernel (C_out, C_in, 3, 3) as panels (36, C_out / BLOCK, C_in, BLOCK)."""
    a, b = _POINT
    points = np.array([0, a, -a, b, -b])
    norms = np.array([1, *[2 * p * p * (p * p - q * q) for p, q in ((a, b), (a, b), (b, a), (b, a))]])
    g = np.vstack([np.stack([points**0, points, points**2], 1) / norms[:, None], [0, 0, 1]])
    both = np.kron(g, g)
    c_out, c_in = kernel.shape[:2]
    u = np.empty((36, c_out // BLOCK, c_in, BLOCK), np.float32)
    for block, part in enumerate(kernel.reshape(-1, BLOCK, c_in, 9)):  # by parts: float64 of all would be large
        columns = np.ascontiguousarray(part.transpose(2, 1, 0), np.float64).reshape(9, -1)
        u[:, block] = (both @ columns).reshape(36, c_in, BLOCK)
    return u


def _input_line(code: Code, d: Sequence[Any]) -> list[Any]:
    """B^T d along one axis: 6 values -> 6."""
    (a, b), (d0, d1, d2, d3, d4, d5) = _POINT, d
    mixed = a * a + b * b
    lines = [code.add(code.fma(-mixed, d2, d4), d0)]  # a b = 1
    for p, q in ((a, b), (b, a)):
        even, odd = code.fma(-q * q, d2, d4), code.fma(-q * q, d1, d3)
        lines += [code.fma(p, odd, even), code.fma(-p, odd, even)]
    return [*lines, code.add(code.fma(-mixed, d3, d5), d1)]


def _output_line(code: Code, m: Sequence[Any]) -> list[Any]:
    """A^T m along one axis: 6 values -> 4."""
    a, b = _POINT
    sum_a, sum_b = code.add(m[1], m[2]), code.add(m[3], m[4])
    far_a, far_b = code.sub(m[1], m[2]), code.sub(m[3], m[4])
    return [
        code.add(code.add(m[0], sum_a), sum_b),
        code.fma(a, far_a, code.fma(b, far_b, ZERO)),
        code.fma(a * a, sum_a, code.fma(b * b, sum_b, ZERO)),
        code.fma(a**3, far_a, code.fma(b**3, far_b, m[5])),
    ]


def _input(flipped: bool, halves: bool = False) -> Any:
    def emit(code: Code, source: Any, row: Any, column: Any, target: Any, plane: Any) -> None:
        def line(cells: list[Any]) -> list[Any]:
            values = _input_line(code, cells)
            return [code.scaled(_FLIP[i][1], values[i]) for i in range(6)] if flipped else values

        lines = []
        for i in range(6):
            start = code.step(source, row, i)
            lines.append(line([code.load(code.step(start, column, j)) for j in range(6)]))
        for j in range(6):
            for i, value in enumerate(line([cells[j] for cells in lines])):
                code.store(code.halves(value) if halves else value, code.step(target, plane, 6 * i + j))

    @intrinsic
    def transform(context, source, row, column, target, plane):  # type: ignore[no-untyped-def]
        return procedure(5, emit)

    return transform


# (source, row, column, target, plane): V of LANES channels of the 6x6 tile at source, one vector a plane of target.
transform_input, transform_input_flipped = _input(False), _input(True)
transform_input_halves = _input(False, halves=True)  # V in bf16, half a vector a plane


def _output(mode: str) -> Any:
    def emit(
        code: Code,
        m: Any,
        plane: Any,
        bias: Any,
        bits: Any,
        target: Any,
        row: Any,
        column: Any,
        height: Any,
        width: Any,
    ) -> None:
        lines = []
        for i in range(6):
            lines.append(_output_line(code, [code.load(code.step(m, plane, 6 * i + j)) for j in range(6)]))
        columns = [_output_line(code, [line[j] for line in lines]) for j in range(4)]
        biases = code.load(bias) if mode in ("relu", "biased") else None
        for i in range(4):
            with code.inside(i, height):
                for j in range(4):
                    with code.inside(j, width):
                        place = code.b.add(code.times(row, i), code.times(column, j))
                        address, value = code.offset(target, place), columns[j][i]
                        own = code.bits(bits, place)
                        if biases is not None:
                            value = code.add(value, biases)
                            code.store_bits(code.positive(value), own)
                        if mode == "relu":
                            value = code.where_positive(value, value)
                        if mode == "masked_sum":
                            value = code.add(value, code.load(address))
                        if mode in ("masked", "masked_sum"):
                            value = code.where_bits(own, value)
                        code.store(value, address)

    @intrinsic
    def output(context, m, plane, bias, bits, target, row, column, height, width):  # type: ignore[no-untyped-def]
        return procedure(9, emit)

    return output


# (m, plane, bias, bits, target, row, column, height, width): the upper left height x width of the 4x4 results Y of
# LANES channels, as target = max(Y + bias, 0), as target = Y [bits], as target = (Y + target) [bits], as target = Y or
# as target = Y + bias. Those with a bias set bits = Y + bias > 0.
output_relu, output_masked, output_masked_sum, output_plain = map(_output, ("relu", "masked", "masked_sum", "plain"))
output_biased = _output("biased")

RELU, MASKED, MASKED_SUM, PLAIN, BIASED = range(5)  # what `convolve` makes of its results: see output_relu and so on


def scratch_size(c_in: int, c_out: int, tiles: int) -> int:
    """Floats that `convolve` needs to itself for blocks of `tiles` tiles."""
    return 36 * (tiles * (c_in + c_out) + 2 * LANES + c_in)


@njit(nogil=True, error_model="numpy")
def convolve(  # type: ignore[no-untyped-def]
    source,
    target,
    height,
    width,
    c_in,
    c_out,
    u,
    bias,
    bits,
    turned,
    ending,
    halves,
    padding,
    first,
    count,
    group,
    groups,
    scratch,
):
    """Results of one block of tiles and one group of output channels.

    `source` (height, width, c_in) and `target` (height, width, c_out) are addresses; `u` is the address of the panels
    of the kernel or, if `turned`, of the kernel whose VJP is wanted: turned by 180 degrees, its channel axes swapped.
    With `halves`, which are not `turned`, U is in bf16 (`vector.in_halves`), and so is V.
    `first` and `count` choose tiles in row-major order, `group` of `groups` the channels, which are a multiple of
    BLOCK. `bits` is the address of a bit for each element of `target`, set where its ReLU lets it pass (see `ending`).
    `padding`, an index of `nhwc.PADDINGS`, is zero or circular: the VJP of either is padded in the same way. `scratch`
    has `scratch_size` floats.
    """
    across = (width + 3) // 4
    rows = -(-count // TILES) * TILES  # of V and M; those past `count` hold leftovers, which nobody reads
    wide = c_out // groups
    channel = group * wide
    depth = c_in // 2 if halves else c_in  # floats that a row of V takes
    v_plane, m_plane = rows * depth + LANES, rows * wide + LANES  # an odd number of cache lines: all sets are used
    m = scratch + 4 * 36 * v_plane
    patch = m + 4 * 36 * m_plane
    for t in range(count):
        y, x = 4 * ((first + t) // across) - 1, 4 * ((first + t) % across) - 1
        row, tile = width * c_in, source + 4 * (y * width + x) * c_in
        if y < 0 or x < 0 or y + 6 > height or x + 6 > width:
            row, tile = 6 * c_in, patch
            for i in range(6):
                line = inside(y + i, height, padding)
                for j in range(6):
                    place = inside(x + j, width, padding)
                    cell = patch + 4 * (6 * i + j) * c_in
                    if line >= 0 and place >= 0:
                        copy(source + 4 * (line * width + place) * c_in, cell, c_in)
                    else:
                        clear(cell, c_in)
        for c in range(0, c_in, LANES):
            place = scratch + 4 * t * depth + (2 if halves else 4) * c
            if halves:
                transform_input_halves(tile + 4 * c, row, c_in, place, v_plane)
            elif turned:
                transform_input_flipped(tile + 4 * c, row, c_in, place, v_plane)
            else:
                transform_input(tile + 4 * c, row, c_in, place, v_plane)
    for p in range(36):
        v, result = scratch + 4 * p * v_plane, m + 4 * p * m_plane
        if turned:
            plane = u + 4 * (6 * _TURNED[p // 6] + _TURNED[p % 6]) * c_in * c_out
            for strip in range(0, wide, LANES):  # rows of U and of V that fit into the first cache together
                for t in range(0, rows, SQUARE):
                    for n in range(strip, strip + LANES, SQUARE):
                        rows_of_u, place = plane + 4 * (channel + n) * BLOCK, result + 4 * (t * wide + n)
                        multiply_transposed(
                            v + 4 * t * c_in, c_in, rows_of_u, c_out * BLOCK, c_in // BLOCK, place, wide
                        )
        else:
            for n in range(0, wide, BLOCK):
                panel = u + 4 * (p * c_out + channel + n) * depth
                for t in range(0, rows, ROWS):
                    place, total = v + 4 * t * depth, result + 4 * (t * wide + n)
                    if halves:
                        multiply_halves(place, depth, 1, panel, BLOCK, depth, total, wide)
                    else:
                        multiply(place, depth, 1, panel, BLOCK, depth, total, wide)
    for t in range(count):
        y, x = 4 * ((first + t) // across), 4 * ((first + t) % across)
        high, broad = min(4, height - y), min(4, width - x)
        for c in range(0, wide, LANES):
            offset = (y * width + x) * c_out + channel + c
            place, result, marks = m + 4 * (t * wide + c), target + 4 * offset, bits + offset // 8
            stride, row = m_plane, width * c_out
            if ending == RELU:
                output_relu(place, stride, bias + 4 * (channel + c), marks, result, row, c_out, high, broad)
            elif ending == MASKED:
                output_masked(place, stride, 0, marks, result, row, c_out, high, broad)
            elif ending == MASKED_SUM:
                output_masked_sum(place, stride, 0, marks, result, row, c_out, high, broad)
            elif ending == BIASED:
                output_biased(place, stride, bias + 4 * (channel + c), marks, result, row, c_out, high, broad)
            else:
                output_plain(place, stride, 0, marks, result, row, c_out, high, broad)
