"""The steps of VGG-19 on a CPU that are no Winograd convolution: the layer at the pixels, pooling, ReLUs and masks.

Arrays are fp32 (height, width, channels) at addresses in bytes, as in `winograd`; a step does some rows of its result.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numba.extending import intrinsic
from numpy.typing import NDArray

from .network import PADDINGS
from .vector import BLOCK, NARROW, ROWS, Code, array, clear, mark_positive, multiply, multiply_narrow, procedure

_ZERO, _REFLECT, _REPLICATE, _CIRCULAR = range(len(PADDINGS))

PATCH = 27  # inputs of one position of conv1_1: kernel row, kernel column, colour
BAND = 4  # rows of the picture in one task of `first` and `last`


def first_weights(kernel: NDArray[np.float32]) -> NDArray[np.float32]:
    """(PATCH, C) of a kernel (C, 3, 3, 3), for `first`."""
    return np.ascontiguousarray(kernel.transpose(2, 3, 1, 0).reshape(PATCH, -1))


def last_weights(kernel: NDArray[np.float32]) -> NDArray[np.float32]:
    """(C, NARROW) of a kernel (C, 3, 3, 3), for `last`; the columns past PATCH are zero."""
    return np.pad(kernel.transpose(0, 2, 3, 1).reshape(-1, PATCH), ((0, 0), (0, NARROW - PATCH)))


def scratch_size(width: int) -> int:
    """Floats that `first` and `last` need to themselves."""
    return (BAND + 2) * (width + ROWS) * NARROW


@njit(nogil=True, error_model="numpy")
def inside(place, length, padding):  # type: ignore[no-untyped-def]
    """The row or column that stands at `place`, -1 for a zero; `padding` is an index of PADDINGS."""
    if 0 <= place < length:
        return place
    if padding == _CIRCULAR:
        return place % length
    if padding == _REPLICATE:
        return 0 if place < 0 else length - 1
    if padding == _REFLECT:
        return -place if place < 0 else 2 * length - 2 - place
    return -1


@njit(nogil=True, error_model="numpy")
def first(  # type: ignore[no-untyped-def]
    image, mean, target, bits, height, width, channels, weights, bias, padding, least, task, scratch
):
    """relu1_1 (height, width, channels) of an image (3, height, width) minus mean (3,), then padded.

    `least` is its smallest value: 0, or minus infinity for conv1_1. `bits` as in `winograd`.
    """
    pixels, means = array(image, (3, height, width)), array(mean, (3,))
    results, biases = array(target, (height, width, channels)), array(bias, (channels,))
    patches = array(scratch, (width + ROWS, PATCH))
    sums = scratch + 4 * (width + ROWS) * PATCH
    found = array(sums, (width + ROWS, channels))
    left, right = inside(-1, width, padding), inside(width, width, padding)
    for y in range(task * BAND, min(height, (task + 1) * BAND)):
        for i in range(3):
            row = inside(y + i - 1, height, padding)
            for j in range(3):
                low, high = max(0, 1 - j), min(width, width + 1 - j)
                for c in range(3):
                    k = (i * 3 + j) * 3 + c
                    if row >= 0:
                        for x in range(low, high):
                            patches[x, k] = pixels[c, row, x + j - 1] - means[c]
                        for x in range(low):
                            patches[x, k] = pixels[c, row, left] - means[c] if left >= 0 else np.float32(0)
                        for x in range(high, width):
                            patches[x, k] = pixels[c, row, right] - means[c] if right >= 0 else np.float32(0)
                    else:
                        for x in range(width):
                            patches[x, k] = 0
        for x in range(0, width, ROWS):
            rows, result = scratch + 4 * x * PATCH, sums + 4 * x * channels
            for n in range(0, channels, BLOCK):
                multiply(rows, PATCH, 1, weights + 4 * n, channels, PATCH, result + 4 * n, channels)
        for x in range(width):
            for c in range(channels):
                results[y, x, c] = max(found[x, c] + biases[c], least)
            place = (y * width + x) * channels
            mark_positive(target + 4 * place, bits + place // 8, channels)


@njit(nogil=True, error_model="numpy")
def last(source, target, height, width, channels, weights, padding, task, scratch):  # type: ignore[no-untyped-def]
    """Gradient (3, height, width) of the image from the masked cotangent (height, width, channels) of relu1_1.

    A pixel that stands beyond the border too gets the gradient of that place as well.
    """
    gradient = array(target, (3, height, width))
    padded = width + ROWS
    shares = array(scratch, (BAND + 2, padded, NARROW))
    top, end = task * BAND, min(height, (task + 1) * BAND)
    wraps, folds = padding == _CIRCULAR, padding in (_REFLECT, _REPLICATE)
    near = 1 if padding == _REFLECT else 0  # the line that is seen beyond the border
    for y in range(top - 1, end + 1):
        line = y % height if wraps else y
        if 0 <= line < height:
            for x in range(0, width, ROWS):
                rows = source + 4 * (line * width + x) * channels
                result = scratch + 4 * ((y - top + 1) * padded + x) * NARROW
                multiply_narrow(rows, channels, 1, weights, NARROW, channels, result, NARROW)
    for y in range(top, end):
        twice_y = folds and (y == near or y == height - 1 - near)
        for x in range(width):
            twice_x = folds and (x == near or x == width - 1 - near)
            red = green = blue = np.float32(0)
            for v in range(2 if twice_y else 1):
                row = y if v == 0 else (-1 if y == near else height)
                for u in range(2 if twice_x else 1):
                    column = x if u == 0 else (-1 if x == near else width)
                    for i in range(3):
                        if wraps or 0 <= row + 1 - i < height:
                            for j in range(3):
                                place = (column + 1 - j) % width if wraps else column + 1 - j
                                if 0 <= place < width:
                                    share = shares[row + 2 - i - top, place]
                                    k = (i * 3 + j) * 3
                                    red += share[k]
                                    green += share[k + 1]
                                    blue += share[k + 2]
            gradient[0, y, x], gradient[1, y, x], gradient[2, y, x] = red, green, blue


@intrinsic
def _largest(context, corner, column, row, winners, target, count):  # type: ignore[no-untyped-def]
    """target = the largest of the four vectors of `count` floats at `corner` and around, and whose each number is.

    `column` and `row` are floats to the next one. Of equal ones only the first in row-major order has its bit set.
    """

    def emit(code: Code, corner: Any, column: Any, row: Any, winners: Any, target: Any, count: Any) -> None:
        corners = [code.times(row, 0), column, row, code.b.add(row, column)]

        def body(begin: Any) -> None:
            places = [code.b.add(offset, begin) for offset in corners]
            values = [code.load(code.offset(corner, place)) for place in places]
            top = code.larger(code.larger(values[0], values[1]), code.larger(values[2], values[3]))
            code.store(top, code.offset(target, begin))
            left = code.equal(top, top)
            for place, value in zip(places, values, strict=True):
                equal = code.equal(value, top)
                code.store_bits(code.b.and_(equal, left), code.bits(winners, place))
                left = code.b.and_(left, code.b.not_(equal))

        code.for_vectors(count, body)

    return procedure(6, emit)


def _spread(largest: bool, adds: bool) -> Any:
    def emit(code: Code, share: Any, winners: Any, bits: Any, target: Any, count: Any) -> None:
        def body(begin: Any) -> None:
            value, place = code.load(code.offset(share, begin)), code.offset(target, begin)
            value = code.where_bits(code.bits(winners, begin), value) if largest else code.scaled(0.25, value)
            if adds:
                value = code.add(value, code.load(place))
            code.store(code.where_bits(code.bits(bits, begin), value), place)

        code.for_vectors(count, body)

    @intrinsic
    def spread(context, share, winners, bits, target, count):  # type: ignore[no-untyped-def]
        return procedure(5, emit)

    return spread


# (share, winners, bits, target, count): target = [bits] of a window's share, a quarter of it or [winners] of it, or of
# that plus target.
_spread_quarter, _spread_winner = _spread(False, False), _spread(True, False)
_add_quarter, _add_winner = _spread(False, True), _spread(True, True)


@njit(nogil=True, error_model="numpy")
def pool(source, target, winners, height, width, channels, largest, row):  # type: ignore[no-untyped-def]
    """One row of the 2x2 pooling of (height, width, channels): maximum if `largest`, else mean; odd sides floor.

    Maxima set a bit for each element of the source in `winners`: whether it is the largest of its window, the first of
    equal ones in row-major order, as in torch.
    """
    a = array(source, (height, width, channels))
    result = array(target, (height // 2, width // 2, channels))
    for x in range(width // 2):
        if largest:
            corner = (2 * row * width + 2 * x) * channels
            place, pooled = source + 4 * corner, target + 4 * (row * (width // 2) + x) * channels
            _largest(place, channels, width * channels, winners + corner // 8, pooled, channels)
            continue
        corner00, corner01 = a[2 * row, 2 * x], a[2 * row, 2 * x + 1]
        corner10, corner11 = a[2 * row + 1, 2 * x], a[2 * row + 1, 2 * x + 1]
        mean = result[row, x]
        for c in range(channels):
            mean[c] = np.float32(0.25) * (corner00[c] + corner01[c] + corner10[c] + corner11[c])


@njit(nogil=True, error_model="numpy")
def unpool(source, target, bits, winners, adds, height, width, channels, largest, row, scratch):  # type: ignore[no-untyped-def]
    """Rows 2 row and 2 row + 1 of the VJP of `pool` and of the ReLU below it, added to `target` before if `adds`.

    `source` (height // 2, width // 2, channels) is the cotangent of the pooling, `bits` and `winners` are what the ReLU
    and `pool` have set. A row past the last window is a row of windows of its own.
    """
    clear(scratch, channels)
    for x in range(0, width, 2):
        whole = 2 * row + 1 < height and x + 1 < width
        share = source + 4 * (row * (width // 2) + x // 2) * channels if whole else scratch
        for y in range(2 * row, min(2 * row + 2, height)):
            for i in range(x, min(x + 2, width)):
                place = (y * width + i) * channels
                own, passed, won = target + 4 * place, bits + place // 8, winners + place // 8
                if largest and adds:
                    _add_winner(share, won, passed, own, channels)
                elif largest:
                    _spread_winner(share, won, passed, own, channels)
                elif adds:
                    _add_quarter(share, won, passed, own, channels)
                else:
                    _spread_quarter(share, won, passed, own, channels)


@njit(nogil=True, error_model="numpy")
def rectify(source, target, width, channels, row):  # type: ignore[no-untyped-def]
    """One row of target = max(source, 0), both (height, width, channels)."""
    offset = 4 * row * width * channels
    found, value = array(source + offset, (width * channels,)), array(target + offset, (width * channels,))
    for i in range(width * channels):
        value[i] = max(found[i], np.float32(0))


@njit(nogil=True, error_model="numpy")
def add(source, target, width, channels, row):  # type: ignore[no-untyped-def]
    """One row of target += source, both (height, width, channels)."""
    offset = 4 * row * width * channels
    found, value = array(source + offset, (width * channels,)), array(target + offset, (width * channels,))
    for i in range(width * channels):
        value[i] += found[i]
