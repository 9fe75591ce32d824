"""Losses, Gram matrices and style gradients of features in NHWC order on a CPU, as tasks of a program.

Features F are fp32 (positions, channels) at an address in bytes, channels a multiple of BLOCK; see `gram`, `style`
and `content` for the formulas, `vector` for the products.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .vector import (
    BLOCK,
    ROWS,
    SQUARE,
    array,
    clear,
    copy,
    copy_halves,
    multiply_add,
    multiply_add_halves,
    multiply_add_square,
    zip_halves,
)

LENGTH = 1 << 16  # floats of one task of `content_loss` and `content_gradient`
STRETCH = 48  # positions of one task of `style_gradient`
_STRIP = 64  # positions that `gram` holds in the first cache


def gram_shares(positions: int, channels: int) -> int:
    """Into how many parts the positions are cut, each with a partial Gram matrix: more where it has few blocks."""
    blocks = channels // BLOCK
    return max(1, min(positions // (4 * _STRIP), 32 // (blocks * (blocks + 1))))


def gram_tasks(channels: int, shares: int) -> int:
    """Tasks of `gram`: the blocks on and above the diagonal, of every share."""
    blocks = channels // BLOCK
    return blocks * (blocks + 1) // 2 * shares


def scratch_size(channels: int) -> int:
    """Floats that `style_gradient` needs to itself."""
    return 2 * ROWS * channels


@njit(nogil=True, error_model="numpy")
def gram(features, partial, positions, channels, shares, task):  # type: ignore[no-untyped-def]
    """One BLOCK x BLOCK block of one share's F^T F, in partial (shares, channels, channels)."""
    share, pair = task % shares, task // shares
    row = 0
    while pair > row:  # the blocks (0, 0), (0, 1), (1, 1), (0, 2), ...: column by column
        pair -= row + 1
        row += 1
    column = row * BLOCK
    row = pair * BLOCK
    begin, end = share * positions // shares, (share + 1) * positions // shares
    block = partial + 4 * ((share * channels + row) * channels + column)
    for i in range(BLOCK):
        clear(block + 4 * i * channels, BLOCK)
    for k in range(begin, end, _STRIP):
        left, right = features + 4 * (k * channels + row), features + 4 * (k * channels + column)
        depth = min(_STRIP, end - k)
        for i in range(0, BLOCK, SQUARE):
            target = block + 4 * i * channels
            multiply_add_square(left + 4 * i, 1, channels, right, channels, depth, target, channels)


@njit(nogil=True, error_model="numpy")
def gram_sum(partial, target, positions, channels, shares, row):  # type: ignore[no-untyped-def]
    """One row of G = F^T F / positions and its mirror image, from what `gram` has left."""
    parts, result = array(partial, (shares, channels, channels)), array(target, (channels, channels))
    factor = np.float32(1 / positions)
    for column in range(row // BLOCK * BLOCK, channels):
        total = np.float32(0)
        for share in range(shares):
            total += parts[share, row, column]
        result[row, column] = total * factor
        if column // BLOCK > row // BLOCK:
            result[column, row] = total * factor


@njit(nogil=True, error_model="numpy")
def content_loss(features, content, count, sums, task):  # type: ignore[no-untyped-def]
    """The square sum of LENGTH elements of F - P, both of `count` floats, in sums[task]."""
    begin = task * LENGTH
    length = min(LENGTH, count - begin)
    f, p = array(features + 4 * begin, (length,)), array(content + 4 * begin, (length,))
    total = array(sums, (task + 1,))
    large = np.float64(0)
    for i in range(0, length, 256):
        small = np.float32(0)
        for k in range(i, min(i + 256, length)):
            small += (f[k] - p[k]) * (f[k] - p[k])
        large += np.float64(small)
    total[task] = large


@njit(nogil=True, error_model="numpy")
def content_gradient(features, content, target, factor, count, task):  # type: ignore[no-untyped-def]
    """LENGTH elements of target = factor (F - P), all of `count` floats; `factor` is the address of one."""
    begin = task * LENGTH
    length = min(LENGTH, count - begin)
    f, p = array(features + 4 * begin, (length,)), array(content + 4 * begin, (length,))
    result, scale = array(target + 4 * begin, (length,)), array(factor, (1,))[0]
    for k in range(length):
        result[k] = scale * (f[k] - p[k])


@njit(nogil=True, error_model="numpy")
def halve(panels, channels, task):  # type: ignore[no-untyped-def]
    """One panel (channels, BLOCK) in bf16 at the beginning of its memory, as in `vector.in_halves`."""
    panel = panels + 4 * task * channels * BLOCK
    for k in range(channels // 2):  # what is written has been read
        zip_halves(panel + 8 * k * BLOCK, panel + 4 * k * BLOCK, BLOCK)


@njit(nogil=True, error_model="numpy")
def style_gradient(  # type: ignore[no-untyped-def]
    features, panels, target, positions, channels, adds, halves, task, scratch
):
    """STRETCH rows of target = F matrix, or of target += F matrix if `adds`; target may be F itself if it does not.

    `panels` (channels / BLOCK, channels, BLOCK) holds the columns of the matrix (channels, channels), with `halves` as
    `halve` leaves them; F is rounded to bf16 then, too.
    """
    first, last = task * STRETCH, min(positions, (task + 1) * STRETCH)
    for t in range(first, last, ROWS):
        source, result, whole = features + 4 * t * channels, target + 4 * t * channels, t + ROWS <= last
        count = min(ROWS, last - t) * channels
        if halves:
            copy_halves(source, scratch, count)
            source = scratch
        elif not whole or features == target:
            copy(source, scratch, count)
            source = scratch
        if not adds:
            clear(result, count)
        if not whole:  # nothing past the last position is read or written
            copy(result, scratch + 4 * ROWS * channels, count)
            result = scratch + 4 * ROWS * channels
        for n in range(0, channels, BLOCK):
            panel = panels + 4 * n * channels
            if halves:
                depth = channels // 2
                multiply_add_halves(source, depth, 1, panel, BLOCK, depth, result + 4 * n, channels)
            else:
                multiply_add(source, channels, 1, panel, BLOCK, channels, result + 4 * n, channels)
        if not whole:
            copy(result, target + 4 * t * channels, count)
