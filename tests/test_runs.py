"""The command line's checkpoints, replays, batches, progress, plots and contact sheets."""

import argparse
import functools
import hashlib
import importlib.util
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageFile

from engine import BackendError, Config, Stylizer, batches, image, manifest, painting, replay, sheet, stylize
from engine import stylizer as module
from engine.jobs import Job, product
from engine.result import Step

SMALL = ["--size", "48", "--scales", "1", "--iterations", "4", "--weights", "embedded", "--device", "cpu"]


@pytest.fixture
def main(stylizer, pictures, tmp_path, monkeypatch):
    """The command line in a folder with c.png, d.png and s.png, without loading the weights for each call."""
    monkeypatch.chdir(tmp_path)
    for name, picture in (("c", "content"), ("d", "content"), ("s", "style")):
        Image.fromarray(pictures[picture][:: -1 if name == "d" else 1]).save(f"{name}.png")
    for place in (module, batches):
        monkeypatch.setattr(place, "Stylizer", lambda *arguments, **options: stylizer)
    return lambda *arguments: stylize.main([*arguments])


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture).copy()


def interrupt_at(monkeypatch, iteration, number=signal.SIGINT):
    """Ctrl-C, or another signal, while this iteration is handed to the command line."""
    progress = painting.progress

    def interrupted(*arguments):
        for step in progress(*arguments):
            if step.iteration == iteration:
                signal.raise_signal(number)
            yield step

    monkeypatch.setattr(painting, "progress", interrupted)


def after(stylizer, iteration, **options):
    """The picture of c.png and s.png at an iteration of a SMALL run."""
    config = Config(size=48, scales=1, iterations=4, **options)
    return next(np.asarray(s.image) for s in stylizer.steps("c.png", "s.png", config) if s.iteration == iteration)


@pytest.mark.parametrize(("optimizer", "number"), [("lbfgs", signal.SIGINT), ("adam", signal.SIGTERM)])
def test_an_interrupted_run_is_resumed_to_the_same_picture(
    main, stylizer, monkeypatch, capsys, tmp_path, optimizer, number
):
    options = ["c.png", "s.png", *SMALL, "--optimizer", optimizer, "--trace", "trace.json"]
    assert main(*options, "-o", "whole.png") == 0
    whole = json.loads(Path("trace.json").read_text())["steps"]
    Path("trace.json").unlink()
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, number)
        assert main(*options, "-o", "out.png", "--checkpoint", "run.ckpt") == 130
    assert "the picture so far is in out.png, and --resume run.ckpt goes on" in capsys.readouterr().err
    assert replay.read("out.png")["iterations"] == {"done": 2, "total": 4}
    assert not np.array_equal(pixels("out.png"), pixels("whole.png"))
    assert np.array_equal(pixels("out.png"), after(stylizer, 2, optimizer=optimizer))
    assert not np.array_equal(pixels("out.png"), after(stylizer, 1, optimizer=optimizer))
    before = (tmp_path / "run.ckpt").read_bytes()
    assert main(*options, "-o", "out.png", "--resume", "run.ckpt", "--seed", "3", "--overwrite") == 2
    assert "another seed (0, here 3)" in capsys.readouterr().err
    assert (tmp_path / "run.ckpt").read_bytes() == before
    assert main(*options, "-o", "out.png", "--resume", "run.ckpt", "--checkpoint", "run.ckpt", "--overwrite") == 0
    assert np.array_equal(pixels("out.png"), pixels("whole.png"))
    assert not (tmp_path / "run.ckpt").exists()
    resumed = json.loads(Path("trace.json").read_text())["steps"]
    shown = ("scale", "iteration", "loss")
    assert [[row[name] for name in shown] for row in resumed] == [[row[name] for name in shown] for row in whole]
    assert [row["seconds"] for row in resumed] == sorted(row["seconds"] for row in resumed)
    record = replay.read("out.png")
    assert [iteration for iteration, _ in record["losses"]] == [1, 2, 3, 4]
    assert record["timings"]["seconds"] >= resumed[-1]["seconds"] - 0.001


def test_a_picture_that_is_finished_is_not_interrupted_any_more(main, monkeypatch, tmp_path):
    interrupt_at(monkeypatch, 4)
    assert main("c.png", "s.png", "-o", "out.png", *SMALL, "--checkpoint", "run.ckpt") == 0
    assert replay.read("out.png")["iterations"] == {"done": 4, "total": 4}
    assert not (tmp_path / "run.ckpt").exists()


def test_the_size_of_a_picture_that_tiles_is_known_before(stylizer):
    picture = image.load(np.zeros((40, 60, 3), np.uint8))
    for size in (100, 72):
        config = Config(size=size, tile=True, iterations=1, style_layers=("relu1_1",))
        job = Job(picture, (picture,), "out.png")
        assert painting.size(job, config) == stylizer(picture, picture, config).image.size


def test_a_checkpoint_of_another_run_is_not_said_to_go_on(main, monkeypatch, capsys, tmp_path):
    """One that --overwrite would have replaced if the run had come so far."""
    (tmp_path / "run.ckpt").write_text("old")
    begin = painting.begin

    def breaks(*arguments):
        yield next(begin(*arguments))
        raise FloatingPointError("broken")

    monkeypatch.setattr(painting, "begin", breaks)
    options = ["--checkpoint", "run.ckpt", "--overwrite"]
    assert main("c.png", "s.png", "-o", "out.png", *SMALL, *options) == 1
    assert capsys.readouterr().err.endswith("broken; the picture so far is in out.png\n")


