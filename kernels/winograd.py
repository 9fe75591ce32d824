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
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

LANES = 16  # channels of one vector; LLVM splits it where registers are shorter
BLOCK = 64  # output channels of a panel of U
TILES = 12  # tiles are worked on in multiples of this
_POINT = (math.sqrt(0.5), math.sqrt(2))  # a, b
# Turning a kernel by 180 degrees inverts the points: line i of its U is _FLIP[i][1] times line _FLIP[i][0].
_FLIP = ((5, 1.0), (3, -2.0), (4, -2.0), (1, -0.5), (2, -0.5), (0, 1.0))
_TURNED = tuple(line for line, _ in _FLIP)
_ROWS, _COLUMNS = 6, 4  # accumulators of `multiply`: rows of one float, columns of LANES
_CHUNK = 32  # products added up on their own: long sums of fp32 would round more than Winograd's transforms do
_SQUARE = 4  # accumulators of `multiply_transposed`: SQUARE x SQUARE sums over LANES

_FLOAT, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, LANES)
_PREFETCH = "llvm.prefetch.p0"
_ZERO = ir.Constant(_VECTOR, None)
_CACHED = {"nogil": True, "cache": True, "error_model": "numpy"}


def transform_kernel(kernel: NDArray[np.float32]) -> NDArray[np.float32]:
    """U of a kernel (C_out, C_in, 3, 3) as panels (36, C_out / BLOCK, C_in, BLOCK)."""
    a, b = _POINT
    points = np.array([0, a, -a, b, -b])
    norms = np.array([1, *[2 * p * p * (p * p - q * q) for p, q in ((a, b), (a, b), (b, a), (b, a))]])
    g = np.vstack([np.stack([points**0, points, points**2], 1) / norms[:, None], [0, 0, 1]])
    c_out, c_in = kernel.shape[:2]
    u = np.empty((6, 6, c_out // BLOCK, c_in, BLOCK), np.float32)
    for block, part in enumerate(kernel.reshape(-1, BLOCK, c_in, 3, 3)):  # by parts: float64 of all would be large
        u[:, :, block] = np.einsum("ik,ocks,js->ijco", g, part, g, optimize=True)
    return u.reshape(36, c_out // BLOCK, c_in, BLOCK)


def _lane_list(lanes: Sequence[int]) -> Any:
    return ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes))


class _Code:
    """Emits the body of an intrinsic: addresses are i64, vectors are <LANES x float>."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder
        name = f"llvm.fma.v{LANES}f32"
        kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
        self._fma = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)

    def offset(self, address: Any, index: Any, scale: int = 4) -> Any:
        """address + scale * index, for an index in Python or in the program."""
        index = ir.Constant(_I64, index) if isinstance(index, int) else index
        return self.b.add(address, self.b.mul(index, ir.Constant(_I64, scale)))

    def load(self, address: Any, kind: ir.Type = _VECTOR) -> Any:
        return self.b.load(self.b.inttoptr(address, kind.as_pointer()), align=4)

    def prefetch(self, address: Any) -> None:
        """Ask for the cache line at `address`, which need not exist."""
        place = self.b.inttoptr(address, ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [place.type, _I32, _I32, _I32])
        function = self.b.module.globals.get(_PREFETCH) or ir.Function(self.b.module, kind, _PREFETCH)
        self.b.call(function, [place, *(ir.Constant(_I32, value) for value in (0, 2, 1))])  # read, into L2, data

    def store(self, value: Any, address: Any) -> None:
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer()), align=4)

    def times(self, stride: Any, count: int) -> Any:
        return self.b.mul(stride, ir.Constant(_I64, count))

    def step(self, address: Any, stride: Any, count: int) -> Any:
        """address + count strides."""
        return self.offset(address, self.times(stride, count))

    def inside(self, index: int, count: Any) -> Any:
        return self.b.if_then(self.b.icmp_signed("<", ir.Constant(_I64, index), count), likely=True)

    def lanes(self, value: Any, first: int, count: int) -> Any:
        """A short vector of some lanes."""
        return self.b.shuffle_vector(value, value, _lane_list(range(first, first + count)))

    def every_second(self, x: Any, y: Any, first: int) -> Any:
        """Lanes first, first + 2, ... of x, then of y."""
        return self.b.shuffle_vector(x, y, _lane_list(range(first, 2 * LANES, 2)))

    def splat(self, value: Any) -> Any:
        if isinstance(value, int | float):
            return ir.Constant(_VECTOR, [float(np.float32(value))] * LANES)
        one = self.b.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.Constant(_I32, 0))
        zeros = ir.Constant(ir.VectorType(_I32, LANES), None)
        return self.b.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), zeros)

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        """x y + z, where x may be a number."""
        return self.b.call(self._fma, [self.splat(x) if isinstance(x, int | float) else x, y, z])

    def scaled(self, factor: float, x: Any) -> Any:
        return x if factor == 1 else self.b.fmul(self.splat(factor), x)

    def add(self, x: Any, y: Any) -> Any:
        return self.b.fadd(x, y)

    def sub(self, x: Any, y: Any) -> Any:
        return self.b.fsub(x, y)

    def where_positive(self, condition: Any, value: Any) -> Any:
        """value where condition > 0, else 0."""
        return self.b.select(self.b.fcmp_ordered(">", condition, _ZERO), value, _ZERO)

    def loop(self, count: Any, carried: Sequence[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
        """Run body(index, values) -> values for index in 0 .. count - 1, count >= 1; returns the last values."""
        before = self.b.block
        inside, after = self.b.append_basic_block("loop"), self.b.append_basic_block("after")
        self.b.branch(inside)
        self.b.position_at_end(inside)
        index = self.b.phi(_I64)
        index.add_incoming(ir.Constant(_I64, 0), before)
        values = [self.b.phi(value.type) for value in carried]
        for phi, value in zip(values, carried, strict=True):
            phi.add_incoming(value, before)
        results = body(index, values)
        end, following = self.b.block, self.b.add(index, ir.Constant(_I64, 1))
        index.add_incoming(following, end)
        for phi, value in zip(values, results, strict=True):
            phi.add_incoming(value, end)
        self.b.cbranch(self.b.icmp_signed("<", following, count), inside, after)
        self.b.position_at_end(after)
        return results

    def input_line(self, d: Sequence[Any]) -> list[Any]:
        """B^T d along one axis: 6 values -> 6."""
        (a, b), (d0, d1, d2, d3, d4, d5) = _POINT, d
        mixed = a * a + b * b
        lines = [self.add(self.fma(-mixed, d2, d4), d0)]  # a b = 1
        for p, q in ((a, b), (b, a)):
            even, odd = self.fma(-q * q, d2, d4), self.fma(-q * q, d1, d3)
            lines += [self.fma(p, odd, even), self.fma(-p, odd, even)]
        return [*lines, self.add(self.fma(-mixed, d3, d5), d1)]

    def output_line(self, m: Sequence[Any]) -> list[Any]:
        """A^T m along one axis: 6 values -> 4."""
        a, b = _POINT
        sum_a, sum_b = self.add(m[1], m[2]), self.add(m[3], m[4])
        far_a, far_b = self.sub(m[1], m[2]), self.sub(m[3], m[4])
        return [
            self.add(self.add(m[0], sum_a), sum_b),
            self.fma(a, far_a, self.fma(b, far_b, _ZERO)),
            self.fma(a * a, sum_a, self.fma(b * b, sum_b, _ZERO)),
            self.fma(a**3, far_a, self.fma(b**3, far_b, m[5])),
        ]


_Emit = Callable[..., None]


def _procedure(count: int, emit: _Emit) -> tuple[Any, Callable[..., Any]]:
    """Signature and code of an intrinsic whose `count` arguments are i64."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        emit(_Code(builder), *values)
        return context.get_dummy_value()

    return types.void(*[types.int64] * count), codegen


@intrinsic  # type: ignore[untyped-decorator]
def multiply(context, v, v_stride, u, depth, m, m_stride):  # type: ignore[no-untyped-def]
    """_ROWS rows of m, BLOCK wide = rows of v (depth long) times one panel u (depth, BLOCK)."""

    def emit(code: _Code, v: Any, v_stride: Any, u: Any, depth: Any, m: Any, m_stride: Any) -> None:
        rows = [code.step(v, v_stride, i) for i in range(_ROWS)]
        count = _ROWS * _COLUMNS

        def line(k: Any, sums: list[Any]) -> list[Any]:
            panel = code.offset(u, k, 4 * BLOCK)
            columns = [code.load(code.offset(panel, LANES * j)) for j in range(_COLUMNS)]
            following = code.offset(panel, depth, 4 * BLOCK)  # the next panel: U streams from memory in deep layers
            for j in range(_COLUMNS):
                code.prefetch(code.offset(following, LANES * j))
            result = []
            for i, row in enumerate(rows):
                value = code.splat(code.load(code.offset(row, k), _FLOAT))
                result += [code.fma(value, column, sums[i * _COLUMNS + j]) for j, column in enumerate(columns)]
            return result

        def chunk(index: Any, totals: list[Any]) -> list[Any]:
            start = code.times(index, _CHUNK)
            sums = code.loop(
                ir.Constant(_I64, _CHUNK), [_ZERO] * count, lambda k, sums: line(code.b.add(start, k), sums)
            )
            return [code.add(x, y) for x, y in zip(totals, sums, strict=True)]

        sums = code.loop(code.b.sdiv(depth, ir.Constant(_I64, _CHUNK)), [_ZERO] * count, chunk)
        for i in range(_ROWS):
            for j in range(_COLUMNS):
                code.store(sums[i * _COLUMNS + j], code.offset(code.step(m, m_stride, i), LANES * j))

    return _procedure(6, emit)


@intrinsic  # type: ignore[untyped-decorator]
def multiply_transposed(context, v, v_stride, u, panel, panels, m, m_stride):  # type: ignore[no-untyped-def]
    """_SQUARE rows of m, _SQUARE wide = rows of v (panels * BLOCK long) times _SQUARE rows of U, transposed.

    `u` is the first of the rows in the first panel, `panel` the floats from there to the next panel.
    """

    def emit(code: _Code, v: Any, v_stride: Any, u: Any, panel: Any, panels: Any, m: Any, m_stride: Any) -> None:
        def body(k: Any, sums: list[Any]) -> list[Any]:
            part, rows = code.offset(v, k, 4 * BLOCK), code.offset(u, code.b.mul(k, panel))
            for j in range(0, BLOCK, LANES):
                left = [code.load(code.offset(code.step(part, v_stride, i), j)) for i in range(_SQUARE)]
                right = [code.load(code.offset(rows, BLOCK * i + j)) for i in range(_SQUARE)]
                sums = [code.fma(x, y, sums[i]) for i, (x, y) in enumerate((x, y) for x in left for y in right)]
            return sums

        sums = code.loop(panels, [_ZERO] * _SQUARE**2, body)
        while len(sums) > 1:  # halve the lanes of two sums into one vector, until lane i holds the total of sum i
            sums = [code.add(code.every_second(x, y, 0), code.every_second(x, y, 1)) for x, y in _pairs(sums)]
        for i in range(_SQUARE):
            code.store(code.lanes(sums[0], i * _SQUARE, _SQUARE), code.step(m, m_stride, i))

    return _procedure(7, emit)


def _pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(items[::2], items[1::2], strict=True))


