import dataclasses
import itertools

import numpy as np
import pytest
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from engine import Config, colour
from engine.config import COLOURS
from engine.image import Picture, load

MATCHES = [colour.match_lightness, colour.match_moments, colour.match_histogram]
UNIT = st.floats(0, 1, width=32)


def muted(height, width, seed, low=0.35, high=0.65):
    """A picture whose colours are far from the border of sRGB, so that nothing has to be brought back into it."""
    rgb = np.random.default_rng(seed).uniform(low, high, (height, width, 3)) * [1, 0.9, 1.1]
    return Picture(rgb.astype(np.float32))


@st.composite
def pictures(draw):
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    rgb = draw(arrays.arrays(np.float32, (*shape, 3), elements=UNIT, fill=UNIT))
    alpha = draw(st.none() | arrays.arrays(np.float32, shape, elements=UNIT))
    if alpha is not None:
        alpha[0, 0] = 0.5
    return Picture(rgb, alpha)


def oklab(rgb):
    """Oklab of one colour, by the published steps, in Python's floats."""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in map(float, rgb))
    cones = (
        0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b,
        0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b,
        0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b,
    )
    x, y, z = (cone ** (1 / 3) for cone in cones)
    return (
        0.2104542553 * x + 0.7936177850 * y - 0.0040720468 * z,
        1.9779984951 * x - 2.4285922050 * y + 0.4505937099 * z,
        0.0259040371 * x + 0.7827717662 * y - 0.8086757660 * z,
    )


def test_oklab_of_known_colours():
    known = {(1, 1, 1): (1, 0, 0), (1, 0, 0): (0.62796, 0.22486, 0.12585), (0, 0, 1): (0.45201, -0.03246, -0.31153)}
    for rgb, lab in known.items():
        np.testing.assert_allclose(colour.to_oklab(np.array(rgb, np.float64)), lab, atol=1e-5)
    for rgb in np.random.default_rng(0).random((50, 3)):
        np.testing.assert_allclose(colour.to_oklab(rgb), oklab(rgb), atol=1e-12)


@given(rgb=arrays.arrays(np.float32, (4, 3, 3), elements=UNIT))
def test_oklab_and_back(rgb):
    # fp32: where a channel is next to zero it is a difference of cubes of order one, times 12.92
    np.testing.assert_allclose(colour.from_oklab(colour.to_oklab(rgb)), rgb, atol=1e-4)
    deep = rgb.astype(np.float64)
    np.testing.assert_allclose(
        colour.from_oklab(colour.to_oklab(deep)), deep, rtol=0, atol=1e-7
    )  # the standard's two pieces meet that well


@settings(max_examples=40)
@given(style=pictures(), content=pictures())
def test_any_pictures_give_pictures_without_a_warning(style, content):
    """Warnings are errors here: no NaN, nothing outside [0, 1], the style's size and alpha."""
    found = [match(style, content) for match in MATCHES] + [colour.keep(style, content), colour.grey(style)]
    for picture in found:
        assert picture.rgb.dtype == np.float32
        assert picture.size == style.size
        assert picture.alpha is style.alpha
        assert np.isfinite(picture.rgb).all()
        assert picture.rgb.min() >= 0
        assert picture.rgb.max() <= 1


@settings(max_examples=40)
@given(result=pictures(), content=pictures())
def test_keep_takes_lightness_of_the_one_and_hue_of_the_other(result, content):
    content = Picture(np.resize(content.rgb, result.rgb.shape))
    kept = colour.to_oklab(colour.keep(result, content).rgb.astype(np.float64))
    lightness = colour.to_oklab(result.rgb.astype(np.float64))[..., 0]
    chroma = colour.to_oklab(content.rgb.astype(np.float64))[..., 1:]
    # black under a bright chroma keeps 1/256 of it: a millionth of the light, of which L is the cube root
    black = 0.02
    np.testing.assert_allclose(np.maximum(kept[..., 0], black), np.maximum(lightness, black), atol=2e-3)
    assert np.abs(kept[..., 1] * chroma[..., 1] - kept[..., 2] * chroma[..., 0]).max() < 1e-3  # parallel: the same hue
    assert (np.hypot(*np.moveaxis(kept[..., 1:], -1, 0)) <= np.hypot(*np.moveaxis(chroma, -1, 0)) + 2e-3).all()


