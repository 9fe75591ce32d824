"""Videos as files and as folders of frames: read picture by picture, written in the same way."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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
_BT709, _UNKNOWN = 1, 2  # of colour primaries, transfer and matrix, in ITU-T H.273
_HDR = (16, 18)  # transfers: PQ, HLG
_HIGH = 720  # lines from which on players take a video for BT.709 that does not say
_UNWRITTEN = "it cannot be written"
_GAP = 10  # seconds between packets of a recording in which its clock has not jumped, as FFmpeg has it


@dataclass(frozen=True)
class Shot:
    """A frame as it was read: `name` is that of its file; in a video it is shown from `time` to `until`, in seconds.

    The last one has no end.
    """

    picture: Picture
    name: str
    time: float = 0.0
    until: float = math.inf


def count(path: str) -> int | None:
    """Frames of a video or a folder; None where the file does not say.

    Raises ValueError or OSError if there is no such video, or no frame in the folder or two of one name, RuntimeError
    without PyAV.
    """
    Path(path).stat()
    if not Path(path).is_dir():
        with _opened(path) as (_, stream):
            return stream.frames or None
    names = [each.stem.lower() for each in _frames(path)]
    if not names:
        raise ValueError(f"{path}: no pictures there")
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise ValueError(f"{path}: two frames are named {twice[0]}, and would be painted to one file")
    return len(names)


def read(path: str) -> Iterator[Shot]:
    """The frames of a video, upright and with square pixels, or of a folder by the numbers in their names.

    They are read as they are asked for. Raises ValueError for a file that is damaged or holds no frame, or whose frames
    are larger than STYLIZE_MAX_PIXELS.
    """
    shots, before = _shots(path), None
    while True:
        try:
            shot = next(shots, None)
        except Exception:
            if before is not None:
                yield before
            raise
        if before is not None:
            yield replace(before, until=math.inf if shot is None else shot.time)
        if shot is None:
            break
        before = shot
    if before is None:
        raise ValueError(f"{path}: there is no frame in it")


def _shots(path: str) -> Iterator[Shot]:
    if Path(path).is_dir():
        for each in _frames(path):
            yield Shot(image.load(each), each.stem)
        return
    with _opened(path) as (container, stream), _told(path):
        rate, time = float(stream.average_rate or _RATE), 0.0
        frames = (frame for packet in _packets(container, stream) for frame in packet.decode())
        for number, frame in enumerate(frames, 1):
            _check_pixels(path, frame.width, frame.height)
            if number == 1 and frame.color_trc in _HDR:
                log.warning("%s: its high dynamic range is left out of account, colours will be dull", path)
            if number == 1 and frame.interlaced_frame:
                log.warning("%s: it is interlaced, and its lines will be painted as combs: deinterlace it before", path)
            time = time + (number > 1) / rate if frame.time is None else float(frame.time)
            given = "ITU709" if frame.colorspace == _UNKNOWN and frame.height >= _HIGH else None
            levels = frame.to_ndarray(format="rgb24", src_colorspace=given)
            picture, shape = image.load(np.ascontiguousarray(levels)), stream.sample_aspect_ratio
            if shape and shape != 1:
                picture = image.resize(picture, (max(1, round(frame.width * shape)), frame.height))
            upright = np.rot90(picture.rgb, round(frame.rotation / 90))
            yield Shot(Picture(np.ascontiguousarray(upright)), f"{number:06d}", time, time + 1 / rate)


def _packets(container: Any, wanted: Any) -> Iterator[Any]:
    """The packets of one stream of an open video, the last one empty.

    The clock of a recording (MPEG-TS, -PS) has run before, and jumps where two were joined: here it begins at zero, and
    goes on where the stream was. All streams move alike, so that sound stays with the pictures.
    """
    import av

    if av.format.Flags.ts_discont not in av.format.Flags(container.format.flags):
        yield from container.demux(wanted)
        return
    streams = {container.streams.best("video"), *container.streams.audio[:1], wanted}
    shifts = [-(container.start_time or 0) / av.time_base]
    places = dict[Any, tuple[float, float]]()  # of each stream its last time, and the step to it
    for packet in container.demux(*streams):
        if packet.dts is not None:
            time = float(packet.dts * packet.time_base)
            before, step = places.get(packet.stream, (time + shifts[-1], 0.0))
            # Around a jump packets of both sides may alternate.
            newest = max([before, *(each for each, _ in places.values())])  # pictures may pause while there is sound
            fitting = [shift for shift in shifts[-2:] if before <= time + shift <= newest + _GAP]
            if not fitting:
                shifts.append(before + step - time)
            shift = min(fitting, key=lambda shift: time + shift - before) if fitting else shifts[-1]
            places[packet.stream] = time + shift, time + shift - before
            ticks = round(shift / packet.time_base)
            packet.dts += ticks
            packet.pts = None if packet.pts is None else packet.pts + ticks
        if packet.stream is wanted:
            yield packet


def place(path: str, shot: Shot) -> Path:
    """Where the picture that is made of a frame stands in a folder."""
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
        _opened(source) as (heard, original),
        image.atomic(Path(path)) as temporary,
        _told(path, RuntimeError, _UNWRITTEN),
        av.open(str(temporary), "w", format=kind) as out,
    ):
        stream: Any = out.add_stream(codec, original.average_rate or _RATE, options)
        context, last = stream.codec_context, -1
        context.pix_fmt, context.time_base = "yuv420p", original.time_base
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        copy = _sound(source, heard, out)

        def write(shot: Shot, picture: Picture) -> None:
            nonlocal last
            width, height = (side // 2 * 2 for side in picture.size)
            if not context.is_open:
                stream.width, stream.height = width, height
            levels = np.asarray(image.to_pil(picture).convert("RGB"))[:height, :width]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(levels), "rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
            last = max(last + 1, round(shot.time / original.time_base))
            frame.time_base, frame.pts = original.time_base, last
            with _told(path, RuntimeError, _UNWRITTEN):
                out.mux(stream.encode(frame))
            copy(shot.until)

        yield write
        out.mux(stream.encode(None))


def _sound(path: str, source: Any, out: Any) -> Callable[[float], None]:
    """A function that copies the sound of an open video up to a time, as it is."""
    given = next(iter(source.streams.audio), None)
    if given is None:
        return lambda until: None
    codec = given.codec_context and given.codec_context.name
    if not codec or not _holds(out.format.name, given):
        log.warning("the sound (%s) is left out: %s cannot hold it", codec or "unknown", out.format.name)
        return lambda until: None
    own, packets = out.add_stream_from_template(given), _packets(source, given)

    def following() -> Any:
        with _told(path):
            return next((each for each in packets if each.dts is not None), None)  # the last one is empty

    waiting = following()

    def copy(until: float) -> None:
        nonlocal waiting
        while waiting is not None and waiting.dts * waiting.time_base < until:
            waiting.stream = own
            with _told(path, RuntimeError, "its sound cannot be copied"):
                out.mux(waiting)
            waiting = following()

    return copy


def _holds(kind: str, stream: Any) -> bool:
    """Whether a file of this format can hold a stream as it is: what it says of codecs is not all."""
    import av

    try:
        with av.open(io.BytesIO(), "w", format=kind) as trial:
            trial.add_stream_from_template(stream)
            trial.start_encoding()
    except (av.FFmpegError, ValueError):
        return False
    return True


def _frames(path: str) -> list[Path]:
    """The pictures of a folder; 9 comes before 10."""
    found = [each for each in Path(path).iterdir() if is_picture(each.name) and each.is_file()]
    parts = {each: re.split(r"(\d+)", each.name) for each in found}
    return sorted(found, key=lambda each: [int(part) if part.isdecimal() else part for part in parts[each]])


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[Any, Any]]:
    """A video and its stream of pictures."""
    try:
        import av
    except ImportError as error:
        raise RuntimeError(f"videos need PyAV: {install_line('video')}") from error
    with _told(path):  # a name with a colon would be taken for a protocol's
        container = av.open(str(Path(path).resolve()), metadata_errors="replace")
    with container:
        stream: Any = container.streams.best("video")
        if stream is None:
            raise ValueError(f"{path}: there is no video in it")
        if stream.codec_context is None:
            raise ValueError(f"{path}: nothing here decodes its video")
        stream.thread_type = "AUTO"
        _check_pixels(path, stream.width, stream.height)
        yield container, stream


def _check_pixels(path: str, width: int, height: int) -> None:
    most = image.limit("STYLIZE_MAX_PIXELS", image.MAX_PIXELS)
    if width * height > most:
        raise ValueError(f"{path}: frames of {width} x {height} pixels, of {most} at most")


@contextlib.contextmanager
def _told(path: str, kind: type[Exception] = ValueError, wrong: str = "damaged, or no video") -> Iterator[None]:
    """Tell what FFmpeg finds wrong in one line, by an exception of this kind where it is none of the system's."""
    import av

    try:
        yield
    except av.FFmpegError as error:
        if isinstance(error, OSError | MemoryError):
            raise
        raise kind(f"{path}: {wrong}: {error.strerror}") from error
