"""A contact sheet of the controls: `python -m benchmarks.controls`. One picture for each, of the bundled content.

To be looked at: noise, borders, seams and shifts of colour are mistakes. The styles are drawn by `styles`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tqdm import tqdm

from engine import Config, Stylizer, sheet

from .machine import ROOT
from .machine import parser as parser_of
from .styles import STYLES

COLUMNS = 6
Mask = NDArray[np.float32]  # (H, W) in [0, 1]
Cell = tuple[Sequence[str], Image.Image]


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("controls", __doc__)
    parser.add_argument("--size", type=int, default=160, help="long side of the results in pixels (default 160)")
    parser.add_argument("--iterations", type=int, default=60, help="of the last scale (default 60)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder (default results/)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    made = tqdm(cells(Stylizer("embedded"), args.size, args.iterations), desc="controls", file=sys.stderr)
    sheet.draw(list(made), COLUMNS).save(args.out / "controls.jpg", quality=80)
    return 0


def cells(stylizer: Stylizer, size: int, iterations: int) -> Iterator[Cell]:
    """The sources, then the labelled picture of each control."""
    shared = {"size": size, "iterations": iterations}
    content = Image.open(resources.files("engine.samples") / "content.jpg").convert("RGB")
    mosaic, oil, engraving = (STYLES[name]() for name in ("mosaic", "oil", "engraving"))
    width, height = content.size
    shape = size // 16 * 16, round(size * height / width / 16) * 16  # of what tiles
    across = np.repeat(np.linspace(0, 1, width, dtype=np.float32)[None], height, 0)
    hard, soft, kept = (across > 0.5).astype(np.float32), across, disc(height, width)

    def paint(label: str, source: Any, style: Any, masks: Any = None, freeze: Any = None, **options: Any) -> Cell:
        result = stylizer(source, style, Config(**{**shared, **options}), masks=masks, freeze=freeze)
        return label.split("\n"), result.image

    def show(label: str, picture: Image.Image) -> Cell:
        return label.split("\n"), ImageOps.fit(picture, (size, round(size * height / width)))

    for label, source in (("content", content), ("A", mosaic), ("B", oil), ("C", engraving)):
        yield show(label, source)
    yield paint("A", content, mosaic)
    yield paint("B", content, oil)
    for name, right in (("hard", hard), ("soft", soft)):
        yield show(f"mask, {name}", grey(right))
        yield paint(f"A left, B right\nmask, {name}", content, [mosaic, oil], [1 - right, right])
    yield show("mask to freeze", grey(kept))
    yield paint("A, freeze", content, mosaic, freeze=kept)
    for way in ("keep-after", "keep-before", "match", "histogram"):
        yield paint(f"B, colour\n{way}", content, oil, colour=way)
    yield paint("STYLE none\nfrom noise", content, None, init="noise")
    yield paint("C", content, engraving)
    for blend in ((1.0, 3.0), (1.0, 1.0), (3.0, 1.0)):
        yield paint(f"A and C\nblend {blend[0]:.0f}:{blend[1]:.0f}", content, [mosaic, engraving], style_blend=blend)
    for scale in (0.5, 2.0):
        yield paint(f"A, style scale\n{scale}", content, mosaic, style_scale=scale)
    yield paint("A, wasserstein", content, mosaic, style_loss="wasserstein", style_weight=30.0)
    yield paint("A, init style", content, mosaic, init="style")
    yield paint("A, init noise", content, mosaic, init="noise")
    yield paint("CONTENT none\nA", None, mosaic, size=shape)
    labels, tile = paint("CONTENT none\nB, tile", None, oil, tile=True, size=shape)
    yield labels, tile
    pixels = np.asarray(tile)
    yield show("the same\n2 x 2", Image.fromarray(np.tile(pixels, (2, 2, 1))))
    yield show("its corners\nin the middle", Image.fromarray(np.roll(pixels, (shape[1] // 2, shape[0] // 2), (0, 1))))


def disc(height: int, width: int) -> Mask:
    """White in the middle."""
    y, x = np.mgrid[:height, :width]
    return (np.hypot(y - height / 2, x - width / 2) < 0.36 * height).astype(np.float32)


def grey(mask: Mask) -> Image.Image:
    """A mask as a picture."""
    return Image.fromarray(np.uint8(255 * mask)).convert("RGB")


if __name__ == "__main__":
    sys.exit(main())
