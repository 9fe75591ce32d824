"""`python -m benchmarks.windows --size 2048`: what windows save and cost, against the whole picture at once.

The bundled pair at one scale, with the embedded features, on the CPU. First the gradient of each window is compared
with that of the whole picture, then they are evaluated in turns in this process, and the peak memory of a run with Adam
is measured in a fresh process each.

    error        relative L2 error of the gradient against that of the whole picture, at the content
    windows      how many there are, and the pixels that they see, over those of the picture
    s, ratio     median of an evaluation of loss and gradient, over that of the whole picture
    peak MiB     resident memory at the peak of three iterations, less what the process had before
    forecast MiB what the forecast says about that
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from engine import Config, Stylizer, samples, windows
from engine import image as images
from engine.export import vgg

from . import machine

RESULTS = machine.ROOT / "benchmarks" / "results"


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.memory is not None:
        print(json.dumps(memory(args.size, args.memory)))
        return 0
    stylizer = Stylizer("embedded", "cpu", "fp32")
    content, style = samples.pair()
    rows: dict[int, dict[str, Any]] = {}
    objectives = {}
    for window in (args.size, *args.windows):
        objectives[window] = stylizer.objective(content, style, _config(args.size, window))
        seen = objectives[window].network.spec
        sides = windows.spans(seen, window - window % vgg.WHOLE)
        counts = [len(each.each) for each in sides]
        pixels = [each.length * count for each, count in zip(sides, counts, strict=True)]
        rows[window] = {"window": window, "windows": counts, "seen": pixels[0] * pixels[1] / (seen.height * seen.width)}
    picture = images.resize(images.load(content), (seen.width, seen.height))
    image = images.to_tensor(picture)
    gradient, truth = torch.empty_like(image), torch.empty_like(image)
    for window, objective in objectives.items():
        objective.write(image, truth if window == args.size else gradient)
        own = truth if window == args.size else gradient
        rows[window]["error"] = float((own - truth).norm() / truth.norm())
        if rows[window]["error"] > 1e-4:
            print(f"window {window}: gradient off by {rows[window]['error']:.1e}: nothing timed", file=sys.stderr)
            return 1
    seconds: dict[int, list[float]] = {window: [] for window in rows}
    for _ in range(args.rounds):
        for window, objective in objectives.items():
            begin = time.perf_counter()
            objective.write(image, gradient)
            seconds[window].append(time.perf_counter() - begin)
    objectives.clear()
    median = {window: statistics.median(times) for window, times in seconds.items()}
    for window, row in rows.items():
        row |= {"seconds": seconds[window], "ratio": median[window] / median[args.size]}
        command = [sys.executable, "-m", "benchmarks.windows", "--size", str(args.size), "--memory", str(window)]
        row |= json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    report = {
        "commit": machine.commit(),
        "device": machine.device_name("cpu"),
        "threads": torch.get_num_threads(),
        "versions": machine.versions(),
        "size": picture.size,
        "rows": list(rows.values()),
    }
    print("{} x {}; {}, {} threads".format(*picture.size, report["device"], report["threads"]))
    print(f"{'window':>7}{'windows':>9}{'seen':>6}{'error':>9}{'s':>7}{'ratio':>7}{'peak MiB':>10}{'forecast MiB':>14}")
    for window, row in rows.items():
        print(
            f"{window:7}{'x'.join(map(str, row['windows'])):>9}{row['seen']:6.2f}{row['error']:9.1e}"
            f"{median[window]:7.2f}{row['ratio']:7.2f}{row['peak_mib']:10.0f}{row['forecast_mib']:14.0f}"
        )
    out = args.out or RESULTS / f"{machine.slug('cpu')}-windows-{args.size}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def memory(size: int, window: int) -> dict[str, float]:
    """Peak memory of a run in this process, and its forecast."""
    stylizer = Stylizer("embedded", "cpu", "fp32", keep_networks=False)
    pair = [images.load(each) for each in samples.pair()]
    config = _config(size, window)
    forecast = stylizer.forecast(*pair, config).total / 2**20
    before = machine.resident_mib()
    stylizer(*pair, config)
    return {"peak_mib": machine.resident_mib(peak=True) - before, "forecast_mib": forecast}


def _config(size: int, window: int) -> Config:
    return Config(size=size, window=window, scales=1, iterations=3, optimizer="adam")


def _parser() -> argparse.ArgumentParser:
    parser = machine.parser("windows", __doc__)
    parser.add_argument("--size", type=int, default=2048, help="long side in pixels (default 2048)")
    parser.add_argument(
        "--windows", type=int, nargs="+", default=[1104, 800, 512], metavar="N", help="pixels of windows"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default 5)")
    parser.add_argument("--out", type=Path, help="JSON to write, by default named after machine and size in results/")
    parser.add_argument("--memory", type=int, metavar="WINDOW", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
