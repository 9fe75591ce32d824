import itertools
import math

import pytest
import torch

from engine import optimize
from engine.kernels import lbfgs
from engine.kernels.adam import BETAS, RATE
from engine.kernels.lbfgs import FIRST_STEP, HISTORY, LARGEST_MOVE
from engine.optimize import State


def minimise(loss, *arguments):
    """Of a torch function of the pixels."""

    def evaluate(pixels, gradient):
        with torch.enable_grad():
            x = pixels.clone().requires_grad_()
            value = loss(x)
            gradient.copy_(torch.autograd.grad(value, x)[0])
        return value.detach()

    return optimize.minimise(evaluate, *arguments)


@pytest.fixture
def unbounded(monkeypatch):
    """L-BFGS by the book: steps of any size."""
    monkeypatch.setattr(lbfgs, "LARGEST_MOVE", math.inf)


def quadratic(seed=0):
    """A convex quadratic over (1, 3, 5, 5) with its minimum at a point in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(75, 75, generator=generator)
    matrix = root @ root.T / 75 + 0.1 * torch.eye(75)
    minimum = torch.rand(1, 3, 5, 5, generator=generator)

    def loss(x):
        d = (x - minimum).flatten()
        return d @ matrix @ d

    return loss, minimum


@pytest.mark.parametrize(("optimizer", "iterations"), [("lbfgs", 60), ("adam", 600)])
def test_finds_the_minimum(optimizer, iterations):
    loss, minimum = quadratic()
    start = torch.full((1, 3, 5, 5), 0.5)
    steps = list(minimise(loss, start, optimizer, iterations, State()))
    assert len(steps) == iterations
    assert (steps[-1].best - minimum).abs().max() < 1e-2
    assert torch.equal(start, torch.full((1, 3, 5, 5), 0.5))  # the caller's tensor is left alone


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_lbfgs_does_not_depend_on_the_scale_of_the_loss(scale):
    loss, minimum = quadratic()
    steps = list(minimise(lambda x: scale * loss(x), torch.full((1, 3, 5, 5), 0.5), "lbfgs", 60, State()))
    assert (steps[-1].best - minimum).abs().max() < 1e-2


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_one_iteration_is_one_evaluation(optimizer):
    loss, _ = quadratic()
    calls = []
    steps = minimise(lambda x: (calls.append(1), loss(x))[1], torch.zeros(1, 3, 5, 5), optimizer, 7, State())
    for count, _ in enumerate(steps, 1):
        assert len(calls) == count


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_best_is_the_image_of_the_lowest_loss(optimizer):
    loss, _ = quadratic()
    lowest = math.inf
    for step in minimise(loss, torch.zeros(1, 3, 5, 5), optimizer, 30, State()):
        lowest = min(lowest, step.loss)
        assert float(loss(step.best)) == pytest.approx(lowest, rel=1e-5)


def test_lbfgs_recovers_from_steps_that_diverge(unbounded):
    """Rosenbrock's curved valley: full quasi-Newton steps leave it again and again."""

    def loss(x):
        a, b = x[..., 0], x[..., 1]
        return (100 * (b - a**2) ** 2 + (1 - a) ** 2).sum()

    start = torch.tensor([-1.2, 1.0]).repeat(1, 3, 4, 1)
    steps = list(minimise(loss, start, "lbfgs", 150, State()))
    assert max(step.loss for step in steps) > 4 * steps[0].loss  # it did overshoot
    assert (steps[-1].best - 1).abs().max() < 1e-2


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_stops_with_the_last_image_kept(optimizer, value):
    loss, _ = quadratic()
    calls = []

    def breaks(x):
        calls.append(1)
        return loss(x) if len(calls) < 5 else loss(x) * value

    seen = []
    with pytest.raises(FloatingPointError, match="not finite at iteration 5"):
        for step in minimise(breaks, torch.zeros(1, 3, 5, 5), optimizer, 30, State()):
            seen.append(step)
    assert len(seen) == 4
    assert torch.isfinite(seen[-1].best).all()


def test_adam_keeps_pixels_in_range():
    steps = minimise(lambda x: ((x - 3) ** 2).sum(), torch.full((1, 3, 2, 2), 0.9), "adam", 50, State())
    for step in steps:
        assert step.best.min() >= 0
        assert step.best.max() <= 1


def test_adam_carries_its_moments_to_the_next_scale():
    state = State()
    small = list(minimise(lambda x: ((x - 0.9) ** 2).mean(), torch.full((1, 3, 4, 4), 0.5), "adam", 5, state))[-1].best
    assert state.steps == 5
    list(minimise(lambda x: ((x - 0.9) ** 2).mean(), small.repeat(1, 1, 2, 2), "adam", 5, state))
    assert state.steps == 10
    assert state.moments[0].shape == (1, 3, 8, 8)


