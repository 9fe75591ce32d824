"""Videos: each frame begins as the one before it, carried along by the motion, and is held to it where that is certain.

So a frame takes a tenth of the iterations of a picture, and what is painted stays where it is on the things shown
(Ruder, Dosovitskiy, Brox 2016, *Artistic style transfer for videos*).
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import colour, film, image, manifest
from .config import FITTED, FRAME_ITERATIONS, MATCHED, TEMPORAL_WEIGHT, Config
from .goal import final_size, load_styles
from .image import Picture
from .jobs import BREAKS, VIDEOS, brief, check_apart, is_video, same_file, tell
from .motion import Carried, carry, opencv
from .presets import check_weights
from .stylizer import Stylizer

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

_RECORD = "video.json"  # in a folder of painted frames
_DIGITS = 16  # of the sha256 of a frame in it
_ELSEWHERE = "give another folder, or --overwrite"
_CUT = 0.25  # share of the pixels whose motion is certain under which a frame shows something else


@dataclass(frozen=True)
class Frame:
    """A painted frame: `picture` in float32, `image` in 8 bits, the `loss` of its last iteration.

    `kept` is the share of its pixels that were carried along with certainty, 0 for the first one and after a cut, and
    `flicker` the mean difference of those, in pixel values from 0 to 1, from where they were carried; 0 without any.
    """

    picture: Picture
    loss: float
    kept: float
    flicker: float

    @property
    def image(self) -> Image.Image:
        """The picture as PIL image."""
        return image.to_pil(self.picture)


class Video:
    """Paints the frames of a video in one style, one call after the other, by one thread; see `Stylizer` for the rest.

    The first frame, and one after a cut, is a run with `config`; the others have `iterations` at the last scale, and
    the temporal loss by `temporal_weight`. What is carried along is rounded to 8 bits, as files hold it. With colour
    `match` or `histogram` the style is brought to the colours of such a first frame.

    Raises ValueError for options that cannot be used, RuntimeError without OpenCV.
    """

    def __init__(
        self,
        stylizer: Stylizer,
        style: Any,
        config: Config | None = None,
        *,
        iterations: int = FRAME_ITERATIONS,
        temporal_weight: float = TEMPORAL_WEIGHT,
    ) -> None:
        if not 0 <= temporal_weight < math.inf:
            raise ValueError(f"temporal_weight {temporal_weight}: give a finite number that is not negative")
        opencv()  # now, not at the second frame
        self._stylizer, self._first, self._weight = stylizer, config or Config(), float(temporal_weight)
        self._colour = self._first.colour
        self._given = None if style is None else [*load_styles(style)]
        if self._given is not None:
            self._first.style_shares(len(self._given))
            self._first.for_styles(len(self._given))
        self._first.check_for_content()
        self._style: list[Any] | None = self._given  # of the frames behind a first one
        later = replace(self._first, scales=1, iterations=iterations, init="content", init_noise=0.0)
        self._later = replace(later, colour="none") if self._colour in MATCHED else later
        self._has_chosen = False
        self._before: tuple[Picture, Picture] | None = None  # the frame before, what was made of it

    def __call__(self, content: Any) -> Frame:
        """Paint the next frame: a picture as `Stylizer` takes it, of the size of those before.

        Raises as `Stylizer` does.
        """
        frame = image.load(content)
        now = self._fitted(frame)
        carried = self._carried(now, frame.name or "a frame")
        if carried is None:
            self._match(frame)
        self._choose(frame)
        config = self._first if carried is None else self._later
        style = self._given if carried is None else self._style
        (step,) = deque(self._stylizer.steps(frame, style, config, carried=carried), 1)
        made = image.load(image.to_pil(image.from_tensor(step.pixels)))
        self._before = now, made
        kept = flicker = 0.0
        if carried is not None:
            kept = float(carried.certain.mean())
            flicker = float((carried.certain[..., None] * abs(made.rgb - carried.picture.rgb)).mean()) / kept
        return Frame(step.picture, step.loss, kept, flicker)

    def _choose(self, frame: Picture) -> None:
        """Let the memory that there is at the first frame choose for all."""
        if self._has_chosen:
            return
        self._first = self._stylizer.fitted(frame, self._given, self._first)
        self._later = replace(self._later, **{name: getattr(self._first, name) for name in FITTED})
        self._has_chosen = True

    def take(self, content: Any, painted: Any) -> None:
        """Go on from a frame that was painted before; ValueError if its size is not that of the result.

        The picture has to be what was optimised, and to have had its style for all, so this is for colour `none` only.
        """
        now, picture = self._fitted(image.load(content)), image.load(painted)
        if self._colour != "none":
            raise ValueError(
                f"with colour {self._colour} a video cannot go on from its pictures, begin again (--overwrite)"
            )
        if picture.size != now.size:
            raise ValueError(
                f"the frame before was painted at {picture.size}, this one is {now.size}: --overwrite begins again"
            )
        self._before = now, picture

    def _fitted(self, frame: Picture) -> Picture:
        """What a frame shows to the objective, at the size of its result."""
        fitted = image.resize(frame, final_size(frame, self._first.sized(max(frame.size))))
        if fitted.alpha is not None and fitted.alpha.any():
            fitted = image.shown(fitted)
        return colour.grey(fitted) if self._colour == "keep-before" else fitted

    def _match(self, frame: Picture) -> None:
        """Bring the style to the colours of a first frame, for those after it; targets are refused by the run."""
        pictures = [each for each in self._given or () if isinstance(each, Picture)]
        if self._given is not None and self._colour in MATCHED:
            self._style = [*colour.prepare(self._colour, frame, pictures)[1]]

    def _carried(self, now: Picture, name: str) -> Carried | None:
        if self._before is None:
            return None
        before, made = self._before
        if before.size != now.size:
            raise ValueError(f"{name} gives {now.size} pixels, those before it {before.size}: crop them alike")
        carried = carry(made, before, now, self._weight)
        if carried.certain.mean() < _CUT:
            log.info("%s begins anew: a cut", name)
            return None
        return carried


def _check(given: argparse.Namespace, styles: Sequence[str], config: Config) -> int | None:
    """The frames there are, as `film.count` has them.

    Raises ValueError or OSError now if the video cannot be read, or what is made of it not be written.
    """
    source, out = given.content, given.out
    total = film.count(source)
    if config.start_file is not None and not Path(config.start_file).is_file():
        raise ValueError(f"--init {config.start_file}: a video may begin anew, give a file that can be read again")
    if is_video(out, written=True):
        if Path(source).is_dir():
            raise ValueError(f"{source} is a folder of frames, which have no times: give a folder with -o")
        check_apart([("OUT", out)], [("CONTENT", source), *(("a style", each) for each in styles)])
        image.check_writable(out, given.overwrite)
    elif not Path(out).is_dir():
        if Path(out).exists():
            raise ValueError(f"{out} is no folder")
        if out == "-" or Path(out).suffix:
            raise ValueError(f"-o {out}: give a folder, or a name that ends in {', '.join(VIDEOS)}")
    elif Path(source).is_dir() and same_file(out, source):
        raise ValueError(f"{out} holds the frames to read: give another folder")
    else:
        image.check_writable(str(Path(out) / _RECORD), overwrite=True)
    return total


def make(given: argparse.Namespace, styles: Sequence[str], config: Config) -> tuple[int, str]:
    """Paint a video or a folder of frames; exit status and message, 0 and nothing if all went well.

    Frames that are there already in a folder are left alone, and the next one goes on from them. What a run that broke,
    or was interrupted, has painted so far is written.
    """
    source, out = given.content, given.out
    total = _check(given, styles, config)
    loaded = None if list(styles) == ["none"] else [*load_styles(styles)]
    stylizer = Stylizer(given.weights, given.device, given.precision)
    if given.preset:
        check_weights(given.preset, stylizer.weights_kind)
    painter = Video(stylizer, loaded, config, iterations=given.frame_iterations, temporal_weight=given.temporal_weight)
    to_file = is_video(out, written=True)
    sink = film.video(out, source) if to_file else nullcontext(lambda shot, made: image.save(made, _file(out, shot)))
    status, message, done = 0, "", 0
    last: film.Shot | None = None
    record = _record(given, config, stylizer, loaded or [])
    painted: list[str] = [] if to_file or given.overwrite else _painted(out, record)  # sha256 of what is there
    with sink as write, _Progress(given, total) as progress:
        try:
            for index, shot in enumerate(film.read(source)):
                digest = "" if to_file else shot.picture.digest[:_DIGITS]
                if index < len(painted) and painted[index] != digest:
                    raise _OtherError(f"{out} holds what was made of another frame {shot.name}: {_ELSEWHERE}")
                if index < len(painted) and film.place(out, shot).exists():
                    last = shot
                    progress.skip()
                    continue
                if last is not None:
                    before, last = last, None
                    painter.take(before.picture, _file(out, before))
                frame = painter(replace(shot.picture, name=f"frame {shot.name}"))
                if not (to_file or done):
                    _keep(out, record, painted)
                write(shot, frame.picture)
                if not to_file and index >= len(painted):  # behind the frame: an older one of its name does not count
                    painted.append(digest)
                    _keep(out, record, painted)
                done += 1
                progress.tick(frame)
        except KeyboardInterrupt:
            if not done:
                raise
            status, message = 130, "interrupted"
        except (*BREAKS, ValueError) as error:  # a frame that is damaged, or of another size
            if isinstance(error, _OtherError) or not (done or last):
                raise
            status, message = 1, brief(error)
    if not (to_file or status) and (others := len(_pictures(out)) - progress.done) > 0:
        log.warning("%s holds %d more pictures, which are not of this video", out, others)
    goes_on = "" if to_file or given.overwrite else ", and the same command goes on"
    return status, message and f"{message}; the {done} frames so far are in {out}{goes_on}"


class _OtherError(ValueError):
    """A folder holds frames of another video."""


def _file(out: str, shot: film.Shot) -> str:
    return str(film.place(out, shot))


def _pictures(out: str) -> list[Path]:
    """The pictures in a folder, if there is one."""
    return [each for each in Path(out).iterdir() if each.suffix == ".png"] if Path(out).is_dir() else []


def _record(given: argparse.Namespace, config: Config, stylizer: Stylizer, styles: Sequence[Any]) -> dict[str, Any]:
    """What the frames of a folder are made of besides their contents, as it is read again from JSON."""
    config = config.for_weights(stylizer.weights_kind)
    options = replace(config, window="auto")  # any one makes the same frames
    engine = {"device": stylizer.device, "precision": stylizer.precision}
    record = manifest.inputs(options, None, None) | {
        "frame-iterations": given.frame_iterations,
        "temporal-weight": given.temporal_weight,
        "content": Path(given.content).name,
        "styles": [each.digest for each in styles],
        "engine": engine | {"weights": stylizer.weights_digest(config.layers)},
    }
    return json.loads(json.dumps(record))


def _painted(out: str, record: dict[str, Any]) -> list[str]:
    """The first digits of the sha256 of the frames, from the first, that a folder holds painted as in this record.

    Raises ValueError if it holds others, or a record that is none.
    """
    path, pictures = Path(out) / _RECORD, _pictures(out)
    if not path.exists():
        if pictures:
            raise ValueError(f"{out} holds pictures that no video left there: {_ELSEWHERE}")
        return []
    try:
        found = json.loads(path.read_text())
        painted = [str(each) for each in found["painted"]]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} was not written here: {_ELSEWHERE}") from None
    other = [name for name in record if found.get(name) != record[name]]
    if other == ["engine"] and isinstance(found["engine"], dict):
        both = [(name, found["engine"].get(name), record["engine"][name]) for name in ("device", "precision")]
        other = [f"{name} ({own}, here {ours})" for name, own, ours in both if own != ours] or other
    if other and pictures:
        raise ValueError(f"{out} holds frames of a video with another {' and '.join(other)}: {_ELSEWHERE}")
    return [] if other else painted


def _keep(out: str, record: dict[str, Any], painted: Sequence[str]) -> None:
    """Note in a folder what its frames are made of: those behind the ones that are `painted` may be another video's."""
    Path(out).mkdir(parents=True, exist_ok=True)
    with image.atomic(Path(out) / _RECORD) as temporary:
        temporary.write_text(json.dumps(record | {"painted": painted}, indent=1))


