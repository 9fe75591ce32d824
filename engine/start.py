"""The pixels that the first scale of a run starts from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import image as images
from .config import Config


def first_pixels(
    content: images.Picture, styles: Sequence[object], start: images.Picture | None, config: Config
) -> Tensor:
    """Pixels (1, 3, H, W) of the content's size: the content, noise, colours drawn from the styles or `start`.

    `config.init_noise` is the share of uniform noise that is blended in.
    """
    generator = torch.Generator().manual_seed(config.seed)
    width, height = content.size
    noise = torch.rand(1, 3, height, width, generator=generator)
    if config.init == "noise":
        return noise
    if config.init == "style":
        pictures = [each for each in styles if isinstance(each, images.Picture)]
        pixels = _drawn(pictures, config.style_shares(len(pictures)), height, width, generator)
    else:
        pixels = images.to_tensor(images.resize(start or content, content.size, config.tile))
    return torch.lerp(pixels, noise, config.init_noise)


def _drawn(
    styles: Sequence[images.Picture], shares: Sequence[float], height: int, width: int, generator: torch.Generator
) -> Tensor:
    """Independent normal colours with the mean and the covariance of the styles by their shares; clamped."""
    mean, second = torch.zeros(3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    for style, share in zip(styles, shares, strict=True):
        colours = torch.from_numpy(style.rgb).double().flatten(0, 1)
        mean += share * colours.mean(0)
        second += share * (colours.T @ colours) / len(colours)
    # Not Cholesky: the covariance of a grey or a flat style is singular.
    variances, axes = torch.linalg.eigh(second - torch.outer(mean, mean))
    normal = torch.randn(height * width, 3, dtype=torch.float64, generator=generator)
    colours = mean + normal * variances.clamp(min=0).sqrt() @ axes.T
    return colours.T.clamp(0, 1).float().contiguous().view(1, 3, height, width)