@intrinsic  # type: ignore[untyped-decorator]
def copy(context, source, target, count):  # type: ignore[no-untyped-def]
    """Copy `count` floats, a multiple of LANES."""

    def emit(code: _Code, source: Any, target: Any, count: Any) -> None:
        def body(i: Any, values: list[Any]) -> list[Any]:
            code.store(code.load(code.offset(source, i, 4 * LANES)), code.offset(target, i, 4 * LANES))
            return []

        code.loop(code.b.sdiv(count, ir.Constant(_I64, LANES)), [], body)

    return _procedure(3, emit)


@intrinsic  # type: ignore[untyped-decorator]
def clear(context, target, count):  # type: ignore[no-untyped-def]
    """Set `count` floats, a multiple of LANES, to zero."""

    def emit(code: _Code, target: Any, count: Any) -> None:
        def body(i: Any, values: list[Any]) -> list[Any]:
            code.store(_ZERO, code.offset(target, i, 4 * LANES))
            return []

        code.loop(code.b.sdiv(count, ir.Constant(_I64, LANES)), [], body)

    return _procedure(2, emit)


def _input(flipped: bool) -> Any:
    def emit(code: _Code, source: Any, row: Any, column: Any, target: Any, plane: Any) -> None:
        def line(cells: list[Any]) -> list[Any]:
            values = code.input_line(cells)
            return [code.scaled(_FLIP[i][1], values[i]) for i in range(6)] if flipped else values

        lines = []
        for i in range(6):
            start = code.step(source, row, i)
            lines.append(line([code.load(code.step(start, column, j)) for j in range(6)]))
        for j in range(6):
            for i, value in enumerate(line([cells[j] for cells in lines])):
                code.store(value, code.step(target, plane, 6 * i + j))

    @intrinsic  # type: ignore[untyped-decorator]
    def transform(context, source, row, column, target, plane):  # type: ignore[no-untyped-def]
        return _procedure(5, emit)

    return transform


