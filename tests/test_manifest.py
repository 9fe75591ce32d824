import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine import Config, image, manifest, replay

ENGINE = {"device": "cpu", "precision": "fp32", "weights": "embedded", "sha256": "ab"}


def record(config=None, losses=((1, 2.5), (2, 1.5)), masks=None, freeze=None):
    inputs = manifest.inputs(config or Config(), masks, freeze), ("c.png", "12"), [("s.png", "34"), (None, "56")]
    return manifest.describe(*inputs, ENGINE, losses, 1.25, len(losses))


def picture(mode="RGB"):
    array = np.random.default_rng(0).integers(0, 256, (40, 50, len(mode)), dtype=np.uint8)
    return Image.fromarray(array)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_the_picture_carries_it(tmp_path, suffix, mode):
    path = str(tmp_path / f"out.{suffix}")
    image.save(picture(mode), path, record())
    assert replay.read(path) == json.loads(json.dumps(record()))
    assert [each.name for each in tmp_path.iterdir()] == [f"out.{suffix}"]
    image.save(picture(mode), str(tmp_path / f"bare.{suffix}"))
    assert image.load(path).digest == image.load(str(tmp_path / f"bare.{suffix}")).digest


@pytest.mark.parametrize("suffix", ["tif", "bmp"])
def test_beside_where_the_format_has_no_place(tmp_path, suffix):
    path = str(tmp_path / f"out.{suffix}")
    image.save(picture(), path, record())
    assert replay.read(path) == replay.read(f"{path}.json") == json.loads(json.dumps(record()))
    with pytest.raises(ValueError, match="exists already"):
        image.check_output(path, overwrite=False)
    Path(path).unlink()
    with pytest.raises(ValueError, match=r"json exists already"):
        image.check_output(path, overwrite=False)


def test_a_long_trace_fits(tmp_path):
    losses = [(i, 1 / 3 * i) for i in range(1, 100_001)]
    path = str(tmp_path / "out.jpg")
    image.save(picture(), path, record(losses=losses))
    found = replay.read(path)
    assert 400 < len(found["losses"]) <= 500
    assert found["losses"][0] == [1, 1 / 3]
    assert found["iterations"] == {"done": 100_000, "total": 100_000}


def test_one_too_long_for_exif_stands_beside(tmp_path):
    path = str(tmp_path / "sheet.jpg")
    image.save(picture(), path, manifest.of_sheet([record()] * 100))
    assert len(json.loads((tmp_path / "sheet.jpg.json").read_text())["sheet"]) == 100
    Path(path).unlink()
    with pytest.raises(ValueError, match=r"sheet\.jpg\.json exists already"):
        image.check_output(path, overwrite=False)


def test_options_come_back_and_folders_stay_at_home(tmp_path):
    start = tmp_path / "start.png"
    picture().save(start)
    config = Config(size=64, iterations=(3, 4), init=start, style_layers=("relu1_1", "relu2_1"), seed=9)
    made = record(config)
    assert str(tmp_path) not in json.dumps(made)
    assert made["options"]["init"] == "start.png"
    assert manifest.config(json.loads(json.dumps(made)), tmp_path) == config
    start.write_bytes(b"other")
    with pytest.raises(ValueError, match="is not the file of the manifest"):
        manifest.config(made, tmp_path)
    with pytest.raises(FileNotFoundError, match="put it beside the manifest"):
        manifest.config(made, tmp_path / "elsewhere")


def test_a_file_that_is_called_like_an_option_is_not_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "content").touch()
    assert record()["files"] == {}
    made = record(Config(init="./content"))
    assert manifest.config(made, Path()) == Config(init="./content")


def test_options_of_another_version_are_refused(tmp_path):
    made = record()
    made["options"]["sizzle"] = 3
    with pytest.raises(ValueError, match="not those of this version"):
        manifest.config(made, tmp_path)


def test_what_carries_none_is_told(tmp_path):
    bare, text = tmp_path / "bare.png", tmp_path / "text.txt"
    picture().save(bare)
    text.write_text("hello")
    for path, words in ((bare, "carries no manifest"), (text, "not a picture")):
        with pytest.raises(ValueError, match=words):
            replay.read(str(path))
    pieces = [{"engine": {}}, {"styles": ["x"]}, {"styles": [{"name": "s.png"}]}, {"options": []}, {"options": {}}]
    pieces += [{"masks": [["a.png", 1]]}, {"iterations": {"done": "1", "total": 1}}, {"files": None}]
    broken = [json.dumps(record() | piece) for piece in pieces]
    for content in ("{}", "{", '{"format": 1}', '{"format": 99}', '{"a":' * 10**5, *broken):
        text.write_text(content)
        with pytest.raises(ValueError, match="manifest"):
            replay.read(str(text))
    with pytest.raises(FileNotFoundError):
        replay.read(str(tmp_path / "missing.png"))


def test_masks_come_back_by_their_names(tmp_path):
    """Files without their folders, their sha256 checked; the word alpha as it is."""
    for name in ("sky.png", "land.png", "face.png"):
        (tmp_path / name).write_bytes(name.encode())
    masks = [(str(tmp_path / "sky.png"), "alpha"), str(tmp_path / "land.png")]
    found = json.loads(json.dumps(record(masks=masks, freeze=str(tmp_path / "face.png"))))
    assert str(tmp_path) not in json.dumps(found)
    assert manifest.regions(found, tmp_path) == (masks, str(tmp_path / "face.png"))
    (tmp_path / "land.png").write_bytes(b"another")
    with pytest.raises(ValueError, match="sha256"):
        manifest.regions(found, tmp_path)
    assert manifest.regions(json.loads(json.dumps(record())), tmp_path) == (None, None)


def test_a_name_that_does_not_tell_which_file_is_refused(tmp_path):
    """Two files of one name, and a pipe; not one file that is named twice, whatever its suffix."""
    for name in ("sky/mask", "land/mask", "mask"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    sky, land, beside = (str(tmp_path / name) for name in ("sky/mask", "land/mask", "mask"))
    for masks, freeze in (([sky, land], None), ([sky], land), ([(sky, land)], None), (["-"], None)):
        found = json.loads(json.dumps(record(masks=masks, freeze=freeze)))
        assert str(tmp_path) not in json.dumps(found)
        with pytest.raises(ValueError, match="does not tell which file"):
            manifest.regions(found, tmp_path)
    assert manifest.regions(record(masks=[beside, "alpha"], freeze=beside), tmp_path) == ([beside, "alpha"], beside)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_manifest_is_read_within_the_limits_of_pictures(tmp_path, monkeypatch, suffix):
    path = str(tmp_path / f"out.{suffix}")
    image.save(picture(), path, record())
    monkeypatch.setenv("STYLIZE_MAX_PIXELS", "64")
    with pytest.raises(ValueError, match="more than 64 pixels"):
        replay.read(path)


def test_no_other_program_reads_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *a, **b: pytest.fail("Ghostscript"))
    path = tmp_path / "out.eps"
    picture().save(path)
    with pytest.raises(ValueError, match="not a picture"):
        replay.read(str(path))
