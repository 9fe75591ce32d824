"""What a measurement has to name: processor, versions, commit; and the machine's own rate and memory counters."""

from __future__ import annotations

import argparse
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
_SIDE = 2048  # of the matrices whose product gives the machine's rate
MATRIX_GFLOP = 2 * _SIDE**3 / 1e9


def parser(name: str, documentation: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m benchmarks.NAME`: the first paragraph describes it, the rest follows the options."""
    description, _, details = (documentation or "").partition("\n\n")
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def now(device: str) -> float:
    """Seconds, once the device has finished what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matrix_products(device: str) -> Iterator[None]:
    """fp32 matrix products for ever, of MATRIX_GFLOP each."""
    a, b = torch.rand(2, _SIDE, _SIDE, device=device).unbind()
    while True:
        torch.mm(a, b)
        yield


def cpu_seconds() -> tuple[float, float]:
    """CPU time used so far on this machine: (by this process, by all of them); equal where there is no /proc/stat."""
    own = time.process_time()
    stat = Path("/proc/stat")
    if not stat.exists():
        return own, own
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    return own, (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def resident_mib(peak: bool = False) -> float:
    """Resident memory of this process.

    The peak is VmHWM where there is one: ru_maxrss of a child starts at what its parent held when it was made.
    """
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) / 1024
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def device_mib() -> float:
    """Memory in use on the GPU, by anybody: ONNX Runtime's arena is outside of torch's books, and neither shrinks."""
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20


def device_name(device: str) -> str:
    """Model of the processor that runs the work."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def slug(device: str) -> str:
    """The name of the machine in the ledger: processor model and number of cores."""
    name = re.sub(r"\((r|tm)\)|@.*", "", device_name(device).lower())
    return f"{re.sub(r'[^a-z0-9]+', '-', name).strip('-')}-{os.cpu_count()}c"


def versions() -> dict[str, str]:
    """Python and the libraries that do the work."""
    found = {"python": platform.python_version()}
    for wheel in ("torch", "onnxruntime", "onnxruntime-gpu", "onnx"):
        try:
            found[wheel] = metadata.version(wheel)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that runs, with `-dirty` if the code differs from it; `unknown` for a copy without its history."""
    code = ["engine", "kernels", "export", "benchmarks", ":!benchmarks/results"]
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return f"{head}-dirty" if _git("status", "--porcelain", "--", *code) else head
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
