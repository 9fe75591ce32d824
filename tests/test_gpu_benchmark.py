"""`benchmarks.gpu`, as far as it runs without a GPU: its sections on the CPU, and what holds them together."""

import json
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch

from benchmarks import gpu, gpu_sections

ROOT = gpu.machine.ROOT


@pytest.fixture
def rows(tmp_path):
    return gpu.Rows(tmp_path / "rows.json")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("no GPU: torch ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_every_section_has_a_limit():
    assert set(gpu.LIMITS) == set(gpu_sections.SECTIONS)


def test_a_section_that_breaks_is_named_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    def process(name, out, limit):
        gpu.Rows(out / f"{name}.json").add("check", name != "loop", value=1.0)
        return "exit 1: it broke" if name == "loop" else "ok"

    monkeypatch.setattr(gpu, "process", process)
    assert gpu.run(["kernels", "loop", "runs"], tmp_path) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert [section["status"] for section in report["sections"].values()] == ["ok", "exit 1: it broke", "ok"]
    assert report["sections"]["runs"]["rows"][0]["passed"]
    assert "failed: loop" in capsys.readouterr().out
    assert gpu.run(["kernels"], tmp_path) == 0
    monkeypatch.setattr(gpu, "MINUTES", 0)
    assert gpu.run(["kernels"], tmp_path) == 0
    assert "no time left" in capsys.readouterr().out


def test_a_section_is_a_process_whose_end_is_reported(tmp_path):
    if not torch.cuda.is_available():
        assert gpu.process("kernels", tmp_path, 60).startswith("exit 2: no GPU")
    assert gpu.process("kernels", tmp_path, 0.01) == "stopped after 0 s"


def test_a_bare_checkout_is_enough(tmp_path):
    """Neither installed nor under git, and without what a GPU machine may lack."""
    for folder in ("engine", "kernels", "export", "benchmarks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    hidden = """
import sys
sys.modules |= dict.fromkeys(("platformdirs", "pooch", "onnxruntime", "threadpoolctl"))  # None: not to be found
sys.meta_path = [each for each in sys.meta_path if "editable" not in str(each).lower()]
sys.path = [each for each in sys.path if "editable" not in each]
from benchmarks import cases, gpu, gpu_sections, machine
print(gpu_sections.kernels.__file__, machine.commit())
problem = cases.load(48)
print(cases.build("eager", problem).loss_and_gradient(problem.point(0))[0])
"""
    command = [sys.executable, "-c", hidden]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, commit, loss = done.stdout.split()
    assert file == str(tmp_path / "kernels" / "__init__.py")
    assert commit == "unknown"
    assert float(loss) > 0


def test_what_breaks_fails_its_row_and_the_section_goes_on(rows, monkeypatch):
    def errors(layers, given):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(gpu_sections, "layer_errors", errors)
    gpu_sections.check_kernels(rows, "cpu", sizes=(33,))
    *layers, last = rows.rows
    assert {row["failed"] for row in layers} == {"RuntimeError: no kernel image"}
    assert not any(row["passed"] for row in layers)
    assert last["passed"]
    with rows.attempt("engine"):
        raise gpu_sections.provider.BackendError("device cuda: cupy is missing")
    assert rows.rows[-1]["skipped"] == "device cuda: cupy is missing"


def test_kernels_agree_with_float64(rows):
    gpu_sections.check_kernels(rows, "cpu", sizes=(33,))
    assert len(rows.rows) == 7
    assert all(row["passed"] for row in rows.rows)


def test_a_wrong_gradient_is_seen():
    given = gpu_sections.layer_group(32, torch.float32, True, "cpu")
    layers = gpu_sections.kernels.Layers(given, 1.0, 100.0)
    layers.losses()
    layers.gradients()
    given["relu4_1"].cotangent[3, 2] *= -1
    layers.terms[1] *= 1.01
    loss, worst = gpu_sections.layer_errors(layers, given)
    assert loss > 0.009
    assert worst > 1e-4


def test_engines_are_checked_and_their_runs_compared(rows):
    gpu_sections.providers(rows, "cpu", ["engine-cpu", "engine-cudnn", "engine-cuda"], size=48)
    own, *others = rows.rows
    assert own["passed"], own
    assert own["early_error"] == 0
    if not torch.cuda.is_available():
        assert [row["skipped"][:12] for row in others] == ["device cudnn", "device cuda:"]


def test_the_loop_is_profiled(rows):
    gpu_sections.loop(rows, "cpu", ["engine-cpu"], size=48, count=2)
    assert all(row["passed"] for row in rows.rows)
    calls = Counter({"cudaEventSynchronize": 2, "cudaEventQuery": 9, "cudaMalloc": 1})
    assert gpu_sections.named(calls, gpu_sections.WAITS) == {"cudaEventSynchronize": 2}
    assert gpu_sections.named(calls, gpu_sections.ALLOCATIONS) == {"cudaMalloc": 1}


def test_times_are_taken(rows):
    gpu_sections.kernel_times(rows, "cpu", size=32)
    gpu_sections.our_part(rows, "cpu", ["engine-cpu"], size=48)
    assert 0 < rows.rows[-1]["our_part"] < 1
    gpu_sections.iteration(rows, "cpu", 48, ["eager", "engine-cpu", "engine-cuda"], rounds=1)
    found = {row["name"]: row for row in rows.rows}
    assert found["L-BFGS"]["us"] > 0
    assert found["engine-cpu"]["ratio"] > 0
    assert found["eager"]["ratio"] == 1
    gpu_sections.environment(rows, "cpu")
    assert "value" in rows.rows[-1]


@pytest.mark.slow
def test_whole_runs_are_compared(rows):
    gpu_sections.runs(rows, "cpu", 48, 10, ["engine-onnxruntime", "engine-cpu"])
    assert [row["name"] for row in rows.rows] == ["engine-onnxruntime", "engine-cpu"]


@pytest.mark.gpu
@pytest.mark.parametrize("section", ["environment", "kernels", "providers", "loop", "runs"])
def test_on_a_gpu(section, tmp_path):
    assert gpu.process(section, tmp_path, 300) == "ok", (tmp_path / f"{section}.json").read_text()
