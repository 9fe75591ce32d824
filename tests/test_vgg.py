import numpy as np
import pytest
import torch
from torchvision.models.vgg import cfgs, vgg19

from engine.export import vgg


def test_table_is_torchvisions_vgg19():
    plan = []
    for conv in vgg.CONVS:
        plan += (["M"] if conv.after_pool else []) + [conv.out_channels]
    assert [*plan, "M"] == cfgs["E"]


def test_cut_keeps_nothing_behind_the_deepest_layer():
    assert vgg.cut(["relu1_1", "relu3_1"])[-1].name == "conv3_1"
    assert vgg.cut(["conv3_1", "relu1_1"])[-1].name == "conv3_1"
    assert len(vgg.cut(["relu5_4"])) == len(vgg.cut(["conv5_4"])) == 16


@pytest.mark.parametrize("size", [(32, 32), (97, 131), (63, 64)])
def test_shapes_and_flops_agree_with_the_module(size):
    parameters = {}
    for conv in vgg.CONVS:
        parameters[f"{conv.name}.weight"] = torch.zeros(conv.out_channels, conv.in_channels, 3, 3)
        parameters[f"{conv.name}.bias"] = torch.zeros(conv.out_channels)
    module = vgg.module(parameters, torch.zeros(3), torch.ones(3), vgg.LAYERS, "max")
    found = {name: tuple(value.shape) for name, value in module(torch.zeros(1, 3, *size)).items()}
    assert found == vgg.shapes(vgg.CONVS, *size)
    macs = sum(np.prod(found[conv.relu]) * 9 * conv.in_channels for conv in vgg.CONVS)
    assert vgg.flops(vgg.CONVS, *size) == 4 * macs  # two passes, two operations a multiply-add


def test_module_computes_what_torchvision_computes():
    torch.manual_seed(0)
    theirs = vgg19(weights=None).eval()
    names = [name for name, layer in theirs.features.named_children() if isinstance(layer, torch.nn.Conv2d)]
    state = theirs.features.state_dict()
    parameters = {
        f"{conv.name}.{part}": state[f"{name}.{part}"]
        for conv, name in zip(vgg.CONVS, names, strict=True)
        for part in ("weight", "bias")
    }
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    image = torch.rand(1, 3, 64, 48)
    with torch.no_grad():
        ours = vgg.module(parameters, mean, std, ("relu4_2",), "max")(image)["relu4_2"]
        x = (image - mean.reshape(1, 3, 1, 1)) / std.reshape(1, 3, 1, 1)
        expected = theirs.features[:23](x)  # up to and including the ReLU behind conv4_2
    torch.testing.assert_close(ours, expected)
