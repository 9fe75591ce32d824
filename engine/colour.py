"""Colours of content and style, in Oklab: keep the content's, or bring the style's to the content's.

Oklab (Ottosson 2020) separates lightness L in [0, 1] from the chroma axes a and b so that equal steps look equal; it is
computed from linear light. What it is used for follows Gatys et al., *Controlling Perceptual Factors in Neural Style
Transfer* (arXiv 1611.07865). Statistics count a pixel by its alpha, times its mask where one is given: masks are
(H, W), of the picture's size, in [0, 1], and what a mask leaves out also stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .image import Picture, resize

Array = NDArray[Any]
Mask = NDArray[Any] | None

_EPS = 1e-5  # added to variances: a channel that is nearly constant is not stretched into noise
_LMS = np.array(  # linear sRGB -> cone responses
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_LAB = np.array(  # their cube roots -> L, a, b
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def prepare(
    colour: str, content: Picture, styles: Sequence[Picture], masks: Sequence[tuple[Mask, Mask]] = ()
) -> tuple[Picture, list[Picture]]:
    """Content and styles as the objective sees them with this `Config.colour`.

    With `masks`, a mask of the content and one of the style for each style, a style is matched to its own part of the
    content. Raises ValueError if colours are to be matched to or from a picture without a visible pixel.
    """
    way = {"keep-before": match_lightness, "match": match_moments, "histogram": match_histogram}.get(colour)
    pairs = zip(styles, masks or ((None, None),) * len(styles), strict=True)
    seen = [way(style, content, own, part) for style, (part, own) in pairs] if way else list(styles)
    return grey(content) if colour == "keep-before" else content, seen


def finish(colour: str, result: Picture, content: Picture, wrap: bool = False) -> Picture:
    """What is shown of `result`, the optimised picture, with this `Config.colour`; `wrap` if it tiles."""
    return keep(result, content, wrap) if colour.startswith("keep") else result


def keep(result: Picture, content: Picture, wrap: bool = False) -> Picture:
    """The lightness of `result` with the chroma of `content`, which is resized to it, around its borders if `wrap`."""
    lab = to_oklab(result.rgb)
    lab[..., 1:] = to_oklab(resize(content, result.size, wrap).rgb)[..., 1:]
    return _painted(result, lab)


def grey(picture: Picture) -> Picture:
    """The picture without its chroma."""
    return _painted(picture, to_oklab(picture.rgb) * np.array([1, 0, 0], np.float32))


def match_lightness(style: Picture, content: Picture, style_mask: Mask = None, content_mask: Mask = None) -> Picture:
    """The style in grey, its lightness brought to the content's mean and standard deviation."""
    lab = to_oklab(style.rgb)
    mean, covariance = _moments(lab, _weights(style, style_mask))
    wanted, wanted_covariance = _moments(to_oklab(content.rgb), _weights(content, content_mask))
    gain = np.sqrt((wanted_covariance[0, 0] + _EPS) / (covariance[0, 0] + _EPS))
    lab[..., 0] = wanted[0] + gain * (lab[..., 0] - mean[0])
    lab[..., 1:] = 0
    return _painted(style, lab, style_mask)


def match_moments(style: Picture, content: Picture, style_mask: Mask = None, content_mask: Mask = None) -> Picture:
    """The style with the mean and the covariance of the content's colours.

    Of the linear maps that do so, it is the symmetric one, A = S^-1/2 (S^1/2 C S^1/2)^1/2 S^-1/2 for covariances S and
    C: it moves the colours least.
    """
    lab = to_oklab(style.rgb)
    mean, covariance = _moments(lab, _weights(style, style_mask))
    wanted, wanted_covariance = _moments(to_oklab(content.rgb), _weights(content, content_mask))
    root = _power(covariance + _EPS * np.eye(3), 0.5)
    inverse = _power(covariance + _EPS * np.eye(3), -0.5)
    linear = inverse @ _power(root @ (wanted_covariance + _EPS * np.eye(3)) @ root, 0.5) @ inverse
    return _painted(style, (lab - mean) @ linear + wanted, style_mask)


