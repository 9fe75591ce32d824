"""Style statistics, masks, blends, textures and inversions, against float64."""

from dataclasses import replace

import numpy as np
import oracle
import pytest
from PIL import Image

from engine import Config, Stylizer, colour
from engine import image as images
from engine.goal import load as load_goal
from engine.regions import guide, load_freeze, load_mask, restored

WEIGHTS = {"content_weight": 2.0, "style_weight": 300.0, "tv_weight": 5.0}
SHALLOW = {"style_layers": ("relu1_1", "relu3_1:2"), **WEIGHTS}
SIZE = (32, 64)
CONFIG = Config(size=48, scales=1, iterations=1, style_layers=("relu1_1", "relu3_1"))


def noise(height, width, seed):
    return np.random.default_rng(seed).random((height, width, 3)).astype(np.float32)


def error(value, truth):
    return np.linalg.norm(value - truth) / np.linalg.norm(truth)


def halves(height, width, soft=False):
    """A mask and what it leaves, hard or with a ramp between them."""
    x = np.arange(width, dtype=np.float32)
    row = np.clip((x - 10) / 40, 0, 1) if soft else (x >= 32).astype(np.float32)
    mask = np.repeat(row[None], height, axis=0)
    return 1 - mask, mask


@pytest.fixture(scope="module")
def network(states, stylizers):
    return stylizers("torchvision"), states["torchvision"][1]


def check(network, content, style, config, masks=None):
    stylizer, state = network
    picture = noise(*SIZE, 0)
    score = stylizer.evaluate(picture, content, style, config, masks=masks)
    total, terms, gradient = oracle.objective(picture, content, style, state, config, masks)
    assert score.loss == pytest.approx(total, rel=1e-5)
    assert score.content_loss == pytest.approx(terms["content"], rel=1e-5)
    for layer, value in score.style_loss.items():
        assert value == pytest.approx(terms[layer], rel=2e-5)
    assert error(score.gradient, gradient) < 1e-4
    return score


@pytest.mark.parametrize("kind", ["gram", "shifted", "wasserstein"])
@pytest.mark.parametrize("masked", ["", "hard", "soft"])
def test_statistics_and_masks_against_float64(network, kind, masked):
    content, styles = noise(*SIZE, 1), [noise(*SIZE, 2), noise(*SIZE, 3) ** 3]
    config = Config(style_loss=kind, style_blend=(3, 1), **SHALLOW)
    left, right = halves(*SIZE, soft=masked == "soft")
    masks = [(left, None), (right, left)] if masked else None
    check(network, content, styles, config, masks)


def test_the_statistics_differ(network):
    content, style = noise(*SIZE, 1), noise(*SIZE, 2)
    kinds = ("gram", "shifted", "wasserstein")
    losses = {network[0].evaluate(content, content, style, Config(style_loss=kind, **SHALLOW)).loss for kind in kinds}
    assert len(losses) == 3


@pytest.mark.parametrize("kind", ["gram", "wasserstein"])
def test_a_layer_of_content_and_masked_style_on_the_graphs(states, stylizers, kind):
    config = Config(style_loss=kind, content_layers=("relu2_1",), style_layers=("relu2_1", "relu3_1"), **WEIGHTS)
    left, right = halves(*SIZE)
    network = stylizers("torchvision", "onnxruntime"), states["torchvision"][1]
    check(network, noise(*SIZE, 1), [noise(*SIZE, 2), noise(*SIZE, 3)], config, [(left, right), (right, None)])


@pytest.mark.parametrize("kind", ["gram", "shifted", "wasserstein"])
@pytest.mark.parametrize("masked", [False, True])
def test_half_precision_holds_its_tolerance(states, stylizers, kind, masked):
    """In pictures with flat parts too, whose covariances have eigenvalues below what rounding adds."""
    picture, content, style = noise(*SIZE, 0), noise(*SIZE, 1), noise(*SIZE, 2) ** 3
    picture[:, 20:] = 0.5
    config = Config(style_loss=kind, **SHALLOW | {"style_layers": ("relu1_1", "relu2_1", "relu3_1:2")})
    left, right = halves(*SIZE)
    masks = [(left, right)] if masked else None
    score = stylizers("torchvision", "onnxruntime", "fp16").evaluate(picture, content, style, config, masks=masks)
    total, _, gradient = oracle.objective(picture, content, [style], states["torchvision"][1], config, masks)
    assert score.loss == pytest.approx(total, rel=1e-2)
    assert error(score.gradient, gradient) < 3e-2