def test_keep_is_exact_where_srgb_has_the_colour():
    result, content = muted(9, 7, 0), muted(9, 7, 1)
    expected = colour.to_oklab(content.rgb)
    expected[..., 0] = colour.to_oklab(result.rgb)[..., 0]
    np.testing.assert_allclose(colour.to_oklab(colour.keep(result, content).rgb), expected, atol=1e-5)
    np.testing.assert_allclose(colour.keep(content, content).rgb, content.rgb, atol=1e-5)
    assert colour.keep(result, muted(18, 14, 2)).size == result.size  # the content is resized


def weighted_moments(picture, weights):
    """Mean and covariance in float64, pixel by pixel."""
    pixels = [np.array(oklab(rgb)) for rgb in picture.rgb.reshape(-1, 3)]
    total = sum(weights)
    mean = sum(w * pixel for w, pixel in zip(weights, pixels, strict=True)) / total
    covariance = sum(w * np.outer(p - mean, p - mean) for w, p in zip(weights, pixels, strict=True)) / total
    return mean, covariance


def test_match_has_the_contents_moments_by_the_smallest_move():
    style, content = muted(16, 15, 0, 0.45, 0.55), muted(12, 17, 1)
    content = dataclasses.replace(content, alpha=np.random.default_rng(2).random((12, 17)).astype(np.float32))
    matched = colour.match_moments(style, content)
    mean, covariance = weighted_moments(matched, np.ones(16 * 15))
    wanted, wanted_covariance = weighted_moments(content, content.alpha.ravel().astype(float))
    np.testing.assert_allclose(mean, wanted, atol=1e-5)
    own = weighted_moments(style, np.ones(16 * 15))[1]
    flat = colour.to_oklab(style.rgb.astype(np.float64)).reshape(-1, 3)
    moved = colour.to_oklab(matched.rgb.astype(np.float64)).reshape(-1, 3)
    linear, *_ = np.linalg.lstsq(flat - flat.mean(0), moved - moved.mean(0), rcond=None)
    np.testing.assert_allclose(linear, linear.T, atol=2e-3)  # the gradient of a convex function: optimal transport
    assert np.linalg.eigvalsh((linear + linear.T) / 2).min() > 0
    eps = 1e-5 * np.eye(3)
    np.testing.assert_allclose(linear @ (own + eps) @ linear, wanted_covariance + eps, atol=2e-6)
    np.testing.assert_allclose(covariance, wanted_covariance, atol=1e-4)


def test_histogram_takes_equal_quantiles():
    """With as many pixels on both sides and no ties, sorted values become sorted values, channel by channel."""
    style, content = muted(14, 13, 0, 0.4, 0.6), muted(14, 13, 1)
    found = colour.match_histogram(style, content)
    lab, wanted = (np.sort(colour.to_oklab(p.rgb).reshape(-1, 3), axis=0) for p in (found, content))
    np.testing.assert_allclose(lab, wanted, atol=1e-5)
    before, after = (colour.to_oklab(p.rgb).reshape(-1, 3) for p in (style, found))
    np.testing.assert_array_equal(np.argsort(before[:, 0]), np.argsort(after[:, 0]))
    np.testing.assert_allclose(colour.match_histogram(content, content).rgb, content.rgb, atol=1e-5)


def test_histogram_counts_weights_and_ties():
    """A quarter of the style is dark. Three quarters of the content's weight are."""
    grey = np.array([0.2, 0.8, 0.8, 0.8], np.float32)
    style = Picture(np.repeat(grey[None, :, None], 3, 2))
    levels = np.array([[0.3, 0.5]], np.float32)
    content = Picture(np.repeat(levels[..., None], 3, 2), np.array([[0.75, 0.25]], np.float32))
    low, high = (oklab([level] * 3)[0] for level in levels[0])
    quantiles = [(q - 0.375) / 0.5 for q in (0.125, 0.625)]  # of the content: 0.375 and 0.875, the middles of its steps
    expected = [low + (high - low) * min(max(q, 0), 1) for q in quantiles]
    found = colour.to_oklab(colour.match_histogram(style, content).rgb)[0, :, 0]
    np.testing.assert_allclose(found, [expected[0], *[expected[1]] * 3], atol=1e-5)


