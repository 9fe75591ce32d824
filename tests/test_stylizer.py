import contextlib
import functools
import gc
import itertools
import math
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from conftest import SHALLOW, TINY, check_alone
from PIL import Image

from engine import BackendError, Config, Stylizer, features, image, provider, samples
from engine.cache import Cache
from engine.export import vgg

ALL_TERMS = {"content_weight": 2.0, "style_weight": 300.0, "tv_weight": 5.0}


def noise(height, width, seed):
    return np.random.default_rng(seed).random((height, width, 3)).astype(np.float32)


def error(value, truth):
    return np.linalg.norm(value - truth) / np.linalg.norm(truth)


def noises(size, seed):
    return [noise(*size, 3 * seed + i) for i in range(3)]


@pytest.fixture(scope="module")
def truth(states):
    """What the float64 oracle says of three pictures of noise, whatever the device that is compared with it."""
    return functools.cache(
        lambda naming, size, config, seed: oracle.objective(*noises(size, seed), states[naming][1], config)
    )


def check_evaluate(stylizer, truth, naming, size, config, seed, tolerance=1e-5):
    """Losses against the float64 oracle; returns the relative error of the gradient."""
    score = stylizer.evaluate(*noises(size, seed), config)
    total, terms, gradient = truth(naming, size, config, seed)
    assert score.loss == pytest.approx(total, rel=tolerance)
    assert score.content_loss == pytest.approx(terms["content"], rel=1e-5)
    assert score.tv_loss == pytest.approx(terms["tv"], rel=1e-5)
    assert list(score.style_loss) == list(config.style_layer_weights)
    for layer, value in score.style_loss.items():
        assert value == pytest.approx(terms[layer], rel=2e-5)
    assert score.gradient.shape == (*size, 3)
    assert score.gradient.dtype == np.float32
    return error(score.gradient, gradient)


CASES = [((64, 64), "torchvision"), ((97, 131), "torchvision"), ((97, 131), "caffe"), ((161, 200), "torchvision")]


DEVICES = ["cpu", "onnxruntime"]


@pytest.mark.parametrize(("size", "naming"), CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_evaluate_against_float64_average_pooling(stylizers, truth, size, naming, device):
    config = Config(pooling="avg", **ALL_TERMS)
    assert check_evaluate(stylizers(naming, device), truth, naming, size, config, seed=1) < 1e-4


@pytest.mark.parametrize(("size", "naming"), CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_evaluate_against_float64_max_pooling(stylizers, truth, size, naming, device):
    """Now and then two of the hundred thousands of windows' values agree to seven digits. Any fp32 program (torch's
    autograd too) may then route to the other one, and the gradient jumps by about 1e-3. So the tight bound has to hold
    for one of the pictures, where a picture without such a pair is likely, and the loose one for all.
    """
    own, config = stylizers(naming, device), Config(pooling="max", **ALL_TERMS)
    errors = []
    for seed in range(4):
        errors.append(check_evaluate(own, truth, naming, size, config, seed))
        if errors[-1] < 1e-4:
            break
    assert errors[-1] < 1e-4
    assert max(errors) < 3e-2


EDGES = [({"padding": "zero"}, (49, 67)), ({"padding": "reflect"}, (52, 35)), ({"tile": True}, (48, 80))]


@pytest.mark.parametrize(("options", "size"), EDGES)
@pytest.mark.parametrize("device", DEVICES)
def test_evaluate_against_float64_beyond_the_border(stylizers, truth, options, size, device):
    own = stylizers("torchvision", device)
    config = Config(**ALL_TERMS, tv_power=1.5, **options)
    # Grams of noise are alike: the small difference carries the rounding of Winograd's features, 1.3e-5 in deep layers.
    assert check_evaluate(own, truth, "torchvision", size, config, seed=1, tolerance=2e-5) < 1e-4
    _, _, usual = truth("torchvision", size, Config(**ALL_TERMS), 1)
    assert error(usual, own.evaluate(*noises(size, 1), config).gradient) > 1e-2


def test_rolling_a_picture_that_tiles_rolls_its_gradient(stylizers):
    own = stylizers("torchvision")
    picture, content, style = noise(48, 64, 1), noise(48, 64, 2), noise(40, 40, 3)
    config = Config(tile=True, **ALL_TERMS)
    score = own.evaluate(picture, content, style, config)
    rolled = own.evaluate(*(np.roll(each, (16, -32), (0, 1)) for each in (picture, content)), style, config)
    assert rolled.loss == pytest.approx(score.loss, rel=1e-6)
    assert error(rolled.gradient, np.roll(score.gradient, (16, -32), (0, 1))) < 1e-5


def test_a_picture_that_tiles_has_no_seam(stylizer, pictures, caplog):
    """From noise, over two scales: neighbours across the border are as alike as those inside."""
    options = {"size": 90, "scales": 2, "iterations": 30, "init": "noise", "content_weight": 0.0, "tv_weight": 300.0}
    options["style_layers"] = SHALLOW

    def seams(config):
        picture = np.asarray(stylizer(pictures["content"], pictures["style"], config).image, np.float64)
        found = []
        for axis in (0, 1):
            steps = np.abs(np.roll(picture, -1, axis) - picture).mean((1 - axis, 2))
            found.append(steps[-1] / steps[:-1].mean())
        return picture.shape, found

    shape, tiled = seams(Config(tile=True, **options))
    assert shape == (80, 96, 3)
    assert max(tiled) < 1.5
    assert "to tile, the content of 56 x 40 pixels is stretched to the shape of 96 x 80" in caplog.text
    _, plain = seams(Config(**options))
    assert max(plain) > 1.8


def test_a_score_of_a_picture_that_cannot_tile_is_refused(stylizer, pictures):
    with pytest.raises(ValueError, match="56 x 40 pixels: to be tiled, its sides have to be multiples of 16"):
        stylizer.evaluate(pictures["content"], pictures["content"], pictures["style"], Config(tile=True))


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 1e-2)])
def test_a_network_that_was_opened_for_average_pooling_does_maxima_too(states, precision, tolerance):
    path, state = states["torchvision"]
    own = Stylizer(weights=path, device="cpu", precision=precision)
    for pooling, layers in (("max", ("relu1_2",)), ("avg", ("relu5_2",)), ("max", ("relu5_2",))):
        config = Config(pooling=pooling, content_layers=layers, style_layers=layers, **ALL_TERMS)
        picture, content, style = (noise(32, 40, seed) for seed in (1, 2, 3))
        total, _, _ = oracle.objective(picture, content, style, state, config)
        assert own.evaluate(picture, content, style, config).loss == pytest.approx(total, rel=tolerance)


