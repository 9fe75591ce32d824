"""Pictures that a network sees through windows: as if it had seen all of them, in less memory."""

import json
import logging
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engine import Config, Stylizer, forecast, kernels, stylize, windows, winograd
from engine import image as images
from engine.cache import Cache
from engine.export import vgg, weights
from engine.features import features_of
from engine.features import network as open_network
from engine.goal import load as load_goal
from engine.losses import Objective, Region
from engine.regions import statistics_of
from engine.video import Video

LAYERS = ("relu1_1", "relu2_1", "relu2_2", "relu3_1")  # which reach 22 pixels, of which 32 are whole places
SHALLOW = {"content_layers": ("relu2_2",), "style_layers": ("relu1_1", "relu2_1", "relu3_1"), "style_size": 150}
SIZE = (149, 203)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Windows may be smaller than it makes sense, for pictures that are."""
    for module in ("config", "windows"):
        monkeypatch.setattr(f"engine.{module}.MIN_WINDOW", 64)


def noise(height, width, seed):
    return np.random.default_rng(seed).random((height, width, 3)).astype(np.float32)


def error(value, truth):
    return float(np.linalg.norm(value - truth) / np.linalg.norm(truth))


@settings(deadline=None, max_examples=300)
@given(st.integers(32, 5000), st.integers(20, 80), st.sampled_from([16, 32, 48, 80, 128]), st.booleans())
def test_windows_own_all_and_see_what_is_around(side, most, reach, wrap):
    most = 16 * max(most, 2 * reach // 16 + 4)
    side = side // 16 * 16 + 16 if wrap else side
    found = windows.Spans.of(side, most, reach, wrap=wrap)
    assert found.length <= (side if side <= most else most + side % 16)
    firsts, lasts = ([getattr(span, name) for span in found.each] for name in ("first", "last"))
    assert [0, *lasts] == [*firsts, side]  # one after the other
    assert all(first < last for first, last in zip(firsts, lasts, strict=True))
    if len(found.each) == 1:
        assert found.each[0].begin == 0
        assert found.length == side
        return
    assert side > most
    for span in found.each:
        end = span.begin + found.length
        assert span.begin % 16 == span.first % 16 == 0
        assert span.last % 16 == 0 or span.last == side
        if not wrap:
            assert span.begin >= 0
            assert end <= side
        # Poolings drop the rest that is no multiple of 16, but for the window that has the picture's own end.
        whole = end if end == side else span.begin + found.length // 16 * 16
        assert span.first - span.begin >= reach or (span.begin == 0 and not wrap)
        assert whole - span.last >= reach or (end == side and not wrap)


@pytest.mark.parametrize(
    ("layer", "pixels"), [("relu1_1", 1), ("relu2_1", 4), ("relu4_2", 38), ("relu5_1", 70), ("relu5_4", 118)]
)
def test_how_far_layers_reach(layer, pixels):
    """The gradient of one place of a layer, over the places that it is made of, says so."""
    convs = vgg.cut([layer])
    assert windows.reach(convs) == -(-pixels // 16) * 16
    step = 2 ** (convs[-1].block - 1)
    line = torch.ones(1, 1, 512, dtype=torch.float64, requires_grad=True)
    x = line
    for conv in convs:
        x = torch.nn.functional.avg_pool1d(x, 2) if conv.after_pool else x
        x = torch.nn.functional.conv1d(x, torch.ones(1, 1, 3, dtype=torch.float64), padding=1)
    place = 256 // step
    x[0, 0, place].backward()
    touched = line.grad[0, 0].nonzero().flatten().tolist()
    assert (touched[0], touched[-1]) == (place * step - pixels, (place + 1) * step - 1 + pixels)


KINDS = {
    "gram": {},
    "wasserstein": {"style_loss": "wasserstein"},
    "shifted": {"style_loss": "shifted"},
    "max": {"pooling": "max"},
    "sum": {"content_loss": "sum", "content_weight": 1e-3},
    "reflect": {"padding": "reflect", "pixel_range": "0-255", "content_weight": 1e-6, "style_weight": 1e-9},
    "convolutions": {"content_layers": ("conv3_2", "relu2_2"), "style_layers": ("conv1_1", "relu1_1")},
    "both at one layer": {"content_layers": ("relu3_1",), "style_layers": ("relu3_1:2", "relu1_1")},
    "tv": {"tv_weight": 3.0, "tv_form": "nine-point"},
}


@pytest.fixture(scope="module")
def large():
    return noise(*SIZE, 0), noise(*SIZE, 1), noise(150, 110, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradient_are_those_of_the_whole(exact, large, kind):
    compare(exact, *large, Config(**{**SHALLOW, **KINDS[kind]}))


def test_losses_and_gradient_in_bf16(large):
    """A window's tiles begin elsewhere in the deep layers: what is rounded there is not what it is of the whole."""
    picture, content, style = large
    stylizer, config = Stylizer("embedded", "cpu", "bf16"), Config(**SHALLOW)
    whole, found = (stylizer.evaluate(picture, content, style, each) for each in (config, replace(config, window=96)))
    assert found.loss == pytest.approx(whole.loss, rel=1e-3)
    assert error(found.gradient, whole.gradient) < 2e-2


