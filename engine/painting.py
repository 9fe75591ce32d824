"""One run of the command line: pictures in, progress on the way, picture, manifest, checkpoint, trace and plot out."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import checkpoint, image
from .config import Config
from .jobs import BREAKS, Job, brief, is_frame, numbered, place, same_file, tell

if TYPE_CHECKING:
    from .result import Step
    from .stylizer import Stylizer

log = logging.getLogger(__name__)

_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
_ROWS = "rows"  # of the note in a checkpoint


@dataclass
class Run:
    """A run of a job, as far as it came: `rows` holds scale, iteration, loss and seconds of each iteration.

    Those before a checkpoint come with that.
    """

    job: Job
    config: Config
    rows: list[dict[str, Any]] = field(default_factory=list)
    last: Step | None = None


def load(source: Any) -> Any:
    """A picture as `image.load` takes it, a file of style targets, or None for the word none."""
    if source is None or source == "none":
        return None
    from .targets import Targets, is_targets

    return Targets.load(source) if is_targets(source) else image.load(source)


def loaded(job: Job) -> Job:
    """The job with its sources loaded."""
    return replace(job, content=load(job.content), styles=tuple(load(style) for style in job.styles))


def check_options(config: Config) -> None:
    """Raise ValueError or OSError for options that suit no content with one style, before many are begun."""
    config.check_for_content()
    if config.init == "-":
        raise ValueError("init - can be read for one picture only, give a file")
    if config.start_file is not None:
        image.load(config.start_file)
    config.style_shares(1)
    config.for_styles(1)


def begin(stylizer: Stylizer, job: Job, config: Config, resume: bytes | None = None) -> Iterator[Step]:
    """The steps of a job whose sources are loaded."""
    return stylizer.steps(job.content, job.style, config, masks=job.masks, freeze=job.freeze, resume=resume)


def size(job: Job, config: Config) -> tuple[int, int]:
    """(width, height) of the picture of a job that could begin."""
    from .goal import final_size

    return final_size(*_shape(job, config))


def _shape(job: Job, config: Config) -> tuple[image.Picture, Config]:
    """The picture whose shape the result has, and the options with a size."""
    from .goal import canvas

    picture = job.content or canvas(config)
    return picture, config.sized(max(picture.size))


class Clock:
    """Estimates what is left of the run of a job from what an iteration costs for each pixel."""

    def __init__(self, job: Job, config: Config) -> None:
        picture, config = _shape(job, config)
        self._schedule = config.schedule(picture.aspect)
        self._last, self._scale = 0.0, 0
        self._rate: float | None = None  # seconds for each iteration and squared pixel of the long side

    def tick(self, step: Step) -> None:
        """An iteration is done."""
        now = time.monotonic()
        if step.scale == self._scale:  # the first one of a scale also opened networks and looked at styles
            rate = (now - self._last) / step.scale**2
            self._rate = rate if self._rate is None else 0.9 * self._rate + 0.1 * rate
        self._last, self._scale = now, step.scale

    def left(self, step: Step) -> float | None:
        """Seconds behind the step, None before anything can be said."""
        if self._rate is None:
            return None
        later = [(side, count) for side, count in self._schedule if side > step.scale]
        here = step.total - step.iteration - sum(count for _, count in later)
        return round(self._rate * sum(side**2 * count for side, count in [(step.scale, here), *later]), 2)


def paint(
    stylizer: Stylizer,
    job: Job,
    config: Config,
    given: argparse.Namespace,
    whole_only: bool = False,
    stop: threading.Event | None = None,
) -> tuple[int, str]:
    """Make the picture of a job whose sources are loaded.

    Returns exit status and message, 0 and nothing if all went well.

    An interrupted or broken run leaves the picture so far, unless `whole_only`. `stop` interrupts it from outside.
    """
    run = Run(job, config.for_weights(stylizer.weights_kind))
    start = saved = time.perf_counter()
    status, message = 0, ""
    kept = bool(given.resume and given.checkpoint and same_file(given.resume, given.checkpoint))
    steps = begin(stylizer, job, config, Path(given.resume).read_bytes() if given.resume else None)
    if given.resume:
        note = checkpoint.note(given.resume)
        run.rows += note.get(_ROWS, []) if isinstance(note, dict) else []  # another program's may have none
        start -= run.rows[-1]["seconds"] if run.rows else 0
    image.check_size(job.out, size(job, config))
    with _deferred(bool(given.checkpoint)) as asked:
        try:
            for step in progress(steps, given, job.out, Clock(job, config)):
                run.last, now = step, time.perf_counter()
                row = {"scale": step.scale, "iteration": step.iteration, "loss": _finite(step.loss)}
                stages = {name: round(value, 6) for name, value in step.stages.items()}
                run.rows.append(row | {"seconds": round(now - start, 4), "stages": stages})
                if given.save_every and step.iteration % given.save_every == 0:
                    with _spared(numbered(job.out, step.iteration)) as path:
                        image.save(step.picture, path)
                interrupted = asked() or (stop is not None and stop.is_set())
                if step.iteration == step.total:
                    continue  # there is nothing left to interrupt
                if given.checkpoint and (interrupted or now - saved >= given.checkpoint_every):
                    with _spared(given.checkpoint) as path:
                        with image.atomic(Path(path)) as temporary:
                            step.save_checkpoint(temporary, {_ROWS: run.rows})
                        kept = True
                    saved = time.perf_counter()
                if interrupted:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            status, message = 130, "interrupted" if run.last else "interrupted before there was a picture"
        except BREAKS as error:
            if run.last is None:
                raise
            status, message = 1, brief(error)
    if run.last is not None and not (status and whole_only):
        losses = [(row["iteration"], math.nan if row["loss"] is None else row["loss"]) for row in run.rows]
        image.save(run.last.picture, job.out, run.last.manifest(losses, time.perf_counter() - start))
        message = message and f"{message}; the picture so far is in {job.out}"
        if status and kept:
            message += f", and --resume {given.checkpoint} goes on"
        if given.trace:
            _write(given.trace, _trace(stylizer, run))
        if given.plot:
            plot(run.rows, given.plot)
    if given.checkpoint and not status:
        Path(given.checkpoint).resolve().unlink(missing_ok=True)
    return status, message


def _finite(loss: float) -> float | None:
    """The loss for JSON, which has no NaN: None where a GPU met one, before the run falls back or breaks."""
    return loss if math.isfinite(loss) else None


@contextlib.contextmanager
def _spared(path: str) -> Iterator[str]:
    """Warn where `path` cannot be written: the run, which does not need it, goes on."""
    try:
        yield path
    except (OSError, MemoryError) as error:
        log.warning("%s could not be written: %s", path, getattr(error, "strerror", None) or brief(error))


@contextlib.contextmanager
def _deferred(wanted: bool) -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C wait for the end of an iteration, where a checkpoint can be taken; the second one is told
    at once. Yields whether there was one."""
    count: list[int] = []
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def note(number: int, frame: Any) -> None:
        if count:
            raise KeyboardInterrupt
        count.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(count)
    finally:
        signal.signal(signal.SIGINT, before)


