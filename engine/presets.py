"""The objectives of other programs as options of this one. Standard library only.

A preset holds the layers, weights, preprocessing, pooling, start, optimiser and iterations of the named program's
defaults; its loss and gradient are those of the program, given the network that it names (`--weights`). The weights
convert by the form that both have: with c the mean of (F - P)^2 and D_l the mean of (G_l / M - A_l / M)^2 over the
C x C entries, the loss here is content_weight c + style_weight sum_l v_l D_l / 4, the sum of the v_l being one. Pixels
are in [0, 1] here, so total variation takes the program's range into its weight. Sizes are the user's, and the L-BFGS
is the engine's own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from .config import Config
from .export.commands import choice

log = logging.getLogger(__name__)

_BLOCKS = tuple(f"relu{block}_1" for block in range(1, 6))


def _by_square(layers: Sequence[str], weight: float) -> dict[str, Any]:
    """Style options for the loss weight * sum_l D_l / C_l^2, that of Gram matrices divided by C M."""
    squares = [1 / min(64 * 2 ** (int(layer[4]) - 1), 512) ** 2 for layer in layers]
    return {
        "style_weight": 4 * weight * sum(squares),
        "style_layers": tuple(zip(layers, squares, strict=True)),
    }


# Made for files of the caffe networks; the others for `imagenet`.
CAFFE = ("gatys2016", "gatys-pytorch", "neural-style", "neural-style-pt")
PRESETS: Mapping[str, Mapping[str, Any]] = {
    # Gatys, Ecker, Bethge, CVPR 2016: alpha 1/2 sum (F - P)^2 + beta sum_l w_l D_l / 4 with w_l = 1/5, alpha / beta =
    # 1e-3, from white noise. It does not say how many iterations; 500 are those of the first author's own release.
    # Network: a file of the authors' normalised VGG-19.
    "gatys2016": {
        "content_loss": "sum",
        "content_weight": 1e-3,
        "style_weight": 1.0,
        "content_layers": ("relu4_2",),
        "style_layers": _BLOCKS,
        "padding": "zero",
        "pooling": "avg",
        "init": "noise",
        "optimizer": "lbfgs",
        "clamp": False,
        "scales": 1,
        "iterations": 500,
    },
    # Gatys' PytorchNeuralStyleTransfer: c + 1e3 sum_l D_l / C_l^2, 500 evaluations and then 200 at a larger size,
    # as its notebook has it. Network: its `vgg_conv.pth`, or another file of the caffe VGG-19.
    "gatys-pytorch": {
        **_by_square(_BLOCKS, 1e3),
        "content_weight": 1.0,
        "content_layers": ("relu4_2",),
        "padding": "zero",
        "pooling": "max",
        "init": "content",
        "optimizer": "lbfgs",
        "clamp": False,
        "scales": 2,
        "iterations": (500, 200, "..."),
    },
    # neural-style (Johnson 2015): 5 c + 100 sum_l D_l / C_l^2, pixels in 0-256, and the gradient of
    # 1e-3 / 2 sum d^2 over the block of pixels with both neighbours (its printed loss leaves that term out).
    # Network: a file of the caffe VGG-19.
    "neural-style": {
        **_by_square(_BLOCKS, 100),
        "content_weight": 5.0,
        "content_layers": ("relu4_2",),
        "tv_weight": 1e-3 / 2 * 256**2,
        "tv_form": "block",
        "pixel_range": "0-256",
        "padding": "zero",
        "pooling": "max",
        "init": "noise",
        "optimizer": "lbfgs",
        "clamp": False,
        "scales": 1,
        "iterations": 1000,
    },
    # neural-style-pt: 5 c + 100 sum_l D_l / C_l^2 + 1e-3 sum |d|, pixels in 0-255. Network: a file of the caffe VGG-19.
    "neural-style-pt": {
        **_by_square(_BLOCKS, 100),
        "content_weight": 5.0,
        "content_layers": ("relu4_2",),
        "tv_weight": 1e-3 * 255,
        "tv_power": 1.0,
        "tv_form": "sum",
        "pixel_range": "0-255",
        "padding": "zero",
        "pooling": "max",
        "init": "noise",
        "optimizer": "lbfgs",
        "clamp": False,
        "scales": 1,
        "iterations": 1000,
    },
    # PyTorch's tutorial: c + 1e6 sum_l D_l / C_l^2 on convolutions before their ReLU, pixels clamped before each
    # evaluation. Network: imagenet.
    "pytorch-tutorial": {
        **_by_square(("conv1_1", "conv1_2", "conv2_1", "conv2_2", "conv3_1"), 1e6),
        "content_weight": 1.0,
        "content_layers": ("conv2_2",),
        "padding": "zero",
        "pooling": "max",
        "init": "content",
        "optimizer": "lbfgs",
        "clamp": True,
        "scales": 1,
        "iterations": 300,
    },
    # gordicaleksa's pytorch-neural-style-transfer: 1e5 c + 3e4 mean_l D_l + sum |d|, ImageNet weights fed 0-255. What
    # it calls conv4_2 is relu4_2: the ReLU behind the convolution works in place. Network: imagenet.
    "gordicaleksa": {
        "content_weight": 1e5,
        "style_weight": 4 * 3e4,
        "content_layers": ("relu4_2",),
        "style_layers": _BLOCKS,
        "tv_weight": 255.0,
        "tv_power": 1.0,
        "tv_form": "sum",
        "pixel_range": "0-255",
        "padding": "zero",
        "pooling": "max",
        "init": "content",
        "optimizer": "lbfgs",
        "clamp": False,
        "scales": 1,
        "iterations": 1000,
    },
    # crowsonkb's style-transfer-pytorch (2023): 0.015 c + sum_l v_l W2_l + 2 TV. Its roots of matrices are 12 steps of
    # Newton and Schulz, here they are exact. Network: imagenet.
    "crowsonkb": {
        "content_weight": 0.015,
        "style_weight": 1.0,
        "style_loss": "wasserstein",
        "content_layers": ("relu4_2",),
        "style_layers": tuple(zip(_BLOCKS, (256, 64, 16, 4, 1), strict=True)),
        "tv_weight": 2.0,
        "tv_form": "nine-point",
        "padding": "replicate",
        "pooling": "max",
        "init": "content",
        "optimizer": "adam",
        "learning_rate": 0.02,
        "average": 0.99,
        "scales": "auto",
        "iterations": (1000, 500, "..."),
    },
    # pystiche 1.0, its command line: c + 1000 mean_l D_l. Network: imagenet.
    "pystiche": {
        "content_weight": 1.0,
        "style_weight": 4e3,
        "content_layers": ("relu4_2",),
        "style_layers": _BLOCKS,
        "padding": "zero",
        "pooling": "max",
        "init": "content",
        "optimizer": "lbfgs",
        "clamp": False,
        "scales": 1,
        "iterations": 500,
    },
}


def check_weights(name: str, kind: str) -> None:
    """Warn of a preset on weights of another kind (`Stylizer.weights_kind`) than it is made for."""
    made_for = "caffe" if name in CAFFE else "imagenet"
    if kind != made_for:
        text = "preset %s is made for %s weights (README names them): with %s ones its terms weigh otherwise"
        log.warning(text, name, made_for, kind)


def preset(name: str, **options: Any) -> Config:
    """The Config of a preset, in which `options` replace what it holds. Raises ValueError for an unknown name."""
    return Config(**{**PRESETS[choice("preset", name, PRESETS)], **options})
