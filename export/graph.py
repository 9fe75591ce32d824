"""The two ONNX graphs of one image shape: forward, and vector-Jacobian product (VJP).

forward   image (1, 3, H, W) float32, RGB in [0, 1]  ->  the ReLU outputs asked for
vjp       a cotangent for each loss layer, and every ReLU output  ->  gradient (1, 3, H, W) float32

Loss layers are ReLU outputs or the convolutions before them, whose values the VJP does not need.

The VJP of a 3x3 convolution with stride 1 and padding 1 is the same convolution with the kernel turned by 180 degrees
and its channel axes swapped. The VJP of a ReLU is the mask (a > 0), and the ReLU output a itself carries that mask.
Average pooling spreads a quarter of the cotangent over its four positions; the quarter is folded into the weights of
the convolution above. Max pooling routes the cotangent to the first of the four that equals the maximum, as torch
does. Pooling floors: the odd row or column that it drops gets a zero gradient.

Padding other than with zeros is a frame made of slices. The VJP of a circular one is circular again; that of a
reflecting or replicating one goes through a full convolution, whose frame is added to the lines that it was made of.

The weights are external initializers of one file, the same for every shape.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from . import vgg
from .weights import Weights

OPSETS = {"fp32": 18, "fp16": 18, "bf16": 22}  # the first with bf16 convolutions
IR_VERSION = 10
_TO_NHWC, _TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)
ELEMENTS = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
DTYPES = {precision: helper.tensor_dtype_to_np_dtype(element) for precision, element in ELEMENTS.items()}


class _Builder:
    """Collects nodes; every method returns the name of its result."""

    def __init__(self, spec: vgg.Spec, weights: Weights) -> None:
        self.spec = spec
        self.location = weights_file(spec, weights)
        self.offsets = offsets(spec)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        self.initializers.setdefault(name, onnx.numpy_helper.from_array(value, name))
        return name

    def scalar(self, name: str, value: float) -> str:
        return self.constant(name, np.array(value, DTYPES[self.spec.precision]))

    def external(self, name: str, *shape: int) -> str:
        """An initializer whose bytes stand in the weights file."""
        tensor = TensorProto(name=name, dims=shape, data_type=ELEMENTS[self.spec.precision])
        tensor.data_location = TensorProto.EXTERNAL
        offset, length = self.offsets[name]
        for key, value in (("location", self.location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers[name] = tensor
        return name

    def model(
        self, name: str, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]
    ) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, name, inputs, outputs, list(self.initializers.values()))
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSETS[self.spec.precision])],
            ir_version=IR_VERSION,
            producer_name="gatys-engine",
        )


def forward_initializers(spec: vgg.Spec, weights: Weights) -> dict[str, NDArray[Any]]:
    """Kernels and biases of the forward graph; the division by the deviation is folded into conv1_1."""
    arrays: dict[str, NDArray[Any]] = {}
    for conv in spec.convs:
        arrays[f"{conv.name}.weight"] = np.ascontiguousarray(weights.kernel(conv), DTYPES[spec.precision])
        bias = weights.parameters[f"{conv.name}.bias"].numpy()
        arrays[f"{conv.name}.bias"] = np.ascontiguousarray(bias, DTYPES[spec.precision])
    return arrays


def vjp_initializers(spec: vgg.Spec, weights: Weights) -> dict[str, NDArray[Any]]:
    """Turned kernels with swapped channel axes (C_in, C_out, 3, 3); the quarter of an average pooling is folded in."""
    arrays: dict[str, NDArray[Any]] = {}
    for conv in spec.convs:
        turned = weights.kernel(conv)[:, :, ::-1, ::-1].transpose(1, 0, 2, 3)
        if conv.after_pool and spec.pooling == "avg":
            turned = turned / np.float32(4)
        arrays[f"{conv.name}.vjp"] = np.ascontiguousarray(turned, DTYPES[spec.precision])
    return arrays


def weights_file(spec: vgg.Spec, weights: Weights) -> str:
    """Name of the file with the initializers: one for all shapes of a network."""
    return f"vgg19-{weights.digest[:8]}-{spec.convs[-1].relu}-{spec.pooling}-{spec.precision}.bin"


def offsets(spec: vgg.Spec) -> dict[str, tuple[int, int]]:
    """(offset, length) in bytes of every initializer in the weights file."""
    size = np.dtype(DTYPES[spec.precision]).itemsize
    found: dict[str, tuple[int, int]] = {}
    position = 0
    for conv in spec.convs:
        kernel = conv.out_channels * conv.in_channels * 9 * size
        for part, length in (("weight", kernel), ("bias", conv.out_channels * size), ("vjp", kernel)):
            found[f"{conv.name}.{part}"] = (position, length)
            position += -(-length // 4096) * 4096  # page-aligned, so that runtimes can map the file
    return found


def forward(spec: vgg.Spec, weights: Weights, outputs: tuple[str, ...] | None = None) -> onnx.ModelProto:
    """The forward graph; `outputs` are the layers to hand over, by default every ReLU output and loss layer."""
    build = _Builder(spec, weights)
    wanted = outputs if outputs is not None else tuple(spec.shapes)
    mean = build.constant("mean", np.array(weights.mean, np.float32).reshape(1, 3, 1, 1))
    x = build.node("Sub", ["image", mean], "centred")
    if spec.precision != "fp32":
        x = build.node("Cast", [x], "centred_low", to=ELEMENTS[spec.precision])
    for conv in spec.convs:
        if conv.after_pool:
            op = "AveragePool" if spec.pooling == "avg" else "MaxPool"
            x = build.node(op, [x], f"pool{conv.block - 1}", kernel_shape=[2, 2], strides=[2, 2])
        kernel = build.external(f"{conv.name}.weight", conv.out_channels, conv.in_channels, 3, 3)
        bias = build.external(f"{conv.name}.bias", conv.out_channels)
        x, pads = _framed(build, spec, conv, x)
        name = _inside(spec, conv.name) if conv.name in wanted else conv.name
        x = build.node("Conv", [x, kernel, bias], name, kernel_shape=[3, 3], pads=[pads] * 4)
        if spec.nhwc and conv.name in wanted:
            build.node("Transpose", [x], conv.name, perm=_TO_NHWC)
        x = build.node("Relu", [x], _inside(spec, conv.relu))
        if spec.nhwc and conv.relu in wanted:
            build.node("Transpose", [x], conv.relu, perm=_TO_NHWC)
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, (1, 3, spec.height, spec.width))
    return build.model("vgg19_forward", [image], [_info(spec, name) for name in wanted])


def vjp(spec: vgg.Spec, weights: Weights) -> onnx.ModelProto:
    """The VJP graph: `cotangent.<layer>` for each loss layer and `<relu>` for each ReLU under one -> `gradient`."""
    build = _Builder(spec, weights)
    inputs: list[onnx.ValueInfoProto] = []
    for conv in reversed(spec.convs):
        inputs += [_info(spec, name, "cotangent.") for name in (conv.relu, conv.name) if name in spec.layers]
        if conv is not spec.convs[-1] or conv.relu in spec.layers:
            inputs.append(_info(spec, conv.relu))
    if spec.nhwc:
        for info in inputs:
            build.node("Transpose", [info.name], _inside(spec, info.name), perm=_TO_NCHW)
    cotangent = ""
    for conv in reversed(spec.convs):
        cotangent = _with_own(build, spec, cotangent, conv.relu)
        if cotangent:
            cotangent = _mask(build, spec, cotangent, conv.relu, conv.out_channels)
        cotangent = _with_own(build, spec, cotangent, conv.name)
        kernel = build.external(f"{conv.name}.vjp", conv.in_channels, conv.out_channels, 3, 3)
        out = f"{conv.name}.cotangent"
        folds = spec.edge(conv) in ("reflect", "replicate")
        cotangent, pads = (cotangent, 2) if folds else _framed(build, spec, conv, cotangent)
        cotangent = build.node("Conv", [cotangent, kernel], out, kernel_shape=[3, 3], pads=[pads] * 4)
        if folds:
            cotangent = _folded(build, spec, conv, cotangent)
        if conv.after_pool:
            below = vgg.CONVS[vgg.CONVS.index(conv) - 1]
            unpool = _unpool_average if spec.pooling == "avg" else _unpool_max
            cotangent = unpool(build, spec, cotangent, below)
    build.node("Cast", [cotangent], "gradient", to=TensorProto.FLOAT)
    gradient = helper.make_tensor_value_info("gradient", TensorProto.FLOAT, (1, 3, spec.height, spec.width))
    return build.model("vgg19_vjp", inputs, [gradient])


def _info(spec: vgg.Spec, layer: str, prefix: str = "") -> onnx.ValueInfoProto:
    """Name, type and shape of a layer's features, or of their cotangent, as they are handed over."""
    one, channels, height, width = spec.shapes[layer]
    shape = (one, height, width, channels) if spec.nhwc else (one, channels, height, width)
    return helper.make_tensor_value_info(prefix + layer, ELEMENTS[spec.precision], shape)