@pytest.mark.parametrize("note", [None, "mine", {"other": 1}])
def test_a_checkpoint_of_another_program_is_resumed(main, stylizer, tmp_path, note):
    config = Config(size=48, scales=1, iterations=4)
    for step in stylizer.steps("c.png", "s.png", config):
        if step.iteration == 3:
            (tmp_path / "run.ckpt").write_bytes(step.checkpoint(note))
            break
    assert main("c.png", "s.png", *SMALL, "-o", "out.png", "--resume", "run.ckpt") == 0
    assert [iteration for iteration, _ in replay.read("out.png")["losses"]] == [4]


def test_checkpoints_are_written_by_the_clock(main, monkeypatch):
    written = []
    save = Step.save_checkpoint
    monkeypatch.setattr(Step, "save_checkpoint", lambda *a: (written.append(a), save(*a)))
    for seconds, count in (("0", 3), ("1000", 0)):  # none after the last iteration
        written.clear()
        options = ["--checkpoint", "run.ckpt", "--checkpoint-every", seconds, "--overwrite"]
        assert main("c.png", "s.png", "-o", "out.png", *SMALL, *options) == 0
        assert len(written) == count


def test_a_file_that_is_there_is_no_checkpoint_to_be_removed(main, capsys, tmp_path):
    options = ["c.png", "s.png", "-o", "out.png", *SMALL, "--checkpoint", "mine"]
    (tmp_path / "mine").write_text("mine")
    assert main(*options) == 2
    assert "mine exists already: --resume goes on from it" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "mine"
    assert main(*options, "--overwrite") == 0
    assert not (tmp_path / "mine").exists()


