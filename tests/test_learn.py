import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.export import embedded, vgg
from engine.export.learn import RMS, Recipe, learn, main

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
def test_learning_is_deterministic_and_calibrated(tiny):
    torch.set_num_threads(1)
    with torch.inference_mode():
        first, second = learn(tiny, progress=False), learn(tiny, progress=False)
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        assert torch.isfinite(tensor.float()).all(), name
    assert {name.split(".")[0] for name in first} == {conv.name for conv in vgg.CONVS}


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
