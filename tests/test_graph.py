import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.export import graph, validate, vgg, weights

STYLE_AND_CONTENT = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu4_2", "relu5_1")


@pytest.fixture(scope="module")
def net():
    return weights.load("embedded", ("relu5_2",))


def run_pair(spec, net, image, cotangents):
    """Features and pixel gradient of the two graphs."""
    forward = graph.forward(spec, net)
    features = validate.run(forward, graph.forward_initializers(spec, net), {"image": image})
    backward = graph.vjp(spec, net)
    feeds = {info.name: features[info.name] for info in backward.graph.input if info.name in features}
    feeds |= {f"cotangent.{layer}": value for layer, value in cotangents.items()}
    return features, validate.run(backward, graph.vjp_initializers(spec, net), feeds)["gradient"]


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize(("precision", "blocked"), [("fp32", True), ("fp32", False), ("fp16", False), ("bf16", False)])
def test_pair_agrees_with_float64(net, pooling, precision, blocked):
    spec = vgg.Spec(61, 47, STYLE_AND_CONTENT, pooling, precision, blocked)
    errors = validate.check(spec, net)
    assert errors.forward < {"fp32": 1e-5, "fp16": 5e-3, "bf16": 1.5e-2}[precision]
    assert errors.vjp < {"fp32": 2e-6, "fp16": 2e-3, "bf16": 1e-2}[precision]


@pytest.mark.parametrize(("padding", "size"), [("reflect", (61, 47)), ("replicate", (46, 61)), ("circular", (64, 48))])
@pytest.mark.parametrize(("precision", "blocked"), [("fp32", True), ("fp32", False), ("fp16", False)])
def test_padded_pair_agrees_with_float64(net, padding, size, precision, blocked):
    spec = vgg.Spec(*size, STYLE_AND_CONTENT, "avg", precision, blocked, padding=padding)
    errors = validate.check(spec, net)
    assert errors.forward < (1e-5 if precision == "fp32" else 5e-3)
    assert errors.vjp < (2e-6 if precision == "fp32" else 2e-3)


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("nhwc", [False, True])
def test_bf16_graphs_are_strongly_typed(net, pooling, nhwc, tmp_path):
    """All that is computed is bf16, from the cast of the image to that of the gradient, by the rules of the opset."""
    spec = vgg.Spec(35, 42, ("relu1_1", "relu3_1"), pooling, "bf16", nhwc=nhwc)
    for model in (graph.forward(spec, net), graph.vjp(spec, net)):
        for tensor in model.graph.initializer:  # the checker wants to see the file
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                tensor.ClearField("external_data")
                tensor.ClearField("data_location")
                tensor.raw_data = bytes(2 * int(np.prod(tensor.dims)))
        onnx.checker.check_model(model, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        types = {info.name: info.type.tensor_type.elem_type for info in inferred.graph.value_info}
        names = {output for node in model.graph.node for output in node.output}
        low = {name for name, element in types.items() if element == onnx.TensorProto.BFLOAT16}
        assert {element for name, element in types.items() if name not in low} <= {
            onnx.TensorProto.FLOAT,
            onnx.TensorProto.BOOL,
        }
        high = {name for name, element in types.items() if element == onnx.TensorProto.FLOAT}
        assert high & names <= {"centred"}


def test_bf16_is_emulated_with_one_rounding_an_operation(net):
    spec = vgg.Spec(32, 40, ("relu1_2",), precision="bf16")
    image = validate.picture(32, 40, seed=1).float()
    arrays = graph.forward_initializers(spec, net)
    found = validate.run(graph.forward(spec, net), arrays, {"image": image.numpy()})

    def rounded(x):
        return x.bfloat16().double()

    x = rounded(image - torch.tensor(net.mean).reshape(1, 3, 1, 1))
    for conv in spec.convs:
        kernel, bias = (
            torch.from_numpy(arrays[f"{conv.name}.{part}"].astype(np.float64)) for part in ("weight", "bias")
        )
        x = rounded(torch.nn.functional.conv2d(x, kernel, bias, padding=1)).relu()
        differs = torch.from_numpy(found[conv.relu]).double() != x
        assert differs.float().mean() < 1e-2  # where fp32 sums round to the other side
        x = torch.from_numpy(found[conv.relu]).double()
        assert torch.equal(x, rounded(x))


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_nhwc_hands_the_same_over_in_another_order(net, pooling, precision):
    layers = ("conv1_1", *STYLE_AND_CONTENT, "conv5_2")
    plain, turned = (vgg.Spec(61, 47, layers, pooling, precision, nhwc=nhwc) for nhwc in (False, True))
    image = validate.picture(61, 47, seed=1).numpy().astype(np.float32)
    generator = np.random.default_rng(0)
    dtype = graph.DTYPES[precision]
    cotangents = {layer: generator.standard_normal(plain.shapes[layer]).astype(dtype) for layer in plain.layers}
    features, gradient = run_pair(plain, net, image, cotangents)
    swapped = {layer: np.ascontiguousarray(value.transpose(0, 2, 3, 1)) for layer, value in cotangents.items()}
    turned_features, turned_gradient = run_pair(turned, net, image, swapped)
    tolerance = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2}[precision]
    for layer, value in features.items():
        np.testing.assert_allclose(turned_features[layer].transpose(0, 3, 1, 2), value, rtol=tolerance, atol=tolerance)
    assert np.linalg.norm(turned_gradient - gradient) < tolerance * np.linalg.norm(gradient)


