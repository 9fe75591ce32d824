from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import Config, Stylizer, Targets, targets
from engine.targets import Statistic, blend

TWO_SCALES = Config(size=64, scales=2, iterations=2, style_layers=("relu1_1", "relu2_1", "relu3_1"))


def noise(height, width, seed):
    return np.random.default_rng(seed).random((height, width, 3)).astype(np.float32)


@pytest.mark.parametrize("kind", ["gram", "shifted", "wasserstein"])
def test_a_run_with_saved_targets_is_the_run_with_the_picture(stylizer, tmp_path, kind):
    config = replace(TWO_SCALES, style_loss=kind)
    content, style = noise(48, 64, 1), noise(40, 50, 2)
    stylizer.targets(style, config).save(tmp_path / "style.safetensors")
    expected = stylizer(content, style, config).image.tobytes()
    fresh = Stylizer(weights="embedded", device="cpu")
    assert fresh(content, tmp_path / "style.safetensors", config).image.tobytes() == expected
    loaded = Targets.load(tmp_path / "style.safetensors")
    assert fresh(content, [loaded], config).image.tobytes() == expected
    assert fresh(content, [loaded, noise(40, 50, 3)], config).image.tobytes() != expected


def test_targets_of_a_part_of_a_style(stylizer):
    content, style, mask = noise(48, 64, 1), noise(40, 50, 2), np.zeros((40, 50), np.float32)
    mask[:, :20] = 1
    targets = stylizer.targets(style, TWO_SCALES, mask=mask)
    full = np.ones((48, 64), np.float32)
    expected = stylizer(content, style, TWO_SCALES, masks=[(full, mask)]).image.tobytes()
    assert stylizer(content, targets, TWO_SCALES, masks=[full]).image.tobytes() == expected
    with pytest.raises(ValueError, match="have their mask in them"):
        stylizer.steps(content, targets, TWO_SCALES, masks=[(full, mask)])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 80}, "made for images of 45, 64 pixels, this one has 57"),
        ({"size": 91}, "made for images of 45, 64 pixels, this one has 91"),  # which comes after one of 64
        ({"pooling": "max"}, "made for pooling avg, this run has max"),
        ({"padding": "zero"}, "made for padding replicate, this run has zero"),
        ({"pixel_range": "0-255"}, "made for weights embedded.*fed 0-255"),
        ({"style_loss": "shifted"}, "made for style loss gram"),
        ({"style_layers": ("relu1_2",)}, "not for relu1_2"),
        ({"style_scale": 2}, "made for style scale 1.0, this run has 2"),
        ({"style_size": 40}, "made for style size auto, this run has 40"),
    ],
)
def test_targets_of_another_run_are_refused(stylizer, options, words):
    config = replace(TWO_SCALES, **options)
    targets = stylizer.targets(noise(40, 50, 2), TWO_SCALES)
    with pytest.raises(ValueError, match=words):
        stylizer.steps(noise(48, 64, 1), targets, config)  # before any work is done


def test_targets_for_the_scales_of_a_thin_content(stylizer):
    """A thin content has fewer scales than a square; iterations may be named for those."""
    config = replace(TWO_SCALES, iterations=(1,))
    content, style = noise(40, 64, 1), noise(40, 50, 2)
    targets = stylizer.targets(style, config)
    assert stylizer(content, targets, config).image.tobytes() == stylizer(content, style, config).image.tobytes()
    with pytest.raises(ValueError, match="size original is that of a content"):
        stylizer.targets(style, replace(config, size="original"))


def test_targets_of_other_weights_are_refused(stylizer, states):
    other = Stylizer(weights=states["torchvision"][0], device="cpu")
    targets = other.targets(noise(40, 50, 2), TWO_SCALES)
    with pytest.raises(ValueError, match=r"made for weights torchvision.* this run has embedded"):
        stylizer(noise(48, 64, 1), targets, TWO_SCALES)


def test_sides_and_layers_in_any_order_come_back(tmp_path):
    """Not by their names as text, by which a file has them; what a matrix holds below its diagonal is left out."""
    generator = torch.Generator().manual_seed(0)

    def statistic(channels):
        matrix = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
        return Statistic(matrix, torch.randn(channels, generator=generator))

    layers = {"relu5_1": 512, "conv2_1": 128, "relu1_1": 64}
    sides = {side: {layer: statistic(count) for layer, count in layers.items()} for side in (64, 128, 1024)}
    own = Targets({"weights": "w", "style loss": "wasserstein"}, sides)
    own.save(tmp_path / "own.safetensors")
    found = Targets.load(tmp_path / "own.safetensors")
    assert found.digest == own.digest
    for side, by_layer in own.sides.items():
        for layer, each in by_layer.items():
            assert torch.equal(found.sides[side][layer].matrix.triu(), each.matrix.triu())
            assert torch.equal(found.sides[side][layer].mean, each.mean)