def test_without_content_and_without_style(network):
    config = Config(**SHALLOW)
    assert check(network, None, noise(*SIZE, 2), config).content_loss == 0
    assert check(network, noise(*SIZE, 1), None, config).style_loss == {}
    with pytest.raises(ValueError, match="neither"):
        network[0].evaluate(noise(*SIZE, 0), None, None)


def test_blend_weights_pull_towards_their_style(stylizer):
    """The loss of a picture that is one of the styles falls with that style's share."""
    one, other = noise(48, 48, 1), noise(48, 48, 2) ** 3
    losses = [
        stylizer.evaluate(one, one, [one, other], Config(style_blend=blend)).loss for blend in ((1, 3), (2, 2), (3, 1))
    ]
    assert losses == sorted(losses, reverse=True)
    assert stylizer.evaluate(one, one, [one, other], Config(style_blend=(9, 0))).loss == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="2 weights, there are 1 styles"):
        stylizer.evaluate(one, one, one, Config(style_blend=(1, 1)))


def test_style_scale_and_style_size_set_the_side_of_the_style(stylizer, monkeypatch):
    from engine import stylizer as module

    seen = []
    resize = module.images.resize
    monkeypatch.setattr(
        module.images, "resize", lambda picture, size, *wrap: (seen.append(size), resize(picture, size, *wrap))[1]
    )
    own = Stylizer(weights="embedded", device="cpu")
    picture, style = noise(48, 64, 0), noise(80, 100, 1)
    losses = []
    for config, size in (
        (Config(), (64, 51)),
        (Config(style_scale=1.5), (96, 77)),
        (Config(style_size=50), (50, 40)),
    ):
        losses.append(own.evaluate(picture, picture, style, config).loss)
        assert seen[-2:] == [(64, 48), size]
    assert len(set(losses)) == 3


def test_each_style_has_its_own_scale(stylizer, pictures):
    """Two styles at two scales are what targets of each at its scale are."""
    content, styles = pictures["content"], (pictures["style"], noise(80, 100, 1))
    both = Config(size=64, scales=1, iterations=3, style_scale=(1.5, 0.75), style_layers=SHALLOW["style_layers"])
    own = [stylizer.targets(style, each) for style, each in zip(styles, both.for_styles(2), strict=True)]
    assert [each.style_scale for each in both.for_styles(2)] == [1.5, 0.75]
    result = stylizer(content, [*styles], both)
    assert np.array_equal(np.asarray(result.image), np.asarray(stylizer(content, own, both).image))
    for other in (1.0, (0.75, 1.5)):
        assert stylizer(content, [*styles], replace(both, style_scale=other)).last.loss != result.last.loss
    with pytest.raises(ValueError, match="style_scale has 2 numbers, there are 1 styles"):
        stylizer(content, styles[0], both)
    with pytest.raises(ValueError, match=r"made for style scale 0\.75, this run has 1\.5"):
        stylizer(content, own[::-1], both)
    assert stylizer(content, None, both).image.size == (64, 46)  # there is no style whose scale it could be


def test_a_texture_has_the_size_that_was_asked_for(stylizer):
    style = noise(40, 40, 1)
    config = Config(size=(64, 40), iterations=4, scales=1)
    result = stylizer(None, style, config)
    assert result.image.size == (64, 40)
    assert result.trace[-1][1] < result.trace[0][1]
    assert stylizer(None, style, Config(size=40, iterations=1, scales=1)).image.size == (40, 40)
    with pytest.raises(ValueError, match="without content"):
        stylizer(style, style, config)


def test_an_inversion_comes_nearer_to_the_content(stylizer, pictures):
    config = Config(size=48, iterations=15, scales=1)  # its own default start would be the content
    result = stylizer(pictures["content"], None, config)
    noise = stylizer(pictures["content"], None, replace(config, init="noise"))
    assert np.array_equal(result.image, noise.image)
    assert result.image.size == (48, 34)
    assert result.trace[-1][1] < 0.2 * result.trace[0][1]