@settings(max_examples=12)
@given(
    height=st.integers(32, 70),
    width=st.integers(32, 70),
    layers=st.sets(st.sampled_from(vgg.LOSS_LAYERS[:26]), min_size=1, max_size=4),
    pooling=st.sampled_from(["avg", "max"]),
    blocked=st.booleans(),
)
def test_any_size_and_any_layers(net, height, width, layers, pooling, blocked):
    ordered = tuple(layer for layer in vgg.LOSS_LAYERS if layer in layers)
    assert validate.check(vgg.Spec(height, width, ordered, pooling, "fp32", blocked), net).vjp < 1e-5


def test_vjp_is_autograd_end_to_end(net):
    """Average pooling in fp32: no linear piece to choose but the masks, and those agree away from zero."""
    spec = vgg.Spec(64, 50, ("relu3_1",), "avg")
    image = torch.rand(1, 3, 64, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    oracle = net.module(spec.layers, "avg", torch.float64)
    x = image.clone().requires_grad_()
    out = oracle(x)["relu3_1"]
    cotangent = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    (expected,) = torch.autograd.grad(out, x, cotangent)
    _, gradient = run_pair(spec, net, image.float().numpy(), {"relu3_1": cotangent.float().numpy()})
    assert np.linalg.norm(gradient - expected.numpy()) < 1e-4 * np.linalg.norm(expected.numpy())


def test_vjp_is_linear_in_the_cotangent(net):
    spec = vgg.Spec(40, 33, ("relu2_1",), "max")
    image = np.random.default_rng(0).random((1, 3, 40, 33), np.float32)
    cotangent = np.random.default_rng(1).standard_normal(spec.shapes["relu2_1"]).astype(np.float32)
    _, once = run_pair(spec, net, image, {"relu2_1": cotangent})
    _, twice = run_pair(spec, net, image, {"relu2_1": 2 * cotangent})
    np.testing.assert_array_equal(twice, 2 * once)


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_ties_of_a_flat_picture_are_routed_once(net, pooling):
    """On a flat picture all four positions of a window are equal; torch sends the gradient to the first only."""
    spec = vgg.Spec(36, 36, ("relu2_1",), pooling)
    image = np.full((1, 3, 36, 36), 0.7, np.float32)
    cotangent = np.ones(spec.shapes["relu2_1"], np.float32)
    _, gradient = run_pair(spec, net, image, {"relu2_1": cotangent})
    x = torch.from_numpy(image).requires_grad_()
    (expected,) = torch.autograd.grad(net.module(spec.layers, pooling)(x)["relu2_1"].sum(), x)
    assert np.linalg.norm(gradient - expected.numpy()) < 1e-4 * np.linalg.norm(expected.numpy())


def test_odd_row_cut_by_pooling_gets_no_gradient(net):
    """The receptive field of relu2_1 ends before the last column of an odd picture, two 3x3 steps away."""
    spec = vgg.Spec(34, 37, ("relu2_1",), "avg")
    image = np.random.default_rng(0).random((1, 3, 34, 37), np.float32)
    cotangent = np.zeros(spec.shapes["relu2_1"], np.float32)
    cotangent[..., -3] = 1  # reaches pooled columns 14-16, hence columns 26-35 of the picture
    _, gradient = run_pair(spec, net, image, {"relu2_1": cotangent})
    assert np.abs(gradient[..., 26:36]).max() > 0
    assert not gradient[..., 36].any()
    assert not gradient[..., :26].any()


def test_weights_file_is_shared_by_all_shapes(net):
    small, large = (vgg.Spec(side, side, ("relu3_1",)) for side in (32, 96))
    places = []
    for spec in (small, large):
        for model in (graph.forward(spec, net), graph.vjp(spec, net)):
            external = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
            places.append({t.name: {e.key: e.value for e in t.external_data} for t in external})
            assert len(model.SerializeToString()) < 30_000  # no weights inside
    assert places[0] == places[2]
    assert places[1] == places[3]


def test_initializers_do_not_overlap(net):
    spec = vgg.Spec(32, 32, ("relu5_1",))
    arrays = {**graph.forward_initializers(spec, net), **graph.vjp_initializers(spec, net)}
    end = 0
    for name, (offset, length) in graph.offsets(spec).items():
        assert offset >= end
        assert length == arrays[name].nbytes
        end = offset + length
    assert set(arrays) == set(graph.offsets(spec))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((31, 64, ("relu1_1",)), "at least 32"),
        ((64, 64, ("relu6_1",)), "choose from"),
        ((64, 64, ()), "choose from"),
        ((64, 64, ("relu1_1",), "median"), "choose from avg, max"),
        ((64, 64, ("relu1_1",), "avg", "fp8"), "fp32, fp16, bf16"),
        ((64, 64, ("relu1_1",), "avg", "fp16", True), "blocked"),
        ((64, 64, ("relu1_1",), "avg", "fp32", False, False, "mirror"), "choose from zero"),
        ((64, 72, ("relu1_1",), "avg", "fp32", False, False, "circular"), "multiples of 16"),
    ],
)
def test_spec_refuses(arguments, words):
    with pytest.raises(ValueError, match=words):
        vgg.Spec(*arguments)


def test_validation_catches_a_wrong_graph(net, monkeypatch):
    right = graph.vjp_initializers

    def not_turned(spec, net):
        return {key: value[:, :, ::-1, ::-1].copy() for key, value in right(spec, net).items()}

    monkeypatch.setattr(graph, "vjp_initializers", not_turned)
    with pytest.raises(ArithmeticError, match="VJP"):
        validate.check(vgg.Spec(40, 40, ("relu2_1",)), net)
