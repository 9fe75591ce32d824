"""Each preset against the formula of the program that it is named after, written down from that program: float64."""

import dataclasses

import numpy as np
import oracle
import pytest
import torch
from torch.nn import functional

from engine import Config, Stylizer, preset, stylize
from engine.export import validate
from engine.presets import PRESETS

BLOCKS = ["relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1"]


def gram(features, by):
    return torch.einsum("im,jm->ij", features, features) / by


def gatys2016(x, content, style, see):
    """Equations 1, 4, 5 and 7 of the paper, with its Gram matrices that are not divided by anything."""
    f, p, a = (see(picture, "avg", {"relu4_2", *BLOCKS}) for picture in (x, content, style))
    total = 0
    for layer in BLOCKS:
        n, m = f[layer].shape
        total = total + ((gram(f[layer], 1) - gram(a[layer], 1)) ** 2).sum() / (4 * n**2 * m**2) / 5
    return {"content": 1e-3 * ((f["relu4_2"] - p["relu4_2"]) ** 2).sum() / 2, "style": total}


def neural_style(x, content, style, see):
    """Criteria are means; Gram matrices are divided by the number of elements; the network sees 256 x - mean."""
    f, p, a = (see(picture * 256 / 255, "max", {"relu4_2", *BLOCKS}) for picture in (x, content, style))
    total = 0
    for layer in BLOCKS:
        own, wanted = (gram(each[layer], each[layer].numel()) for each in (f, a))
        total = total + 100 * functional.mse_loss(own, wanted)
    seen = 256 * x
    across, down = seen[:-1, 1:] - seen[:-1, :-1], seen[1:, :-1] - seen[:-1, :-1]
    return {
        "content": 5 * functional.mse_loss(f["relu4_2"], p["relu4_2"]),
        "style": total,
        "tv": 1e-3 * ((across**2).sum() + (down**2).sum()) / 2,
    }


def gatys_pytorch(x, content, style, see):
    """Criteria are means; Gram matrices are divided by the number of positions; weights 1e3 / n^2 by layer."""
    f, p, a = (see(picture, "max", {"relu4_2", *BLOCKS}) for picture in (x, content, style))
    total = 0
    for layer, n in zip(BLOCKS, (64, 128, 256, 512, 512), strict=True):
        own, wanted = (gram(each[layer], each[layer].shape[1]) for each in (f, a))
        total = total + 1e3 / n**2 * functional.mse_loss(own, wanted)
    return {"content": functional.mse_loss(f["relu4_2"], p["relu4_2"]), "style": total}


def neural_style_pt(x, content, style, see):
    """As neural-style, with pixels in 0-255 and the sum of absolute differences."""
    f, p, a = (see(picture, "max", {"relu4_2", *BLOCKS}) for picture in (x, content, style))
    total = 0
    for layer in BLOCKS:
        own, wanted = (gram(each[layer], each[layer].numel()) for each in (f, a))
        total = total + 100 * functional.mse_loss(own, wanted)
    fed = 255 * x
    across, down = (fed[:, 1:] - fed[:, :-1]).abs().sum(), (fed[1:] - fed[:-1]).abs().sum()
    return {
        "content": 5 * functional.mse_loss(f["relu4_2"], p["relu4_2"]),
        "style": total,
        "tv": 1e-3 * (across + down),
    }


def pytorch_tutorial(x, content, style, see):
    """Losses stand behind convolutions: conv_4, the fourth, for content, the first five for style."""
    layers = ["conv1_1", "conv1_2", "conv2_1", "conv2_2", "conv3_1"]
    f, p, a = (see(picture, "max", set(layers)) for picture in (x, content, style))
    total = 0
    for layer in layers:
        own, wanted = (gram(each[layer], each[layer].numel()) for each in (f, a))
        total = total + 1e6 * functional.mse_loss(own, wanted)
    return {"content": functional.mse_loss(f["conv2_2"], p["conv2_2"]), "style": total}


def gordicaleksa(x, content, style, see):
    """The network that wants (x - mean) / std gets 255 x - 255 mean."""
    mean, std = (torch.tensor(each, dtype=torch.float64) for each in oracle.IMAGENET)
    fed = [(255 * picture - 255 * mean) * std + mean for picture in (x, content, style)]
    f, p, a = (see(picture, "max", {"relu4_2", *BLOCKS}) for picture in fed)
    total = 0
    for layer in BLOCKS:
        own, wanted = (gram(each[layer], each[layer].numel()) for each in (f, a))
        total = total + 3e4 * functional.mse_loss(own, wanted, reduction="sum") / 5
    fed = 255 * x
    return {
        "content": 1e5 * functional.mse_loss(p["relu4_2"], f["relu4_2"]),
        "style": total,
        "tv": (fed[:, 1:] - fed[:, :-1]).abs().sum() + (fed[1:] - fed[:-1]).abs().sum(),
    }