def test_a_checkpoint_behind_a_link_is_removed_when_the_run_is_done(main, monkeypatch, tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run.ckpt").symlink_to(tmp_path / "scratch" / "run")
    options = ["--checkpoint", "run.ckpt", "--checkpoint-every", "0"]
    assert main("c.png", "s.png", "-o", "out.png", *SMALL, *options) == 0
    assert not list((tmp_path / "scratch").iterdir())


def test_files_on_the_way_that_cannot_be_written_end_no_run(main, monkeypatch, caplog, tmp_path):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    save = image.save
    monkeypatch.setattr(Step, "save_checkpoint", full)
    monkeypatch.setattr(image, "save", lambda *a: save(*a) if len(a) == 3 else full())  # with its manifest: the result
    options = ["--checkpoint", "run.ckpt", "--checkpoint-every", "0", "--save-every", "2"]
    assert main("c.png", "s.png", "-o", "out.png", *SMALL, *options) == 0
    for name in ("run.ckpt", "out-00002.png"):
        assert f"{name} could not be written: No space left on device" in caplog.text
    assert manifest.versions() == replay.read("out.png")["versions"]


@pytest.mark.parametrize("done", [0, 2])
@pytest.mark.parametrize("error", [FloatingPointError("broken"), MemoryError("broken"), BackendError("broken")])
def test_a_run_that_breaks_keeps_its_picture_if_there_is_one(main, stylizer, monkeypatch, capsys, error, done):
    steps, wanted = type(stylizer).steps, after(stylizer, max(done, 1))

    def breaking(*arguments, **options):
        for step in steps(*arguments, **options):
            if step.iteration > done:
                raise error
            yield step

    monkeypatch.setattr(type(stylizer), "steps", breaking)
    assert main("c.png", "s.png", "-o", "out.png", *SMALL, "--progress", "none") == 1
    assert capsys.readouterr().err.endswith("broken; the picture so far is in out.png\n" if done else ": broken\n")
    assert Path("out.png").exists() == bool(done)
    assert not done or np.array_equal(pixels("out.png"), wanted)


def test_ctrl_c_outside_of_the_iterations_says_no_more_than_it_knows(main, monkeypatch, capsys):
    monkeypatch.setattr(image, "save", lambda *a: signal.raise_signal(signal.SIGINT))
    assert main("c.png", "s.png", "-o", "out.png", *SMALL, "--progress", "none") == 130
    assert capsys.readouterr().err.endswith("engine.stylize: interrupted\n")


def test_a_second_ctrl_c_does_not_wait():
    with pytest.raises(KeyboardInterrupt), painting._deferred(True) as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_resuming_from_what_is_no_checkpoint(main, capsys, tmp_path):
    (tmp_path / "run.ckpt").write_bytes(b"nothing")
    assert main("c.png", "s.png", "-o", "out.png", *SMALL, "--resume", "run.ckpt") == 2
    assert main("c.png", "s.png", "-o", "out.png", *SMALL, "--resume", "missing") == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "damaged" in first
    assert "No such file" in second
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("name", ["out.png", "out.jpg", "out.bmp"])
def test_a_replay_makes_the_same_bytes(main, name):
    """The pixels, and the file but for the timings that its manifest holds."""
    assert main("c.png", "s.png", "-o", name, *SMALL, "--init", "noise", "--seed", "7") == 0
    assert main("--replay", name, "-o", f"again-{name}") == 0
    assert pixels(name).tobytes() == pixels(f"again-{name}").tobytes()
    first, second = (replay.read(path) for path in (name, f"again-{name}"))
    assert first.pop("timings")
    assert second.pop("timings")
    assert first == second


@pytest.mark.parametrize("name", ["out.png", "out.jpg", "out.webp"])
def test_a_manifest_is_read_of_a_picture_of_any_size_and_nothing_is_decoded(main, monkeypatch, name):
    assert main("c.png", "s.png", "-o", name, *SMALL) == 0
    Image.new("RGB", (9, 9)).save(f"bare-{name}")
    for place, limit in ((image, "MAX_PIXELS"), (Image, "MAX_IMAGE_PIXELS")):
        monkeypatch.setattr(place, limit, 16)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    assert replay.read(name)["content"]["name"] == "c.png"
    with pytest.raises(ValueError, match="carries no manifest"):
        replay.read(f"bare-{name}")
    assert Image.MAX_IMAGE_PIXELS == 16


def test_a_replay_takes_masks_and_what_was_frozen(main):
    left = np.zeros((40, 56), np.uint8)
    left[:, :28] = 255
    for name, mask in (("left", left), ("right", 255 - left), ("top", np.roll(left, 20, axis=1))):
        Image.fromarray(mask).save(f"{name}.png")
    own = ["--mask", "left.png", "--mask", "right.png:top.png", "--freeze", "left.png", "--init", "noise"]
    assert main("c.png", "s.png", "d.png", "-o", "out.png", *SMALL, *own) == 0
    assert main("--replay", "out.png", "-o", "again.png") == 0
    assert np.array_equal(pixels("out.png"), pixels("again.png"))
    record = replay.read("again.png")
    assert (record["masks"], record["freeze"]) == (["left.png", ["right.png", "top.png"]], "left.png")


def test_a_manifest_names_files_as_they_were_when_the_run_began(main, monkeypatch):
    """A mask that is changed meanwhile, for the next run, is another one."""
    mask, progress = np.zeros((40, 56), np.uint8), painting.progress
    mask[:, :28] = 255
    Image.fromarray(mask).save("m.png")
    before = hashlib.sha256(Path("m.png").read_bytes()).hexdigest()

    def changing(*arguments):
        for step in progress(*arguments):
            Image.fromarray(255 - mask).save("m.png")
            yield step

    monkeypatch.setattr(painting, "progress", changing)
    assert main("c.png", "s.png", "-o", "out.png", *SMALL, "--freeze", "m.png") == 0
    assert replay.read("out.png")["files"] == {"m.png": before}
    assert main("--replay", "out.png", "-o", "again.png") == 2  # it is not that mask any more


@pytest.mark.parametrize("name", ["picture", "checkpoint", "plot", "targets", "manifest"])
def test_a_write_that_fails_leaves_the_old_file(main, stylizer, pictures, monkeypatch, tmp_path, name):
    """Each is written under another name first."""
    out = tmp_path / {"targets": "old.safetensors", "manifest": "old.bmp.json"}.get(name, "old.png")
    out.write_text("old")

    def broken(self, *arguments, **options):
        if isinstance(self, Path):
            path = self
        else:
            path = Path(next(each for each in arguments if isinstance(each, str | Path)))
        with path.open("wb") as file:
            file.write(b"new")
        raise OSError(28, "No space left on device")

    write = {
        "picture": (Image.Image, "save", lambda: image.save(Image.new("RGB", (8, 8)), str(out))),
        "checkpoint": (Path, "write_bytes", lambda: painting._write(str(out), b"data")),
        "targets": (Path, "write_bytes", lambda: stylizer.targets(pictures["style"], Config(size=48)).save(out)),
        "manifest": (Path, "write_text", lambda: image.save(Image.new("RGB", (8, 8)), str(tmp_path / "old.bmp"), {})),
    }
    if name == "plot":
        figure = pytest.importorskip("matplotlib.figure").Figure
        write["plot"] = (
            figure,
            "savefig",
            lambda: painting.plot([{"scale": 48, "iteration": 1, "loss": 2.0}], str(out)),
        )
    place, function, call = write[name]
    with monkeypatch.context() as patch:
        patch.setattr(place, function, broken)
        with pytest.raises(OSError, match="No space"):
            call()
    assert out.read_text() == "old"
    assert not list(tmp_path.glob(".stylize-*"))


def test_the_file_depends_on_nothing_but_the_run_and_its_timings(main, monkeypatch, tmp_path):
    describe = manifest.describe
    monkeypatch.setattr(manifest, "describe", lambda *a: describe(*a) | {"timings": {}})
    for name in ("one.png", "two.png"):
        assert main("c.png", "s.png", "-o", name, *SMALL) == 0
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_a_picture_tells_nothing_of_folders(main, tmp_path):
    (tmp_path / "private").mkdir()
    for name in ("c.png", "s.png"):
        shutil.move(name, f"private/{name}")
    paths = [str(tmp_path / "private" / name) for name in ("c.png", "s.png")]
    assert main(*paths, "-o", "out.png", *SMALL, "--init", paths[0]) == 0
    assert b"private" not in (tmp_path / "out.png").read_bytes()
    assert replay.read("out.png")["content"]["name"] == "c.png"
    assert main("--replay", "out.png", "-o", "again.png") == 2  # neither is beside it
    shutil.copy("private/c.png", "c.png")
    assert main("--replay", "out.png", *paths, "-o", "again.png") == 0
    assert np.array_equal(pixels("out.png"), pixels("again.png"))


def test_replay_refuses_other_inputs_and_warns_of_other_versions(main, capsys, caplog, tmp_path, monkeypatch):
    assert main("c.png", "s.png", "-o", "out.png", *SMALL) == 0
    record = replay.read("out.png")
    for arguments, words in (
        (["d.png", "s.png"], "d.png is not the content"),
        (["c.png", "c.png"], "c.png is not style 1"),
        (["c.png", "s.png", "s.png"], "1 styles, 2 are given"),
        (["--size", "64"], "leave --size out"),
        (["none", "gone.png"], "gone.png: No such file"),
    ):
        assert main("--replay", "out.png", *arguments, "-o", "again.png") == 2
        assert words in capsys.readouterr().err
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "out.png").write_bytes(Path("out.png").read_bytes())
    assert main("--replay", "far/out.png", "-o", "again.png") == 2
    told = "far/c.png: No such file: put it beside the manifest, or give CONTENT and STYLE again"
    assert told in capsys.readouterr().err
    record["engine"]["sha256"] = "0" * 64
    (tmp_path / "other.json").write_text(json.dumps(record))
    assert main("--replay", "other.json", "-o", "again.png") == 2
    assert "the weights are not those" in capsys.readouterr().err
    assert not (tmp_path / "again.png").exists()
    monkeypatch.setattr(manifest, "versions", lambda: record["versions"] | {"torch": "1.0"})
    assert main("--replay", "out.png", "-o", "again.png") == 0
    assert "is 1.0: the picture may differ" in caplog.text
    assert np.array_equal(pixels("out.png"), pixels("again.png"))


