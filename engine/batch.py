"""`python -m engine.batch`: contents x styles, on processes of this machine or the actors of a Ray cluster.

A worker holds one `Stylizer` and has one picture in hand; the rest waits here. Pictures are written under their final
name in one go, each with its manifest, and a rerun paints only those that are not there.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import logging
import multiprocessing
import signal
import sys
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from . import jobs
from .config import Config, check_option
from .export.commands import Parser, install_line
from .jobs import Job, brief, ended_softly, fail

log = logging.getLogger(__name__)

_NAME = "engine.batch"
_TRIES = 3  # workers that may die over one picture before it is given up


class DiedError(Exception):
    """A worker is gone, by a crash or with its machine."""


class StartError(Exception):
    """A worker could not start where another one may: for want of memory, say."""


class Painter:
    """What a worker holds. Runs in its process or actor, by default on its share of the threads, one of `sharing`."""

    def __init__(
        self, weights: str, device: str, precision: str, config: Config, threads: int | None, sharing: int = 1
    ) -> None:
        import torch

        from .stylizer import Stylizer

        self._config = config
        self._failed: ValueError | StartError | None = None
        share = max(1, torch.get_num_threads() // sharing)
        try:
            self._stylizer = Stylizer(weights, device, precision, threads=threads or share)
        except (ValueError, TypeError) as error:
            self._failed = ValueError(brief(error))
        except (OSError, RuntimeError) as error:  # BackendError is a RuntimeError
            self._failed = StartError(brief(error))

    def paint(self, task: Job) -> str | ValueError | StartError:
        """Paint one picture, with its manifest: an empty string, or why it cannot be painted.

        Where this worker can paint none the answer is an exception: ValueError if there is something wrong with what it
        was given, and so with every other worker.
        """
        from . import image, manifest, painting, provider

        if self._failed:
            return self._failed
        try:
            start, losses = time.perf_counter(), []
            job = replace(task, content=_load(task.content), styles=tuple(map(_load, task.styles)))
            for step in painting.begin(self._stylizer, job, self._config):
                losses.append((step.iteration, step.loss))
            record, stream = step.manifest(losses, time.perf_counter() - start), io.BytesIO()
            image.write(step.image, stream, "PNG", **manifest.embed("PNG", record))
            _write(task.out, stream.getvalue())
        except Exception as error:  # one picture's failure is recorded, the others go on
            if not isinstance(error, ValueError | TypeError | OSError) and not provider.works(self._stylizer.device):
                raise  # and this worker ends: it would fail all that follows
            return brief(error)
        return ""


class Processes:
    """Workers on this machine."""

    def __init__(self, *make: Any) -> None:
        self._make = make
        self._context = multiprocessing.get_context("spawn")
        self._busy: dict[Any, Any] = {}  # by connection

    def start(self) -> Any:
        """A new worker."""
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, *self._make), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        return ours, process

    def send(self, worker: Any, task: Job) -> None:
        """Give an idle worker a task."""
        self._busy[worker[0]] = worker
        try:
            worker[0].send(task)
        except OSError:  # dead already: `outcome` will say so
            log.debug("a worker died while it was idle")

    def outcome(self) -> tuple[Any, str | ValueError | DiedError]:
        """The next worker that is done, and its answer."""
        worker = self._busy.pop(wait(list(self._busy))[0])
        try:
            return worker, worker[0].recv()
        except (EOFError, OSError):
            worker[1].join()
            return worker, DiedError(f"status {worker[1].exitcode}")

    def stop(self, worker: Any) -> None:
        """End a worker that is idle, if it has not ended itself."""
        worker[0].close()
        worker[1].join()


def _serve(connection: Connection, *make: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the driver ends its workers
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # half-written files are removed
    painter = Painter(*make)
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        answer = painter.paint(task)
        with contextlib.suppress(BrokenPipeError):  # of a driver that is gone: `recv` will say so
            connection.send(answer)


class Actors:
    """Workers on a Ray cluster: one for each device."""

    def __init__(self, address: str, cpus: float, gpus: float, *make: Any) -> None:
        import ray

        self._ray, self._make = ray, make
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
            log.warning("no node of the cluster has %g processors and %g GPUs: waiting for one", cpus, gpus)
        self._actor = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0)(Painter)
        self._busy: dict[Any, Any] = {}

    def start(self) -> Any:
        """A new worker, on a node that has room for it."""
        return self._actor.remote(*self._make)

    def send(self, worker: Any, task: Job) -> None:
        """Give an idle worker a task."""
        self._busy[worker.paint.remote(task)] = worker

    def outcome(self) -> tuple[Any, str | ValueError | DiedError]:
        """The next worker that is done, and its answer."""
        (reference,), _ = self._ray.wait(list(self._busy), num_returns=1)
        worker = self._busy.pop(reference)
        try:
            return worker, self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return worker, DiedError(str(error).splitlines()[0])

    def stop(self, worker: Any) -> None:
        """End a worker."""
        self._ray.kill(worker)


def drive(pool: Processes | Actors, tasks: Sequence[Job], workers: int) -> Iterator[tuple[Job, str]]:
    """Run the tasks, one in the hand of each worker: each with an empty string or why it failed.

    A worker that dies is replaced and its task goes to the end of the list; after the third it is given up. One that
    cannot start leaves its task to the others. Raises the ValueError of a worker that was given something wrong, as
    others would be, too, and a StartError if there is no other worker: at once if none has painted, else the third; or
    if workers have died over three contents and none has answered or is at work: they die by themselves.
    """
    left, tries = deque(tasks), dict.fromkeys(tasks, 0)
    answered, painted, starts = False, False, 0
    hands: dict[int, Job] = {}
    for _ in range(min(workers, len(tasks))):
        worker, task = pool.start(), left.popleft()
        hands[id(worker)] = task
        pool.send(worker, task)
    while hands:
        worker, answer = pool.outcome()
        task = hands.pop(id(worker))
        if isinstance(answer, ValueError):
            raise answer
        if isinstance(answer, StartError):
            pool.stop(worker)
            log.warning("a worker could not start: %s", answer)
            left.append(task)
            if hands:
                continue
            starts += 1
            if not painted or starts == _TRIES:
                raise answer
            worker = pool.start()  # what took its memory may be gone
        elif isinstance(answer, DiedError):
            pool.stop(worker)
            log.warning("a worker died over %s: %s", task.out, answer)
            tries[task] += 1
            over = {task.content for task, count in tries.items() if count}
            if not (answered or hands) and len(over) >= _TRIES:
                raise StartError(f"workers died over {len(over)} contents, and none has answered ({answer})")
            if tries[task] < _TRIES:
                left.append(task)
            else:
                yield task, f"{_TRIES} workers died over it ({answer})"
            worker = pool.start() if left else None
        else:
            answered, painted = True, painted or not answer
            yield task, answer
        if left:
            hands[id(worker)] = left.popleft()
            pool.send(worker, hands[id(worker)])
        elif worker is not None:
            pool.stop(worker)


def plan(contents: Sequence[str], styles: Sequence[str], out: str) -> list[Job]:
    """All pictures: each content (a file, a folder or an fsspec URL of either) in each style. Raises ValueError."""
    found: list[dict[str, str]] = [{}, {}]
    for sources, once in zip((contents, styles), found, strict=True):
        for each in itertools.chain.from_iterable(map(_pictures, sources)):
            once.setdefault(jobs.place(each), each)
    pattern = f"{out.rstrip('/')}/{{content}}--{{style}}.png"
    return jobs.plan([*found[0].values()], [*found[1].values()], pattern, {*contents, *styles})


def _files(url: str) -> tuple[Any, str]:
    """The file system of a path or URL, and the path in it."""
    import fsspec

    if "::" in url and "://" not in url:  # a file, which fsspec would take for a chain
        return fsspec.filesystem("file"), Path(url).absolute().as_posix()
    return fsspec.core.url_to_fs(url)


def _local(url: str) -> str:
    """The path of a file of this machine, however it is written; other URLs stay as they are."""
    files, path = _files(url)
    return str(path) if "file" in files.protocol else url


def _pictures(source: str) -> list[str]:
    files, path = _files(source)
    if not files.exists(path):
        raise ValueError(f"{source} does not exist")
    if not files.isdir(path):
        return [source]
    found = sorted(
        each["name"]
        for each in files.ls(path, detail=True)
        if jobs.is_picture(each["name"].rpartition("/")[2])
        and (each["type"] == "file" or files.isfile(each["name"]))  # a link is neither file nor folder
    )
    if not found:
        raise ValueError(f"{source} holds no picture")
    folder = source.rstrip("/")  # a URL as it was given: what comes from the server lacks its name and the login
    return [f"{folder}/{each.rpartition('/')[2]}" if "://" in source else each for each in found]


def _read(url: str) -> bytes:
    files, path = _files(url)
    return bytes(files.cat_file(path))


def _load(url: str) -> Any:
    """The picture there, by the name of its file."""
    from . import image

    return replace(image.load(_read(url)), name=url.rpartition("/")[2])


def _write(url: str, data: bytes) -> None:
    """Write a file in one go: under a temporary name beside it, and rename it where files are renamed."""
    from fsspec import AbstractFileSystem

    files, path = _files(url)
    folder, _, name = path.rpartition("/")
    files.makedirs(folder, exist_ok=True)
    if "file" in files.protocol:
        from .image import atomic

        with atomic(Path(path)) as temporary:
            temporary.write_bytes(data)
        return
    if type(files).mv is AbstractFileSystem.mv:  # copies: objects, as of S3, are there in full or not at all
        files.pipe_file(path, data)
        return
    half = f"{folder}/.stylize-{uuid.uuid4().hex}-{name}"
    try:
        files.pipe_file(half, data)
        files.mv(half, path)
    finally:
        if files.exists(half):
            files.rm_file(half)


def _check_writable(folder: str) -> None:
    """Raise OSError if no file can be written in a folder, which is made; leaves none behind that may be removed."""
    probe = f"{folder}/.stylize-{uuid.uuid4().hex}"
    _write(probe, b"")
    files, path = _files(probe)
    with contextlib.suppress(OSError):
        files.rm_file(path)


def _there(url: str) -> bool:
    """Whether a picture is there already. Raises ValueError if a folder is."""
    files, path = _files(url)
    if not files.exists(path):
        return False
    if files.isdir(path):
        raise ValueError(f"{url} is a folder")
    return True


def _config(text: str) -> Config:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--options is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise TypeError("--options has to be a JSON object")
    for name in values:
        check_option(name)
    return Config(**values)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(_NAME, (__doc__ or "").split("\n")[0])
    several = "files, folders or fsspec URLs"
    parser.add_argument("contents", nargs="+", metavar="CONTENT", help=f"pictures to paint: {several}")
    parser.add_argument("--styles", nargs="+", required=True, metavar="STYLE", help=several)
    parser.add_argument("-o", "--out", required=True, metavar="FOLDER", help="folder or URL of CONTENT--STYLE.png")
    parser.add_argument("--options", default="{}", metavar="JSON", help='fields of Config, as {"size": 512}')
    parser.add_argument("--workers", type=int, default=1, help="processes or actors (default 1)")
    parser.add_argument("--threads", type=int, help="threads of a worker on a CPU (default: its share)")
    parser.add_argument("--ray", metavar="ADDRESS", help="run on the Ray cluster there; auto finds this machine's")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of an actor (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="paint those again that are there")
    parser.add_argument("--weights", default="auto", help="auto, embedded, imagenet or a file (default auto)")
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, onnxruntime, cudnn, cuda or tensorrt (default auto)"
    )
    parser.add_argument("--precision", default="auto", help="auto, fp32, fp16 or bf16 (default auto)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line: 0 all are painted, 1 some failed (the summary has them), 2 a mistake, 130 interrupted."""
    try:
        with ended_softly():
            return _run(_parser().parse_args(arguments))
    except KeyboardInterrupt:
        return fail(_NAME, 130, "interrupted")