def test_evaluate_with_other_layers_and_shared_ones(states, stylizers):
    """relu3_1 is a content and a style layer at once; relu5_4 is deeper than the defaults."""
    picture, content, style = (noise(48, 56, seed) for seed in (1, 2, 3))
    config = Config(content_layers=("relu3_1", "relu5_4"), style_layers=("relu3_1", "relu1_2"), **ALL_TERMS)
    score = stylizers("torchvision").evaluate(picture, content, style, config)
    total, _, gradient = oracle.objective(picture, content, style, states["torchvision"][1], config)
    assert score.loss == pytest.approx(total, rel=1e-5)
    assert error(score.gradient, gradient) < 1e-4


@pytest.mark.parametrize("device", DEVICES)
def test_layer_weights_against_float64(states, stylizers, device):
    picture, content, style = (noise(48, 56, seed) for seed in (1, 2, 3))
    layers = {
        "content_layers": ("relu2_2:0.3", ("relu3_1", 4)),
        "style_layers": ("relu1_1", "relu3_1:0.25", ("relu4_2", 7)),
    }
    config = Config(**layers, **ALL_TERMS)
    score = stylizers("torchvision", device).evaluate(picture, content, style, config)
    total, terms, gradient = oracle.objective(picture, content, style, states["torchvision"][1], config)
    assert score.loss == pytest.approx(total, rel=1e-5)
    assert score.content_loss == pytest.approx(terms["content"], rel=1e-5)
    assert error(score.gradient, gradient) < 1e-4


@pytest.mark.parametrize(
    ("naming", "layer"), [("embedded", "relu2_2"), ("torchvision", "relu4_2"), ("caffe", "relu4_2")]
)
def test_the_layer_of_the_content_is_that_of_the_weights(stylizer, stylizers, pictures, naming, layer):
    own = stylizer if naming == "embedded" else stylizers(naming)
    arguments, usual = (pictures["content"], pictures["style"]), Config(size=48, iterations=2, scales=1)
    result = own(*arguments, usual)
    assert result.manifest["options"]["content_layers"] == ((layer, 1.0),)
    named = replace(usual, content_layers=(layer,))
    assert np.array_equal(np.asarray(own(*arguments, named).image), np.asarray(result.image))
    assert own.fitted(*arguments, usual) == named
    steps = own.steps(*arguments, usual)
    saved = next(steps).checkpoint()
    steps.close()
    assert np.array_equal(
        np.asarray(list(own.steps(*arguments, named, resume=saved))[-1].image), np.asarray(result.image)
    )
    assert own.objective(*arguments, usual).network.spec.layers == named.layers
    scores = [own.evaluate(result.image, *arguments, each) for each in (usual, named)]
    assert scores[0].content_loss == scores[1].content_loss > 0
    assert own.forecast(*arguments, usual) == own.forecast(*arguments, named)


