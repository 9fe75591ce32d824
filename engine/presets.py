"""The objectives of other programs as options of this one. Standard library only.

A preset holds the layers, weights, pooling, start, optimiser and iterations of the named program's defaults; its loss
and gradient are those of the program, given the network that it names (`--weights`). The weights convert by the form
that both have: with c the mean of (F - P)^2 and D_l the mean of (G_l / M - A_l / M)^2 over the C x C entries, the loss
here is content_weight c + style_weight sum_l v_l D_l / 4. Sizes are the user's, and the L-BFGS is the engine's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import Config, choice

_BLOCKS = tuple(f"relu{block}_1" for block in range(1, 6))

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # pystiche 1.0, its command line: c + 1000 mean_l D_l. Network: imagenet.
    "pystiche": {
        "content_weight": 1.0,
        "style_weight": 4e3,
        "content_layers": ("relu4_2",),
        "style_layers": _BLOCKS,
        "pooling": "max",
        "init": "content",
        "optimizer": "lbfgs",
        "scales": 1,
        "iterations": 500,
    },
}


def preset(name: str, **options: Any) -> Config:
    """The Config of a preset, in which `options` replace what it holds. Raises ValueError for an unknown name."""
    return Config(**{**PRESETS[choice("preset", name, PRESETS)], **options})
