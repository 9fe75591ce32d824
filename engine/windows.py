"""Features and VJP of an image by those of windows on it, one after the other, in the memory of one.

What a layer gives out at one place depends on the pixels around it, no further than the `reach` of the layers. Windows
overlap so far that each place of each layer has its surroundings in one of them, to which it belongs; what a window
gives out besides is left out, and gets no cotangent. So sums over the places, like Gram matrices, are the sums over the
windows, and the gradient of the pixels is the sum of the windows' gradients: both are exact but for rounding.

The VJP needs the features again, which have been overwritten: it makes the forward pass of all windows but one again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from . import kernels
from .config import MIN_WINDOW
from .export import vgg
from .features import Area, Features, Part, ignore


def reach(convs: Sequence[vgg.Conv]) -> int:
    """Pixels around a place of the last layer, in each direction, that it depends on, rounded up to WHOLE."""
    return _whole(sum(2 ** (conv.block - 1) for conv in convs))


def _whole(length: float) -> int:
    return math.ceil(length / vgg.WHOLE) * vgg.WHOLE


@dataclass(frozen=True)
class Span:
    """One side of a window: the pixel of the image where it begins, and those from `first` to `last` that are its own.

    It begins and owns at multiples of WHOLE, where the places of all layers begin; the last one owns the rest.
    """

    begin: int
    first: int
    last: int


@dataclass(frozen=True)
class Spans:
    """The sides of the windows along a side of an image: all have one `length`. Each pixel has one owner."""

    length: int
    each: tuple[Span, ...]

    @staticmethod
    def of(side: int, most: int, reach: int, *, wrap: bool) -> Spans:
        """The fewest of at most `most` pixels, a multiple of WHOLE, and a rest; one span if the side is not longer.

        Spans go `reach` pixels beyond what they own, unless the image ends, or to its other end if it wraps around.
        """
        if side <= most:
            return Spans(side, (Span(0, 0, side),))
        if wrap:
            own = _whole(side / math.ceil(side / (most - 2 * reach)))
            spans = (Span(first - reach, first, min(side, first + own)) for first in range(0, side, own))
            return Spans(own + 2 * reach, tuple(spans))
        rest = side % vgg.WHOLE
        inner = side - rest
        count = math.ceil((inner - 2 * reach) / (most - 2 * reach))
        length = _whole((inner + 2 * reach * (count - 1)) / count)
        begins = [min(i * (length - 2 * reach), inner - length) for i in range(count)]
        firsts = [0, *(begin + reach for begin in begins[1:])]
        # All have the rest: in the inner ones it lies beyond what their own places depend on.
        return Spans(length + rest, tuple(map(Span, begins, firsts, (*firsts[1:], side))))


class Windowed:
    """`features.Features` of a spec: a part for each window, whose features and cotangents have their turn in memory.

    `opened` opens the network of the windows, which have at most `most` pixels on a side, and a rest; see `Spans`.
    """

    recordable, overlapping = False, None

    def __init__(
        self, spec: vgg.Spec, most: int, opened: Callable[[vgg.Spec], Features], *, forward_only: bool = False
    ) -> None:
        self.spec, self.turn = spec, 0
        self._network = opened(spec_of(spec, most))
        self.products = self._network.products
        self.image = torch.zeros(1, 3, spec.height, spec.width, device=self._network.image.device)
        if not forward_only:
            self.gradient = torch.zeros_like(self.image)
        self._pixels = self.image
        down, across = spans(spec, most)
        self._windows = tuple(product(down.each, across.each))
        (self._seen,) = self._network.parts
        same, parts = forward_only or self._seen.cotangents is self._seen.features, []
        memory = {name: self._seen.features[name].new_empty(count) for name, count in largest(spec, most).items()}
        own = memory if same else {name: torch.empty_like(each) for name, each in memory.items()}
        self._given = {} if forward_only else {name: self._seen.cotangents[name] for name in spec.layers}
        self._memory = [*memory.values(), *(() if same else own.values())]
        for rows, columns in self._windows:
            areas = {name: (_places(name, rows), _places(name, columns)) for name in spec.layers}
            features = {name: self._placed(name, area, memory[name]) for name, area in areas.items()}
            cotangents = features if same else {name: self._placed(name, areas[name], own[name]) for name in areas}
            parts.append(Part(features, cotangents, areas))
        self.parts = tuple(parts)

    def _placed(self, name: str, area: Area, memory: Tensor) -> Tensor:
        """(1, C, h, w) of an area at the beginning of flat memory, in the order of the network."""
        seen = self._seen.features[name]
        channels, (height, width) = seen.shape[1], map(_length, area)
        flat = memory[: channels * height * width]
        if seen.stride(1) == 1:
            return flat.view(1, height, width, channels).permute(0, 3, 1, 2)
        return flat.view(1, channels, height, width)

    @property
    def memory(self) -> list[Tensor]:
        """The tensors that it works in."""
        return [self.image, self.gradient, *self._memory, *self._network.memory]

    def use(self) -> AbstractContextManager[None]:
        """See `features.Features`."""
        return self._network.use()

    def chains(self, name: str, *, style: bool, content: bool) -> bool:
        """The cotangents are needed, to leave those out that belong to others."""
        return False

    def forward(self, read: Callable[[tuple[str, ...]], None] = ignore, pixels: Tensor | None = None) -> None:
        """image, or pixels in its place -> features, one part after the other."""
        self._pixels = self.image if pixels is None else pixels

        def hand_on(layers: tuple[str, ...]) -> None:
            self._take(layers)
            read(layers)

        for turn in range(len(self.parts)):
            self.turn = turn
            self._show()
            self._network.forward(hand_on)

    def vjp(self, write: Callable[[tuple[str, ...]], None], terms: Mapping[str, kernels.Term] | None = None) -> None:
        """features, cotangents -> gradient, one part after the other; see `features.Features.vjp`."""
        assert not terms
        self.gradient.zero_()
        latest = self.turn
        for turn in reversed(range(len(self.parts))):
            self.turn = turn
            if turn != latest:
                self._show()
                self._network.forward()
            self._network.vjp(partial(self._give, write))
            for whole, window in self._pixel_areas():
                self.gradient[:, :, *whole] += self._network.gradient[:, :, *window]
        self._pixels = self.image  # those that were given are somebody else's

    def _take(self, layers: tuple[str, ...]) -> None:
        """Features of the window -> those of the part."""
        for name in layers:
            self.parts[self.turn].features[name].copy_(self._seen.features[name][:, :, *self._inside(name)])

    def _give(self, write: Callable[[tuple[str, ...]], None], layers: tuple[str, ...]) -> None:
        """Cotangents of the part -> those of the window."""
        self._take(layers)
        write(layers)
        for name in layers:
            self._given[name].zero_()
            self._given[name][:, :, *self._inside(name)] = self.parts[self.turn].cotangents[name]

    def _inside(self, name: str) -> Area:
        """What belongs to the window at the turn, in its own places of a layer."""
        areas, steps = self.parts[self.turn].areas, _halvings(name)
        assert areas is not None
        rows, columns = (
            slice(each.start - (span.begin >> steps), each.stop - (span.begin >> steps))
            for each, span in zip(areas[name], self._windows[self.turn], strict=True)
        )
        return rows, columns

    def _show(self) -> None:
        """Pixels -> those of the window."""
        for whole, window in self._pixel_areas():
            self._network.image[:, :, *window] = self._pixels[:, :, *whole]

    def _pixel_areas(self) -> Iterator[tuple[Area, Area]]:
        """Where pixels of the image lie in the window at the turn: more than one rectangle if it wraps around."""
        sides = self._network.image.shape[2:], self.image.shape[2:], self._windows[self.turn]
        down, across = (_stretches(*side) for side in zip(*sides, strict=True))
        for (rows, own_rows), (columns, own_columns) in product(down, across):
            yield (rows, columns), (own_rows, own_columns)


def spans(spec: vgg.Spec, most: int) -> tuple[Spans, Spans]:
    """Those down and across an image."""
    around, wrap = reach(spec.convs), spec.padding == "circular"
    down, across = (Spans.of(side, most, around, wrap=wrap) for side in (spec.height, spec.width))
    return down, across


def spec_of(spec: vgg.Spec, most: int) -> vgg.Spec:
    """The spec of the windows on an image."""
    down, across = spans(spec, most)
    return replace(spec, height=down.length, width=across.length)


def largest(spec: vgg.Spec, most: int | None) -> dict[str, int]:
    """Elements of each loss layer that stand in memory at once: those of the largest part, or all without windows."""
    if most is None:
        return {name: math.prod(spec.shapes[name]) for name in spec.layers}
    sides = [spans_of.each for spans_of in spans(spec, most)]
    return {
        name: spec.shapes[name][1] * math.prod(max(_length(_places(name, span)) for span in each) for each in sides)
        for name in spec.layers
    }


def choices(side: int, layers: Sequence[str], *, wrap: bool) -> list[int]:
    """Windows of which 2, 3, 4 and so on are enough for a side of so many pixels, as large as they have to be."""
    around, found = reach(vgg.cut(layers)), list[int]()
    for count in range(2, side):
        window = _whole(side / count) + 2 * around if wrap else _whole((side + 2 * around * (count - 1)) / count)
        if window < max(MIN_WINDOW, 2 * around + vgg.WHOLE):
            break
        if window < side and window not in found:
            found.append(window)
    return found


def cost(spec: vgg.Spec, most: int | None) -> float:
    """About how many times as long as without windows an evaluation takes: the forward pass is half of it."""
    if most is None:
        return 1.0
    down, across = spans(spec, most)
    count = len(down.each) * len(across.each)
    seen = count * down.length * across.length / (spec.height * spec.width)
    return seen * (1 + (count - 1) / (2 * count))


def _places(layer: str, span: Span) -> slice:
    """What a window owns of a layer along a side."""
    steps = _halvings(layer)
    return slice(span.first >> steps, span.last >> steps)


@functools.cache
def _halvings(layer: str) -> int:
    """How often the sides of the image have been halved for a layer."""
    return next(conv.block for conv in vgg.CONVS if layer in (conv.name, conv.relu)) - 1


def _length(places: slice) -> int:
    return int(places.stop - places.start)


def _stretches(length: int, side: int, span: Span) -> list[tuple[slice, slice]]:
    """(of the image, of the window) along a side; a window may begin before the image, or end behind it, and wraps."""
    found, place = [], 0
    while place < length:
        begin = (span.begin + place) % side
        count = min(length - place, side - begin)
        found.append((slice(begin, begin + count), slice(place, place + count)))
        place += count
    return found
