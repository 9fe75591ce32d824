"""Draws style.jpg: brush strokes that follow a swirling field, from a seed. `python -m engine.samples.draw_style OUT`.

Everything in it is made by this program: no other picture is read.
"""

from __future__ import annotations

import colorsys
import math
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

SIZE = (768, 640)
SWIRLS = [(190, 180, 150, 1), (560, 140, 110, -1), (420, 380, 190, 1), (120, 500, 120, -1), (680, 480, 120, 1)]
SUNS = [(560, 140, 44), (150, 130, 24), (690, 320, 18), (330, 70, 16)]


def _angle(x: float, y: float) -> float:
    """Direction of the strokes: along the ground far away, around a swirl near it."""
    dx, dy = 1.0, 0.25 * math.sin(x / 90)
    for cx, cy, radius, turn in SWIRLS:
        distance = math.hypot(x - cx, y - cy)
        pull = 3 * math.exp(-((distance / radius) ** 2))
        dx += -turn * pull * (y - cy) / (distance + 1)
        dy += turn * pull * (x - cx) / (distance + 1)
    return math.atan2(dy, dx)


def _colour(x: float, y: float, rng: random.Random) -> tuple[int, int, int]:
    """Night blue above, ochre and dark green below, yellow suns; the hue wanders from stroke to stroke."""
    height = y / SIZE[1] + 0.06 * math.sin(x / 70)
    hue, saturation, value = 0.60 - 0.06 * math.sin(y / 60 + x / 110), 0.75, 0.35 + 0.4 * height
    if height > 0.72:
        hue, saturation, value = (0.11, 0.7, 0.75) if math.sin(x / 45 + y / 18) > 0.2 else (0.33, 0.5, 0.28)
    for cx, cy, radius in SUNS:
        distance = math.hypot(x - cx, y - cy)
        if distance < 2.2 * radius and rng.random() < 1.25 - distance / (2.2 * radius):
            hue, saturation, value = 0.13 - 0.04 * distance / (2.2 * radius), 0.75, 0.98
    hue += rng.gauss(0, 0.018)
    saturation = min(1.0, max(0.0, saturation + rng.gauss(0, 0.1)))
    value = min(1.0, max(0.0, value + rng.gauss(0, 0.11)))
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw(seed: int = 1) -> Image.Image:
    """The style picture: three coats of strokes, each finer than the one before."""
    rng = random.Random(seed)
    factor = 2  # drawn at twice the size and reduced, for smooth edges
    image = Image.new("RGB", (SIZE[0] * factor, SIZE[1] * factor), (28, 40, 84))
    canvas = ImageDraw.Draw(image)
    for width, length, count in ((15, 60, 2600), (9, 42, 5200), (5, 26, 6500)):
        for _ in range(count):
            x, y = rng.uniform(-20, SIZE[0] + 20), rng.uniform(-20, SIZE[1] + 20)
            colour = _colour(x, y, rng)
            points = []
            for _ in range(8):  # follow the field
                points.append((x * factor, y * factor))
                angle = _angle(x, y)
                x, y = x + math.cos(angle) * length / 8, y + math.sin(angle) * length / 8
            thick = max(2, round(width * factor * rng.uniform(0.6, 1.1)))
            canvas.line(points, fill=colour, width=thick, joint="curve")
            shade = tuple(max(0, channel - 28) for channel in colour)
            offset = [(px + thick * 0.3, py + thick * 0.42) for px, py in points]
            canvas.line(offset, fill=shade, width=max(1, thick // 5), joint="curve")  # the ridge of the paint
    return image.filter(ImageFilter.GaussianBlur(0.8)).resize(SIZE, Image.Resampling.LANCZOS)


if __name__ == "__main__":
    draw().save(Path(sys.argv[1]), quality=82)