def crowsonkb(x, content, style, see):
    """Wasserstein-2 distance of normal distributions; nine-point total variation of a picture framed by its border."""
    f, p, a = (see(picture, "max", {"relu4_2", *BLOCKS}, "replicate") for picture in (x, content, style))
    total = 0
    for layer, weight in zip(BLOCKS, (256, 64, 16, 4, 1), strict=True):
        means = [each[layer].mean(1) for each in (f, a)]
        own, wanted = (
            gram(each[layer] - mean[:, None], each[layer].shape[1]) + 1e-4 * torch.eye(len(mean), dtype=mean.dtype)
            for each, mean in zip((f, a), means, strict=True)
        )
        values, vectors = torch.linalg.eigh(wanted)
        root = vectors * values.sqrt() @ vectors.T
        cross = torch.linalg.eigvalsh(root @ own @ root).sqrt().sum()
        distance = functional.mse_loss(*means) + (own.trace() + wanted.trace() - 2 * cross) / len(values)
        total = total + weight / 341 * distance
    framed = functional.pad(x.permute(2, 0, 1)[None], (1, 1, 1, 1), "replicate")[0]
    here, right, below = framed[:, 1:-1, 1:-1], framed[:, 1:-1, 2:], framed[:, 2:, 1:-1]
    falling, rising = framed[:, 1:, 1:] - framed[:, :-1, :-1], framed[:, 1:, :-1] - framed[:, :-1, 1:]
    straight, oblique = (
        ((right - here) ** 2).mean() + ((below - here) ** 2).mean(),
        (falling**2).mean() + (rising**2).mean(),
    )
    return {
        "content": 0.015 * functional.mse_loss(f["relu4_2"], p["relu4_2"]),
        "style": total,
        "tv": 2 * 2 * (straight / 3 + oblique / 12),
    }


def pystiche(x, content, style, see):
    """Content MSE; Gram matrices divided by the number of positions, their MSE averaged over the layers, times 1e3."""
    f, p, a = (see(picture, "max", {"relu4_2", *BLOCKS}) for picture in (x, content, style))
    total = 0
    for layer in BLOCKS:
        own, wanted = (gram(each[layer], each[layer].shape[1]) for each in (f, a))
        total = total + 1e3 / 5 * functional.mse_loss(own, wanted)
    return {"content": functional.mse_loss(f["relu4_2"], p["relu4_2"]), "style": total}


# Formula, and the naming of the weights that the program takes.
FORMULAS = {
    "gatys2016": (gatys2016, "caffe"),
    "gatys-pytorch": (gatys_pytorch, "caffe"),
    "neural-style": (neural_style, "caffe"),
    "neural-style-pt": (neural_style_pt, "caffe"),
    "pytorch-tutorial": (pytorch_tutorial, "torchvision"),
    "gordicaleksa": (gordicaleksa, "torchvision"),
    "crowsonkb": (crowsonkb, "torchvision"),
    "pystiche": (pystiche, "torchvision"),
}


# Start, optimiser, clamp, scales, iterations: of README's table, and of the programs.
SCHEDULES = {
    "gatys2016": ("noise", "lbfgs", False, 1, 500),
    "gatys-pytorch": ("content", "lbfgs", False, 2, (500, 200, "...")),
    "neural-style": ("noise", "lbfgs", False, 1, 1000),
    "neural-style-pt": ("noise", "lbfgs", False, 1, 1000),
    "pytorch-tutorial": ("content", "lbfgs", True, 1, 300),
    "gordicaleksa": ("content", "lbfgs", False, 1, 1000),
    "crowsonkb": ("content", "adam", True, "auto", (1000, 500, "...")),
    "pystiche": ("content", "lbfgs", False, 1, 500),
}


