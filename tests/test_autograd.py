import numpy as np
import pytest
import torch

from engine import Config, image
from engine.autograd import loss


@pytest.fixture
def objective(stylizer, pictures):
    config = Config(
        size=40, style_weight=50, tv_weight=3, style_layers=("relu1_1", "relu3_1"), content_layers=("relu2_2",)
    )
    content = image.resize(image.load(pictures["content"]), (40, 36))
    return stylizer.objective(content, pictures["style"], config)


def pixels(seed=0):
    return torch.rand(1, 3, 36, 40, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def test_gradient_is_the_slope_along_random_directions(objective):
    """The directional derivative of fp32 values by central differences, for steps large enough for fp32."""
    x = pixels()
    loss(x, objective).backward()
    for seed in range(3):
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        direction /= direction.norm()
        with torch.no_grad():
            up, down = (float(loss(x + sign * 0.02 * direction, objective)) for sign in (1, -1))
        assert float((x.grad * direction).sum()) == pytest.approx(
            (up - down) / 0.04, rel=2e-2, abs=1e-3 * float(x.grad.norm())
        )


def test_composes_with_other_torch_terms(objective):
    x = pixels()
    (gradient,) = torch.autograd.grad(loss(x, objective), x)
    total = 3 * loss(x * 0.5 + 0.25, objective) + (x**2).sum()
    total.backward()
    y = (x.detach() * 0.5 + 0.25).requires_grad_()
    (inner,) = torch.autograd.grad(loss(y, objective), y)
    torch.testing.assert_close(x.grad, 1.5 * inner + 2 * x.detach())
    assert not torch.allclose(gradient, inner)
    in_place = loss(y, objective)
    in_place *= 2
    in_place += (y**2).sum()
    torch.testing.assert_close(torch.autograd.grad(in_place, y)[0], 2 * inner + 2 * y.detach())


def test_two_evaluations_before_one_backward(objective):
    """Both share the memory of the graphs; the second must not disturb the gradient of the first."""
    x, y = pixels(1), pixels(2)
    (expected,) = torch.autograd.grad(loss(x, objective), x)
    first = loss(x, objective)
    second = loss(y, objective)
    (first + second).backward()
    assert torch.equal(x.grad, expected)


def test_no_grad_computes_no_vjp(objective, monkeypatch):
    def refuse(write, terms):
        raise AssertionError("the VJP ran")

    monkeypatch.setattr(objective.network, "vjp", refuse)
    x = pixels()
    with torch.no_grad():
        assert loss(x, objective) > 0
    assert loss(x.detach(), objective) > 0
    with pytest.raises(AssertionError, match="VJP"):
        loss(x, objective)


def test_it_is_differentiable_once(objective):
    x = pixels()
    (gradient,) = torch.autograd.grad(loss(x, objective), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(gradient.sum(), x)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adam])
def test_any_torch_optimiser_drives_it(objective, make):
    x = torch.nn.Parameter(pixels().detach())
    optimiser = make([x], lr=1e-4 if make is torch.optim.SGD else 1e-2)
    values = []
    for _ in range(8):
        optimiser.zero_grad()
        value = loss(x, objective)
        value.backward()
        optimiser.step()
        values.append(float(value.detach()))
    assert values[-1] < values[0]


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True:UserWarning")  # torch's own line
def test_torchs_strong_wolfe_lbfgs_drives_it(objective):
    x = torch.nn.Parameter(pixels().detach())
    optimiser = torch.optim.LBFGS([x], max_iter=6, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        value = loss(x, objective)
        value.backward()
        return value

    first = optimiser.step(closure).item()
    assert closure().item() < 0.9 * first


@pytest.mark.parametrize("bad", [torch.zeros(1, 3, 40, 36), torch.zeros(3, 36, 40), torch.zeros(1, 3, 36, 40).double()])
def test_wrong_shapes_and_types(objective, bad):
    with pytest.raises(ValueError, match="the objective takes"):
        loss(bad, objective)


def test_the_result_is_a_scalar_of_the_right_type(objective):
    value = loss(pixels(), objective)
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert np.isfinite(float(value.detach()))


@pytest.mark.parametrize(("given", "size"), [("content", (46, 64)), (None, (40, 56))])
def test_the_objective_of_a_run_is_that_of_its_last_scale(stylizer, pictures, given, size):
    content = pictures.get(given)
    config = Config(size=64 if given else (56, 40), scales=2)
    objective = stylizer.objective(content, pictures["style"], config)
    shown = torch.rand_like(objective.network.image)
    assert shown.shape == (1, 3, *size)
    score = stylizer.evaluate(shown[0].permute(1, 2, 0).numpy(), content, pictures["style"], config)
    assert float(loss(shown, objective)) == pytest.approx(score.loss, rel=1e-5)
