"""The pixels that the scales of a run start from."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from . import image as images
from .config import Config
from .export.vgg import WHOLE
from .optimize import resized

log = logging.getLogger(__name__)

_ROWS = 64  # of a style, whose colours are in fp64 at once
INVERSION_NOISE = 0.05  # its share in the start of an inversion


def first_pixels(
    content: images.Picture, styles: Sequence[object], start: images.Picture | None, config: Config
) -> Tensor:
    """Pixels (1, 3, H, W) of the content's size: the content, noise, colours drawn from the styles or `start`.

    `config.init_noise` is the share of uniform noise that is blended in. Without a style the content is what is to be
    found, and a start from it or from noise is a trace of noise on grey: full noise holds patterns that deep features
    take for flat colours, and an inversion keeps them.
    """
    generator = torch.Generator().manual_seed(config.seed)
    width, height = content.size
    noise = torch.rand(1, 3, height, width, generator=generator)
    if config.init == "noise" or not (styles or start):
        return noise if styles else torch.lerp(torch.full_like(noise, 0.5), noise, INVERSION_NOISE)
    if config.init == "style":
        pictures = [each for each in styles if isinstance(each, images.Picture)]
        pixels = _drawn(pictures, config.style_shares(len(pictures)), height, width, generator)
    else:
        if start is not None:
            _report(start, content.size, WHOLE if config.tile else 1)
        pixels = images.to_tensor(images.resize(start or content, content.size, config.tile))
    return torch.lerp(pixels, noise, config.init_noise)


def enlarged(
    pixels: Tensor, content: tuple[images.Picture, images.Picture] | None, size: tuple[int, int], wrap: bool
) -> Tensor:
    """The pixels of a scale at the (width, height) of the next one, with the details that only it has room for.

    They are those of the content, which is given at both sizes: the finer one without what of it had a place at the
    coarser one, as in a Laplacian pyramid (Burt, Adelson 1983). None leaves them out.
    """

    def finer(coarse: Tensor) -> Tensor:
        return resized(coarse, size[::-1], "bicubic", wrap)

    if content is None:
        return finer(pixels)
    old, new = map(images.to_tensor, content)
    return finer(pixels) + (new - finer(old)).to(pixels.device)


def _report(start: images.Picture, size: tuple[int, int], slack: float) -> None:
    """Warn of a start that is not taken as it is; `slack` is what rounding may do to a side of either."""
    slack *= max(1, max(size) / max(start.size))
    name = start.name or "the start"
    if any(abs(own - wanted) > slack for own, wanted in zip(start.fit(max(size)), size, strict=True)):
        log.warning("%s of %d x %d pixels is stretched to the shape of %d x %d", name, *start.size, *size)
    if start.alpha is not None:
        log.warning("%s: transparency left out of account", name)


def _drawn(
    styles: Sequence[images.Picture], shares: Sequence[float], height: int, width: int, generator: torch.Generator
) -> Tensor:
    """Independent normal colours with the mean and the covariance of what the styles show, by their shares; clamped."""
    mean, second = torch.zeros(3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    for style, share in zip(styles, shares, strict=True):
        shown = torch.ones(()).expand(style.rgb.shape[:2]) if style.alpha is None else torch.from_numpy(style.alpha)
        total = shown.sum(dtype=torch.float64)
        for rows, counts in zip(torch.from_numpy(style.rgb).split(_ROWS), shown.split(_ROWS), strict=True):
            colours, weights = rows.double().flatten(0, 1), share * counts.double().flatten()[:, None] / total
            mean += (weights * colours).sum(0)
            second += colours.T @ (weights * colours)
    # Not Cholesky: the covariance of a grey or a flat style is singular.
    variances, axes = torch.linalg.eigh(second - torch.outer(mean, mean))
    normal = torch.randn(height * width, 3, dtype=torch.float64, generator=generator)
    colours = mean + normal * variances.clamp(min=0).sqrt() @ axes.T
    return colours.T.clamp(0, 1).float().contiguous().view(1, 3, height, width)