class _Progress:
    """A bar on a terminal, or a line of JSON for each frame."""

    def __init__(self, given: argparse.Namespace, total: int | None) -> None:
        from tqdm import tqdm

        self._given, self._total, self._start = given, total, time.perf_counter()
        self.done = self._painted = 0
        self._bar = tqdm(total=total, unit="frame", file=sys.stderr, disable=None if given.progress == "auto" else True)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def skip(self) -> None:
        """A frame was there already."""
        if not self.done:
            log.info("frames that are there already are left alone: --overwrite replaces them")
        self.done += 1
        self._bar.update()
        self._tell({"there": True})

    def tick(self, frame: Frame) -> None:
        """A frame is painted."""
        self.done += 1
        self._bar.set_postfix_str(f"loss {frame.loss:.4g}, flicker {frame.flicker:.3f}", refresh=False)
        self._bar.update()
        seconds = round(time.perf_counter() - self._start, 3)
        self._painted += 1
        left = None if self._total is None else round(seconds / self._painted * (self._total - self.done), 2)
        found = {"loss": frame.loss, "kept": round(frame.kept, 4), "flicker": round(frame.flicker, 5)}
        self._tell(found | {"seconds": seconds, "left": left})

    def _tell(self, found: dict[str, Any]) -> None:
        if self._given.progress == "json":
            tell({"out": self._given.out, "frame": self.done, "total": self._total, **found})
