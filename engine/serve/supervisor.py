"""Keeps the workers alive, and the store tidy: what the server does when nobody asks for anything."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from .settings import Settings, environment
from .store import Store

log = logging.getLogger(__name__)

_LOOK = 0.2  # seconds between two looks at the workers
_TIDY = 5.0  # seconds between two removals of old jobs
PATIENCE = 7.0  # seconds that a worker has for its checkpoint before it is killed
MISTAKE = 2  # exit status of a worker that was given what it cannot start with
_HANGS = 1800.0  # seconds without a sign of life, from a job or before the first one, after which it is killed


class Supervisor:
    """Starts the workers, starts them again when they die, and stops them."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store, self._settings = store, settings
        self._stop = threading.Event()
        self._workers: dict[int, subprocess.Popen[bytes]] = {}
        self._failures: dict[int, int] = {}
        self._again: dict[int, float] = {}
        self._mistaken: set[int] = set()  # workers that could not start
        self._began = False  # whether one was ever ready
        self._signs: dict[int, tuple[Any, float]] = {}  # the last one of each worker, and since when it is the last
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    @property
    def mistake(self) -> bool:
        """Whether no worker can start with these settings, so that the server ends."""
        return not self._began and len(self._mistaken) == self._settings.workers

    def start(self) -> None:
        """Start the workers."""
        self._thread.start()

    def stop(self) -> None:
        """Let the workers checkpoint what they run; kill those that do not."""
        self._stop.set()
        self._thread.join()
        died = {number: bool(process.poll()) for number, process in self._workers.items()}  # before they were asked to
        for process in self._workers.values():
            assert process.stdin is not None
            process.stdin.close()
        end = time.monotonic() + PATIENCE
        for number, process in self._workers.items():
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("worker killed", extra={"worker": number})
                process.kill()
                process.wait()
            with _apart():
                self._store.unclaim(number, crashed=died[number])

    def _watch(self) -> None:
        tidy, clock = 0.0, _Clock(3600 * self._settings.keep)
        while not self._stop.wait(_LOOK):
            for number in range(self._settings.workers):
                with _apart():
                    self._look(number)
            if time.monotonic() >= tidy:
                tidy = time.monotonic() + _TIDY
                with _apart():
                    gone = self._store.expire(clock.now() - 3600 * self._settings.keep)
                    if gone:
                        log.info("old jobs removed", extra={"jobs": gone})

    def _look(self, number: int) -> None:
        process = self._workers.get(number)
        if process is not None and process.poll() is not None:
            workers = self._store.workers()
            ready = any(worker["number"] == number for worker in workers)
            self._began = self._began or bool(workers)
            self._store.unclaim(number, crashed=True)  # first: on a full disk this look ends here, and comes again
            del self._workers[number]
            if process.stdin is not None:
                process.stdin.close()
            self._failures[number] = 0 if ready else self._failures.get(number, 0) + 1
            pause = min(60.0, 2.0 ** self._failures[number] - 1)  # one that never gets ready is not hurried
            self._again[number] = time.monotonic() + pause
            log.error("worker died", extra={"worker": number, "status": process.returncode, "again_in": pause})
            if process.returncode == MISTAKE:
                self._mistaken.add(number)
            if self.mistake:
                os.kill(os.getpid(), signal.SIGTERM)
        elif process is not None and self._hangs(number):
            log.error("worker hangs", extra={"worker": number})
            process.kill()  # which the next look finds
        elif process is None and time.monotonic() >= self._again.get(number, 0.0):
            self._signs.pop(number, None)
            self._workers[number] = self._spawn(number)

    def _hangs(self, number: int) -> bool:
        """Whether a worker that is at work, or on its way to be ready, has done nothing for long."""
        sign, now = self._store.sign(number), time.monotonic()
        if number not in self._signs or self._signs[number][0] != sign:
            self._signs[number] = sign, now
        return sign is not None and now - self._signs[number][1] > _HANGS

    def _spawn(self, number: int) -> subprocess.Popen[bytes]:
        settings = self._settings
        own = environment()
        cards = [card for card in own.get("CUDA_VISIBLE_DEVICES", str(number)).split(",") if card]
        if settings.workers > 1:
            own["CUDA_VISIBLE_DEVICES"] = cards[number % len(cards)] if cards else ""  # none is a choice, too
        words = [settings.data, number, settings.workers, settings.weights, settings.device, settings.precision]
        words += [settings.reserve, settings.log]
        command = [sys.executable, "-m", "engine.serve.worker", *map(str, words)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, env=own)


class _Clock:
    """The time that tells what is overdue. A clock that is set forward is believed once it has stayed so for a while.

    That is for `patience` seconds, twice that at most, and may just be a clock that was behind when the server started.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._ahead = self._before = time.time() - _uptime()  # the least that it was, in this turn and in the last one
        self._turn = _uptime() + patience

    def now(self) -> float:
        """As the clock would say had it not been set forward."""
        ahead = time.time() - _uptime()
        self._ahead = min(self._ahead, ahead)
        if _uptime() >= self._turn:
            self._before, self._ahead, self._turn = self._ahead, ahead, _uptime() + self._patience
        return min(self._before, self._ahead) + _uptime()


def _uptime() -> float:
    """Seconds that go on while the machine sleeps, where it has such a clock."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """What fails here, on a full disk, say, ends neither the watch nor what comes after it."""
    try:
        yield
    except Exception:
        log.exception("supervisor")