# (source, row, column, target, plane): V of LANES channels of the 6x6 tile at source, one vector a plane of target.
transform_input, transform_input_flipped = _input(False), _input(True)


def _output(mode: str) -> Any:
    def emit(
        code: _Code, m: Any, plane: Any, extra: Any, target: Any, row: Any, column: Any, height: Any, width: Any
    ) -> None:
        lines = []
        for i in range(6):
            lines.append(code.output_line([code.load(code.step(m, plane, 6 * i + j)) for j in range(6)]))
        columns = [code.output_line([line[j] for line in lines]) for j in range(4)]
        bias = code.load(extra) if mode == "relu" else None
        for i in range(4):
            with code.inside(i, height):
                for j in range(4):
                    with code.inside(j, width):
                        place = code.b.add(code.times(row, i), code.times(column, j))
                        address, value = code.offset(target, place), columns[j][i]
                        if mode == "relu":
                            value = code.add(value, bias)
                            value = code.where_positive(value, value)
                        if mode == "masked_sum":
                            value = code.add(value, code.load(code.offset(extra, place)))
                        if mode in ("masked", "masked_sum"):
                            value = code.where_positive(code.load(address), value)
                        code.store(value, address)

    @intrinsic  # type: ignore[untyped-decorator]
    def output(context, m, plane, extra, target, row, column, height, width):  # type: ignore[no-untyped-def]
        return _procedure(8, emit)

    return output


