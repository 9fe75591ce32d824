"""`python -m benchmarks.serve`: latency, memory and size of a picture of the HTTP service, in one table and one file.

A real server on this machine, one client:

    first preview   from the start of the upload to the first picture so far in the client's hands, at 256 with the
                    default options, server idle; each time other pictures, so that no style is known
    health          GET /health/live on a connection of its own
    memory          resident memory of the server and its worker, once the worker is ready
    seconds         of one picture with default options but the iterations, by size, each on a fresh server whose
                    worker's and decoders' peak memory is taken; the JPEG photograph is larger than any size

The first line says how many cores were busy with other work: unless that is next to none the times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from . import machine

RESULTS = machine.ROOT / "benchmarks" / "results"


class Server:
    """`python -m engine.serve` on a free port of 127.0.0.1, ready."""

    def __init__(self, data: str, device: str, weights: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        words = ["--port", str(port), "--data", data, "--device", device, "--weights", weights]
        start = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "engine.serve", *words], cwd=machine.ROOT, stderr=subprocess.DEVNULL
        )
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(self.url + "/health/ready", timeout=5).close()
                break
            if self._process.poll() is not None:
                raise SystemExit("the server does not start")
            time.sleep(0.05)
        self.seconds = time.perf_counter() - start

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()

    def memory(self, field: str) -> dict[str, int]:
        """MiB of the server and its children by their module: VmRSS is now, VmHWM the peak; of many the largest."""
        found: dict[str, int] = {}
        children = " ".join(
            path.read_text() for path in Path(f"/proc/{self._process.pid}/task").glob("*/children")
        ).split()
        for pid in (str(self._process.pid), *children):
            module = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[2].decode().rpartition(".")[2]
            text = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
            assert text
            found[module] = max(found.get(module, 0), int(text[1]) // 1024)
        return found

    def submit(self, content: bytes, style: bytes, options: dict[str, Any]) -> dict[str, Any]:
        body = b""
        for name, value in (("content", content), ("style", style), ("options", json.dumps(options).encode())):
            file = "" if name == "options" else f'; filename="{name}"'
            body += f'--b\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + value + b"\r\n"
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        request = urllib.request.Request(self.url + "/v1/jobs", body + b"--b--\r\n", headers)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def events(self, job: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, data) of each event of a job."""
        with urllib.request.urlopen(self.url + job["events"]) as lines:
            name = ""
            for line in lines:
                key, _, value = line.decode().rstrip("\n").partition(": ")
                if key == "event":
                    name = value
                elif key == "data":
                    yield name, json.loads(value)

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path) as answer:
            return answer.read()

    def cancel(self, job: dict[str, Any]) -> None:
        url = f"{self.url}/v1/jobs/{job['id']}"
        urllib.request.urlopen(urllib.request.Request(url, method="DELETE")).close()
        for _ in self.events(job):
            pass


@contextlib.contextmanager
def serving(device: str, weights: str) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as data:
        server = Server(data, device, weights)
        try:
            yield server
        finally:
            server.stop()


def first_previews(server: Server, pair: list[Image.Image], size: int, number: int) -> list[float]:
    """Seconds to each first preview, of jobs that are cancelled then."""
    found = []
    for i in range(number):
        files = []
        for image in pair:
            stream = io.BytesIO()
            Image.fromarray(np.roll(np.asarray(image), 7 * (i + 1), axis=1)).save(stream, "JPEG", quality=95)
            files.append(stream.getvalue())
        start = time.perf_counter()
        job = server.submit(*files, {"size": size})
        for name, data in server.events(job):
            if name == "preview":
                server.get(data["image"])
                found.append(time.perf_counter() - start)
                break
        server.cancel(job)
    return found


def health(server: Server, number: int = 300) -> list[float]:
    """Sorted seconds of requests."""
    found = []
    for _ in range(number):
        start = time.perf_counter()
        server.get("/health/live")
        found.append(time.perf_counter() - start)
    return sorted(found)


def picture(device: str, weights: str, files: list[bytes], size: int, iterations: int) -> dict[str, Any]:
    """One picture on a fresh server."""
    with serving(device, weights) as server:
        job = server.submit(*files, {"size": size, "iterations": iterations})
        last = next(data for name, data in server.events(job) if name == "end")
        if last["state"] != "succeeded":
            raise SystemExit(f"size {size}: {last['state']} ({last['reason']})")
        row = {
            "size": size,
            "iterations": iterations,
            "evaluations": last["total"],
            "seconds": round(last["seconds"], 2),
        }
        return row | {"seconds": round(last["seconds"], 2), "peak_mib": server.memory("VmHWM")}


def busy_cores(seconds: float = 2.0) -> float:
    """Cores that others keep busy."""
    own, all_ = machine.cpu_seconds()
    time.sleep(seconds)
    own_after, all_after = machine.cpu_seconds()
    return max(0.0, (all_after - all_ - (own_after - own)) / seconds)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if len(args.sizes) != len(args.iterations):
        raise SystemExit("give as many --iterations as --sizes")
    busy = busy_cores()
    print(f"{machine.device_name('cpu')}, commit {machine.commit()}, {busy:.2f} cores busy with other work")
    samples = resources.files("engine.samples")
    small = [Image.open(io.BytesIO((samples / f"{name}.jpg").read_bytes())) for name in ("content", "style")]
    with serving(args.device, args.weights) as server:
        result = {
            "device": machine.device_name("cpu"), "commit": machine.commit(), "versions": machine.versions(),
            "engine_device": args.device, "weights": args.weights, "busy_cores": round(busy, 2),
            "ready_seconds": round(server.seconds, 2), "memory_mib": server.memory("VmRSS"),
        }  # fmt: skip
        print(f"ready after {server.seconds:.1f} s; memory in MiB: {result['memory_mib']}")
        times = health(server)
        result["health_ms"] = {
            "median": round(1e3 * median(times), 2),
            "p99": round(1e3 * times[-len(times) // 100], 2),
        }
        print(f"health: median {result['health_ms']['median']} ms, 99 % {result['health_ms']['p99']} ms")
        first = first_previews(server, small, args.preview_size, args.previews)
        result["first_preview"] = {"size": args.preview_size, "seconds": [round(each, 3) for each in first]}
        print(f"first preview at {args.preview_size}: median {median(first):.3f} s, longest {max(first):.3f} s")
    large = []
    for image in small:
        stream = io.BytesIO()
        image.resize([round(max(args.sizes) / max(image.size) * side) for side in image.size]).save(stream, "JPEG")
        large.append(stream.getvalue())
    result["pictures"] = []
    print(f"{'size':>5} {'iterations':>10} {'evaluations':>11} {'seconds':>8}  peak MiB")
    for size, iterations in zip(args.sizes, args.iterations, strict=True):
        row = picture(args.device, args.weights, large, size, iterations)
        result["pictures"].append(row)
        print(f"{size:5} {iterations:10} {row['evaluations']:11} {row['seconds']:8.1f}  {row['peak_mib']}")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"serve-{machine.slug('cpu')}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{path} written")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = machine.parser("serve", __doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--iterations", type=int, nargs="+", default=[100, 100, 10], help="for each size")
    parser.add_argument("--previews", type=int, default=7, help="number of jobs whose first preview is waited for")
    parser.add_argument("--preview-size", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--weights", default="embedded")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