def test_each_region_takes_the_colours_of_its_style(stylizer):
    red, blue = (np.zeros((48, 48, 3), np.float32) for _ in range(2))
    red[..., 0] = blue[..., 2] = 0.8
    left, right = halves(48, 64)
    config = Config(size=64, iterations=25, scales=1, content_weight=0, style_layers=("relu1_1", "relu2_1"))
    content = np.full((48, 64, 3), 0.4, np.float32)
    found = np.asarray(stylizer(content, [red, blue], config, masks=[left, right]).image, np.float32)
    assert found[:, :28, 0].mean() > found[:, :28, 2].mean() + 40
    assert found[:, 36:, 2].mean() > found[:, 36:, 0].mean() + 40


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_frozen_pixels_are_the_contents_own(stylizer, optimizer):
    content = (255 * noise(40, 64, 1)).astype(np.uint8)
    freeze = np.zeros((40, 64), np.float32)
    freeze[5:20, 8:30] = 1
    config = Config(size=64, iterations=5, scales=2, init="noise", optimizer=optimizer, tv_weight=3)
    found = np.asarray(stylizer(content, noise(40, 40, 2), config, freeze=freeze).image)
    held = freeze > 0
    assert (found[held] == content[held]).all()
    assert (found[~held] != content[~held]).mean() > 0.9
    with pytest.raises(ValueError, match="keeps pixels of the content"):
        stylizer(None, content, config, freeze=freeze)


def test_the_word_alpha_freezes_what_the_content_shows(stylizer):
    alpha = np.zeros((40, 64), np.uint8)
    alpha[5:20, 8:30] = 255
    content = Image.fromarray(np.dstack([(255 * noise(40, 64, 1)).astype(np.uint8), alpha]))
    config = Config(size=64, iterations=3, scales=1, init="noise")
    one, other = (
        stylizer(content, noise(40, 40, 2), config, freeze=freeze).image.tobytes() for freeze in ("alpha", alpha / 255)
    )
    assert one == other
    with pytest.raises(ValueError, match="no alpha"):
        stylizer(content.convert("RGB"), noise(40, 40, 2), config, freeze="alpha")


def test_what_is_frozen_fades_into_the_pixels_around_it():
    """By thirds, diagonals too; and is the content's own to the bit."""
    picture, content = (images.load(noise(20, 30, seed)) for seed in (1, 2))
    mask = np.zeros((20, 30), np.float32)
    mask[8:12, 10:20] = 1
    found = restored(picture, content, mask).rgb
    y, x = np.mgrid[:20, :30]
    away = np.maximum.reduce([8 - y, y - 11, 10 - x, x - 19, 0 * y])
    share = np.clip((3 - away) / 3, 0, 1)[..., None]
    np.testing.assert_allclose(found, share * content.rgb + (1 - share) * picture.rgb, atol=1e-6)
    assert np.array_equal(found[mask > 0], content.rgb[mask > 0])
    assert np.array_equal(found[away > 2], picture.rgb[away > 2])
    for shift in ((8, 0), (0, 15), (9, 12)):  # a picture that tiles has no borders
        rolled = (images.Picture(np.roll(each.rgb, shift, (0, 1))) for each in (picture, content))
        around = restored(*rolled, np.roll(mask, shift, (0, 1)), wrap=True).rgb
        np.testing.assert_allclose(around, np.roll(found, shift, (0, 1)), atol=1e-6)


def test_pixels_beside_what_is_frozen_are_not_shown_as_loud_as_they_get(stylizer, pictures):
    freeze = np.zeros((40, 56), np.float32)
    freeze[10:30, 15:40] = 1
    config = Config(size=56, scales=1, iterations=60)
    *_, last = stylizer.steps(pictures["content"], pictures["style"], config, freeze=freeze)
    raw = images.from_tensor(last._iterate.best).rgb
    own = images.resize(images.load(pictures["content"]), (56, 40)).rgb
    shown = np.asarray(last.image, np.float32) / 255
    ring = np.zeros((40, 56), bool)
    ring[9:31, 14:41] = True
    ring[10:30, 15:40] = False
    assert np.abs(shown - own)[ring].mean() < 0.5 * np.abs(raw - own)[ring].mean()


