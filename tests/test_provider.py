import contextlib
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import onnx
import pytest

from engine import BackendError, Stylizer, provider
from engine.export import commands, ort
from engine.kernels import vector


def wheels(monkeypatch, *installed):
    monkeypatch.setattr(ort, "_folder", lambda wheel: "site-packages" if wheel in installed else None)


def test_a_missing_runtime_names_the_install_line(monkeypatch):
    wheels(monkeypatch)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"not installed: pip install '.*\[cpu\]'"):
        ort.onnxruntime()
    with pytest.raises(BackendError, match=r"\[gpu\]"):
        ort.onnxruntime("gpu")


def test_the_cpu_needs_no_onnxruntime(monkeypatch):
    wheels(monkeypatch)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert Stylizer(weights="embedded", device="cpu").device == "cpu"


def test_doubled_wheels_are_told_apart(monkeypatch):
    wheels(monkeypatch, "onnxruntime", "onnxruntime-gpu")
    with pytest.raises(BackendError, match=r"both installed.*pip uninstall -y onnxruntime onnxruntime-gpu && pip"):
        Stylizer(device="onnxruntime")


def test_a_broken_wheel_is_told_apart(monkeypatch):
    wheels(monkeypatch, "onnxruntime")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match="does not load"):
        ort.onnxruntime()


def test_the_wheels_of_this_machine():
    names = {distribution.metadata["Name"] for distribution in metadata.distributions()}
    for wheel in ("onnxruntime", "onnxruntime-gpu"):
        assert bool(ort._folder(wheel)) == (wheel in names)


def test_wheels_in_folders_of_their_own_do_not_overwrite_each_other(monkeypatch):
    """The first on the path is the one that is imported."""
    monkeypatch.setattr(ort, "_folder", lambda wheel: f"{wheel}/site-packages")
    assert ort.onnxruntime() is sys.modules["onnxruntime"]


@pytest.mark.parametrize("device", provider.GPUS)
def test_a_gpu_that_is_not_there(device, monkeypatch):
    _skip_where_it_works(device)
    with pytest.raises(BackendError, match=rf"device {device}: .*pip install '.*\["):
        Stylizer(device=device)
    runtime = ort.onnxruntime()
    everything = list(provider.PROVIDERS.values())
    monkeypatch.setattr(runtime, "get_available_providers", lambda: everything)
    monkeypatch.setattr(provider.importlib.util, "find_spec", lambda name: name)  # all is installed
    if not _has_driver():
        with pytest.raises(BackendError, match=r"libcuda\.so\.1"):
            Stylizer(device=device)


