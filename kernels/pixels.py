"""Total variation of the pixels and its gradient: powers of the differences of neighbours.

L = sum over pairs of neighbours of w |x_b - x_a|^p,  p >= 1; p = 2 by default, the field's other is 1

The form says which pairs there are, and their weights w:

    mean        mean of the differences across + mean of those down
    sum         their sums
    block       the sums over the pixels that have a neighbour on both sides, all but the last row and column
    nine-point  2 / 3 of the means over all pixels of the differences across and down + 1 / 6 of those along both
                diagonals, of a picture framed by its own border (a pair that is cut off is zero, a diagonal one lies
                along the border)

With `wrap` the last column and row have the first ones as neighbours. At p = 1 the slope of a difference of zero is 0.

It is the last term of the loss, so its pass over the pixels also finishes the gradient of the whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import _cuda

FORMS = ("mean", "sum", "block", "nine-point")
_RUN = 4  # rows that a thread takes, as in pixels.cu


def total_variation_reference(
    pixels: NDArray[Any], power: float = 2, wrap: bool = False, form: str = "mean"
) -> tuple[Any, NDArray[Any]]:
    """L and dL/dx of pixels (3, H, W), in their dtype."""
    colours, height, width = pixels.shape
    places = np.arange(height * width).reshape(height, width)
    flat, gradient, loss = pixels.reshape(colours, -1), np.zeros((colours, height * width), pixels.dtype), 0
    frame = np.pad(places, 1, "wrap" if wrap else "edge")
    if form == "nine-point":
        inside, count = frame[1:-1, 1:-1], places.size
        cut = slice(1, None) if wrap else slice(None)  # a diagonal belongs to each pixel, or to each corner of one
        corners = frame[cut, cut]
        diagonals = (corners[:-1, :-1], corners[1:, 1:]), (corners[:-1, 1:], corners[1:, :-1])
        pairs = [(inside, frame[1:-1, 2:], 2 / 3 / count), (inside, frame[2:, 1:-1], 2 / 3 / count)]
        pairs += [(first, second, 1 / 6 / first.size) for first, second in diagonals]
    else:
        rows, columns = (slice(0, -1), slice(0, -1)) if form == "block" and not wrap else (slice(None),) * 2
        ends = slice(1, None if wrap else -1)
        across = places[rows] if wrap else places[rows, :-1], frame[1:-1, 1:][rows, ends]
        down = places[:, columns] if wrap else places[:-1, columns], frame[1:, 1:-1][ends, columns]
        pairs = [(first, second, 1 / first.size if form == "mean" else colours) for first, second in (across, down)]
    for first, second, weight in pairs:
        difference = flat[:, second.ravel()] - flat[:, first.ravel()]
        loss = loss + weight / colours * (np.abs(difference) ** power).sum()
        slope = weight / colours * power * np.sign(difference) * np.abs(difference) ** (power - 1)
        for colour in range(colours):
            np.add.at(gradient[colour], second.ravel(), slope[colour])
            np.add.at(gradient[colour], first.ravel(), -slope[colour])
    return loss, gradient.reshape(pixels.shape)


Line = tuple[slice, slice]  # rows and columns


@dataclass(frozen=True)
class Stencil:
    """The weights of the pairs of pixels (3, height, width): of pairs across by row (inner rows, first, last), of
    pairs down by column in the same way, of diagonal ones."""

    across: tuple[float, float, float]
    down: tuple[float, float, float]
    diagonal: float

    @staticmethod
    def of(form: str, height: int, width: int, wrap: bool) -> Stencil:
        """The weights of a form. Raises ValueError for an unknown one."""
        if form not in FORMS:
            raise ValueError(f"form {form!r} of total variation: choose from {', '.join(FORMS)}")
        if form == "nine-point":
            side, corner = (
                2 / (9 * height * width),
                1 / (18 * height * width if wrap else 18 * (height + 1) * (width + 1)),
            )
            edge = side if wrap else side + 2 * corner  # both diagonals that leave the picture lie along its border
            return Stencil((side, edge, edge), (side, edge, edge), corner)
        across = down = 1.0
        if form == "mean":
            across, down = (1 / (3 * count) for count in (height * (width - (not wrap)), (height - (not wrap)) * width))
        cut = form == "block" and not wrap
        return Stencil((across, across, 0.0 if cut else across), (down, down, 0.0 if cut else down), 0.0)

    def pairs(self, height: int, width: int, wrap: bool) -> list[tuple[Line, Line, float]]:
        """Rectangles of second and of first pixels, and the weight of their pairs; a pair may be in several."""
        found = []
        for rows, weight in _by_line(self.across, height):
            found += [((rows, b), (rows, a), weight) for b, a in _shifted(width, 1, wrap)]
        for columns, weight in _by_line(self.down, width):
            found += [((b, columns), (a, columns), weight) for b, a in _shifted(height, 1, wrap)]
        for way in (1, -1) if self.diagonal else ():
            for below, above in _shifted(height, 1, wrap):
                found += [((below, b), (above, a), self.diagonal) for b, a in _shifted(width, way, wrap)]
        return found


def _by_line(weights: tuple[float, float, float], count: int) -> list[tuple[slice, float]]:
    """Ranges of lines, each with its weight; without those of weight zero."""
    inner, first, last = weights
    if inner == first:
        if inner == last:
            return [(slice(0, count), inner)]
        lines = [(slice(0, count - 1), inner), (slice(count - 1, count), last)]
    else:
        lines = [(slice(0, 1), first), (slice(1, count - 1), inner), (slice(count - 1, count), last)]
    return [(line, weight) for line, weight in lines if weight and line.stop > line.start]


def _shifted(length: int, shift: int, wrap: bool) -> list[tuple[slice, slice]]:
    """Where the places lie that have a neighbour `shift` (1 or -1) further on: (of the neighbours, of the places)."""
    found = [(slice(1, length), slice(0, length - 1))]
    if wrap:
        found.append((slice(0, 1), slice(length - 1, length)))
    return found if shift > 0 else [(place, neighbour) for neighbour, place in found]


class Pixels:
    """Finishes loss and gradient at pixels (1, 3, H, W) fp32, H, W >= 2, with total variation of this weight.

    `power`, `wrap` and `form` are those of the formula. `vjp`, like the pixels, is the gradient of the other terms
    times `scale`, a 0-dim fp32 tensor; `terms` is what `Layers` or `Summed` writes. All are kept, and used again
    at each call.
    """

    def __init__(
        self,
        vjp: Tensor,
        scale: Tensor,
        weight: float,
        terms: Tensor,
        power: float = 2,
        wrap: bool = False,
        form: str = "mean",
    ) -> None:
        self._vjp, self._scale, self._weight, self._terms = vjp, scale, float(weight), terms
        self._power, self._wrap = float(power), wrap
        height, width = vjp.shape[2:]
        self._stencil = Stencil.of(form, height, width, wrap)
        self._pairs = self._stencil.pairs(height, width, wrap)
        self._blocks = _cuda.blocks(3 * -(-height // _RUN) * width)
        self._sums = torch.empty(self._blocks, dtype=torch.float64, device=vjp.device)
        self._arrived = torch.zeros(1, dtype=torch.int32, device=vjp.device)

    def finish(self, pixels: Tensor, gradient: Tensor | None, *, measured: bool = True) -> None:
        """Put L in its place among the terms and add it to the total; write the gradient of the total if wanted.

        The total becomes NaN if an element of the gradient is not finite. An L of weight zero need not be
        `measured`, and counts as zero then.
        """
        measured = measured or self._weight != 0 or gradient is None
        if not pixels.is_cuda:
            self._finish_cpu(pixels, gradient, measured)
            return
        height, width = pixels.shape[2:]
        vectors = (pixels, self._vjp, gradient, self._scale)
        scratch = (self._sums, self._arrived)
        size = (height, width, self._weight, self._power, int(self._wrap))
        weights = (*self._stencil.across, *self._stencil.down, self._stencil.diagonal)
        given = (*size, *weights, int(measured))
        _cuda.launch("pixels", "pixel_gradient", (self._blocks,), *vectors, *given, *scratch, self._terms)

    def _finish_cpu(self, pixels: Tensor, gradient: Tensor | None, measured: bool) -> None:
        if gradient is not None:
            torch.div(self._vjp, self._scale, out=gradient)
        loss = 0.0
        for right, left, weight in self._pairs if measured else ():
            loss += self._add_pairs(pixels, gradient, right, left, weight)
        if gradient is not None and not all(map(math.isfinite, map(float, torch.aminmax(gradient)))):  # without a copy
            loss = math.nan
        self._terms[2] = loss
        self._terms[0] += self._weight * loss

    def _add_pairs(self, pixels: Tensor, gradient: Tensor | None, right: Line, left: Line, weight: float) -> float:
        """L of these pairs of pixels; adds its share of the gradient."""
        difference = pixels[:, :, *right] - pixels[:, :, *left]
        sharp = difference  # |d|^p / d
        if self._power != 2:
            sharp = difference.sign() * difference.abs().pow_(self._power - 1)
        if gradient is not None:
            slope = self._power * self._weight * weight
            gradient[:, :, *right].add_(sharp, alpha=slope)
            gradient[:, :, *left].sub_(sharp, alpha=slope)
        return weight * float(torch.dot(sharp.flatten(), difference.flatten()))