def test_a_mask_that_freezes_nothing_is_told():
    picture, thin = images.load(noise(32, 64, 1)), np.zeros((32, 64), np.float32)
    thin[:, 10] = 1
    assert load_freeze(thin, picture, (64, 32)).sum() == 32
    for mask, size in ((thin, (16, 8)), (thin * 0.4, (64, 32))):
        with pytest.raises(ValueError, match=r"less than half of every pixel at \d+ x \d+"):
            load_freeze(mask, picture, size)


def test_coverage_is_reported(stylizer, caplog):
    picture, styles = noise(48, 64, 1), [noise(40, 40, 2), noise(40, 40, 3)]
    left, right = halves(48, 64)
    with caplog.at_level("INFO", logger="engine"):
        stylizer.evaluate(picture, picture, styles, masks=[left, right])
        assert caplog.messages[-1] == "masks: style 1 covers 50.0%, 2 covers 50.0%"
        left[:, :16] = 0
        right[:, 24:32] = 1
        stylizer.evaluate(picture, picture, styles, masks=[left, right])
    assert caplog.messages[-1] == (
        "masks: style 1 covers 25.0%, 2 covers 62.5%; 25.0% belongs to no style, 12.5% to more than one"
    )


def test_mistakes_with_masks_are_named(stylizer):
    picture, style = noise(48, 64, 1), noise(48, 64, 2)
    full, empty, turned = np.ones((48, 64), np.float32), np.zeros((48, 64), np.float32), np.ones((64, 48), np.float32)
    for masks, words in (
        ([full, full], "2 masks for 1 styles"),
        ([empty], "content mask 1 is empty"),
        ([(full, empty)], "style mask 1 is empty"),
        ([turned], "shapes have to agree"),
        (["alpha"], "no alpha channel"),
        ([(full,)], "mask 1 has 1 parts: give a mask of the content, or it and one of the style"),
        ([[full, full, full]], "mask 1 has 3 parts"),
    ):
        with pytest.raises(ValueError, match=words):
            stylizer.steps(picture, style, masks=masks)
    with pytest.raises(FileNotFoundError):
        stylizer.steps(picture, style, masks=["missing.png"])


def test_alpha_serves_as_a_mask(stylizer):
    alpha = np.zeros((48, 64), np.uint8)
    alpha[:, :32] = 255
    rgb = (255 * noise(48, 64, 1)).astype(np.uint8)
    content = Image.fromarray(np.dstack([rgb, alpha]))
    style = noise(48, 64, 2)
    by_alpha = stylizer.evaluate(rgb, content, style, masks=["alpha"])
    assert by_alpha.loss == stylizer.evaluate(rgb, rgb, style, masks=[(alpha / 255).astype(np.float32)]).loss
    assert by_alpha.loss != stylizer.evaluate(rgb, rgb, style).loss


def transparent(rgb, alpha):
    return Image.fromarray(np.dstack([(255 * rgb).astype(np.uint8), (255 * alpha).astype(np.uint8)]))


def test_what_a_style_hides_does_not_count(stylizer):
    alpha = np.zeros((40, 50), np.float32)
    alpha[:, :20] = 1
    shown = noise(40, 50, 2)
    other = np.where(alpha[..., None] > 0, shown, 1 - shown)
    losses = [stylizer.evaluate(noise(48, 64, 1), None, transparent(rgb, alpha), CONFIG).loss for rgb in (shown, other)]
    assert losses[0] == losses[1] != stylizer.evaluate(noise(48, 64, 1), None, shown, CONFIG).loss
    mean = shown[:, :20].mean((0, 1))
    filled = np.where(alpha[..., None] > 0, shown, mean).astype(np.float32)  # what is hidden has the mean of the rest
    full = np.ones((48, 64), np.float32)
    expected = stylizer.evaluate(noise(48, 64, 1), None, filled, CONFIG, masks=[(full, alpha)]).loss
    assert losses[0] == pytest.approx(expected, rel=1e-2)  # that of 8 bits