def _inside(spec: vgg.Spec, name: str) -> str:
    """What an input or output `name` is called in the graph, where it is (1, C, H, W)."""
    return f"{name}.nchw" if spec.nhwc else name


def _beyond(spec: vgg.Spec, conv: vgg.Conv, length: int) -> tuple[int, int]:
    """The lines of `length` that a convolution sees before the first and behind the last."""
    return {"reflect": (1, length - 2), "replicate": (0, length - 1), "circular": (length - 1, 0)}[spec.edge(conv)]


def _slice(build: _Builder, x: str, axis: int, start: int, stop: int) -> str:
    limits = [build.constant(f"at{i}", np.array([i], np.int64)) for i in (start, stop, axis)]
    return build.node("Slice", [x, *limits], f"{x}.{axis}_{start}_{stop}")


def _framed(build: _Builder, spec: vgg.Spec, conv: vgg.Conv, x: str) -> tuple[str, int]:
    """What a convolution reads, with a frame of one line where that is not zero, and the zeros still to be added."""
    if spec.edge(conv) == "zero":
        return x, 1
    for axis in (2, 3):
        before, behind = (_slice(build, x, axis, i, i + 1) for i in _beyond(spec, conv, spec.shapes[conv.relu][axis]))
        x = build.node("Concat", [before, x, behind], f"{x}.framed{axis}", axis=axis)
    return x, 0


