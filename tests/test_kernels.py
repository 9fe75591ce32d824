"""The operations on a CPU against their references, and the references against their own derivatives."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import config, kernels
from engine.kernels import wasserstein
from engine.kernels.content import content_gradient_reference, content_loss_reference
from engine.kernels.gram import gram_reference
from engine.kernels.pixels import FORMS, Pixels, total_variation_reference
from engine.kernels.style import style_gradient_reference, style_loss_reference
from engine.kernels.summed import Layer, Summed
from engine.kernels.temporal import Temporal, temporal_reference
from engine.kernels.wasserstein import Wasserstein, exact_gram, exact_mean, wasserstein_reference

SHAPES = [(1, 1), (3, 7), (64, 100), (65, 63), (128, 1021)]
DTYPES = [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)]


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def features(*shape, seed=0, dtype=torch.float32, nhwc=False):
    found = torch.from_numpy(random(*shape, seed=seed)).to(dtype)
    return found.T.contiguous().T if nhwc else found


def error(value, truth):
    value = value.double().numpy() if isinstance(value, torch.Tensor) else value
    return np.linalg.norm(value - truth) / max(np.linalg.norm(truth), 1e-30)


def numeric_gradient(function, x, step=1e-5):
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("nhwc", [False, True])
def test_gram(shape, dtype, tolerance, nhwc):
    given = features(*shape, dtype=dtype, nhwc=nhwc)
    found = kernels.gram(given)
    assert found.shape == (shape[0], shape[0])
    assert error(found, gram_reference(given.double().numpy())) < 1e-5


@settings(max_examples=25)
@given(st.integers(1, 20), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_gram_invariants(channels, positions, seed):
    given = features(channels, positions, seed=seed)
    matrix = kernels.gram(given)
    torch.testing.assert_close(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix.double()).min() > -1e-5  # positive semidefinite
    shuffled = given[:, torch.randperm(positions, generator=torch.Generator().manual_seed(0))].contiguous()
    torch.testing.assert_close(matrix, kernels.gram(shuffled), rtol=1e-4, atol=1e-5)
    tiled = given.repeat(1, 3)  # the same picture three times as large: scale free
    torch.testing.assert_close(matrix, kernels.gram(tiled), rtol=1e-4, atol=1e-5)


def test_gram_of_the_loudest_fp16_features_is_finite():
    matrix = kernels.gram(torch.full((4, 5000), torch.finfo(torch.float16).max, dtype=torch.float16))
    torch.testing.assert_close(matrix, torch.full((4, 4), 65504.0**2))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("nhwc", [False, True])
def test_losses_and_gradients(shape, dtype, tolerance, nhwc):
    """A style layer, a content layer and one that is both, with weights that bring the loss near one."""
    f, p, a = (features(*shape, seed=seed, dtype=dtype, nhwc=nhwc) for seed in range(3))
    target = torch.from_numpy(gram_reference(a.double().numpy())).float()
    kinds = {"style": (None, target), "content": (p, None), "both": (p, target)}
    weights = {"style": (9.0, 0.5), "content": (0.25, 9.0), "both": (3.0, 2.0)}  # those of a missing term are of no use
    given = {name: Layer(f, torch.full_like(f, torch.nan), *kind, *weights[name]) for name, kind in kinds.items()}
    layers = Summed([given], 2.0, 5.0)
    layers.losses()
    layers.gradients()
    x, y, wanted = f.double().numpy(), p.double().numpy(), target.double().numpy()
    content = content_loss_reference(x, y)
    style = style_loss_reference(gram_reference(x), wanted)
    total = 2 * 3.25 * content + 5 * 2.5 * style
    assert layers.names == ("style", "content", "both")
    assert layers.terms.tolist() == pytest.approx(
        [total, 3.25 * content, 0, style, 0, style], rel=max(1e-4, tolerance / 4)
    )
    slopes = {
        "style": 5 * 0.5 * style_gradient_reference(x, gram_reference(x), wanted),
        "content": 2 * 0.25 * content_gradient_reference(x, y),
    }
    slopes["both"] = 4 * slopes["style"] + 12 * slopes["content"]
    for name, layer in given.items():
        assert error(layer.cotangent, float(layers.scale) * slopes[name]) < 3 * tolerance
    if dtype != torch.float32:
        assert all(float(layer.cotangent.double().square().mean().sqrt()) < 2 for layer in given.values())


def wasserstein_truth(f, mean, covariance):
    """L and dL/dF in float64 for features (C, M) and the other distribution, by autograd."""
    x = torch.from_numpy(f).requires_grad_()
    ridge = 1e-4 * torch.eye(len(f), dtype=torch.float64)
    own = x.mean(1)
    s = (x - own[:, None]) @ (x - own[:, None]).T / x.shape[1] + ridge
    t = torch.from_numpy(covariance) + ridge
    values, vectors = torch.linalg.eigh(t)
    root = vectors @ values.sqrt().diag() @ vectors.T
    crossed = torch.linalg.eigvalsh(root @ s @ root).sqrt().sum()
    loss = (own - torch.from_numpy(mean)).square().mean() + (s.trace() + t.trace() - 2 * crossed) / len(f)
    return loss.item(), torch.autograd.grad(loss, x)[0].numpy()


def test_wasserstein_against_float64():
    f, a = random(20, 90), 2 * random(20, 70, seed=1) + 0.5
    mean, covariance = a.mean(1), np.cov(a, bias=True)
    loss, slope = wasserstein_truth(f, mean, covariance)
    own = f.mean(1)
    assert wasserstein_reference(own, np.cov(f, bias=True), mean, covariance) == pytest.approx(loss, rel=1e-9)
    x = torch.from_numpy(f - mean[:, None]).float()
    distance = Wasserstein(torch.from_numpy(covariance))
    distance.away = exact_mean(x)
    layer = Layer(x, torch.empty_like(x), None, torch.zeros(20, 20), style_weight=3.0, distance=distance)
    layers = Summed([{"only": layer}], 0, 2.0)
    layers.losses()
    layers.gradients()
    assert layers.terms.tolist() == pytest.approx([6 * loss, 0, 0, loss], rel=1e-5)
    found = layer.cotangent + 6 / f.size * distance.slope[:, None]
    assert error(found, 6 * slope) < 1e-5


def test_wasserstein_of_one_distribution_to_itself_is_zero():
    matrix = torch.from_numpy(np.cov(random(12, 40), bias=True))
    loss, slope, means = Wasserstein(matrix)(matrix)
    assert 0 <= float(loss) < 1e-6
    assert float(means) == 0
    assert float(slope.abs().max()) < 1e-5


def loud(amplitude, dtype):
    """Wasserstein loss and dL/dX of 7 positions of 96 channels, at once and in two pieces; and the truth."""
    f, a = (amplitude * random(96, count, seed=count) for count in (7, 9))
    n = a.mean(1).astype(np.float32).astype(float)
    x = torch.from_numpy(f - n[:, None]).to(dtype)
    covariance = np.cov(a - n[:, None], bias=True)
    distance, found = Wasserstein(torch.from_numpy(covariance)), []
    layer = Layer(x, torch.empty_like(x), None, torch.zeros(96, 96), distance=distance)
    parts = (slice(3), slice(3, 7))
    halves = [replace(layer, features=x[:, part], cotangent=layer.cotangent[:, part]) for part in parts]
    for pieces in ([layer], halves):
        layer.cotangent.fill_(math.nan)
        distance.away = exact_mean(x)
        layers = Summed([{"only": each} for each in pieces], 0, 1.0)
        for layers.piece in range(len(pieces)):
            layers.measure(layers.names)
        layers.conclude()
        for layers.piece in range(len(pieces)):
            layers.gradients()
        slope = layers.scale * distance.slope[:, None] / x.numel()
        found.append((float(layers.terms[0]), (layer.cotangent + slope) / layers.scale))
    return found, wasserstein_truth(x.double().numpy() + n[:, None], n, covariance)


@pytest.mark.parametrize("amplitude", [0.1, 1, 30])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_wasserstein_of_fewer_positions_than_channels(amplitude, dtype, rounding):
    """Most eigenvalues of such a covariance are zero: there sums in fp32 leave noise, far above EPSILON, and what exact
    sums leave is lost when it is multiplied in 16 bits.
    """
    found, (expected, slope) = loud(amplitude, dtype)
    for loss, gradient in found:
        assert loss == pytest.approx(expected, rel=1e-5)
        assert error(gradient, slope) < rounding


def test_wasserstein_grows_with_the_square_of_the_features():
    """Beyond what the truth in float64 can tell."""
    (first, _), _ = loud(30, torch.float32)
    for loss, gradient in loud(1000, torch.float32)[0]:
        assert loss / 1000**2 == pytest.approx(first[0] / 30**2, rel=1e-3)
        assert error(gradient / 1000, first[1].numpy() / 30) < 2e-3


@pytest.mark.parametrize("shape", [(3, 1), (64, 50000), (512, 7)])
def test_exact_sums(shape):
    f, guide = torch.from_numpy(1e3 + random(*shape)).float(), torch.from_numpy(random(shape[1])).float()
    truth = f.double().numpy()
    np.testing.assert_allclose(exact_gram(f), truth @ truth.T / shape[1], rtol=1e-13)
    np.testing.assert_allclose(exact_gram(f.half()), exact_gram(f.half().double()), rtol=1e-13)
    np.testing.assert_allclose(exact_mean(f), truth.mean(1), rtol=1e-13)
    assert len({strip.data_ptr() for strip in wasserstein._strips(f)}) == 1  # what malloc keeps does not add up
    np.testing.assert_allclose(exact_mean(f, guide), truth @ guide.double().numpy() / shape[1], rtol=1e-9, atol=1e-9)


def test_wasserstein_of_what_is_not_finite():
    matrix = torch.eye(5, dtype=torch.float64)
    loss, slope, _ = Wasserstein(matrix)(matrix * math.nan)
    assert torch.isnan(loss)
    assert torch.isnan(slope).all()
    with pytest.raises(FloatingPointError, match="covariance of a style"):
        Wasserstein(matrix * math.inf)


def test_losses_alone_need_no_cotangents():
    f, p = features(3, 5), features(3, 5, seed=1)
    layers = Summed([{"content": Layer(f, None, p, None)}], 1, 1)
    layers.losses()
    assert float(layers.terms[0]) == pytest.approx(content_loss_reference(f.numpy(), p.numpy()), rel=1e-5)


def test_style_gradient_is_the_derivative_of_the_loss():
    f, target = random(3, 5), gram_reference(random(3, 4, seed=1))
    numeric = numeric_gradient(lambda x: style_loss_reference(gram_reference(x), target), f)
    assert error(style_gradient_reference(f, gram_reference(f), target), numeric) < 1e-7


def test_content_gradient_is_the_derivative_of_the_loss():
    f, target = random(3, 5), random(3, 5, seed=1)
    numeric = numeric_gradient(lambda x: content_loss_reference(x, target), f)
    assert error(content_gradient_reference(f, target), numeric) < 1e-7


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("power", "wrap"), [(2, False), (1, False), (1.5, True), (2, True)])
@pytest.mark.parametrize("size", [(2, 2), (2, 9), (31, 17)])
def test_pixels(size, power, wrap, form):
    x, vjp = random(3, *size), random(3, *size, seed=1)
    truth, slope = total_variation_reference(x, power, wrap, form)
    terms, gradient = torch.tensor([5.0, 1.0, 0.0]), torch.full((1, 3, *size), torch.nan)
    pixels, incoming = (torch.from_numpy(each)[None].float() for each in (x, vjp))
    Pixels(incoming, torch.tensor(4.0), 7, terms, power, wrap, form).finish(pixels, gradient)
    assert terms.tolist() == pytest.approx([5 + 7 * truth, 1, truth], rel=1e-6)
    assert error(gradient[0], vjp / 4 + 7 * slope) < 1e-6
    free = Pixels(incoming, torch.tensor(4.0), 0, terms, power, wrap, form)
    free.finish(pixels, gradient, measured=False)
    assert error(gradient[0], vjp / 4) < 1e-6
    assert float(terms[2]) == 0


@pytest.mark.parametrize("size", [(1, 1), (31, 17)])
def test_temporal_loss(size):
    x, y, before = random(3, *size), random(3, *size, seed=1), random(3, *size, seed=2)
    certain = np.random.default_rng(3).random(size)
    truth, slope = temporal_reference(x, y, certain)
    assert error(slope, numeric_gradient(lambda pixels: temporal_reference(pixels, y, certain)[0], x)) < 1e-7
    pixels, carried, gradient = (torch.from_numpy(each)[None].float() for each in (x, y, before))
    total = torch.tensor(5.0)
    term = Temporal(carried, torch.from_numpy(certain)[None, None].float(), 7)
    term.add(pixels, gradient, total)
    assert float(total) == pytest.approx(5 + 7 * truth, rel=1e-6)
    assert error(gradient[0], before + 7 * slope) < 1e-6
    term.add(pixels, None, total)
    assert float(total) == pytest.approx(5 + 14 * truth, rel=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_makes_the_loss_nan(value):
    vjp, terms = torch.zeros(1, 3, 8, 8), torch.ones(3)
    vjp[0, 1, 2, 3] = value
    Pixels(vjp, torch.tensor(1.0), 0, terms).finish(torch.rand(1, 3, 8, 8), torch.empty_like(vjp))
    assert terms.isnan().tolist() == [True, False, True]


@pytest.mark.parametrize("power", [1, 1.25, 2, 3])
@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_total_variation_gradient_is_the_derivative_of_the_loss(power, wrap, form):
    pixels = random(3, 4, 5)
    numeric = numeric_gradient(lambda x: total_variation_reference(x, power, wrap, form)[0], pixels)
    assert error(total_variation_reference(pixels, power, wrap, form)[1], numeric) < 1e-7


@pytest.mark.parametrize("power", [1, 1.25, 2, 3])
def test_total_variation_is_torchs_mean_power(power):
    pixels = random(3, 4, 5)
    x = torch.from_numpy(pixels)
    plain = sum(x.diff(dim=axis).abs().pow(power).mean() for axis in (1, 2))
    assert total_variation_reference(pixels, power)[0] == pytest.approx(float(plain))
    rolled = sum((x.roll(-1, axis) - x).abs().pow(power).mean() for axis in (1, 2))
    assert total_variation_reference(pixels, power, wrap=True)[0] == pytest.approx(float(rolled))


def test_config_knows_the_same_forms():
    assert config.TV_FORMS == FORMS


def test_forms_of_total_variation():
    """Written with slices and torch's padding; a picture that wraps around has no border, so a block is all of it."""
    pixels = random(3, 5, 7)
    x = torch.from_numpy(pixels)
    across, down = x.diff(dim=2).abs(), x.diff(dim=1).abs()
    found = {form: float(total_variation_reference(pixels, 1, form=form)[0]) for form in FORMS}
    assert found["sum"] == pytest.approx(float(across.sum() + down.sum()))
    assert found["block"] == pytest.approx(float(across[:, :-1].sum() + down[:, :, :-1].sum()))
    for padding, wrap in (("replicate", False), ("circular", True)):
        framed = torch.nn.functional.pad(x[None], (1, 1, 1, 1), padding)[0]
        inner, low = framed[:, 1:-1, 1:-1], slice(1 if wrap else 0, None)
        corners = framed[:, low, low]
        sides = [framed[:, 1:-1, 2:] - inner, framed[:, 2:, 1:-1] - inner]
        diagonals = [corners[:, 1:, 1:] - corners[:, :-1, :-1], corners[:, 1:, :-1] - corners[:, :-1, 1:]]
        truth = sum(2 / 3 * (d**2).mean() for d in sides) + sum((d**2).mean() / 6 for d in diagonals)
        assert float(total_variation_reference(pixels, 2, wrap, "nine-point")[0]) == pytest.approx(float(truth))
    one, other = (total_variation_reference(pixels, 2, True, form) for form in ("block", "sum"))
    assert float(one[0]) == float(other[0])


def test_total_variation_of_a_flat_picture_is_zero():
    flat, terms, gradient = torch.full((1, 3, 8, 8), 0.3), torch.zeros(3), torch.ones(1, 3, 8, 8)
    for power in (1, 1.5, 2):
        Pixels(torch.zeros_like(flat), torch.tensor(1.0), 1, terms, power).finish(flat, gradient)
    assert not terms.any()
    assert not gradient.any()