def test_all_layers(exact):
    config = Config(content_layers=("conv5_4",), style_layers=("relu1_1", "relu4_1", "relu5_4"), style_size=64)
    compare(exact, noise(319, 350, 0), noise(319, 350, 1), noise(64, 64, 2), config, window=304)


def compare(stylizer, picture, content, style, config, masks=None, window=96, limit=1e-5):
    whole = stylizer.evaluate(picture, content, style, config, masks=masks)
    found = stylizer.evaluate(picture, content, style, replace(config, window=window), masks=masks)
    assert found.loss == pytest.approx(whole.loss, rel=limit)
    assert found.content_loss == pytest.approx(whole.content_loss, rel=limit)
    assert found.style_loss == pytest.approx(whole.style_loss, rel=10 * limit)
    assert found.tv_loss == whole.tv_loss
    assert error(found.gradient, whole.gradient) < limit
    assert float(np.abs(found.gradient - whole.gradient).max()) < 5 * limit * float(np.abs(whole.gradient).max())


@pytest.mark.parametrize("kind", ["gram", "wasserstein", "shifted"])
def test_masks_and_several_styles(exact, large, kind):
    picture, content, style = large
    mask = np.zeros(SIZE, np.float32)  # the last windows see nothing of it
    mask[:, :60] = 1
    mask[:100, 60:90] = np.linspace(1, 0, 30)
    masks = [(mask, None), (1 - mask, np.pad(np.ones((40, 110), np.float32), ((0, 110), (0, 0))))]
    compare(exact, picture, content, [noise(120, 130, 5), style], Config(style_loss=kind, **SHALLOW), masks)


@pytest.mark.parametrize("window", [96, 160])  # the latter has the whole height
def test_a_picture_that_wraps_around(exact, window):
    picture, content = noise(144, 208, 0), noise(144, 208, 1)
    compare(exact, picture, content, noise(130, 130, 2), Config(tile=True, **SHALLOW), window=window)


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), ("fp16", 2e-3)])
def test_onnx_runtime(stylizers, large, precision, limit):
    compare(stylizers("torchvision", "onnxruntime", precision), *large, Config(**SHALLOW), limit=limit)


def test_against_float64(stylizers, states, large):
    stylizer, config = stylizers("torchvision"), Config(**{**SHALLOW, "style_size": "auto"})
    pictures = [noise(144, 208, seed) for seed in range(3)]
    whole, score = (stylizer.evaluate(*pictures, each) for each in (config, replace(config, window=96)))
    total, terms, gradient = oracle.objective(*pictures, states["torchvision"][1], config)
    assert score.loss == pytest.approx(total, rel=1e-5)
    assert score.content_loss == pytest.approx(terms["content"], rel=1e-5)
    assert error(score.gradient, gradient) < min(1e-3, 2 * error(whole.gradient, gradient))


