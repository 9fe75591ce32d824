"""One iteration (loss, gradient, optimiser step) of the baseline, its stronger variants and each of our runtimes."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from engine import provider
from engine.export.ort import MissingError

from . import cases, machine

pytestmark = pytest.mark.filterwarnings("default")  # torch.compile warns of its own code


@pytest.mark.parametrize("name", [*cases.RIVALS, *cases.ENGINES])
def test_iteration(benchmark: BenchmarkFixture, problem: cases.Problem, name: str) -> None:
    if name in cases.ENGINES:
        try:
            provider.check(cases.ENGINES[name][0])
        except MissingError as error:
            pytest.skip(str(error))
    error = cases.strict_error(name, problem)
    assert error <= (cases.STRICT if cases.exact(name) else 0.5)
    iterator = cases.build(name, problem).iterate(problem.start)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def finished() -> None:
        next(iterator)
        machine.now(device)

    benchmark.pedantic(finished, rounds=5, warmup_rounds=3)
    benchmark.extra_info |= {"size": problem.size, "gflop": problem.gflop, "gradient_error": error}
    if benchmark.stats:  # none with --benchmark-disable
        benchmark.extra_info["gflop_per_s"] = problem.gflop / benchmark.stats.stats.median
