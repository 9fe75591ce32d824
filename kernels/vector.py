"""Vector code for CPUs, written with LLVM's builder and called from compiled functions as if it were numba's own.

Addresses are integers in bytes, strides are counted in floats; nothing checks a bound. Vectors have `LANES` floats, and
LLVM splits them where the processor's registers are shorter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba import carray, njit, types
from numba.core import codegen, config
from numba.extending import intrinsic
from numpy.typing import NDArray

LANES = 16
BLOCK, NARROW = 64, 32  # columns that the products work on at a time
ROWS, SQUARE = 6, 4  # rows of one result of `multiply`; rows and columns of one of `multiply_transposed`
_COLUMNS = BLOCK // LANES
# Vectors of the columns that a product works on at once, and rows and columns of a part of `multiply_transposed`: as
# many as keep all sums in registers, 32 of LANES floats with AVX-512, room for 8 with AVX2 and with ARM's NEON.
_FEATURES = (codegen.get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES).split(",")
_HAS_WIDE, HAS_HALVES = "+avx512f" in _FEATURES, "+avx512bf16" in _FEATURES
_STRIP, _PART = (_COLUMNS, SQUARE) if _HAS_WIDE else (1, 2)
# Products, or pairs of them, added up on their own: the rounding of long sums would come to more than that of the
# products.
_CHUNK = 32
_SHORT = 16  # the same where the sums are exact


class _BFloat(ir.types.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not know: the upper half of a float."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


FLOAT, _I16, _I32, I64 = ir.FloatType(), ir.IntType(LANES), ir.IntType(32), ir.IntType(64)
VECTOR, _BITS = ir.VectorType(FLOAT, LANES), ir.VectorType(ir.IntType(1), LANES)
_WORDS, _SHORTS = (ir.VectorType(ir.IntType(bits), LANES) for bits in (32, 16))
_HALVES, _PAIRS = (ir.VectorType(_BFloat(), count) for count in (LANES, 2 * LANES))
ZERO = ir.Constant(VECTOR, None)
_PREFETCH = "llvm.prefetch.p0"


def halves_are_faster(processor: str | None = None, features: Sequence[str] = _FEATURES) -> bool:
    """Whether a processor, by LLVM's name, multiplies more bf16 than floats in the same time: AMD's from Zen 4 on.

    Intel's with AVX-512 multiply as many.
    """
    name = processor or config.CPU_NAME or binding.get_host_cpu_name()
    return "+avx512bf16" in features and name.startswith("znver")


def _word(value: int) -> Any:
    return ir.Constant(_WORDS, [value] * LANES)


def _lane_list(lanes: Sequence[int]) -> Any:
    return ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes))


class Code:
    """Emits the body of an intrinsic: addresses are i64, vectors are <LANES x float>."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder
        name = f"llvm.fma.v{LANES}f32"
        kind = ir.FunctionType(VECTOR, [VECTOR] * 3)
        self._fma = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)

    def offset(self, address: Any, index: Any, scale: int = 4) -> Any:
        """address + scale * index, for an index in Python or in the program."""
        index = ir.Constant(I64, index) if isinstance(index, int) else index
        return self.b.add(address, self.b.mul(index, ir.Constant(I64, scale)))

    def load(self, address: Any, kind: ir.Type = VECTOR) -> Any:
        """The vector, or another kind of value, at an address."""
        return self.b.load(self.b.inttoptr(address, kind.as_pointer()), align=4)

    def prefetch(self, address: Any) -> None:
        """Ask for the cache line at `address`, which need not exist."""
        place = self.b.inttoptr(address, ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [place.type, _I32, _I32, _I32])
        function = self.b.module.globals.get(_PREFETCH) or ir.Function(self.b.module, kind, _PREFETCH)
        self.b.call(function, [place, *(ir.Constant(_I32, value) for value in (0, 2, 1))])  # read, into L2, data

    def store(self, value: Any, address: Any) -> None:
        """Write a value to an address."""
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer()), align=4)

    def times(self, stride: Any, count: int) -> Any:
        """stride * count."""
        return self.b.mul(stride, ir.Constant(I64, count))

    def step(self, address: Any, stride: Any, count: int) -> Any:
        """address + count strides."""
        return self.offset(address, self.times(stride, count))

    def inside(self, index: int, count: Any) -> Any:
        """A block that runs if index < count."""
        return self.b.if_then(self.b.icmp_signed("<", ir.Constant(I64, index), count), likely=True)

    def lanes(self, value: Any, first: int, count: int) -> Any:
        """A short vector of some lanes."""
        return self.b.shuffle_vector(value, value, _lane_list(range(first, first + count)))

    def every_second(self, x: Any, y: Any, first: int) -> Any:
        """Lanes first, first + 2, ... of x, then of y."""
        return self.b.shuffle_vector(x, y, _lane_list(range(first, 2 * LANES, 2)))

    def splat(self, value: Any) -> Any:
        """A vector of one value."""
        if isinstance(value, int | float):
            return ir.Constant(VECTOR, [value] * LANES)
        one = self.b.insert_element(ir.Constant(VECTOR, ir.Undefined), value, ir.Constant(_I32, 0))
        zeros = ir.Constant(ir.VectorType(_I32, LANES), None)
        return self.b.shuffle_vector(one, ir.Constant(VECTOR, ir.Undefined), zeros)

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        """x y + z, where x may be a number."""
        return self.b.call(self._fma, [self.splat(x) if isinstance(x, int | float) else x, y, z])

    def halves(self, x: Any) -> Any:
        """The bits of x rounded to bf16, half as long as a vector."""
        if HAS_HALVES:
            return self.b.bitcast(self.b.fptrunc(x, _HALVES), _SHORTS)
        words = self.b.bitcast(x, _WORDS)
        odd = self.b.and_(self.b.lshr(words, _word(16)), _word(1))  # a tie goes to the even one
        rounded, quiet = self.b.add(words, self.b.add(odd, _word(0x7FFF))), self.b.or_(words, _word(0x400000))
        found = self.b.select(self.b.fcmp_unordered("uno", x, x), quiet, rounded)
        return self.b.trunc(self.b.lshr(found, _word(16)), _SHORTS)

    def dot(self, x: Any, y: Any, z: Any) -> Any:
        """z + x0 y0 + x1 y1, where each lane of x and of y is a pair of bf16.

        Both ways add x1 y1 first; processors take numbers under 1e-38 for zero, the steps do not.
        """
        if HAS_HALVES:
            name = "llvm.x86.avx512bf16.dpbf16ps.512"
            kind = ir.FunctionType(VECTOR, [VECTOR, _PAIRS, _PAIRS])
            function = self.b.module.globals.get(name) or ir.Function(self.b.module, kind, name)
            return self.b.call(function, [z, self.b.bitcast(x, _PAIRS), self.b.bitcast(y, _PAIRS)])
        (x0, x1), (y0, y1) = self._both(x), self._both(y)
        return self.fma(x0, y0, self.fma(x1, y1, z))

    def _both(self, x: Any) -> tuple[Any, Any]:
        """The two bf16 of each lane."""
        words = self.b.bitcast(x, _WORDS)
        low, high = self.b.shl(words, _word(16)), self.b.and_(words, _word(0xFFFF0000))
        return self.b.bitcast(low, VECTOR), self.b.bitcast(high, VECTOR)

    def scaled(self, factor: float, x: Any) -> Any:
        """factor x."""
        return x if factor == 1 else self.b.fmul(self.splat(factor), x)

    def add(self, x: Any, y: Any) -> Any:
        """x + y."""
        return self.b.fadd(x, y)

    def sub(self, x: Any, y: Any) -> Any:
        """x - y."""
        return self.b.fsub(x, y)

    def where_positive(self, condition: Any, value: Any) -> Any:
        """value where condition > 0, else 0."""
        return self.b.select(self.positive(condition), value, ZERO)

    def larger(self, x: Any, y: Any) -> Any:
        """The larger one of each lane."""
        return self.b.select(self.b.fcmp_ordered(">", x, y), x, y)

    def equal(self, x: Any, y: Any) -> Any:
        """A bit for each lane: x = y."""
        return self.b.fcmp_ordered("==", x, y)

    def positive(self, value: Any) -> Any:
        """A bit for each lane: value > 0."""
        return self.b.fcmp_ordered(">", value, ZERO)

    def bits(self, address: Any, index: Any) -> Any:
        """Where the bits of the vector that begins at element `index` stand; those of the first are at `address`."""
        return self.b.add(address, self.b.sdiv(index, ir.Constant(I64, 8)))

    def store_bits(self, bits: Any, address: Any) -> None:
        """Write a bit for each lane, LANES / 8 bytes."""
        self.b.store(self.b.bitcast(bits, _I16), self.b.inttoptr(address, _I16.as_pointer()), align=2)

    def where_bits(self, address: Any, value: Any) -> Any:
        """value in the lanes whose bit at `address` is set, else 0."""
        bits = self.b.load(self.b.inttoptr(address, _I16.as_pointer()), align=2)
        return self.b.select(self.b.bitcast(bits, _BITS), value, ZERO)

    def loop(self, count: Any, carried: Sequence[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
        """Run body(index, values) -> values for index in 0 .. count - 1, count >= 1; returns the last values."""
        before = self.b.block
        inside, after = self.b.append_basic_block("loop"), self.b.append_basic_block("after")
        self.b.branch(inside)
        self.b.position_at_end(inside)
        index = self.b.phi(I64)
        index.add_incoming(ir.Constant(I64, 0), before)
        values = [self.b.phi(value.type) for value in carried]
        for phi, value in zip(values, carried, strict=True):
            phi.add_incoming(value, before)
        results = body(index, values)
        end, following = self.b.block, self.b.add(index, ir.Constant(I64, 1))
        index.add_incoming(following, end)
        for phi, value in zip(values, results, strict=True):
            phi.add_incoming(value, end)
        self.b.cbranch(self.b.icmp_signed("<", following, count), inside, after)
        self.b.position_at_end(after)
        return results

    def for_vectors(self, count: Any, body: Callable[[Any], None]) -> None:
        """Run body(begin) for the vectors of `count` floats, a multiple of LANES; each begins at float `begin`."""

        def one(index: Any, carried: list[Any]) -> list[Any]:
            body(self.times(index, LANES))
            return carried

        self.loop(self.b.sdiv(count, ir.Constant(I64, LANES)), [], one)


def procedure(count: int, emit: Callable[..., None]) -> tuple[Any, Callable[..., Any]]:
    """Signature and code of an intrinsic whose `count` arguments are i64."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        emit(Code(builder), *values)
        return context.get_dummy_value()

    return types.void(*[types.int64] * count), codegen


def _product(rows: int, adds: bool, streams: bool, halves: bool = False, width: int = BLOCK) -> Any:
    vectors = min(_STRIP, width // LANES)  # of a strip

    def emit(code: Code, v: Any, row: Any, column: Any, u: Any, line: Any, depth: Any, m: Any, m_row: Any) -> None:
        starts = [code.step(v, row, i) for i in range(rows)]
        for strip in range(0, width // LANES, vectors):
            strip_of_u, strip_of_m = (code.offset(each, LANES * strip) for each in (u, m))
            places = [
                code.offset(code.step(strip_of_m, m_row, i), LANES * j) for i in range(rows) for j in range(vectors)
            ]
            emit_strip(code, starts, column, strip_of_u, line, depth, places)

    def emit_strip(
        code: Code, starts: list[Any], column: Any, u: Any, line: Any, depth: Any, places: list[Any]
    ) -> None:
        def add(k: Any, sums: list[Any]) -> list[Any]:
            panel, across = code.offset(u, code.b.mul(k, line)), code.b.mul(k, column)
            columns = [code.load(code.offset(panel, LANES * j)) for j in range(vectors)]
            if streams:
                following = code.offset(panel, code.b.mul(depth, line))
                for j in range(vectors):
                    code.prefetch(code.offset(following, LANES * j))
            result = []
            for i, start in enumerate(starts):
                value = code.splat(code.load(code.offset(start, across), FLOAT))
                accumulate = code.dot if halves else code.fma
                result += [accumulate(value, each, sums[i * vectors + j]) for j, each in enumerate(columns)]
            return result

        def chunk(index: Any, totals: list[Any]) -> list[Any]:
            begin = code.times(index, _CHUNK)
            left = code.b.sub(depth, begin)
            whole = ir.Constant(I64, _CHUNK)
            count = code.b.select(code.b.icmp_signed("<", left, whole), left, whole)
            zeros = [ZERO] * len(totals)
            sums = code.loop(count, zeros, lambda k, sums: add(code.b.add(begin, k), sums))
            return [code.add(x, y) for x, y in zip(totals, sums, strict=True)]

        chunks = code.b.sdiv(code.b.add(depth, ir.Constant(I64, _CHUNK - 1)), ir.Constant(I64, _CHUNK))
        before = [code.load(place) if adds else ZERO for place in places]
        for total, place in zip(code.loop(chunks, before, chunk), places, strict=True):
            code.store(total, place)

    @intrinsic
    def product(context, v, row, column, u, line, depth, m, m_row):  # type: ignore[no-untyped-def]
        return procedure(8, emit)

    return product


# (v, row, column, u, line, depth, m, m_row): m = V U, or m + V U, for a few rows of V (depth long, `row` floats from
# row to row, `column` from element to element) and U (depth, BLOCK), whose lines are `line` floats apart. `multiply`
# expects U to stream from memory, and asks for the panel behind it in time. In `multiply_halves` V and U hold pairs of
# bf16 in the place of floats, in `multiply_narrow` U has NARROW columns.
multiply = _product(ROWS, adds=False, streams=True)
multiply_halves = _product(ROWS, adds=False, streams=True, halves=True)
multiply_add, multiply_add_square = _product(ROWS, True, False), _product(SQUARE, True, False)
multiply_add_halves = _product(ROWS, adds=True, streams=False, halves=True)
multiply_narrow = _product(ROWS, adds=False, streams=False, width=NARROW)


@intrinsic
def multiply_add_exact(context, v, row, u, depth, m, rest):  # type: ignore[no-untyped-def]
    """m + rest += V U for ROWS rows of V, `row` floats apart, U (depth, BLOCK), m and rest (ROWS, BLOCK).

    Each sum of _SHORT products, depth is a multiple of it, is added to m, and what that rounds off goes to `rest`
    (Knuth's two-sum).
    """

    def emit(code: Code, v: Any, row: Any, u: Any, depth: Any, m: Any, rest: Any) -> None:
        starts = [code.step(v, row, i) for i in range(ROWS)]

        def chunk(strip: int, index: Any) -> None:
            own = range(strip, strip + _STRIP)
            sums = {(i, j): ZERO for i in range(ROWS) for j in own}
            for k in range(_SHORT):
                at = code.b.add(code.times(index, _SHORT), ir.Constant(I64, k))
                panel = code.offset(u, at, 4 * BLOCK)
                columns = [code.load(code.offset(panel, LANES * j)) for j in own]
                for i, start in enumerate(starts):
                    value = code.splat(code.load(code.offset(start, at), FLOAT))
                    for j, each in zip(own, columns, strict=True):
                        sums[i, j] = code.fma(value, each, sums[i, j])
            for (i, j), part in sums.items():
                place, lost = (code.offset(each, BLOCK * i + LANES * j) for each in (m, rest))
                before = code.load(place)
                after = code.add(before, part)
                share = code.sub(after, before)
                error = code.add(code.sub(before, code.sub(after, share)), code.sub(part, share))
                code.store(after, place)
                code.store(code.add(code.load(lost), error), lost)

        def chunks(index: Any, values: list[Any]) -> list[Any]:
            for strip in range(0, _COLUMNS, _STRIP):
                chunk(strip, index)
            return values

        code.loop(code.b.sdiv(depth, ir.Constant(I64, _SHORT)), [], chunks)

    return procedure(6, emit)


@intrinsic
def multiply_transposed(context, v, v_stride, u, panel, panels, m, m_stride):  # type: ignore[no-untyped-def]
    """SQUARE rows of m, SQUARE wide = rows of v (panels * BLOCK long) times SQUARE rows of U, transposed.

    `u` is the first of the rows in the first panel, `panel` the floats from there to the next panel.
    """

    def emit(code: Code, v: Any, v_stride: Any, u: Any, panel: Any, panels: Any, m: Any, m_stride: Any) -> None:
        def part(row: int, column: int) -> list[Any]:
            def body(k: Any, sums: list[Any]) -> list[Any]:
                lines, rows = code.offset(v, k, 4 * BLOCK), code.offset(u, code.b.mul(k, panel))
                for j in range(0, BLOCK, LANES):
                    left = [code.load(code.offset(code.step(lines, v_stride, row + i), j)) for i in range(_PART)]
                    right = [code.load(code.offset(rows, BLOCK * (column + i) + j)) for i in range(_PART)]
                    sums = [code.fma(x, y, sums[i]) for i, (x, y) in enumerate((x, y) for x in left for y in right)]
                return sums

            return code.loop(panels, [ZERO] * _PART**2, body)

        places = range(0, SQUARE, _PART)
        parts = {(row, column): part(row, column) for row in places for column in places}
        sums = [
            parts[i // _PART * _PART, j // _PART * _PART][i % _PART * _PART + j % _PART]
            for i in range(SQUARE)
            for j in range(SQUARE)
        ]
        while len(sums) > 1:  # halve the lanes of two sums into one vector, until lane i holds the total of sum i
            sums = [code.add(code.every_second(x, y, 0), code.every_second(x, y, 1)) for x, y in _by_two(sums)]
        for i in range(SQUARE):
            code.store(code.lanes(sums[0], i * SQUARE, SQUARE), code.step(m, m_stride, i))

    return procedure(7, emit)


def in_halves(panels: NDArray[np.float32]) -> NDArray[np.int16]:
    """The bits of panels (.., C_in, BLOCK) in bf16, (.., C_in / 2, BLOCK, 2): two input channels stand side by side."""
    both = torch.from_numpy(panels).unflatten(-2, (-1, 2)).transpose(-1, -2)
    rounded = both.to(torch.bfloat16, memory_format=torch.contiguous_format)
    found: NDArray[np.int16] = rounded.view(torch.int16).numpy()
    return found


def _by_two(items: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(items[::2], items[1::2], strict=True))


def _copy(halves: bool) -> Any:
    def emit(code: Code, source: Any, target: Any, count: Any) -> None:
        def body(begin: Any) -> None:
            value = code.load(code.offset(source, begin))
            code.store(code.halves(value) if halves else value, code.offset(target, begin, 2 if halves else 4))

        code.for_vectors(count, body)

    @intrinsic
    def copied(context, source, target, count):  # type: ignore[no-untyped-def]
        return procedure(3, emit)

    return copied


# (source, target, count): copies `count` floats, a multiple of LANES, as they are or as bf16.
copy, copy_halves = _copy(halves=False), _copy(halves=True)


@intrinsic
def zip_halves(context, source, target, count):  # type: ignore[no-untyped-def]
    """Pairs in bf16 of the floats of two rows at source, each of `count`, a multiple of LANES; target may be source."""

    def emit(code: Code, source: Any, target: Any, count: Any) -> None:
        def body(begin: Any) -> None:
            rows = [code.load(code.offset(code.offset(source, begin), each)) for each in (0, count)]
            low, high = (code.b.zext(code.halves(row), _WORDS) for row in rows)
            code.store(code.b.or_(low, code.b.shl(high, _word(16))), code.offset(target, begin))

        code.for_vectors(count, body)

    return procedure(3, emit)


@intrinsic
def clear(context, target, count):  # type: ignore[no-untyped-def]
    """Set `count` floats, a multiple of LANES, to zero."""

    def emit(code: Code, target: Any, count: Any) -> None:
        code.for_vectors(count, lambda begin: code.store(ZERO, code.offset(target, begin)))

    return procedure(2, emit)


@intrinsic
def mark_positive(context, source, bits, count):  # type: ignore[no-untyped-def]
    """Write a bit for each of `count` floats, a multiple of LANES: whether it is positive."""

    def emit(code: Code, source: Any, bits: Any, count: Any) -> None:
        def body(begin: Any) -> None:
            code.store_bits(code.positive(code.load(code.offset(source, begin))), code.bits(bits, begin))

        code.for_vectors(count, body)

    return procedure(3, emit)


@intrinsic
def keep_marked(context, target, bits, count):  # type: ignore[no-untyped-def]
    """Set those of `count` floats, a multiple of LANES, to zero whose bit is not set."""

    def emit(code: Code, target: Any, bits: Any, count: Any) -> None:
        def body(begin: Any) -> None:
            place = code.offset(target, begin)
            code.store(code.where_bits(code.bits(bits, begin), code.load(place)), place)

        code.for_vectors(count, body)

    return procedure(3, emit)


@intrinsic
def _pointer(context, address):  # type: ignore[no-untyped-def]
    """An address as a pointer to float32."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), codegen


@njit(nogil=True, error_model="numpy")
def array(address, shape):  # type: ignore[no-untyped-def]
    """The memory at an address as a float32 array."""
    return carray(_pointer(address), shape)
