"""What a user waits for before the first iteration."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from engine import Stylizer
from engine.export import vgg
from engine.features import network as open_network

from . import cases


def _python(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True).stdout


def test_interpreter(benchmark: BenchmarkFixture) -> None:
    """Python alone, the floor of the next two."""
    assert benchmark(_python, "-c", "print('up')") == "up\n"


def test_help(benchmark: BenchmarkFixture) -> None:
    assert "usage:" in benchmark(_python, "-m", "engine.stylize", "--help")


def test_import(benchmark: BenchmarkFixture) -> None:
    assert benchmark(_python, "-c", "import engine, sys; print('torch' in sys.modules)") == "False\n"


def test_stylizer(benchmark: BenchmarkFixture, problem: cases.Problem) -> None:
    stylizer = benchmark.pedantic(Stylizer, (problem.weights, "cpu"), rounds=3)
    assert stylizer.weights_name == problem.weights


@pytest.mark.parametrize("device", ["cpu", "onnxruntime"])
def test_open_network(benchmark: BenchmarkFixture, problem: cases.Problem, device: str) -> None:
    width, height = problem.size
    layers = problem.config.layers
    spec = vgg.Spec(height, width, layers, blocked=device == "onnxruntime")
    network = benchmark.pedantic(
        lambda: open_network(cases.weights(problem), layers, device, "fp32", 2)(spec), rounds=3
    )
    network.image.copy_(problem.start)
    network.forward()
    assert float(network.parts[0].features[layers[-1]].sum()) > 0
    benchmark.extra_info["size"] = problem.size
