"""The objective: content, style and total variation loss of an image, and its gradient with respect to the pixels."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import kernels
from .config import Config
from .features import Features, Losses
from .regions import Mask, View, guide
from .stages import Stages
from .targets import Statistics


@dataclass(frozen=True)
class Terms:
    """Losses of one image, 0-dim fp32 tensors on its device; `total` is weighted, the others as in `Score`."""

    total: Tensor
    content: Tensor
    style: dict[str, Tensor]
    tv: Tensor


@dataclass(frozen=True)
class Region:
    """What a part of the image is compared with: the style's statistics, the part's share in the style loss, its mask.

    Without a mask it is the whole image.
    """

    statistics: Statistics
    share: float = 1.0
    mask: Mask | None = None


class Objective:
    """L = content_weight * content + style_weight * style + tv_weight * tv.

    Content is the sum of w_l c_l over its layers, with `Config.content_loss` sum times C_l M_l / 2; style is the sum
    of v_l u_r s_lr over its layers and the `regions`, with the weights w of `Config.content_layer_weights`, v of
    `Config.style_layer_weights` and the shares u of the regions; the sums of v and of u are one. `content` holds the
    features P (1, C, H, W) of the content image at the content layers; empty, there is no content loss, and without
    regions no style loss. The formulas are those of `kernels`. The gradient of pixels that are `frozen`, bools
    (1, 1, H, W), is zero. `temporal` is a further term. If `write` makes the same launches on a GPU each time, it
    leaves the loss in `recorded`, which is None else.
    """

    def __init__(
        self,
        network: Features,
        content: Mapping[str, Tensor],
        regions: Sequence[Region],
        config: Config,
        frozen: Tensor | None = None,
        temporal: kernels.Temporal | None = None,
    ) -> None:
        self.network = network
        self.frozen = None if frozen is None else frozen.to(network.image.device)
        self._temporal = temporal
        self._views: dict[str, tuple[View, kernels.Layer]] = {}  # by term
        self._shares: dict[str, tuple[str, float]] = {}  # by term: layer, share
        self._styles = tuple(config.style_layer_weights) if regions else ()
        self._style_weight = config.style_weight
        terms: dict[str, kernels.Layer] = {}
        for name in network.spec.layers:
            given = _flat(content[name]) if name in content else None
            plain = [] if config.style_loss != "gram" else [each for each in regions if each.mask is None]
            target = plain[0].statistics[name].matrix if plain and name in config.style_layer_weights else None
            views = target is None and name in config.style_layer_weights and bool(regions)
            chained = not views and network.chains(name, style=target is not None, content=given is not None)
            self._direct(terms, name, given, target, config, chained)
            if views:
                for i, region in enumerate(regions):
                    self._viewed(terms, f"{name} {i}", name, region, config)
        direct = tuple(terms) == network.spec.layers  # each has one term, of the features themselves
        self._overlapping = network.overlapping if direct else None
        weights = config.content_weight, config.style_weight
        self._layers = kernels.Layers(terms, *weights, network.products, ahead=self._overlapping is not None)
        self._chained = {name: self._layers.term(name) for name in terms if terms[name].cotangent is None}
        # The host computes the eigenvalues of Wasserstein distances on its own.
        recorded = config.style_loss != "wasserstein" or not regions
        alone = recorded and not network.recordable
        self._run_measures, self._run_conclusion, self._run_cotangents = (
            kernels.Recorded(network.image.device) if alone else _at_once for _ in range(3)
        )
        self._total = self._layers.terms[0]
        self.recorded = self._total if recorded and network.recordable and network.image.is_cuda else None
        self._recorded: tuple[tuple[int, ...], kernels.Recorded] | None = None  # for pixels and a gradient at addresses
        self._gradient: Tensor | None = None  # of `evaluate`
        self.stages = Stages(measures=not network.image.is_cuda)
        self._pixels = kernels.Pixels(
            network.gradient,
            self._layers.scale,
            config.tv_weight,
            self._layers.terms,
            config.tv_power,
            config.tile,
            config.tv_form,
        )

    def write(self, pixels: Tensor, gradient: Tensor | None, *, measured: bool = False) -> Tensor:
        """Total loss of pixels (1, 3, H, W), 0-dim fp32, and its gradient into `gradient` if wanted.

        Both are contiguous fp32 on the device of the network. Total variation of weight zero is only computed to be
        `measured`. The loss lies in memory that the next call writes again; it is NaN if the gradient is not finite. On
        a GPU all of it is queued on the current stream of `network.use`, and the host waits for nothing, but for
        Wasserstein distances.
        """
        with self.network.use():
            if self.recorded is not None and gradient is not None:
                key = pixels.data_ptr(), *pixels.stride(), gradient.data_ptr(), *gradient.stride(), int(measured)
                if self._recorded is None or self._recorded[0] != key:
                    self._recorded = key, kernels.Recorded(pixels.device)
                self._recorded[1](lambda: self._write(pixels, gradient, measured))
            else:
                self._write(pixels, gradient, measured)
        return self._total

    def _write(self, pixels: Tensor, gradient: Tensor | None, measured: bool = False) -> None:
        network = self.network
        if gradient is not None and self._overlapping is not None:
            assert self._layers.ratio is not None
            given = self._layers.ratio, self._chained
            self._overlapping.both(Losses(self._read, self._begin, self._go_on, *given), pixels)
        else:
            with self.stages.stage("forward"):
                network.forward(self._read, pixels)
            with self.stages.stage("losses"):
                self._run_conclusion(self._layers.conclude)
            if gradient is not None:
                with self.stages.stage("vjp"):
                    network.vjp(self._write_cotangents, self._chained)
        with self.stages.stage("losses"):
            self._pixels.finish(pixels, gradient, measured=measured)
            if self._temporal is not None:
                self._temporal.add(pixels, gradient, self._total)
        if gradient is not None and self.frozen is not None:
            gradient.masked_fill_(self.frozen, 0)

    def _read(self, layers: tuple[str, ...]) -> None:
        with self.stages.stage("losses"):
            self._run_measures(lambda: self._measure(layers))

    def _write_cotangents(self, layers: tuple[str, ...]) -> None:
        with self.stages.stage("cotangents"):
            self._run_cotangents(lambda: self._cotangents(layers))

    def _begin(self) -> None:
        """What the VJP begins with, from the deepest layer alone."""
        self._layers.conclude_last()
        self._cotangents(self.network.spec.layers[-1:])

    def _go_on(self) -> None:
        """What it needs then, from all."""
        self._layers.conclude()
        self._cotangents(self.network.spec.layers[:-1])

    def evaluate(self, pixels: Tensor, with_gradient: bool = True) -> tuple[Terms, Tensor | None]:
        """Losses of pixels (1, 3, H, W) and, if asked for, the gradient of the total: tensors that the caller owns."""
        with self.network.use():
            if with_gradient and self._gradient is None:  # the same memory each time: the launches are replayed then
                self._gradient = torch.empty_like(self.network.image)
            gradient = self._gradient if with_gradient else None
            self.network.image.copy_(pixels)
            self.write(self.network.image, gradient, measured=True)
            total, content, tv, *values = self._layers.terms.clone().unbind()
            gradient = None if gradient is None else gradient.clone()
        style: dict[str, Tensor] = {}
        for term, value in zip(self._layers.names, values, strict=True):
            if term in self._shares:
                layer, share = self._shares[term]
                style[layer] = style.get(layer, 0) + share * value
        return Terms(total, content, {layer: style[layer] for layer in self._styles}, tv), gradient

    def _direct(
        self,
        terms: dict[str, kernels.Layer],
        name: str,
        content: Tensor | None,
        target: Tensor | None,
        config: Config,
        chained: bool,
    ) -> None:
        """Add the term of a layer's own features, if it has one; `chained`, the VJP makes the cotangent itself."""
        if content is None and target is None:
            return
        weights = config.content_layer_weights.get(name, 0.0), config.style_layer_weights.get(name, 0.0)
        features = _flat(self.network.features[name])
        cotangent = None if chained else _flat(self.network.cotangents[name])
        if config.content_loss == "sum":
            weights = weights[0] * features.numel() / 2, weights[1]
        terms[name] = kernels.Layer(features, cotangent, content, target, *weights)
        if target is not None:
            self._shares[name] = name, 1.0

    def _viewed(self, terms: dict[str, kernels.Layer], term: str, name: str, region: Region, config: Config) -> None:
        """Add the term of a region of a layer, or of another statistic than the Gram matrix."""
        features = self.network.features[name]
        own = None if region.mask is None else guide(region.mask, (features.shape[2], features.shape[3]))
        view = View(_flat(features), config.style_loss, own, _flat(self.network.cotangents[name]))
        statistic, target, distance = region.statistics[name], region.statistics[name].matrix, None
        if config.style_loss == "wasserstein":
            distance = kernels.Wasserstein(view.mean, statistic.mean, statistic.matrix)
            target = torch.zeros_like(target)
        weight = config.style_layer_weights[name] * region.share
        terms[term] = kernels.Layer(view.features, view.cotangent, None, target, 0.0, weight, distance)
        self._shares[term] = name, region.share
        self._views[term] = view, terms[term]

    def _measure(self, layers: Collection[str]) -> None:
        """Take the features of these layers of the network into account."""
        terms = [term for term in self._layers.names if self._layer_of(term) in layers]
        for term in terms:
            if term in self._views:
                self._views[term][0].read()
        if terms:
            self._layers.measure(terms)

    def _cotangents(self, layers: Collection[str]) -> None:
        """Write the cotangents of these layers of the network."""
        for name in layers:
            if name not in self._layers.names:
                self.network.cotangents[name].zero_()
        self._layers.gradients([term for term in self._layers.names if self._layer_of(term) in layers])
        for term, (view, layer) in self._views.items():
            if self._layer_of(term) not in layers:
                continue
            slope = None
            if layer.distance is not None:
                factor = 2 * self._style_weight * layer.style_weight / layer.features.numel()
                slope = factor * self._layers.scale * layer.distance.slope
            view.write(slope)

    def _layer_of(self, term: str) -> str:
        return self._shares.get(term, (term, 0.0))[0]


def _at_once(launches: Callable[[], None]) -> None:
    launches()


def _flat(tensor: Tensor) -> Tensor:
    """(1, C, H, W) -> (C, H W), a view in either memory format."""
    return tensor.flatten(2)[0]
