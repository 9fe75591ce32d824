"""Jobs, styles and their pictures in one folder: SQLite in WAL mode beside plain files.

A file is complete before the row that names it is written, and a row is gone before its files are, so that the store
is whole after a kill at any moment; what neither side names is swept when the server starts. Only what is overdue goes
before its row, whose removal may need the room.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

BALLAST = "store.sqlite-ballast"  # a file whose room a server that starts has on a full disk
_BALLAST = 2**22  # its bytes
UNFINISHED = ("queued", "running")
# Points against a job: for a worker that died over it, for a server that was killed while it ran (which may have been
# anybody's doing), and those with which it is given up.
_DIED, _DOWN, _ENOUGH = 10, 1, 20
_TURN = "coalesce((SELECT max(started) FROM jobs WHERE client = j.client), 0)"  # the client with the lowest goes first
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    client TEXT NOT NULL,
    key TEXT,                 -- Idempotency-Key
    fingerprint TEXT NOT NULL,  -- of the whole request
    options TEXT NOT NULL,    -- JSON of Config
    styles INTEGER NOT NULL,
    priority INTEGER NOT NULL,
    deadline REAL NOT NULL,   -- seconds of running
    state TEXT NOT NULL DEFAULT 'queued',  -- queued, running, succeeded, failed, cancelled
    cancel INTEGER NOT NULL DEFAULT 0,
    reason TEXT,
    worker INTEGER,
    crashes INTEGER NOT NULL DEFAULT 0,  -- in points: see _DIED
    scale INTEGER, iteration INTEGER NOT NULL DEFAULT 0, total INTEGER, loss REAL, eta REAL,
    preview INTEGER NOT NULL DEFAULT 0,  -- number of pictures written so far
    seconds REAL NOT NULL DEFAULT 0,     -- of running, over all attempts
    created REAL NOT NULL, started REAL, finished REAL,
    UNIQUE (client, key)
);
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, priority DESC, seq);
CREATE INDEX IF NOT EXISTS jobs_by_client ON jobs (client, started);
CREATE TABLE IF NOT EXISTS losses (
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    iteration INTEGER NOT NULL, scale INTEGER NOT NULL, loss REAL NOT NULL,
    PRIMARY KEY (job, iteration)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS styles (id TEXT PRIMARY KEY, width INTEGER, height INTEGER, created REAL NOT NULL);
CREATE TABLE IF NOT EXISTS workers (number INTEGER PRIMARY KEY, device TEXT, weights TEXT);
"""

Row = dict[str, Any]


