"""Uploads are decoded in processes of their own.

Pillow holds Python's lock for half a second over a large WebP, in which the server could answer nobody; and a decoder
that crashes, hangs or takes all memory must not take the server along.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import resource
import signal
import subprocess
import sys
import threading
from typing import Any

from .problems import Problem, check_picture
from .settings import environment

log = logging.getLogger(__name__)

DECODERS = 2  # uploads decoded at the same time
_SECONDS = 20.0  # that one may take
_ROOM = 2**29  # bytes of a decoder besides 24 for each pixel that it has to take


class Decoders:
    """The decoding processes of a server: the first starts now, the rest when needed, and again when they die."""

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels, self._closed = max_pixels, False
        self._lock = threading.Lock()
        self._all: set[subprocess.Popen[bytes]] = set()
        self._ready: set[subprocess.Popen[bytes]] = set()  # of them, those that have said so
        self._idle: queue.LifoQueue[subprocess.Popen[bytes] | None] = queue.LifoQueue()
        for _ in range(DECODERS - 1):
            self._idle.put(None)
        self._idle.put(self._spawn())  # so that the first upload does not wait for Python to start

    def check(self, name: str, data: bytes) -> tuple[int, int]:
        """(width, height) of an uploaded picture that can be decoded. Raises Problem."""
        process = self._idle.get()
        try:
            if process is None or process.poll() is not None:
                process = self._spawn(process)
            answer = self._ask(process, name, data)
        except (OSError, ValueError) as error:
            self._check_open()
            raise Problem(422, f"{name} is damaged, or takes too much time or memory to decode") from error
        finally:
            self._idle.put(process)
        if "detail" in answer:
            raise Problem(answer["status"], answer["detail"])
        return answer["width"], answer["height"]

    def close(self) -> None:
        """End the processes, those at work too."""
        with self._lock:
            self._closed = True
            for process in self._all:
                process.kill()
                _bury(process)

    def _check_open(self) -> None:
        if self._closed:
            raise Problem(503, "the server is stopping", retry_after=10)

    def _spawn(self, dead: subprocess.Popen[bytes] | None = None) -> subprocess.Popen[bytes]:
        with self._lock:
            self._check_open()
            if dead:
                self._all.discard(dead)
                self._ready.discard(dead)
                _bury(dead)
            command = [sys.executable, "-m", "engine.serve.decoder", str(self._max_pixels)]
            try:
                process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment())
            except OSError as error:  # too many processes, or too little memory
                raise _none_started() from error
            self._all.add(process)
            return process

    def _ask(self, process: subprocess.Popen[bytes], name: str, data: bytes) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        clock = threading.Timer(_SECONDS, process.kill)
        clock.start()
        try:
            if process not in self._ready:
                if not process.stdout.readline():  # it ends before
                    process.wait()
                    self._check_open()
                    raise _none_started()
                self._ready.add(process)
            process.stdin.write(json.dumps([name, len(data)]).encode() + b"\n")
            process.stdin.write(data)
            process.stdin.flush()
            return json.loads(process.stdout.readline())
        finally:
            clock.cancel()


def _none_started() -> Problem:
    """No fault of the upload's."""
    return Problem(503, "no decoder could be started", retry_after=5)


def _bury(process: subprocess.Popen[bytes]) -> None:
    """Close the pipes of a process that was killed, and take its status."""
    with contextlib.suppress(OSError, ValueError):  # of what was still to be written or read
        process.communicate()


def main(max_pixels: int) -> None:
    """Decode what comes on the standard input, until it ends: with the server, however that ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    room = _ROOM + 24 * max_pixels
    try:
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
    except (ValueError, OSError) as error:  # macOS has none; or there is a lower one
        log.warning("a decoder sets no limit to its memory: %s", error)
    print("ready", flush=True)  # noqa: T201
    while line := sys.stdin.buffer.readline():
        name, size = json.loads(line)
        try:
            width, height = check_picture(name, sys.stdin.buffer.read(size), max_pixels)
            answer: dict[str, Any] = {"width": width, "height": height}
        except Problem as problem:
            answer = {"status": problem.status_code, "detail": problem.detail}
        print(json.dumps(answer), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(int(sys.argv[1]))
