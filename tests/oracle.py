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


def features(
    image: Tensor, state: dict[str, Tensor], pooling: str, layers: set[str], padding: str = "zero"
) -> dict[str, Tensor]:
    """Outputs (C, M) float64 of ReLUs and convolutions of an image (H, W, 3) in [0, 1]."""
    x = image.permute(2, 0, 1)[None]
    caffe = "conv1_1.weight" in state
    if caffe:
        x = 255 * x.flip(1) - torch.tensor([103.939, 116.779, 123.68], dtype=torch.float64).reshape(1, 3, 1, 1)
    else:
        mean, std = (torch.tensor(v, dtype=torch.float64).reshape(1, 3, 1, 1) for v in IMAGENET)
        x = (x - mean) / std
    found, index, channels_in = {}, 0, 3
    for block, (_, count) in enumerate(WIDTHS, 1):
        for i in range(1, count + 1):
            name = f"conv{block}_{i}" if caffe else f"features.{index}"
            edge = padding if padding == "circular" or channels_in == 3 else "zero"
            x = functional.pad(x, (1, 1, 1, 1), "constant" if edge == "zero" else edge)
            x = functional.conv2d(x, state[f"{name}.weight"].double(), state[f"{name}.bias"].double())
            channels_in = x.shape[1]
            rectified = functional.relu(x)
            for kind, value in (("conv", x), ("relu", rectified)):
                if f"{kind}{block}_{i}" in layers:
                    found[f"{kind}{block}_{i}"] = value[0].flatten(1)
            x = rectified
            if set(found) == layers:
                return found
            index += 2
        index += 1
        x = functional.avg_pool2d(x, 2) if pooling == "avg" else functional.max_pool2d(x, 2)
    raise AssertionError(layers)


EPSILON = 1e-4  # on the diagonal of covariances


def guide(mask: np.ndarray, positions: int) -> Tensor:
    """g (M,) with mean(g^2) = 1 from a mask of which each position covers a block."""
    side = int(np.sqrt(mask.size // positions))
    height, width = mask.shape[0] // side, mask.shape[1] // side
    blocks = torch.from_numpy(mask.astype(np.float64)).reshape(height, side, width, side).mean((1, 3)).flatten()
    return blocks / (blocks**2).mean().sqrt()


def moments(f: Tensor, mask: np.ndarray | None, shift: float) -> tuple[Tensor, Tensor]:
    """Second moment of F - shift and mean of F, weighted by g^2."""
    g = torch.ones(f.shape[1], dtype=torch.float64) if mask is None else guide(mask, f.shape[1])
    x = (f - shift) * g
    return x @ x.T / f.shape[1], (f * g**2).mean(1)


def style_loss(own: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], kind: str) -> Tensor:
    (moment, mean), (wanted, goal) = own, target
    channels = len(mean)
    if kind != "wasserstein":
        return ((moment - wanted) ** 2).sum() / (4 * channels**2)
    ridge = EPSILON * torch.eye(channels, dtype=torch.float64)
    s, t = moment - torch.outer(mean, mean) + ridge, wanted - torch.outer(goal, goal) + ridge
    values, vectors = torch.linalg.eigh(t)
    root = vectors @ values.clamp_min(0).sqrt().diag() @ vectors.T
    crossed = torch.linalg.eigvalsh(root @ s @ root).clamp_min(1e-12).sqrt().sum()
    return ((mean - goal) ** 2).mean() + (s.trace() + t.trace() - 2 * crossed) / channels


def objective(
    image: np.ndarray,
    content: np.ndarray | None,
    style: np.ndarray | list[np.ndarray] | None,
    state: dict[str, Tensor],
    config,
    masks: list | None = None,
) -> tuple[float, dict, np.ndarray]:
    """Total loss, unweighted terms and gradient (H, W, 3) for pictures (H, W, 3) in [0, 1].

    Content or style may be missing; `masks` has a pair of masks, of content and style, for each style.
    """
    content_layers = config.for_weights("imagenet").content_layers if content is not None else ()
    style_layers = config.style_layers if style is not None else ()
    layers = {layer for layer, _ in (*content_layers, *style_layers)}

    def see(picture: Tensor, padding: str = "circular" if config.tile else config.padding) -> dict[str, Tensor]:
        return features(picture, state, config.pooling, layers, padding)

    styles = style if isinstance(style, list) else [style] * (style is not None)
    blend = config.style_blend or (1.0,) * len(styles)
    shares = [weight / sum(blend) for weight in blend]
    x = torch.from_numpy(image.astype(np.float64)).requires_grad_()
    with torch.no_grad():
        p = {} if content is None else see(torch.from_numpy(content.astype(np.float64)))
        a = [see(torch.from_numpy(each.astype(np.float64)), config.padding) for each in styles]
    f = see(x)
    content_loss = sum((w * ((f[layer] - p[layer]) ** 2).mean() for layer, w in content_layers), torch.zeros(()))
    shift = float(config.style_loss == "shifted")
    by_layer = {}
    for layer, _ in style_layers:
        if masks is None:
            targets = [moments(each[layer], None, shift) for each in a]
            both = [sum(share * each[i] for share, each in zip(shares, targets, strict=True)) for i in range(2)]
            by_layer[layer] = style_loss(moments(f[layer], None, shift), both, config.style_loss)
            continue
        by_layer[layer] = 0
        for share, each, (own, theirs) in zip(shares, a, masks, strict=True):
            pair = moments(f[layer], own, shift), moments(each[layer], theirs, shift)
            by_layer[layer] = by_layer[layer] + share * style_loss(*pair, config.style_loss)
    down, across = x.roll(-1, 0) - x, x.roll(-1, 1) - x
    if not config.tile:
        down, across = down[:-1], across[:, :-1]
    tv = (down.abs() ** config.tv_power).mean() + (across.abs() ** config.tv_power).mean()
    weights = sum(weight for _, weight in style_layers)
    style_mean = sum(weight / weights * by_layer[layer] for layer, weight in style_layers)
    total = config.content_weight * content_loss + config.style_weight * style_mean + config.tv_weight * tv
    (gradient,) = torch.autograd.grad(total, x)
    terms = {"content": content_loss.item(), "tv": tv.item(), **{k: v.item() for k, v in by_layer.items()}}
    return total.item(), terms, gradient.numpy()
