"""The objective: content, style and total variation loss of an image, and its gradient with respect to the pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from . import kernels
from .config import Config
from .features import Features
from .stages import Stages


@dataclass(frozen=True)
class Terms:
    """Losses of one image, 0-dim fp32 tensors on its device; `total` is weighted, the others are not."""

    total: Tensor
    content: Tensor
    style: dict[str, Tensor]
    tv: Tensor


class Objective:
    """L = content_weight * content + style_weight * mean over layers of style + tv_weight * tv.

    `content` holds the features P (1, C, H, W) of the content image at the content layers, `grams` the matrices
    A (C, C) fp32 of the style at the style layers. The formulas are those of `kernels`.
    """

    def __init__(
        self, network: Features, content: Mapping[str, Tensor], grams: Mapping[str, Tensor], config: Config
    ) -> None:
        self.network = network
        layers = {
            name: kernels.Layer(
                _flat(network.features[name]),
                _flat(network.cotangents[name]),
                _flat(content[name]) if name in content else None,
                grams.get(name),
            )
            for name in network.spec.layers
        }
        self._styles = tuple(grams)
        self._layers = kernels.Layers(layers, config.content_weight, config.style_weight / len(grams), network.products)
        self.stages = Stages(measures=not network.image.is_cuda)
        self._losses, self._gradients = (kernels.Recorded(network.image.device) for _ in range(2))
        self._pixels = kernels.Pixels(
            network.image, network.gradient, self._layers.scale, config.tv_weight, self._layers.terms
        )

    def write(self, pixels: Tensor, gradient: Tensor | None) -> Tensor:
        """Total loss of pixels (1, 3, H, W), 0-dim fp32, and its gradient into `gradient` if wanted.

        The loss lies in memory that the next call writes again; it is NaN if the gradient is not finite. On a GPU all
        of it is queued on the current stream of `network.use`, and the host waits for nothing.
        """
        network = self.network
        with network.use():
            network.image.copy_(pixels)
            with self.stages.stage("forward"):
                network.forward()
            with self.stages.stage("losses"):
                if gradient is None:
                    self._layers.losses()
                else:
                    self._losses(self._layers.losses)
            if gradient is not None:
                with self.stages.stage("vjp"):
                    network.vjp(self._write_cotangents)
            with self.stages.stage("losses"):
                self._pixels.finish(gradient)
        return self._layers.terms[0]

    def _write_cotangents(self, layers: tuple[str, ...]) -> None:
        with self.stages.stage("cotangents"):
            self._gradients(lambda: self._layers.gradients(layers))

    def evaluate(self, pixels: Tensor, with_gradient: bool = True) -> tuple[Terms, Tensor | None]:
        """Losses of pixels (1, 3, H, W) and, if asked for, the gradient of the total: tensors that the caller owns."""
        gradient = torch.empty_like(self.network.image) if with_gradient else None
        with self.network.use():
            self.write(pixels, gradient)
            total, content, tv, *style = self._layers.terms.clone().unbind()
        by_layer = dict(zip(self._layers.names, style, strict=True))
        return Terms(total, content, {name: by_layer[name] for name in self._styles}, tv), gradient


def _flat(tensor: Tensor) -> Tensor:
    """(1, C, H, W) -> (C, H W), a view in either memory format."""
    return tensor.flatten(2)[0]
