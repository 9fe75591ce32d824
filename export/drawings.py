"""Pictures to learn features from: drawn by this program, with crops of a few photographs that anyone may use.

Features of the early layers can be learned from very few images (Asano, Rupprecht, Vedaldi 2020) and from procedural
ones (Baradad et al. 2021). Here: dead leaves (Lee, Mumford, Huang 2001) with flat, shaded and textured leaves, brush
strokes along a smooth field, gratings and weaves, mosaics, clouds of coloured 1/f noise.

The photographs come with scikit-image (`skimage.data`), which is needed for learning only: `coffee` (Rachel Michetti,
CC0), `rocket` (SpaceX, public domain), `brick` and `grass` (CC0Textures, CC0). None of them has a face: results are
judged on others.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

PHOTOGRAPHS = ("coffee", "rocket", "brick", "grass")
_Array = NDArray[np.float64]


def pictures(
    count: int, side: int, seed: int, photographs: Sequence[str] = PHOTOGRAPHS
) -> Iterator[NDArray[np.float32]]:
    """`count` different pictures (3, side, side), RGB in [0, 1], the kinds in turn.

    `photographs` are names of functions of `skimage.data`.
    """
    rng = np.random.default_rng(seed)
    kinds = (_leaves, None, _strokes, _leaves, None, _mosaic, _strokes, None, _leaves, _grating, None, _clouds)
    for index in range(count):
        draw = kinds[index % len(kinds)]
        image = _photograph(rng, photographs) if draw is None else _crop(draw(rng, 2 * side), rng, 0.6)
        pixels = np.asarray(image.resize((side, side), Image.Resampling.LANCZOS), np.float32) / 255
        if rng.uniform() < 0.3:
            pixels = pixels[..., rng.permutation(3)]
        yield np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _photograph(rng: Generator, names: Sequence[str]) -> Image.Image:
    from skimage import data

    image = Image.fromarray(getattr(data, names[int(rng.integers(len(names)))])()).convert("RGB")
    crop = _crop(image, rng, 0.55)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.uniform() < 0.5 else crop


def _crop(image: Image.Image, rng: Generator, smallest: float) -> Image.Image:
    """A random square, its side at least `smallest` of the image's short side: pictures at several scales."""
    side = int(min(image.size) * rng.uniform(smallest, 1))
    x, y = (int(rng.integers(0, length - side + 1)) for length in image.size)
    return image.crop((x, y, x + side, y + side))


def _palette(rng: Generator) -> _Array:
    """Four to eight RGB colours (n, 3), 0-255: of one hue, of related hues, or of all."""
    hue, spread = rng.uniform(), rng.choice([0.06, 0.15, 0.5])
    colours = [
        colorsys.hsv_to_rgb((hue + rng.normal(0, spread)) % 1, rng.beta(1.5, 1.5), rng.beta(1.3, 1.1))
        for _ in range(rng.integers(4, 9))
    ]
    return np.array(colours) * 255


def _colour(colour: _Array, rng: Generator, jitter: float) -> tuple[int, int, int]:
    """A colour near `colour`: its channels vary, and its lightness."""
    red, green, blue = np.clip(colour + rng.normal(0, jitter, 3) + rng.normal(0, jitter), 0, 255)
    return int(red), int(green), int(blue)


