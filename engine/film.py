"""Videos as files and as folders of frames: read picture by picture, written in the same way."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import image
from .export.commands import install_line
from .image import Picture
from .jobs import VIDEOS, is_picture

log = logging.getLogger(__name__)

# Nearly without loss: the strokes are what it is about, and other programs encode it again.
_CODECS = {"webm": ("libvpx-vp9", {"crf": "18", "b": "0", "row-mt": "1"})}
_CODEC = ("libx264", {"crf": "14"})
_RATE = 25  # frames a second of a video that does not say
_BT709 = 1  # colour primaries, transfer and matrix by their number in ITU-T H.273


@dataclass(frozen=True)
class Shot:
    """A frame as it was read: `name` is that of its file, `time` the seconds since the start in a video."""

    picture: Picture
    name: str
    time: float | None = None


def check(path: str) -> None:
    """Raise ValueError or OSError if there is no such video or no frame in the folder, RuntimeError without PyAV."""
    Path(path).stat()
    if not Path(path).is_dir():
        with _opened(path):
            pass
    elif not _frames(path):
        raise ValueError(f"{path}: no pictures there")


def count(path: str) -> int | None:
    """Frames of a video or a folder; None where the file does not say."""
    if Path(path).is_dir():
        return len(_frames(path))
    with _opened(path) as (_, stream):
        return stream.frames or None


def read(path: str) -> Iterator[Shot]:
    """The frames of a video, turned upright, or of a folder by the numbers in their names, read as they are asked for.

    Raises ValueError for a file that is damaged or holds no video, or whose frames are larger than STYLIZE_MAX_PIXELS.
    """
    if Path(path).is_dir():
        for each in _frames(path):
            yield Shot(image.load(each), each.stem)
        return
    with _opened(path) as (container, stream), _told(path):
        rate = stream.average_rate or _RATE
        for number, frame in enumerate(container.decode(stream)):
            pixels = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
            time = number / rate if frame.time is None else frame.time
            yield Shot(image.load(np.ascontiguousarray(pixels)), f"{number + 1:06d}", float(time))


@contextlib.contextmanager
def folder(path: str) -> Iterator[Callable[[Shot, Picture], None]]:
    """Writes the frames as PNG, under the names of those that they were made of."""
    yield lambda shot, picture: image.save(picture, str(place(path, shot)))


def place(path: str, shot: Shot) -> Path:
    """Where `folder` puts the picture that is made of a frame."""
    return Path(path) / f"{shot.name}.png"


@contextlib.contextmanager
def video(path: str, source: str) -> Iterator[Callable[[Shot, Picture], None]]:
    """Writes a video with the times and the sound of `source`, another one; it is there once the block has ended well.

    H.264, or VP9 in WebM; the last row or column of an odd size is left out.
    """
    import av

    kind = VIDEOS[Path(path).suffix.lower()]
    codec, options = _CODECS.get(kind, _CODEC)
    with (
        _opened(source) as (_, original),
        av.open(source) as heard,
        image.atomic(Path(path)) as temporary,
        av.open(str(temporary), "w", format=kind) as out,
    ):
        rate = original.average_rate or _RATE
        stream: Any = out.add_stream(codec, rate, options)
        context = stream.codec_context
        context.pix_fmt, context.time_base = "yuv420p", original.time_base
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        copy = _sound(heard, out)

        def write(shot: Shot, picture: Picture) -> None:
            width, height = (side // 2 * 2 for side in picture.size)
            if not context.is_open:
                stream.width, stream.height = width, height
            levels = np.asarray(image.to_pil(picture).convert("RGB"))[:height, :width]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(levels), "rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
            assert shot.time is not None
            frame.time_base, frame.pts = original.time_base, round(shot.time / original.time_base)
            with _told(path, RuntimeError, "it cannot be written"):
                out.mux(stream.encode(frame))
                copy(shot.time + 1 / rate)

        yield write
        with _told(path, RuntimeError, "it cannot be written"):
            out.mux(stream.encode(None))


def _sound(source: Any, out: Any) -> Callable[[float], None]:
    """A function that copies the sound of an open video up to a time, as it is."""
    given = source.streams.audio[0] if source.streams.audio else None
    if given is not None and given.codec_context.name not in out.supported_codecs:
        log.warning("the sound (%s) is left out: %s cannot hold it", given.codec_context.name, out.format.name)
        given = None
    if given is None:
        return lambda time: None
    own, packets = out.add_stream_from_template(given), source.demux(given)
    waiting = next(packets, None)

    def copy(time: float) -> None:
        nonlocal waiting
        while waiting is not None and (waiting.dts is None or waiting.dts * waiting.time_base < time):
            if waiting.dts is not None:  # the last one is none
                waiting.stream = own
                out.mux(waiting)
            waiting = next(packets, None)

    return copy


def _frames(path: str) -> list[Path]:
    """The pictures of a folder; 9 comes before 10."""
    found = [each for each in Path(path).iterdir() if is_picture(each.name) and each.is_file()]
    parts = {each: re.split(r"(\d+)", each.name) for each in found}
    return sorted(found, key=lambda each: [int(part) if part.isdecimal() else part for part in parts[each]])


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[Any, Any]]:
    """A video and its first stream of pictures."""
    try:
        import av
    except ImportError as error:
        raise RuntimeError(f"videos need PyAV: {install_line('video')}") from error
    with _told(path):
        container = av.open(path)
    with container:
        if not container.streams.video:
            raise ValueError(f"{path}: there is no video in it")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        most = image.limit("STYLIZE_MAX_PIXELS", image.MAX_PIXELS)
        if stream.width * stream.height > most:
            raise ValueError(f"{path}: frames of {stream.width} x {stream.height} pixels, of {most} at most")
        yield container, stream


@contextlib.contextmanager
def _told(path: str, kind: type[Exception] = ValueError, wrong: str = "damaged, or no video") -> Iterator[None]:
    """Tell what FFmpeg finds wrong in one line, by an exception of this kind where it is none of the system's."""
    import av

    try:
        yield
    except av.FFmpegError as error:
        if isinstance(error, OSError):
            raise
        raise kind(f"{path}: {wrong}: {error.strerror}") from error
