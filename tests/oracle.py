"""The objective written again, independently of the engine: float64 torch, functional calls, autograd."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

WIDTHS = [(64, 2), (128, 2), (256, 4), (512, 4), (512, 4)]
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def random_state(seed: int = 0, caffe: bool = False) -> dict[str, Tensor]:
    """A random VGG-19 state dict, in torchvision's names or in caffe's (whose input is BGR in 0-255)."""
    generator = torch.Generator().manual_seed(seed)
    state, channels, index = {}, 3, 0
    for block, (width, count) in enumerate(WIDTHS, 1):
        for i in range(1, count + 1):
            name = f"conv{block}_{i}" if caffe else f"features.{index}"
            scale = (2 / (9 * channels)) ** 0.5 / (80 if caffe and channels == 3 else 1)
            state[f"{name}.weight"] = scale * torch.randn(width, channels, 3, 3, generator=generator)
            state[f"{name}.bias"] = 0.1 * torch.randn(width, generator=generator)
            channels, index = width, index + 2
        index += 1
    return state


def features(image: Tensor, state: dict[str, Tensor], pooling: str, layers: set[str]) -> dict[str, Tensor]:
    """ReLU outputs (C, M) float64 of an image (H, W, 3) in [0, 1]."""
    x = image.permute(2, 0, 1)[None]
    caffe = "conv1_1.weight" in state
    if caffe:
        x = 255 * x.flip(1) - torch.tensor([103.939, 116.779, 123.68], dtype=torch.float64).reshape(1, 3, 1, 1)
    else:
        mean, std = (torch.tensor(v, dtype=torch.float64).reshape(1, 3, 1, 1) for v in IMAGENET)
        x = (x - mean) / std
    found, index = {}, 0
    for block, (_, count) in enumerate(WIDTHS, 1):
        for i in range(1, count + 1):
            name = f"conv{block}_{i}" if caffe else f"features.{index}"
            x = functional.conv2d(x, state[f"{name}.weight"].double(), state[f"{name}.bias"].double(), padding=1)
            x = functional.relu(x)
            if f"relu{block}_{i}" in layers:
                found[f"relu{block}_{i}"] = x[0].flatten(1)
            if set(found) == layers:
                return found
            index += 2
        index += 1
        x = functional.avg_pool2d(x, 2) if pooling == "avg" else functional.max_pool2d(x, 2)
    raise AssertionError(layers)


def objective(
    image: np.ndarray, content: np.ndarray, style: np.ndarray, state: dict[str, Tensor], config
) -> tuple[float, dict, np.ndarray]:
    """Total loss, unweighted terms and gradient (H, W, 3) for pictures (H, W, 3) in [0, 1]."""
    layers = set(config.content_layer_weights) | set(config.style_layer_weights)

    def see(picture: Tensor) -> dict[str, Tensor]:
        return features(picture, state, config.pooling, layers)

    x = torch.from_numpy(image.astype(np.float64)).requires_grad_()
    with torch.no_grad():
        p = see(torch.from_numpy(content.astype(np.float64)))
        a = see(torch.from_numpy(style.astype(np.float64)))
    f = see(x)
    content_loss = sum(w * ((f[layer] - p[layer]) ** 2).mean() for layer, w in config.content_layers)
    style_loss = {}
    for layer, _ in config.style_layers:
        gram = f[layer] @ f[layer].T / f[layer].shape[1]
        target = a[layer] @ a[layer].T / a[layer].shape[1]
        style_loss[layer] = ((gram - target) ** 2).sum() / (4 * len(gram) ** 2)
    tv = ((x[1:] - x[:-1]) ** 2).mean() + ((x[:, 1:] - x[:, :-1]) ** 2).mean()
    weights = sum(weight for _, weight in config.style_layers)
    style_mean = sum(weight / weights * style_loss[layer] for layer, weight in config.style_layers)
    total = config.content_weight * content_loss + config.style_weight * style_mean + config.tv_weight * tv
    (gradient,) = torch.autograd.grad(total, x)
    terms = {"content": content_loss.item(), "tv": tv.item(), **{k: v.item() for k, v in style_loss.items()}}
    return total.item(), terms, gradient.numpy()