def _run(given: argparse.Namespace) -> int:
    start = time.perf_counter()
    try:
        if not given.out or "{content}" in given.out or "{style}" in given.out:
            raise ValueError(f"-o {given.out!r}: give a folder, results are named CONTENT--STYLE.png")
        if given.workers < 1:
            raise ValueError(f"--workers {given.workers}: give a number from 1")
        if given.threads is not None and given.threads < 1:
            raise ValueError(f"--threads {given.threads}: give a number from 1")
        if given.gpus and not given.ray:
            raise ValueError(
                "--gpus is for the actors of --ray: without it workers share what CUDA_VISIBLE_DEVICES shows"
            )
        config = _config(given.options)
        from .batches import made_otherwise  # with torch: mistakes above are told at once
        from .painting import check_options

        check_options(config)
        tasks = plan(given.contents, given.styles, given.out)
        there = {task.out for task in tasks if _there(task.out)}
        if given.overwrite:
            there.clear()
        missing = [task for task in tasks if task.out not in there]
        sources = {each for task in tasks for each in (task.content, *task.styles)}
        sources |= {config.start_file} if config.start_file else set()
        jobs.check_apart(
            [("a picture to write", _local(task.out)) for task in missing],
            [("one to read", _local(each)) for each in sources],
        )
        if missing:
            _check_writable(given.out.rstrip("/"))
        if others := made_otherwise((out for out in there if "://" not in out), config):
            told = "%d of the pictures there were made with other options, or not by this program: %s"
            log.warning(told, others, "--overwrite paints all again")
        sharing = 1 if given.ray else min(given.workers, len(missing))  # an actor has processors of its own
        make = given.weights, given.device, given.precision, config, given.threads, sharing
        pool = Actors(given.ray, given.threads or 1, given.gpus, *make) if given.ray else Processes(*make)
    except ImportError as error:
        line = f"{error.name} is missing: {install_line('ray')}"
        return fail(_NAME, 2, line if error.name else brief(error))
    except (ValueError, TypeError, AttributeError, OSError) as error:
        return fail(_NAME, 2, brief(error))
    from tqdm import tqdm

    painted, failed, status, message = 0, {}, 0, ""
    answers = drive(pool, missing, given.workers)
    try:
        with ended_softly():  # again: Ray takes SIGTERM for itself
            for task, reason in tqdm(answers, total=len(missing), disable=None, file=sys.stderr):
                if reason:
                    failed[task] = reason
                else:
                    painted += 1
    except (ValueError, StartError) as error:
        status, message = 2, str(error)
    except KeyboardInterrupt:
        status, message = 130, "interrupted" + ("" if given.overwrite else "; the same command paints the rest")
    summary = {
        "painted": painted,
        "there_already": len(tasks) - len(missing),
        "failed": [{"content": task.content, "style": task.styles[0], "reason": failed[task]} for task in failed],
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(summary, indent=1))  # noqa: T201
    return fail(_NAME, status, message) if status else int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
