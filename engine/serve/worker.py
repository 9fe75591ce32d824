"""A worker: one process that holds one `Stylizer` and takes jobs out of the store, until its standard input ends.

A process of its own, so that native code that breaks takes no other job with it, and so that the server answers while
Python computes. Its standard input is the rope: the server lets go of it to stop the worker, and so does the kernel
when the server was killed. Either way the running job is checkpointed and waits for the next worker.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import math
import os
import shutil
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock

from engine import image, manifest, painting, provider, samples
from engine.config import Config
from engine.export.commands import wrong_file
from engine.jobs import Job, brief

from . import logs
from .store import Row, Store, full, sync, write
from .supervisor import MISTAKE, PATIENCE

if TYPE_CHECKING:
    from PIL import Image

    from engine import Step, Stylizer

log = logging.getLogger(__name__)
_T = TypeVar("_T")

_POLL = 0.05  # seconds between two looks at an empty queue
_REPORT = 0.1  # seconds between two reports of the loss
_PREVIEW = 0.5  # seconds between two pictures so far
_CHECKPOINT = 5.0  # seconds between two checkpoints
_ROOM = 1.0  # seconds after which what found the disk full, or the store busy, is tried again
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


def work(store: Store, stylizer: Stylizer, number: int, stop: threading.Event, reserve: int = 0) -> None:
    """Do jobs until `stop` is set; the last `reserve` bytes of the disk are for their results.

    Raises what one job did to the device, if that works no more.
    """
    while not stop.is_set():
        row = _written(lambda: store.claim(number), stop)
        if row is None:
            stop.wait(_POLL)
        else:
            run(store, stylizer, row, stop, reserve)


def run(store: Store, stylizer: Stylizer, row: Row, stop: threading.Event, reserve: int = 0) -> None:
    """Run one job from its start or its checkpoint to its end, or until `stop` is set and it is checkpointed.

    Raises what broke the device: the supervisor then puts the job back as one over which a worker died.
    """
    job, start = row["id"], time.monotonic()
    log.info("job started", extra={"job": job, "iteration": row["iteration"]})
    try:
        state, reason = _run(store, stylizer, row, stop, reserve)
    except MemoryError:
        state, reason = "failed", "not enough memory for this size"
    except Exception as error:  # whatever one job does must not hurt the next
        log.warning("job failed", exc_info=not isinstance(error, ValueError | ArithmeticError), extra={"job": job})
        if not provider.works(stylizer.device):
            raise
        state, reason = "failed", " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError):  # names a path, which is nobody's business
            reason = "the server could not read or write a file; its log has the rest"
    if state == "queued":
        _written(lambda: store.unclaim(row["worker"], crashed=False), stop)
    else:
        _written(lambda: store.finish(job, state, reason), stop, store.folder(job) / "checkpoint")
    log.info("job left", extra={"job": job, "state": state, "seconds": round(time.monotonic() - start, 3)})


def _written(write: Callable[[], _T], stop: threading.Event, spare: Path | None = None) -> _T | None:
    """What is got from writing to the store, as soon as its disk has room, for which a file may go that is to spare.

    None if `stop` is set before.
    """
    while True:
        try:
            return write()
        except sqlite3.OperationalError as error:  # full, or locked for long
            log.warning("store: %s", error)
            if spare is not None and full(error):
                spare.unlink(missing_ok=True)
            if stop.wait(_ROOM):
                return None


def _run(store: Store, stylizer: Stylizer, row: Row, stop: threading.Event, reserve: int) -> tuple[str, str | None]:
    """The state that the job is left in, and why."""
    job, folder = row["id"], store.folder(row["id"])
    config = Config(**json.loads(row["options"]))
    content, *styles = (
        image.load((folder / name).read_bytes()) for name in ("content", *(f"style-{i}" for i in range(row["styles"])))
    )
    task = Job(content, tuple(styles), "result.png")
    report, preview = _Every(_REPORT, first=True), _Every(_PREVIEW, first=True)
    checkpoint = _Every(_CHECKPOINT, first=False)
    losses: list[tuple[int, int, float]] = []
    number, start = row["preview"], time.monotonic()
    clock = painting.Clock(task, config)
    step: Step | None = None
    painted: float | None = None  # when it was: waiting for room is no running

    def seconds() -> float:
        return float(row["seconds"]) + (time.monotonic() if painted is None else painted) - start

    def show(step: Step, fast: bool) -> None:
        nonlocal number
        with _optional("preview"):
            _spare(folder / "preview.png", lambda: png(step.image, fast), reserve)
            number += 1

    def tell(step: Step) -> None:
        values: Row = {"scale": step.scale, "iteration": step.iteration, "total": step.total}
        if math.isfinite(step.loss):  # else the run falls back to fp32, or breaks
            losses.append((step.iteration, step.scale, step.loss))
            values["loss"] = step.loss
        with _optional("progress"):
            store.progress(job, {**values, "eta": clock.left(step), "preview": number, "seconds": seconds()}, losses)
            losses.clear()

    for step in _steps(stylizer, task, config, folder / "checkpoint"):
        clock.tick(step)
        for _ in preview.due():
            show(step, fast=True)
        for _ in report.due():
            tell(step)
        if store.cancelled(job):
            show(step, fast=False)
            tell(step)
            return "cancelled", None
        if step.iteration == step.total:
            continue  # it is done: nothing may stop it any more
        if stop.is_set():
            _save(step, folder / "checkpoint", reserve)
            tell(step)
            return "queued", None
        for _ in checkpoint.due():
            tell(step)  # a run that goes on from here makes these losses no more
            _save(step, folder / "checkpoint", reserve)
        if seconds() > row["deadline"]:
            tell(step)
            return "failed", f"the deadline of {row['deadline']:g} s has passed"
    assert step is not None
    painted = time.monotonic()
    tell(step)
    known = {iteration: loss for iteration, _, loss in (*store.losses(job), *losses)}
    result = png(step.image, record=step.manifest(sorted(known.items()), seconds()))
    while not _kept(folder, result):  # a painted picture waits for room, instead of being lost
        if store.cancelled(job):
            return "cancelled", None
        if stop.wait(_ROOM):
            return "queued", None
        tell(step)
    return "succeeded", None


def _kept(folder: Path, result: bytes) -> bool:
    """Whether there is room for the result: a checkpoint, which is hundreds of times its size, goes for it."""
    for _ in range(2):
        try:
            write(folder / "result.png", result)
            return True
        except OSError as error:
            if not full(error):
                raise
            log.warning("no room for a result: %s", error)
            (folder / "checkpoint").unlink(missing_ok=True)
    return False


def _steps(stylizer: Stylizer, task: Job, config: Config, path: Path) -> Iterator[Step]:
    """The steps of a run, from its checkpoint on if there is one."""
    if path.exists():
        try:
            return painting.begin(stylizer, task, config, path.read_bytes())
        except ValueError as error:  # of another version, other weights or another precision
            log.warning("checkpoint left out of account: %s", error)
    return painting.begin(stylizer, task, config)


@contextlib.contextmanager
def _optional(what: str) -> Iterator[None]:
    """Something that is not written, for want of room, does not stop the run."""
    try:
        yield
    except (OSError, MemoryError, sqlite3.Error) as error:
        log.warning("no %s: %s", what, error)


def _save(step: Step, path: Path, reserve: int) -> None:
    with _optional("checkpoint"):
        room = _room(path, reserve)  # before a GPU is waited for
        with image.atomic(path) as temporary:
            step.save_checkpoint(temporary, room=room)
        sync(path.parent)


def _spare(path: Path, make: Callable[[], bytes], reserve: int) -> None:
    """Write what can be done without, but not into the room that is reserved. Raises OSError."""
    _room(path, reserve)
    data = make()
    _room(path, reserve + len(data))
    write(path, data)


def _room(path: Path, reserve: int) -> int:
    """Bytes of the disk beside those that are reserved. Raises OSError if there are less."""
    room = shutil.disk_usage(path.parent).free - reserve
    if room < 0:
        raise OSError(errno.ENOSPC, "the rest of the disk is reserved", path.name)
    return room


def png(picture: Image.Image, fast: bool = False, record: Mapping[str, Any] | None = None) -> bytes:
    """The picture as a PNG file, with its manifest if one is given."""
    stream = io.BytesIO()
    image.write(picture, stream, "PNG", compress_level=1 if fast else 6, **manifest.embed("PNG", record))
    return stream.getvalue()


def warm_up(stylizer: Stylizer) -> None:
    """Compile and load what a first job would wait for."""
    stylizer(*samples.pair(), Config(size=256, iterations=1))


def main(
    data: str, number: str, workers: str, weights: str, device: str, precision: str, reserve: str, form: str
) -> int:
    """Be worker `number` of `workers`: everything comes from the command line that the server gives.

    Returns 0, or MISTAKE if no worker can start with what was given.
    """
    logs.set_up(form)
    stop = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server says when
    signal.signal(signal.SIGTERM, lambda *_: stop.set())

    def watch() -> None:
        sys.stdin.buffer.read()
        stop.set()
        time.sleep(PATIENCE)
        log.error("worker has not stopped in time")
        os._exit(1)  # where no server is left that would kill it

    threading.Thread(target=watch, daemon=True).start()
    with FileLock(Path(data) / f"worker-{number}.lock"):  # the one before may still be writing its checkpoint
        if stop.is_set():
            return 0
        import torch

        from engine import BackendError
        from engine.export.weights import cache_folder
        from engine.stylizer import Stylizer

        # CuPy makes its folder when it is imported, in a home that a service may have to leave alone.
        os.environ.setdefault("CUPY_CACHE_DIR", str(cache_folder() / "cupy"))
        threads = None if workers == "1" else max(1, torch.get_num_threads() // int(workers))
        try:
            stylizer = Stylizer(weights, device, precision, threads=threads)
        except (ValueError, TypeError, OSError, BackendError) as error:
            if isinstance(error, OSError) and not wrong_file(error):  # a download, say, that may do the next time
                raise
            log.error("worker cannot start: %s", brief(error))  # a mistake has no traceback
            return MISTAKE
        warm_up(stylizer)
        store = Store(data)
        store.announce(int(number), stylizer.device, stylizer.weights_name)
        log.info("worker ready", extra={"worker": int(number), "device": stylizer.device})
        devices = sorted({each["device"] for each in store.workers()})
        if len(devices) > 1:
            log.warning("workers run on different devices: give as many --workers as GPUs", extra={"devices": devices})
        work(store, stylizer, int(number), stop, int(reserve))
        store.close()
        return 0


if __name__ == "__main__":
    status = 1
    try:
        status = main(*sys.argv[1:])
    except Exception:
        log.exception("worker broke")
    sys.stderr.flush()
    os._exit(status)  # taking torch apart in good order takes seconds, which a stopping server does not have
