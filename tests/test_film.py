"""Videos as files: what is read is what was written, with its times, its sound and the right side up."""

import struct
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from engine import film
from engine.film import Shot
from engine.image import Picture

RATE = 44100


def shapes(count, width=64, height=48):
    """Frames (H, W, 3) uint8 with soft colours, as chroma has half the resolution; each differs from the others."""
    y, x = np.mgrid[0:height, 0:width]
    return [
        np.stack(
            [
                128 + 100 * np.sin((x + 4 * i) / 17),
                128 + 100 * np.cos((y - 3 * i) / 13),
                60 + 130 * (x + y) / (width + height),
            ],
            2,
        ).astype(np.uint8)
        for i in range(count)
    ]


def sine(seconds):
    return (0.3 * np.sin(2 * np.pi * 440 * np.arange(int(RATE * seconds)) / RATE)).astype(np.float32)


def make(path, frames, times=None, sound=None, seconds=None, shape=None, tagged=True, start=0, early=0, options=None):
    """A video of these frames at 10 a second, or at these times in hundredths of a second, from a second `start` on.

    Its sound begins by `early` seconds before.
    """
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=10, options={"crf": "4"} | (options or {}))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 100)
        if tagged:
            stream.codec_context.colorspace = 1
        if shape:
            stream.codec_context.sample_aspect_ratio = shape
        heard = out.add_stream(sound, rate=48000 if sound == "libopus" else RATE, layout="mono") if sound else None
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, "rgb24").reformat(format="yuv420p", dst_colorspace="ITU709")
            picture.pts = 100 * start + (10 * i if times is None else times[i])
            picture.time_base = Fraction(1, 100)
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
        if heard is not None:
            samples, rate = sine(seconds or len(frames) / 10), heard.rate
            for i in range(0, len(samples) - 1023, 1024):
                part = av.AudioFrame.from_ndarray(samples[None, i : i + 1024], "fltp", "mono")
                part.sample_rate, part.pts, part.time_base = rate, round((start - early) * rate) + i, Fraction(1, rate)
                out.mux(heard.encode(part))
            out.mux(heard.encode(None))
    return str(path)


def copied(source, out):
    """The frames of a video, written as another one."""
    with film.video(str(out), source) as write:
        for shot in film.read(source):
            write(shot, shot.picture)
    return list(film.read(str(out)))


