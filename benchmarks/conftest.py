"""Option and fixture of the benchmarks.

`pytest benchmarks -o addopts= -o python_files='bench_*.py' --benchmark-only`: the project's settings skip benchmarks.
"""

from __future__ import annotations

import pytest

from . import cases


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--size", type=int, default=256, help="long side of the benchmarks' pictures (default 256)")


@pytest.fixture(scope="session")
def problem(request: pytest.FixtureRequest) -> cases.Problem:
    return cases.load(request.config.getoption("--size"))
