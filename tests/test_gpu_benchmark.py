"""`benchmarks.gpu`, as far as it runs without a GPU: its sections on the CPU, and what holds them together."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import SHALLOW
from PIL import Image

import engine
from benchmarks import baseline, cases, controls, gpu, gpu_kernels, gpu_options, gpu_sections
from engine import BackendError, Config, replay

ROOT = gpu.machine.ROOT
CHECKS = ("environment", "kernels", "providers", "loop", "options", "going-on", "runs", "forecast", "pictures")


@pytest.fixture(autouse=True)
def one_thread():
    """Several are many times slower beside other work, and these pictures are tiny."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    assert {*gpu.LIMITS, *gpu.ON_REQUEST} == set(gpu_sections.SECTIONS)
    assert not {*gpu.LIMITS} & {*gpu.ON_REQUEST}
    assert set(CHECKS) <= set(gpu.LIMITS)


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
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    monkeypatch.setattr(gpu, "MINUTES", 0)
    assert gpu.run(["kernels", "autotuned-512"], tmp_path) == 0
    assert "no time left for kernels, autotuned-512\n" in capsys.readouterr().out


def test_what_is_skipped_is_named_and_fails_where_it_is_required(tmp_path, monkeypatch, capsys):
    def process(name, out, limit):
        rows = gpu.Rows(out / f"{name}.json")
        rows.skip("engine-cudnn", "device cudnn: cupy is missing")
        rows.skip("engine-cudnn-fp16", "device cudnn: cupy is missing")
        rows.add("engine-cuda", True)
        return "ok"

    monkeypatch.setattr(gpu, "process", process)
    assert gpu.run(["providers", "loop"], tmp_path, ["cuda"]) == 0
    told = capsys.readouterr().out
    assert told.count("skipped: engine-cudnn, engine-cudnn-fp16: device cudnn: cupy is missing") == 1
    assert gpu.run(["providers"], tmp_path, ["cuda", "cudnn"]) == 1
    assert "providers: required, but skipped: engine-cudnn, engine-cudnn-fp16" in capsys.readouterr().out