def test_half_precision_holds_its_tolerance(states, stylizers):
    """fp16 graphs, fp16 features, scaled fp16 cotangents; average pooling, away from the optimum."""
    picture, content, style = noise(64, 64, 1), noise(64, 64, 2), noise(64, 64, 3) ** 3
    config = Config(**ALL_TERMS)
    score = stylizers("torchvision", "onnxruntime", "fp16").evaluate(picture, content, style, config)
    total, _, gradient = oracle.objective(picture, content, style, states["torchvision"][1], config)
    assert score.loss == pytest.approx(total, rel=1e-2)
    assert error(score.gradient, gradient) < 3e-2


@pytest.mark.parametrize("pooling", vgg.POOLINGS)
@pytest.mark.parametrize("loss", ["gram", "wasserstein"])
def test_bf16_on_a_cpu_holds_its_tolerance(states, stylizers, pooling, loss):
    picture, content, style = noise(64, 64, 1), noise(64, 64, 2), noise(64, 64, 3) ** 3
    config = Config(**ALL_TERMS, pooling=pooling, style_loss=loss)
    score = stylizers("torchvision", "cpu", "bf16").evaluate(picture, content, style, config)
    total, _, gradient = oracle.objective(picture, content, style, states["torchvision"][1], config)
    assert score.loss == pytest.approx(total, rel=1e-2)
    assert 1e-4 < error(score.gradient, gradient) < 3e-2


@pytest.mark.parametrize("weight", [1e-12, 1e12])
def test_half_precision_gradient_does_not_depend_on_the_weights_scale(stylizers, weight):
    stylizer = stylizers("torchvision", "onnxruntime", "fp16")
    arguments = (noise(40, 40, 1), noise(40, 40, 2), noise(40, 40, 3))
    one = stylizer.evaluate(*arguments, Config(content_weight=1, style_weight=100))
    other = stylizer.evaluate(*arguments, Config(content_weight=weight, style_weight=100 * weight))
    np.testing.assert_allclose(other.gradient / weight, one.gradient, rtol=1e-2, atol=1e-3 * np.abs(one.gradient).max())


@pytest.mark.parametrize(("device", "low"), [("onnxruntime", "fp16"), ("cpu", "bf16")])
def test_a_run_in_half_precision_ends_at_the_loss_of_single_precision(device, low):
    """Evaluated again in fp32, within the 1 % that the numerics allow."""
    config = Config(size=64, scales=1, iterations=60)
    content, style = samples.pair()
    own = {precision: Stylizer("embedded", device, precision) for precision in ("fp32", low)}
    objective, ends = own["fp32"].objective(content, style, config), {}
    for precision, each in own.items():
        result = each(content, style, config)
        ends[precision] = float(objective.evaluate(image.to_tensor(result.last.picture))[0].total)
        assert ends[precision] < 0.1 * result.trace[0][1]
    assert ends[low] < 1.01 * ends["fp32"]


def test_evaluate_resizes_content_and_style(stylizer):
    """The content is resized to the image, the style so that its long side equals the image's."""
    picture, content, style = noise(40, 60, 1), noise(80, 120, 2), noise(60, 30, 3)
    score = stylizer.evaluate(picture, content, style)
    resized_content = image.resize(image.load(content), (60, 40)).rgb
    resized_style = image.resize(image.load(style), (32, 64)).rgb  # the short side cannot be 30
    again = stylizer.evaluate(picture, resized_content, resized_style)
    assert score.content_loss == again.content_loss
    large = stylizer.evaluate(noise(96, 64, 4), content, style)
    assert large.gradient.shape == (96, 64, 3)


def test_the_content_picture_has_no_content_loss(stylizer, pictures):
    score = stylizer.evaluate(pictures["content"], pictures["content"], pictures["content"])
    assert score.content_loss == 0
    assert all(value < 1e-6 for value in score.style_loss.values())


def test_steps_count_over_all_scales(stylizer, pictures):
    config = Config(size=72, scales=2, iterations=(3, 2))
    steps = list(stylizer.steps(pictures["content"], pictures["style"], config))
    assert [step.scale for step in steps] == [51, 51, 51, 72, 72]
    assert [step.iteration for step in steps] == list(range(1, steps[0].total + 1))
    assert steps[-1].image.size == (72, 51)


def test_loss_falls_and_the_result_is_the_best_iterate(stylizer, pictures):
    config = Config(size=64, iterations=25, scales=1)
    result = stylizer(pictures["content"], pictures["style"], config)
    losses = [loss for _, loss, _ in result.trace]
    assert min(losses) < 0.3 * losses[0]
    assert len(losses) == 25
    assert result.image.size == (64, 46)
    score = stylizer.evaluate(result.image, pictures["content"], pictures["style"], config)
    assert min(losses) * 0.99 < score.loss < 1.1 * min(losses)  # rounding to eight bits costs something
    assert score.loss < 0.5 * losses[0]