def test_match_lightness_has_the_contents_mean_and_deviation_in_grey():
    style, content = muted(16, 15, 0, 0.45, 0.55), muted(12, 17, 1)
    found = colour.match_lightness(style, content)
    np.testing.assert_allclose(found.rgb, found.rgb[..., :1].repeat(3, 2), atol=1e-6)
    lightness, wanted = (colour.to_oklab(p.rgb.astype(np.float64))[..., 0] for p in (found, content))
    assert lightness.mean() == pytest.approx(wanted.mean(), abs=1e-5)
    own = colour.to_oklab(style.rgb.astype(np.float64))[..., 0].std()
    gain = np.sqrt((wanted.std() ** 2 + 1e-5) / (own**2 + 1e-5))
    assert lightness.std() == pytest.approx(gain * own, rel=1e-4)
    assert gain * own == pytest.approx(wanted.std(), rel=0.03)


@pytest.mark.parametrize("match", MATCHES)
def test_transparent_pixels_do_not_count(match):
    style, content = muted(8, 8, 0), muted(8, 8, 1)
    alpha = np.ones((8, 8), np.float32)
    alpha[:, 4:] = 0
    noise = np.where(alpha[..., None] > 0, content.rgb, 1 - content.rgb).astype(np.float32)
    one, other = match(style, Picture(content.rgb, alpha)), match(style, Picture(noise, alpha))
    np.testing.assert_array_equal(one.rgb, other.rgb)
    assert np.abs(one.rgb - match(style, content).rgb).max() > 1e-4
    mine = np.where(alpha[..., None] > 0, style.rgb, 1 - style.rgb).astype(np.float32)
    one, other = match(Picture(style.rgb, alpha), content), match(Picture(mine, alpha), content)
    np.testing.assert_allclose(one.rgb[:, :4], other.rgb[:, :4], atol=1e-6)
    with pytest.raises(ValueError, match="no visible pixel"):
        match(style, Picture(content.rgb, 0 * alpha))


@pytest.mark.parametrize("match", MATCHES)
def test_masks_choose_whose_colours_go_where(match):
    """The left half of the style takes the colours of the upper half of the content; the right half stays."""
    style, content = muted(8, 8, 0), muted(8, 8, 1)
    left, upper = np.zeros((8, 8)), np.zeros((8, 8))
    left[:, :4] = upper[:4] = 1
    found = match(style, content, left, upper)
    alone = match(Picture(style.rgb[:, :4]), Picture(content.rgb[:4]))
    np.testing.assert_allclose(found.rgb[:, :4], alone.rgb, atol=1e-5)
    np.testing.assert_array_equal(found.rgb[:, 4:], style.rgb[:, 4:])
    with pytest.raises(ValueError, match="does not fit"):
        match(style, content, left[:3], upper)


def test_grey_and_constant_pictures_stay_so():
    constant = Picture(np.full((6, 6, 3), (0.2, 0.5, 0.7), np.float32))
    ramp = Picture(np.linspace(0, 1, 36, dtype=np.float32).reshape(6, 6, 1).repeat(3, 2))
    for match in MATCHES:
        assert np.ptp(match(constant, ramp).rgb.reshape(-1, 3), axis=0).max() < 1e-6
        assert np.ptp(match(ramp, ramp).rgb, axis=2).max() < 2e-3
    np.testing.assert_allclose(colour.match_moments(constant, constant).rgb, constant.rgb, atol=1e-5)
    assert np.ptp(colour.keep(constant, ramp).rgb, axis=2).max() < 1e-3
    assert np.ptp(colour.grey(constant).rgb, axis=2).max() < 1e-3


