"""Where the time of an iteration goes: seconds by stage."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Stages:
    """Adds up the seconds of each stage of an iteration: forward, losses, cotangents, vjp, optimiser.

    A stage inside another one counts for itself alone. On a GPU, which works behind the host's back, nothing is
    measured.
    """

    def __init__(self, *, measures: bool) -> None:
        self._measures = measures
        self._seconds: dict[str, float] = {}
        self._inside = 0.0  # seconds of finished stages inside the current one

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What happens inside is part of this stage."""
        if not self._measures:
            yield
            return
        outside, self._inside, start = self._inside, 0.0, time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds - self._inside
        self._inside = outside + seconds

    def take(self) -> dict[str, float]:
        """The sums since the last call."""
        taken, self._seconds, self._inside = self._seconds, {}, 0.0
        return taken