def test_what_is_shown_is_what_was_optimised(stylizer, pictures):
    """By default nothing is cut off when the picture is written; without the clamp that raises its loss."""

    def raised(**options):
        config = Config(size=64, iterations=60, scales=1, style_layers=SHALLOW, **options)
        result = stylizer(pictures["content"], pictures["style"], config)
        shown = stylizer.evaluate(result.image, pictures["content"], pictures["style"], config).loss
        return shown / min(loss for _, loss, _ in result.trace)

    assert raised() < 1.1
    assert raised(clamp=False) > 1.5


def test_a_stalled_scale_makes_room_for_the_next(stylizer, pictures):
    """`total` is the last iteration, and the picture goes on from scale to scale."""
    plain = Config(size=68, scales=2, iterations=60, style_layers=SHALLOW)
    stopped = replace(plain, stop=0.9)
    steps = list(stylizer.steps(pictures["content"], pictures["style"], stopped))
    assert [step.iteration for step in steps] == list(range(1, len(steps) + 1))
    assert steps[-1].iteration == steps[-1].total == len(steps)
    assert len(steps) < 70
    assert steps[0].total == 24 + 60
    assert {step.scale for step in steps} == {48, 68}
    assert steps[-1].scale == 68
    assert steps[0].total == next(stylizer.steps(pictures["content"], pictures["style"], plain)).total


def test_the_controls_of_a_run_reach_it(stylizer, pictures):
    """Each option changes the picture, and nothing but the option does."""
    base = {"size": 48, "scales": 1, "iterations": 8, "tv_weight": 100.0, "style_layers": SHALLOW}

    def run(**options):
        return stylizer(pictures["content"], pictures["style"], Config(**base, **options)).image.tobytes()

    default, adam = run(), run(optimizer="adam")
    assert run() == default
    assert run(average=0.9) != default
    assert run(tv_power=1.0) != default
    assert run(history=1) != default
    assert run(clamp=False) != default
    assert run(padding="zero") != default
    assert run(padding="reflect") != default
    assert run(optimizer="adam", learning_rate=0.1) != adam


def test_a_history_too_long_for_a_gpu_is_told_before_the_first_step(stylizer, pictures, monkeypatch):
    monkeypatch.setattr(stylizer, "device", "cuda")
    with pytest.raises(ValueError, match="history 21: on a GPU lbfgs remembers at most 20 pairs"):
        stylizer.steps(pictures["content"], pictures["style"], Config(history=21))


def test_steps_are_lazy_and_an_early_leave_stops(stylizer, pictures, monkeypatch):
    from engine import losses

    calls = []
    write = losses.Objective.write
    monkeypatch.setattr(losses.Objective, "write", lambda *a, **k: (calls.append(1), write(*a, **k))[1])
    steps = stylizer.steps(pictures["content"], pictures["style"], TINY)
    assert not calls
    for step in steps:
        if step.iteration == 2:
            break
    steps.close()
    assert len(calls) == 2


def test_a_step_keeps_its_picture_after_the_run_moved_on(stylizer, pictures):
    steps = stylizer.steps(pictures["content"], pictures["style"], Config(size=48, iterations=6, scales=1))
    first = next(steps)
    before = first.image.tobytes()
    last = list(steps)[-1]
    assert first.image.tobytes() == before
    assert last.image.tobytes() != before


def test_a_run_that_fp16_cannot_hold_goes_on_in_fp32(pictures, monkeypatch, caplog):
    from engine import losses, provider

    write = losses.Objective.write

    def breaks(self, *arguments):
        broken = self.network.spec.precision == "fp16"
        return write(self, *arguments) * (float("nan") if broken else 1)

    monkeypatch.setattr(losses.Objective, "write", breaks)
    monkeypatch.setattr(provider, "resolve", lambda device, precision: ("onnxruntime", "fp16"))
    own = Stylizer(weights="embedded", precision="auto")
    with caplog.at_level("INFO", logger="engine"):
        result = own(pictures["content"], pictures["style"], TINY)
    assert "this run goes on in fp32" in caplog.text
    assert (own.precision, result.last.precision) == ("fp16", "fp32")  # the next run starts in fp16
    assert len(result.trace) == TINY.iterations
    named = Stylizer(weights="embedded", precision="fp16")
    with pytest.raises(FloatingPointError):
        named(pictures["content"], pictures["style"], TINY)


