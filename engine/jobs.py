"""Lists of pictures to make: contents times styles, each with the file it goes to; what may go wrong with one.

Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIXES = (  # what is taken from a folder: all that can be read
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm", ".pbm",
    ".pnm", ".pfm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".avif", ".avifs",
)  # fmt: skip
VIDEOS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}  # that are written
_VIDEOS = (*VIDEOS, ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".flv", ".3gp", ".ogv")  # and read
BREAKS = (ArithmeticError, MemoryError, OSError, RuntimeError)  # what may end a run that had begun well


def is_picture(name: str) -> bool:
    """Whether a file of a folder is taken: not if it is hidden, as what macOS leaves beside pictures."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def is_video(name: str, written: bool = False) -> bool:
    """Whether a name is that of a video that can be read, or `written`."""
    return Path(name).suffix.lower() in (VIDEOS if written else _VIDEOS)


@dataclass(frozen=True)
class Job:
    """One picture to make: `content` in the shared style of `styles`, written to `out`.

    Sources are as for `painting.load`; `masks` and `freeze` as for `Stylizer.steps`.
    """

    content: Any
    styles: tuple[Any, ...]
    out: str
    masks: list[Any] | None = None
    freeze: Any = None

    @property
    def style(self) -> list[Any] | None:
        """The styles as `Stylizer.steps` takes them: None is no style."""
        return None if self.styles == (None,) else list(self.styles)


def product(contents: Sequence[str], styles: Sequence[str], out: str) -> list[Job]:
    """A job for each content with each style, in a fixed order.

    Contents and styles are files, folders (the pictures in them) and glob patterns; results of these jobs that lie
    among them are not, unless they are named. `out` is a file name that holds `{content}` or `{style}`, which stand for
    the names without suffix, or a folder, for `{content}--{style}.png` in it.

    Raises ValueError if a pattern finds nothing or two jobs would write one file, FileNotFoundError for a missing file.
    """
    return plan(_files(contents), _files(styles), out, {*contents, *styles})


def plan(contents: Sequence[str], styles: Sequence[str], out: str, named: Collection[str]) -> list[Job]:
    """The jobs of `product` for single files, which may be URLs if `out` is a pattern.

    Results of these jobs and frames of them are no sources, so that a second run makes nothing of them; those that the
    user has `named` are. Raises ValueError if two jobs would write one file, or if `out` is no folder and no pattern.
    """
    pattern = out
    if "{content}" not in out and "{style}" not in out:
        if out == "-" or ((is_video(out) or Path(out).suffix.lower() in SUFFIXES) and not Path(out).is_dir()):
            what = "video" if is_video(out) else "picture"
            raise ValueError(f"-o {out} is one {what}: give a folder, or a pattern with {{content}} and {{style}}")
        pattern = str(Path(out) / "{content}--{style}.png")
    where = functools.cache(place)
    asked = {where(each) for each in named}
    jobs = _each_with_each(contents, styles, pattern)
    # A result in the place of its own source is a mistake, which is told where files are checked.
    made = {where(job.out) for job in jobs if where(job.out) not in map(where, (job.content, *job.styles))}
    kept = [
        [each for each in found if where(each) in asked or not (where(each) in made or is_frame(each, made))]
        for found in (contents, styles)
    ]
    jobs = _each_with_each(kept[0], kept[1], pattern)
    seen: dict[str, Job] = {}
    for job in jobs:
        # Where file systems do not tell A.png from a.png they are one.
        file = job.out.lower() if sys.platform in ("win32", "darwin") and "://" not in job.out else job.out
        other = seen.setdefault(file, job)
        if other is not job:
            both = "{content}" in pattern and "{style}" in pattern
            way = "rename one of them" if both else "give -o a pattern with {content} and {style}"
            raise ValueError(
                f"{job.content} with {job.styles[0]} and {other.content} with {other.styles[0]} would both be written "
                f"to {job.out}: {way}"
            )
    return jobs