def shown(stylizer, pictures, **options):
    result = stylizer(pictures["content"], pictures["style"] // 2 + 90, Config(**{**vars(TINY), **options}))
    return np.asarray(result.image).astype(np.float64) / 255


def test_every_choice_of_the_option_makes_its_own_picture(stylizer, pictures):
    found = [shown(stylizer, pictures, colour=name, init="noise", iterations=6) for name in COLOURS]
    for one, other in itertools.combinations(found, 2):
        assert np.abs(one - other).max() > 0.02


def test_keep_after_is_the_plain_run_with_the_contents_chroma(stylizer, pictures):
    plain, kept = shown(stylizer, pictures), shown(stylizer, pictures, colour="keep-after")
    np.testing.assert_allclose(colour.to_oklab(kept)[..., 0], colour.to_oklab(plain)[..., 0], atol=0.02)
    expected = colour.keep(Picture(plain.astype(np.float32)), load(pictures["content"]))
    assert np.abs(kept - expected.rgb).mean() < 2e-3  # rounding to eight bits


def test_keep_before_optimises_grey_pictures(stylizer, pictures):
    config = Config(colour="keep-before")
    content, style = pictures["content"], pictures["style"]
    score = stylizer.evaluate(content, content, style, config)
    assert score.content_loss == 0
    matched = colour.match_lightness(Picture(style.astype(np.float32) / 255), Picture(content.astype(np.float32) / 255))
    seen = colour.grey(Picture(content.astype(np.float32) / 255))
    assert score.loss == stylizer.evaluate(seen, seen, matched).loss


@pytest.mark.parametrize("name", ["match", "histogram"])
def test_match_optimises_with_the_matched_style(stylizer, pictures, name):
    content, style = (Picture(pictures[each].astype(np.float32) / 255) for each in ("content", "style"))
    match = {"match": colour.match_moments, "histogram": colour.match_histogram}[name]
    score = stylizer.evaluate(content, content, [style, style], Config(colour=name))
    assert score.loss == stylizer.evaluate(content, content, match(style, content)).loss


@pytest.mark.parametrize("first", [True, False])
def test_targets_stay_in_their_place_beside_pictures(stylizer, pictures, first):
    config = dataclasses.replace(TINY, colour="keep-after")
    content, one, other = pictures["content"], pictures["style"], pictures["style"][::-1] // 2
    mixed = [stylizer.targets(one, config), other] if first else [one, stylizer.targets(other, config)]
    config = dataclasses.replace(config, style_blend=(3, 1))
    expected = stylizer(content, [one, other], config).image.tobytes()
    assert stylizer(content, mixed, config).image.tobytes() == expected
    assert stylizer(content, mixed[::-1], config).image.tobytes() != expected


def test_alpha_comes_back_and_an_invisible_content_is_a_mistake(stylizer, pictures):
    alpha = np.full((40, 56), 200, np.uint8)
    content = Image.fromarray(np.dstack([pictures["content"], alpha]))
    config = dataclasses.replace(TINY, colour="keep-after")
    assert stylizer(content, pictures["style"], config).image.getchannel("A").getextrema() == (200, 200)
    hidden = Image.fromarray(np.dstack([pictures["content"], 0 * alpha]))
    with pytest.raises(ValueError, match="no visible pixel"):
        stylizer.steps(hidden, pictures["style"], dataclasses.replace(TINY, colour="match"))


@pytest.mark.parametrize("name", COLOURS)
@pytest.mark.parametrize("flat", [0, 128])
def test_flat_and_grey_pictures_run(stylizer, name, flat):
    content, style = np.full((32, 32, 3), flat, np.uint8), np.full((32, 32), 255 - flat, np.uint8)
    config = Config(size=32, scales=1, iterations=2, colour=name)
    assert stylizer(content, Image.fromarray(style), config).image.size == (32, 32)


def test_the_chroma_of_a_content_that_tiles_is_resized_around_its_borders():
    """Rolled content, rolled result; without wrapping the borders differ."""
    content = np.random.default_rng(0).uniform(0.2, 0.8, (32, 48, 3)).astype(np.float32)
    result = Picture(np.full((16, 24, 3), 0.5, np.float32))
    rolled = Picture(np.roll(content, (8, 12), (0, 1)))
    for wrap in (True, False):
        first, second = (colour.finish("keep-after", result, each, wrap).rgb for each in (Picture(content), rolled))
        assert np.allclose(np.roll(first, (4, 6), (0, 1)), second, atol=1e-5) == wrap