def test_a_mask_of_a_transparent_style_keeps_to_what_it_shows(stylizer):
    alpha, mask, both = (np.zeros((40, 50), np.float32) for _ in range(3))
    alpha[:, :20], mask[:20], both[:20, :20] = 1, 1, 1
    style, full = noise(40, 50, 2), np.ones((48, 64), np.float32)
    picture = images.Picture(images.shown(images.Picture(style, alpha)).rgb, alpha)
    opaque = images.Picture(picture.rgb)
    found = [
        stylizer.evaluate(noise(48, 64, 1), None, each, CONFIG, masks=[(full, part)]).loss
        for each, part in ((picture, mask), (opaque, both))
    ]
    assert found[0] == found[1]
    for each, part, words in (
        (picture, 1 - alpha, "wherever its mask is white"),
        (images.Picture(style, 0 * alpha), None, "everywhere"),
    ):
        masks = None if part is None else [(full, part)]
        with pytest.raises(ValueError, match=f"the style is transparent {words}"):
            stylizer.steps(noise(48, 64, 1), each, CONFIG, masks=masks)


@pytest.mark.parametrize("how", ["none", "match"])
def test_a_soft_alpha_counts_once(stylizer, how):
    """For its statistics and for its colours, whether the mask is the word or leaves all in."""
    alpha, full = np.linspace(0, 1, 50, dtype=np.float32)[None].repeat(40, 0), np.ones((48, 64), np.float32)
    style, config = images.Picture(noise(40, 50, 2), alpha), replace(CONFIG, colour=how)
    by_word, by_itself = (
        stylizer.evaluate(noise(48, 64, 1), noise(48, 64, 3), style, config, masks=[(full, mask)]).loss
        for mask in ("alpha", np.ones((40, 50), np.float32))
    )
    assert by_word == by_itself


def test_alpha_that_hides_nothing_changes_nothing(stylizer):
    style = noise(40, 50, 2)
    plain, whole = (
        stylizer.evaluate(noise(48, 64, 1), None, each, CONFIG).loss
        for each in (images.Picture(style), images.Picture(style, np.ones((40, 50), np.float32)))
    )
    assert plain == whole


def test_no_masks_for_no_styles(stylizer):
    assert len(list(stylizer.steps(noise(48, 64, 1), None, CONFIG, masks=[]))) == 1


def test_guides_are_normalised_means_over_areas():
    mask = np.zeros((8, 8), np.float32)
    mask[:4] = 1
    mask[4:, :2] = 0.5
    found = guide(mask, (4, 4)).numpy()
    assert (found**2).mean() == pytest.approx(1)
    np.testing.assert_allclose(found / found[0], [1] * 8 + ([0.5] + [0] * 3) * 2)


def test_masks_are_read_from_pictures_of_any_kind(tmp_path):
    from engine import image

    picture = image.load(noise(20, 30, 0))
    plane = np.zeros((20, 30), bool)
    plane[:, :10] = True
    Image.fromarray(plane).save(tmp_path / "mask.png")
    for source in (plane, plane.astype(np.float32), 255 * plane.astype(np.uint8), tmp_path / "mask.png"):
        np.testing.assert_array_equal(load_mask(source, picture, "mask"), plane.astype(np.float32))


@pytest.mark.parametrize("way", ["match", "histogram", "keep-before"])
def test_a_style_takes_the_colours_of_its_part_of_the_content(way):
    """Of its own half, and with a mask of the style from its own part; masks may be coarser than their pictures."""
    rng = np.random.default_rng(0)
    content = rng.uniform(0.1, 0.3, (48, 64, 3)).astype(np.float32)
    content[:, 32:] += (0.2, 0.3, 0.5)
    style = rng.uniform(0.2, 0.8, (40, 40, 3)).astype(np.float32)
    style[:20] = 0.9  # left out
    left = np.zeros((24, 32), np.float32)
    left[:, :16] = 1
    below = np.zeros((20, 20), np.float32)
    below[10:] = 1
    config = Config(size=64, colour=way)
    found = load_goal(content, [style, style], config, [(left, below), 1 - left], None).coloured().styles
    plain = load_goal(content, [style, style], config, None, None).coloured().styles
    assert np.array_equal(plain[0].rgb, plain[1].rgb)
    parts = (content[:, :32], found[0].rgb[20:]), (content[:, 32:], found[1].rgb)
    for wanted, got in parts:
        means = [colour.to_oklab(each).reshape(-1, 3).mean(0) for each in (wanted, got)]
        if way == "keep-before":
            means = [mean[:1] for mean in means]
        np.testing.assert_allclose(*means, atol=0.02)
    if way != "keep-before":
        np.testing.assert_array_equal(found[0].rgb[:20], style[:20])
