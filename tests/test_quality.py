import json
import math

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("skimage", reason="scikit-image brings the photographs")

from benchmarks import controls, equal_loss, quality, styles, timing
from engine import goal


def test_exponential_curves_are_read_exactly():
    """log style is linear in content on them, so the values between their points are known."""
    steep = [(c, 3 * math.exp(-4 * c)) for c in (0, 0.3, 0.9)]
    flat = [(c, 3 * math.exp(-c)) for c in (0, 0.1, 0.5)]
    for share in (0.5, 1.0):
        found = quality.at_equal_content({"steep": steep, "flat": flat[::-1]}, share)
        assert found == pytest.approx({"steep": 3 * math.exp(-4 * share / 2), "flat": 3 * math.exp(-share / 2)})


def test_curves_without_a_common_content_distance_are_refused():
    with pytest.raises(ValueError, match="in common"):
        quality.at_equal_content({"a": [(0.1, 1), (0.2, 1)], "b": [(0.3, 1), (0.4, 1)]}, 0.5)


def test_ratios_are_geometric_means_over_pairs():
    def curves(share):
        return {"random": [(0, 1.0), (1, 1.0)], "final": [(0, share), (1, share)]}

    found = quality.ratios({"one": {"judge": curves(0.1)}, "two": {"judge": curves(0.4)}}, 0.5)
    assert found["judge"] == pytest.approx({"random": 1, "final": 0.2})


def test_gabor_moduli_find_the_direction_of_a_grating():
    """The third filter looks along 45 degrees; and a picture is at no distance from itself."""
    y, x = np.mgrid[:128, :128]
    grating = np.uint8(127 + 100 * np.sin((x + y) * math.pi / 2 / math.sqrt(2)))
    picture = Image.fromarray(np.repeat(grating[..., None], 3, 2))
    response = quality.gabor(picture)["modulus 0"][:8].mean(1)
    assert int(response.argmax()) == 2
    judge = (quality.gabor, "modulus 2")
    assert quality.distances(judge, picture, picture, picture, 128) == (0, 0)


def test_styles_are_colourful_pictures():
    for draw in styles.STYLES.values():
        picture = np.asarray(draw())
        assert picture.shape == (styles.SIDE, styles.SIDE, 3)
        assert picture.std() > 20


def test_the_sheet_of_the_controls(tmp_path, monkeypatch):
    """With a stylizer that paints nothing: every cell is there, and its options hold for its sources."""

    class Stub:
        def __init__(self, weights):
            assert weights == "embedded"

        def __call__(self, content, style, config, masks, freeze):
            goal.load(content, style, config, masks, freeze)
            size = config.size if isinstance(config.size, tuple) else (config.size, round(config.size / 1.5))
            return type("Result", (), {"image": Image.new("RGB", size)})

    monkeypatch.setattr(controls, "Stylizer", Stub)
    found = [labels for labels, _ in controls.cells(Stub("embedded"), 160, 1)]
    assert len(found) % controls.COLUMNS == 0
    assert {("A, freeze",), ("B, colour", "match"), ("A and C", "blend 3:1")} <= {tuple(labels) for labels in found}
    assert controls.main(["--size", "64", "--out", str(tmp_path)]) == 0
    with Image.open(tmp_path / "controls.jpg") as page:
        assert page.width > 6 * 64


def test_when_a_loss_is_reached():
    """By made-up clocks: eager has its lowest loss, 3, after 4 s."""
    eager = [(5.0, 2.0), (3.0, 4.0), (4.0, 6.0), (3.0, 8.0)]
    found = timing._reached(eager, [(9.0, 0.5), (3.5, 1.0), (3.0, 1.6), (1.0, 2.0), (2.0, 3.0)])
    assert (found["loss"], found["baseline_s"], found["engine_s"], found["engine_iteration"]) == (3, 4, 1.6, 3)
    assert (found["ratio"], found["engine_lowest_loss"], found["engine_total_s"]) == (2.5, 1, 3)
    found = timing._reached(eager, [(3.5, 1.0), (3.1, 2.0)])
    assert found["engine_s"] is found["engine_iteration"] is found["ratio"] is None


@pytest.mark.parametrize("more", [[], ["--no-clamp"]])
def test_time_to_equal_loss(tmp_path, capsys, more):
    options = ["--size", "48", "--iterations", "4", "--pairs", "bundled", "--out", str(tmp_path), *more]
    assert equal_loss.main(options) == 0
    (report,) = (json.loads(file.read_text()) for file in tmp_path.glob("*.json"))
    found = report["pairs"]["bundled"]
    assert 0 < found["engine_s"] <= found["engine_total_s"]
    assert found["engine_lowest_loss"] <= found["loss"]
    assert report["median_ratio"] == found["ratio"]
    assert report["clamp"] == (not more)
    assert "times as soon" in capsys.readouterr().out
    (sheet,) = tmp_path.glob("*.jpg")
    with Image.open(sheet) as page:
        assert page.size == (1576, 354)  # four cells of 384 x 320 pixels, a label above each
