"""`python -m benchmarks.equal_loss --size 512`: how much sooner the engine has the loss of 500 eager iterations.

The baseline is the plain PyTorch loop at one scale; the loss to reach is the lowest of its 500 L-BFGS iterations. The
engine runs coarse to fine, as by default, but its last scale may go on for as many iterations. All start from the
content, have the same objective and weights and advance in turns, whichever has used least time so far; loading the
weights counts for nobody, graphs and targets for all. Contents are photographs of scikit-image, styles are drawn by
`styles`, besides the bundled pair.

Both keep their pixels in range at every step, the plain loop as PyTorch's tutorial does it; with `--no-clamp` neither
does, and what leaves the range is cut off when the picture is written, which multiplies the loss.

Writes the times and the pictures side by side: content, style, eager at its lowest loss, a default run of the engine.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from engine import image as images
from engine import sheet

from . import cases, machine, quality, timing

PAIRS = ("bundled", "chelsea x oil", "coffee x engraving", "rocket x mosaic")


def main(argv: Sequence[str] | None = None) -> int:
    parser = machine.parser("equal_loss", __doc__)
    parser.add_argument("--size", type=int, default=256, help="long side in pixels (default 256)")
    parser.add_argument("--iterations", type=int, default=500, help="of the baseline (default 500)")
    parser.add_argument("--no-clamp", action="store_true", help="pixels may leave their range")
    parser.add_argument("--other", action="store_true", help="with features learned from other photographs and a seed")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=PAIRS, metavar="PAIR", help="some of the pairs")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "benchmarks" / "results", help="folder")
    args = parser.parse_args(argv)
    name = f"{machine.slug('cpu')}-equal-loss-{args.size}"
    name += "-free" * args.no_clamp + "-other" * args.other
    engine = cases.by_default("cpu")
    about = {"commit": machine.commit(), "device": machine.device_name("cpu"), "versions": machine.versions()}
    about["engine"] = engine
    report: dict[str, Any] = {"size": args.size, "weights": "other" if args.other else "embedded"}
    report |= {"clamp": not args.no_clamp, "pairs": {}}
    args.out.mkdir(parents=True, exist_ok=True)
    cells = []
    with tempfile.TemporaryDirectory() as folder:
        weights = "embedded"
        if args.other:
            weights = str(Path(folder, "other.safetensors"))
            save_file(quality.other(), weights)
        for pair in args.pairs:
            problem = _problem(pair, args.size, weights, not args.no_clamp)
            found, pictures = timing.equal_loss(problem, engine, args.iterations)
            report["pairs"][pair] = about | found
            _print(pair, found)
            shown = [images.to_pil(each) for each in (problem.content, problem.style)]
            labels = ("content", "style", "eager", "engine")
            cells += [([f"{pair}: {label}"], each) for label, each in zip(labels, (*shown, *pictures), strict=True)]
            report["median_ratio"] = statistics.median(each["ratio"] or 0.0 for each in report["pairs"].values())
            (args.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
            sheet.draw(cells, len(labels)).save(args.out / f"{name}.jpg", quality=85)
    print(f"median {report['median_ratio']:.1f} times as soon, where a pair that is not reached counts as 0")
    return 0


def _problem(pair: str, size: int, weights: str, clamp: bool = True) -> cases.Problem:
    config = cases.options(size, clamp=clamp)
    if pair == "bundled":
        return replace(cases.load(size, weights), config=config)
    content, style = pair.split(" x ")
    pictures = quality.photograph(content), quality.STYLES[style]()
    return cases.Problem(*(images.load(each) for each in pictures), weights, config)


def _print(pair: str, row: Mapping[str, Any]) -> None:
    eager = f"{pair}: eager has its lowest loss, {row['loss']:.6g}, after {row['baseline_s']:.1f} s"
    if row["engine_s"] is None:
        print(f"{eager}; the engine has not: {row['engine_lowest_loss']:.6g} after {row['engine_total_s']:.1f} s")
    else:
        at = f"after {row['engine_s']:.1f} s, in iteration {row['engine_iteration']} of the last scale"
        print(f"{eager}, the engine {at}: {row['ratio']:.1f} times as soon")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
