"""Style and content losses of a network's layers and their gradients by matrix products, one after the other.

The way of a CPU, and of features that come in pieces: their sums over the positions are added up piece by piece, and
what is made of the sums is known to all pieces then.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from . import _blas
from .content import content_gradient_blas, content_loss_blas
from .gram import gram_blas
from .style import style_gradient_blas
from .wasserstein import Wasserstein, exact_gram

_STRIP = 1 << 22  # elements
SCRATCH = 12 * _STRIP  # bytes that `Cublas` takes at most to compare them
LONGEST = 8192  # positions of a share of a Gram matrix on a GPU: longer sums lose digits


class Products(Protocol):
    """What a layer costs: (C, M) features, (C, C) fp32 matrices; see `gram`, `style` and `content`."""

    def content_loss(self, features: Tensor, target: Tensor) -> Tensor:
        """The loss, 0-dim fp32."""

    def content_gradient(self, features: Tensor, target: Tensor, factor: float, out: Tensor) -> None:
        """Write factor * (F - P) into `out`."""

    def gram(self, features: Tensor, out: Tensor) -> Tensor:
        """Write F F^T / M into `out` and return it."""

    def style_gradient(
        self, features: Tensor, difference: Tensor, factor: float, out: Tensor, accumulate: bool
    ) -> None:
        """Write (or add) factor * (G - A) F into `out`."""


class Blas:
    """`Products` by torch and its BLAS, for any layout and precision."""

    content_loss = staticmethod(content_loss_blas)
    content_gradient = staticmethod(content_gradient_blas)
    gram = staticmethod(gram_blas)
    style_gradient = staticmethod(style_gradient_blas)


class Cublas:
    """`Products` by cuBLAS on a GPU, in any precision; sums are fp32."""

    content_gradient = staticmethod(content_gradient_blas)

    def content_loss(self, features: Tensor, target: Tensor) -> Tensor:
        """See `Products`; strip by strip, as it takes copies in fp64."""
        strips = (each.split(_STRIP // len(features) + 1, dim=1) for each in (features, target))
        losses = [content_loss_blas(*each) * (each[0].numel() / features.numel()) for each in zip(*strips, strict=True)]
        return torch.stack(losses).sum()

    def gram(self, features: Tensor, out: Tensor) -> Tensor:
        """See `Products`."""
        channels, positions = features.shape
        shares = torch.empty((math.ceil(positions / LONGEST), channels, channels), device=features.device)
        _blas.products(features, LONGEST, shares)
        return torch.sum(shares, 0, out=out).div_(positions)

    def style_gradient(
        self, features: Tensor, difference: Tensor, factor: float, out: Tensor, accumulate: bool
    ) -> None:
        """See `Products`; `out` is not the features."""
        # As in layers.cuh: the matrix has a norm of at least 2^14 and less than 2^15, which fp16 holds.
        lift = torch.exp2(14 - torch.linalg.matrix_norm(difference).clamp_min(1e-30).log2().floor())
        share = torch.full((), float(accumulate), device=out.device)
        _blas.multiply((lift * difference).to(features.dtype), features, factor / lift, share, out)


@dataclass(frozen=True)
class Layer:
    """What one layer works on.

    `features` F, `content` P (None unless it is a content layer) and `cotangent` dL/dF are (C, M) of one dtype, fp32,
    fp16 or bf16, and one layout: contiguous, or the transpose of a contiguous (M, C) (NHWC). On a CPU the cotangent may
    be the features themselves, and takes their place; None is for losses alone and, on a GPU, for a `Term`. `target` A
    is (C, C) fp32, None unless it is a style layer. `distance` takes the place of the distance of Gram matrices, for
    features less the style's mean: A is then zero. The weights are the layer's own, beside those of all content and
    style losses.
    """

    features: Tensor
    cotangent: Tensor | None
    content: Tensor | None
    target: Tensor | None
    content_weight: float = 1.0
    style_weight: float = 1.0
    distance: Wasserstein | None = None


class Summed:
    """The losses of layers, as `Layers` has them, of features that are there at once or in `pieces`.

    Each piece holds the same layers, with the same targets and weights, at other positions of the features. The one
    whose turn it is, from the first on, is `piece`: its features are there to be measured, and once more for its
    gradients. `products` computes the matrix products, by default BLAS, or cuBLAS. On a GPU `conclude` waits for what
    it finds.
    """

    ratio: Tensor | None = None  # nothing comes ahead

    def __init__(
        self,
        pieces: Sequence[Mapping[str, Layer]],
        content_weight: float,
        style_weight: float,
        products: Products | None = None,
    ) -> None:
        self.names, self.piece = tuple(pieces[0]), 0
        self._pieces = [tuple(each.values()) for each in pieces]
        self._positions = [sum(each.features.shape[1] for each in layer) for layer in zip(*self._pieces, strict=True)]
        self._content_weight, self._style_weight = float(content_weight), float(style_weight)
        layers = self._pieces[0]
        self._dtype, device = layers[0].features.dtype, layers[0].features.device
        self._products = products or (Cublas() if layers[0].features.is_cuda else Blas())
        self.terms, self.scale = torch.zeros(3 + len(layers), device=device), torch.ones((), device=device)
        self._scale = 1.0  # the same, on the host
        self._contents = torch.zeros(len(layers), device=device)
        # G of what has been measured, of a `distance` fp64; behind `conclude` G - A, or what a `distance` has instead.
        self._moments = [None if each.target is None else torch.empty_like(each.target) for each in layers]

    def losses(self) -> None:
        """features -> terms, scale, where they are all there."""
        self.measure(self.names)
        self.conclude()

    def measure(self, names: Collection[str]) -> None:
        """Take the features of these layers into account."""
        layers = zip(self.names, self._pieces[self.piece], self._moments, strict=True)
        for i, (name, layer, moment) in enumerate(layers):
            if name not in names:
                continue
            share = layer.features.shape[1] / self._positions[i]
            if layer.content is not None:
                loss = share * self._products.content_loss(layer.features, layer.content)
                self._contents[i] = self._contents[i] + loss if self.piece else loss
            if moment is None:
                continue
            if layer.distance is not None:
                own = share * exact_gram(layer.features)
                self._moments[i] = moment + own if self.piece else own
            elif self.piece:
                moment.add_(self._products.gram(layer.features, torch.empty_like(moment)), alpha=share)
            else:
                self._products.gram(layer.features, moment)
                if share != 1:
                    moment *= share

    def conclude(self) -> None:
        """What has been measured of all layers -> terms, scale."""
        contents, styles, loudest = self._contents.tolist(), list[float](), 1e-30
        for i, (layer, moment) in enumerate(zip(self._pieces[0], self._moments, strict=True)):
            channels = len(layer.features)
            elements, weight = channels * self._positions[i], self._style_weight * layer.style_weight
            style = loudness = 0.0
            if layer.content is not None:
                loudness = 2 * self._content_weight * layer.content_weight / elements * math.sqrt(contents[i])
            if moment is not None and layer.target is not None:
                trace = float(moment.trace())
                if layer.distance is None:
                    moment -= layer.target
                    flat = moment.flatten()
                    square = float(torch.dot(flat, flat))
                    style = square / (4 * channels**2)
                else:
                    distance, matrix, means = layer.distance(moment)
                    style, square, self._moments[i] = float(distance), float(matrix.square().sum()), matrix
                    loudness += 2 * weight / elements * math.sqrt(means)
                loudness += weight / (channels * elements) * math.sqrt(square * trace / channels)
            styles.append(style)
            loudest = max(loudest, loudness)
        layers = self._pieces[0]
        content = sum(layer.content_weight * each for layer, each in zip(layers, contents, strict=True))
        style = sum(layer.style_weight * each for layer, each in zip(layers, styles, strict=True))
        total = self._style_weight * style + self._content_weight * content
        self.terms.copy_(torch.tensor([total, content, 0.0, *styles]))
        if self._dtype != torch.float32 and math.isfinite(loudest):
            self._scale = 2.0 ** -math.floor(math.log2(loudest))
            self.scale.fill_(self._scale)

    def gradients(self, names: Collection[str] | None = None) -> None:
        """features, and what `conclude` has found -> cotangents, by default of all layers."""
        scale = self._scale
        layers = zip(self.names, self._pieces[self.piece], self._moments, self._positions, strict=True)
        for name, layer, difference, positions in layers:
            if names is not None and name not in names:
                continue
            assert layer.cotangent is not None
            features, channels = layer.features, len(layer.features)
            elements = channels * positions
            if (
                layer.content is not None
                and difference is not None
                and features.data_ptr() == layer.cotangent.data_ptr()
            ):
                features = features.clone()
            if layer.content is not None:
                factor = 2 * scale * self._content_weight * layer.content_weight / elements
                self._products.content_gradient(features, layer.content, factor, layer.cotangent)
            if difference is not None:
                factor = scale * self._style_weight * layer.style_weight / (channels * elements)
                self._products.style_gradient(features, difference, factor, layer.cotangent, layer.content is not None)