def progress(steps: Iterator[Step], given: argparse.Namespace, out: str, clock: Clock) -> Iterator[Step]:
    """The steps, with a bar on a terminal or a line of JSON each."""
    if given.progress == "json":
        start = time.perf_counter()
        for step in steps:
            clock.tick(step)
            record = {"out": out, "scale": step.scale, "iteration": step.iteration, "total": step.total}
            seconds = round(time.perf_counter() - start, 3)
            tell(record | {"loss": _finite(step.loss), "seconds": seconds, "left": clock.left(step)})
            yield step
        return
    from tqdm import tqdm

    with tqdm(disable=True if given.progress == "none" else None, unit="it", file=sys.stderr) as bar:
        for step in steps:
            clock.tick(step)
            bar.total = step.total
            bar.set_description(f"{step.scale} px", refresh=False)
            bar.set_postfix_str(f"loss {step.loss:.4g}", refresh=False)
            left = clock.left(step)  # tqdm's own takes all iterations for as long as those of the coarse scales
            bar.bar_format = _BAR.replace("{remaining}", "?" if left is None else tqdm.format_interval(left))
            bar.update()
            yield step


def check_plot(path: str) -> None:
    """Raise ValueError unless `plot` writes pictures of this name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = [f".{kind}" for kind in FigureCanvasAgg.get_supported_filetypes()]
    if Path(path).suffix.lower() not in known:
        raise ValueError(f"--plot {path}: unknown picture format; choose from {', '.join(known)}")


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Draw the loss of each iteration, a line for each scale, into a picture. Needs the extra `plot`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    for scale in sorted({row["scale"] for row in rows}):
        own = [row for row in rows if row["scale"] == scale]
        axes.plot([row["iteration"] for row in own], [row["loss"] for row in own], label=f"{scale} px")
    axes.set(xlabel="iteration", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    with image.atomic(Path(path)) as temporary:
        figure.savefig(temporary, dpi=100)


def check_frames(out: str, every: int) -> None:
    """Raise ValueError if a numbered frame is there that `paint` would write with --save-every."""
    for each in Path(out).parent.iterdir():
        if is_frame(str(each), {place(out)}, every):
            raise ValueError(f"{each} exists already; pass --overwrite to replace it")


def _write(path: str, data: bytes) -> None:
    with image.atomic(Path(path)) as temporary:
        temporary.write_bytes(data)


def _trace(stylizer: Stylizer, run: Run) -> bytes:
    from . import __version__

    record = {
        "version": __version__,
        "device": stylizer.device,
        "precision": run.last and run.last.precision,
        "weights": stylizer.weights_name,
        "config": asdict(run.config),
        "steps": run.rows,
    }
    return json.dumps(record, indent=1).encode()
