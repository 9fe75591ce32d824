"""VGG-19 (Simonyan, Zisserman 2014, configuration E): its convolutions, and the torch module that is the oracle.

The table below is torchvision's `cfgs["E"]` without the classifier; a test holds the two together. Layers carry
the names of the field: `conv4_1` is the first convolution of the fourth block, `relu4_1` the ReLU behind it. Pooling
stands between blocks only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .commands import choice

if TYPE_CHECKING:
    from torch import Tensor, nn

POOLINGS = ("avg", "max")
PRECISIONS = ("fp32", "fp16", "bf16")
PADDINGS = ("zero", "reflect", "replicate", "circular")
BLOCKS = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))  # (channels, convolutions) of each block
WHOLE = 16  # pixels; sides that are multiples of it lose nothing in any pooling
MIN_SIDE = 32  # pixels; keeps at least 2 x 2 positions in the fifth block


@dataclass(frozen=True)
class Conv:
    """A 3x3 convolution of stride 1 and padding 1, with the ReLU behind it."""

    block: int
    index: int
    in_channels: int
    out_channels: int

    @property
    def name(self) -> str:
        """The convolution's name, `conv4_1`."""
        return f"conv{self.block}_{self.index}"

    @property
    def relu(self) -> str:
        """The name of the ReLU output, `relu4_1`."""
        return f"relu{self.block}_{self.index}"

    @property
    def after_pool(self) -> bool:
        """Whether a pooling stands before this convolution."""
        return self.index == 1 and self.block > 1


def _convolutions() -> Iterable[Conv]:
    channels = 3
    for block, (width, count) in enumerate(BLOCKS, 1):
        for index in range(1, count + 1):
            yield Conv(block, index, channels, width)
            channels = width


CONVS = tuple(_convolutions())
LAYERS = tuple(conv.relu for conv in CONVS)
LOSS_LAYERS = tuple(name for conv in CONVS for name in (conv.name, conv.relu))  # what a loss may look at, by depth


