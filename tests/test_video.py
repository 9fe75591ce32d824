"""Videos: frames that begin as the one before, and are held to it; the command line with a video."""

import io
import itertools
import json
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import SHALLOW, TINY
from oracle import random_state
from PIL import Image
from safetensors.torch import save_file
from test_film import make

from engine import Config, Stylizer, colour, film, image, samples, stylize, video
from engine.goal import load as load_goal
from engine.image import Picture
from engine.kernels.temporal import temporal_reference
from engine.motion import Carried, carry
from engine.video import Video

PANNED = Config(size=64, iterations=60, scales=1, style_layers=SHALLOW)


def frames(count, step=2, width=64, height=48):
    """A window that moves over the sample photograph, uint8."""
    content = np.asarray(Image.open(io.BytesIO(samples.pair()[0])).convert("RGB"))
    return [content[80 + i : 80 + i + height, 90 + step * i : 90 + step * i + width].copy() for i in range(count)]


STYLE = samples.pair()[1]


def flicker(pictures, step=2):
    """Mean change of what is painted on the window's photograph, whose motion is known."""
    changes = [abs(now[:-1, :-step] - before[1:, step:]).mean() for before, now in itertools.pairwise(pictures)]
    return float(np.mean(changes))


def test_loss_and_gradient_of_a_frame_have_the_temporal_term(exact):
    content, before = (Picture(each.astype(np.float32) / 255) for each in frames(2)[::-1])
    carried = carry(before, before, content, 40.0)
    goal = load_goal(content, STYLE, PANNED.for_weights(exact.weights_kind), None, None)
    found = []
    pixels = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    for each in (goal, replace(goal, carried=carried)):
        terms, gradient = exact._objective(content, each, "fp32").evaluate(pixels)
        found.append((float(terms.total), gradient[0].double().numpy()))
    value, slope = temporal_reference(
        pixels[0].double().numpy(), carried.picture.rgb.transpose(2, 0, 1).astype(float), carried.certain.astype(float)
    )
    assert found[1][0] - found[0][0] == pytest.approx(40 * value, rel=1e-4)
    assert np.linalg.norm(found[1][1] - found[0][1] - 40 * slope) < 1e-4 * np.linalg.norm(40 * slope)


def test_a_video_flickers_less_than_its_frames_alone(stylizer):
    """A frame takes a fourth of the iterations, and comes as far."""
    given = frames(5)
    painter = Video(stylizer, STYLE, PANNED, iterations=15)
    made = [painter(frame) for frame in given]
    alone = [stylizer(frame, STYLE, PANNED) for frame in given]
    together = flicker([each.picture.rgb for each in made])
    apart = flicker([each.last.picture.rgb for each in alone])
    assert together < apart / 3
    assert made[0].kept == made[0].flicker == 0
    assert min(each.kept for each in made[1:]) > 0.8
    assert np.mean([each.flicker for each in made[1:]]) == pytest.approx(together, rel=0.5)
    losses = [
        stylizer.evaluate(each.picture.rgb, frame, STYLE, PANNED).loss for each, frame in zip(made, given, strict=True)
    ]
    assert losses[-1] < 1.1 * alone[-1].trace[-1][1]


def test_the_weight_holds_a_frame_to_the_one_before(stylizer):
    moved = []
    for weight in (0.0, 100.0, 1e4):
        painter = Video(stylizer, STYLE, PANNED, iterations=15, temporal_weight=weight)
        moved.append([painter(frame) for frame in frames(2)][1].flicker)
    assert moved[0] > 1.5 * moved[1] > 3 * moved[2]


def test_a_cut_begins_anew(stylizer):
    other = np.asarray(Image.open(io.BytesIO(STYLE)).convert("RGB").resize((64, 48)))
    painter = Video(stylizer, STYLE, PANNED, iterations=3)
    for frame in frames(2):
        painter(frame)
    made = painter(other)
    assert made.kept == 0
    assert np.array_equal(np.asarray(made.image), np.asarray(stylizer(other, STYLE, PANNED).image))