@pytest.mark.parametrize(
    ("device", "found"), [("auto", ("cudnn", "fp16")), ("cudnn", ("cudnn", "fp16")), ("cpu", ("cpu", "auto"))]
)
def test_a_replay_takes_the_precision_only_with_its_device(device, found):
    record = {"engine": {"device": "cudnn", "precision": "fp16", "weights": "embedded"}}
    given = argparse.Namespace(device=device, precision="auto", weights="auto")
    replay.take_engine(record, Path(), given)
    assert (given.device, given.precision) == found


def test_a_replay_of_a_run_that_fell_back_does_so_again(stylizer, caplog):
    config = Config().for_weights("embedded")
    goal = SimpleNamespace(content=None, styles=(), config=config, carried=None)
    half = SimpleNamespace(device="cudnn", precision="fp16", weights_name="embedded", weights_kind="embedded")
    half.weights_digest = stylizer.weights_digest
    record = Stylizer._manifest(half, goal, manifest.inputs(config, None, None), [(1, 2.0)], 0, "fp32", 1)
    given = argparse.Namespace(device="auto", precision="auto", weights="auto")
    replay.take_engine(record, Path(), given)
    assert (given.device, given.precision) == ("cudnn", "auto")
    replay.check_engine(record, half, Config())  # of a manifest that leaves the layers out
    assert not caplog.text
    half.precision = "fp32"
    replay.check_engine(record, half, config)
    assert "precision was fp16, is fp32: the picture may differ" in caplog.text


def test_a_picture_from_a_pipe_is_replayed_from_a_pipe(main, monkeypatch, capsys, tmp_path):
    def feed():
        data = io.BytesIO((tmp_path / "c.png").read_bytes())
        monkeypatch.setattr(sys, "stdin", type("Pipe", (), {"buffer": data}))

    feed()
    assert main("-", "s.png", "-o", "out.png", *SMALL) == 0
    assert main("--replay", "out.png", "-o", "again.png") == 2
    assert "came without names" in capsys.readouterr().err
    feed()
    assert main("--replay", "out.png", "-", "s.png", "-o", "again.png") == 0
    assert np.array_equal(pixels("out.png"), pixels("again.png"))


def test_a_replay_writes_over_nothing_that_it_finds_itself(main, capsys):
    shutil.copy("d.png", "m.png")
    assert main("c.png", "s.png", "-o", "out.png", *SMALL, "--freeze", "m.png", "--init", "d.png") == 0
    before = {name: Path(name).read_bytes() for name in ("c.png", "s.png", "m.png", "d.png", "out.png")}
    for name in before:
        for flag in ("--trace", "--checkpoint"):
            assert main("--replay", "out.png", "-o", "again.png", flag, name, "--overwrite") == 2
            assert f"{name} is both a picture to read and {flag}" in capsys.readouterr().err
    assert {name: Path(name).read_bytes() for name in before} == before
    assert main("--replay", "out.png", "-o", "c.png", "--overwrite") == 0  # read before it is written
    assert main("d.png", "s.png", "-o", "out.tif", *SMALL) == 0
    assert main("--replay", "out.tif", "-o", "again.tif", "--trace", "out.tif.json", "--overwrite") == 2


@pytest.mark.parametrize(
    ("sources", "options"), [(["none", "s.png"], ["--size", "64x48"]), (["c.png", "none"], ["--init", "noise"])]
)
def test_textures_and_inversions_are_replayed(main, sources, options):
    assert main(*sources, "-o", "out.png", *SMALL, *options) == 0
    assert main("--replay", "out.png", "-o", "again.png") == 0
    assert np.array_equal(pixels("out.png"), pixels("again.png"))


def test_targets_are_given_again_to_a_replay(main, capsys):
    assert main("c.png", "s.png", "-o", "first.png", *SMALL, "--save-targets", "t.safetensors") == 0
    assert main("c.png", "t.safetensors", "-o", "out.png", *SMALL) == 0
    assert main("--replay", "out.png", "-o", "again.png") == 2
    assert "came without names" in capsys.readouterr().err
    assert main("--replay", "out.png", "c.png", "t.safetensors", "-o", "again.png") == 0
    assert np.array_equal(pixels("first.png"), pixels("again.png"))


def test_a_cell_of_a_contact_sheet_is_replayed(main, capsys, tmp_path):
    assert main("c.png", "s.png", "-o", "sheet.png", *SMALL, "--grid", "style-weight=10,1000") == 0
    assert main("--replay", "sheet.png", "-o", "again.png") == 2
    assert "replay a manifest of its list" in capsys.readouterr().err
    with Image.open("sheet.png") as picture:
        cells = json.loads(manifest.extract(picture))["sheet"]
    (tmp_path / "cell.json").write_text(json.dumps(cells[1]))
    assert main("--replay", "cell.json", "-o", "again.png") == 0
    assert main("c.png", "s.png", "-o", "single.png", *SMALL, "--style-weight", "1000") == 0
    assert np.array_equal(pixels("again.png"), pixels("single.png"))


def test_a_replay_finds_weights_beside_the_manifest(states, tmp_path):
    record = {"engine": {"device": "cpu", "precision": "fp32", "weights": states["caffe"][0].name}}
    given = argparse.Namespace(device="auto", precision="auto", weights="auto")
    replay.take_engine(record, states["caffe"][0].parent, given)
    assert Path(given.weights) == states["caffe"][0]
    given.weights = "embedded"
    replay.take_engine(record, tmp_path, given)
    assert given.weights == "embedded"