def test_every_preset_has_its_formula_and_its_schedule():
    assert set(FORMULAS) == set(SCHEDULES) == set(PRESETS)
    for name, schedule in SCHEDULES.items():
        own = preset(name)
        assert (own.init, own.optimizer, own.clamp, own.scales, own.iterations) == schedule
        assert (own.learning_rate, own.average) == ((0.02, 0.99) if name == "crowsonkb" else (0.03, 0.0))


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("options", [{"size": 48}, {"size": 64}, {"scales": 1}, {"scales": "auto"}])
def test_presets_fit_any_number_of_scales(name, options):
    schedule = preset(name, **options).schedule(1.4)
    assert all(count > 0 for _, count in schedule)
    if name == "gatys-pytorch":
        assert [count for _, count in schedule] == [500, 200, 200, 200, 200][: len(schedule)]


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_loss_and_gradient_are_the_programs(states, stylizers, name):
    """Each term alone, and all together. With max pooling rounding may route a gradient to the other of two nearly
    equal values, which one picture in some shows; so a gradient has to agree for one of them.
    """
    formula, naming = FORMULAS[name]
    own, state, config, left = stylizers(naming), states[naming][1], preset(name), {"all": 1.0}
    for seed in range(6):
        pictures = [np.random.default_rng(3 * seed + i).random((33, 38, 3)).astype(np.float32) for i in range(3)]
        x, content, style = (torch.from_numpy(picture.astype(np.float64)) for picture in pictures)
        x.requires_grad_()
        terms = formula(x, content, style, lambda picture, *rest: oracle.features(picture, state, *rest))
        assert (config.tv_weight > 0) == ("tv" in terms)
        slopes = {term: torch.autograd.grad(loss, x, retain_graph=True)[0] for term, loss in terms.items()}
        terms["all"], slopes["all"] = sum(terms.values()), sum(slopes.values())
        left = left if seed else dict.fromkeys(terms, 1.0)
        for term in [term for term, error in left.items() if error >= 1e-4]:
            others = [f"{other}_weight" for other in ("content", "style", "tv") if term not in (other, "all")]
            score = own.evaluate(*pictures, dataclasses.replace(config, **dict.fromkeys(others, 0.0)))
            assert score.loss == pytest.approx(terms[term].item(), rel=1e-5)
            left[term] = float(np.linalg.norm(score.gradient - slopes[term].numpy()) / slopes[term].norm())
        if max(left.values()) < 1e-4:
            return
    raise AssertionError(left)


@pytest.mark.parametrize(
    ("precision", "names", "bounds"),
    [
        ("fp32", ("neural-style", "pytorch-tutorial", "crowsonkb"), (1e-5, 1e-4)),
        ("fp16", ("pytorch-tutorial", "gordicaleksa"), (1e-2, 3e-2)),
    ],
)
def test_the_graphs_have_the_same_objective(exact, precision, names, bounds):
    """Average pooling, which has no ties that rounding breaks; smooth pictures."""
    graphs = Stylizer(weights="embedded", device="onnxruntime", precision=precision)
    pictures = [validate.picture(36, 45, seed)[0].permute(1, 2, 0).numpy().astype(np.float32) for seed in range(3)]
    for name in names:
        one, other = (each.evaluate(*pictures, preset(name, pooling="avg")) for each in (graphs, exact))
        assert one.loss == pytest.approx(other.loss, rel=bounds[0])
        assert np.linalg.norm(one.gradient - other.gradient) < bounds[1] * np.linalg.norm(other.gradient)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_run_with_a_preset_lowers_its_loss(pictures, stylizer, name):
    config = preset(name, size=48, iterations=3)
    losses = [step.loss for step in stylizer.steps(pictures["content"], pictures["style"], config)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("device", ["cpu", "onnxruntime"])
@pytest.mark.parametrize("statistic", ["gram", "shifted"])
def test_convolutions_as_loss_layers(states, stylizers, device, statistic):
    """Before their ReLU, beside it, and deeper than any ReLU that counts."""
    layers = {"content_layers": ("conv2_2", "relu2_2"), "style_layers": ("conv1_1", "relu2_1", "conv2_1:2", "conv3_1")}
    config = Config(**layers, style_loss=statistic, style_weight=0.5)
    pictures = [np.random.default_rng(i).random((36, 45, 3)).astype(np.float32) for i in range(3)]
    own = stylizers("torchvision", device)
    score = own.evaluate(*pictures, config)
    total, terms, gradient = oracle.objective(*pictures, states["torchvision"][1], config)
    assert score.loss == pytest.approx(total, rel=1e-5)
    assert score.style_loss == pytest.approx({layer: terms[layer] for layer in config.style_layer_weights}, rel=1e-5)
    assert np.linalg.norm(score.gradient - gradient) < 1e-4 * np.linalg.norm(gradient)


def test_targets_of_another_range_of_pixels_are_refused(pictures, stylizer):
    config = Config(size=48, scales=1, iterations=1)
    fed = dataclasses.replace(config, pixel_range="0-255")
    targets = stylizer.targets(pictures["style"], fed)
    stylizer(pictures["content"], targets, fed)
    with pytest.raises(ValueError, match="fed 0-255"):
        stylizer(pictures["content"], targets, config)


def parsed(*arguments):
    return stylize._config(stylize._parser().parse_args(arguments))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_preset_of_the_command_line_and_options_that_win(name):
    config = parsed("--preset", name)
    assert config == preset(name)
    assert config != parsed()
    assert parsed("--preset", name, "--style-weight", "7") == preset(name, style_weight=7.0)
    assert preset(name, seed=3).seed == 3


def test_iterations_of_the_other_scales():
    assert parsed("--iterations", "9,5,...").iterations == (9, 5, "...")
    assert [count for _, count in preset("crowsonkb").schedule(1)] == [1000, 500, 500, 500, 500]


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match="did you mean pystiche"):
        preset("pystich")
    with pytest.raises(ValueError, match="did you mean pystiche"):
        parsed("--preset", "pystich")
