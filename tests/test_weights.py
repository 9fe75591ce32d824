import hashlib
import http.server
import json
import multiprocessing
import os
import threading
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracle import random_state
from safetensors import safe_open
from safetensors.torch import save_file

from engine.export import embedded, vgg, weights


def test_embedded_is_the_same_every_time():
    first, second = (weights.load("embedded", ("relu2_2",)) for _ in range(2))
    assert first.digest == second.digest
    assert set(first.parameters) == {f"{conv.name}.{part}" for conv in vgg.CONVS[:4] for part in ("weight", "bias")}


def test_embedded_keeps_activations_of_order_one():
    from engine.export.validate import picture

    net = weights.load("embedded", ("relu5_1",))
    layers = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
    with torch.no_grad():
        features = net.module(layers, "avg")(picture(128, 128, seed=5).float())
    for layer, value in features.items():
        assert 0.05 < float(value.square().mean().sqrt()) < 20, layer


def test_embedded_file_is_the_one_that_was_learned():
    """Its hash, its size, its recipe."""
    content = embedded.FILE.read_bytes()
    assert len(content) <= 8 * 2**20
    assert hashlib.sha256(content).hexdigest() == "06cd2b4a3ddd31620038217a261ae3c8be4e8c279099e2c162c0b494b9c0d3ab"
    with safe_open(embedded.FILE, framework="pt") as file:
        recipe = json.loads(file.metadata()["recipe"])
    assert {"seed", "data", "versions", "method"} <= set(recipe)


def test_embedded_features_that_are_made_from_a_seed_stay_the_same():
    """The file holds no filters of the deepest convolutions, which manifests and checkpoints know by their hash."""
    from engine.export.validate import picture

    layers = ("relu5_1", "relu5_2", "relu5_3", "relu5_4")
    net = weights.load("embedded", layers)
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):  # others draw with other last bits
        assert net.digest == "863392997902089c0248c2df7419c8f771339d89bb74d795177dd9469613164e"
    with safe_open(embedded.FILE, framework="pt") as file:
        made = [conv for conv in vgg.CONVS if f"{conv.name}.weight" not in file.keys()]  # noqa: SIM118
    assert [conv.name for conv in made] == ["conv5_2", "conv5_3", "conv5_4"]
    for conv in made:
        kernel = net.parameters[f"{conv.name}.weight"]
        assert (kernel.mean((1, 2, 3)).abs() < 1e-4 * kernel.std((1, 2, 3))).all()
    with torch.no_grad():
        features = net.module(layers, "avg")(picture(160, 160, seed=5).float())
    for layer, value in features.items():
        assert 0.1 < float(value.square().mean().sqrt() / features["relu5_1"].square().mean().sqrt()) < 10, layer


def test_a_shallow_cut_is_the_head_of_a_deep_one():
    shallow, deep = weights.load("embedded", ("relu1_2",)), weights.load("embedded", ("relu4_1",))
    for key, value in shallow.parameters.items():
        assert torch.equal(value, deep.parameters[key])


@pytest.mark.parametrize("naming", ["torchvision", "caffe"])
def test_files_in_both_namings(states, naming):
    path, state = states[naming]
    net = weights.load(path, ("relu5_4",))
    first = next(iter(state.values()))
    expected = first if naming == "torchvision" else first.flip(1)  # BGR -> RGB
    assert torch.equal(net.parameters["conv1_1.weight"], expected)
    assert net.std == (weights.IMAGENET_STD if naming == "torchvision" else weights.CAFFE_STD)
    assert len(net.parameters) == 32


def test_the_caffe_network_in_torchvisions_names(states, tmp_path):
    """neural-style-pt's file: BGR and 0-255 are told by the number in its name."""
    state = states["torchvision"][1]
    save_file(state, tmp_path / "vgg19-d01eb7cb.safetensors")
    net = weights.load(tmp_path / "vgg19-d01eb7cb.safetensors", ("relu5_4",))
    assert torch.equal(net.parameters["conv1_1.weight"], state["features.0.weight"].flip(1))
    assert (net.mean, net.std, net.kind) == (weights.CAFFE_MEAN, weights.CAFFE_STD, "caffe")
    kinds = {naming: weights.load(path, ("relu1_1",)).kind for naming, (path, _) in states.items()}
    assert kinds == {"torchvision": "imagenet", "caffe": "caffe"}


