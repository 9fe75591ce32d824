"""Style and content losses of all layers of a network and their gradients on a GPU, computed together.

A step is one launch for all layers, or for those that are measured together: the blocks look their layer up in
a table. The Gram products run on the tensor cores for 16-bit features; all sums are fp32 or fp64 and always in the same
order, so within a process the same features give the same bits.

In 16 bits and NHWC order Gram matrices of few channels have a kernel of their own, and the others are by cuBLAS: both
leave room for the network beside them. Elsewhere cuBLAS makes the products where that is faster, which is timed on the
device at the first use of each group of shapes. For the cotangents it reads its factor from the device, and adds to the
content's share. A layer that has no memory for its cotangent has a `Term` instead, from which the VJP makes the
cotangent where it is needed: that saves three passes over the features of a layer with a style loss out of six, and
three of five with a content loss. The last layer can have its cotangent ahead, with which the VJP begins while the
others are still measured.

16-bit gradients are scaled by a power of two that keeps the root mean square of the loudest cotangent below two. It
follows from the losses alone (ahead, from that of the last layer), before any gradient is written: a content cotangent
is 2 w / (C M) (F - P), and |(G - A) F|^2 <= |G - A|^2 |F|^2 with |F|^2 = M trace(G) bounds the style cotangent
w / (C^2 M) (G - A) F. No element of a cotangent below two in the root mean square overflows fp16 as long as C M < 2^30.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from . import _blas, _cuda, _graphs
from .summed import LONGEST, Blas, Layer, Products, Summed

_CHUNK = 32  # positions that a block of the Gram kernel takes at a time
_WAVES = 2  # blocks of the Gram launch for each multiprocessor
_SPAN = 16384  # elements of F that one block of the losses covers at least
# Blocks for each multiprocessor of what runs beside the network, of one layer: where one runs, or waits for its turn, a
# convolution cannot, and those of the deep layers leave about a fifth of the multiprocessors of an H200 alone at 512.
# They have clusters too, which find no place between blocks that are scattered.
_NARROW_BESIDE, _WIDE_BESIDE, _CONTENT_BESIDE = 0.2, 0.2, 0.2
_CLUSTER = 8
_FULL = 4  # blocks for each multiprocessor that keep memory busy
_ROUNDS = 2  # in which one block of the losses adds up its elements of G, as in losses.cu
_TILES = {torch.float32: 64, torch.float16: 128, torch.bfloat16: 128}  # as in tiles.cuh
MAX_LAYERS = 256  # as in losses.cu
_FACTORS = 3  # numbers of each layer among the factors, as in layers.cuh
# Channels for which Gram matrices have a kernel of their own, and turns of a block of it: with more its sums get too
# long, with fewer there are too many to add up.
_NARROW = 64, 128
_LEAST, _MOST = 8, 64
_ELEMENTS = 8192  # of F in a turn, as in gram.cu
_BY_KERNEL, _BY_CUBLAS = "Gram matrices by our kernels", "Gram matrices by cuBLAS but for narrow ones"


@dataclass(frozen=True, eq=False)
class Term:
    """What the cotangent of a layer is made of on a GPU: factors[1] lifted F + factors[2] (F - P), as in layers.cuh.

    `factors` (3,) fp32 and `lifted` (C, C), symmetric in the dtype of the features, are written by `Layers.losses`, or
    by `conclude_last`; `content` is the P of the layer, (C, M). None stands for a loss that it does not have.
    """

    factors: Tensor
    lifted: Tensor | None = None
    content: Tensor | None = None


class Layers:
    """The losses of `layers`: content_weight * sum of w_l c_l + style_weight * sum of v_l s_l, w and v of each `Layer`.

    `losses`, or `measure` of some layers after the other and then `conclude`, read the features and write `terms`,
    fp32: the weighted total (without total variation), the sum of the w_l c_l, a place for the total variation, then
    the s_l of each layer (0 if it has none). `gradients` writes the cotangents of the total, times `scale`, a 0-dim
    fp32 tensor. All use the same memory each time and leave the host out. With `ahead` the last layer comes before
    the others: when it is measured, `conclude_last` and `gradients` of it, at a scale of its own; then `conclude`,
    which leaves `scale` over that one in `ratio`, and `gradients` of the others. Raises ValueError for more than
    MAX_LAYERS layers.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        content_weight: float,
        style_weight: float,
        *,
        ahead: bool = False,
    ) -> None:
        if len(layers) > MAX_LAYERS:
            raise ValueError(f"{len(layers)} loss terms: at most {MAX_LAYERS} layers and regions fit")
        self.names = tuple(layers)
        self._layers = tuple(layers.values())
        self._content_weight, self._style_weight = float(content_weight), float(style_weight)
        first = self._layers[0].features
        self._dtype, device = first.dtype, first.device
        self.terms = torch.zeros(3 + len(layers), device=device)
        self._factors = torch.ones(1 + _FACTORS * len(layers), device=device)
        self.scale = self._factors[0]
        self._factors_of_last = torch.ones(1 + _FACTORS, device=device) if ahead else None
        self.ratio = torch.ones((), device=device) if ahead else None
        self._way = self._way_to_gradients = ""  # once they are chosen
        self._differences = [None if a.target is None else torch.empty_like(a.target) for a in self._layers]
        self._plan_launches(device)

    def losses(self) -> None:
        """features -> terms, scale."""
        self.measure(self.names)
        self.conclude()

    def measure(self, names: Sequence[str]) -> None:
        """features of these layers, which follow each other in `names` -> products; see `conclude`."""
        part = self._part_of(names)
        if not self._way:
            self._way = self._fastest(self.ways())
        self._launch_products(self._way, part)

    def _part_of(self, names: Collection[str]) -> slice:
        first = self.names.index(next(iter(names)))
        part = slice(first, first + len(names))
        assert self.names[part] == tuple(names)
        return part

    def conclude_last(self) -> None:
        """What has been measured of the last layer -> what its cotangent needs."""
        assert self._factors_of_last is not None
        self._launch_losses(len(self.names) - 1)
        self._launch_factors(len(self.names) - 1, None, self._factors_of_last, None)

    def conclude(self) -> None:
        """What has been measured of all layers -> terms, scale."""
        self._launch_losses(0)
        self._launch_factors(0, self.terms, self._factors, self.ratio)
        self._finish_distances()

    def ways(self) -> dict[str, Callable[[], None]]:
        """The ways to `losses`, but for distances; narrow layers have their kernel in either."""

        def losses(way: str) -> None:
            self._launch_products(way, slice(0, len(self.names)))
            self._launch_losses(0)
            self._launch_factors(0, self.terms, self._factors, None)

        return {way: partial(losses, way) for way in (_BY_KERNEL, _BY_CUBLAS)}

    def _is_beside(self, begin: int) -> bool:
        """Whether launches for the layers from `begin` on run beside the network."""
        return self._factors_of_last is not None and begin + 1 < len(self._layers)

    def _launch_products(self, way: str, part: slice) -> None:
        """features -> F F^T of each share of the positions, and distances from the content, of some layers."""
        element, layers_of_part = _cuda.ELEMENTS[self._dtype], (part.start, part.stop - part.start)
        beside = self._is_beside(part.start)
        for i in range(part.start, part.stop):
            features, products = self._layers[i].features, self._partial[i]
            if products is not None and self._narrow[i]:
                kernel = f"gram_narrow<{element}, {len(features)}>"
                _launch("gram", kernel, (len(products),), self._table, i, beside=beside)
            elif products is not None and way == _BY_CUBLAS:
                _blas.products(features, self._part[i], products)
        content_blocks = max(self._content_blocks[part])
        if content_blocks:
            grid = content_blocks, part.stop - part.start
            given = self._table, part.start, self._sums
            _launch("losses", f"layer_contents<{element}>", grid, *given, beside=beside)
        blocks = self._gram_blocks[part.stop] - self._gram_blocks[part.start]
        if way == _BY_KERNEL and blocks:
            kernel, start = f"gram<{element}, {self._nhwc}>", self._gram_blocks[part.start]
            _launch("gram", kernel, (blocks,), self._table, *layers_of_part, start, beside=beside)

    def _launch_losses(self, begin: int) -> None:
        """Products of the layers from `begin` on -> sums, differences."""
        start, stop = self._loss_blocks[begin], self._loss_blocks[-1]
        if any(layer.target is not None for layer in self._layers[begin:]):
            given = (self._table, begin, len(self._layers) - begin, start, self._sums)
            _cuda.launch("losses", "layer_losses", (stop - start,), *given, early=not self._is_beside(begin))

    def _launch_factors(self, begin: int, terms: Tensor | None, factors: Tensor, ratio: Tensor | None) -> None:
        """sums of the layers from `begin` on -> terms, factors, lifted, ratio."""
        sums = (self._table, begin, len(self._layers) - begin, self._sums, self._loss_blocks[-1])
        given = (*sums, self._style_weight, self._content_weight, terms, factors, ratio)
        bytes_lifted = sum(each.nbytes for each in self._lifted[begin:] if each is not None)
        enough = -(-bytes_lifted // (16 * _cuda.THREADS))  # for 16 bytes a thread
        blocks = max(1, min(_FULL * _cuda.processors(self.terms.device), enough))
        kernel = f"layer_factors<{_cuda.ELEMENTS[self._dtype]}>"
        _cuda.launch("losses", kernel, (blocks,), *given, early=not self._is_beside(begin))

    def _factors_of(self, i: int) -> Tensor:
        last = self._factors_of_last if i == len(self.names) - 1 else None
        return self._factors[1 + _FACTORS * i :][:_FACTORS] if last is None else last[1:]

    def term(self, name: str) -> Term:
        """What the cotangent of a layer is made of that has no memory for it."""
        i = self.names.index(name)
        return Term(self._factors_of(i), self._lifted[i], self._layers[i].content)

    def gradients(self, names: Collection[str] | None = None) -> None:
        """features, and what `losses` has found -> cotangents, by default of all layers.

        With `ahead` of the last or of the others.
        """
        names = self.names if names is None else names
        if self._factors_of_last is not None or any(layer.cotangent is None for layer in self._layers):
            self._gradients_by_cublas(self._part_of(names))  # our kernel would write all of them
            return
        assert len(names) == len(self.names)
        ways = self.ways_to_gradients()
        if not self._way_to_gradients:
            self._way_to_gradients = self._fastest(ways)
        ways[self._way_to_gradients]()

    def ways_to_gradients(self) -> dict[str, Callable[[], None]]:
        """The ways to compute `gradients`."""
        return {
            "cotangents by our kernel": self._gradients_by_kernel,
            "cotangents by cuBLAS": self._gradients_by_cublas,
        }

    def _gradients_by_kernel(self) -> None:
        kernel = f"layer_gradients<{_cuda.ELEMENTS[self._dtype]}, {self._nhwc}>"
        _cuda.launch("gradients", kernel, (self._gradient_blocks,), self._table, len(self._layers), self._factors)

    def _gradients_by_cublas(self, part: slice = slice(None)) -> None:
        begin, layers = part.start or 0, self._layers[part]
        assert self._factors_of_last is None or len(layers) == (1 if begin else len(self._layers) - 1)
        if any(layer.content is not None and layer.cotangent is not None for layer in layers):
            kernel = f"content_cotangents<{_cuda.ELEMENTS[self._dtype]}>"
            grid = _FULL * _cuda.processors(self.terms.device), len(layers)
            _cuda.launch("gradients", kernel, grid, self._table, begin, self._factors_of(begin))
        for i, (layer, lifted) in enumerate(zip(layers, self._lifted[part], strict=True), begin):
            if lifted is not None and layer.cotangent is not None:
                factor, share = self._factors_of(i)[1], self._shares[int(layer.content is not None)]
                _blas.multiply(lifted, layer.features, factor, share, layer.cotangent)

    def _fastest(self, ways: Mapping[str, Callable[[], None]]) -> str:
        shapes = tuple((tuple(a.features.shape), a.target is not None) for a in self._layers)
        return _graphs.fastest(ways, self.terms.device, (str(self._dtype), self._nhwc, shapes))

    def _plan_launches(self, device: torch.device) -> None:
        """The table of layers.cuh, and the number of blocks of each launch."""
        tile = _TILES[self._dtype]
        self._nhwc = "true" if self._layers[0].features.stride(0) == 1 else "false"
        lies_well = self._nhwc == "true" and self._dtype.itemsize == 2
        self._narrow = [a.target is not None and lies_well and len(a.features) in _NARROW for a in self._layers]
        # Beside the network cuBLAS takes less time than our kernel; timings of either alone would not show it.
        self._way = _BY_CUBLAS if lies_well else ""
        processors, last = _cuda.processors(device), len(self._layers) - 1
        styles = [i for i, layer in enumerate(self._layers) if layer.target is not None]
        shapes = [(*self._layers[i].features.shape, self._is_beside(i)) for i in styles]
        found = _shares(shapes, tile, processors, lies_well)
        self._part = [found[styles.index(i)] if i in styles else 0 for i in range(last + 1)]  # positions of a share
        self._partial = list[Tensor | None]()  # products of all shares
        self._content_blocks = list[int]()
        rows = []
        self._shares = torch.tensor([0.0, 1.0], device=device)  # what is left of a cotangent when cuBLAS adds to it
        self._lifted = [
            None if each is None else torch.empty_like(each, dtype=self._dtype) for each in self._differences
        ]
        self._gram_blocks, self._loss_blocks = [0], [0]  # before each layer, and in all
        self._gradient_blocks = 0
        columns = (self._layers, self._differences, self._lifted, self._narrow, self._part)
        for i, (layer, difference, lifted, narrow, share) in enumerate(zip(*columns, strict=True)):
            channels, positions = layer.features.shape
            begins = (self._gram_blocks[-1], self._loss_blocks[-1], self._gradient_blocks)
            shares = -(-positions // share) if share else 0
            # Threads that add up one element of G.
            lanes = next((lanes for lanes in (1, 2, 4, 8, 16) if shares <= 16 * lanes), 32)
            span = _ROUNDS * _cuda.THREADS // lanes
            products = None
            grams = losses = 0
            content_span = _SPAN
            if self._is_beside(i):
                content_span = max(_SPAN, -(-channels * positions // _few(_CONTENT_BESIDE, processors)) // 8 * 8)
            spans = -(-channels * positions // content_span)
            if layer.target is not None:
                products = torch.empty((shares, channels, channels), device=device)
                grams = 0 if narrow else _tiles(channels, tile) * shares
                losses = -(-channels * (channels + 1) // 2 // span)
                self._gradient_blocks += -(-channels // tile) * -(-positions // tile)
            else:
                self._gradient_blocks += spans
            self._content_blocks.append(spans if layer.content is not None else 0)
            losses += self._content_blocks[-1]
            self._gram_blocks.append(begins[0] + grams)
            self._loss_blocks.append(begins[1] + losses)
            self._partial.append(products)
            tensors = (layer.features, layer.content, layer.cotangent, layer.target, difference, products)
            # 16 bytes at a time are read from these, and whole rows of fp32 in between
            assert all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in (*tensors, lifted))
            weights = (float(layer.content_weight), 0.0 if layer.distance else float(layer.style_weight))
            rows.append((channels, positions, *tensors, shares, share, span, content_span, *begins, *weights, lifted))
        self._table = _cuda.Table(rows, device)
        self._sums = torch.empty((self._loss_blocks[-1], 2), dtype=torch.float64, device=device)

    def _finish_distances(self) -> None:
        """Bring the layers with a `distance` in, which the launch has left out of the total and of the scale."""
        factors = self._factors[1:].view(-1, _FACTORS)
        for i, (layer, difference) in enumerate(zip(self._layers, self._differences, strict=True)):
            if layer.distance is None or difference is None:
                continue
            channels, elements = len(layer.features), layer.features.numel()
            weight = self._style_weight * layer.style_weight
            trace = difference.trace()
            self.terms[3 + i], matrix, means = layer.distance(difference)
            self.terms[0] += weight * self.terms[3 + i]
            difference.copy_(matrix)
            norm = torch.linalg.matrix_norm(difference).clamp_min(1e-30)
            loudness = weight / (channels * elements) * norm * (trace / channels).sqrt()
            loudness = (loudness + 2 * weight / elements * means.sqrt()).clamp_min(1e-30)
            if self._dtype != torch.float32:
                smaller = torch.minimum(self.scale, torch.exp2(-loudness.log2().floor()))
                factors[:, 1:] *= smaller / self.scale
                self.scale.copy_(smaller)
            factors[i, 0] = 16384 * torch.exp2(-norm.log2().floor())
            factors[i, 1] = self.scale * weight / (channels * elements) / factors[i, 0]
            if (lifted := self._lifted[i]) is not None:
                lifted.copy_(factors[i, 0] * difference)


def losses(
    pieces: Sequence[Mapping[str, Layer]],
    content_weight: float,
    style_weight: float,
    products: Products | None = None,
    *,
    ahead: bool = False,
) -> Layers | Summed:
    """`Layers` for features that are all on a GPU at once, `Summed` for others; `ahead` is for the former only."""
    if len(pieces) == 1 and next(iter(pieces[0].values())).features.is_cuda:
        return Layers(pieces[0], content_weight, style_weight, ahead=ahead)
    return Summed(pieces, content_weight, style_weight, products)


def _tiles(channels: int, tile: int) -> int:
    """Tiles on and above the diagonal of G."""
    across = -(-channels // tile)
    return across * (across + 1) // 2


def _shares(shapes: Sequence[tuple[int, int, bool]], tile: int, processors: int, lies_well: bool) -> list[int]:
    """Positions of a share of each style layer (channels, positions, beside the network): what one block of a kernel
    takes, or one product of cuBLAS.

    Of 16-bit features in NHWC order, which lie well, narrow layers have a kernel of their own.
    """
    narrow = [lies_well and channels in _NARROW for channels, *_ in shapes]
    alone = [each[:2] for each, own in zip(shapes, narrow, strict=True) if not (own or each[2])]
    wanted, found = _wanted(alone, tile, _WAVES * processors), list[int]()
    for (channels, positions, beside), own in zip(shapes, narrow, strict=True):
        if own:
            blocks = _few(_NARROW_BESIDE, processors) if beside else _WAVES * processors
            found.append(_share_narrow(channels, positions, blocks))
        elif beside:
            found.append(_share(positions, _wanted([(channels, positions)], tile, _few(_WIDE_BESIDE, processors))))
        else:
            found.append(_share(positions, wanted))
    return found


def _few(share: float, processors: int) -> int:
    return _CLUSTER * max(1, round(share * processors / _CLUSTER))


def _launch(name: str, kernel: str, grid: tuple[int, ...], *arguments: _cuda.Argument, beside: bool) -> None:
    """As `_cuda.launch`; beside the network in clusters, for which there may be blocks with nothing to do."""
    if beside:
        grid = -(-grid[0] // _CLUSTER) * _CLUSTER, *grid[1:]
    _cuda.launch(name, kernel, grid, *arguments, early=not beside, cluster=_CLUSTER if beside else 1)


def _wanted(shapes: Iterable[tuple[int, int]], tile: int, blocks: int) -> int:
    """Positions of a share with which there are about so many blocks, one for each tile and share.

    cuBLAS gets shares of this length as well.
    """
    work = sum(_tiles(channels, tile) * positions for channels, positions in shapes)
    return _CHUNK * min(LONGEST // _CHUNK, max(1, -(-work // (_CHUNK * blocks))))


def _share(positions: int, wanted: int) -> int:
    """A share of the positions of about the `wanted` size; equal ones where there are, as a rest is a launch more."""
    least = -(-positions // wanted)
    counts = sorted(range(max(1, least - least // 8), least + least // 4 + 2), key=lambda n: abs(n - least))
    equal = (positions // n for n in counts if positions % n == 0)
    # Multiples of 8, as so many elements are read at a time.
    return next((share for share in equal if share % 8 == 0 and share <= LONGEST), wanted)


def _share_narrow(channels: int, positions: int, blocks: int) -> int:
    at_once = _ELEMENTS // channels
    return at_once * min(_MOST, max(_LEAST, -(-positions // (at_once * blocks))))


def memory_of_products(shapes: Sequence[tuple[int, int]], processors: int) -> int:
    """Bytes of the products of all shares, for the style losses of `Layers` of 16-bit features (C, M) in NHWC order.

    Beside the network there are fewer.
    """
    shares = _shares([(*shape, False) for shape in shapes], _TILES[torch.float16], processors, True)
    return sum(4 * c * c * -(-m // share) for (c, m), share in zip(shapes, shares, strict=True))


def gram(features: Tensor, products: Products | None = None) -> Tensor:
    """G (C, C) fp32 of features (C, M); on a GPU as `Layers` has it, else by `products` or BLAS."""
    target = torch.zeros(len(features), len(features), device=features.device)
    if not features.is_cuda:
        return (products or Blas()).gram(features, target)
    alone = Layers({"": Layer(features, None, None, target)}, 0, 1)
    alone._way = alone._way or _BY_KERNEL  # once for a style: nothing to choose
    alone.losses()
    (difference,) = alone._differences
    assert difference is not None
    return difference
