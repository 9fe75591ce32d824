import contextlib
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from engine import kernels, optimize
from engine.kernels import lbfgs
from engine.kernels.adam import BETAS, RATE
from engine.kernels.lbfgs import FIRST_STEP, HISTORY, LARGEST_MOVE
from engine.optimize import WINDOW, Stall, State


def minimise(loss, *arguments, **options):
    """Of a torch function of the pixels."""

    def evaluate(pixels, gradient):
        with torch.enable_grad():
            x = pixels.clone().requires_grad_()
            value = loss(x)
            gradient.copy_(torch.autograd.grad(value, x)[0])
        return value.detach()

    return optimize.minimise(evaluate, *arguments, **options)


@pytest.fixture
def unbounded(monkeypatch):
    """Steps of L-BFGS have any size, and none is taken back."""
    monkeypatch.setattr(lbfgs, "LARGEST_MOVE", math.inf)
    monkeypatch.setattr(lbfgs, "DIVERGED", math.inf)


@pytest.fixture
def by_the_book(unbounded, monkeypatch):
    """L-BFGS as it is everywhere."""
    monkeypatch.setattr(lbfgs, "SCALING", 1.0)


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


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
@pytest.mark.parametrize("given_up", [False, True])
def test_iterates_that_are_kept_keep_their_image(optimizer, given_up):
    """The memory of the others is used again, and nobody holds it at the end."""
    loss, _ = quadratic()
    start = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(1)).contiguous(
        memory_format=torch.channels_last
    )
    whole = [step.best.clone() for step in minimise(loss, start, optimizer, 20, State())]
    steps, kept, places = minimise(loss, start, optimizer, 20, State()), [], set()
    for i, step in enumerate(steps):
        places.add(step.best.data_ptr())
        if i % 5 == 1:
            kept.append((i, step))
        if given_up and i == 16:
            break
    steps.close()
    assert len(places) == 2
    assert len(kept) == 4
    assert all(torch.equal(step.best, whole[i]) for i, step in kept)
    assert all(step.best.untyped_storage().nbytes() == step.best.nbytes for _, step in kept)


def test_lbfgs_recovers_from_steps_that_diverge(monkeypatch):
    """Rosenbrock's curved valley: full quasi-Newton steps leave it again and again."""

    def loss(x):
        a, b = x[..., 0], x[..., 1]
        return (100 * (b - a**2) ** 2 + (1 - a) ** 2).sum()

    monkeypatch.setattr(lbfgs, "LARGEST_MOVE", math.inf)
    monkeypatch.setattr(lbfgs, "DIVERGED", 2.0)  # lets it go far
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
    with pytest.raises(FloatingPointError, match="not finite"):
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
    """Without a gradient it goes on by the moments alone, which have grown with the image."""
    state, slope = State(), torch.linspace(-1, 1, 48).view(1, 3, 4, 4)
    list(minimise(lambda x: (x * slope).sum(), torch.full((1, 3, 4, 4), 0.5), "adam", 5, state))
    assert state.steps == 5
    moments = [(1 - rate**5) * power for rate, power in zip(BETAS, (slope, slope.square()), strict=True)]
    for found, expected in zip(state.moments, moments, strict=True):
        torch.testing.assert_close(found, expected)
    first, second = (torch.nn.functional.interpolate(each, size=(8, 8), mode="bilinear") for each in moments)
    start = torch.full((1, 3, 8, 8), 0.5)
    losses = iter((2.0, 1.0))  # the second image is the best
    *_, last = minimise(lambda x: (0 * x).sum() + next(losses), start, "adam", 2, state, rate=0.1)
    assert state.steps == 7
    step = 0.1 * BETAS[0] * first / (1 - BETAS[0] ** 6) / (BETAS[1] * second / (1 - BETAS[1] ** 6)).sqrt()
    torch.testing.assert_close(last.best, start - step, rtol=1e-5, atol=1e-6)


def boxed_minimum(loss, start):
    """The minimiser over [0, 1], by many steps of projected gradient descent in fp64."""
    x = start.double()
    for _ in range(20000):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x), x)
        x = (x.detach() - 0.05 * gradient).clamp(0, 1)
    return x


