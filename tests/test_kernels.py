import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import kernels
from engine.kernels.content import content_gradient_reference, content_loss_reference
from engine.kernels.gram import gram_reference
from engine.kernels.style import style_gradient_reference, style_loss_reference
from engine.kernels.total_variation import total_variation_reference

SHAPES = [(1, 1), (3, 7), (64, 100), (65, 63), (128, 1021)]
DTYPES = [(torch.float32, 1e-5), (torch.float16, 2e-3)]


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


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
def test_gram(shape, dtype, tolerance):
    features = torch.from_numpy(random(*shape)).to(dtype)
    out = torch.full((shape[0], shape[0]), torch.nan)
    assert kernels.gram(features, out) is out
    assert error(out, gram_reference(features.double().numpy())) < tolerance


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_gram_invariants(channels, positions, seed):
    features = torch.from_numpy(random(channels, positions, seed=seed)).float()
    matrix = kernels.gram(features, torch.empty(channels, channels))
    torch.testing.assert_close(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix.double()).min() > -1e-5  # positive semidefinite
    shuffled = features[:, torch.randperm(positions, generator=torch.Generator().manual_seed(0))].contiguous()
    torch.testing.assert_close(matrix, kernels.gram(shuffled, torch.empty_like(matrix)), rtol=1e-4, atol=1e-5)
    tiled = features.repeat(1, 3)  # the same picture three times as large: scale free
    torch.testing.assert_close(matrix, kernels.gram(tiled, torch.empty_like(matrix)), rtol=1e-4, atol=1e-5)


def test_gram_of_the_loudest_fp16_features_is_finite():
    features = torch.full((4, 5000), torch.finfo(torch.float16).max, dtype=torch.float16)
    matrix = kernels.gram(features, torch.empty(4, 4))
    assert torch.isfinite(matrix).all()
    torch.testing.assert_close(matrix, torch.full((4, 4), 65504.0**2))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("accumulate", [False, True])
def test_style_loss_and_gradient(shape, dtype, tolerance, accumulate):
    features = torch.from_numpy(random(*shape)).to(dtype)
    matrix = gram_reference(features.double().numpy())
    target = gram_reference(random(*shape, seed=1))
    difference = torch.full(matrix.shape, torch.nan)
    loss = kernels.style_loss(torch.from_numpy(matrix).float(), torch.from_numpy(target).float(), difference)
    assert error(loss, style_loss_reference(matrix, target)) < 1e-4
    out = torch.ones(shape, dtype=dtype) if accumulate else torch.full(shape, torch.nan, dtype=dtype)
    factor = 5.0 * shape[0] ** 2 * shape[1]  # brings the result near one, as the fp16 scale does
    kernels.style_gradient(features, difference, torch.tensor(factor), out, accumulate)
    truth = factor * style_gradient_reference(features.double().numpy(), matrix, target)
    assert error(out, truth + (1 if accumulate else 0)) < 3 * tolerance


def test_style_gradient_is_the_derivative_of_the_loss():
    features, target = random(3, 5), gram_reference(random(3, 4, seed=1))
    numeric = numeric_gradient(lambda f: style_loss_reference(gram_reference(f), target), features)
    assert error(style_gradient_reference(features, gram_reference(features), target), numeric) < 1e-7


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_content_loss_and_gradient(shape, dtype, tolerance):
    features, target = (torch.from_numpy(random(*shape, seed=seed)).to(dtype) for seed in (0, 1))
    difference = torch.full(shape, torch.nan, dtype=dtype)
    loss = kernels.content_loss(features, target, difference)
    f, p = features.double().numpy(), target.double().numpy()
    assert error(loss, content_loss_reference(f, p)) < tolerance
    kernels.content_gradient(difference, torch.tensor(0.5 * features.numel()))
    truth = 0.5 * features.numel() * content_gradient_reference(f, p)
    assert error(difference, truth) < tolerance


def test_content_gradient_is_the_derivative_of_the_loss():
    features, target = random(3, 5), random(3, 5, seed=1)
    numeric = numeric_gradient(lambda f: content_loss_reference(f, target), features)
    assert error(content_gradient_reference(features, target), numeric) < 1e-7


@pytest.mark.parametrize("size", [(2, 2), (2, 9), (31, 17)])
def test_total_variation(size):
    pixels, before = random(3, *size), random(3, *size, seed=1)
    truth, slope = total_variation_reference(pixels)
    gradient = torch.from_numpy(before)[None].float()
    loss = kernels.total_variation(torch.from_numpy(pixels)[None].float(), 7.0, gradient)
    assert error(loss, truth) < 1e-6
    assert error(gradient[0], before + 7 * slope) < 1e-6


def test_total_variation_gradient_is_the_derivative_of_the_loss():
    pixels = random(3, 4, 5)
    numeric = numeric_gradient(lambda x: total_variation_reference(x)[0], pixels)
    assert error(total_variation_reference(pixels)[1], numeric) < 1e-7


def test_total_variation_of_a_flat_picture_is_zero():
    gradient = torch.zeros(1, 3, 8, 8)
    assert kernels.total_variation(torch.full((1, 3, 8, 8), 0.3), 1.0, gradient) == 0
    assert not gradient.any()
