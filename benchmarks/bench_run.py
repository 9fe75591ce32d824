"""A whole short run, from pictures to picture: the engine at one scale and coarse to fine, and the baseline."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from engine import Stylizer

from . import cases
from .baseline import run

ITERATIONS = 20


@pytest.mark.parametrize("scales", [1, "auto"])
def test_engine(benchmark: BenchmarkFixture, problem: cases.Problem, scales: int | str) -> None:
    config = replace(problem.config, iterations=ITERATIONS, scales=scales)

    def fresh() -> tuple[tuple[Stylizer], dict[str, object]]:
        return (Stylizer(problem.weights, "cpu"),), {}  # so that graphs and style targets are made anew

    def work(stylizer: Stylizer) -> list[float]:
        return [loss for _, loss, _ in stylizer(problem.content, problem.style, config).trace]

    losses = benchmark.pedantic(work, setup=fresh, rounds=3)
    assert min(losses[-ITERATIONS:]) < 0.5 * losses[-ITERATIONS]
    benchmark.extra_info |= {"size": problem.size, "iterations": len(losses), "lowest_loss": min(losses[-ITERATIONS:])}


def test_baseline(benchmark: BenchmarkFixture, problem: cases.Problem) -> None:
    cases.weights(problem)

    def work() -> list[float]:
        return [loss for loss, _ in run(cases.build("eager", problem), problem.start, ITERATIONS)]

    losses = benchmark.pedantic(work, rounds=3)
    assert min(losses) < 0.5 * losses[0]
    benchmark.extra_info |= {"size": problem.size, "iterations": ITERATIONS, "lowest_loss": min(losses)}