@pytest.mark.parametrize("kind", ["gram", "shifted", "wasserstein"])
@pytest.mark.parametrize("masked", [False, True])
def test_statistics_of_a_style_in_windows(stylizer, kind, masked):
    style, mask = noise(203, 149, 3), np.zeros((203, 149), np.float32)
    mask[-40:, 30:] = 1
    config = Config(**{**SHALLOW, "style_size": 203}, size=203, scales=1, style_loss=kind)
    whole, found = (
        stylizer.targets(style, each, mask=mask if masked else None) for each in (config, replace(config, window=96))
    )
    for layer, truth in whole.sides[203].items():
        own = found.sides[203][layer]
        assert error(own.matrix.numpy(), truth.matrix.numpy()) < 1e-5
        assert error(own.mean.numpy(), truth.mean.numpy()) < 1e-6


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_a_run_is_that_of_the_whole(exact, large, optimizer):
    _, content, style = large
    config = Config(size=200, scales=1, iterations=6, optimizer=optimizer, **SHALLOW)
    whole, found = (exact(content, style, each) for each in (config, replace(config, window=96)))
    assert found.trace[-1][1] == pytest.approx(whole.trace[-1][1], rel=1e-3)
    away = np.asarray(found.image, np.float64) - np.asarray(whole.image, np.float64)
    assert np.abs(away).mean() < 0.05
    assert found.manifest["options"]["window"] == 96


def test_a_run_goes_on_through_another_window(stylizer, large):
    _, content, style = large
    config = Config(size=200, scales=1, iterations=5, **SHALLOW)
    *_, fourth, last = stylizer.steps(content, style, config)
    steps = stylizer.steps(content, style, config)
    saved = next(step.checkpoint() for step in steps if step.iteration == fourth.iteration)
    (resumed,) = stylizer.steps(content, style, replace(config, window=128), resume=saved)
    assert resumed.loss == pytest.approx(last.loss, rel=1e-4)


@pytest.fixture(scope="module")
def net():
    return weights.load("embedded", LAYERS)


def objective(network, pictures, config, masks=(None,)):
    """That of a content and a style, both as large as the image."""
    content, style = pictures
    seen = images.Picture(style[0].permute(1, 2, 0).numpy())
    found = statistics_of(network, seen, tuple(config.style_layer_weights), config.style_loss, None)
    targets = features_of(network, content, config.content_layer_weights)
    return Objective(network, targets, [Region(found, 1 / len(masks), mask) for mask in masks], config)


@pytest.mark.parametrize(
    ("kind", "precision", "limits"),
    [
        ("gram", "fp32", (1e-5, 2e-4)),
        ("gram", "fp16", (2e-3, 3e-2)),
        ("wasserstein", "fp16", (2e-3, 3e-2)),
        ("wasserstein", "bf16", (2e-2, 0.15)),
    ],
)
def test_on_a_gpu(on_cpu, net, kind, precision, limits):
    """cuDNN's network and cuBLAS, played by this CPU: the scale of 16-bit gradients is one for all windows."""
    layers = ("relu1_1", "relu2_1", "relu2_2")
    config = Config(style_loss=kind, content_layers=layers[2:], style_layers=layers[:2])
    config = replace(config, style_weight=300.0 if kind == "gram" else 3.0)
    pixels, *pictures = torch.rand(3, 1, 3, 82, 99, generator=torch.Generator().manual_seed(5))
    pixels[..., 8:] = 0.5
    pictures[1] = pictures[1] ** 3
    plane = np.zeros((82, 99), np.float32)
    plane[:, :40] = 1
    masks = (plane, 1 - plane) if precision == "bf16" else (None,)
    with pytest.MonkeyPatch.context() as patch:  # not for the truth
        patch.setattr(torch.Tensor, "is_cuda", property(lambda self: False))
        exact = open_network(net, layers, "cpu", "fp32", 1)(vgg.Spec(82, 99, layers))
        wanted, slope = objective(exact, pictures, config, masks).evaluate(pixels)
    spec = vgg.Spec(82, 99, layers, precision=precision, nhwc=precision != "fp32")
    own = windows.Windowed(spec, 64, open_network(net, layers, "cudnn", "fp32", 1))
    assert len(own.parts) == 4
    seen = objective(own, pictures, config, masks)
    assert seen.recorded is None
    assert seen._chained == {}
    for other in (pixels.flip(3), pixels):  # what is left of one evaluation is of no use to the next
        found, gradient = seen.evaluate(other)
    assert float(found.total) == pytest.approx(float(wanted.total), rel=limits[0])
    assert error(gradient.numpy(), slope.numpy()) < limits[1]