def _folded(build: _Builder, spec: vgg.Spec, conv: vgg.Conv, x: str) -> str:
    """The transpose of the frame: its lines are added to those that they were copies of."""
    for axis in (2, 3):
        length = spec.shapes[conv.relu][axis]
        total = _slice(build, x, axis, 1, length + 1)
        for line, place in zip((0, length + 1), _beyond(spec, conv, length), strict=True):
            pads = np.zeros(8, np.int64)
            pads[axis], pads[4 + axis] = place, length - 1 - place
            name = f"fold{axis}_{line}"
            share = build.node(
                "Pad", [_slice(build, x, axis, line, line + 1), build.constant(f"{name}.pads", pads)], name
            )
            total = build.node("Add", [total, share], f"{name}.sum")
        x = total
    return x


def _with_own(build: _Builder, spec: vgg.Spec, cotangent: str, layer: str) -> str:
    """The cotangent that has come from above, if any has, and what the losses add to it at this layer."""
    if layer not in spec.layers:
        return cotangent
    own = _inside(spec, f"cotangent.{layer}")
    return build.node("Add", [cotangent, own], f"sum.{layer}") if cotangent else own


def _mask(build: _Builder, spec: vgg.Spec, cotangent: str, relu: str, channels: int) -> str:
    """cotangent * (a > 0)."""
    if spec.blocked:  # min(a * 3e38, 1) is 1 for every normal a > 0 and 0 for a = 0
        steep = build.constant(f"steep{channels}", np.full((channels, 1, 1, 1), 3e38, np.float32))
        ramp = build.node("Conv", [relu, steep], f"ramp.{relu}", kernel_shape=[1, 1], group=channels)
        mask = build.node("Clip", [ramp, build.scalar("zero", 0), build.scalar("one", 1)], f"mask.{relu}")
        return build.node("Mul", [cotangent, mask], f"masked.{relu}")
    positive = build.node("Greater", [_inside(spec, relu), build.scalar("zero", 0)], f"mask.{relu}")
    return build.node("Where", [positive, cotangent, build.scalar("zero", 0)], f"masked.{relu}")