def test_a_run_that_falls_back_in_its_middle_goes_on_from_its_last_picture(pictures, monkeypatch):
    """And so does one that is resumed after it, in fp32 at once."""
    from engine import losses, provider

    write, minimise, evaluations, begun = losses.Objective.write, Stylizer._minimise, itertools.count(), []

    def breaks(self, *arguments):
        broken = self.network.spec.precision == "fp16" and next(evaluations) >= 3
        return write(self, *arguments) * (float("nan") if broken else 1)

    def noted(self, content, goal, precision, start, left, *others):
        begun.append((precision, left, image.to_pil(image.from_tensor(start)).tobytes()))
        return minimise(self, content, goal, precision, start, left, *others)

    monkeypatch.setattr(losses.Objective, "write", breaks)
    monkeypatch.setattr(Stylizer, "_minimise", noted)
    monkeypatch.setattr(provider, "resolve", lambda device, precision: ("onnxruntime", "fp16"))
    pair, config = (pictures["content"], pictures["style"]), replace(TINY, iterations=7)
    found, saved = [], b""
    for step in Stylizer(weights="embedded", precision="auto").steps(*pair, config):
        found.append((step.iteration, step.precision, step.loss, step.image.tobytes()))
        saved = step.checkpoint() if step.iteration == 5 else saved
    assert [each[:2] for each in found] == [(i, "fp16" if i < 4 else "fp32") for i in range(1, 8)]
    assert [each[:2] for each in begun] == [("fp16", 7), ("fp32", 4)]
    assert begun[1][2] == found[2][3]
    resumed = Stylizer(weights="embedded", precision="auto").steps(*pair, config, resume=saved)
    assert [(each.iteration, each.precision, each.loss, each.image.tobytes()) for each in resumed] == found[5:]
    with pytest.raises(ValueError, match="another precision"):
        Stylizer(weights="embedded", precision="fp16").steps(*pair, config, resume=saved)


def test_a_score_that_fp16_cannot_hold_is_taken_in_fp32(pictures, monkeypatch):
    from engine import losses, provider

    write = losses.Objective.write

    def breaks(self, *arguments, **options):
        loss = write(self, *arguments, **options)
        return loss.fill_(float("nan")) if self.network.spec.precision == "fp16" else loss

    monkeypatch.setattr(losses.Objective, "write", breaks)
    monkeypatch.setattr(provider, "resolve", lambda device, precision: ("onnxruntime", "fp16"))
    arguments = (pictures["content"], pictures["content"], pictures["style"])
    own = Stylizer(weights="embedded", precision="auto")
    assert np.isfinite(own.evaluate(*arguments).loss)
    assert own.precision == "fp16"
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        Stylizer(weights="embedded", precision="fp16").evaluate(*arguments)


def test_statistics_that_fp16_cannot_hold_are_taken_in_fp32(pictures, monkeypatch):
    """For a run, a score, an objective and saved targets alike."""
    from engine import kernels, provider

    gram = kernels.gram

    def overflows(features, products):
        return gram(features, products).mul_(math.inf if features.dtype == torch.float16 else 1)

    monkeypatch.setattr(kernels, "gram", overflows)
    monkeypatch.setattr(provider, "resolve", lambda device, precision: ("onnxruntime", "fp16"))
    content, style = pictures["content"], pictures["style"]
    own = Stylizer(weights="embedded", precision="auto")
    assert own(content, style, TINY).last.precision == "fp32"
    assert np.isfinite(own.evaluate(content, content, style).loss)
    assert own.objective(content, style, TINY).network.spec.precision == "fp32"
    saved = own.targets(style, TINY)
    assert all(torch.isfinite(each.matrix).all() for side in saved.sides.values() for each in side.values())
    named = Stylizer(weights="embedded", precision="fp16")
    with pytest.raises(FloatingPointError, match="features of a style"):
        named.targets(style, TINY)


def test_adam_leaves_frozen_pixels_alone_at_every_scale(stylizer):
    rng = np.random.default_rng(3)
    content, style = rng.random((64, 80, 3), np.float32), rng.random((64, 64, 3), np.float32)
    left = np.zeros((64, 80), np.float32)
    left[:, :40] = 1
    config = Config(size=80, scales=2, iterations=(20, 5), optimizer="adam", learning_rate=0.1)
    assert len(config.schedule(80 / 64)) == 2
    result = np.asarray(stylizer(content, style, config, freeze=left).image, int)
    assert np.abs(result - 255 * content)[:, :40].max() <= 0.51
    assert np.abs(result - 255 * content)[:, 40:].max() > 20


def test_masks_of_a_score_without_content_are_of_its_image(stylizer, pictures):
    image = np.random.default_rng(4).random((40, 80, 3), np.float32)
    mask = np.ones((40, 80), np.float32)
    score = stylizer.evaluate(image, None, pictures["style"], masks=[mask])
    assert score.style_loss == pytest.approx(stylizer.evaluate(image, None, pictures["style"]).style_loss, rel=1e-4)
    with pytest.raises(ValueError, match="content mask 1 has 40 x 40 pixels, its picture 80 x 40"):
        stylizer.evaluate(image, None, pictures["style"], masks=[mask[:, :40]])