def apart(picture, frame):
    return float(abs(picture.rgb - frame / 255).mean())


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "webm"])
def test_a_video_comes_back_as_it_was(tmp_path, suffix):
    frames = shapes(5)
    source = make(tmp_path / "in.mp4", frames)
    read = list(film.read(source))
    assert [apart(shot.picture, frame) < 0.01 for shot, frame in zip(read, frames, strict=True)] == [True] * 5
    assert film.count(source) == 5
    again = copied(source, tmp_path / f"out.{suffix}")
    assert [apart(shot.picture, frame) < 0.015 for shot, frame in zip(again, frames, strict=True)] == [True] * 5
    assert [shot.name for shot in again] == ["000001", "000002", "000003", "000004", "000005"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_frames_keep_their_times(tmp_path):
    times = [0, 7, 30, 31, 90]
    source = make(tmp_path / "in.mkv", shapes(5), times)
    again = copied(source, tmp_path / "out.mp4")
    assert [shot.time for shot in again] == pytest.approx([time / 100 for time in times], abs=2e-3)


def packets(path):
    with av.open(str(path)) as video:
        return [
            (float(each.pts * each.time_base), bytes(each)) for each in video.demux(audio=0) if each.dts is not None
        ]


def test_sound_is_copied_as_it_is(tmp_path):
    source = make(tmp_path / "in.mp4", shapes(8), sound="aac")
    copied(source, tmp_path / "out.mp4")
    given, found = packets(source), packets(tmp_path / "out.mp4")
    assert [data for _, data in found] == [data for _, data in given]
    assert [time for time, _ in found] == pytest.approx([time for time, _ in given], abs=1e-3)
    assert len(given) > 20


def test_sound_that_is_longer_than_the_pictures_is_copied_to_its_end(tmp_path):
    source = make(tmp_path / "in.mp4", shapes(3), times=[0, 10, 20], sound="aac", seconds=1.5)
    copied(source, tmp_path / "out.mp4")
    assert [data for _, data in packets(tmp_path / "out.mp4")] == [data for _, data in packets(source)]


def test_sound_ends_with_the_pictures_so_far(tmp_path):
    source = make(tmp_path / "in.mp4", shapes(8), sound="aac")
    with film.video(str(tmp_path / "out.mp4"), source) as write:
        for shot in list(film.read(source))[:3]:
            write(shot, shot.picture)
    assert max(time for time, _ in packets(tmp_path / "out.mp4")) < 0.31
    assert len(list(film.read(str(tmp_path / "out.mp4")))) == 3


def test_sound_that_the_file_cannot_hold_is_left_out_and_told(tmp_path, caplog):
    source = make(tmp_path / "in.mp4", shapes(3), sound="aac")
    assert len(copied(source, tmp_path / "out.webm")) == 3
    assert "the sound (aac) is left out: webm cannot hold it" in caplog.text
    with av.open(str(tmp_path / "out.webm")) as video:
        assert not video.streams.audio


def test_sound_that_mov_says_it_could_hold_is_left_out(tmp_path, caplog):
    """Its list of codecs has Opus, its header refuses it."""
    source = make(tmp_path / "in.mkv", shapes(3), sound="libopus")
    assert len(copied(source, tmp_path / "out.mov")) == 3
    assert "the sound (opus) is left out: mov cannot hold it" in caplog.text
    assert len(copied(source, tmp_path / "out.webm")) == 3
    assert packets(tmp_path / "out.webm")


@pytest.mark.parametrize("starts", [(50000,), (10, 3), (30, 3000, 1), (5, 9)])
def test_the_clock_of_a_recording_begins_at_zero_and_goes_on(tmp_path, starts):
    """Of some that were joined, whatever it was at."""
    parts = [make(tmp_path / f"{start}.ts", shapes(6), sound="mp2", start=start) for start in starts]
    source = tmp_path / "in.ts"
    source.write_bytes(b"".join(Path(part).read_bytes() for part in parts))
    again = copied(str(source), tmp_path / "out.mp4")
    times = np.array([shot.time for shot in again])
    assert len(times) == 6 * len(starts)
    assert 0 <= times[0] < 0.1
    steps, joints = np.diff(times), 5 + 6 * np.arange(len(starts) - 1)
    gap = 3.5 if starts == (5, 9) else 0.1  # a few seconds may be a gap
    assert (abs(steps[joints] - gap) < 0.06).all(), "the sound is some ms longer or shorter than the pictures"
    assert np.delete(steps, joints) == pytest.approx(0.1, abs=2e-3)
    sound = np.array([time for time, _ in packets(tmp_path / "out.mp4")])
    assert [data for _, data in packets(tmp_path / "out.mp4")] == [data for _, data in packets(source)]
    assert (np.diff(sound) > 0).all()
    assert sound[-1] == pytest.approx(times[-1] + 0.1, abs=0.06)


@pytest.mark.parametrize("starts", [(5, 5), (10, 8), (1, 1, 1)])
@pytest.mark.parametrize("early", [0.3, -0.3])
def test_sound_that_does_not_begin_with_the_pictures_leaves_no_gap(tmp_path, starts, early):
    """Where two were joined, the sound jumps before the pictures, or behind them."""
    source = tmp_path / "in.ts"
    parts = [
        make(tmp_path / f"{i}.ts", shapes(10), sound="mp2", start=start, early=early) for i, start in enumerate(starts)
    ]
    source.write_bytes(b"".join(Path(part).read_bytes() for part in parts))
    times = np.array([shot.time for shot in copied(str(source), tmp_path / "out.mp4")])
    assert len(times) == 10 * len(starts)
    assert 0 < np.diff(times).min() <= np.diff(times).max() < 0.8
    sound = np.array([time for time, _ in packets(tmp_path / "out.mp4")])
    assert 0 < np.diff(sound).min() <= np.diff(sound).max() < 0.8


def test_pictures_may_pause_while_there_is_sound(tmp_path):
    source = make(tmp_path / "in.ts", shapes(3), times=[0, 1200, 2500], sound="mp2", seconds=26)
    times = [shot.time for shot in copied(source, tmp_path / "out.mp4")]
    assert np.diff(times) == pytest.approx([12, 13], abs=0.05)
    assert packets(tmp_path / "out.mp4")[-1][0] == pytest.approx(26, abs=0.1)


def test_the_clock_of_a_recording_runs_over(tmp_path):
    """After 2^33 ticks of 90 kHz, 95443.7 seconds."""
    source = make(tmp_path / "in.ts", shapes(8), sound="aac", start=95443)
    again = copied(source, tmp_path / "out.mkv")
    times = [shot.time for shot in again]
    assert np.diff(times) == pytest.approx(0.1, abs=2e-3)
    assert 0 <= times[0] < 0.1


def test_interlaced_videos_are_told(tmp_path, caplog):
    list(film.read(make(tmp_path / "in.mp4", shapes(2))))
    assert not caplog.text
    list(film.read(make(tmp_path / "in.mp4", shapes(2), options={"x264-params": "interlaced=1"})))
    assert caplog.text.count("it is interlaced, and its lines will be painted as combs") == 1


def test_an_odd_size_loses_a_row_and_a_column(tmp_path):
    source = make(tmp_path / "in.mp4", shapes(1))
    odd = Picture(shapes(1, 51, 33)[0].astype(np.float32) / 255)
    with film.video(str(tmp_path / "out.mp4"), source) as write:
        write(Shot(odd, "000001", 0.0), odd)
    (shot,) = film.read(str(tmp_path / "out.mp4"))
    assert shot.picture.size == (50, 32)
    assert float(abs(shot.picture.rgb - odd.rgb[:32, :50]).mean()) < 0.015


def turn(path, matrix):
    """Write a display matrix into the track header of an MP4 file, as telephones do."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 5 * 4 + 2 * 4 + 4 * 2
    values = [round(value * 65536) for value in matrix[:8]] + [round(matrix[8] * 2**30)]
    assert struct.unpack(">9i", data[at : at + 36]) == (65536, 0, 0, 0, 65536, 0, 0, 0, 2**30)
    data[at : at + 36] = struct.pack(">9i", *values)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("matrix", "turns"),
    [((0, 1, 0, -1, 0, 0, 48, 0, 1), -1), ((-1, 0, 0, 0, -1, 0, 64, 48, 1), 2), ((0, -1, 0, 1, 0, 0, 0, 64, 1), 1)],
)
def test_a_video_of_a_telephone_is_turned_upright(tmp_path, matrix, turns):
    """The matrix of a quarter turn takes the point (x, y) to (H - y, x): clockwise, as y goes down."""
    (frame,) = shapes(1)
    make(tmp_path / "in.mp4", [frame])
    turn(tmp_path / "in.mp4", matrix)
    (shot,) = film.read(str(tmp_path / "in.mp4"))
    upright = np.rot90(frame, turns)
    assert shot.picture.rgb.shape == upright.shape
    assert apart(shot.picture, upright) < 0.01


def test_pixels_become_square(tmp_path):
    (frame,) = shapes(1)
    source = make(tmp_path / "in.mp4", [frame], shape=Fraction(3, 2))
    (shot,) = film.read(source)
    assert shot.picture.size == (96, 48)
    wide = Image.fromarray(frame).resize((96, 48), Image.Resampling.LANCZOS)
    assert apart(shot.picture, np.asarray(wide)) < 0.015


def test_a_high_video_that_does_not_say_is_taken_for_bt709(tmp_path):
    (frame,) = shapes(1, 64, 720)
    for tagged in (True, False):
        (shot,) = film.read(make(tmp_path / f"{tagged}.mp4", [frame], tagged=tagged))
        assert apart(shot.picture, frame) < 0.01


def test_times_that_come_twice_do_not_end_the_video(tmp_path):
    source = make(tmp_path / "in.mp4", shapes(3))
    with film.video(str(tmp_path / "out.mp4"), source) as write:
        for shot in film.read(source):
            write(replace(shot, time=0.1), shot.picture)
    assert len(list(film.read(str(tmp_path / "out.mp4")))) == 3


def test_what_is_no_video_is_told_in_one_line(tmp_path):
    (tmp_path / "text.mp4").write_bytes(b"no video " * 100)
    with pytest.raises(ValueError, match=r"text\.mp4: damaged, or no video: Invalid data"):
        film.count(str(tmp_path / "text.mp4"))
    with pytest.raises(FileNotFoundError):
        film.count(str(tmp_path / "missing.mp4"))
    with pytest.raises(FileNotFoundError):
        film.count(str(tmp_path / "missing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no pictures there"):
        film.count(str(tmp_path / "empty"))
    with av.open(str(tmp_path / "sound.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=RATE, layout="mono")
        part = av.AudioFrame.from_ndarray(sine(1)[None, :1024], "fltp", "mono")
        part.sample_rate = RATE
        out.mux(stream.encode(part))
        out.mux(stream.encode(None))
    with pytest.raises(ValueError, match=r"sound\.mp4: there is no video in it"):
        film.count(str(tmp_path / "sound.mp4"))


def test_of_a_video_that_is_cut_off_the_rest_is_read(tmp_path):
    source = make(tmp_path / "in.mkv", shapes(20))
    data = (tmp_path / "in.mkv").read_bytes()
    (tmp_path / "in.mkv").write_bytes(data[: len(data) // 2])
    assert 0 < len(list(film.read(source))) < 20


def test_what_fails_in_the_middle_is_told_as_damage(tmp_path, monkeypatch):
    source = make(tmp_path / "in.mp4", shapes(3))

    def broken(*_):
        raise av.error.InvalidDataError(1094995529, "Invalid data found")

    shots = film.read(source)
    next(shots)
    monkeypatch.setattr(film.image, "load", broken)  # inside of the loop over the frames
    last = next(shots)
    assert last.until == pytest.approx(last.time + 0.1), "sound ends with it"
    with pytest.raises(ValueError, match=r"in\.mp4: damaged, or no video: Invalid data found"):
        next(shots)


def test_a_video_without_frames_is_told(tmp_path, monkeypatch):
    source = make(tmp_path / "in.mp4", shapes(1))
    monkeypatch.setattr(film, "_shots", lambda path: iter(()))
    with pytest.raises(ValueError, match="there is no frame in it"):
        list(film.read(source))


def test_two_frames_of_one_name_are_refused(tmp_path):
    for name in ("f1.png", "f2.png", "F1.jpg"):
        Image.fromarray(shapes(1)[0]).save(tmp_path / name)
    with pytest.raises(ValueError, match="two frames are named f1"):
        film.count(str(tmp_path))


def test_a_name_with_a_colon_is_no_protocol(tmp_path, monkeypatch):
    make(tmp_path / "in.mp4", shapes(1))
    (tmp_path / "in.mp4").rename(tmp_path / "12:30.mp4")
    monkeypatch.chdir(tmp_path)
    assert len(list(film.read("12:30.mp4"))) == 1


def test_frames_larger_than_the_limit_are_refused(tmp_path, monkeypatch):
    source = make(tmp_path / "in.mp4", shapes(1))
    monkeypatch.setenv("STYLIZE_MAX_PIXELS", "3000")
    with pytest.raises(ValueError, match="frames of 64 x 48 pixels, of 3000 at most"):
        film.count(source)


def test_frames_of_a_folder_come_by_their_numbers(tmp_path):
    for name in ("f10", "f9", "f100", "other"):
        Image.fromarray(shapes(1)[0]).save(tmp_path / f"{name}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    (tmp_path / ".hidden.png").write_bytes(b"")
    shots = list(film.read(str(tmp_path)))
    assert [shot.name for shot in shots] == ["f9", "f10", "f100", "other"]
    assert film.count(str(tmp_path)) == 4
    assert film.place(str(tmp_path / "out"), shots[0]) == tmp_path / "out" / "f9.png"
    assert np.array_equal(np.round(255 * shots[0].picture.rgb), shapes(1)[0])


def test_nothing_is_left_of_a_video_that_could_not_be_made(tmp_path):
    source = make(tmp_path / "in.mp4", shapes(2))
    with pytest.raises(RuntimeError, match="stop"), film.video(str(tmp_path / "out.mp4"), source) as write:
        write(next(film.read(source)), next(film.read(source)).picture)
        raise RuntimeError("stop")
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


def test_without_pyav_the_install_line_is_told(tmp_path, monkeypatch):
    source = make(tmp_path / "in.mp4", shapes(1))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(RuntimeError, match=r"videos need PyAV: pip install '.*\[video\]'"):
        film.count(source)
