"""`python -m benchmarks.compare --size 256`: the engine against plain PyTorch, in one table and one file of the ledger.

First the gradients are compared, and nothing is timed if an exact one is wrong. Then all variants iterate in turns in
this process, and peak memory is measured in a fresh process each.

    error        relative L2 error of the gradient against float64, half way between content and noise
    strict       the same on a small picture at a point where no ReLU has flipped (see `cases.strict_error`); on a GPU
                 torch's fp32 is exact there only, elsewhere it is TF32, as a good user has it
    first s      the first iteration, in which torch.compile compiles
    it/s, ratio  median of one iteration (evaluation and optimiser step), and eager's over the variant's
    fastest      the same ratio for the fastest iterations
    GFLOP/s      of the convolutions alone, and its share of the rate of fp32 matrix products measured in the same turns
    peak MiB     resident memory after 100 iterations, when torch's L-BFGS has all of its history
    imports MiB  the part of it that importing torch and the loop takes; what either imports later counts as its own

The first line says how many cores were busy with other work. Unless that is next to none the ratios mean nothing:
OpenMP's barriers make eager torch many times slower beside a busy neighbour, and flatter the engine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from engine import provider

from . import cases, machine, timing

RESULTS = machine.ROOT / "benchmarks" / "results"


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    problem = cases.load(args.size, args.weights, args.content, args.style, args.device)
    if args.memory:
        print(json.dumps(timing.memory(args.memory, problem)))
        return 0
    engines = [
        name for name, (device, _) in cases.ENGINES.items() if (device in provider.GPUS) == (args.device == "cuda")
    ]
    names = dict.fromkeys(["eager", *(args.variants or [*cases.RIVALS, *engines])])
    rows: dict[str, dict[str, Any]] = {name: {"variant": name} for name in names}
    loops = timing.start(rows, problem)
    wrong = [row for row in rows.values() if "failed" not in row and cases.exact(row["variant"]) and _off(row)]
    for row in wrong:
        print(
            f"{row['variant']}: gradient off by {row['error']:.1e} (at most {cases.LOOSE:.0e}) at this size and by "
            f"{row['strict_error']:.1e} (at most {cases.STRICT:.0e}) on the small picture: nothing timed",
            file=sys.stderr,
        )
    if wrong:
        return 1
    rate, others = timing.in_turns(rows, loops, problem, args.rounds)
    loops.clear()
    if args.device == "cuda":
        torch.cuda.empty_cache()  # room for the processes that follow
    for row in rows.values():
        if "failed" not in row:
            row |= _memory_of_child(row["variant"], args)
    report = {
        "commit": machine.commit(),
        "device": machine.device_name(args.device),
        "threads": torch.get_num_threads(),
        "versions": machine.versions(),
        "size": problem.size,
        "weights": Path(args.weights).name,
        "gflop_per_iteration": problem.gflop,
        "mm_gflop_per_s": rate,
        "cores_used_by_others": others,
        "rows": list(rows.values()),
    }
    _print_table(report)
    out = args.out or RESULTS / f"{machine.slug(args.device)}-{args.size}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = machine.parser("compare", __doc__)
    parser.add_argument("--size", type=int, default=256, help="long side in pixels (default 256)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each variant (default 9)")
    parser.add_argument("--weights", default="embedded", help="embedded, imagenet or a file (default embedded)")
    parser.add_argument("--content", type=Path, help="content picture, by default the bundled one")
    parser.add_argument("--style", type=Path, help="style picture, by default the bundled one")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where all of it runs (default cpu)")
    names = (*cases.RIVALS, *cases.ENGINES)
    parser.add_argument("--variants", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--out", type=Path, help="JSON to write, by default named after machine and size in results/")
    parser.add_argument("--memory", choices=names, metavar="NAME", help=argparse.SUPPRESS)
    return parser


def _off(row: dict[str, Any]) -> bool:
    return not (row["strict_error"] <= cases.STRICT and row["error"] <= cases.LOOSE)


def _memory_of_child(name: str, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.compare", "--memory", name]
    for option in ("size", "weights", "content", "style", "device"):
        value = getattr(args, option)
        if value is not None:
            command += [f"--{option}", str(value)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _print_table(report: dict[str, Any]) -> None:
    width, height = report["size"]
    print(
        f"{width} x {height}, {report['gflop_per_iteration']:.1f} GFLOP an iteration; {report['device']}, "
        f"{report['threads']} threads, fp32 matrix products {report['mm_gflop_per_s']:.0f} GFLOP/s; "
        f"{report['cores_used_by_others']:.1f} cores busy with other work"
    )
    print(
        f"{'variant':<20}{'error':>8}{'strict':>8}{'first s':>8}{'it/s':>7}{'ratio':>6}{'fastest':>8}"
        f"{'GFLOP/s':>8}{'of mm':>6}{'peak MiB':>9}{'imports MiB':>12}"
    )
    for row in report["rows"]:
        if "failed" in row:
            print(f"{row['variant']:<20} failed: {row['failed']}")
            continue
        print(
            f"{row['variant']:<20}{row['error']:8.1e}{row['strict_error']:8.1e}{row['first_s']:8.2f}"
            f"{row['iterations_per_s']:7.2f}{row['ratio']:6.2f}{row['ratio_of_fastest']:8.2f}{row['gflop_per_s']:8.0f}{row['share_of_mm']:6.0%}"
            f"{row.get('device_mib', row['peak_mib']):9.0f}{row['imports_mib']:12.0f}"
        )


if __name__ == "__main__":
    sys.exit(main())