def test_an_iterator_that_is_left_ends_while_it_owns_the_network():
    inside, seen = [], []

    class Network:
        @contextlib.contextmanager
        def use(self):
            inside.append(1)
            yield
            inside.pop()

    def values():
        try:
            while True:
                seen.append(len(inside))
                yield 1
        finally:
            seen.append(len(inside))

    running = features.within(Network(), values())
    next(running)
    assert inside == []
    running.close()
    assert seen == [1, 1]


def test_mistakes_are_raised_by_the_call_not_by_the_first_step(stylizer, pictures):
    with pytest.raises(FileNotFoundError):
        stylizer.steps("missing.png", pictures["style"])
    with pytest.raises(ValueError, match="at least one style"):
        stylizer.steps(pictures["content"], [])
    thin = np.zeros((400, 1, 3), np.uint8)
    with pytest.raises(ValueError, match="choose a larger size or crop"):
        stylizer.steps(thin, pictures["style"])
    with pytest.raises(FileNotFoundError):
        stylizer.steps(pictures["content"], pictures["style"], Config(init="missing.png"))


def test_a_thin_style_is_enlarged_until_it_fits(stylizer, pictures):
    thin = noise(200, 12, 0)
    assert stylizer(pictures["content"], thin, TINY).image.size == (48, 34)


def test_same_seed_same_bytes(pictures):
    """Noise start, two objects: nothing is left over from one run to the next."""
    config = Config(size=48, iterations=4, scales=1, init="noise", seed=5)
    first, second = (Stylizer(weights="embedded", device="cpu") for _ in range(2))
    expected = first(pictures["content"], pictures["style"], config).image.tobytes()
    assert first(pictures["content"], pictures["style"], config).image.tobytes() == expected
    assert second(pictures["content"], pictures["style"], config).image.tobytes() == expected
    other = Config(size=48, iterations=4, scales=1, init="noise", seed=6)
    assert first(pictures["content"], pictures["style"], other).image.tobytes() != expected


def test_the_global_random_state_is_left_alone(stylizer, pictures):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    stylizer(pictures["content"], pictures["style"], Config(size=48, iterations=1, scales=1, init="noise"))
    assert torch.rand(1) == expected


def test_init_from_a_file(stylizer, pictures, tmp_path):
    start = Image.fromarray(np.full((34, 48, 3), (250, 10, 10), np.uint8))
    start.save(tmp_path / "start.png")
    config = Config(size=48, iterations=1, scales=1, init=tmp_path / "start.png")
    result = stylizer(pictures["content"], pictures["style"], config)
    assert np.asarray(result.image).tolist() == np.asarray(start).tolist()  # the first evaluation is of the start


def test_several_styles_share_equally(stylizer, pictures):
    one, other, content = noise(48, 48, 1), noise(48, 48, 2) ** 3, noise(48, 48, 3)
    both = stylizer.evaluate(content, content, [one, other])
    assert both.loss < stylizer.evaluate(content, content, other).loss
    assert stylizer.evaluate(content, content, [one, one]).loss == stylizer.evaluate(content, content, one).loss


def test_alpha_of_the_content_comes_back_at_the_size_of_the_result(stylizer, pictures):
    alpha = np.zeros((40, 56), np.uint8)
    alpha[:, 28:] = 255
    content = Image.fromarray(np.dstack([pictures["content"], alpha]))
    result = stylizer(content, pictures["style"], TINY).image
    assert result.mode == "RGBA"
    assert result.size == (48, 34)
    channel = np.asarray(result.getchannel("A"))
    assert (channel[:, :20] == 0).all()
    assert (channel[:, 28:] == 255).all()


def test_adam_runs_over_the_scales(stylizer, pictures):
    config = Config(size=64, scales=2, iterations=12, optimizer="adam", init="noise")
    losses = [loss for _, loss, _ in stylizer(pictures["content"], pictures["style"], config).trace]
    assert len(losses) == 5 + 12
    assert losses[4] < losses[0]
    assert losses[-1] < losses[5]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pixel_range", ["auto", "0-255"])
def test_a_network_is_used_by_one_thread_at_a_time(device, pixel_range):
    own = Stylizer(weights="embedded", device=device)
    check_alone(own._features((32, 32), ("relu1_1",), Config(pixel_range=pixel_range), own.precision))


