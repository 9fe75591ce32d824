"""Runs both graphs in ONNX Runtime and compares them with torchvision's VGG-19 and autograd in float64.

VGG-19 is piecewise linear, and rounding may move a value across the kink of a ReLU or swap two nearly equal positions
of a max pooling. The gradient jumps there, which says nothing about the VJP graph. So the VJP is compared with float64
autograd through the linear piece that the forward graph chose: its masks, its routing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor
from torch.nn import functional

from . import graph, vgg
from .ort import onnxruntime, options
from .weights import Weights

TOLERANCE = {
    "fp32": (1e-5, 1e-5),
    "fp16": (1e-2, 1e-2),
    "bf16": (2e-2, 2e-2),
}  # relative L2 errors that (forward, VJP) may show


@dataclass(frozen=True)
class Errors:
    """Largest relative L2 error of a ReLU output, and that of the pixel gradient."""

    forward: float
    vjp: float


def run(model: onnx.ModelProto, arrays: dict[str, NDArray[Any]], feeds: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """Run a graph with external initializers on the CPU: {output name: array}; bf16 ones are emulated."""
    if any(each.data_type == TensorProto.BFLOAT16 for each in model.graph.initializer):
        model = emulated(model)
        arrays, feeds = ({name: a.astype(np.float32) for name, a in each.items()} for each in (arrays, feeds))
    session = onnxruntime().InferenceSession(
        model.SerializeToString(), options(arrays), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def emulated(model: onnx.ModelProto) -> onnx.ModelProto:
    """A bf16 graph in fp32 with every result rounded to bf16, as a GPU computes it, for a CPU without bf16 kernels."""
    low, high = TensorProto.BFLOAT16, TensorProto.FLOAT
    found = onnx.ModelProto.FromString(model.SerializeToString())
    for info in (*found.graph.input, *found.graph.output):
        info.type.tensor_type.elem_type = high
    for i, tensor in enumerate(found.graph.initializer):
        if tensor.data_type != low:
            continue
        if tensor.data_location == TensorProto.EXTERNAL:
            tensor.data_type = high
        else:
            wide = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            found.graph.initializer[i].CopyFrom(onnx.numpy_helper.from_array(wide, tensor.name))
    nodes = []
    for node in found.graph.node:
        nodes.append(node)
        if node.op_type in ("Greater", "Equal", "Not", "And", "Or") or node.output[0] == "gradient":
            continue
        for i, name in enumerate(node.output):
            node.output[i] = f"{name}.exact"
            nodes.append(helper.make_node("Cast", [f"{name}.exact"], [f"{name}.rounded"], to=low))
            nodes.append(helper.make_node("Cast", [f"{name}.rounded"], [name], to=high))
    del found.graph.node[:]
    found.graph.node.extend(nodes)
    return found


def picture(height: int, width: int, seed: int) -> Tensor:
    """A smooth random picture (1, 3, H, W), float64 in [0, 1]: noise of four octaves."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(1, 3, height, width, dtype=torch.float64)
    for octave in range(4):
        side = 4 * 2**octave
        noise = torch.randn(1, 3, side, side, generator=generator, dtype=torch.float64)
        total += functional.interpolate(noise, size=(height, width), mode="bicubic") / 2**octave
    return torch.sigmoid(2 * total)


def check(spec: vgg.Spec, weights: Weights) -> Errors:
    """Errors of the graph pair on a random picture, with the cotangents of a Gram loss towards another picture.

    Raises ArithmeticError if one is larger than TOLERANCE.
    """
    oracle = weights.module(spec.layers, spec.pooling, torch.float64, spec.padding)
    image = picture(spec.height, spec.width, seed=1)
    target = {layer: _gram(value) for layer, value in oracle(picture(spec.height, spec.width, seed=2)).items()}
    features = oracle(image)
    cotangents = {}
    for layer, value in features.items():
        leaf = value.detach().requires_grad_()
        ((_gram(leaf) - target[layer]) ** 2).sum().div((target[layer] ** 2).sum()).backward()
        cotangents[layer] = leaf.grad
    loudest = max(float(value.abs().max()) for value in cotangents.values())
    scale = 1.0 if spec.precision == "fp32" else 2.0 ** -math.floor(math.log2(loudest))  # fp16: largest in [1, 2)

    pixels = image.numpy().astype(np.float32)
    outputs = run(graph.forward(spec, weights), graph.forward_initializers(spec, weights), {"image": pixels})
    forward = max(_error(outputs[layer], value.numpy()) for layer, value in features.items())
    dtype = graph.DTYPES[spec.precision]
    feeds = {f"cotangent.{layer}": (value * scale).numpy().astype(dtype) for layer, value in cotangents.items()}
    backward = graph.vjp(spec, weights)
    feeds |= {info.name: outputs[info.name] for info in backward.graph.input if info.name in outputs}
    result = run(backward, graph.vjp_initializers(spec, weights), feeds)
    truth = linear_piece_vjp(spec, weights, outputs, cotangents)
    errors = Errors(forward, _error(result["gradient"] / scale, truth.numpy()))
    for name, error, limit in zip(
        ("forward", "VJP"), (errors.forward, errors.vjp), TOLERANCE[spec.precision], strict=True
    ):
        if not error <= limit:  # NaN fails too
            raise ArithmeticError(f"the {name} graph of {spec} is off by {error:.1e} (at most {limit:.0e})")
    return errors


def linear_piece_vjp(
    spec: vgg.Spec, weights: Weights, relus: dict[str, NDArray[Any]], cotangents: dict[str, Tensor]
) -> Tensor:
    """Float64 gradient (1, 3, H, W) through the network with the masks and the max routing of `relus`."""
    displacement = torch.zeros(1, 3, spec.height, spec.width, dtype=torch.float64, requires_grad=True)
    x = displacement / torch.tensor(weights.std, dtype=torch.float64).reshape(1, 3, 1, 1)
    below: Tensor | None = None
    found = {}
    for conv in spec.convs:
        if conv.after_pool and spec.pooling == "avg":
            x = functional.avg_pool2d(x, 2)
        elif conv.after_pool:
            assert below is not None
            pooled, index = functional.max_pool2d(below, 2, return_indices=True)
            x = x.flatten(2).gather(2, index.flatten(2)).reshape(pooled.shape)
        edge = spec.edge(conv)
        x = functional.pad(x, (1, 1, 1, 1), "constant" if edge == "zero" else edge)
        x = functional.conv2d(x, weights.parameters[f"{conv.name}.weight"].double())
        found[conv.name] = x
        below = torch.from_numpy(relus[conv.relu]).float()
        x = found[conv.relu] = x * (below > 0)
    outputs = [found[layer] for layer in cotangents]
    return torch.autograd.grad(outputs, displacement, list(cotangents.values()))[0]


def _gram(features: Tensor) -> Tensor:
    flat = features.flatten(2)[0]
    return flat @ flat.T / flat.shape[1]


def _error(value: NDArray[Any], truth: NDArray[Any]) -> float:
    return float(np.linalg.norm(value.astype(np.float64) - truth) / np.linalg.norm(truth))
