from importlib import resources

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine import Config, Targets, goal, image
from engine.optimize import resized
from engine.start import enlarged, first_pixels


def picture(height, width, seed, low=0.3, high=0.7):
    """Colours whose channels are correlated."""
    generator = np.random.default_rng(seed)
    mixed = generator.random((height, width, 3)) @ [[0.6, 0.2, 0.1], [0.2, 0.6, 0.3], [0.2, 0.2, 0.6]]
    return image.load((low + (high - low) * mixed).astype(np.float32))


def test_content_is_the_default_and_a_file_is_resized_to_it():
    content, start = picture(40, 60, 0), picture(20, 30, 1)
    assert torch.equal(first_pixels(content, [content], None, Config()), image.to_tensor(content))
    from_file = first_pixels(content, [], start, Config(init="start.png"))
    assert torch.equal(from_file, image.to_tensor(image.resize(start, (60, 40))))


def test_a_start_of_another_shape_or_with_alpha_is_told_of(caplog):
    content, odd = picture(40, 60, 0), Config(tile=True)
    for height, width, config, stretched in (
        (67, 100, Config(), False),
        (60, 40, Config(), True),
        (48, 64, odd, False),
    ):
        caplog.clear()
        first_pixels(content, [], picture(height, width, 1), config)
        assert ("is stretched to the shape of 60 x 40" in caplog.text) == stretched
    caplog.clear()
    first_pixels(picture(1366, 2048, 0), [], picture(85, 128, 1), Config())  # made of a picture of 1000 x 667
    assert not caplog.text
    start = image.Picture(content.rgb, np.ones((40, 60), np.float32), "start.png")
    first_pixels(content, [], start, Config())
    assert "start.png: transparency left out of account" in caplog.text