def test_what_is_to_be_kept_is_made_once_for_all_threads():
    cache, made = Cache(limit=100), []

    def make():
        made.append(torch.zeros(40, dtype=torch.uint8))
        time.sleep(0.05)
        return made[-1]

    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda _: cache.get("key", make, lambda value: [value]), range(3)))
    assert len(made) == 1
    assert all(each is made[0] for each in found)


def test_two_threads_get_the_same_bytes_as_one_after_the_other(stylizer, pictures):
    contents = [pictures["content"], pictures["content"][::-1].copy()]
    config = Config(size=64, iterations=6, scales=2)
    expected = [stylizer(content, pictures["style"], config).image.tobytes() for content in contents]
    fresh = Stylizer(weights="embedded", device="cpu")
    found: dict[int, bytes] = {}

    def work(index):
        found[index] = fresh(contents[index % 2], pictures["style"], config).image.tobytes()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(4)] == expected * 2


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_two_hundred_calls_do_not_grow_memory(stylizer, pictures):
    config = Config(size=48, iterations=1, scales=1, style_layers=SHALLOW)

    def call(index):
        style = np.roll(pictures["style"], index, axis=0)  # 44 styles in turn
        stylizer(pictures["content"], style, config)

    for index in range(45):
        call(index)
    gc.collect()
    before = resident()
    for index in range(200):
        call(index)
    gc.collect()
    assert resident() - before < 20e6


def test_the_cache_is_limited_by_bytes_and_forgets_the_oldest():
    cache = Cache(limit=100)
    made = []

    def get(key, size):
        def make():
            made.append(key)
            return torch.zeros(size, dtype=torch.uint8)

        cache.get(key, make, lambda tensor: [tensor, tensor[1:]])  # memory that is shared counts once

    for key, size in [("a", 40), ("b", 40), ("a", 40), ("c", 40), ("a", 40), ("b", 40)]:
        get(key, size)
    assert made == ["a", "b", "c", "b"]
    assert (cache.bytes, len(cache)) == (80, 2)
    get("larger than all", 101)
    get("b", 40)
    assert made == ["a", "b", "c", "b", "larger than all"]


def test_networks_and_targets_are_kept_up_to_the_limit(pictures, monkeypatch):
    monkeypatch.setenv("STYLIZE_CACHE_BYTES", str(10**7))
    own = Stylizer(weights="embedded", device="onnxruntime")
    most = 0
    for size, style in itertools.product((48, 52, 56), range(2)):
        own(pictures["content"], noise(40, 40, style), Config(size=size, iterations=1, scales=1))
        assert own._cache.bytes <= own._cache.limit
        most = max(most, len(own._cache))
    assert most >= 2
    monkeypatch.setenv("STYLIZE_CACHE_BYTES", "much")
    with pytest.raises(ValueError, match="STYLIZE_CACHE_BYTES"):
        Stylizer(weights="embedded", device="cpu")


def test_what_is_kept_serves_nothing_that_differs(pictures, monkeypatch):
    own = Stylizer(weights="embedded", device="onnxruntime")
    monkeypatch.setattr(own._cache, "get", lambda key, *_: key)
    usual = {"config": Config(), "precision": "fp16"}
    of_network = {"size": (48, 32), "layers": ("relu1_1",), **usual}
    of_style = {"style": image.load(pictures["style"]), "side": 48, "mask": None, **usual}
    shared = [{}, {"precision": "fp32"}]
    shared += [
        {"config": Config(**each)} for each in ({"pooling": "max"}, {"pixel_range": "0-255"}, {"padding": "zero"})
    ]
    networks = [*shared, {"size": (32, 48)}, {"layers": ("relu1_2",)}, {"config": Config(tile=True)}]
    assert len({own._features(**(of_network | each)) for each in networks}) == len(networks)
    mask, other = np.ones((44, 36), np.float32), image.load(pictures["style"][::-1])
    styles = [*shared, {"style": other}, {"side": 49}, {"mask": mask}, {"mask": mask / 2}]
    options = {"style_loss": "shifted"}, {"style_scale": 2}, {"style_layers": ("relu1_1",)}
    styles += [{"config": Config(**each)} for each in options]
    assert len({own._statistics(**(of_style | each)) for each in styles}) == len(styles)
    same = {"config": Config(seed=1, tile=True, content_layers=("relu3_1",))}
    assert own._statistics(**(of_style | same)) == own._statistics(**of_style)


def test_a_network_that_is_not_kept_is_gone_at_the_end_of_its_scale(pictures, monkeypatch):
    once = Stylizer(weights="embedded", device="onnxruntime", keep_networks=False)
    opened, open_one = weakref.WeakSet(), once._open_features

    def noted(*given, **more):
        opened.add(network := open_one(*given, **more))
        return network

    monkeypatch.setattr(once, "_open_features", noted)
    config = Config(size=96, iterations=(2, 2), scales=2)
    assert [len(opened) for _ in once.steps(pictures["content"], noise(40, 40, 0), config)] == [1] * 4
    assert len(once._cache) == 2  # statistics of the style