def test_parameters_that_want_gradients(tmp_path):
    state = {name: torch.nn.Parameter(value) for name, value in random_state().items()}
    torch.save(state, tmp_path / "net.pth")
    found = weights.load(tmp_path / "net.pth", ("relu1_2",))
    assert np.array_equal(found.parameters["conv1_2.bias"].numpy(), state["features.2.bias"].detach().numpy())


def test_a_cache_below_a_folder_that_may_not_be_searched_is_none(monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(weights.Path, "is_file", refuse)
    assert weights.load("auto", ("relu1_1",)).kind == "embedded"


def test_auto_prefers_imagenet_in_the_cache(own_cache, caplog):
    with caplog.at_level("INFO"):
        assert weights.load("auto", ("relu1_1",)).name == "embedded"
    assert "--weights imagenet" in caplog.text
    save_file(random_state(), own_cache / f"vgg19-imagenet-{weights.IMAGENET_SHA256[:16]}.safetensors")
    assert weights.load("auto", ("relu1_1",)).name == "imagenet"


def broken(tmp_path, kind):
    path = tmp_path / "bad.safetensors"
    state = random_state()
    if kind == "not a file of this kind":
        path.write_bytes(b"nothing of the sort" * 10)
    elif kind == "other names":
        save_file({"layer": torch.zeros(3)}, path)
    elif kind == "missing layer":
        del state["features.28.bias"]
        save_file(state, path)
    elif kind == "wrong shape":
        state["features.0.weight"] = torch.zeros(64, 1, 3, 3)
        save_file(state, path)
    elif kind == "NaN":
        state["features.5.bias"][7] = torch.nan
        save_file(state, path)
    elif kind == "pickle that runs code":
        path = tmp_path / "bad.pth"
        torch.save({"features.0.weight": os.system}, path)
    elif kind == "no dictionary":
        path = tmp_path / "bad.pth"
        torch.save([1, 2], path)
    elif kind in ("sparse", "meta", "complex"):
        path, tensor = tmp_path / "bad.pth", state["features.0.weight"]
        kinds = {"sparse": tensor.to_sparse, "meta": partial(tensor.to, "meta")}
        state["features.0.weight"] = kinds.get(kind, partial(tensor.to, torch.complex64))()
        torch.save(state, path)
    elif kind == "no tensor":
        path = tmp_path / "bad.pth"
        torch.save({"features.0.weight": 3}, path)
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("not a file of this kind", "not a state dict"),
        ("other names", "neither"),
        ("missing layer", "features.28.bias is missing"),
        ("wrong shape", r"needs \(64, 3, 3, 3\)"),
        ("NaN", "NaN or infinity"),
        ("pickle that runs code", "safely"),
        ("no dictionary", "not a state dict"),
        ("no tensor", "not a tensor"),
        ("sparse", r"features\.0\.weight holds no floats \(torch\.float32, torch\.sparse_coo, cpu\)"),
        ("meta", r"holds no floats \(torch\.float32, torch\.strided, meta\)"),
        ("complex", r"holds no floats \(torch\.complex64"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_bad_files_are_told_apart(tmp_path, kind, words):
    with pytest.raises(ValueError, match=words):
        weights.load(broken(tmp_path, kind), ("relu5_1",))


def test_unknown_names():
    with pytest.raises(ValueError, match="choose auto"):
        weights.load("imagenett")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        weights.load("missing.pth")


class Server:
    """Serves one file on 127.0.0.1; the first `cuts` answers stop half-way, the first `errors` are 500s."""

    def __init__(self, content: bytes, cuts: int = 0, errors: int = 0, delay: float = 0) -> None:
        self.requests = 0
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.requests += 1
                if server.requests <= errors:
                    self.send_error(500)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                time.sleep(delay)
                self.wfile.write(content[: len(content) // 2] if server.requests <= cuts else content)

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/vgg19.pth"

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small stand-in for the checkpoint, which also has a classifier."""
    path = tmp_path_factory.mktemp("checkpoint") / "vgg19.pth"
    state = {key: value[:1, :1].half() if value.ndim == 4 else value[:1] for key, value in random_state().items()}
    torch.save({**state, "classifier.0.weight": torch.zeros(9)}, path)
    return path.read_bytes()


@pytest.fixture
def source(monkeypatch, checkpoint):
    """Point the download at a local server: a function (server, sha256 or None)."""

    def point(server, digest=None):
        monkeypatch.setattr("pooch.core.time", SimpleNamespace(sleep=lambda seconds: None))  # between two attempts
        monkeypatch.setattr(weights, "_imagenet_url", lambda: server.url)
        monkeypatch.setattr(weights, "IMAGENET_SHA256", digest or hashlib.sha256(checkpoint).hexdigest())

    return point


def fetch(folder):
    target = folder / "vgg19-imagenet.safetensors"
    weights._fetch_imagenet(target)
    return target


def test_download_verifies_converts_and_cleans_up(own_cache, source, checkpoint, capsys):
    with Server(checkpoint) as server:
        source(server)
        target = fetch(own_cache)
        fetch(own_cache)  # there already
    assert server.requests == 1
    with safe_open(target, framework="pt") as file:
        assert len(file.keys()) == 32
        assert file.metadata()["source_sha256"] == hashlib.sha256(checkpoint).hexdigest()
    assert "100%" in capsys.readouterr().err  # the progress bar
    assert {path.suffix for path in own_cache.iterdir()} <= {".safetensors", ".lock"}


@pytest.mark.parametrize("trouble", [{"cuts": 2}, {"errors": 2}])
def test_cut_connection_starts_afresh(own_cache, source, checkpoint, trouble):
    with Server(checkpoint, **trouble) as server:
        source(server)
        assert fetch(own_cache).is_file()
    assert server.requests == 3


def test_server_that_stays_broken_is_an_error_and_leaves_nothing(own_cache, source, checkpoint):
    with Server(checkpoint, errors=99) as server:
        source(server)
        with pytest.raises(OSError, match="could not download"):
            fetch(own_cache)
    assert server.requests == 3
    assert {path.suffix for path in own_cache.iterdir()} <= {".lock"}


def test_a_full_disk_leaves_nothing_behind(own_cache, source, checkpoint, monkeypatch, capsys, caplog):
    caplog.set_level("WARNING", logger="engine")

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights.os, "fsync", full)
    with Server(checkpoint) as server:
        source(server)
        with pytest.raises(OSError, match="No space left"):
            fetch(own_cache)
    assert {path.suffix for path in own_cache.iterdir()} <= {".lock"}
    assert capsys.readouterr().err == ""  # no bar where nothing below warnings is wanted


def test_wrong_hash_is_refused_and_deleted(own_cache, source, checkpoint):
    with Server(checkpoint) as server:
        source(server, "0" * 64)
        with pytest.raises(OSError, match="sha256 differs"):
            fetch(own_cache)
    assert {path.suffix for path in own_cache.iterdir()} <= {".lock"}


def test_cache_that_cannot_be_written_is_named(tmp_path, source, checkpoint, monkeypatch):
    """A read-only folder, as root sees it too: the folder's place is taken by what refuses."""

    def refuse(self, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(weights.Path, "mkdir", refuse)
    with Server(checkpoint) as server:
        source(server)
        with pytest.raises(PermissionError, match="STYLIZE_HOME"):
            fetch(tmp_path / "cache")
    assert server.requests == 0


def _fetch_in_process(folder, url, digest):
    weights._imagenet_url = lambda: url
    weights.IMAGENET_SHA256 = digest
    weights._fetch_imagenet(folder / "vgg19-imagenet.safetensors")


def test_two_processes_at_once_download_once(own_cache, checkpoint):
    context = multiprocessing.get_context("spawn")
    with Server(checkpoint, delay=1.0) as server:
        arguments = (own_cache, server.url, hashlib.sha256(checkpoint).hexdigest())
        processes = [context.Process(target=_fetch_in_process, args=arguments) for _ in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert server.requests == 1


def test_imagenet_loads_through_the_cache(own_cache, monkeypatch):
    calls = []

    def fake_fetch(target):
        calls.append(target)
        save_file(random_state(), target)

    monkeypatch.setattr(weights, "_fetch_imagenet", fake_fetch)
    first, second = (weights.load("imagenet", ("relu1_1",)) for _ in range(2))
    assert len(calls) == 1
    assert calls[0].parent == own_cache
    np.testing.assert_array_equal(first.parameters["conv1_1.bias"], second.parameters["conv1_1.bias"])


def test_the_published_hash_and_address():
    assert weights.IMAGENET_SHA256.startswith("dcbb9e9d")
    assert weights._imagenet_url().endswith("vgg19-dcbb9e9d.pth")


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("STYLIZE_HOME", str(tmp_path / "there"))
    assert weights.cache_folder() == tmp_path / "there"
    assert not weights.cache_folder().exists()
    monkeypatch.delenv("STYLIZE_HOME")
    assert weights.cache_folder().name == "gatys-engine"