# (m, plane, extra, target, row, column, height, width): the upper left height x width of the 4x4 results Y of LANES
# channels, as target = max(Y + bias, 0), target = Y [target > 0], target = (Y + extra) [target > 0] or target = Y.
output_relu, output_masked, output_masked_sum, output_plain = map(_output, ("relu", "masked", "masked_sum", "plain"))

RELU, MASKED, MASKED_SUM, PLAIN = range(4)  # what `convolve` makes of its results: see output_relu and so on


def scratch_size(c_in: int, c_out: int, tiles: int) -> int:
    """Floats that `convolve` needs to itself for blocks of `tiles` tiles."""
    return 36 * (tiles * (c_in + c_out) + c_in)


@njit(**_CACHED)
def convolve(  # type: ignore[no-untyped-def]
    source, target, height, width, c_in, c_out, u, extra, turned, ending, first, count, group, groups, scratch
):
    """Results of one block of tiles and one group of output channels.

    `source` (height, width, c_in) and `target` (height, width, c_out) are addresses; `u` is the address of the panels
    of the kernel or, if `turned`, of the kernel whose VJP is wanted: turned by 180 degrees, its channel axes swapped.
    `first` and `count` choose tiles in row-major order, `group` of `groups` the channels, which are a multiple of
    BLOCK. `extra` is the address of the bias or of what is added (see `ending`); `scratch` has `scratch_size` floats.
    """
    across = (width + 3) // 4
    rows = -(-count // TILES) * TILES  # of V and M; those past `count` hold leftovers, which nobody reads
    wide = c_out // groups
    channel = group * wide
    m = scratch + 4 * 36 * rows * c_in
    patch = m + 4 * 36 * rows * wide
    for t in range(count):
        y, x = 4 * ((first + t) // across) - 1, 4 * ((first + t) % across) - 1
        row, tile = width * c_in, source + 4 * (y * width + x) * c_in
        if y < 0 or x < 0 or y + 6 > height or x + 6 > width:
            row, tile = 6 * c_in, patch
            for i in range(6):
                for j in range(6):
                    inside = 0 <= y + i < height and 0 <= x + j < width
                    cell = patch + 4 * (6 * i + j) * c_in
                    if inside:
                        copy(source + 4 * ((y + i) * width + x + j) * c_in, cell, c_in)
                    else:
                        clear(cell, c_in)
        for c in range(0, c_in, LANES):
            place = scratch + 4 * (t * c_in + c)
            if turned:
                transform_input_flipped(tile + 4 * c, row, c_in, place, rows * c_in)
            else:
                transform_input(tile + 4 * c, row, c_in, place, rows * c_in)
    for p in range(36):
        v, result = scratch + 4 * p * rows * c_in, m + 4 * p * rows * wide
        if turned:
            plane = u + 4 * (6 * _TURNED[p // 6] + _TURNED[p % 6]) * c_in * c_out
            for n in range(0, wide, _SQUARE):
                for t in range(0, rows, _SQUARE):
                    place = plane + 4 * (channel + n) * BLOCK
                    multiply_transposed(
                        v + 4 * t * c_in, c_in, place, c_out * BLOCK, c_in // BLOCK, result + 4 * (t * wide + n), wide
                    )
        else:
            plane = u + 4 * p * c_in * c_out
            for n in range(0, wide, BLOCK):
                for t in range(0, rows, _ROWS):
                    place = plane + 4 * (channel + n) * c_in
                    multiply(v + 4 * t * c_in, c_in, place, c_in, result + 4 * (t * wide + n), wide)
    for t in range(count):
        y, x = 4 * ((first + t) // across), 4 * ((first + t) % across)
        high, broad = min(4, height - y), min(4, width - x)
        for c in range(0, wide, LANES):
            place, offset = m + 4 * (t * wide + c), 4 * ((y * width + x) * c_out + channel + c)
            stride, row = rows * wide, width * c_out
            if ending == RELU:
                output_relu(place, stride, extra + 4 * (channel + c), target + offset, row, c_out, high, broad)
            elif ending == MASKED:
                output_masked(place, stride, extra, target + offset, row, c_out, high, broad)
            elif ending == MASKED_SUM:
                output_masked_sum(place, stride, extra + offset, target + offset, row, c_out, high, broad)
            else:
                output_plain(place, stride, extra, target + offset, row, c_out, high, broad)