def test_memory_of_windows_on_a_gpu(on_cpu, net):
    spec = vgg.Spec(300, 400, LAYERS, precision="fp16", nhwc=True)
    own = windows.Windowed(spec, 192, open_network(net, LAYERS, "cudnn", "fp32", 1))
    taken = sum(each.nbytes for each in own.memory if each.dtype != torch.uint8)  # but for the workspace
    config = Config(window=192, content_layers=("relu2_2",), style_layers=LAYERS)
    assert forecast._network(forecast.Setup("cudnn", "fp16", 2, None), spec, config, ()) == taken


@pytest.mark.parametrize("size", [96, 110, 111])
def test_no_window_is_as_large_as_the_picture(size):
    assert Config(window=96).window_for((size, 64)) is None
    assert Config(window=110).window_for((112, 64)) == 96


def test_memory_is_that_of_a_window(net):
    spec = vgg.Spec(512, 720, LAYERS)
    network = winograd.Network(net, LAYERS, 2)

    def opened(spec, forward_only=False):
        return winograd.Features(spec, network, forward_only=forward_only)

    whole, found = opened(spec), windows.Windowed(spec, 192, opened)
    taken, of_pictures = (sum(each.nbytes for each in one) for one in (found.memory, (found.image, found.gradient)))
    assert taken - of_pictures < sum(each.nbytes for each in whole.memory) / 4
    config = Config(window=192, content_layers=("relu2_2",), style_layers=LAYERS)
    setup = forecast.Setup("cpu", "fp32", 2, None)
    assert forecast._network(setup, spec, config, ()) == taken
    assert windows.spec_of(spec, 192).height <= 192 + 15


@pytest.fixture
def little(monkeypatch):
    """As much memory as is said, by a function."""

    def have(count):
        monkeypatch.setattr(forecast, "available", lambda device: count)

    return have


def test_a_window_is_chosen_where_memory_is_short(stylizer, little, caplog):
    content, style = np.zeros((600, 900, 3), np.uint8), np.zeros((300, 300, 3), np.uint8)
    config = Config(size=900, optimizer="adam", iterations=1, **SHALLOW)
    caplog.set_level(logging.INFO)
    little(None)
    whole = stylizer.forecast(content, style, config)
    previous = whole.total
    for share in (1.2, 0.8, 0.5):
        caplog.clear()
        little(int(share * whole.total))
        found = stylizer.forecast(content, style, config)
        told = [each.message for each in caplog.records]
        if share > 1:
            assert (found, told) == (whole, [])
            continue
        assert found.total <= 0.9 * share * whole.total < previous
        (line,) = told
        assert line.startswith(f"this would take about {forecast.short(whole.total)} of memory, more than ")
        assert f"it takes {forecast.short(found.total)}, an evaluation some " in line
        window = int(line.split("--window ")[1].split()[0])
        little(None)
        assert stylizer.forecast(content, style, replace(config, window=window)) == found
        # It is the largest that goes.
        larger = min((each for each in windows.choices(900, config.layers, wrap=False) if each > window), default=900)
        assert stylizer.forecast(content, style, replace(config, window=larger)).total > 0.9 * share * whole.total
        previous = found.total


def test_what_is_chosen_is_what_is_painted(stylizer, little, caplog):
    content, style = noise(150, 200, 0), noise(64, 64, 1)
    config = Config(size=200, scales=1, optimizer="adam", iterations=1, **SHALLOW)
    little(None)
    largest, *_, least = windows.choices(200, config.layers, wrap=False)
    for chosen, share in ((largest, 0.9), (least, 1)):  # the least that is to stay free is the last thing to be taken
        little(None)
        needed = stylizer.forecast(content, style, replace(config, window=chosen)).total
        little(int(needed / share) + 2)
        (step,) = stylizer.steps(content, style, config)
        assert step.manifest([], 0.0)["options"]["window"] == chosen
        assert stylizer.fitted(content, style, config) == replace(config, window=chosen)
    little(2**20)
    for window in ("auto", 192):  # one that is asked for stays, and none helps where there is nothing
        caplog.clear()
        (step,) = stylizer.steps(content, style, replace(config, window=window))
        assert step.manifest([], 0.0)["options"]["window"] == window
        (line,) = [each.message for each in caplog.records]
        assert "and 1 MiB are free" in line
        assert ("free, where --window 64 would take " in line) == (window == "auto")
        assert ": less is needed with a smaller --size" in line


