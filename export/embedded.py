"""The file of embedded features: how its filters are stored, and how they become float32 again.

For each convolution the file holds `NAME.step` (C_out,) and `NAME.bias` (C_out,) in float32 and, unless the filters are
random directions made from the seed in the recipe, `NAME.weight`: int8 (C_out, C_in, 3, 3), or uint8 with two 4-bit
filter taps to a byte (C_out, C_in * 9 / 2). A tap is its integer times the step of its output channel; 4-bit integers
stand for -7.5, -6.5, ... 7.5. The file is safetensors: reading it runs no code. Its metadata
hold the recipe as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from . import vgg

FILE = Path(__file__).with_name("vgg19-embedded.safetensors")
_STEPS_4BIT = torch.linspace(0.2, 0.6, 21)  # in deviations of the filter; 0.335 is best for Gaussian taps (Max 1960)


def load_embedded(convs: Iterable[vgg.Conv], path: Path = FILE) -> dict[str, Tensor]:
    """Float32 `conv1_1.weight` (C_out, C_in, 3, 3), `conv1_1.bias` (C_out,), ... for `convs`.

    They take an image normalised by ImageNet's mean and deviation.
    """
    from safetensors import safe_open

    parameters: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as file:
        seed = json.loads(file.metadata()["recipe"])["seed"]
        names = set(file.keys())
        for conv in convs:
            step = file.get_tensor(f"{conv.name}.step")
            stored = (
                file.get_tensor(f"{conv.name}.weight") if f"{conv.name}.weight" in names else directions(conv, seed)
            )
            parameters[f"{conv.name}.weight"] = expand(stored, step, conv)
            parameters[f"{conv.name}.bias"] = file.get_tensor(f"{conv.name}.bias")
    return parameters


def directions(conv: vgg.Conv, seed: int) -> Tensor:
    """Random filters (C_out, C_in, 3, 3) of zero sum: they see differences between channels, not their common level."""
    generator = torch.Generator().manual_seed(seed + vgg.CONVS.index(conv))
    weight = torch.randn(conv.out_channels, conv.in_channels, 3, 3, generator=generator)
    # In fp64, as the order of a sum depends on the processor: manifests know the filters by their hash.
    return weight - weight.double().mean((1, 2, 3), keepdim=True).float()


def shrink(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Store `weight` (C_out, C_in, 3, 3) with 8 or 4 bits a tap: (stored, step (C_out,)); see the top of the file."""
    flat = weight.flatten(1)
    if bits == 8:
        step = flat.abs().amax(1) / 127
        return torch.round(flat / step[:, None]).to(torch.int8).reshape(weight.shape), step
    steps = flat.std(1) * _STEPS_4BIT[:, None]  # (candidates, C_out)
    errors = torch.stack([(flat - (_nibbles(flat, step) - 7.5) * step[:, None]).square().sum(1) for step in steps])
    step = steps.gather(0, errors.argmin(0, keepdim=True))[0]
    integers = _nibbles(flat, step).to(torch.uint8)
    return integers[:, 0::2] | integers[:, 1::2] << 4, step


def expand(stored: Tensor, step: Tensor, conv: vgg.Conv) -> Tensor:
    """The float32 filters (C_out, C_in, 3, 3) of what `shrink` or `directions` returned."""
    if stored.dtype == torch.uint8:
        stored = torch.stack([stored & 15, stored >> 4], 2).float() - 7.5
    return stored.reshape(conv.out_channels, conv.in_channels, 3, 3).float() * step.reshape(-1, 1, 1, 1)


def _nibbles(flat: Tensor, step: Tensor) -> Tensor:
    return torch.round(flat / step[:, None] + 7.5).clamp(0, 15)