def test_a_video_goes_on_from_a_painted_frame(stylizer):
    given = frames(3)
    painter = Video(stylizer, STYLE, TINY)
    whole = [painter(frame) for frame in given]
    stream = io.BytesIO()
    image.write(whole[1].picture, stream, "PNG")
    later = Video(stylizer, STYLE, TINY)
    later.take(given[1], stream.getvalue())
    assert np.array_equal(later(given[2]).picture.rgb, whole[2].picture.rgb)


def test_the_contents_colours_come_back_frame_by_frame(stylizer):
    """What is carried along is what was optimised, not what is shown."""
    plain, kept = (Video(stylizer, STYLE, replace(TINY, colour=each)) for each in ("none", "keep-after"))
    for frame in frames(3):
        shown = colour.finish("keep-after", plain(frame).picture, image.load(frame), False)
        assert np.allclose(kept(frame).picture.rgb, shown.rgb, atol=1e-5)


def test_what_is_new_is_grey_where_frames_are(stylizer, monkeypatch):
    seen = []

    def noted(picture, before, now, weight):
        seen.extend((before, now))
        return carry(picture, before, now, weight)

    monkeypatch.setattr(video, "carry", noted)
    painter = Video(stylizer, STYLE, replace(TINY, colour="keep-before"))
    for frame in frames(3):
        painter(frame)
    assert len(seen) == 4
    assert max(np.ptp(each.rgb, axis=2).max() for each in seen) < 1e-3


@pytest.mark.parametrize("way", ["match", "histogram"])
def test_a_style_is_matched_to_the_first_frame_alone(stylizer, way):
    """Or its targets would change with each frame; later ones are those of a plain video in that style."""
    given = frames(3)
    painter = Video(stylizer, STYLE, replace(TINY, colour=way))
    (matched,) = colour.prepare(way, image.load(given[0]), [image.load(STYLE)])[1]
    plain = Video(stylizer, matched, TINY)
    for frame in given:
        assert np.array_equal(painter(frame).picture.rgb, plain(frame).picture.rgb)


def test_frames_keep_their_alpha(stylizer):
    seen = np.zeros((48, 64), np.uint8)
    seen[:, 20:] = 255
    painter = Video(stylizer, STYLE, TINY)
    for frame in frames(2):
        made = painter(Image.fromarray(np.dstack([frame, seen])))
        assert made.image.mode == "RGBA"
        assert made.picture.alpha[0, 0] == 0
    faded = painter(Image.fromarray(np.dstack([frames(1)[0], 0 * seen])))  # nothing to see
    assert np.isfinite(faded.picture.rgb).all()


def test_a_frame_without_style_or_of_several(stylizer):
    both = Video(stylizer, [STYLE, frames(1)[0]], replace(TINY, style_blend=(1, 3)))
    assert [both(frame).kept > 0 for frame in frames(2)] == [False, True]
    inverted = Video(stylizer, None, TINY)
    assert [inverted(frame).kept > 0 for frame in frames(2)] == [False, True]


def test_frames_that_are_stretched_to_tile_are_told_of_once(stylizer, caplog):
    painter = Video(stylizer, STYLE, replace(TINY, tile=True))
    made = [painter(frame) for frame in frames(3)]
    assert made[2].kept > 0
    assert [each.message for each in caplog.records].count(
        "to tile, the content of 64 x 48 pixels is stretched to the shape of 48 x 48"
    ) == 1


def test_mistakes_are_told(stylizer):
    for weight in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temporal_weight"):
            Video(stylizer, STYLE, TINY, temporal_weight=weight)
    with pytest.raises(TypeError):
        Video(stylizer, STYLE, TINY, temporal_weight="3")
    Video(stylizer, STYLE, TINY, temporal_weight=np.float32(3))
    with pytest.raises(ValueError, match="style_scale has 2 numbers, there are 1 styles"):
        Video(stylizer, STYLE, replace(TINY, style_scale=(1.0, 2.0)))
    with pytest.raises(ValueError, match="size WxH is for runs without content"):
        Video(stylizer, STYLE, replace(TINY, size=(64, 48)))
    with pytest.raises(ValueError, match="iterations 0"):
        Video(stylizer, STYLE, TINY, iterations=0)
    painter = Video(stylizer, STYLE, TINY)
    painter(frames(1)[0])
    with pytest.raises(ValueError, match=r"a frame gives \(48, 48\) pixels, those before it \(48, 36\)"):
        painter(frames(1, width=48)[0])
    with pytest.raises(ValueError, match="painted at"):
        painter.take(*frames(2))
    for way in ("keep-after", "match"):
        with pytest.raises(ValueError, match="cannot go on from its pictures"):
            Video(stylizer, STYLE, replace(TINY, colour=way)).take(*frames(2))