def test_weights_that_change_under_a_stylizer_are_refused(pictures, states, tmp_path):
    """What it keeps of styles was made by those that it loaded first."""
    from safetensors.torch import save_file

    file, state = tmp_path / "own.safetensors", states["torchvision"][1]
    save_file(state, file)
    own = Stylizer(weights=file, device="cpu")
    own(pictures["content"], pictures["style"], TINY)
    save_file(state | {"features.5.bias": 2 * state["features.5.bias"]}, file)
    for _ in range(2):
        with pytest.raises(ValueError, match="have changed since they were loaded"):
            own(pictures["content"], pictures["style"], replace(TINY, pooling="max"))
    file.unlink()
    with pytest.raises(FileNotFoundError):
        own(pictures["content"], pictures["style"], replace(TINY, pooling="max"))
    own(pictures["content"], pictures["style"], TINY)  # goes on with what is open


def test_weights_that_are_downloaded_meanwhile_wait_for_the_next_stylizer(pictures, own_cache, monkeypatch):
    from engine import networks as module

    asked, load = [], module.load_weights
    monkeypatch.setattr(module, "load_weights", lambda source, layers: (asked.append(source), load(source, layers))[1])
    own = Stylizer(weights="auto", device="cpu")
    own(pictures["content"], pictures["style"], replace(TINY, pooling="max"))
    assert asked == ["auto", "embedded"]


def test_options_have_to_be_a_config(stylizer, pictures):
    with pytest.raises(TypeError, match=r"config has to be a Config, not \{'size': 128\}"):
        stylizer(pictures["content"], pictures["style"], {"size": 128})


def test_a_thread_of_a_style_is_refused(stylizer, pictures):
    thread = np.zeros((1, 600, 3), np.uint8)
    with pytest.raises(ValueError, match="a style of 600 x 1 pixels would have to be 19200 long: crop it"):
        stylizer(pictures["content"], thread, TINY)


def test_a_style_is_looked_at_once(pictures, monkeypatch):
    from engine import stylizer as module

    calls = []
    own = Stylizer(weights="embedded", device="cpu")
    resize = module.images.resize
    monkeypatch.setattr(module.images, "resize", lambda *a: (calls.append(a[0].size), resize(*a))[1])
    for content in (pictures["content"], pictures["content"][::-1].copy()):
        own(content, pictures["style"], TINY)
    assert calls.count((36, 44)) == 1  # the style
    assert calls.count((56, 40)) >= 2  # both contents


def test_a_network_that_overflows_stops_the_run(tmp_path, pictures):
    from safetensors.torch import save_file

    state = {key: value * (1e6 if value.ndim == 4 else 1) for key, value in oracle.random_state().items()}
    save_file(state, tmp_path / "loud.safetensors")
    with pytest.raises(FloatingPointError, match="not finite, after iteration 0"):
        Stylizer(weights=tmp_path / "loud.safetensors", device="cpu")(pictures["content"], pictures["style"], TINY)


@pytest.mark.parametrize("weight", [1e-20, 1e20])
def test_extreme_weights_only_scale_the_loss(stylizer, pictures, weight):
    """L-BFGS does not depend on the scale of the loss as long as fp32 holds it."""
    one = stylizer(pictures["content"], pictures["style"], Config(size=48, iterations=8, scales=1))
    config = Config(size=48, iterations=8, scales=1, content_weight=weight, style_weight=Config().style_weight * weight)
    other = stylizer(pictures["content"], pictures["style"], config)
    assert other.trace[-1][1] / weight == pytest.approx(one.trace[-1][1], rel=0.05)


def test_threads_have_to_be_positive():
    with pytest.raises(ValueError, match="from 1"):
        Stylizer(threads=0)
    assert Stylizer(weights="embedded", device="cpu", threads=1)(noise(40, 40, 0), noise(40, 40, 1), TINY).image


@pytest.mark.gpu
@pytest.mark.parametrize("device", provider.GPUS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gpu_agrees_with_float64(states, device, precision):
    try:
        provider.check(device)
    except BackendError as missing:
        pytest.skip(str(missing))
    path, state = states["torchvision"]
    picture, content, style = (noise(97, 131, seed) for seed in (1, 2, 3))
    config = Config(**ALL_TERMS)
    score = Stylizer(weights=path, device=device, precision=precision).evaluate(picture, content, style, config)
    total, _, gradient = oracle.objective(picture, content, style, state, config)
    assert score.loss == pytest.approx(total, rel=1e-4 if precision == "fp32" else 1e-2)
    assert error(score.gradient, gradient) < (1e-4 if precision == "fp32" else 3e-2)