@pytest.mark.parametrize(("module", "named"), [("cupy", "cupy"), ("cuda", "cuda-bindings")])
def test_a_package_that_a_gpu_needs_is_named(module, named, monkeypatch):
    monkeypatch.setattr(provider.ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(provider.importlib.util, "find_spec", lambda name: None if name == module else name)
    with pytest.raises(BackendError, match=rf"device cudnn: {named} is missing: pip install '.*\[cudnn"):
        Stylizer(device="cudnn")


def _skip_where_it_works(device):
    with contextlib.suppress(BackendError):
        provider.check(device)
        pytest.skip(f"{device} works here")


def _has_driver():
    import ctypes

    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.mark.parametrize("device", provider.GPUS)
def test_the_command_fails_with_the_install_line(device, tmp_path):
    _skip_where_it_works(device)
    command = [sys.executable, "-m", "engine.stylize", "--demo", "--device", device, "-o", str(tmp_path / "out.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install '" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("found", [None, ImportError("libcudnn.so.9"), AssertionError("Found 2 libcudnn.so.x")])
def test_a_cudnn_that_does_not_load(monkeypatch, found):
    """It is missing, or fails in its own ways once driver, CuPy and torch are all right."""

    def broken():
        raise found

    monkeypatch.setattr(provider.importlib.util, "find_spec", lambda name: found and name)
    monkeypatch.setattr(provider.ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "H200")
    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace(backend_version=broken))
    said = f"does not load .{found}" if found else "is missing"
    with pytest.raises(BackendError, match=rf"nvidia-cudnn-frontend {said}.*\[cudnn\]"):
        provider.check("cudnn")


def test_a_gpu_that_cuda_13_has_left_behind(monkeypatch):
    monkeypatch.setattr(provider.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(provider.ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: (7, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "Tesla V100")
    with pytest.raises(BackendError, match=r"device cudnn: Tesla V100 has compute capability 7\.0, 7\.5 is needed"):
        provider.check("cudnn")

    def forked(index):
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr("torch.cuda.get_device_capability", forked)
    assert provider.resolve("auto", "auto")[0] == "cpu"


@pytest.mark.parametrize(("checkout", "what"), [(True, None), (False, "gatys-engine")])
def test_the_install_line_is_that_of_a_checkout_or_of_the_package(monkeypatch, tmp_path, checkout, what):
    (tmp_path / "export").mkdir()
    if checkout:
        (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(commands, "__file__", str(tmp_path / "export" / "commands.py"))
    assert commands.install_line("gpu") == f"pip install '{what or tmp_path}[gpu]'"


def test_auto_takes_the_cpu_here_and_says_so(caplog):
    with caplog.at_level("INFO", logger="engine"):
        device, precision = provider.resolve("auto", "auto")
    if device == "cpu":
        assert "device: cpu" in caplog.text
        assert precision == ("bf16" if vector.halves_are_faster() else "fp32")


@pytest.mark.parametrize(
    ("processor", "features", "faster"),
    [
        ("znver4", "+avx512f,+avx512bf16", True),
        ("znver5", "+avx512f,+avx512bf16", True),
        ("znver4", "+avx512f", False),
        ("znver3", "+avx2", False),
        ("sapphirerapids", "+avx512f,+avx512bf16", False),
        ("generic", "", False),
    ],
)
def test_processors_that_multiply_bf16_faster(processor, features, faster):
    assert vector.halves_are_faster(processor, features.split(",")) == faster


@pytest.mark.parametrize(("faster", "precision"), [(True, "bf16"), (False, "fp32")])
def test_a_cpu_takes_bf16_where_it_is_faster(monkeypatch, caplog, faster, precision):
    monkeypatch.setattr("engine.kernels.vector.halves_are_faster", lambda: faster)
    assert provider.resolve("cpu", "auto") == ("cpu", precision)
    assert provider.resolve("cpu", "fp32") == ("cpu", "fp32")
    with caplog.at_level("INFO", logger="engine"):
        assert provider.resolve("cpu", "bf16") == ("cpu", "bf16")
    assert ("no faster than fp32" in caplog.text) != faster


def test_auto_takes_the_gpu_where_it_works(monkeypatch):
    monkeypatch.setattr(provider, "check", lambda device: None)
    assert provider.resolve("auto", "auto")[0] == "cudnn"

    def without_cudnn(device):
        if device == "cudnn":
            raise BackendError("not installed")

    monkeypatch.setattr(provider, "check", without_cudnn)
    assert provider.resolve("auto", "auto")[0] == "cuda"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("gpu", "auto"), "choose from auto, cpu"), (("cudaa", "auto"), "did you mean cuda"), (("cpu", "fp61"), "fp16")],
)
def test_unknown_names(arguments, words):
    with pytest.raises(ValueError, match=words):
        provider.resolve(*arguments)


def test_bf16_is_not_for_onnx_runtimes_own_kernels(monkeypatch):
    monkeypatch.setattr(provider, "check", lambda device: None)
    for device in ("cudnn", "tensorrt"):
        assert provider.resolve(device, "bf16") == (device, "bf16")
    assert provider.resolve("auto", "bf16") == ("cudnn", "bf16")
    for device, instead in (("cuda", "fp16"), ("onnxruntime", "fp32")):
        with pytest.raises(ValueError, match=f"bf16.*--device cpu, cudnn and tensorrt have; --precision {instead}"):
            provider.resolve(device, "bf16")


def test_what_a_cpu_does_not_compute_is_refused_rather_than_replaced(monkeypatch):
    """A mistake of who names the device as well; else the device that was found does not have it."""
    with pytest.raises(ValueError, match="precision fp16: device cpu has fp32 and bf16"):
        provider.resolve("cpu", "fp16")
    monkeypatch.setattr(provider, "_is_here", lambda device: device == "cpu")
    with pytest.raises(BackendError, match="precision fp16"):
        provider.resolve("auto", "fp16")
    assert provider.resolve("cpu", "bf16") == provider.resolve("auto", "bf16") == ("cpu", "bf16")


def test_a_graph_that_cannot_be_captured_runs_launch_by_launch(monkeypatch, caplog):
    """ONNX Runtime refuses the first attempt: the second one is taken, and both are told apart at INFO."""
    from engine import session

    tried = []

    class Runtime:
        SessionOptions, OrtValue = ort.onnxruntime().SessionOptions, ort.onnxruntime().OrtValue

        @staticmethod
        def set_default_logger_severity(level):
            assert level == 3

        @staticmethod
        def InferenceSession(content, options, providers):  # noqa: N802  # ONNX Runtime's name
            ((name, settings),) = providers
            tried.append((name, settings["prefer_nhwc"], settings.get("enable_cuda_graph")))
            assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
            if len(tried) < failures:
                raise RuntimeError("no graph here")
            return "session"

    monkeypatch.setattr(session, "onnxruntime", lambda: Runtime)
    model = onnx.helper.make_model(onnx.helper.make_graph([], "net", [], []))
    failures = 2
    with caplog.at_level("INFO", logger="engine"):
        found, settings = session._open(model, {}, "cuda", "fp16", 1, 77, True)
    assert found == "session"
    assert "enable_cuda_graph" not in settings
    assert tried == [("CUDAExecutionProvider", "1", "1"), ("CUDAExecutionProvider", "1", None)]
    assert "no graph here" in caplog.text
    failures = 9
    with pytest.raises(BackendError, match="device cuda: ONNX Runtime cannot open net"):
        session._open(model, {}, "cuda", "fp16", 1, 77, True)
    tried.clear()
    failures = 0
    session._open(model, {}, "cuda", "fp16", 1, 77, False)
    assert tried == [("CUDAExecutionProvider", "1", None)]


@pytest.fixture
def refused(monkeypatch):
    """Sessions on the CPU that take themselves for captured ones, and fail in their third run; whether each was."""
    import torch

    from engine import kernels, session

    opened = []
    open_one = session._open

    class Captured:
        def __init__(self, real):
            self._real, self._runs = real, 0

        def __getattr__(self, name):
            return getattr(self._real, name)

        def run_with_iobinding(self, binding, options):
            self._runs += 1
            if self._runs > 2:
                raise RuntimeError("operation not permitted when stream is capturing")
            self._real.run_with_iobinding(binding, options)

    def open_captured(*arguments):
        opened.append(arguments[-1])
        real, _ = open_one(*arguments)
        return (Captured(real), {"enable_cuda_graph": "1"}) if arguments[-1] else (real, {})

    monkeypatch.setattr(session, "_open", open_captured)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    kernels.announce_no_graph.cache_clear()
    return opened


def run_graphs(pictures):
    from engine import Config

    config = Config(size=48, iterations=6, scales=1)
    stylizer = Stylizer(weights="embedded", device="onnxruntime")
    return [step.loss for step in stylizer.steps(pictures["content"], pictures["style"], config)]


def test_a_capture_that_fails_at_run_time_goes_on_launch_by_launch(pictures, refused, caplog, monkeypatch):
    """The same losses, bit for bit; the reason is said once, though both graphs meet it."""
    with caplog.at_level("INFO", logger="engine"):
        found = run_graphs(pictures)
    assert refused[-2:] == [False, False]  # forward and VJP, opened again
    said = [record.message for record in caplog.records if "no CUDA graph" in record.message]
    assert len(said) == 1
    assert "ONNX Runtime: operation not permitted when stream is capturing" in said[0]
    monkeypatch.undo()
    assert found == run_graphs(pictures)


def test_captures_of_onnx_runtime_are_alone(pictures, monkeypatch):
    """It may capture in the first runs of each thread: nobody else does then, but later ones wait for nobody."""
    from concurrent.futures import ThreadPoolExecutor

    from engine import kernels, session
    from engine.export import vgg, weights

    open_one = session._open
    monkeypatch.setattr(session, "_open", lambda *given: (open_one(*given)[0], {"enable_cuda_graph": "1"}))
    spec = vgg.Spec(32, 32, ("relu1_1",))
    network = session.Features(spec, weights.load("embedded", spec.layers), "onnxruntime", 1, forward_only=True)
    graph, alone = network._forward, []
    real = graph._session

    class Watched:
        def run_with_iobinding(self, *given):
            alone.append(kernels.capturing.locked())
            real.run_with_iobinding(*given)

    graph._session = Watched()

    def run():
        for _ in range(5):
            graph.run()

    for _ in range(2):
        with ThreadPoolExecutor(1) as thread:
            thread.submit(run).result()
    assert alone == 2 * [True, True, True, False, False]
    assert not kernels.capturing.locked()


def test_a_stream_that_is_left_recording_is_no_place_to_go_on(pictures, refused, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(BackendError, match="left its stream recording"):
        run_graphs(pictures)


def test_other_failures_of_a_run_are_not_taken_for_a_capture(monkeypatch, pictures):
    from engine import session

    def broken(self, binding, options):
        raise RuntimeError("out of memory")

    runtime = ort.onnxruntime()
    monkeypatch.setattr(runtime.InferenceSession, "run_with_iobinding", broken)
    monkeypatch.setattr(session, "onnxruntime", lambda: runtime)
    with pytest.raises(BackendError, match=r"a run of ONNX Runtime broke \(out of memory\)"):
        run_graphs(pictures)


@pytest.fixture
def fake_gpu(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU A")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    return monkeypatch


def test_engines_are_kept_apart_by_graph_and_gpu(fake_gpu, own_cache):
    import torch

    folder = provider._engine_folder(b"graph")
    assert folder.is_relative_to(own_cache)
    assert provider._engine_folder(b"graph") == folder != provider._engine_folder(b"another")
    fake_gpu.setattr(torch.cuda, "get_device_name", lambda index: "GPU B")
    assert provider._engine_folder(b"graph") != folder


def test_a_corrupt_engine_is_thrown_away(fake_gpu):
    folder = provider._engine_folder(b"graph")
    assert len(list(provider.attempts("tensorrt", "fp16", 5, b"graph"))) == 1  # nothing to throw away
    (folder / "own.engine").write_text("corrupt")
    attempts = provider.attempts("tensorrt", "fp16", 5, b"graph")
    first = next(attempts)
    assert (folder / "own.engine").exists()
    second = next(attempts)
    assert first == second
    assert second["user_compute_stream"] == "5"
    assert not list(folder.iterdir())
    folder.rmdir()  # by another process
    assert list(attempts) == []
    attempts = provider.attempts("tensorrt", "fp16", 5, b"graph")
    next(attempts)
    (folder / "new.engine").write_text("of another process")
    assert list(attempts) == []
    assert (folder / "new.engine").exists(), "this one has not been tried"


def test_precision_auto_is_half_on_a_gpu(monkeypatch):
    monkeypatch.setattr(provider, "check", lambda device: None)
    assert provider.resolve("cuda", "auto") == ("cuda", "fp16")
    assert provider.resolve("cuda", "fp32") == ("cuda", "fp32")


def test_settings_of_the_cuda_provider():
    exact = list(provider.attempts("cuda", "fp32", 5, b""))
    assert [each.get("enable_cuda_graph") for each in exact] == ["1", None]
    assert {each["use_tf32"] for each in exact} == {each["prefer_nhwc"] for each in exact} == {"0"}
    for each in provider.attempts("cuda", "fp16", 5, b""):
        assert (each["use_tf32"], each["prefer_nhwc"], each["user_compute_stream"]) == ("1", "1", "5")


def test_a_graph_that_does_not_run_where_it_should_is_refused(monkeypatch):
    from engine import session
    from engine.export import vgg, weights

    spec = vgg.Spec(32, 32, ("relu1_1",))
    found = weights.load("embedded", spec.layers)
    session.Features(spec, found, "onnxruntime", 1, forward_only=True)
    monkeypatch.setattr(ort.onnxruntime().InferenceSession, "get_providers", lambda self: ["Other"])
    with pytest.raises(BackendError, match="CPUExecutionProvider did not start, Other did"):
        session.Features(spec, found, "onnxruntime", 1, forward_only=True)


def test_a_session_on_another_provider_is_refused():
    class Session:
        def get_providers(self):
            return ["CPUExecutionProvider"]

    provider.verify(Session(), "onnxruntime")
    with pytest.raises(BackendError, match="CUDAExecutionProvider did not start, CPUExecutionProvider did"):
        provider.verify(Session(), "cuda")