def _field(rng: Generator, size: int, power: float) -> _Array:
    """Noise (size, size) of spectrum 1 / f^power, zero mean, unit deviation."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = np.inf
    noise = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(size, size))) / frequency**power, s=(size, size))
    return noise / noise.std()


def _image(pixels: _Array) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _clouds(rng: Generator, size: int) -> Image.Image:
    palette, power = _palette(rng), rng.uniform(0.7, 2.2)
    share = np.exp(rng.uniform(1, 3) * np.stack([_field(rng, size, power) for _ in range(3)]))
    return _image(np.einsum("kyx,kc->yxc", share / share.sum(0), palette[:3]))


def _grating(rng: Generator, size: int) -> Image.Image:
    """Stripes, hatching, weaves or chequers of one period, slightly bent, from soft to hard."""
    palette = _palette(rng)
    y, x = np.mgrid[:size, :size].astype(np.float64)
    period = math.exp(rng.uniform(math.log(5), math.log(60)))
    bend = _field(rng, size, 2.5) * rng.uniform(0, 1.5)

    def wave(angle: float) -> _Array:
        return np.sin(2 * math.pi * (x * math.cos(angle) + y * math.sin(angle)) / period + bend)

    angle = rng.uniform(0, math.pi)
    value = wave(angle)
    if rng.uniform() < 0.5:
        other = wave(angle + rng.uniform(0.5, math.pi - 0.5))
        value = np.maximum(value, other) if rng.uniform() < 0.5 else value * other
    value = np.clip(value * math.exp(rng.uniform(-0.3, 2)) + rng.uniform(-1, 1), -1, 1)[..., None] / 2 + 0.5
    grain = 10 * rng.uniform() * _field(rng, size, 1)[..., None]
    return _image(palette[0] * value + palette[1] * (1 - value) + grain)


def _strokes(rng: Generator, size: int) -> Image.Image:
    """Three coats of strokes along a smooth field, each finer than the one before."""
    palette, image = _palette(rng), _clouds(rng, size)
    canvas = ImageDraw.Draw(image)
    angle = _field(rng, size, rng.uniform(1.6, 3)) * rng.uniform(0.2, 1.5) + rng.uniform(0, math.pi)
    region = (_field(rng, size, rng.uniform(1.2, 2.2)) / 2 + 1) * len(palette) / 2
    width, jitter = math.exp(rng.uniform(math.log(4), math.log(28))), rng.uniform(4, 25)
    for _ in range(3):
        length = width * rng.uniform(2, 7)
        for _ in range(int(1.2 * size * size / (width * length))):
            x, y = rng.uniform(0, size, 2)
            colour = _colour(palette[int(region[int(y), int(x)]) % len(palette)], rng, jitter)
            points = []
            for _ in range(6):
                points.append((x, y))
                turn = angle[int(y) % size, int(x) % size]
                x, y = x + math.cos(turn) * length / 6, y + math.sin(turn) * length / 6
            canvas.line(points, fill=colour, width=max(1, round(width * rng.uniform(0.6, 1.2))), joint="curve")
        width = max(2, width * 0.6)
    return image


def _mosaic(rng: Generator, size: int) -> Image.Image:
    """Voronoi cells of two or three sizes, most with joints."""
    palette = _palette(rng)
    count = int(math.exp(rng.uniform(math.log(40), math.log(900))))
    columns = max(2, round(math.sqrt(count)))
    cell, steps = size / columns, range(-2, 3)
    points = rng.uniform(0, 1, (columns + 4, columns + 4, 2))  # one in each cell of a grid
    colours = palette[rng.integers(len(palette), size=points.shape[:2])] + rng.normal(0, 14, (*points.shape[:2], 3))
    y, x = np.mgrid[:size, :size] / cell
    row, column = y.astype(int), x.astype(int)
    near = np.full((size, size), np.inf)
    second, pixels = near.copy(), np.zeros((size, size, 3))
    for i, j in ((i, j) for i in steps for j in steps):
        point = points[row + i + 2, column + j + 2]
        distance = np.hypot(row + i + point[..., 0] - y, column + j + point[..., 1] - x) * cell
        closer = distance < near
        second = np.where(closer, near, np.minimum(second, distance))
        near = np.where(closer, distance, near)
        pixels = np.where(closer[..., None], colours[row + i + 2, column + j + 2], pixels)
    if rng.uniform() < 0.7:
        pixels = np.where((second - near < rng.uniform(2, 6))[..., None], palette[0] * 0.3, pixels)
    return _image(pixels)


def _leaves(rng: Generator, size: int) -> Image.Image:
    """Dead leaves: shapes whose radii have density r^-3 fall on each other until the ground is covered."""
    palette, image = _palette(rng), _clouds(rng, size)
    textures: tuple[Callable[[Generator, int], Image.Image], ...] = (_clouds, _grating, _strokes, _grating)
    fills = [draw(rng, size) for draw in textures]
    least, most, covered = rng.uniform(4, 10), size / rng.uniform(2.5, 6), 0.0
    textured, roundness = rng.uniform(0, 0.7), rng.choice([0, 0.5, 1])
    while covered < 3.5 * size * size:
        share = rng.uniform()
        radius = (
            (share * most**-2 + (1 - share) * least**-2) ** -0.5 if rng.uniform() < 0.7 else rng.uniform(least, most)
        )
        covered += math.pi * radius * radius
        corners = 24 if rng.uniform() < roundness else int(rng.integers(3, 7))
        turn, around = rng.uniform(0, 2 * math.pi), np.linspace(0, 2 * math.pi, corners, endpoint=False)
        outline = radius * (np.cos(around) + 1j * rng.uniform(0.3, 1) * np.sin(around)) * np.exp(1j * turn)
        outline += complex(*rng.uniform(-radius / 2, size + radius / 2, 2))
        points = [(point.real, point.imag) for point in outline]
        colours = [_colour(palette[rng.integers(len(palette))], rng, 14) for _ in range(2)]
        choice = rng.uniform()
        if radius > 12 and choice < textured:
            _paste(image, fills[rng.integers(len(fills))], points, (0, 0))
        elif radius > 12 and choice < (1 + textured) / 2:
            side = int(2 * radius) + 2
            slope = np.linspace(0, 1, side)
            value = slope[:, None] * rng.uniform(-1, 1) + slope * rng.uniform(-1, 1)
            value = ((value - value.min()) / (np.ptp(value) + 1e-6))[..., None]
            first, last = (np.array(colour) for colour in colours)
            corner = min(int(x) for x, _ in points), min(int(y) for _, y in points)
            _paste(image, _image(first * value + (0.6 * first + 0.4 * last) * (1 - value)), points, corner)
        else:
            ImageDraw.Draw(image).polygon(points, fill=colours[0])
    return image


def _paste(image: Image.Image, fill: Image.Image, points: list[tuple[float, float]], corner: tuple[int, int]) -> None:
    """Fill the polygon with a picture whose upper left corner lies at `corner`."""
    mask = Image.new("L", fill.size)
    ImageDraw.Draw(mask).polygon([(x - corner[0], y - corner[1]) for x, y in points], fill=255)
    image.paste(fill, corner, mask)