def torchs_lbfgs(loss, start, iterations, first_step=None):
    """The losses of torch.optim.LBFGS with our history and, if it is given, this first step, and no line search."""
    image = start.clone().requires_grad_()
    rate = torch.tensor(1.0)
    if first_step:
        first = torch.autograd.grad(loss(image), image)[0]
        rate = first_step / first.square().mean().sqrt() / min(1.0, 1.0 / first.abs().sum())
    reference = torch.optim.LBFGS(
        [image], lr=float(rate), max_iter=1, history_size=HISTORY, tolerance_grad=0, tolerance_change=0
    )

    def closure():
        reference.zero_grad()
        value = loss(image)
        value.backward()
        return value.detach()

    losses = []
    for _ in range(iterations):
        losses.append(float(reference.step(closure)))
        reference.param_groups[0]["lr"] = 1.0
    return losses


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True:UserWarning")  # torch's own line
@pytest.mark.parametrize("seed", range(3))
def test_lbfgs_takes_the_steps_of_torchs(seed, unbounded):
    """The same history, the same first step: the same iterates, to rounding."""
    loss, _ = quadratic(seed)
    start = torch.full((1, 3, 5, 5), 0.5)
    losses = torchs_lbfgs(loss, start, 35, FIRST_STEP)
    ours = [step.loss for step in minimise(loss, start, "lbfgs", 35, State())]
    assert ours[:12] == pytest.approx(losses[:12], rel=1e-3)
    assert ours[-1] < 1e-3 * ours[0]


def real(stylizer, pictures, style_weight, size=(48, 34)):
    """The objective of two pictures, and the start."""
    from engine import Config, goal, image

    content = image.resize(image.load(pictures["content"]), size)
    config = Config(style_weight=style_weight)
    objective = stylizer._objective(content, goal.load(content, pictures["style"], config, None, None))
    return objective, image.to_tensor(content)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True:UserWarning")  # torch's own line
def test_lbfgs_goes_where_torchs_does_on_a_picture(stylizer, pictures, unbounded):
    """The same iterates until rounding tells, after some twenty steps."""
    from engine import autograd

    objective, start = real(stylizer, pictures, 30)  # on which full steps never diverge: ours would be taken back
    theirs = torchs_lbfgs(lambda x: autograd.loss(x, objective), start, 20, FIRST_STEP)
    ours = [step.loss for step in optimize.minimise(objective.write, start, "lbfgs", 20, State())]
    assert ours[:12] == pytest.approx(theirs[:12], rel=1e-3)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True:UserWarning")  # torch's own line
@pytest.mark.parametrize("style_weight", [30, 3000])
def test_lbfgs_is_as_good_as_torchs_on_a_picture(stylizer, pictures, style_weight):
    """At no time more than 1 % above the lowest loss of torch.optim.LBFGS as it comes."""
    from engine import autograd

    objective, start = real(stylizer, pictures, style_weight)
    scale = 2.0**12  # keeps torch off its absolute thresholds
    theirs = torchs_lbfgs(lambda x: scale * autograd.loss(x, objective), start, 60)
    ours = [step.loss for step in optimize.minimise(objective.write, start, "lbfgs", 60, State())]
    for count in (20, 40, 60):
        assert min(ours[:count]) < 1.01 * min(theirs[:count]) / scale


def test_lbfgs_moves_no_pixel_further_than_it_may():
    loss, _ = quadratic()
    evaluated = []
    start = torch.full((1, 3, 5, 5), 9.0)
    list(minimise(lambda x: (evaluated.append(x.detach().clone()), loss(x))[1], start, "lbfgs", 20, State()))
    moves = [float((after - before).abs().max()) for before, after in itertools.pairwise(evaluated)]
    assert max(moves) == pytest.approx(LARGEST_MOVE, rel=1e-4)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_lbfgs_loses_nothing_to_rounding(condition, unbounded):
    """Dot products instead of vectors, in fp32: as good as the textbook's two loops in fp64."""
    generator = torch.Generator().manual_seed(0)
    curvature = condition ** (torch.rand(1, 3, 1, 2000, generator=generator) - 0.5)
    start = torch.rand(1, 3, 1, 2000, generator=generator)
    ours = [step.loss for step in minimise(lambda x: (curvature * x**2).sum(), start, "lbfgs", 60, State())]

    x, pairs = start.double().flatten(), []
    wide = curvature.double().flatten()
    textbook, gradient, unit = [], None, None
    for _ in range(60):
        textbook.append(float((wide * x**2).sum()))
        before, gradient = gradient, 2 * wide * x
        if before is None:
            unit = 1 / gradient.square().mean().sqrt()
            move = -FIRST_STEP * unit * gradient
        else:
            pairs = [*pairs[-HISTORY + 1 :], (move, unit * (gradient - before))]
            q, alphas = -unit * gradient, []
            for s, y in reversed(pairs):
                alphas.append((s @ q) / (s @ y))
                q = q - alphas[-1] * y
            s, y = pairs[-1]
            q = q * (s @ y) / (y @ y)
            for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
                q = q + (alpha - (y @ q) / (s @ y)) * s
            move = q
        x = x + move
    assert ours[:30] == pytest.approx(textbook[:30], rel=1e-3)
    assert ours[-1] < 1.1 * textbook[-1] + 1e-6


def test_adam_is_torchs():
    loss, _ = quadratic()
    image = torch.full((1, 3, 5, 5), 0.5).requires_grad_()
    reference = torch.optim.Adam([image], lr=RATE, betas=BETAS)
    losses = []
    for _ in range(10):
        reference.zero_grad()
        value = loss(image)
        value.backward()
        losses.append(float(value.detach()))
        reference.step()
        image.data.clamp_(0, 1)
    ours = [step.loss for step in minimise(loss, torch.full((1, 3, 5, 5), 0.5), "adam", 10, State())]
    assert ours == losses


def test_a_start_at_the_minimum_stays_there():
    steps = list(minimise(lambda x: (x**2).sum(), torch.zeros(1, 3, 3, 3), "lbfgs", 5, State()))
    assert [step.loss for step in steps] == [0] * 5