def test_steps_take_what_fits_and_is_carried_to_one_scale(stylizer):
    content, before = (Picture(each.astype(np.float32) / 255) for each in frames(2)[::-1])
    carried = carry(before, before, content, 3.0)
    for wrong in ({"size": 48}, {"scales": 2, "size": 64}, {"init": "noise", "size": 64}):
        with pytest.raises(ValueError, match="a frame is carried to one scale"):
            stylizer.steps(content, STYLE, replace(TINY, **wrong), carried=carried)
    step = next(stylizer.steps(content, STYLE, replace(TINY, size=64), carried=carried))
    with pytest.raises(ValueError, match="a frame of a video has no manifest"):
        step.manifest([], 0.0)


def test_what_opencv_cannot_do_is_no_traceback(stylizer, monkeypatch):
    import cv2

    def broken(*_, **__):
        raise cv2.error("out of memory")

    monkeypatch.setattr(cv2, "remap", broken)
    painter = Video(stylizer, STYLE, TINY)
    painter(frames(1)[0])
    with pytest.raises(RuntimeError, match="OpenCV: out of memory"):
        painter(frames(2)[1])


def test_a_checkpoint_of_a_frame_is_of_what_it_began_with(stylizer):
    content, before = (Picture(each.astype(np.float32) / 255) for each in frames(2)[::-1])
    config = replace(TINY, size=64)
    carried, other = carry(before, before, content, 3.0), carry(before, before, content, 4.0)
    steps = stylizer.steps(content, STYLE, config, carried=carried)
    data = next(steps).checkpoint()
    last = list(steps)[-1].picture.rgb
    assert np.array_equal(
        list(stylizer.steps(content, STYLE, config, carried=carried, resume=data))[-1].picture.rgb, last
    )
    for wrong in (None, other):
        with pytest.raises(ValueError, match="checkpoint"):
            stylizer.steps(content, STYLE, config, carried=wrong, resume=data)


def test_the_start_is_what_was_carried(stylizer):
    """Certain nowhere and with no iteration to speak of, it is the picture that was handed over."""
    picture = Picture(np.random.default_rng(0).random((36, 48, 3), np.float32))
    carried = Carried(picture, np.zeros((36, 48), np.float32), 3.0)
    content = frames(1, width=48, height=36)[0]
    step = next(stylizer.steps(content, STYLE, replace(TINY, size=48), carried=carried))
    assert np.allclose(step.picture.rgb, picture.rgb, atol=1e-6)


OPTIONS = [
    "--size",
    "48",
    "--scales",
    "1",
    "--iterations",
    "3",
    "--frame-iterations",
    "2",
    "--device",
    "cpu",
    "--quiet",
]
OPTIONS += ["--style-layers", ",".join(SHALLOW)]


@pytest.fixture
def style(tmp_path):
    (tmp_path / "style.jpg").write_bytes(STYLE)
    return str(tmp_path / "style.jpg")


@pytest.fixture
def clip(tmp_path):
    return make(tmp_path / "clip.mp4", frames(4), sound="aac")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "frames").mkdir()
    for i, frame in enumerate(frames(4), 1):
        Image.fromarray(frame).save(tmp_path / "frames" / f"f{i}.png")
    return str(tmp_path / "frames")


def run(*words):
    content, style, *more = map(str, words)
    return stylize.main([content, style, *OPTIONS, *more])