def test_noise_is_uniform_and_has_a_seed():
    content = picture(100, 120, 0)
    one, same, other = (first_pixels(content, [content], None, Config(init="noise", seed=k)) for k in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert float(one.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(one.var()) == pytest.approx(1 / 12, rel=0.05)


def test_an_inversion_starts_from_a_trace_of_noise_and_finds_the_content(stylizer):
    content = image.load((resources.files("engine.samples") / "content.jpg").read_bytes())
    config = Config(size=96, scales=1, init="noise", iterations=60)
    start = first_pixels(image.resize(content, content.fit(96)), [], None, config)
    assert 0.475 <= float(start.min()) < 0.48 < 0.52 < float(start.max()) <= 0.525
    found = np.asarray(stylizer(content, None, config).image, float)
    assert np.abs(found - 255 * image.resize(content, content.fit(96)).rgb).mean() < 6  # from full noise 23


def test_style_draws_the_mean_and_the_covariance_of_all_styles():
    styles = [picture(60, 50, 1), picture(30, 20, 2, low=0.4, high=0.9)]
    pixels = first_pixels(picture(300, 300, 0), styles, None, Config(init="style", seed=3))
    drawn = pixels[0].flatten(1).double().numpy()
    moments = [(c.mean(0), c.T @ c / len(c)) for c in (each.rgb.reshape(-1, 3).astype(np.float64) for each in styles)]
    mean, second = (np.mean([each[i] for each in moments], axis=0) for i in (0, 1))
    covariance = second - np.outer(mean, mean)
    np.testing.assert_allclose(drawn.mean(1), mean, atol=2e-3)
    np.testing.assert_allclose(np.cov(drawn), covariance, atol=0.03 * covariance.max())
    assert covariance[0, 1] > 0.1 * covariance.max()  # the test would see independent channels


def test_style_draws_by_the_shares_of_the_styles():
    styles = [picture(60, 50, 1), picture(30, 20, 2, low=0.4, high=0.9)]
    config = Config(init="style", style_blend=(3, 1))
    drawn = first_pixels(picture(300, 300, 0), styles, None, config)[0].flatten(1).double().numpy()
    colours = [each.rgb.reshape(-1, 3).astype(np.float64) for each in styles]
    mean = np.average([each.mean(0) for each in colours], axis=0, weights=(0.75, 0.25))
    second = np.average([each.T @ each / len(each) for each in colours], axis=0, weights=(0.75, 0.25))
    np.testing.assert_allclose(drawn.mean(1), mean, atol=2e-3)
    np.testing.assert_allclose(np.cov(drawn), second - np.outer(mean, mean), atol=0.03 * second.max())
    even = np.mean([each.mean(0) for each in colours], axis=0)
    assert np.abs(mean - even).max() > 0.01  # the test would see equal shares


def test_style_draws_no_colours_that_are_hidden():
    style = picture(60, 50, 1)
    style.rgb[:, :25] = [0.2, 0.4, 0.6]
    alpha = np.zeros((60, 50), np.float32)
    alpha[:, :25] = 1
    seen = image.Picture(style.rgb, alpha)
    pixels = first_pixels(picture(40, 40, 0), [seen], None, Config(init="style"))
    np.testing.assert_allclose(pixels[0].flatten(1).numpy(), np.tile([[0.2], [0.4], [0.6]], 1600), atol=1e-4)


def test_style_without_variance_gives_its_colour():
    flat = image.load(np.full((8, 8, 3), [0.2, 0.4, 0.6], np.float32))
    pixels = first_pixels(picture(40, 40, 0), [flat], None, Config(init="style"))
    np.testing.assert_allclose(pixels[0].flatten(1).numpy(), np.tile([[0.2], [0.4], [0.6]], 1600), atol=1e-4)


@given(share=st.floats(0, 1))
def test_the_share_of_noise(share):
    content = picture(16, 20, 0)
    noise = first_pixels(content, [content], None, Config(init="noise", seed=5)).double()
    blend = first_pixels(content, [content], None, Config(seed=5, init_noise=share))
    truth = (1 - share) * image.to_tensor(content).double() + share * noise
    assert (blend - truth).abs().max() < 1e-6


def test_a_run_starts_there(stylizer, pictures, tmp_path):
    """The first evaluation is that of the start: its loss tells it."""
    image.save(image.to_pil(picture(40, 40, 7)), str(tmp_path / "start.png"))
    losses = {}
    for options in (
        {},
        {"init": "noise"},
        {"init": "style"},
        {"init": str(tmp_path / "start.png")},
        {"init_noise": 0.4},
    ):
        config = Config(size=48, scales=1, iterations=1, **options)
        losses[str(options)] = next(stylizer.steps(pictures["content"], pictures["style"], config)).loss
    assert len({f"{loss:.4g}" for loss in losses.values()}) == len(losses)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_a_share_outside_its_range_is_named(value):
    with pytest.raises(ValueError, match=r"init_noise .* from 0 to 1"):
        Config(init_noise=value)


def test_colours_need_pictures_of_the_styles():
    targets = Targets({}, {})
    for style in (None, targets, [targets, picture(40, 40, 0)]):
        with pytest.raises(ValueError, match=r"^init style draws the colours of the styles: give their pictures"):
            goal.load(picture(40, 40, 0), style, Config(init="style"), None, None)


@pytest.mark.parametrize("wrap", [False, True])
def test_the_next_scale_has_the_details_of_the_content(wrap):
    content = picture(96, 128, 0)
    both = tuple(image.resize(content, size, wrap) for size in ((64, 48), (96, 80)))
    coarse, fine = map(image.to_tensor, both)
    assert (enlarged(coarse, both, (96, 80), wrap) - fine).abs().max() < 1e-6  # nothing but the content was there
    plain = enlarged(coarse, None, (96, 80), wrap)
    assert torch.equal(plain, resized(coarse, (80, 96), "bicubic", wrap))
    assert (plain - fine).abs().max() > 0.02
    flat = torch.full_like(coarse, 0.5)
    added = enlarged(flat, both, (96, 80), wrap) - 0.5
    assert (added - (fine - plain)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("content", "style", "options", "detailed"),
    [
        ("content", "style", {}, True),
        ("content", "style", {"init": "noise"}, True),
        ("content", "style", {"content_weight": 0}, False),
        ("content", None, {}, False),
        (None, "style", {}, False),
    ],
)
def test_details_are_for_runs_that_keep_the_content_and_are_given_another_style(
    stylizer, pictures, monkeypatch, content, style, options, detailed
):
    seen = []
    real = enlarged
    monkeypatch.setattr("engine.stylizer.enlarged", lambda *given: (seen.append(given[1]), real(*given))[1])
    config = Config(size=64, scales=2, iterations=1, style_layers=("relu1_1",), **options)
    stylizer(content and pictures[content], style and pictures[style], config)
    assert [each is not None for each in seen] == [detailed]