@pytest.mark.parametrize("seed", range(3))
def test_lbfgs_in_a_box_finds_the_minimum_of_the_box(seed):
    """Of a quadratic whose free minimum lies far outside: projecting its minimum would be wrong."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(48, 48, generator=generator, dtype=torch.float64)
    matrix = root @ root.T / 48 + 0.1 * torch.eye(48)
    free = 3 * torch.rand(1, 3, 4, 4, generator=generator, dtype=torch.float64) - 1

    def loss(x):
        d = (x - free).flatten().to(x.dtype)
        return d @ matrix.to(x.dtype) @ d

    start = torch.full((1, 3, 4, 4), 0.5)
    truth = boxed_minimum(loss, start)
    steps = list(minimise(loss, start, "lbfgs", 80, State(), clamp=True))
    assert all(step.best.min() >= 0 and step.best.max() <= 1 for step in steps)
    assert (steps[-1].best - truth).abs().max() < 2e-3
    assert (free.clamp(0, 1) - truth).abs().max() > 0.1
    unclamped = list(minimise(loss, start, "lbfgs", 80, State()))[-1].best
    assert unclamped.min() < 0
    assert unclamped.max() > 1


@pytest.mark.parametrize("clamp", [False, True])
def test_a_box_around_the_minimum_changes_nothing(clamp):
    loss, minimum = quadratic()
    steps = list(minimise(loss, 0.5 * minimum + 0.25, "lbfgs", 60, State(), clamp=clamp))
    assert (steps[-1].best - minimum).abs().max() < 1e-2


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_the_average_is_the_weighted_mean_of_the_images(optimizer, decay):
    """In fp64, from its definition."""
    loss, _ = quadratic()
    seen = []

    def watched(x):
        seen.append(x.detach().double().clone())
        return loss(x)

    steps = minimise(watched, torch.full((1, 3, 5, 5), 0.5), optimizer, 15, State(), average=decay)
    for k, step in enumerate(steps, 1):
        weights = [decay ** (k - i) for i in range(1, k + 1)]
        truth = sum(w * x for w, x in zip(weights, seen, strict=True)) / sum(weights)
        assert (step.best - truth).abs().max() < 1e-6


def test_a_diverged_image_has_no_share_in_the_average():
    losses = iter([4.0, 3.0, 50.0, 2.0])
    seen = []

    def evaluate(pixels, gradient):
        seen.append(pixels.clone())
        gradient.fill_(1)
        return torch.tensor(next(losses))

    steps = list(optimize.minimise(evaluate, torch.zeros(1, 3, 2, 2), "lbfgs", 4, State(), average=0.5))
    truth = (0.25 * seen[0] + 0.5 * seen[1] + seen[3]) / 1.75
    assert (steps[-1].best - truth).abs().max() < 1e-6
    assert torch.equal(steps[1].best, steps[2].best)


def test_adam_takes_no_step_back_so_every_image_has_its_share():
    losses = iter([4.0, 3.0, 50.0, 2.0])
    seen = []

    def evaluate(pixels, gradient):
        seen.append(pixels.clone())
        gradient.fill_(-1)
        return torch.tensor(next(losses))

    steps = list(optimize.minimise(evaluate, torch.zeros(1, 3, 2, 2), "adam", 4, State(), average=0.5))
    truth = (0.125 * seen[0] + 0.25 * seen[1] + 0.5 * seen[2] + seen[3]) / 1.875
    assert (steps[-1].best - truth).abs().max() < 1e-6


@pytest.mark.parametrize("gpu", [False, True])
def test_pairs_by_device(gpu):
    assert kernels.pairs("auto", gpu) == (20 if gpu else 50)
    assert kernels.pairs(20, gpu) == 20
    if gpu:
        with pytest.raises(ValueError, match="at most 20"):
            kernels.pairs(21, gpu)
    else:
        assert kernels.pairs(100, gpu) == 100


def test_adams_rate_is_its_first_step():
    start = torch.full((1, 3, 2, 2), 0.5)
    for rate in (0.01, 0.2):
        steps = list(minimise(lambda x: ((x - 0.9) ** 2).sum(), start, "adam", 2, State(), rate=rate))
        assert (steps[-1].best - start - rate).abs().max() < 1e-5


def test_a_stalled_loss_is_told_after_the_window():
    stall = Stall(0.01)
    told = [stall(loss) for loss in [100, 50, *[49.9] * (WINDOW + 5)]]
    assert told.index(True) == WINDOW + 1  # of the best of 50, WINDOW evaluations ago
    falling, noisy = Stall(0.01), Stall(0.01)
    assert not any(falling(0.99**i) for i in range(200))
    assert not any(noisy(0.99**i * (1 + i % 3)) for i in range(200))  # the best counts
    assert [Stall(0.01)(0.0) for _ in range(3)] == [False] * 3
    done = Stall(0.01)
    assert [done(0.0) for _ in range(21)] == [False] * 20 + [True], "there is nothing left to gain"
    told = Stall(0.01)
    assert [told(loss) for loss in (math.nan, 1.0, math.nan, *[0.1] * 20, 0.1)] == [False] * 23 + [True], "NaN is none"
    off = Stall(0)
    assert not any(off(1.0) for _ in range(100))


def torchs_lbfgs(loss, start, iterations, first_step=None, history=HISTORY):
    """The losses of torch.optim.LBFGS with our history and, if it is given, this first step, and no line search."""
    image = start.clone().requires_grad_()
    rate = torch.tensor(1.0)
    if first_step:
        first = torch.autograd.grad(loss(image), image)[0]
        rate = first_step / first.square().mean().sqrt() / min(1.0, 1.0 / first.abs().sum())
    reference = torch.optim.LBFGS(
        [image], lr=float(rate), max_iter=1, history_size=history, tolerance_grad=0, tolerance_change=0
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
@pytest.mark.parametrize(("seed", "history"), [(0, HISTORY), (1, HISTORY), (2, HISTORY), (0, 1), (1, 3)])
def test_lbfgs_takes_the_steps_of_torchs(seed, history, by_the_book):
    """The same history, the same first step: the same iterates, to rounding."""
    loss, _ = quadratic(seed)
    start = torch.full((1, 3, 5, 5), 0.5)
    losses = torchs_lbfgs(loss, start, 35, FIRST_STEP, history)
    ours = [step.loss for step in minimise(loss, start, "lbfgs", 35, State(), history=history)]
    assert ours[:12] == pytest.approx(losses[:12], rel=1e-3)
    if history < HISTORY:
        assert ours[:12] != pytest.approx(torchs_lbfgs(loss, start, 12), rel=1e-2)
    assert ours[-1] < 1e-3 * ours[0]


def real(stylizer, pictures, style_weight, size=(48, 34)):
    """The objective of two pictures, and the start."""
    from engine import Config, image

    content = image.resize(image.load(pictures["content"]), size)
    config = Config(size=max(size), style_weight=style_weight, padding="zero")
    objective = stylizer.objective(content, pictures["style"], config)
    return objective, image.to_tensor(content)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True:UserWarning")  # torch's own line
def test_lbfgs_goes_where_torchs_does_on_a_picture(exact, pictures, by_the_book):
    """The same iterates until rounding tells, after some twenty steps."""
    from engine import autograd

    objective, start = real(exact, pictures, 30)  # on which full steps never diverge: ours would be taken back
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
            q = lbfgs.SCALING * q * (s @ y) / (y @ y)
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


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_a_picture_that_wraps_is_enlarged_without_borders(mode):
    """Shifted by a sixteenth it becomes the same picture, shifted by a sixteenth."""
    coarse = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    fine = optimize.resized(coarse, (48, 64), mode, wrap=True)
    assert fine.shape == (1, 3, 48, 64)
    shifted = optimize.resized(coarse.roll((2 * 3, 3 * 5), (2, 3)), (48, 64), mode, wrap=True)
    assert (shifted - fine.roll((3 * 3, 4 * 5), (2, 3))).abs().max() < 1e-5
    plain = optimize.resized(coarse, (48, 64), mode, wrap=False)
    assert (plain - fine)[..., 4:-4, 4:-4].abs().max() < 1e-5
    assert (plain - fine).abs().max() > 0.05


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Adam on a CPU that is taken for a GPU, whose losses arrive when somebody waits for them."""

    class Event:
        arrived = False

        def query(self):
            return self.arrived

        def synchronize(self):
            self.arrived = True

    class Adam(kernels.Adam):
        def step(self):
            self.steps += 1
            self._step_cpu(float(self._loss))

    stream = SimpleNamespace(record_event=Event, wait_stream=lambda other: None)
    monkeypatch.setattr(kernels, "Adam", Adam)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())