def cut(layers: Iterable[str]) -> tuple[Conv, ...]:
    """The convolutions up to the deepest of `layers`: all that a loss at these layers needs."""
    deepest = max(LOSS_LAYERS.index(layer) for layer in layers)
    return CONVS[: deepest // 2 + 1]


def shapes(convs: Iterable[Conv], height: int, width: int) -> dict[str, tuple[int, int, int, int]]:
    """The (1, C, H, W) of each ReLU output for an image of `height` x `width`; pooling floors odd sides."""
    return {conv.relu: (1, conv.out_channels, height >> (conv.block - 1), width >> (conv.block - 1)) for conv in convs}


def edge(conv: Conv, padding: str) -> str:
    """What a convolution sees beyond the border: `circular` holds for all, the others for the layer at the pixels."""
    return padding if padding == "circular" or conv.in_channels == 3 else "zero"


def flops(convs: Iterable[Conv], height: int, width: int) -> int:
    """Floating-point operations of one forward pass and one VJP, a multiply-add counted as two."""
    return sum(
        2 * 2 * 9 * conv.in_channels * conv.out_channels * (height >> (conv.block - 1)) * (width >> (conv.block - 1))
        for conv in convs
    )


def module(
    parameters: Mapping[str, Tensor],
    mean: Tensor,
    std: Tensor,
    layers: Iterable[str],
    pooling: str,
    padding: str = "zero",
) -> nn.Module:
    """torchvision's VGG-19 with these parameters, cut at the deepest layer: image (1, 3, H, W) -> {layer: features}.

    The image is RGB in [0, 1]; `mean` and `std` (3,) normalise it. The module takes the dtype of its parameters, so
    float64 parameters make a float64 oracle. `pooling` and `padding` are those of `Spec`. `parameters` hold
    `conv1_1.weight`, `conv1_1.bias` and so on.
    """
    import torch
    from torch import nn
    from torchvision.models.vgg import cfgs, make_layers

    wanted = tuple(layers)
    convs = cut(wanted)

    class VGG19(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", mean.reshape(1, 3, 1, 1))
            self.register_buffer("std", std.reshape(1, 3, 1, 1))
            stages: list[nn.Module] = []
            relus = 0
            with torch.device("meta"):  # no parameters to begin with
                everything = make_layers(cfgs["E"], batch_norm=False)
            for stage in everything:
                if isinstance(stage, nn.MaxPool2d) and pooling == "avg":
                    stage = nn.AvgPool2d(2)  # the paper's choice (section 2)
                stages.append(stage)
                relus += isinstance(stage, nn.ReLU)
                if relus == len(convs):
                    break
            self.features = nn.Sequential(*stages)
            own = [stage for stage in stages if isinstance(stage, nn.Conv2d)]
            for conv, stage in zip(convs, own, strict=True):
                stage.padding_mode = edge(conv, padding).replace("zero", "zeros")  # type: ignore[assignment]
                stage.weight = nn.Parameter(parameters[f"{conv.name}.weight"], requires_grad=False)
                stage.bias = nn.Parameter(parameters[f"{conv.name}.bias"], requires_grad=False)

        def forward(self, image: Tensor) -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            x = (image - self.get_buffer("mean")) / self.get_buffer("std")
            names = iter(LOSS_LAYERS)
            for stage in self.features:
                x = stage(x)
                if isinstance(stage, nn.Conv2d | nn.ReLU):
                    name = next(names)  # the ReLU works in place
                    found[name] = x.clone() if name in wanted and isinstance(stage, nn.Conv2d) else x
            return {layer: found[layer] for layer in wanted}

    with torch.no_grad():
        return VGG19()


@dataclass(frozen=True)
class Spec:
    """What a graph pair depends on besides the weights.

    `blocked` writes masks and odd borders as depthwise convolutions. ONNX Runtime's CPU provider then keeps the whole
    VJP in its blocked channel layout; a comparison would reorder the cotangent twice at each layer. float32 only.
    `nhwc` hands features and cotangents over as (1, H, W, C): a provider that works in this order, as CUDA's does in
    16 bits, then has nothing to reorder.
    `padding` is what conv1_1 sees beyond the border; `circular` holds for all convolutions, and wants sides that are
    multiples of WHOLE: then the poolings wrap around as well.
    """

    height: int
    width: int
    layers: tuple[str, ...]
    pooling: str = "avg"
    precision: str = "fp32"
    blocked: bool = False
    nhwc: bool = False
    padding: str = "zero"

    def __post_init__(self) -> None:
        for layer in self.layers or ("",):
            choice("layer", layer, LOSS_LAYERS)
        choice("pooling", self.pooling, POOLINGS)
        choice("precision", self.precision, PRECISIONS)
        choice("padding", self.padding, PADDINGS)
        if min(self.height, self.width) < MIN_SIDE:
            raise ValueError(f"image of {self.width} x {self.height} pixels: both sides have to be at least {MIN_SIDE}")
        if self.blocked and self.precision != "fp32":
            raise ValueError("blocked masks need fp32")
        if self.blocked and self.nhwc:
            raise ValueError("a graph is blocked or nhwc")
        if self.padding == "circular" and (self.height % WHOLE or self.width % WHOLE):
            raise ValueError(
                f"image of {self.width} x {self.height} pixels: to be tiled, its sides have to be multiples of {WHOLE}"
            )

    @property
    def convs(self) -> tuple[Conv, ...]:
        """The convolutions up to the deepest loss layer."""
        return cut(self.layers)

    def edge(self, conv: Conv) -> str:
        """What a convolution sees beyond the border, one of PADDINGS."""
        return edge(conv, self.padding)

    @property
    def shapes(self) -> dict[str, tuple[int, int, int, int]]:
        """(1, C, H, W) of each ReLU output, and of each convolution that is a loss layer."""
        found = shapes(self.convs, self.height, self.width)
        return found | {conv.name: found[conv.relu] for conv in self.convs if conv.name in self.layers}
