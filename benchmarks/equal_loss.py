"""`python -m benchmarks.equal_loss --size 512`: how much sooner the engine has the loss of 500 eager iterations.

The baseline is the plain PyTorch loop at one scale; the loss to reach is the lowest of its 500 L-BFGS iterations. The
engine makes a default run, coarse to fine. Both start from the content picture, have the same objective and weights and
advance in turns, whichever has used less time so far; loading the weights counts for neither, graphs and targets for
both. Contents are photographs of scikit-image, styles are drawn by `styles`, besides the bundled pair. Writes the times
and the pictures at the ends of both runs, side by side: content, style, baseline, engine.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import save_file

from engine import Config
from engine import image as images

from . import cases, machine, quality, timing

PAIRS = ("bundled", "chelsea x oil", "coffee x engraving", "rocket x mosaic")
_CELL = 256  # pixels of a picture in the sheet


def main(argv: Sequence[str] | None = None) -> int:
    parser = machine.parser("equal_loss", __doc__)
    parser.add_argument("--size", type=int, default=256, help="long side in pixels (default 256)")
    parser.add_argument("--iterations", type=int, default=500, help="of the baseline (default 500)")
    parser.add_argument("--other", action="store_true", help="with features learned from other photographs and a seed")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=PAIRS, metavar="PAIR", help="some of the pairs")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "benchmarks" / "results", help="folder")
    args = parser.parse_args(argv)
    name = f"{machine.slug('cpu')}-equal-loss-{args.size}{'-other' if args.other else ''}"
    report: dict[str, Any] = {
        "commit": machine.commit(),
        "device": machine.device_name("cpu"),
        "versions": machine.versions(),
        "size": args.size,
        "weights": "other" if args.other else "embedded",
        "pairs": {},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        weights = "embedded"
        if args.other:
            weights = str(Path(folder, "other.safetensors"))
            save_file(quality.other(), weights)
        for pair in args.pairs:
            problem = _problem(pair, args.size, weights)
            found, pictures = timing.equal_loss(problem, "engine-cpu", args.iterations, Config().iterations)
            report["pairs"][pair] = found
            _print(pair, found)
            shown = [images.to_pil(images.to_tensor(each), None) for each in (problem.content, problem.style)]
            rows.append([*shown, *pictures])
            ratios = [each["ratio"] or 0.0 for each in report["pairs"].values()]
            report["median_ratio"] = statistics.median(ratios)
            (args.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
            _sheet(rows).save(args.out / f"{name}.jpg", quality=85)
    print(f"median: {report['median_ratio']:.1f} times as soon")
    return 0


def _problem(pair: str, size: int, weights: str) -> cases.Problem:
    if pair == "bundled":
        return cases.load(size, weights)
    content, style = pair.split(" x ")
    pictures = quality.photograph(content), quality.STYLES[style]()
    return cases.Problem(*(images.load(each) for each in pictures), weights, Config(size=size))


def _sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    page = Image.new("RGB", (4 * _CELL, len(rows) * _CELL), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            small = picture.copy()
            small.thumbnail((_CELL - 4, _CELL - 4), Image.Resampling.LANCZOS)
            page.paste(small, (x * _CELL + (_CELL - small.width) // 2, y * _CELL + (_CELL - small.height) // 2))
    return page


def _print(pair: str, found: dict[str, Any]) -> None:
    eager = f"{pair}: eager has its lowest loss, {found['loss']:.6g}, after {found['baseline_s']:.1f} s"
    if found["engine_s"] is None:
        print(f"{eager}; the engine has not: {found['engine_lowest_loss']:.6g} after {found['engine_total_s']:.1f} s")
    else:
        print(f"{eager}, the engine after {found['engine_s']:.1f} s: {found['ratio']:.1f} times as soon")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