def test_a_video_becomes_a_video(tmp_path, style, clip, capsys):
    assert run(clip, style, "-o", tmp_path / "out.mp4", "--temporal-weight", "50") == 0
    given, made = list(film.read(clip)), list(film.read(str(tmp_path / "out.mp4")))
    assert [shot.time for shot in made] == pytest.approx([shot.time for shot in given], abs=1e-3)
    with av.open(str(tmp_path / "out.mp4")) as file:
        assert [stream.type for stream in file.streams] == ["video", "audio"]
    own = Config(size=48, scales=1, iterations=3, style_layers=SHALLOW)
    painter = Video(Stylizer("auto", "cpu"), STYLE, own, iterations=2, temporal_weight=50.0)
    for shot, frame in zip(made, given, strict=True):
        away = (shot.picture.rgb - painter(frame.picture).picture.rgb) @ [0.2126, 0.7152, 0.0722]
        assert abs(away).mean() < 0.015, "H.264 has half the colours"
    assert run(clip, style, "-o", tmp_path / "out.mp4") == 2
    assert "exists already; pass --overwrite" in capsys.readouterr().err
    assert run(clip, style, "-o", tmp_path / "out.mp4", "--overwrite") == 0


def test_a_video_becomes_a_folder_and_a_rerun_goes_on(tmp_path, style, clip):
    assert run(clip, style, "-o", tmp_path / "out") == 0
    names = [f"{i:06d}.png" for i in range(1, 5)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*names, "video.json"]
    whole = [(tmp_path / "out" / name).read_bytes() for name in names]
    for name in names[2:]:
        (tmp_path / "out" / name).unlink()
    before = (tmp_path / "out" / names[0]).stat().st_mtime_ns
    assert run(clip, style, "-o", tmp_path / "out") == 0
    assert [(tmp_path / "out" / name).read_bytes() for name in names] == whole
    assert (tmp_path / "out" / names[0]).stat().st_mtime_ns == before


def test_frames_of_another_video_are_neither_kept_nor_gone_on_with(tmp_path, style, clip, capsys):
    out = tmp_path / "out"
    other = make(tmp_path / "other.mp4", frames(2, step=3))
    assert run(clip, style, "-o", out) == 0
    for words, message in [
        ((other, style), "another content: give"),
        ((clip, clip.replace("clip.mp4", "f.png")), "another styles: give"),
        ((clip, style, "--tv-weight", "3"), "another options: give"),
        ((clip, style, "--temporal-weight", "5"), "another temporal-weight: give"),
    ]:
        Image.fromarray(frames(1)[0]).save(tmp_path / "f.png")
        assert run(*words[:2], "-o", out, *words[2:]) == 2
        assert f"{out} holds frames of a video with {message}" in capsys.readouterr().err
    assert run(clip, style, "-o", out) == 0
    assert run(other, style, "-o", out, "--overwrite") == 0
    (out / "video.json").unlink()
    assert run(other, style, "-o", out) == 2
    assert "holds pictures that no video left there" in capsys.readouterr().err


def test_a_frame_that_changed_is_not_taken_for_painted(tmp_path, style, folder, capsys, caplog):
    """Nor is what another video of this name made that begins with the same frame."""
    out, words = tmp_path / "out", (folder, style, "-o", tmp_path / "out")
    assert run(*words) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    Image.fromarray(frames(1, step=5)[0]).save(tmp_path / "frames" / "f3.png")
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert f"{out} holds what was made of another frame f3: give another folder, or --overwrite" in error
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / "frames" / "f4.png").unlink()
    assert run(*words, "--overwrite") == 0
    assert f"{out} holds 1 more pictures, which are not of this video" in caplog.text
    assert run(*words) == 0


def test_a_record_of_another_program_stays(tmp_path, style, clip, capsys):
    out = tmp_path / "out"
    out.mkdir()
    for text in ('{"my": "own"}', "[]", '"painted"', "no JSON"):
        (out / "video.json").write_text(text)
        assert run(clip, style, "-o", out) == 2
        assert "video.json was not written here: give another folder" in capsys.readouterr().err
        assert (out / "video.json").read_text() == text
    assert run(clip, style, "-o", out, "--overwrite") == 0