def test_a_section_is_a_process_whose_end_is_reported(tmp_path, monkeypatch, capfd):
    if not torch.cuda.is_available():
        assert gpu.process("kernels", tmp_path, 60).startswith("exit 2: no GPU")
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\necho half way >&2\nsleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    assert gpu.process("kernels", tmp_path, 1) == "stopped after 1 s: half way"
    assert "half way" in capfd.readouterr().err


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
del sys.modules["threadpoolctl"]  # without it there is no painting
from engine import stylize
own = ["--size", "48", "--scales", "1", "--iterations", "1", "--weights", "embedded", "--device", "cpu", "--quiet"]
sys.exit(stylize.main(["--demo", *own, "-o", "out.png"]))
"""
    command = [sys.executable, "-c", hidden]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, commit, loss = done.stdout.split()
    assert file == str(tmp_path / "kernels" / "__init__.py")
    assert commit == "unknown"
    assert float(loss) > 0
    assert replay.read(tmp_path / "out.png")["versions"]["gatys-engine"] == engine.__version__


def test_what_breaks_fails_its_row_and_the_section_goes_on(rows, monkeypatch):
    def errors(layers, given):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(gpu_kernels, "layer_errors", errors)
    gpu_kernels.check_kernels(rows, "cpu", sizes=(33,))
    layers, others = rows.rows[:6], rows.rows[6:]
    assert {row["failed"] for row in layers} == {"RuntimeError: no kernel image"}
    assert not any(row["passed"] for row in layers)
    assert all(row["passed"] for row in others)
    with rows.attempt("engine"):
        raise gpu_sections.MissingError("device cuda: cupy is missing")
    assert rows.rows[-1]["skipped"] == "device cuda: cupy is missing"
    with rows.attempt("engine"):
        raise BackendError("device cudnn: none of the plans runs here")  # it is there, and broken
    assert rows.rows[-1]["passed"] is False


def test_kernels_agree_with_float64(rows):
    gpu_kernels.check_kernels(rows, "cpu", sizes=(33,))
    assert len(rows.rows) == 6 + len(gpu_kernels.FORMS) + 1 + len(gpu_kernels.OPTIMISERS)
    assert all(row["passed"] for row in rows.rows)


def test_a_wrong_gradient_is_seen(monkeypatch):
    given = gpu_kernels.layer_group(32, torch.float32, True, "cpu")
    layers = gpu_kernels.kernels.losses([given], 1.0, 100.0)
    layers.losses()
    layers.gradients()
    given["relu4_1"].cotangent[3, 2] *= -1
    layers.terms[1] *= 1.01
    loss, cotangent = gpu_kernels.layer_errors(layers, given)
    assert loss > 0.009
    assert cotangent > 1e-4
    given["relu5_1"].cotangent[0, 0] = torch.nan  # it was not written
    layers.terms[-1] = torch.nan
    assert not any(error < 1 for error in gpu_kernels.layer_errors(layers, given))
    truth = gpu_kernels.total_variation_reference
    monkeypatch.setattr(gpu_kernels, "total_variation_reference", lambda *given: truth(*given[:3], "mean"))
    assert min(gpu_kernels.variation_errors("nine-point", "cpu")) > 0.01
    other = gpu_kernels.temporal_reference
    monkeypatch.setattr(gpu_kernels, "temporal_reference", lambda x, y, certain: other(x, y, certain**2))
    assert min(gpu_kernels.temporal_errors("cpu")) > 0.01


def test_engines_are_checked(rows):
    gpu_sections.providers(rows, "cpu", ["engine-cpu", "engine-cudnn", "engine-cuda"], size=48)
    own, *others = rows.rows
    assert own["passed"], own
    assert own["early_error"] == 0
    assert 0 < own["features_error"] < 1e-5
    assert 0 < own["vjp_error"] < 1e-4
    if not torch.cuda.is_available():
        assert [row["skipped"][:12] for row in others] == ["device cudnn", "device cuda:"]


def test_the_loop_is_profiled(rows):
    gpu_sections.loop(rows, "cpu", ["engine-cpu"], size=48, count=2)
    assert rows.rows[0]["passed"]
    launched = Counter({"cudaGraphLaunch": 2, "cudaEventQuery": 9})
    for calls, requests, fine in (
        (launched, 0, True),
        (launched, 1, False),
        (Counter(), 0, False),  # the profiler saw nothing
        (launched + Counter({"cudaMemcpy": 1}), 0, False),
        (launched + Counter({"cudaMalloc": 1}), 0, False),
    ):
        assert gpu_sections.judged(calls, requests, "cuda")[0] == fine


@pytest.mark.filterwarnings("ignore:Please use the new API")  # of some versions of torch
def test_rivals_round_as_a_good_user_has_it_and_nobody_else():
    products = torch.backends.cuda.matmul
    for allowed in (True, False):
        with baseline.tf32("cuda", allowed):
            assert products.allow_tf32 == torch.backends.cudnn.allow_tf32 == allowed
            assert torch.backends.cudnn.benchmark
        assert torch.get_float32_matmul_precision() == "highest"
    assert cases.precision("eager", "cuda") == "tf32"
    assert cases.precision("autocast", "cuda") == cases.precision("engine-cuda-fp16", "cuda") == "fp16"


def test_times_are_taken(rows, monkeypatch):
    monkeypatch.setattr(gpu_sections, "seconds_of_gpu", lambda work, device: gpu_kernels.seconds(work, device, 1, 2))
    gpu_kernels.kernel_times(rows, "cpu", size=32)
    gpu_sections.our_part(rows, "cpu", ["engine-cpu"], size=48)
    assert rows.rows[-1]["our_part"] < 1
    gpu_sections.iteration(rows, "cpu", 48, ["eager", "engine-cpu", "engine-cuda"], rounds=1)
    gpu_sections.environment(rows, "cpu")
    found = {row["name"]: row for row in rows.rows}
    assert min(found[name]["us"] for name in ("L-BFGS", "Adam")) > 0
    assert found["engine-cpu"]["ratio"] > 0
    assert found["engine-cpu"]["passed"]
    assert found["eager"]["ratio"] == 1
    assert found["eager"]["share_of_products"] > 0
    assert "value" in rows.rows[-1]


def test_an_engine_with_a_wrong_gradient_fails_beside_its_time(rows, monkeypatch):
    def start(rows, *given, **options):
        for name, row in rows.items():
            row |= {"error": 0.05, "iterations_per_s": 1.0, "ratio": 1.0, "gflop_per_s": 1.0, "variant": name}
        return {}

    monkeypatch.setattr(gpu_sections.timing, "start", start)
    monkeypatch.setattr(gpu_sections.timing, "in_turns", lambda *given: None)
    monkeypatch.setattr(gpu_sections, "products", lambda *given: 1.0)
    gpu_sections.iteration(rows, "cpu", 48, ["eager", "engine-cudnn-fp16", "engine-cudnn"])
    assert [row["passed"] for row in rows.rows] == [None, False, False]


def test_whole_runs_are_compared_in_fp32(rows, monkeypatch):
    """With an engine whose pictures are their losses."""
    losses = {"fp32": 2.0, "fp16": 2.019, "bf16": 2.021}

    class Stub:
        def __init__(self, weights, device, precision="fp32"):
            self.device, self.precision = device, precision

        def __call__(self, content, style, config):
            iterate = SimpleNamespace(best=torch.full((1, 3, 2, 2), losses[self.precision]))
            return SimpleNamespace(last=SimpleNamespace(precision=self.precision, _iterate=iterate), trace=[(48, 9, 1)])

        def objective(self, content, style, config):
            assert (self.device, self.precision) == ("cpu", "fp32")
            return SimpleNamespace(evaluate=lambda pixels, with_gradient: (SimpleNamespace(total=pixels.mean()), None))

    monkeypatch.setattr(gpu_sections, "Stylizer", Stub)
    fp16 = "engine-cuda-fp16"
    gpu_sections.runs(rows, "cpu", 48, 3, [fp16, "engine-cudnn", fp16, "engine-cudnn-bf16"])
    assert [row["passed"] for row in rows.rows] == [False, True, True, False]
    assert rows.rows[0]["failed"] == "ValueError: no run in fp32 came before it, to compare it with"
    assert rows.rows[2]["error"] == pytest.approx(0.0095, abs=1e-5)


@pytest.mark.slow
def test_whole_runs_of_two_engines_agree(rows):
    gpu_sections.runs(rows, "cpu", 48, 10, ["engine-onnxruntime", "engine-cpu"])
    assert all(row["passed"] for row in rows.rows), rows.rows
    assert all(row["loss"] == pytest.approx(row["told"], rel=1e-4) for row in rows.rows)


def test_ways_to_the_gram_matrices_are_timed(rows, monkeypatch):
    monkeypatch.setattr(gpu_sections, "GPU_HISTORY", 1)
    monkeypatch.setattr(gpu_sections, "seconds_of_gpu", lambda work, device: work() and 1e-6)
    monkeypatch.setattr(gpu_sections, "seconds_of_network", lambda objective, device: 1e-6)
    places = gpu_sections.kernels.layers, gpu_sections.fused.Features
    before = [dict(vars(place)) for place in places]
    gpu_sections.gram_matrices(rows, "cpu", "engine-cpu", (48,))
    assert [row["name"] for row in rows.rows] == [f"48: {name}" for name in gpu_sections.WAYS]
    assert all(row["iteration_us"] == 1 and row["our_part"] == 0 for row in rows.rows)
    assert [dict(vars(place)) for place in places] == before
    assert {name for changes in gpu_sections.WAYS.values() for name in changes} <= set().union(*before)


def test_memory_is_compared_with_its_forecast(rows, stylizer, monkeypatch):
    monkeypatch.setattr(gpu_sections, "Stylizer", lambda *given, **kept: stylizer)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2**20)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    problem = cases.load(48)
    config = replace(problem.config, iterations=1)
    told = stylizer.forecast(problem.content, problem.style, config).total
    for times in (1.1, 0.9, 1.25, 0.8):
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda times=times: 2**20 + told / times)
        gpu_sections.forecast(rows, "cpu", "engine-cpu", (48,), 1)
    assert [row["passed"] for row in rows.rows[::3]] == [True, True, False, False]
    names = ["engine-cpu 48, networks let go", "engine-cpu 48", "engine-cpu 48, networks let go, window 512"]
    assert [row["name"] for row in rows.rows[:3]] == names
    assert rows.rows[0]["forecast_mib"] == told / 2**20


def test_options_are_compared_with_the_cpu(rows):
    names, engines = ("default", "tile", "freeze", "adam"), ("engine-onnxruntime", "engine-cpu", "engine-cudnn")
    gpu_options.options(rows, "cpu", engines, names, size=48, iterations=3)
    found = [row["name"] for row in rows.rows if "skipped" not in row and "cudnn" not in row["name"]]
    assert found == [f"{engines[0]} {name}" for name in names] + [f"{engines[1]} {name}" for name in names[:3]]
    assert all(row["passed"] for row in rows.rows if "skipped" not in row), rows.rows


@pytest.mark.parametrize("option", gpu_options.OF_A_RUN[1:])
def test_an_option_that_does_nothing_is_seen(option, trial, monkeypatch):
    """Of those that loss and gradient of a picture do not know: a run without it stands in for the device's."""
    _, *others = gpu_options.OPTIONS[option] or [None]
    monkeypatch.setitem(gpu_options.OPTIONS, "others", {name: gpu_options.OPTIONS[option][name] for name in others})
    errors, most = trial.errors(trial.found(trial.cpu, "others"), option), gpu_options.limits(option, "fp16")
    assert errors["loss_error"] == errors["gradient_error"] == 0
    assert errors["end_error"] > 1.2 * most["end_error"]
    assert errors.get("frozen_levels", 99) > 9