class Store:
    """One process's door to the folder `data`: one connection, which any thread may use in its turn."""

    def __init__(self, data: str | Path) -> None:
        self.data = Path(data)
        for folder in (self.data, self.data / "jobs", self.data / "styles"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = threading.Lock()
        self._style_files = threading.Lock()  # a style's file and row come and go together
        self._database = sqlite3.connect(
            self.data / "store.sqlite", timeout=10, isolation_level=None, check_same_thread=False
        )
        self._database.row_factory = sqlite3.Row
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA foreign_keys = ON")
        self._database.executescript(_SCHEMA)

    def close(self) -> None:
        """Give the connection back."""
        with self._lock:
            self._database.close()

    @contextlib.contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """A write transaction, on the disk when it is left."""
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[Row]:
        with self._lock:
            return [dict(row) for row in self._database.execute(query, values)]

    def folder(self, job: str) -> Path:
        """Where the pictures of a job are: `content`, `style-0`.., `preview.png`, `result.png`, `checkpoint`."""
        return self.data / "jobs" / job

    def recover(self) -> None:
        """Put back what was running, and remove what a killed process left half done or did not come to remove.

        A job that was running when the server went down too often is given up: it may be what took all memory. Waits
        for workers that outlived their server, which hold a lock each. Only for a server that starts.
        """
        for path in self.data.glob("worker-*.lock"):
            with FileLock(path, timeout=30):
                pass
        # What is swept makes the room that the database may need.
        states = {row["id"]: row["state"] for row in self._rows("SELECT id, state FROM jobs")}
        for path in (self.data / "jobs").iterdir():
            if path.name not in states:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            elif states[path.name] not in UNFINISHED:
                self._tidy(path.name, states[path.name])
            else:
                _sweep(path)
        styles = {row["id"] for row in self.styles()}
        for path in (self.data / "styles").iterdir():
            if path.name not in styles:
                path.unlink()
        self._put_back(_DOWN, "the server went down again and again in this job")

    # Jobs, as the server sees them.

    def add(self, row: Row, content: bytes, styles: Sequence[bytes | str], limits: tuple[int, int]) -> Row:
        """Accept a job; `styles` are pictures or ids of stored styles. The job is on the disk when this returns.

        `limits` are those of the queue and of one client. Raises FullError, ConflictError for a key of another
        request, KeyError for an unknown style, OSError. The same key and request, at the same moment, give one job.
        """
        folder = self.folder(row["id"])
        folder.mkdir(mode=0o700)
        try:
            write(folder / "content", content)
            for i, style in enumerate(styles):
                if isinstance(style, str):
                    _link(self.data / "styles" / style, folder / f"style-{i}", style)
                else:
                    write(folder / f"style-{i}", style)
            sync(folder)
            sync(folder.parent)
            with self._write() as database:
                again = "SELECT 1 FROM jobs WHERE client = ? AND key = ?"
                if not database.execute(again, (row["client"], row["key"])).fetchone():  # else nothing is added
                    self._check_room(database, row["client"], *limits)
                names = ", ".join(row)
                database.execute(
                    f"INSERT INTO jobs ({names}, created) VALUES ({', '.join('?' * len(row))}, ?)",
                    (*row.values(), time.time()),
                )
        except sqlite3.IntegrityError:  # the same key, at the same moment
            shutil.rmtree(folder)
            known = self.known(row)
            if known is None:
                raise
            return known
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return self.job(row["id"])

    def known(self, row: Row) -> Row | None:
        """The job that a client's key and request have made. Raises ConflictError for a key of another request."""
        if row["key"] is None:
            return None
        found = self._rows("SELECT * FROM jobs WHERE client = ? AND key = ?", (row["client"], row["key"]))
        if found and found[0]["fingerprint"] != row["fingerprint"]:
            raise ConflictError("this Idempotency-Key came with another request")
        return found[0] if found else None

    def check_room(self, client: str, queue: int, per_client: int) -> None:
        """Raise FullError if no job of this client is taken now."""
        with self._lock:
            self._check_room(self._database, client, queue, per_client)

    def _check_room(self, database: sqlite3.Connection, client: str, queue: int, per_client: int) -> None:
        waiting = database.execute("SELECT count(*) FROM jobs WHERE state = 'queued'").fetchone()[0]
        own = database.execute(
            "SELECT count(*) FROM jobs WHERE state IN ('queued', 'running') AND client = ?", (client,)
        ).fetchone()[0]
        if own >= per_client:
            raise FullError(f"you have {own} unfinished jobs, which is the limit", yours=True)
        if waiting >= queue:
            raise FullError(f"{waiting} jobs are waiting, which is the limit", yours=False)

    def job(self, job: str) -> Row:
        """The row of a job. Raises KeyError."""
        found = self._rows("SELECT * FROM jobs WHERE id = ?", (job,))
        if not found:
            raise KeyError(job)
        return found[0]

    def place(self, row: Row) -> int:
        """How many jobs `claim` will take before this waiting one, if none comes any more."""
        query = f"""
            SELECT seq, client, priority, started IS NULL AS fresh, {_TURN} AS turn
            FROM jobs AS j WHERE state = 'queued' AND priority >= ? ORDER BY priority DESC, fresh, seq"""
        order = _in_turn(self._rows(query, (row["priority"],)))
        return next((i for i, each in enumerate(order) if each["seq"] == row["seq"]), 0)  # 0: it was taken meanwhile

    def losses(self, job: str, after: int = 0, most: int = -1) -> list[tuple[int, int, float]]:
        """(iteration, scale, loss) of a job, from iteration `after` + 1 on; the first ones, or all."""
        query = "SELECT iteration, scale, loss FROM losses WHERE job = ? AND iteration > ? ORDER BY iteration LIMIT ?"
        return [(row["iteration"], row["scale"], row["loss"]) for row in self._rows(query, (job, after, most))]

    def cancel(self, job: str) -> Row:
        """Cancel a waiting job at once, ask a running one to stop; a finished one stays. Raises KeyError."""
        with self._write() as database:
            waited = database.execute(
                "UPDATE jobs SET state = 'cancelled', eta = NULL, finished = ? WHERE id = ? AND state = 'queued'",
                (time.time(), job),
            ).rowcount
            database.execute("UPDATE jobs SET cancel = 1 WHERE id = ? AND state = 'running'", (job,))
        if waited:
            self._tidy(job, "cancelled")
        return self.job(job)

    def counts(self) -> dict[str, int]:
        """Number of jobs in each state."""
        return {row["state"]: row["n"] for row in self._rows("SELECT state, count(*) n FROM jobs GROUP BY state")}

    def mean_seconds(self) -> float:
        """Mean running time of the last finished jobs, 10 if there is none."""
        query = "SELECT seconds FROM jobs WHERE state = 'succeeded' ORDER BY finished DESC LIMIT 20"
        seconds = [row["seconds"] for row in self._rows(query)]
        return sum(seconds) / len(seconds) if seconds else 10.0

    def finished_since(self, moment: float) -> list[Row]:
        """State and times of the jobs that finished after a moment, oldest first."""
        names = "state, iteration, seconds, created, started, finished"
        return self._rows(f"SELECT {names} FROM jobs WHERE finished > ? ORDER BY finished", (moment,))

    def expire(self, before: float) -> int:
        """Remove jobs that finished before a moment, and their pictures: how many. Then, set room aside for a start."""
        old = [row["id"] for row in self._rows("SELECT id FROM jobs WHERE finished < ?", (before,))]
        for job in old:
            shutil.rmtree(self.folder(job), ignore_errors=True)
        if old:
            with self._write() as database:
                database.executemany("DELETE FROM jobs WHERE id = ?", [(job,) for job in old])
        ballast = self.data / BALLAST
        if not ballast.exists() and shutil.disk_usage(self.data).free > 2 * _BALLAST:
            with contextlib.suppress(OSError):
                write(ballast, os.urandom(_BALLAST))  # which no file system compresses
        return len(old)

    # Styles: pictures that jobs name by id. A job links to the file, so removing a style hurts no job.

    def add_style(self, style: str, size: tuple[int, int], picture: bytes) -> bool:
        """Keep a style: whether it is new."""
        with self._style_files:
            write(self.data / "styles" / style, picture)
            with self._write() as database:
                return bool(
                    database.execute(
                        "INSERT OR IGNORE INTO styles VALUES (?, ?, ?, ?)", (style, *size, time.time())
                    ).rowcount
                )

    def styles(self) -> list[Row]:
        """All styles, newest first."""
        return self._rows("SELECT * FROM styles ORDER BY created DESC")

    def remove_style(self, style: str) -> None:
        """Forget a style. Raises KeyError."""
        with self._style_files:
            with self._write() as database:
                if not database.execute("DELETE FROM styles WHERE id = ?", (style,)).rowcount:
                    raise KeyError(style)
            (self.data / "styles" / style).unlink(missing_ok=True)

    def style_size(self, style: str) -> tuple[int, int]:
        """(width, height) of a stored style. Raises KeyError."""
        found = self._rows("SELECT width, height FROM styles WHERE id = ?", (style,))
        if not found:
            raise KeyError(style)
        return found[0]["width"], found[0]["height"]

    # Jobs, as a worker sees them.

    def claim(self, worker: int) -> Row | None:
        """Take the next job: by priority, then the client that has waited longest for its turn, then age."""
        query = f"""
            UPDATE jobs SET state = 'running', worker = ?, started = coalesce(started, ?) WHERE seq = (
                SELECT seq FROM jobs AS j WHERE state = 'queued' ORDER BY priority DESC, started IS NULL,
                {_TURN}, seq LIMIT 1)
            RETURNING *"""
        if not self._rows("SELECT 1 FROM jobs WHERE state = 'queued' LIMIT 1"):
            return None
        with self._write() as database:
            row = database.execute(query, (worker, time.time())).fetchone()
            return dict(row) if row else None

    def unclaim(self, worker: int, crashed: bool) -> None:
        """Put back what a worker that is gone was running; what crashed twice is given up."""
        self._put_back(_DIED * crashed, "the worker died twice in this job", worker)

    def _put_back(self, points: int, reason: str, worker: int | None = None) -> None:
        """What a worker was running, or any, waits again with `points` more against it.

        But if it was asked to stop it is cancelled, and with enough points given up, for that `reason`.
        """
        query = f"""
            UPDATE jobs SET crashes = crashes + :points, eta = NULL, state = CASE
                WHEN cancel THEN 'cancelled' WHEN crashes + :points >= {_ENOUGH} THEN 'failed' ELSE 'queued' END
            WHERE state = 'running' AND (:worker IS NULL OR worker = :worker) RETURNING id, state"""
        end = "UPDATE jobs SET finished = ?, reason = ? WHERE id = ?"
        for row in self._rows("SELECT id FROM jobs WHERE state = 'running' AND worker = ?", (worker,)):
            _sweep(self.folder(row["id"]))  # first: it makes room, and nobody else can have the job yet
        with self._write() as database:
            left = [tuple(row) for row in database.execute(query, {"points": points, "worker": worker})]
            ended = [(job, state) for job, state in left if state not in UNFINISHED]
            for job, state in ended:
                database.execute(end, (time.time(), reason if state == "failed" else None, job))
            database.execute("DELETE FROM workers WHERE :worker IS NULL OR number = :worker", {"worker": worker})
        for job, state in ended:
            self._tidy(job, state)

    def sign(self, worker: int) -> tuple[str, int] | None:
        """What changes while a worker is at work: its job and when that told of itself last. None if it has none."""
        running = self._rows("SELECT id FROM jobs WHERE state = 'running' AND worker = ?", (worker,))
        if running:
            return running[0]["id"], self.folder(running[0]["id"]).stat().st_mtime_ns
        ready = self._rows("SELECT 1 FROM workers WHERE number = ?", (worker,))
        return None if ready else ("", 0)

    def cancelled(self, job: str) -> bool:
        """Whether a running job was asked to stop."""
        return bool(self._rows("SELECT 1 FROM jobs WHERE id = ? AND cancel", (job,)))

    def progress(self, job: str, values: Row, losses: Sequence[tuple[int, int, float]]) -> None:
        """Report columns of a running job, and losses (iteration, scale, loss)."""
        os.utime(self.folder(job))  # first: it is at work, though there may be no room to say how far it is
        with self._write() as database:
            names = ", ".join(f"{name} = ?" for name in values)
            database.execute(f"UPDATE jobs SET {names} WHERE id = ?", (*values.values(), job))
            database.executemany("INSERT OR REPLACE INTO losses VALUES (?, ?, ?, ?)", [(job, *each) for each in losses])

    def finish(self, job: str, state: str, reason: str | None) -> None:
        """End a running job."""
        os.utime(self.folder(job))
        with self._write() as database:
            database.execute(
                "UPDATE jobs SET state = ?, reason = ?, eta = NULL, finished = ? WHERE id = ? AND state = 'running'",
                (state, reason, time.time(), job),
            )
        self._tidy(job, state)

    def _tidy(self, job: str, state: str) -> None:
        """Of the files of a job that has ended only the last picture stays."""
        last = "result.png" if state == "succeeded" else "preview.png"
        for path in self.folder(job).iterdir():
            if path.name != last:
                path.unlink()

    def announce(self, worker: int, device: str, weights: str) -> None:
        """Say that a worker has its model loaded."""
        with self._write() as database:
            database.execute(
                "REPLACE INTO workers (number, device, weights) VALUES (?, ?, ?)", (worker, device, weights)
            )

    def workers(self) -> list[Row]:
        """The workers that are ready."""
        return self._rows("SELECT * FROM workers ORDER BY number")


class FullError(Exception):
    """There is no room for another job; `yours` if the client's own jobs are the reason."""

    def __init__(self, message: str, yours: bool) -> None:
        super().__init__(message)
        self.yours = yours


class ConflictError(Exception):
    """The request contradicts an earlier one."""


def full(error: BaseException) -> bool:
    """Whether an error says that the disk has no room."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, sqlite3.Error) and "full" in str(error)


def write(path: Path, data: bytes) -> None:
    """Write a file so that it is there in full or not at all, also after a power cut."""
    half = path.with_name(f".{path.name}-{os.getpid()}-{time.monotonic_ns()}")
    try:
        with half.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)
    sync(path.parent)


def _sweep(folder: Path) -> None:
    """Remove what `write` had not ended when its process was killed."""
    for half in folder.glob(".*"):
        half.unlink()


def _in_turn(waiting: Iterable[Row]) -> Iterator[Row]:
    """Jobs in the order in which `claim` takes them; given by priority, those that have started first, and age."""
    turns: dict[str, float] = {}
    moments = itertools.count(time.time())
    for (_, fresh), group in itertools.groupby(waiting, lambda job: (job["priority"], job["fresh"])):
        lines: dict[str, list[Row]] = {}
        for job in group:
            lines.setdefault(job["client"], []).append(job)
            turns.setdefault(job["client"], job["turn"])
        by_client = [lines[client] for client in sorted(lines, key=turns.__getitem__)]
        # Only a first start ends a client's turn.
        rounds: Iterable[Iterable[Row | None]] = itertools.zip_longest(*by_client) if fresh else by_client
        for job in filter(None, itertools.chain.from_iterable(rounds)):
            if fresh:
                turns[job["client"]] = next(moments)
            yield job


def _link(source: Path, target: Path, style: str) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError as error:
        raise KeyError(style) from error
    except OSError:  # of a file system without links
        write(target, source.read_bytes())


def sync(folder: Path) -> None:
    """Have what was renamed in a folder there after a power cut, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