def test_frames_in_another_precision_do_not_go_on(tmp_path, style, clip, capsys):
    words = clip, style, "-o", tmp_path / "out", "--precision"
    assert run(*words, "fp32") == 0
    assert run(*words, "bf16") == 2
    assert "holds frames of a video with another precision (fp32, here bf16)" in capsys.readouterr().err


def test_other_weights_of_the_same_name_do_not_go_on(tmp_path, style, clip, capsys):
    words = clip, style, "-o", tmp_path / "out", "--weights"
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        save_file(random_state(i), tmp_path / str(i) / "net.safetensors")
    assert run(*words, tmp_path / "0" / "net.safetensors") == 0
    assert run(*words, tmp_path / "1" / "net.safetensors") == 2
    assert "holds frames of a video with another engine" in capsys.readouterr().err


def test_frames_left_of_another_video_are_not_taken_for_painted(tmp_path, style, clip, monkeypatch):
    """Where --overwrite was interrupted, those behind are the old ones."""
    out, other = tmp_path / "out", make(tmp_path / "other.mp4", frames(4, step=3))
    assert run(clip, style, "-o", out) == run(other, style, "-o", tmp_path / "whole") == 0
    paint, made = Video.__call__, []

    def interrupted(self, content):
        made.append(content)
        if len(made) == 3:
            raise KeyboardInterrupt
        return paint(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(Video, "__call__", interrupted)
        assert run(other, style, "-o", out, "--overwrite") == 130
    assert run(other, style, "-o", out) == 0
    names = [f"{i:06d}.png" for i in range(1, 5)]
    assert [(out / name).read_bytes() for name in names] == [(tmp_path / "whole" / name).read_bytes() for name in names]


@pytest.mark.parametrize("colour", ["keep-after", "match"])
def test_frames_that_give_their_colours_back_are_begun_again(tmp_path, style, clip, colour, capsys):
    words = clip, style, "-o", tmp_path / "out", "--colour", colour
    assert run(*words) == run(*words) == 0  # all are there
    (tmp_path / "out" / "000003.png").unlink()
    assert run(*words) == 2
    assert "cannot go on from its pictures, begin again (--overwrite)" in capsys.readouterr().err
    assert run(*words, "--overwrite") == 0


def test_options_reach_the_frames(tmp_path, style, clip, monkeypatch):
    seen = {}

    class Told(Video):
        def __init__(self, stylizer, style, config, **given):
            seen.update(given, config=config, styles=len(style))
            super().__init__(stylizer, style, config, **given)

    monkeypatch.setattr(video, "Video", Told)
    words = ["--temporal-weight", "7", "--tv-weight", "2", "--preset", "pystiche", "--overwrite"]
    assert run(clip, style, style, "-o", tmp_path / "out.mp4", *words) == 0
    assert (seen["iterations"], seen["temporal_weight"], seen["styles"]) == (2, 7.0, 2)
    assert (seen["config"].tv_weight, seen["config"].pooling) == (2.0, "max")


def test_a_folder_becomes_a_folder(tmp_path, style, folder, capsys):
    assert run(folder, style, "-o", tmp_path / "out", "--progress", "json") == 0
    names = [f"f{i}.png" for i in range(1, 5)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*names, "video.json"]
    loud = [word for word in OPTIONS if word != "--quiet"]
    assert stylize.main([folder, style, "-o", str(tmp_path / "other"), *loud, "--progress", "json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert [line["frame"] for line in lines] == [1, 2, 3, 4]
    assert {line["total"] for line in lines} == {4}
    assert lines[0]["kept"] == 0
    assert lines[1]["kept"] > 0.5
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert lines[-1]["left"] == 0 < lines[0]["left"]
    assert stylize.main([folder, style, "-o", str(tmp_path / "other"), *loud, "--progress", "json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert [(line["frame"], line["there"]) for line in lines] == [(i, True) for i in range(1, 5)]


def test_mistakes_of_the_command_line(tmp_path, style, clip, folder, capsys):
    (tmp_path / "file").write_text("")
    for words, message in [
        ((folder, style, "-o", tmp_path / "out.mp4"), "is a folder of frames, which have no times"),
        ((folder, style, "-o", folder), "holds the frames to read"),
        ((clip, style, "-o", clip, "--overwrite"), "is both CONTENT and OUT"),
        ((clip, style, "-o", tmp_path / "file"), "is no folder"),
        ((style, style, "-o", tmp_path / "x.mp4"), "--frame-iterations is for a video"),
        ((clip, style, "-o", tmp_path / "x", "--iterations", "3,2"), "iterations names 2 scales"),
        ((clip, style, "-o", tmp_path / "out.avi"), "give a folder, or a name that ends in .mp4, .m4v, .mov"),
        ((clip, style, "-o", "-"), "give a folder, or a name that ends in"),
        ((clip, style, "-o", tmp_path / "x.mp4", "--init", "-"), "--init -: a video may begin anew"),
        ((clip, style, "-o", tmp_path / "none" / "out.mp4"), "is not a folder"),
        ((clip, style, "-o", tmp_path / "x.mp4", "--trace", "t.json"), "--trace is for one picture, not for a video"),
        ((clip, style, "-o", tmp_path / "x.mp4", "--mask", "m.png"), "--mask is for one picture, not for a video"),
        (
            (clip, style, "-o", tmp_path / "x.mp4", "--temporal-weight", "-1"),
            "--temporal-weight -1.0: give",
        ),
        ((clip, style, "-o", tmp_path / "x.mp4", "--frame-iterations", "0"), "--frame-iterations 0: give a number"),
        ((style, style, "-o", tmp_path / "x.png"), "--frame-iterations is for a video"),
        ((tmp_path / "no.mp4", style, "-o", tmp_path / "x.mp4"), "no.mp4: No such file"),
        ((clip, tmp_path / "no.jpg", "-o", tmp_path / "x.mp4"), "no.jpg: No such file"),
    ]:
        assert run(*words) == 2, message
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    assert not list(tmp_path.glob("x*"))


def test_ctrl_c_leaves_the_frames_so_far(tmp_path, style, clip, monkeypatch, capsys):
    paint, made = Video.__call__, []

    def interrupted(self, content):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(content)
        return paint(self, content)

    monkeypatch.setattr(Video, "__call__", interrupted)
    assert run(clip, style, "-o", tmp_path / "out.mp4") == 130
    assert "interrupted; the 2 frames so far are in" in capsys.readouterr().err
    assert len(list(film.read(str(tmp_path / "out.mp4")))) == 2
    assert run(clip, style, "-o", tmp_path / "none.mp4") == 130  # none so far
    assert not (tmp_path / "none.mp4").exists()


def test_a_damaged_frame_ends_a_video_with_those_before(tmp_path, style, folder, capsys):
    (tmp_path / "frames" / "f3.png").write_bytes(b"damaged")
    assert run(folder, style, "-o", tmp_path / "out") == 1
    assert "f3.png" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["f1.png", "f2.png", "video.json"]
    assert run(folder, style, "-o", tmp_path / "out") == 1
    assert "f3.png" in capsys.readouterr().err


def test_videos_and_pictures_are_not_mixed_up(tmp_path, style, clip, capsys):
    for words, message in [
        ([style, style, "-o", str(tmp_path / "out.mp4")], "only a video, or its frames, as CONTENT becomes a video"),
        (["--contents", clip, "--styles", style, "-o", str(tmp_path / "o")], "is a video: give it as CONTENT"),
        (["--contents", style, "--styles", style, "-o", str(tmp_path / "o.mp4")], "o.mp4 is one video: give a folder"),
    ]:
        assert stylize.main(words) == 2
        assert message in capsys.readouterr().err


def test_other_kinds_of_videos_are_read(tmp_path, style, clip):
    (tmp_path / "other.avi").write_bytes(Path(clip).read_bytes())
    assert run(tmp_path / "other.avi", style, "-o", tmp_path / "out.mp4") == 0
