"""`python -m benchmarks.gpu --out DIR`: everything that only a GPU can show, in one table of checks and some of times.

The sections of `gpu_sections` run one after the other, each in a process and with a time limit of its own: what fails,
or is not installed, is named, and the rest goes on. DIR gets `report.json`, written again after each section, a file
for the section that is running, with the rows found so far, and pictures to be looked at. A bare checkout will do, with
torch, torchvision, NumPy, Pillow, ONNX and safetensors; what else is missing is skipped, and named at the end with what
there was no time for. Exit 0 if all checks that could run have passed, 1 if one failed, or was skipped of an engine
that `--require` names, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.provider import GPUS

from . import machine

if TYPE_CHECKING:
    from PIL import Image

MINUTES = 8.0  # for all of it
LIMITS = {  # seconds for each section, in order of value
    "environment": 60,
    "kernels": 90,
    "providers": 120,
    "loop": 60,
    "options": 150,
    "going-on": 60,
    "runs": 90,
    "iteration-512": 60,
    "equal-512": 100,
    "forecast": 90,
    "pictures": 60,
    "kernel-times": 60,
    "our-part": 60,
    "gram-matrices": 100,
    "iteration-1024": 60,
    "iteration-256": 60,
    "compiled-512": 90,
    "iteration-2048": 90,
}
# By their names only: the other sections leave no time for them. torch.compile's max-autotune tunes for over 350 s.
ON_REQUEST = {"equal-256": 90, "autotuned-512": 460}
LATE = "no time left"


class Rows:
    """The rows of a section: each is printed and written as soon as it is known."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, passed: bool | None = None, **values: Any) -> None:
        """A row; `passed` is None for a measurement, and False fails the section."""
        self.rows.append({"name": name, "passed": passed, **values})
        whole = self._file.with_suffix(".part")  # for a process that is ended in the middle of it
        whole.write_text(json.dumps(self.rows, indent=1) + "\n")
        whole.replace(self._file)
        verdict = {None: "", True: "ok", False: "FAILED"}[passed]
        shown = "  ".join(f"{key} {_short(value)}" for key, value in values.items())
        print(f"  {name:<34}{verdict:<7}{shown}", flush=True)

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """What goes wrong inside fails the row of this name, and the section goes on; what is missing is skipped."""
        from engine.export.ort import MissingError

        try:
            yield
        except MissingError as error:
            self.skip(name, str(error))
        except Exception as error:  # of torch, CuPy, ONNX Runtime or TensorRT
            self.add(name, False, failed=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            traceback.print_exc(limit=-6, file=sys.stdout)

    def picture(self, name: str, image: Image.Image) -> None:
        """A picture to be looked at, NAME.png beside the rows."""
        image.save(self._file.with_name(f"{name}.png"))
        self.add(name, width=image.width, height=image.height)

    def skip(self, name: str, reason: str) -> None:
        """A row that cannot be found here."""
        self.add(name, skipped=reason)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    names = (*LIMITS, *ON_REQUEST)
    about = f"some only, of {', '.join(names)}; by default all but {' and '.join(ON_REQUEST)}"
    parser.add_argument("--sections", nargs="+", choices=names, default=list(LIMITS), metavar="NAME", help=about)
    about = f"engines that may not be skipped, of {', '.join(GPUS)}"
    parser.add_argument("--require", nargs="+", choices=GPUS, default=(), metavar="NAME", help=about)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # the process of one section
    args = parser.parse_args(argv)
    # Of torch.compile's choices: those that cannot run take ten seconds each to fail.
    os.environ.setdefault("TORCHINDUCTOR_MAX_AUTOTUNE_PRUNE_CHOICES_BASED_ON_SHARED_MEM", "1")
    import torch

    if not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} finds no CUDA device, nothing to check here", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("platformdirs") is None:
        os.environ.setdefault("STYLIZE_HOME", str(Path(tempfile.gettempdir()) / "gatys-engine"))
    if args.inside:
        from . import gpu_sections

        logging.basicConfig(level=logging.INFO, format="  %(message)s", stream=sys.stdout)
        (name,) = args.sections
        rows = Rows(args.out / f"{name}.json")
        with torch.cuda.stream(torch.cuda.Stream()):  # the default stream cannot be captured
            gpu_sections.SECTIONS[name](rows, "cuda")
        return int(any(row["passed"] is False for row in rows.rows))
    return run(args.sections, args.out, args.require)


def run(sections: Sequence[str], out: Path, required: Sequence[str] = ()) -> int:
    """Run the sections, each in a process, and write the report; returns the exit status."""
    end = time.monotonic() + 60 * MINUTES
    report: dict[str, Any] = {"commit": machine.commit(), "sections": {}}
    for name in sections:
        limit = min((LIMITS | ON_REQUEST)[name], end - time.monotonic())
        file = out / f"{name}.json"
        file.unlink(missing_ok=True)
        print(f"{name}", flush=True)
        begin = time.monotonic()
        status = process(name, out, limit) if limit > 5 else LATE
        rows = json.loads(file.read_text()) if file.exists() else []
        engines = tuple(f"engine-{each}" for each in required)
        missing = [row["name"] for row in rows if "skipped" in row and row["name"].startswith(engines)]
        if status == "ok" and missing:
            status = f"required, but skipped: {', '.join(missing)}"
        elif status == LATE and required:
            status = f"required, but there was {LATE}"
        report["sections"][name] = {"status": status, "seconds": time.monotonic() - begin, "rows": rows}
        (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        file.unlink(missing_ok=True)
        if status != "ok":
            print(f"  {name}: {status}", flush=True)
    return conclude(report["sections"])


def conclude(sections: dict[str, dict[str, Any]]) -> int:
    """Name what was skipped, what there was no time for and what failed; returns the exit status."""
    skipped: dict[str, dict[str, None]] = {}  # names by reason, each once
    for section in sections.values():
        for row in section["rows"]:
            if "skipped" in row:
                skipped.setdefault(row["skipped"], {})[row["name"]] = None
    for reason, names in skipped.items():
        print(f"skipped: {', '.join(names)}: {reason[:120]}")
    late = [name for name, section in sections.items() if section["status"] == LATE]
    if late:
        print(f"{LATE} for {', '.join(late)}")
    failed = [name for name, section in sections.items() if section["status"] not in ("ok", LATE)]
    print(f"failed: {', '.join(failed)}" if failed else "nothing failed")
    return int(bool(failed))


def process(name: str, out: Path, limit: float) -> str:
    """Run one section in a process of its own: `ok`, or what became of it."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--inside", "--sections", name, "--out", str(out.resolve())]
    # Not a pipe, which processes of torch.compile keep open beyond the end of their parent; they are ended with it.
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        running = subprocess.Popen(command, cwd=machine.ROOT, stderr=errors, start_new_session=True)
        try:
            status = f"exit {running.wait(limit)}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
            running.wait()
        if status == "exit 0":
            return "ok"
        errors.seek(0)
        lines = errors.read().strip().splitlines()
    print(*lines[-20:], sep="\n", file=sys.stderr, flush=True)
    return f"{status}: {lines[-1]}" if lines else status


if __name__ == "__main__":
    sys.exit(main())
