"""Style pictures of five kinds, drawn by program from a seed: what `quality` paints with.

They share no code with `engine.export.drawings`, from which the features are learned, so that a picture judged is not
one that was learned from. Each function takes nothing and returns an RGB picture of 512 x 512 pixels.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

SIDE = 512
_FINE = 2 * SIDE  # drawn at twice the size and reduced, for smooth edges
_Array = NDArray[np.float64]


def oil() -> Image.Image:
    """Brush strokes that follow a swirling field: the bundled style."""
    from engine.samples.draw_style import draw

    picture = draw(seed=5)
    return picture.crop((0, 0, 640, 640)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def engraving() -> Image.Image:
    """Dark lines on cream paper that swell with the shadow of rolling hills; a second set crosses them in the dark."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:_FINE, :_FINE] / _FINE
    height = _smooth(rng, 60)
    tone = np.clip(0.5 + 0.35 * (np.roll(height, 9, 0) - height) * 12 + 0.25 * (x - 0.5), 0.03, 0.97)
    ink = np.zeros((_FINE, _FINE), bool)
    for angle, start in ((0.45, 0.0), (1.75, 0.45)):
        lines = (x * math.cos(angle) + y * math.sin(angle) + 0.035 * height) * 62
        ink |= np.abs(lines % 1 - 0.5) < 0.48 * np.clip((tone - start) / (1 - start), 0, 0.85)
    return _reduced(np.where(ink[..., None], (38, 30, 28), (236, 226, 202)))


def mosaic() -> Image.Image:
    """Square tesserae laid in bent rows, in fields of one colour each, on pale joints."""
    rng = np.random.default_rng(2)
    palette = np.array([(24, 62, 110), (196, 148, 60), (150, 44, 36), (226, 214, 186), (52, 108, 92), (84, 130, 168)])
    y, x = np.mgrid[:_FINE, :_FINE] / _FINE
    bend = _smooth(rng, 160)
    row, column = y * 34 + 1.6 * bend, x * 34 + 1.2 * np.roll(bend, 300, 1)
    column = column + (np.floor(row) % 2) / 2
    field = _smooth(rng, 70)
    kind = (np.floor(field * 2.5) % len(palette)).astype(int)
    cell = (np.floor(row).astype(int) + 50) * 200 + np.floor(column).astype(int) + 50
    _, first, tile = np.unique(cell, return_index=True, return_inverse=True)
    colours = (palette[kind.ravel()[first]] + rng.normal(0, 16, (len(first), 3)))[tile.reshape(cell.shape)]
    joint = (row % 1 < 0.13) | (column % 1 < 0.13)
    return _reduced(np.where(joint[..., None], (198, 190, 176), colours))


def watercolour() -> Image.Image:
    """Translucent washes with dark rims and soft bleeding on grained paper."""
    rng = np.random.default_rng(3)
    paper = np.array([0.97, 0.95, 0.91]) + 0.012 * _smooth(rng, 1.5)[..., None]
    pigments = [(0.25, 0.5, 0.75), (0.85, 0.45, 0.35), (0.95, 0.75, 0.35), (0.4, 0.65, 0.45), (0.55, 0.4, 0.65)]
    y, x = np.mgrid[:_FINE, :_FINE] / _FINE
    for number in range(22):
        cx, cy = rng.uniform(0, 1, 2)
        edge = rng.uniform(0.08, 0.26) + 0.035 * _smooth(rng, 40) + 0.008 * _smooth(rng, 6) - np.hypot(x - cx, y - cy)
        inside = 0.5 + 0.5 * np.tanh(edge / rng.choice([0.003, 0.003, 0.04]))
        rim = np.exp(-((edge / 0.006) ** 2)) * inside
        strength = inside * (0.38 + 0.12 * _smooth(rng, 90)) + 0.5 * rim
        pigment = 1 - np.array(pigments[number % len(pigments)])
        paper = paper * np.exp(-np.clip(strength, 0, 1)[..., None] * pigment * 1.3)
    return _reduced(paper * 255)


def geometric() -> Image.Image:
    """Flat discs, triangles and bars in primary colours with black lines."""
    rng = np.random.default_rng(4)
    colours = [(206, 42, 36), (24, 74, 150), (242, 196, 40), (28, 28, 30), (244, 238, 224), (60, 140, 120)]
    image = Image.new("RGB", (_FINE, _FINE), colours[4])
    canvas = ImageDraw.Draw(image)
    for _ in range(90):
        x, y = rng.uniform(0, _FINE, 2)
        size = float(rng.uniform(30, 170))
        turn, fill = rng.uniform(0, math.pi), colours[rng.integers(len(colours))]
        kind = rng.integers(4)
        if kind == 0:
            box = (x - size, y - size, x + size, y + size)
            canvas.ellipse(box, fill=fill, outline=colours[3], width=int(rng.choice([0, 7])))
        else:
            corners = {1: (0.0, 2.1, 4.2), 2: (0.3, 2.84, 3.44, 5.98), 3: (0.05, 3.09, 3.19, 6.23)}[int(kind)]
            reach = size * (1 if kind < 3 else 2)
            points = [(x + reach * math.cos(a + turn), y + reach * math.sin(a + turn)) for a in corners]
            canvas.polygon(points, fill=fill)
    for _ in range(14):
        ends = [(float(a), float(b)) for a, b in rng.uniform(-200, _FINE + 200, (2, 2))]
        canvas.line(ends, fill=colours[3], width=int(rng.integers(4, 14)))
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


STYLES = {"oil": oil, "engraving": engraving, "mosaic": mosaic, "watercolour": watercolour, "geometric": geometric}


def _smooth(rng: np.random.Generator, radius: float) -> _Array:
    """Noise (_FINE, _FINE) blurred by a Gaussian of `radius` pixels, wrapping around; zero mean, unit deviation."""
    frequency = np.hypot(np.fft.fftfreq(_FINE)[:, None], np.fft.rfftfreq(_FINE)[None])
    gain = np.exp(-2 * (math.pi * radius * frequency) ** 2)
    noise = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(_FINE, _FINE))) * gain, s=(_FINE, _FINE))
    return (noise - noise.mean()) / noise.std()


def _reduced(pixels: NDArray[np.generic]) -> Image.Image:
    """An array (_FINE, _FINE, 3), 0-255, as a picture of SIDE x SIDE pixels."""
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6))
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