def test_a_result_of_the_library_is_saved_with_its_manifest_and_replayed(main, stylizer, tmp_path, capsys):
    mask = np.zeros((40, 56), np.float32)
    mask[:, :28] = 1
    Image.fromarray((mask * 255).astype(np.uint8)).save("m.png")
    config = Config(size=48, scales=1, iterations=4)
    result = stylizer("c.png", ["s.png", "d.png"], config, masks=[Path("m.png"), ("m.png", None)], freeze="m.png")
    result.save(tmp_path / "out.png")
    record = replay.read("out.png")
    assert record == json.loads(json.dumps(result.manifest))
    assert (record["masks"], record["freeze"]) == (["m.png", "m.png"], "m.png")
    assert record["files"] == {"m.png": hashlib.sha256(Path("m.png").read_bytes()).hexdigest()}
    assert [(i + 1, loss) for i, (_, loss, _) in enumerate(result.trace)] == [tuple(each) for each in record["losses"]]
    assert 0 < result.trace[-1][2] <= record["timings"]["seconds"] + 1e-3
    assert np.array_equal(pixels("out.png"), np.asarray(result.image))
    assert main("--replay", "out.png", "-o", "again.png") == 0
    assert np.array_equal(pixels("out.png"), pixels("again.png"))
    with pytest.raises(ValueError, match="exists already"):
        result.save("out.png")
    result.save("out.png", overwrite=True)
    with pytest.raises(ValueError, match="unknown picture format"):
        result.save("out.xyz")
    stylizer(np.asarray(Image.open("c.png")), "s.png", config, masks=mask).save("arrays.png")
    assert replay.read("arrays.png")["content"]["name"] is None
    assert main("--replay", "arrays.png", "c.png", "s.png", "-o", "third.png") == 2
    assert "or was none: no replay is possible" in capsys.readouterr().err


def test_a_tiff_of_the_command_line_has_the_levels_between_the_256(main, stylizer):
    assert main("c.png", "s.png", "-o", "out.tif", *SMALL) == 0
    found = tifffile.imread("out.tif")
    config = Config(size=48, scales=1, iterations=4)
    result = stylizer("c.png", "s.png", config)
    exact = np.rint(result.last.picture.rgb.astype(np.float64) * 65535)
    assert found.dtype == np.uint16
    np.testing.assert_allclose(found, exact, atol=1)
    assert len(np.unique(found)) > 1000
    assert replay.read("out.tif")["options"] == json.loads(json.dumps(result.manifest["options"]))


BATCH = ["--contents", "c.png", "d.png", "--styles", "s.png", "-o", "out"]


def test_a_rerun_of_a_batch_with_other_options_says_so(main, caplog):
    def told(*options):
        caplog.clear()
        assert main(*BATCH, *SMALL, *options) == 0
        return [each.message for each in caplog.records if "--overwrite" in each.message]

    assert told("--style-layers", "relu1_1:2,relu2_1") == []
    assert told("--style-layers", "relu1_1:2,relu2_1") == []
    (message,) = told()
    assert message.startswith("2 of these were made with other options")
    assert told("--style-layers", "relu1_1:2,relu2_1", "--content-layers", "relu2_2") == []  # what auto is here
    assert told("--style-layers", "relu1_1:2,relu2_1", "--content-layers", "relu4_2")
    assert told("--overwrite") == []
    Path("out/c--s.png").write_bytes(Path("c.png").read_bytes())
    assert told()[0].startswith("1 of these")


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_batch_makes_what_single_runs_make(main, jobs, tmp_path):
    assert main(*BATCH, *SMALL, "--jobs", jobs) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["c--s.png", "d--s.png"]
    assert main("d.png", "s.png", "-o", "single.png", *SMALL) == 0
    assert np.array_equal(pixels("out/d--s.png"), pixels("single.png"))
    assert replay.read("out/d--s.png")["content"]["name"] == "d.png"


def test_jobs_share_the_processors(main, stylizer, monkeypatch):
    threads = []
    monkeypatch.setattr(batches, "Stylizer", lambda *arguments: threads.append(arguments[3]))
    monkeypatch.setattr(batches, "paint", lambda *arguments, **options: (0, ""))
    monkeypatch.setattr(batches.torch, "get_num_threads", lambda: 8)
    for jobs, expected in (("1", None), ("2", 4), ("16", 4)):  # there are two pictures
        assert main(*BATCH, *SMALL, "--jobs", jobs) == 0
        assert threads[-1] == expected


def test_jobs_run_at_the_same_time(main, monkeypatch):
    both = threading.Barrier(2, timeout=20)  # breaks if one waits for the end of the other
    monkeypatch.setattr(batches, "paint", lambda *arguments, **options: (both.wait(), (0, ""))[1])
    assert main(*BATCH, *SMALL, "--jobs", "2") == 0


def test_results_beside_their_contents_are_no_contents(main, tmp_path):
    """Nor is what is hidden; but what is named is."""
    Path("in").mkdir()
    shutil.copy("c.png", "in/c.png")
    shutil.copy("d.png", "in/._d.png")
    for _ in range(2):
        assert main("--contents", "in", "--styles", "s.png", "-o", "in", *SMALL) == 0
        assert sorted(path.name for path in Path("in").iterdir()) == ["._d.png", "c--s.png", "c.png"]
    for contents in (["in/*"], [str(tmp_path / "in")]):
        assert [job.content.rpartition("/")[2] for job in product(contents, ["s.png"], "./in")] == ["c.png"]
    assert len(product(["in", "in/c--s.png"], ["s.png"], "in")) == 2