@pytest.fixture(scope="module")
def trial():
    class Shallow(gpu_options.Trial):
        def _given(self, option):
            content, styles, config, masks = super()._given(option)
            return content, styles, replace(config, style_layers=SHALLOW), masks

    return Shallow(48, 30)


def test_runs_go_on_and_share_a_stylizer(rows, stylizer, monkeypatch):
    monkeypatch.setattr(gpu_options, "Stylizer", lambda *given: stylizer)
    gpu_options.going_on(rows, "cpu", ["engine-cpu"], size=48, iterations=4)
    assert len(rows.rows) == 9
    assert all(row["passed"] for row in rows.rows), rows.rows
    assert {row.get("pixel_levels", 0) for row in rows.rows} == {0}


def test_a_few_pixels_may_differ(rows):
    truth = Image.new("RGB", (50, 40))
    for count in (20, 21):
        found = truth.copy()
        found.paste((9, 0, 0), (0, 0, count, 1))
        gpu_options._compare(rows, str(count), (found, 1.0), (truth, 1.0))
    assert [row["passed"] for row in rows.rows] == [True, False]
    assert rows.rows[0]["pixel_levels"] == 9


def test_pictures_are_left_to_be_looked_at(rows, stylizer, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_options, "Stylizer", lambda *given: stylizer)
    monkeypatch.setattr(controls, "cells", lambda *given: [(["one"], Image.new("RGB", (60, 40)))])
    gpu_options.pictures(rows, "cpu", "engine-cpu", Config(size=64, iterations=1))
    for name in ("controls", "default"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.width > 60


@pytest.mark.gpu
@pytest.mark.parametrize("section", CHECKS)
def test_on_a_gpu(section, tmp_path):
    status, file = gpu.process(section, tmp_path, 300), tmp_path / f"{section}.json"
    assert status == "ok", file.read_text() if file.exists() else status
    rows = json.loads(file.read_text())
    rows = [row for row in rows if row["name"].startswith("engine-cudnn")] or rows
    if all("skipped" in row for row in rows):
        pytest.skip("; ".join({row["skipped"] for row in rows}) or "nothing ran")
