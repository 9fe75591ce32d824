"""The objective: content, style and total variation loss of an image, and its gradient with respect to the pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from . import kernels
from .config import Config
from .features import Features


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
        self._content = {layer: _flat(target) for layer, target in content.items()}
        self._grams = dict(grams)
        self._config = config
        self._gram = {layer: torch.empty_like(target) for layer, target in grams.items()}
        self._difference = {layer: torch.empty_like(target) for layer, target in grams.items()}

    def evaluate(self, pixels: Tensor, with_gradient: bool = True) -> tuple[Terms, Tensor | None]:
        """Losses of pixels (1, 3, H, W) and, if asked for, the gradient of the total: a tensor that the caller owns."""
        network, config = self.network, self._config
        with network.use():
            network.image.copy_(pixels)
            network.forward()
            features = {layer: _flat(network.features[layer]) for layer in network.spec.layers}
            cotangents = {layer: _flat(tensor) for layer, tensor in network.cotangents.items()}
            content = {
                layer: kernels.content_loss(features[layer], target, cotangents[layer])
                for layer, target in self._content.items()
            }
            style = {}
            for layer, target in self._grams.items():
                gram = kernels.gram(features[layer], self._gram[layer])
                style[layer] = kernels.style_loss(gram, target, self._difference[layer])
            gradient = torch.zeros_like(network.image)
            tv = kernels.total_variation(network.image, config.tv_weight, gradient)
            content_sum = torch.stack(list(content.values())).sum()
            style_mean = torch.stack(list(style.values())).mean()
            total = config.content_weight * content_sum + config.style_weight * style_mean + config.tv_weight * tv
            terms = Terms(total, content_sum, style, tv)
            if not with_gradient:
                return terms, None
            scale = self._scale(content, features)
            style_weight = config.style_weight / len(style)
            for layer in self._content:
                kernels.content_gradient(cotangents[layer], scale * config.content_weight)
            for layer, difference in self._difference.items():
                shared = layer in self._content
                kernels.style_gradient(features[layer], difference, scale * style_weight, cotangents[layer], shared)
            network.vjp()
            return terms, gradient.add_(network.gradient / scale)

    def _scale(self, content: Mapping[str, Tensor], features: Mapping[str, Tensor]) -> Tensor:
        """A power of two that brings the loudest cotangent to a root mean square near one; 1 in fp32.

        The mean squares are known before the cotangents are written: a content cotangent is 2 w / (C M) (F - P), and
        sum (D F)^2 = M tr(D G D) for the style cotangent w / (C^2 M) D F with D = G - A.
        """
        one = torch.ones((), device=self.network.image.device)
        if self.network.spec.precision == "fp32":
            return one
        squares = []
        for layer, loss in content.items():
            squares.append(4 * loss * (self._config.content_weight / features[layer].numel()) ** 2)
        weight = self._config.style_weight / max(1, len(self._grams))
        for layer, gram in self._gram.items():
            difference = self._difference[layer]
            channels, positions = features[layer].shape
            energy = ((difference @ gram) * difference).sum().clamp(min=0)
            squares.append(energy / channels * (weight / (channels**2 * positions)) ** 2)
        loudest = torch.stack(squares).max().sqrt().clamp(min=1e-30)
        return torch.exp2(-torch.floor(torch.log2(loudest)))


def _flat(tensor: Tensor) -> Tensor:
    """(1, C, H, W) -> (C, H W), a view."""
    return tensor.flatten(2)[0]