def test_pairs_are_given_up_where_windows_do_not_help_or_cost_more(stylizer, little, caplog):
    content, style = np.zeros((300, 400, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)
    config = Config(size=400, scales=1, iterations=60, **SHALLOW)
    caplog.set_level(logging.INFO)
    little(None)

    def needed(**changes):
        return stylizer.forecast(content, style, replace(config, **changes)).total

    spec = vgg.Spec(300, 400, config.layers)
    combinations = [
        (slower * windows.cost(spec, window), needed(window=window or "auto", history=history), window, history)
        for history, slower in (("auto", 1), (20, 1.2), (10, 1.5), (5, 2.0))
        for window in (None, *windows.choices(400, config.layers, wrap=False))
    ]
    several = set()
    for left in np.linspace(0.95 * needed(), min(total for _, total, *_ in combinations) + 1, 8).astype(int).tolist():
        little(left)
        caplog.clear()
        found = stylizer.fitted(content, style, config)
        fitting = [each for each in combinations if each[1] <= 0.9 * left] or [
            each for each in combinations if each[1] <= left
        ]
        _, _, window, history = min(fitting)
        assert (found.window, found.history) == (window or "auto", history)
        (line,) = [each.message for each in caplog.records]
        assert (f"--history {history}" in line) == ("times the iterations" in line) == (history != "auto")
        assert (f"--window {window}" in line) == ("times as long" in line) == (window is not None)
        several.add((window is None, history))
        kept = stylizer.fitted(content, style, replace(config, history=50, window=400))
        assert (kept.history, kept.window, caplog.records[-1].levelname) == (50, 400, "WARNING")
        assert "a smaller --window, a --history of few pairs or --optimizer adam" in caplog.records[-1].message
    assert len(several) > 3


def test_nothing_is_said_where_all_fits_and_no_less_is_possible(stylizer, little, caplog):
    content, style = np.zeros((300, 400, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)
    config = Config(size=400, scales=1, optimizer="adam", window=96, **SHALLOW)
    little(None)
    caplog.set_level(logging.INFO)
    little(int(stylizer.forecast(content, style, config).total / 0.95))
    assert stylizer.fitted(content, style, config) == config
    assert not caplog.records


def test_what_windows_cost():
    """What is seen beside the picture, and the forward pass of all windows but one again."""
    spec = vgg.Spec(1362, 2048, Config().for_weights("embedded").layers)
    for window, measured in ((1104, 1.63), (800, 1.81), (512, 2.86)):  # of `benchmarks.windows`, commit 97dd278
        assert windows.cost(spec, window) == pytest.approx(measured, rel=0.06)
    assert windows.cost(spec, None) == 1


def test_a_resumed_run_sees_and_remembers_as_before(stylizer, little):
    content, style = noise(150, 200, 0), noise(64, 64, 1)
    config = Config(size=200, scales=1, iterations=5, **SHALLOW)
    little(None)
    before = replace(config, window=96, history=5)
    *_, last = stylizer.steps(content, style, before)
    saved = next(step.checkpoint() for step in stylizer.steps(content, style, before) if step.iteration == 3)
    *_, resumed = stylizer.steps(content, style, config, resume=saved)
    assert resumed.loss == last.loss
    assert torch.equal(resumed.pixels, last.pixels)
    assert resumed.manifest([], 0.0)["options"] == last.manifest([], 0.0)["options"]
    saved = next(step.checkpoint() for step in stylizer.steps(content, style, config) if step.iteration == 3)
    needed = stylizer.forecast(content, style, config).total
    little(int((needed - len(saved) / 2) / 0.9))  # with what the checkpoint takes there is room for all
    *_, resumed = stylizer.steps(content, style, config, resume=saved)
    assert resumed.manifest([], 0.0)["options"]["window"] == "auto"
    little(2**20)  # no pairs are given up now
    *_, resumed = stylizer.steps(content, style, config, resume=saved)
    assert resumed.manifest([], 0.0)["options"]["history"] == "auto"
    with pytest.raises(ValueError, match="another history"):
        stylizer.steps(content, style, replace(config, history=4), resume=saved)


def test_what_is_kept_makes_room(stylizer, little, monkeypatch):
    content, style = np.zeros((150, 200, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)
    config = Config(size=200, scales=1, iterations=2, **SHALLOW)
    cache = Cache(2**30)
    for name, value in {"device": "cudnn", "precision": "fp16", "keeps_networks": True, "_cache": cache}.items():
        monkeypatch.setattr(stylizer, name, value)
    monkeypatch.setattr(kernels, "processors", lambda device: 132)
    cache.get("another", lambda: torch.zeros(2**18), lambda tensor: [tensor])
    little(2**40)
    needed = stylizer.forecast(content, style, config).total
    kept = 2 * needed
    cache.get("a large one", lambda: torch.zeros(kept // 4), lambda tensor: [tensor])
    little(needed // 2)
    assert stylizer.fitted(content, style, config).window == "auto"  # what is kept counts as free
    assert len(cache) == 2
    goal = load_goal(content, style, config, None, None)
    assert forecast.begin(stylizer._setup, goal, None) == goal
    assert len(cache) == 0


def test_a_batch_knows_its_pictures_whatever_was_chosen(tmp_path, little, caplog):
    caplog.set_level(logging.INFO)
    for seed, name in enumerate(("content", "style")):
        Image.fromarray((255 * noise(150, 200, seed)).astype(np.uint8)).save(tmp_path / f"{name}.png")
    own = ["--weights", "embedded", "--device", "cpu", "--size", "200", "--optimizer", "adam", "--style-size", "64"]
    own += ["--iterations", "1", "--scales", "1", "--content-layers", "relu2_2", "--style-layers", "relu1_1,relu3_1"]
    given = ["--contents", str(tmp_path / "content.png"), "--styles", str(tmp_path / "style.png"), *own]
    run = [*given, "-o", str(tmp_path / "made")]
    little(2 * 10**7)
    assert stylize.main(run) == 0
    (made,) = (tmp_path / "made").glob("*.png")
    with Image.open(made) as picture:
        assert json.loads(picture.text["gatys-engine"])["options"]["window"] != "auto"
    caplog.clear()
    assert stylize.main(run) == 0
    assert "1 of 1 pictures are there already" in caplog.text
    assert "other options" not in caplog.text
    assert stylize.main([*run, "--seed", "1", "--init-noise", "0.1"]) == 0
    assert "1 of these were made with other options" in caplog.text


def test_a_video_is_fitted_once(stylizer, little, monkeypatch):
    config = Config(size=200, scales=1, iterations=1, **SHALLOW)
    film, seen, steps = Video(stylizer, noise(64, 64, 1), config, iterations=1), [], Stylizer.steps

    def watched(self, content, style, config, **named):
        seen.append(config)
        return steps(self, content, style, config, **named)

    monkeypatch.setattr(Stylizer, "steps", watched)
    little(None)
    needed = stylizer.forecast(noise(150, 200, 0), noise(64, 64, 1), replace(config, window=96)).total
    for left in (int(needed / 0.9) + 2, None):
        little(left)
        film(noise(150, 200, 0))
    little(2**20)  # what was chosen stays
    film(noise(150, 200, 0))
    assert len({each.window for each in seen}) == 1
    assert seen[0].window != "auto"
    assert [each.history for each in seen] == ["auto"] * 3


def test_the_command_line(tmp_path, little, capsys):
    paths = [str(tmp_path / f"{name}.png") for name in ("content", "style", "out")]
    for seed, path in enumerate(paths[:2]):
        Image.fromarray((255 * noise(150, 200, seed)).astype(np.uint8)).save(path)
    own = ["--weights", "embedded", "--device", "cpu", "--size", "200", "--optimizer", "adam", "--style-size", "64"]
    own += ["--content-layers", "relu2_2", "--style-layers", "relu1_1,relu3_1"]
    little(None)
    told = []
    for window in ("96", "auto"):
        assert stylize.main([*paths[:2], *own, "--forecast", "--window", window]) == 0
        told.append(capsys.readouterr().out)
    assert len(set(told)) == 2
    assert stylize.main([*paths[:2], *own, "--window", "20", "--forecast"]) == 2
    assert "window 20: give a number from 64" in capsys.readouterr().err
    run = [*paths[:2], "-o", paths[2], *own, "--iterations", "1", "--scales", "1", "--window", "96", "--quiet"]
    assert stylize.main(run) == 0
    with Image.open(paths[2]) as picture:
        assert picture.size == (200, 150)
        assert json.loads(picture.text["gatys-engine"])["options"]["window"] == 96