def match_histogram(style: Picture, content: Picture, style_mask: Mask = None, content_mask: Mask = None) -> Picture:
    """The style with the content's distribution of L, of a and of b: equal quantiles take equal values."""
    lab, wanted = to_oklab(style.rgb), to_oklab(content.rgb)
    weights, wanted_weights = _weights(style, style_mask), _weights(content, content_mask)
    for channel in range(3):
        quantiles, _, where = _quantiles(lab[..., channel], weights)
        of, values, _ = _quantiles(wanted[..., channel][wanted_weights > 0], wanted_weights[wanted_weights > 0])
        lab[..., channel] = np.interp(quantiles, of, values)[where].reshape(weights.shape)
    return _painted(style, lab, style_mask)


def to_oklab(rgb: Array) -> Array:
    """L, a, b (..., 3) of sRGB (..., 3) in [0, 1], in its dtype."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _LMS.T.astype(rgb.dtype)) @ _LAB.T.astype(rgb.dtype)


def from_oklab(lab: Array) -> Array:
    """SRGB (..., 3) of L, a, b (..., 3), in its dtype; colours that sRGB does not have lie outside [0, 1]."""
    linear = (lab @ np.linalg.inv(_LAB).T.astype(lab.dtype)) ** 3 @ np.linalg.inv(_LMS).T.astype(lab.dtype)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 0.0031308) ** (1 / 2.4) - 0.055)


def _painted(picture: Picture, lab: Array, mask: Mask = None) -> Picture:
    """The picture in these colours where the mask is 1.

    A colour outside sRGB loses chroma until it is inside (to 1/256 of it), so that lightness and hue stay.
    """
    lab[..., 0] = lab[..., 0].clip(0, 1)
    rgb = from_oklab(lab)
    outside = ((rgb < -1e-4) | (rgb > 1 + 1e-4)).any(-1)
    low, high = np.zeros((outside.sum(), 1)), np.ones((outside.sum(), 1))
    for _ in range(8):
        middle = (low + high) / 2
        tried = from_oklab(lab[outside] * np.concatenate([np.ones_like(middle), middle, middle], 1))
        inside = ((tried >= 0) & (tried <= 1)).all(-1, keepdims=True)
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    rgb[outside] = from_oklab(lab[outside] * np.concatenate([np.ones_like(low), low, low], 1))
    rgb = rgb.clip(0, 1).astype(np.float32)
    if mask is not None:
        part = mask[..., None].astype(np.float32)
        rgb = part * rgb + (1 - part) * picture.rgb
    return Picture(rgb, picture.alpha)


def _weights(picture: Picture, mask: Mask) -> Array:
    """How much each pixel (H, W) counts."""
    weights = np.ones(picture.rgb.shape[:2]) if picture.alpha is None else picture.alpha.astype(np.float64)
    if mask is not None:
        if mask.shape != weights.shape:
            raise ValueError(f"a mask of {mask.shape} does not fit a picture of {weights.shape}")
        weights = weights * mask
    if not weights.any():
        raise ValueError("colours cannot be matched: a picture or its mask has no visible pixel")
    return weights


def _moments(lab: Array, weights: Array) -> tuple[Array, Array]:
    """Mean (3,) and covariance (3, 3) of the colours, float64."""
    part = (weights / weights.sum()).reshape(-1, 1)
    flat = lab.reshape(-1, 3).astype(np.float64)
    mean = (part * flat).sum(0)
    return mean, (part * (flat - mean)).T @ (flat - mean)


def _power(matrix: Array, exponent: float) -> Array:
    """A power of a symmetric positive matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.maximum(values, 1e-12) ** exponent @ vectors.T


def _quantiles(channel: Array, weights: Array) -> tuple[Array, Array, Array]:
    """The quantile of each value that occurs (the middle of its step), these values, and where they stand."""
    values, where = np.unique(channel, return_inverse=True)
    counts = np.bincount(where.ravel(), weights.ravel())
    return (np.cumsum(counts) - counts / 2) / weights.sum(), values, where