def test_a_manifest_without_its_picture_is_replaced_and_other_files_are_not(main, capsys):
    batch = ["--contents", "c.png", "--styles", "s.png", "-o", "{content}--{style}.tif", *SMALL]
    assert main(*batch) == 0
    Path("c--s.tif").unlink()
    assert main(*batch) == 0
    assert Path("c--s.tif").exists()
    Path("c--s.tif").unlink()
    Path("c--s.tif.json").write_text("{}")
    assert main(*batch) == 2
    assert "c--s.tif.json exists already" in capsys.readouterr().err


def test_frames_replace_nothing_that_is_needed(main, capsys):
    for name in ("o-00002.png", "s-00002.png"):
        shutil.copy("s.png", name)
    every = [*SMALL, "--save-every", "2", "--overwrite"]
    for arguments in (
        ["c.png", "s.png", "-o", "o.png", "--init", "o-00002.png"],
        ["c.png", "o-00002.png", "-o", "o.png"],
        ["c.png", "s.png", "-o", "o.png", "--trace", "o-00002.png"],
        ["--contents", "c.png", "--styles", "s.png", "s-00002.png", "-o", "made"],
        ["--contents", "c.png", "--styles", "s.png", "-o", ".", "--init", "c--s-00002.png"],
    ):
        assert main(*arguments, *every) == 2
        assert "has the name of a frame of --save-every" in capsys.readouterr().err
    assert main("c.png", "o-00002.png", "-o", "o.png", *SMALL, "--save-every", "3") == 0


def test_the_start_of_a_batch_is_not_one_of_its_results(main, capsys):
    Path("made").mkdir()
    shutil.copy("d.png", "made/c--s.png")
    batch = ["--contents", "c.png", "--styles", "s.png", "-o", "made", *SMALL]
    assert main(*batch, "--init", "made/c--s.png", "--overwrite") == 2
    assert "made/c--s.png" in capsys.readouterr().err


def test_pictures_that_are_there_are_left_alone(main, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "c--s.png").write_bytes(b"mine")
    assert main(*BATCH, *SMALL) == 0
    assert (tmp_path / "out" / "c--s.png").read_bytes() == b"mine"
    assert (tmp_path / "out" / "d--s.png").exists()
    assert main(*BATCH, *SMALL, "--overwrite") == 0
    assert replay.read("out/c--s.png")


def test_shards_make_their_part(main, tmp_path):
    assert main(*BATCH, *SMALL, "--shard", "2/2") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["d--s.png"]


@pytest.mark.parametrize("part", ["1/2", "2/2"])
def test_a_shard_writes_over_nothing_that_another_one_reads(main, capsys, part):
    Path("w").mkdir()
    for name in ("p.png", "p--s.png"):
        shutil.copy("c.png", f"w/{name}")
    batch = ["--contents", "w/p.png", "w/p--s.png", "--styles", "s.png", "-o", "w", "--overwrite", *SMALL]
    assert main(*batch, "--shard", part) == 2
    assert "w/p--s.png is both one to read and a picture to write" in capsys.readouterr().err
    assert np.array_equal(pixels("w/p--s.png"), pixels("c.png"))


def test_a_folder_in_the_place_of_a_result_is_told(main, capsys):
    Path("out/c--s.png").mkdir(parents=True)
    assert main(*BATCH, *SMALL) == 2
    assert "out/c--s.png is a folder" in capsys.readouterr().err


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_one_that_fails_does_not_stop_the_rest(main, tmp_path, capsys, jobs):
    (tmp_path / "b.png").write_bytes(b"no picture")
    arguments = ["--contents", "b.png", "c.png", "--styles", "s.png", "-o", "out/{content}.jpg"]
    assert main(*arguments, *SMALL, "--jobs", jobs) == 1
    err = capsys.readouterr().err
    assert "1 of 2 pictures failed" in err
    assert "out/b.jpg: b.png is not a picture" in err
    assert "Traceback" not in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["c.jpg"]