def test_a_file_that_is_none_is_named(tmp_path):
    from safetensors.torch import save_file

    other, cut, good = (tmp_path / f"{name}.safetensors" for name in ("other", "cut", "good"))
    save_file({"x": torch.zeros(3)}, other)
    statistic = Statistic(torch.eye(64), torch.arange(64.0))
    Targets({"weights": "w"}, {64: {"relu1_1": statistic}}).save(good)
    cut.write_bytes(good.read_bytes()[:-9])
    for path in (other, cut):
        with pytest.raises(ValueError, match="style targets"):
            Targets.load(path)
    with pytest.raises(FileNotFoundError):
        Targets.load(tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match=r"good.safetensors is not a file of style targets.* sha256 differs"):
        damaged = bytearray(good.read_bytes())
        damaged[-5] ^= 1
        good.write_bytes(damaged)
        Targets.load(good)
    damaged[-5] ^= 1
    good.write_bytes(damaged)
    found = Targets.load(good)
    assert found.layers == ("relu1_1",)
    assert torch.equal(found.sides[64]["relu1_1"].matrix, statistic.matrix)
    assert torch.equal(found.sides[64]["relu1_1"].mean, statistic.mean)


@pytest.mark.parametrize(
    ("tensors", "made_for"),
    [
        ({"x": torch.zeros(3)}, "{}"),
        ({"64.relu1_1.mean": torch.zeros(3)}, "{}"),
        ({"64.relu1_1.mean": torch.zeros(64), "64.relu1_1.matrix": torch.zeros(3)}, "{}"),
        ({"64.relu1_1.mean": torch.zeros(10), "64.relu1_1.matrix": torch.zeros(55)}, "{}"),
        ({"64.relu1_1.mean": torch.zeros(64), "64.relu1_1.matrix": torch.zeros(2080).double()}, "{}"),
        ({"64.relu1_1.mean": torch.zeros(64).half(), "64.relu1_1.matrix": torch.zeros(2080)}, "{}"),
        ({"64.relu1_1.mean": torch.zeros(64), "64.relu1_1.matrix": torch.zeros(2080)}, '{"style loss": "wasserstein"}'),
        ({"64.relu9_1.mean": torch.zeros(64), "64.relu9_1.matrix": torch.zeros(2080)}, "{}"),
        ({"64.relu1_1.mean": torch.tensor(3.0), "64.relu1_1.matrix": torch.zeros(2080)}, "{}"),
        ({"x.relu1_1.mean": torch.zeros(64), "x.relu1_1.matrix": torch.zeros(2080)}, "{}"),
        ({"64.relu1_1.mean": torch.zeros(64), "64.relu1_1.matrix": torch.zeros(2080)}, "5"),
        ({"64.relu1_1.mean": torch.zeros(64), "64.relu1_1.matrix": torch.zeros(2080)}, '["a"]'),
        ({"64.relu1_1.mean": torch.zeros(64), "64.relu1_1.matrix": torch.zeros(2080)}, "{"),
    ],
)
def test_a_file_of_other_tensors_is_named(tmp_path, tensors, made_for):
    from safetensors.torch import save_file

    path = tmp_path / "odd.safetensors"
    save_file(tensors, path, {"format": targets._FORMAT, "made_for": made_for, "sha256": "0" * 64})
    with pytest.raises(ValueError, match=r"odd.safetensors is not a file of style targets"):
        Targets.load(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("targets") / "whole.safetensors"
    Targets({"weights": "w"}, {64: {"relu1_1": Statistic(torch.eye(64), torch.arange(64.0))}}).save(path)
    return path


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_damage_of_a_file_goes_unseen(whole, data):
    content = bytearray(whole.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    damaged = whole.with_name("damaged.safetensors")
    damaged.write_bytes(content)
    try:
        found = Targets.load(damaged)
    except ValueError as error:
        assert str(damaged) in str(error)  # noqa: PT017
    else:  # white space or the order of the header
        assert found.digest == Targets.load(whole).digest


def test_blended_covariances_are_those_of_the_mixture():
    """Two clouds of points, one three times as many as the other."""
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(5, count, generator=generator, dtype=torch.float64) for count in (300, 100))
    other = other + 2
    styles = [
        {"layer": Statistic(torch.cov(each, correction=0).float(), each.mean(1).float())} for each in (one, other)
    ]
    found = blend(styles, (0.75, 0.25), "wasserstein")["layer"]
    both = torch.cat([one, other], 1)
    torch.testing.assert_close(found.matrix.double(), torch.cov(both, correction=0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.mean.double(), both.mean(1), rtol=1e-5, atol=1e-6)
