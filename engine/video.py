"""Videos: each frame begins as the one before it, carried along by the motion, and is held to it where that is certain.

So a frame takes a tenth of the iterations of a picture, and what is painted stays where it is on the things shown
(Ruder, Dosovitskiy, Brox 2016, *Artistic style transfer for videos*).
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import film, image
from .config import FRAME_ITERATIONS, TEMPORAL_WEIGHT, Config
from .goal import final_size, load_style
from .image import Picture
from .jobs import BREAKS, brief, check_apart, is_picture, is_video
from .motion import Carried, carry
from .presets import check_weights
from .stylizer import Stylizer

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

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
    """Paints the frames of a video in one style, one call after the other; see `Stylizer` for style and config.

    The first frame, and one after a cut, is a run with `config`; the others have `iterations` at the last scale, and
    the temporal loss by `temporal_weight`. What is carried along is rounded to 8 bits, as files hold it.
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
        self._stylizer, self._config = stylizer, config or Config()
        sources = style if isinstance(style, list | tuple) else [style]
        self._style = None if style is None else [load_style(each) for each in sources]
        self._weight = temporal_weight
        self._later = replace(self._config, scales=1, iterations=iterations, init="content", init_noise=0.0)
        if not (isinstance(temporal_weight, int | float) and 0 <= temporal_weight < float("inf")):
            raise ValueError(f"temporal_weight {temporal_weight}: give a finite number that is not negative")
        self._before: tuple[Picture, Picture] | None = None  # the frame before, what was made of it

    def __call__(self, content: Any) -> Frame:
        """Paint the next frame: a picture as `Stylizer` takes it, of the size of those before.

        Raises as `Stylizer` does, and RuntimeError without OpenCV.
        """
        frame = image.load(content)
        now = self._fitted(frame)
        carried = self._carried(now)
        for step in self._stylizer.steps(frame, self._style, self._later if carried else self._config, carried=carried):
            loss = step.loss
        made = image.load(image.to_pil(image.from_tensor(step.pixels)))
        self._before = now, made
        kept = flicker = 0.0
        if carried is not None:
            kept = float(carried.certain.mean())
            flicker = float((carried.certain[..., None] * abs(made.rgb - carried.picture.rgb)).mean()) / kept
        return Frame(step.picture, loss, kept, flicker)

    def take(self, content: Any, painted: Any) -> None:
        """Go on from a frame that was painted before; ValueError if its size is not that of the result.

        The picture is what was optimised, so this is no way for runs that bring the content's colours back.
        """
        now, picture = self._fitted(image.load(content)), image.load(painted)
        if self._config.colour.startswith("keep"):
            raise ValueError(f"a video with colour {self._config.colour} cannot go on from its pictures")
        if picture.size != now.size:
            raise ValueError(f"the frame before was painted at {picture.size}, this one is {now.size}")
        self._before = now, picture

    def _fitted(self, frame: Picture) -> Picture:
        """What a frame shows, at the size of its result."""
        return image.shown(image.resize(frame, final_size(frame, self._config.sized(max(frame.size)))))

    def _carried(self, now: Picture) -> Carried | None:
        if self._before is None:
            return None
        before, made = self._before
        if before.size != now.size:
            raise ValueError(f"this frame gives {now.size} pixels, those before it {before.size}: crop them alike")
        carried = carry(made, before, now, self._weight)
        if carried.certain.mean() < _CUT:
            log.info("a cut: this frame begins anew")
            return None
        return carried


def _check(given: argparse.Namespace, styles: Sequence[str]) -> None:
    """Raise ValueError or OSError now if the video cannot be read, or what is made of it not be written."""
    source, out = given.content, given.out
    film.check(source)
    if out == "-" or is_picture(Path(out).name):
        raise ValueError(f"-o {out} is one picture: give a folder, or a name that ends in .mp4, for a video")
    if not is_video(out):
        if Path(out).exists() and not Path(out).is_dir():
            raise ValueError(f"{out} is no folder: frames go to a folder, or give a name that ends in .mp4")
        if Path(source).is_dir() and Path(out).resolve() == Path(source).resolve():
            raise ValueError(f"{out} holds the frames to read: give another folder")
        return
    if Path(source).is_dir():
        raise ValueError(f"{source} is a folder of frames, which have no times: give a folder with -o")
    check_apart([("OUT", out)], [("CONTENT", source), *(("a style", each) for each in styles)])
    image.check_writable(out, given.overwrite)


def make(given: argparse.Namespace, styles: Sequence[str], config: Config) -> tuple[int, str]:
    """Paint a video or a folder of frames; exit status and message, 0 and nothing if all went well.

    Frames that are there already in a folder are left alone, and the next one goes on from them. What a run that broke,
    or was interrupted, has painted so far is written.
    """
    source, out, done = given.content, given.out, 0
    _check(given, styles)
    loaded = None if list(styles) == ["none"] else [load_style(each) for each in styles]
    stylizer = Stylizer(given.weights, given.device, given.precision)
    if given.preset:
        check_weights(given.preset, stylizer.weights_kind)
    if not is_video(out):
        Path(out).mkdir(parents=True, exist_ok=True)
    painter = Video(stylizer, loaded, config, iterations=given.frame_iterations, temporal_weight=given.temporal_weight)
    sink = film.video(out, source) if is_video(out) else film.folder(out)
    status, message = 0, ""
    with sink as write, _Progress(given, film.count(source)) as progress:
        try:
            for shot in film.read(source):
                if not is_video(out) and not given.overwrite and film.place(out, shot).exists():
                    painter.take(shot.picture, str(film.place(out, shot)))
                    progress.skip()
                    continue
                frame = painter(shot.picture)
                write(shot, frame.picture)
                done += 1
                progress.tick(frame)
        except KeyboardInterrupt:
            status, message = 130, "interrupted"
        except (*BREAKS, ValueError) as error:  # a frame that is damaged
            if not done:
                raise
            status, message = 1, brief(error)
        if status and not done:
            raise KeyboardInterrupt
    return status, message and f"{message}; the {done} frames so far are in {out}"


class _Progress:
    """A bar on a terminal, or a line of JSON for each frame."""

    def __init__(self, given: argparse.Namespace, total: int | None) -> None:
        from tqdm import tqdm

        self._given, self._total, self._done, self._start = given, total, 0, time.perf_counter()
        self._bar = tqdm(total=total, unit="frame", file=sys.stderr, disable=None if given.progress == "auto" else True)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def skip(self) -> None:
        """A frame was there already."""
        self._done += 1
        self._bar.update()

    def tick(self, frame: Frame) -> None:
        """A frame is painted."""
        self._done += 1
        self._bar.set_postfix_str(f"loss {frame.loss:.4g}, flicker {frame.flicker:.3f}", refresh=False)
        self._bar.update()
        if self._given.progress == "json":
            record = {"out": self._given.out, "frame": self._done, "total": self._total, "loss": frame.loss}
            record |= {"kept": round(frame.kept, 4), "flicker": round(frame.flicker, 5)}
            record |= {"seconds": round(time.perf_counter() - self._start, 3)}
            sys.stderr.write(json.dumps(record) + "\n")
            sys.stderr.flush()
