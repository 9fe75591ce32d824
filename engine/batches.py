"""Many pictures by one loaded network: one after the other or several at a time, whatever becomes of each."""

from __future__ import annotations

import argparse
import functools
import json
import logging
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from . import image, manifest, replay
from .config import FITTED, Config
from .jobs import Job, brief, check_apart, is_frame, place, shard
from .painting import check_options, loaded, paint
from .presets import check_weights
from .stylizer import Stylizer

log = logging.getLogger(__name__)


def run(jobs: Sequence[Job], config: Config, given: argparse.Namespace) -> tuple[int, str]:
    """Make the pictures of the jobs that are not there yet, `given.jobs` at a time; exit status and message.

    With `given.shard` only its part of them, but the files of all are checked: other machines make the rest. One that
    fails does not stop the others; an interrupt leaves no picture unfinished.
    """
    part = shard(jobs, given.shard) if given.shard else jobs
    missing = [job for job in jobs if given.overwrite or not Path(job.out).is_file()]
    left = {job.out for job in missing}
    todo, there = [job for job in part if job.out in left], [job.out for job in part if job.out not in left]
    if there:
        log.info("%d of %d pictures are there already", len(there), len(part))
        if others := made_otherwise(there, config):
            log.warning(
                "%d of these were made with other options, or not by this program: --overwrite replaces them", others
            )
    sources = {each for job in jobs for each in (job.content, *job.styles)}
    if config.start_file is not None:
        sources.add(config.start_file)
    check_apart([("a picture to write", job.out) for job in missing], [("one to read", each) for each in sources])
    if given.save_every:
        outs = {place(job.out) for job in missing}
        for each in (*sources, *(job.out for job in jobs)):
            if is_frame(each, outs, given.save_every):
                raise ValueError(f"{each} has the name of a frame of --save-every: give -o another folder or pattern")
    check_options(config)
    if not todo:
        return 0, ""
    for job in todo:
        image.output_format(job.out)  # before a folder is made
    for folder in {Path(job.out).parent for job in todo}:
        folder.mkdir(parents=True, exist_ok=True)
    for job in todo:
        for path in image.written(job.out):
            image.check_writable(path, given.overwrite or (path != job.out and _is_manifest(path)))
    threads = None if given.jobs == 1 else max(1, torch.get_num_threads() // min(given.jobs, len(todo)))
    stylizer = Stylizer(given.weights, given.device, given.precision, threads)
    if given.preset:
        check_weights(given.preset, stylizer.weights_kind)
    start, stop = time.perf_counter(), threading.Event()
    failures: list[str] = []
    done = 0

    def make(job: Job) -> tuple[int, str]:
        try:
            if stop.is_set():
                return 130, ""
            return paint(stylizer, loaded(job), config, given, whole_only=True, stop=stop)
        except Exception as error:
            return 1, brief(error)

    with ThreadPoolExecutor(given.jobs, "picture") as pool:
        waiting = {pool.submit(make, job): job for job in todo}
        try:
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    status, message = future.result()
                    job = waiting.pop(future)
                    if status:
                        failures.append(f"{job.out}: {message}")
                    done += not status
                    log.info("%d/%d %s", done + len(failures), len(todo), failures[-1] if status else job.out)
        except KeyboardInterrupt:
            stop.set()
            pool.shutdown(cancel_futures=True)  # waits for those that are nearly done
            done += sum(not each.cancelled() and not each.result()[0] for each in waiting)
            rest = "" if given.overwrite else ", the same command makes the rest"
            return 130, f"interrupted; {done} of {len(todo)} pictures are there{rest}"
    minutes = (time.perf_counter() - start) / 60
    log.info("%d pictures in %.1f s: %.2f a minute", done, 60 * minutes, done / minutes)
    if failures:
        return 1, f"{len(failures)} of {len(todo)} pictures failed:\n  " + "\n  ".join(failures)
    return 0, ""


def made_otherwise(outs: Iterable[str], config: Config) -> int:
    """How many of these pictures say that they were made with other options, or say nothing."""

    @functools.cache
    def wanted(weights: str) -> Any:
        own = config.for_weights(weights)  # the name of the embedded ones is their kind, too
        return json.loads(json.dumps(manifest.inputs(own, None, None)["options"]))  # as it is read

    def differs(out: str) -> bool:
        try:
            record = replay.read(out)
        except (OSError, ValueError):
            return True
        options = wanted(record["engine"]["weights"])
        chosen = {name: "auto" for name in FITTED if options[name] == "auto"}  # whatever it was
        return bool(record["options"] | chosen != options)

    return sum(map(differs, outs))


def _is_manifest(path: str) -> bool:
    """Whether a file is the manifest of a picture, which may be gone."""
    try:
        manifest.parse(Path(path).read_bytes(), path)
    except (OSError, ValueError):
        return False
    return True
