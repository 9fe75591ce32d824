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
from .wasserstein import exact_gram

_CHUNK = 32  # positions that a block of the Gram kernel takes at a time
_WAVES = 2  # blocks of the Gram launch for each multiprocessor
_CUBLAS_WAVES = 1  # for which 16-bit features get shares for cuBLAS: fewer disturb the network beside them less
_SPAN = 16384  # elements of F that one block of the losses covers
_FULL = 4  # blocks for each multiprocessor that keep memory busy
_ROUNDS = 2  # in which one block of the losses adds up its elements of G, as in losses.cu
_TILES = {torch.float32: 64, torch.float16: 128, torch.bfloat16: 128}  # as in tiles.cuh
MAX_LAYERS = 256  # as in losses.cu
_FACTORS = 3  # numbers of each layer among the factors, as in layers.cuh
# Channels for which Gram matrices have a kernel of their own, and its blocks for each multiprocessor: no more, unless a
# block had more than the MOST turns, whose sums get too long, and fewer, if one had less than the LEAST. Few blocks
# disturb the network beside which they run little.
_NARROW = {64: 1.0, 128: 0.5}
_LEAST, _MOST = 20, 64
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
        """Take the features of these layers, which follow each other in `names`, into account; see `conclude`."""
        part = self._part_of(names)
        if not self._way:
            self._way = self._fastest(self.ways())
        self._launch_measures(self._way, part)

    def _part_of(self, names: Collection[str]) -> slice:
        first = self.names.index(next(iter(names)))
        part = slice(first, first + len(names))
        assert self.names[part] == tuple(names)
        return part

    def conclude_last(self) -> None:
        """What has been measured of the last layer -> what its cotangent needs."""
        assert self._factors_of_last is not None
        self._launch_factors(len(self.names) - 1, None, self._factors_of_last, None)

    def conclude(self) -> None:
        """What has been measured of all layers -> terms, scale."""
        self._launch_factors(0, self.terms, self._factors, self.ratio)
        self._finish_distances()

    def ways(self) -> dict[str, Callable[[], None]]:
        """The ways to `losses`, but for distances; narrow layers have their kernel in either."""

        def losses(way: str) -> None:
            self._launch_measures(way, slice(0, len(self.names)))
            self._launch_factors(0, self.terms, self._factors, None)

        return {way: partial(losses, way) for way in (_BY_KERNEL, _BY_CUBLAS)}

    def _launch_measures(self, way: str, part: slice) -> None:
        """features -> F F^T of each share of the positions -> sums, of some layers."""
        element, layers_of_part = _cuda.ELEMENTS[self._dtype], (part.start, part.stop - part.start)
        for i in range(part.start, part.stop):
            features, products = self._layers[i].features, self._partial[i]
            if products is not None and self._narrow[i]:
                kernel = f"gram_narrow<{element}, {len(features)}>"
                _cuda.launch("gram", kernel, (len(products),), self._table, i)
            elif products is not None and way == _BY_CUBLAS:
                _blas.products(features, self._part[i], products)
        blocks = self._gram_blocks[part.stop] - self._gram_blocks[part.start]
        if way == _BY_KERNEL and blocks:
            kernel = f"gram<{element}, {self._nhwc}>"
            _cuda.launch("gram", kernel, (blocks,), self._table, *layers_of_part, self._gram_blocks[part.start])
        start, stop = self._loss_blocks[part.start], self._loss_blocks[part.stop]
        if stop > start:
            given = (self._table, *layers_of_part, start, self._sums)
            _cuda.launch("losses", f"layer_losses<{element}>", (stop - start,), *given)

    def _launch_factors(self, begin: int, terms: Tensor | None, factors: Tensor, ratio: Tensor | None) -> None:
        """sums of the layers from `begin` on -> terms, factors, lifted, ratio."""
        sums = (self._table, begin, len(self._layers) - begin, self._sums, self._loss_blocks[-1])
        given = (*sums, self._style_weight, self._content_weight, terms, factors, ratio)
        bytes_lifted = sum(each.nbytes for each in self._lifted[begin:] if each is not None)
        enough = -(-bytes_lifted // (16 * _cuda.THREADS))  # for 16 bytes a thread
        blocks = max(1, min(_FULL * _cuda.processors(self.terms.device), enough))
        _cuda.launch("losses", f"layer_factors<{_cuda.ELEMENTS[self._dtype]}>", (blocks,), *given)

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
        layers = zip(self._layers, self._narrow, strict=True)
        wide = [tuple(a.features.shape) for a, narrow in layers if a.target is not None and not narrow]
        wanted = _wanted(wide, tile, (_CUBLAS_WAVES if lies_well else _WAVES) * _cuda.processors(device))
        rows = []
        self._part, self._partial = list[int](), list[Tensor | None]()  # positions of a share, products of all shares
        self._shares = torch.tensor([0.0, 1.0], device=device)  # what is left of a cotangent when cuBLAS adds to it
        self._lifted = [
            None if each is None else torch.empty_like(each, dtype=self._dtype) for each in self._differences
        ]
        self._gram_blocks, self._loss_blocks = [0], [0]  # before each layer, and in all
        self._gradient_blocks = 0
        columns = (self._layers, self._differences, self._lifted, self._narrow)
        for layer, difference, lifted, narrow in zip(*columns, strict=True):
            channels, positions = layer.features.shape
            begins = (self._gram_blocks[-1], self._loss_blocks[-1], self._gradient_blocks)
            share = _share(positions, wanted)
            if narrow:
                share = _share_narrow(channels, positions, _cuda.processors(device))
            shares = -(-positions // share)
            # Threads that add up one element of G.
            lanes = next((lanes for lanes in (1, 2, 4, 8, 16) if shares <= 16 * lanes), 32)
            span = _ROUNDS * _cuda.THREADS // lanes
            products = None
            grams = losses = 0
            spans = -(-channels * positions // _SPAN)
            if layer.target is not None:
                products = torch.empty((shares, channels, channels), device=device)
                grams = 0 if narrow else _tiles(channels, tile) * shares
                losses = -(-channels * (channels + 1) // 2 // span)
                self._gradient_blocks += -(-channels // tile) * -(-positions // tile)
            else:
                self._gradient_blocks += spans
            losses += spans if layer.content is not None else 0
            self._gram_blocks.append(begins[0] + grams)
            self._loss_blocks.append(begins[1] + losses)
            self._part.append(share)
            self._partial.append(products)
            tensors = (layer.features, layer.content, layer.cotangent, layer.target, difference, products)
            # 16 bytes at a time are read from these, and whole rows of fp32 in between
            assert all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in (*tensors, lifted))
            weights = (float(layer.content_weight), 0.0 if layer.distance else float(layer.style_weight))
            rows.append((channels, positions, *tensors, shares, share, span, _SPAN, *begins, *weights, lifted))
        self._table = _cuda.Table(rows, device)
        self._sums = torch.empty((self._loss_blocks[-1], 2), dtype=torch.float64, device=device)

    def _finish_distances(self) -> None:
        """Bring the layers with a `distance` in, which the launch has left out of the total and of the scale.

        They need Gram matrices of their own, in fp64; nobody reads those of the launch.
        """
        factors = self._factors[1:].view(-1, _FACTORS)
        for i, (layer, difference) in enumerate(zip(self._layers, self._differences, strict=True)):
            if layer.distance is None or difference is None:
                continue
            channels, elements = len(layer.features), layer.features.numel()
            weight = self._style_weight * layer.style_weight
            moment = exact_gram(layer.features)
            trace = moment.trace()
            self.terms[3 + i], matrix, means = layer.distance(moment)
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


def _wanted(shapes: Iterable[tuple[int, ...]], tile: int, blocks: int) -> int:
    """Positions of a share with which there are about so many blocks, one for each tile and share."""
    work = sum(_tiles(channels, tile) * positions for channels, positions in shapes)
    return _CHUNK * min(LONGEST // _CHUNK, max(1, -(-work // (_CHUNK * blocks))))


def _share(positions: int, wanted: int) -> int:
    """A share of the positions of about the `wanted` size; equal ones where there are, as a rest is a launch more."""
    least = -(-positions // wanted)
    counts = sorted(range(max(1, least - least // 8), least + least // 4 + 2), key=lambda n: abs(n - least))
    equal = (positions // n for n in counts if positions % n == 0)
    # Multiples of 8, as so many elements are read at a time.
    return next((share for share in equal if share % 8 == 0 and share <= LONGEST), wanted)


def _share_narrow(channels: int, positions: int, processors: int) -> int:
    at_once = _ELEMENTS // channels
    turns = -(-positions // (at_once * max(1, int(_NARROW[channels] * processors))))
    return at_once * min(_MOST, max(_LEAST, turns))


def memory_of_products(shapes: Sequence[tuple[int, int]], processors: int) -> int:
    """Bytes of the products of all shares, for the style losses of `Layers` of 16-bit features (C, M) in NHWC order."""
    wide = [shape for shape in shapes if shape[0] not in _NARROW]
    wanted = _wanted(wide, _TILES[torch.float16], _CUBLAS_WAVES * processors)
    shares = (_share_narrow(c, m, processors) if c in _NARROW else _share(m, wanted) for c, m in shapes)
    return sum(4 * c * c * -(-m // share) for (c, m), share in zip(shapes, shares, strict=True))


def gram(features: Tensor, products: Products | None = None) -> Tensor:
    """G (C, C) fp32 of features (C, M); on a GPU as `Layers` has it, else by `products` or BLAS."""
    target = torch.zeros(len(features), len(features), device=features.device)
    if not features.is_cuda:
        return (products or Blas()).gram(features, target)
    alone = Layers({"": Layer(features, None, None, target)}, 0, 1)
    alone._way = alone._way or _BY_KERNEL  # once for a style: nothing to choose
    alone.measure(alone.names)
    (difference,) = alone._differences
    assert difference is not None
    return difference
