"""3x3 convolutions on a CPU straight from their definition, with sums that hardly round.

Max pooling passes a gradient to the largest of four values, so a rounding that changes their order changes the gradient
by far more than itself. Winograd's filtering and plain fp32 sums both round too much for fp32: here the nine matrix
products of a convolution, a kernel cell each, are added up in pairs of floats (see `vector.multiply_add_exact`), and
the few of the layer at the pixels in float64.

Arrays stand as in `winograd`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .nhwc import PATCH, inside
from .vector import BLOCK, ROWS, array, clear, copy, mark_positive, multiply_add_exact

HIGH, BROAD = 4, 24  # positions of a tile


def panels(kernel: NDArray[np.float32]) -> NDArray[np.float32]:
    """A kernel (C_out, C_in, 3, 3) as (C_out / BLOCK, 9, C_in, BLOCK)."""
    c_out, c_in = kernel.shape[:2]
    return np.ascontiguousarray(kernel.reshape(c_out // BLOCK, BLOCK, c_in, 9).transpose(0, 3, 2, 1))


def first_weights(kernel: NDArray[np.float32], mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float64]:
    """Mean and deviation (3,) of the colours and the rows (PATCH, C) of a kernel (C, 3, 3, 3), for `first`."""
    return np.concatenate([mean, std, kernel.transpose(2, 3, 1, 0).flatten()])


def tiles(height: int, width: int) -> int:
    """Tiles of a picture."""
    return -(-height // HIGH) * -(-width // BROAD)


def scratch_size(c_in: int) -> int:
    """Floats that `convolve` needs to itself."""
    return (HIGH + 2) * (BROAD + 2) * c_in + 2 * HIGH * BROAD * BLOCK


@njit(nogil=True, error_model="numpy")
def first(image, target, bits, height, width, channels, weights, bias, padding, least, row):  # type: ignore[no-untyped-def]
    """One row of relu1_1 (height, width, channels) of a padded image (3, height, width); see `nhwc.first`."""
    pixels, biases = array(image, (3, height, width)), array(bias, (channels,))
    numbers = array(weights, (2 * (6 + PATCH * channels),)).view(np.float64)
    mean, std, lines = numbers[:3], numbers[3:6], numbers[6:].reshape((PATCH, channels))
    results = array(target, (height, width, channels))
    sums = np.empty(channels)
    for x in range(width):
        for c in range(channels):
            sums[c] = biases[c]
        for i in range(3):
            for j in range(3):
                y, place = inside(row + i - 1, height, padding), inside(x + j - 1, width, padding)
                if y >= 0 and place >= 0:
                    for colour in range(3):
                        value = (pixels[colour, y, place] - mean[colour]) / std[colour]
                        line = lines[(i * 3 + j) * 3 + colour]
                        for c in range(channels):
                            sums[c] += value * line[c]
        for c in range(channels):
            results[row, x, c] = max(sums[c], least)
        place = (row * width + x) * channels
        mark_positive(target + 4 * place, bits + place // 8, channels)


@njit(nogil=True, error_model="numpy")
def convolve(  # type: ignore[no-untyped-def]
    source, target, bits, height, width, c_in, c_out, weights, bias, padding, least, tile, group, groups, scratch
):
    """target (height, width, c_out) = max(convolution of source (height, width, c_in) + bias, least) in one tile.

    `bits` is set where it is positive, as in `winograd`. `weights` is the address of the panels; `group` of `groups`
    chooses output channels, a multiple of BLOCK.
    `padding`, an index of `nhwc.PADDINGS`, is zero or circular.
    """
    across = (width + BROAD - 1) // BROAD
    top, left = HIGH * (tile // across), BROAD * (tile % across)
    high, broad = min(HIGH, height - top), min(BROAD, width - left)
    line = (broad + ROWS - 1) // ROWS * ROWS  # positions past the width are computed and not written
    m = scratch + 4 * (HIGH + 2) * (BROAD + 2) * c_in
    rest = m + 4 * HIGH * BROAD * BLOCK
    for i in range(high + 2):
        for j in range(line + 2):
            y, x = inside(top + i - 1, height, padding), inside(left + j - 1, width, padding)
            cell = scratch + 4 * (i * (line + 2) + j) * c_in
            if y >= 0 and x >= 0:
                copy(source + 4 * (y * width + x) * c_in, cell, c_in)
            else:
                clear(cell, c_in)
    wide = c_out // groups
    sums, lost = array(m, (high, line, BLOCK)), array(rest, (high, line, BLOCK))
    for n in range(group * wide, (group + 1) * wide, BLOCK):
        clear(m, high * line * BLOCK)
        clear(rest, high * line * BLOCK)
        for k in range(9):
            panel = weights + 4 * (n * 9 + k * BLOCK) * c_in
            for y in range(high):
                for x in range(0, line, ROWS):
                    v, place = scratch + 4 * ((y + k // 3) * (line + 2) + x + k % 3) * c_in, 4 * (y * line + x) * BLOCK
                    multiply_add_exact(v, c_in, panel, c_in, m + place, rest + place)
        biases = array(bias + 4 * n, (BLOCK,))
        for y in range(high):
            for x in range(broad):
                place = ((top + y) * width + left + x) * c_out + n
                result = array(target + 4 * place, (BLOCK,))
                for c in range(BLOCK):
                    result[c] = max(sums[y, x, c] + (lost[y, x, c] + biases[c]), least)
                mark_positive(target + 4 * place, bits + place // 8, BLOCK)