@pytest.mark.parametrize("count", [3, 2 * optimize.AHEAD + 5])
def test_a_gpu_is_given_iterations_ahead_of_those_that_are_yielded(request, count):
    loss, _ = quadratic()
    start, evaluations = torch.full((1, 3, 5, 5), 0.5), itertools.count()

    def counted(x):
        next(evaluations)
        return loss(x)

    expected = [(step.loss, step.best.clone()) for step in minimise(loss, start, "adam", count, State(), rate=0.2)]
    request.getfixturevalue("on_a_gpu")
    kept = []
    for i, step in enumerate(minimise(counted, start, "adam", count, State(), rate=0.2), 1):
        assert next(evaluations) == min(i + optimize.AHEAD, count) + i - 1
        assert step.loss == expected[i - 1][0]
        assert torch.equal(step.best, expected[i - 1][1])
        kept.append(step)
    assert len(kept) == count
    assert all(torch.equal(step.best, best) for step, (_, best) in zip(kept, expected, strict=True))


@pytest.mark.parametrize("bad", [0, optimize.AHEAD, optimize.AHEAD + 3])
def test_a_loss_of_a_gpu_that_is_not_finite_is_told_in_the_end(on_a_gpu, bad):
    loss, _ = quadratic()
    evaluations, seen = itertools.count(), []
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        for step in minimise(
            lambda x: loss(x) * (math.nan if next(evaluations) == bad else 1),
            torch.full((1, 3, 5, 5), 0.5), "adam", optimize.AHEAD + 4, State(),
        ):  # fmt: skip
            seen.append(step)
    assert len(seen) <= 4  # none of those that were queued
    assert all(torch.isfinite(step.best).all() for step in seen)
