"""A worker: one process that holds one `Stylizer` and takes jobs out of the store, until its standard input ends.

A process of its own, so that native code that breaks takes no other job with it, and so that the server answers while
Python computes. Its standard input is the rope: the server lets go of it to stop the worker, and so does the kernel
when the server was killed. Either way the running job is checkpointed and waits for the next worker.
"""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from engine.config import Config

from . import logs
from .store import Row, Store, write

if TYPE_CHECKING:
    from PIL import Image

    from engine.stylizer import Step, Stylizer

log = logging.getLogger(__name__)

_POLL = 0.05  # seconds between two looks at an empty queue
_REPORT = 0.1  # seconds between two reports of the loss
_PREVIEW = 0.5  # seconds between two pictures so far
_CHECKPOINT = 5.0  # seconds between two checkpoints
_SHARE = 20.0  # a picture or checkpoint is written when the run has taken this many times as long as the last one did


class _Every:
    """Whether something of this period is due, which itself may take only a small share of the time."""

    def __init__(self, period: float, first: bool) -> None:
        self._period = period
        self._next = 0.0 if first else time.monotonic() + period

    def due(self) -> Iterator[None]:
        """One turn, timed, if it is due."""
        start = time.monotonic()
        if start >= self._next:
            yield
            end = time.monotonic()
            self._next = end + max(self._period, _SHARE * (end - start))


def work(store: Store, stylizer: Stylizer, number: int, stop: threading.Event) -> None:
    """Do jobs until `stop` is set."""
    while not stop.is_set():
        row = store.claim(number)
        if row is None:
            stop.wait(_POLL)
        else:
            run(store, stylizer, row, stop)


def run(store: Store, stylizer: Stylizer, row: Row, stop: threading.Event) -> None:
    """Run one job from its start or its checkpoint to its end, or until `stop` is set and it is checkpointed."""
    job, start = row["id"], time.monotonic()
    log.info("job started", extra={"job": job, "iteration": row["iteration"]})
    try:
        state, reason = _run(store, stylizer, row, stop.is_set)
    except MemoryError:
        state, reason = "failed", "not enough memory for this size"
    except Exception as error:  # whatever one job does must not hurt the next
        log.warning("job failed", exc_info=not isinstance(error, ValueError | ArithmeticError), extra={"job": job})
        state, reason = "failed", " ".join(str(error).split()) or type(error).__name__
    if state == "queued":
        store.unclaim(row["worker"], crashed=False)
    else:
        store.finish(job, state, reason)
    log.info("job left", extra={"job": job, "state": state, "seconds": round(time.monotonic() - start, 3)})


def _run(store: Store, stylizer: Stylizer, row: Row, stopping: Callable[[], bool]) -> tuple[str, str | None]:
    """The state that the job is left in, and why."""
    job, folder = row["id"], store.folder(row["id"])
    config = Config(**json.loads(row["options"]))
    content = (folder / "content").read_bytes()
    styles = [(folder / f"style-{i}").read_bytes() for i in range(row["styles"])]
    report, preview = _Every(_REPORT, first=True), _Every(_PREVIEW, first=True)
    checkpoint = _Every(_CHECKPOINT, first=False)
    losses: list[tuple[int, int, float]] = []
    number, start = row["preview"], time.monotonic()
    clock = _Clock()
    step: Step | None = None

    def tell(step: Step) -> None:
        seconds = row["seconds"] + time.monotonic() - start
        values = {"scale": step.scale, "iteration": step.iteration, "total": step.total, "loss": losses[-1][2]}
        store.progress(job, {**values, "eta": clock.left(step), "preview": number, "seconds": seconds}, losses)
        losses.clear()

    for step in _steps(stylizer, content, styles, config, folder / "checkpoint"):
        clock.tick(step)
        for _ in preview.due():
            number += 1
            write(folder / "preview.png", png(step.image, fast=True))
        for _ in report.due():
            losses.append((step.iteration, step.scale, step.loss))
            tell(step)
        if store.cancelled(job):
            write(folder / "preview.png", png(step.image))
            number += 1
            losses.append((step.iteration, step.scale, step.loss))
            tell(step)
            return "cancelled", None
        if step.iteration < step.total and stopping():
            _save(step, folder / "checkpoint")
            return "queued", None
        for _ in checkpoint.due() if step.iteration < step.total else ():
            _save(step, folder / "checkpoint")
        if row["seconds"] + time.monotonic() - start > row["deadline"]:
            return "failed", f"the deadline of {row['deadline']:g} s has passed"
    assert step is not None
    write(folder / "result.png", png(step.image))
    losses.append((step.iteration, step.scale, step.loss))
    tell(step)
    return "succeeded", None


def _steps(stylizer: Stylizer, content: bytes, styles: list[bytes], config: Config, path: Path) -> Iterator[Step]:
    """The steps of a run, from its checkpoint on if there is one."""
    if path.exists():
        try:
            return stylizer.steps(content, styles, config, resume=path.read_bytes())
        except ValueError as error:  # of another version or other weights
            log.warning("checkpoint left out of account: %s", error)
    return stylizer.steps(content, styles, config)


def _save(step: Step, path: Path) -> None:
    """Write a checkpoint; without room for it, the run goes on with the one before."""
    try:
        write(path, step.checkpoint())
    except OSError as error:
        log.warning("no checkpoint: %s", error)


class _Clock:
    """Estimates what is left of a run from what an iteration costs for each pixel."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._rate: float | None = None  # seconds for each iteration and squared pixel of the long side

    def tick(self, step: Step) -> None:
        """An iteration is done."""
        now = time.monotonic()
        rate = (now - self._last) / step.scale**2
        self._rate = rate if self._rate is None else 0.9 * self._rate + 0.1 * rate
        self._last = now

    def left(self, step: Step) -> float:
        """Seconds."""
        assert self._rate is not None
        return round(self._rate * step.scale**2 * (step.total - step.iteration), 2)


def png(image: Image.Image, fast: bool = False) -> bytes:
    """The picture as a PNG file."""
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1 if fast else 6)
    return stream.getvalue()


def warm_up(stylizer: Stylizer) -> None:
    """Compile and load what a first job would wait for."""
    samples = resources.files("engine.samples")
    content, style = ((samples / name).read_bytes() for name in ("content.jpg", "style.jpg"))
    stylizer(content, style, Config(size=256, iterations=1))


def main(data: str, number: str, workers: str, weights: str, device: str, precision: str, form: str) -> None:
    """Be worker `number` of `workers`: everything comes from the command line that the server gives."""
    logs.set_up(form)
    stop = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server says when
    signal.signal(signal.SIGTERM, lambda *_: stop.set())

    def watch() -> None:
        sys.stdin.buffer.read()
        stop.set()

    threading.Thread(target=watch, daemon=True).start()
    with FileLock(Path(data) / f"worker-{number}.lock"):  # the one before may still be writing its checkpoint
        if stop.is_set():
            return
        from engine.stylizer import Stylizer

        threads = None if workers == "1" else max(1, len(os.sched_getaffinity(0)) // int(workers))
        stylizer = Stylizer(weights, device, precision, threads=threads)
        warm_up(stylizer)
        store = Store(data)
        store.announce(int(number), stylizer.device, stylizer.weights_name)
        log.info("worker ready", extra={"worker": int(number), "device": stylizer.device})
        work(store, stylizer, int(number), stop)
        store.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stderr.flush()
    os._exit(0)  # taking torch apart in good order takes seconds, which a stopping server does not have