def test_a_run_that_breaks_leaves_no_picture_in_a_batch(main, tmp_path, monkeypatch):
    from engine import losses

    write = losses.Objective.write
    monkeypatch.setattr(losses.Objective, "write", lambda *a: write(*a) * float("nan"))
    assert main(*BATCH, *SMALL) == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_ctrl_c_stops_a_batch_cleanly(pictures, tmp_path):
    for name in ("c", "d", "s"):
        Image.fromarray(pictures["style"]).save(tmp_path / f"{name}.png")
    command = [sys.executable, "-m", "engine.stylize", *BATCH, "--size", "64", "--scales", "1", "--weights", "embedded"]
    command += ["--iterations", "100000", "--device", "cpu", "--progress", "json", "--jobs", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    first = json.loads(process.stderr.readline())
    assert first["total"] == 100000
    reader = threading.Thread(target=lambda: lines.extend(process.stderr))
    lines: list[str] = []
    reader.start()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    reader.join()
    process.stderr.close()
    assert "interrupted; 0 of 2 pictures are there" in lines[-1]
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_left_of_a_run_counts_the_pixels_of_all_scales(monkeypatch):
    sides, now = [91] * 3 + [128] * 2, 0.0
    monkeypatch.setattr(painting, "time", SimpleNamespace(monotonic=lambda: now))
    picture = image.load(np.zeros((96, 128, 3), np.uint8))
    clock = painting.Clock(Job(picture, (picture,), "out.png"), Config(size="original", scales=2, iterations=(4, 2)))
    left = sum(side**2 for side in sides)
    for i, side in enumerate(sides, 1):
        now, left = now + side**2, left - side**2
        step = SimpleNamespace(scale=side, iteration=i, total=6 if i < 3 else 5)  # the first scale stops early
        clock.tick(step)
        assert clock.left(step) == (None if i == 1 else left + 91**2 if i < 3 else left)


@pytest.mark.parametrize("form", ["json", "auto"])
def test_what_is_left_is_told(main, capsys, monkeypatch, form):
    monkeypatch.setattr(painting.Clock, "left", lambda self, step: None if step.iteration == 1 else 125.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert main("c.png", "s.png", "-o", "out.png", *SMALL, "--progress", form) == 0
    told = capsys.readouterr().err
    if form == "json":
        assert [json.loads(line)["left"] for line in told.splitlines() if line[0] == "{"] == [None, 125.0, 125.0, 125.0]
    else:
        assert re.search(r"4/4 \[\d\d:\d\d<02:05, ", told)


def test_progress_for_programs(main, capsys, monkeypatch):
    assert main("c.png", "s.png", "-o", "out.png", *SMALL, "--progress", "json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(row["iteration"], row["total"], row["scale"], row["out"]) for row in rows] == [
        (i, 4, 48, "out.png") for i in range(1, 5)
    ]
    assert [row["loss"] for row in rows] == [loss for _, loss in replay.read("out.png")["losses"]]
    assert main("c.png", "s.png", "-o", "quiet.png", *SMALL, "--progress", "json", "--quiet") == 0
    assert not capsys.readouterr().err
    monkeypatch.setattr(sys, "stderr", None)  # it is closed
    assert main("c.png", "s.png", "-o", "closed.png", *SMALL, "--progress", "json") == 0


def test_losses_that_are_no_numbers_are_left_out(main, capsys, monkeypatch):
    """JSON has no NaN, which a GPU may meet before it falls back; a plot has a gap there."""
    own = Step.loss.fget
    monkeypatch.setattr(Step, "loss", property(lambda self: float("nan") if self.iteration == 2 else own(self)))
    found = ["c.png", "s.png", *SMALL, "--progress", "json"]
    assert main(*found, "-o", "out.png", "--trace", "trace.json") == 0
    strict = functools.partial(json.loads, parse_constant=pytest.fail)
    lines = [strict(line) for line in capsys.readouterr().err.splitlines()]
    rows = strict(Path("trace.json").read_text())["steps"]
    for told in (lines, rows):
        assert [row["iteration"] for row in told if row["loss"] is None] == [2]
    with Image.open("out.png") as picture:
        record = strict(manifest.extract(picture))
    assert [iteration for iteration, _ in record["losses"]] == [1, 3, 4]
    assert main(*found, "-o", "sheet.png", "--grid", "seed=1", "iterations=2") == 0
    with Image.open("sheet.png") as picture:
        (cell,) = strict(manifest.extract(picture))["sheet"]
    assert (cell["losses"], cell["iterations"]["done"]) == ([], 2)  # of a cell, the last
    if importlib.util.find_spec("matplotlib"):
        painting.plot(rows, "loss.png")


def test_plot_of_the_losses(main, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert main("c.png", "s.png", "-o", "out.png", *SMALL, "--plot", "loss.png") == 0
    drawn = pixels("loss.png")
    assert drawn.shape[:2] == (500, 800)
    curve = (drawn[..., 2].astype(int) - drawn[..., 0] > 60).any(axis=0)  # columns with some of its blue
    assert curve.mean() > 0.6
    for name in ("losses", "losses.xyz"):
        assert main("c.png", "s.png", "-o", "again.png", *SMALL, "--plot", name) == 2
        assert f"--plot {name}: unknown picture format; choose from" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.png", "d.png", "loss.png", "out.png", "s.png"]


def test_plot_without_matplotlib_names_the_extra(main, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(stylize.importlib.util, "find_spec", lambda name: None)
    assert main("c.png", "s.png", "-o", "out.png", *SMALL, "--plot", "loss.png") == 1
    assert "[plot]'" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_a_contact_sheet_over_options(main, monkeypatch, capsys):
    made = []
    draw = sheet.draw
    monkeypatch.setattr(sheet, "draw", lambda cells, columns: (made.extend(cells), draw(cells, columns))[1])
    grid = ["--grid", "seed=1,2", "size=48,56,64", "--init", "noise", "--iterations", "1"]
    assert main("c.png", "s.png", "-o", "sheet.png", *SMALL, *grid) == 0
    assert [labels for labels, _ in made[:2]] == [["seed 1", "size 48"], ["seed 1", "size 56"]]
    assert [picture.size[0] for _, picture in made] == [48, 56, 64] * 2
    assert main("c.png", "s.png", "-o", "one.png", *SMALL, *grid[3:], "--seed", "2") == 0
    assert np.array_equal(np.asarray(made[3][1]), pixels("one.png"))
    height, width = pixels("sheet.png").shape[:2]
    assert width > 3 * 64
    assert height > 2 * 46
    assert main("--replay", "sheet.png", "-o", "again.png") == 2
    assert "contact sheet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "blank", "words"),
    [
        (FloatingPointError("broken"), 1, [1], "seed 1: broken; the other pictures are in sheet.png"),
        (ValueError("broken"), 1, [1], "seed 1: broken; the other pictures are in sheet.png"),
        (KeyboardInterrupt(), 130, [1, 2], "interrupted; the other pictures are in sheet.png"),
    ],
)
def test_a_contact_sheet_keeps_what_there_is(main, stylizer, monkeypatch, capsys, error, status, blank, words):
    made, steps, draw = [], type(stylizer).steps, sheet.draw

    def breaking(self, content, style, config, **options):
        yield from steps(self, content, style, config, **options)
        if config.seed == 1:
            raise error

    monkeypatch.setattr(type(stylizer), "steps", breaking)
    monkeypatch.setattr(sheet, "draw", lambda cells, columns: (made.extend(cells), draw(cells, columns))[1])
    options = ["--iterations", "1", "--grid", "seed=0,1,2", "--progress", "none"]
    assert main("c.png", "s.png", "-o", "sheet.png", *SMALL, *options) == status
    assert capsys.readouterr().err.endswith(f"{words}\n")
    assert [i for i, (_, picture) in enumerate(made) if picture is None] == blank
    with Image.open("sheet.png") as drawn:
        cells = json.loads(drawn.info["gatys-engine"])["sheet"]
    assert [cell["options"]["seed"] for cell in cells] == [i for i in range(3) if i not in blank]


def test_a_mistake_in_a_cell_is_told_before_the_first_is_painted(main, stylizer, monkeypatch, capsys):
    monkeypatch.setattr(sheet, "progress", lambda *arguments: pytest.fail("painted"))
    grid = ["c.png", "s.png", "-o", "sheet.jpg", *SMALL, "--grid"]
    assert main(*grid, "init=content,missing.png") == 2
    assert main(*grid, "style-blend=1;1,2") == 2
    monkeypatch.setitem(image._LONGEST, "JPEG", 200)
    assert main(*grid, "seed=1,2,3,4") == 2
    missing, blend, large = capsys.readouterr().err.splitlines()
    assert "missing.png" in missing
    assert "2 weights, there are 1 styles" in blend
    assert "sheet.jpg: JPEG holds 200 pixels a side" in large


def test_a_mistake_in_every_cell_is_told_as_one(main, stylizer, monkeypatch, capsys):
    def breaking(*arguments, **options):
        raise ValueError("crop it")
        yield

    monkeypatch.setattr(type(stylizer), "steps", breaking)
    assert main("c.png", "s.png", "-o", "sheet.png", *SMALL, "--grid", "seed=1,2") == 2
    assert capsys.readouterr().err == "engine.stylize: crop it\n"


def test_large_pictures_are_not_kept_for_the_sheet(main, monkeypatch):
    made, draw = [], sheet.draw
    monkeypatch.setattr(sheet, "draw", lambda cells, columns: (made.extend(cells), draw(cells, columns))[1])
    monkeypatch.setattr(sheet, "_CELL", 52)
    grid = ["--iterations", "1", "--grid", "size=48,56"]
    assert main("c.png", "s.png", "-o", "sheet.png", *SMALL, *grid) == 0
    assert [max(picture.size) for _, picture in made] == [48, 52]


def test_cells_lie_in_rows_under_their_labels():
    colours = ["red", "lime", "blue"]
    cells = [([name], Image.new("RGB", (40, 20), name)) for name in colours] + [(["blank"], None)]
    drawn = sheet.draw(cells, 2)
    found = [[drawn.getpixel((x, y)) for x in (20, drawn.width // 2 + 20)] for y in (36, drawn.height // 2 + 32)]
    assert found == [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 255)]]
    assert np.asarray(drawn)[8:26, 8:40].min() < 128  # the label


def test_targets_are_saved_of_pictures_only(main, stylizer, capsys):
    stylizer.targets("s.png", Config(size=48, scales=1)).save("t.safetensors")
    for styles in (["t.safetensors"], ["none"], ["s.png", "s.png"]):
        assert main("c.png", *styles, "-o", "out.png", *SMALL, "--save-targets", "u.safetensors") == 2
        assert "--save-targets keeps what is used of one STYLE: give one, a picture" in capsys.readouterr().err
    assert not Path("u.safetensors").exists()


MISTAKES = [
    (["--contents", "c.png", "-o", "out"], "belong together"),
    ([*BATCH, "--plot", "p.png"], "--plot is for one picture"),
    ([*BATCH, "--checkpoint", "run"], "--checkpoint is for one picture"),
    ([*BATCH, "--jobs", "0"], "--jobs 0: give a number from 1"),
    ([*BATCH, "--shard", "3/2"], "I/N"),
    ([*BATCH[:-1], "out/{content}.xyz"], "unknown picture format"),
    ([*BATCH[:-1], "new.png"], "new.png is one picture: give a folder, or a pattern"),
    ([*BATCH[:-1], "file"], "file: File exists"),
    ([*BATCH, "--size", "64x64"], "size WxH is for runs without content"),
    ([*BATCH, "--init", "nosuch.png"], "nosuch.png: No such file"),
    ([*BATCH, "--style-blend", "1,2"], "2 weights, there are 1 styles"),
    ([*BATCH, "--style-scale", "1,2"], "2 numbers, there are 1 styles"),
    ([*BATCH[:-1], "./{content}.png", "--overwrite"], "c.png is both one to read and a picture to write"),
    (["c.png", "s.png", "-o", "out.webp", "--size", "16384"], "out.webp: WEBP holds 16383 pixels a side"),
    (["c.png", "s.png", "-o", "out.png", "--jobs", "2"], "are for --contents"),
    (["c.png", "s.png", "-o", "out.png", "--progress", "jsno"], "did you mean json"),
    (["c.png", "s.png", "-o", "out.png", "--checkpoint", "r.ckpt", "--checkpoint-every", "-1"], "give seconds"),
    (["c.png", "s.png", "-o", "out.png", "--grid", "szie=1,2"], "did you mean size"),
    (["c.png", "s.png", "-o", "out.png", "--grid", "size=big"], "--grid size=big"),
    (["c.png", "s.png", "-o", "out.png", "--grid", "size=8,64"], "from 32"),
    (["c.png", "s.png", "-o", "out.png", "--grid", "size"], "OPTION=VALUE"),
    (["c.png", "s.png", "-o", "out.png", "--grid", "size=64", "--trace", "t"], "--trace is for one picture"),
    (["c.png", "s.png", "-o", "out.png", "--save-targets", "t.bin"], "t.bin: give a name that ends in .safetensors"),
    (["--replay", "c.png", "-o", "out.png"], "carries no manifest"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=[words for _, words in MISTAKES])
def test_mistakes_exit_2_with_one_line_and_leave_nothing(main, tmp_path, capsys, arguments, words):
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    assert main(*arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
    assert sorted(tmp_path.rglob("*")) == before