def _each_with_each(contents: Sequence[str], styles: Sequence[str], pattern: str) -> list[Job]:
    def target(content: str, style: str) -> str:
        stems = {"{content}": Path(content).stem, "{style}": Path(style).stem}
        return re.sub("{content}|{style}", lambda found: stems[found[0]], pattern)

    return [Job(content, (style,), target(content, style)) for content in contents for style in styles]


def place(path: str) -> str:
    """One spelling of the place of a file, whatever is there; URLs stay as they are."""
    return path if "://" in path else str(_resolved(Path(path).parent) / Path(path).name)


def _resolved(path: str | Path) -> Path:
    """Where a path leads to. Raises OSError for links in a circle, left to whoever opens it from Python 3.13 on."""
    try:
        return Path(path).resolve()
    except RuntimeError as error:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from error


def numbered(out: str, iteration: int) -> str:
    """The name of a frame of the picture `out`."""
    path = Path(out)
    return str(path.with_name(f"{path.stem}-{iteration:05d}{path.suffix}"))


def is_frame(path: str, outs: Collection[str], every: int = 1) -> bool:
    """Whether a file has the name of a frame, after a multiple of `every` iterations, of a picture at a `place`."""
    found = re.fullmatch(r"(.*)-(\d{5,})(\.[^./]*)?", place(path))
    if found is None or int(found[2]) % every or found[2] != f"{int(found[2]):05d}":
        return False
    return found[1] + (found[3] or "") in outs


def shard(jobs: Sequence[Job], part: str) -> list[Job]:
    """Part I/N of the jobs, I from 1: every N-th one. Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    index, count = (int(number) for number in found.groups()) if found else (0, 0)
    if not 1 <= index <= count:
        raise ValueError(f"--shard {part}: give I/N with I from 1 to N")
    return list(jobs[index - 1 :: count])


def brief(error: BaseException) -> str:
    """An exception as one line."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def fail(program: str, status: int, message: str) -> int:
    """Say on stderr, if it is open, why a program ends, and return its exit status."""
    if sys.stderr is not None:  # print would take stdout
        print(f"{program}: {message}", file=sys.stderr)  # noqa: T201
    return status


@contextlib.contextmanager
def ended_softly() -> Iterator[None]:
    """Take SIGTERM, by which containers and batch systems end a process, for Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_: int, frame: Any) -> None:
        handler = signal.getsignal(signal.SIGINT)
        if not callable(handler):  # a shell has its background jobs ignore Ctrl-C
            raise KeyboardInterrupt
        handler(signal.SIGINT, frame)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def tell(record: dict[str, Any]) -> None:
    """Write a record to stderr as a line of JSON, in one piece: several pictures may be under way."""
    sys.stderr.write(json.dumps(record) + "\n")
    sys.stderr.flush()


def same_file(one: str, other: str) -> bool:
    """Whether two paths lead to one file, which need not be there."""
    return _resolved(one) == _resolved(other)


def check_apart(written: Iterable[tuple[str, str]], read: Iterable[tuple[str, str]]) -> None:
    """Raise ValueError if a file would be written that is read or written as another; (what it is, path) of each."""
    known = {_resolved(path): name for name, path in read}
    for name, path in written:
        other = known.setdefault(_resolved(path), name)
        if other != name:
            raise ValueError(f"{path} is both {other} and {name}: give another file")


def _files(sources: Sequence[str]) -> list[str]:
    """The files that the sources name, each once, whatever it is called."""
    found: dict[str, str] = {}
    for source in sources:
        path = Path(source)
        if path.is_dir():
            names = [str(each) for each in sorted(path.iterdir()) if is_picture(each.name) and each.is_file()]
        elif is_video(source):
            raise ValueError(f"{source} is a video: give it as CONTENT, one at a time")
        elif path.exists() or not glob.has_magic(source):
            path.stat()  # raises FileNotFoundError with the name
            names = [source]
        else:
            matches = glob.glob(source, recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
            names = sorted(name for name in matches if Path(name).is_file())
        if not names:
            raise ValueError(f"{source}: no pictures there")
        for name in names:
            found.setdefault(place(name), name)
    return [*found.values()]