def _unpool_average(build: _Builder, spec: vgg.Spec, cotangent: str, below: vgg.Conv) -> str:
    """Nearest upsampling; the factor 1/4 is in the weights."""
    if spec.nhwc:
        return _restore_odd(build, spec, _unpool_average_nhwc(build, spec, cotangent, below), below)
    scales = build.constant("double", np.array([1, 1, 2, 2], np.float32))
    up = build.node(
        "Resize",
        [cotangent, "", scales],
        f"unpool{below.block}",
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )
    return _restore_odd(build, spec, up, below)


def _unpool_average_nhwc(build: _Builder, spec: vgg.Spec, cotangent: str, below: vgg.Conv) -> str:
    """The same in NHWC order, where the CUDA provider has no Resize; both transpositions cancel with its own."""
    _, channels, height, width = spec.shapes[below.relu]
    h, w, name = height // 2, width // 2, f"unpool{below.block}"
    x = build.node("Transpose", [cotangent], f"{name}.nhwc", perm=_TO_NHWC)
    for op, shape in (
        ("Reshape", (1, h, 1, w, 1, channels)),
        ("Expand", (1, h, 2, w, 2, channels)),
        ("Reshape", (1, 2 * h, 2 * w, channels)),
    ):
        to = "x".join(map(str, shape))
        x = build.node(op, [x, build.constant(f"shape.{to}", np.array(shape, np.int64))], f"{name}.{to}")
    return build.node("Transpose", [x], name, perm=_TO_NCHW)


def _unpool_max(build: _Builder, spec: vgg.Spec, cotangent: str, below: vgg.Conv) -> str:
    """Route each cotangent to the first position of its 2x2 window that holds the maximum (row by row)."""
    block, channels = below.block, below.out_channels
    _, _, height, width = spec.shapes[below.relu]
    features = _inside(spec, below.relu)
    if height % 2 or width % 2:
        ends = build.constant(f"even{block}", np.array([height // 2 * 2, width // 2 * 2], np.int64))
        starts, axes = (
            build.constant("origin", np.zeros(2, np.int64)),
            build.constant("axes", np.array([2, 3], np.int64)),
        )
        features = build.node("Slice", [features, starts, ends, axes], f"even_part{block}")
    corners = build.node("SpaceToDepth", [features], f"corners{block}", blocksize=2)  # (1, 4 C, H/2, W/2), corner-major
    split = build.constant(f"split{channels}", np.full(4, channels, np.int64))
    names = [f"corner{block}_{i}" for i in range(4)]
    build.nodes.append(helper.make_node("Split", [corners, split], names, name=f"split{block}", axis=1))
    top = build.node("Max", names, f"top{block}")
    zero = build.scalar("zero", 0)
    routed: list[str] = []
    taken = ""
    for i, corner in enumerate(names):
        here = build.node("Equal", [corner, top], f"equal{block}_{i}")
        if taken:
            free = build.node("Not", [taken], f"free{block}_{i}")
            first = build.node("And", [here, free], f"first{block}_{i}")
            taken = build.node("Or", [taken, here], f"taken{block}_{i}")
        else:
            first = taken = here
        routed.append(build.node("Where", [first, cotangent, zero], f"routed{block}_{i}"))
    joined = build.node("Concat", routed, f"joined{block}", axis=1)
    up = build.node("DepthToSpace", [joined], f"unpool{block}", blocksize=2, mode="DCR")
    return _restore_odd(build, spec, up, below)


def _restore_odd(build: _Builder, spec: vgg.Spec, cotangent: str, below: vgg.Conv) -> str:
    """Append the zero row or column that an odd side lost in pooling."""
    _, channels, height, width = spec.shapes[below.relu]
    odd = (height % 2, width % 2)
    if not any(odd):
        return cotangent
    name = f"padded{below.block}"
    if spec.blocked:
        ones = build.constant(f"ones{channels}", np.ones((channels, 1, 1, 1), np.float32))
        return build.node("Conv", [cotangent, ones], name, kernel_shape=[1, 1], pads=[0, 0, *odd], group=channels)
    for axis in (axis for axis in (2, 3) if odd[axis - 2]):  # not Pad, on which CUDA spends more than on convolutions
        line = [1, channels, height - odd[0], width - odd[1]]
        line[axis] = 1
        if axis == 3:
            line[2] = height
        zeros = build.constant(f"zeros{below.block}.{axis}", np.zeros(line, DTYPES[spec.precision]))
        cotangent = build.node("Concat", [cotangent, zeros], f"{name}.{axis}", axis=axis)
    return cotangent
