"""The objective: content, style and total variation loss of an image, and its gradient with respect to the pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import kernels
from .config import Config
from .features import Features, Losses, Part
from .regions import Mask, View, guide, guide_of
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
    features P (1, C, h, w) of the content image at the content layers, for each of the network's parts; empty, there is
    no content loss, and without regions no style loss. The formulas are those of `kernels`. The gradient of pixels that
    are `frozen`, bools (1, 1, H, W), is zero. `temporal` is a further term. If `write` makes the same launches on a GPU
    each time, it leaves the loss in `recorded`, which is None else.
    """

    def __init__(
        self,
        network: Features,
        content: Sequence[Mapping[str, Tensor]],
        regions: Sequence[Region],
        config: Config,
        frozen: Tensor | None = None,
        temporal: kernels.Temporal | None = None,
    ) -> None:
        self.network = network
        self.frozen = None if frozen is None else frozen.to(network.image.device)
        self._temporal = temporal
        self._views: list[dict[str, View]] = [{} for _ in network.parts]  # by term
        self._distances: dict[str, kernels.Wasserstein] = {}  # by term
        self._aways: list[dict[str, Tensor]] = [{} for _ in network.parts]  # by term: of what a distance is measured
        self._shares: dict[str, tuple[str, float]] = {}  # by term: layer, share
        self._styles = tuple(config.style_layer_weights) if regions else ()
        self._style_weight = config.style_weight
        self._rooms: dict[str, tuple[Tensor, Tensor]] = {}  # by term: what the views of several parts work in
        self._weights = config.style_layer_weights
        spec = network.spec
        guides = {
            (name, i): guide(region.mask, spec.shapes[name][2:])
            for i, region in enumerate(regions)
            for name in self._styles
            if region.mask is not None
        }
        contents = content or [{}] * len(network.parts)
        with network.use():  # which computes on as many threads as ever
            pieces = [self._terms(i, each, regions, guides, config) for i, each in enumerate(contents)]
        terms, at_once = pieces[0], len(pieces) == 1
        direct = tuple(terms) == spec.layers  # each has one term, of the features themselves
        self._overlapping = network.overlapping if direct else None
        weights = config.content_weight, config.style_weight
        self._layers = kernels.losses(pieces, *weights, network.products, ahead=self._overlapping is not None)
        self._chained = {}
        if isinstance(self._layers, kernels.Layers):
            self._chained = {name: self._layers.term(name) for name in terms if terms[name].cotangent is None}
        # The host computes the eigenvalues of Wasserstein distances on its own, and the losses of features in pieces.
        recorded = at_once and (config.style_loss != "wasserstein" or not regions)
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
        Wasserstein distances and the losses of several parts.
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
                self._run_conclusion(self._conclude)
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
        assert isinstance(self._layers, kernels.Layers)
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

    def _terms(
        self,
        turn: int,
        content: Mapping[str, Tensor],
        regions: Sequence[Region],
        guides: Mapping[tuple[str, int], Tensor],
        config: Config,
    ) -> dict[str, kernels.Layer]:
        """The loss terms of a part: of the features of a layer themselves, or of a view of them for each region."""
        network, found = self.network, dict[str, kernels.Layer]()
        part = network.parts[turn]
        for name in network.spec.layers:
            given = _flat(content[name]) if name in content else None
            plain = [] if config.style_loss != "gram" else [each for each in regions if each.mask is None]
            target = plain[0].statistics[name].matrix if plain and name in self._weights else None
            views = target is None and name in self._weights and bool(regions)
            if given is not None or target is not None:
                chained = not views and network.chains(name, style=target is not None, content=given is not None)
                found[name] = self._direct(part, name, given, target, config, chained=chained)
            for i, region in enumerate(regions if views else ()):
                own = guides.get((name, i))
                if own is not None:
                    own = guide_of(part, name, own, network.spec.shapes[name][2:])
                found[f"{name} {i}"] = self._viewed(turn, f"{name} {i}", name, region, own, config)
        return found

    def _direct(
        self, part: Part, name: str, content: Tensor | None, target: Tensor | None, config: Config, *, chained: bool
    ) -> kernels.Layer:
        """The term of a layer's own features; `chained`, the VJP makes the cotangent itself."""
        weights = config.content_layer_weights.get(name, 0.0), config.style_layer_weights.get(name, 0.0)
        if config.content_loss == "sum":
            weights = weights[0] * self._elements(name) / 2, weights[1]
        if target is not None:
            self._shares[name] = name, 1.0
        cotangent = None if chained else _flat(part.cotangents[name])
        return kernels.Layer(_flat(part.features[name]), cotangent, content, target, *weights)

    def _viewed(
        self, turn: int, term: str, name: str, region: Region, guide: Tensor | None, config: Config
    ) -> kernels.Layer:
        """The term of a region of a layer, or of another statistic than the Gram matrix."""
        part, statistic = self.network.parts[turn], region.statistics[name]
        features = _flat(part.features[name])
        shift = {"gram": 0.0, "shifted": 1.0}.get(config.style_loss, statistic.mean)
        if len(self.network.parts) > 1 and term not in self._rooms:
            most = max(each.features[name].numel() for each in self.network.parts)
            self._rooms[term] = features.new_empty(most), features.new_empty(most)
        view = View(features, shift, guide, _flat(part.cotangents[name]), self._rooms.get(term))
        target = statistic.matrix
        if config.style_loss == "wasserstein":
            if term not in self._distances:
                self._distances[term] = kernels.Wasserstein(statistic.matrix)
            target = torch.zeros_like(target, dtype=torch.float32)
        self._shares[term] = name, region.share
        self._views[turn][term] = view
        weight = self._weights[name] * region.share
        return kernels.Layer(view.features, view.cotangent, None, target, 0.0, weight, self._distances.get(term))

    def _elements(self, name: str) -> int:
        """Of all features of a layer."""
        return math.prod(self.network.spec.shapes[name])

    def _measure(self, layers: Collection[str]) -> None:
        """Take the features of these layers of the network into account."""
        terms = [term for term in self._layers.names if self._layer_of(term) in layers]
        for term, view in self._views_of(terms).items():
            view.read()
            if term in self._distances:
                self._aways[self.network.turn][term] = view.away()
        if terms:
            self._at_turn().measure(terms)

    def _conclude(self) -> None:
        """What is measured of all layers -> their losses."""
        for term, distance in self._distances.items():
            positions = [each[term].features.shape[1] for each in self._views]
            aways = (count / sum(positions) * each[term] for count, each in zip(positions, self._aways, strict=True))
            distance.away = torch.stack(list(aways)).sum(0)
        self._layers.conclude()

    def _cotangents(self, layers: Collection[str]) -> None:
        """Write the cotangents of these layers of the network."""
        terms = [term for term in self._layers.names if self._layer_of(term) in layers]
        views = self._views_of(terms)
        for view in views.values() if self._rooms else ():  # another part has had its turn
            view.read()
        for name in layers:
            if name not in self._layers.names:
                self.network.parts[self.network.turn].cotangents[name].zero_()
        self._at_turn().gradients(terms)
        for term, view in views.items():
            slope = None
            if term in self._distances:
                name, share = self._shares[term]
                factor = self._style_weight * self._weights[name] * share / self._elements(name)
                slope = factor * self._layers.scale * self._distances[term].slope
            view.write(slope)

    def _views_of(self, terms: Collection[str]) -> dict[str, View]:
        """The views of the part at its turn for these terms."""
        views = self._views[self.network.turn]
        return {term: views[term] for term in terms if term in views}

    def _at_turn(self) -> kernels.Layers | kernels.Summed:
        """The losses of the part at its turn."""
        if isinstance(self._layers, kernels.Summed):
            self._layers.piece = self.network.turn
        return self._layers

    def _layer_of(self, term: str) -> str:
        return self._shares.get(term, (term, 0.0))[0]


def _at_once(launches: Callable[[], None]) -> None:
    launches()


def _flat(tensor: Tensor) -> Tensor:
    """(1, C, H, W) -> (C, H W), a view in either memory format."""
    return tensor.flatten(2)[0]
