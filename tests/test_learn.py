import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.export import embedded, vgg
from engine.export import learn as module
from engine.export.learn import RMS, Recipe, _calibration, learn, main

pytest.importorskip("skimage", reason="scikit-image brings the photographs")


@pytest.mark.parametrize("bits", [8, 4])
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_stored_filters_come_back(bits, seed):
    conv = vgg.CONVS[1]
    weight = torch.randn(64, 64, 3, 3, generator=torch.Generator().manual_seed(seed)) * torch.rand(64, 1, 1, 1)
    back = embedded.expand(*embedded.shrink(weight, bits), conv)
    assert back.shape == weight.shape
    assert (back - weight).norm() < (0.01 if bits == 8 else 0.13) * weight.norm()


@pytest.fixture(scope="module")
def tiny():
    """A recipe that learns in half a minute."""
    return Recipe(seed=3, pictures=16, side=128, patches=1200, rounds=2)


@pytest.mark.slow
def test_learning_is_deterministic(tiny):
    torch.set_num_threads(1)
    with torch.inference_mode():
        first, second = learn(tiny, progress=False), learn(tiny, progress=False)
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        assert torch.isfinite(tensor.float()).all(), name
    assert {name.split(".")[0] for name in first} == {conv.name for conv in vgg.CONVS}


def test_filters_pass_their_share_at_their_size():
    responses = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 9)
    length, bias = _calibration(responses, 0.45, 0.4)
    passed = (responses * length + bias).relu()
    assert ((passed > 0).float().mean(0) - 0.45).abs().max() < 0.01
    assert (passed.square().mean(0).sqrt() - 0.4).abs().max() < 1e-3


def test_the_same_seed_is_the_same_file_and_a_full_disk_leaves_the_old_one(monkeypatch, tmp_path, capsys):
    own = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    tensors = {"b": torch.ones(2), "a": torch.ones(3)}
    monkeypatch.setattr(module, "learn", lambda recipe, progress: tensors)
    out = tmp_path / "learned.safetensors"
    try:
        for seed in ("1", "1", "2"):
            assert main(["--out", str(out), "--seed", seed, "--quiet"]) == 0
        told = capsys.readouterr().err.splitlines()
        assert told[0] == told[1] != told[2]
        assert hashlib.sha256(out.read_bytes()).hexdigest() in told[2]

        def full(path, content):
            path.touch()
            raise OSError(28, "No space left on device")

        before = out.read_bytes()
        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            main(["--out", str(out), "--quiet"])
    finally:
        torch.set_num_threads(own[0])
        torch.use_deterministic_algorithms(own[1])
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert out.read_bytes() == before


def test_the_shipped_features_are_calibrated():
    """Every style layer of a picture has about the root mean square that it was calibrated to."""
    from engine.export import weights
    from engine.export.validate import picture

    net = weights.load("embedded", ("relu5_1",))
    layers = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
    with torch.no_grad():
        features = net.module(layers, "avg")(picture(160, 160, seed=5).float())
    for (layer, value), intended in zip(features.items(), RMS, strict=True):
        size = float(value.square().mean().sqrt())
        assert intended / 6 < size < 6 * intended, layer
        assert float((value > 0).float().mean()) > 0.1, layer


@pytest.mark.parametrize("colour", [(0.5, 0.5, 0.5), (0.47, 0.45, 0.41), (0.42, 0.31, 0.29), (0.3, 0.5, 0.4)])
def test_the_shipped_features_see_a_flat_area(colour):
    """Whose style gradient is a multiple of its activations: it would stay as it is."""
    from engine.export import weights
    from engine.export.validate import picture

    layer = ("relu1_1",)
    module = weights.load("embedded", layer).module(layer, "avg")
    flat = torch.tensor(colour).reshape(1, 3, 1, 1).expand(1, 3, 32, 32)
    with torch.no_grad():
        usual = module(picture(160, 160, seed=5).float())["relu1_1"].norm(dim=1).mean()
        passed = module(flat)["relu1_1"][0, :, 16, 16]
    assert float(passed.norm()) > 0.3 * float(usual)
    assert float((passed > 0).float().mean()) > 0.7


def test_learned_filters_are_smoother_than_noise():
    """Neighbouring taps of the first layer agree, as edges and colour blobs do and random taps do not."""
    first = embedded.load_embedded(vgg.CONVS[:1])["conv1_1.weight"].numpy()
    across = np.corrcoef(first[..., :-1].ravel(), first[..., 1:].ravel())[0, 1]
    assert across > 0.3


def test_the_command_needs_a_file(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
