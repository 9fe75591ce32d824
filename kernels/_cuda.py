"""Compiles the `.cu` files with CuPy and launches their kernels on torch's memory and torch's current stream."""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any

import numpy as np
import torch
from torch import Tensor

THREADS = 256  # of every block
MAX_BLOCKS = 1024  # of a kernel that strides over its input, hence the length of a buffer of partial sums
ELEMENTS = {torch.float32: "float", torch.float16: "__half"}
_TEMPLATES = {
    "gram": ("gram_partial",),
    "style": ("style_gradient",),
    "content": ("content_difference", "content_gradient"),
    "total_variation": (),
}
_PLAIN = {"gram": ("gram_reduce",), "style": ("style_difference",), "content": (), "total_variation": ("tv_gradient",)}


def source(name: str) -> str:
    """The CUDA source of `name`, its common part first."""
    folder = resources.files(__package__)
    return (folder / "common.cuh").read_text() + (folder / f"{name}.cu").read_text()


def expressions(name: str) -> tuple[str, ...]:
    """The C++ names of all kernels that `name` instantiates."""
    typed = tuple(f"{template}<{element}>" for template in _TEMPLATES[name] for element in ELEMENTS.values())
    return (*typed, *_PLAIN[name], "sum_partials")


@functools.cache
def _module(name: str, device: int) -> Any:
    import cupy

    with cupy.cuda.Device(device):
        return cupy.RawModule(code=source(name), options=("-std=c++17",), name_expressions=expressions(name))


def launch(name: str, kernel: str, grid: tuple[int, ...], *arguments: Tensor | int | float) -> None:
    """Launch `kernel` of `name`.cu with THREADS threads a block; the first argument is a tensor on the device.

    A tensor is passed as its address, an int as a 64-bit, a float as a 32-bit number.
    """
    import cupy

    first = arguments[0]
    assert isinstance(first, Tensor)
    device = first.device.index
    stream = cupy.cuda.Stream.from_external(torch.cuda.current_stream(device))
    function = _module(name, device).get_function(kernel)
    with cupy.cuda.Device(device), stream:
        function(grid, (THREADS,), tuple(_native(argument) for argument in arguments))


def _native(argument: Tensor | int | float) -> np.generic:
    if isinstance(argument, Tensor):
        return np.uint64(argument.data_ptr())
    return np.int64(argument) if isinstance(argument, int) else np.float32(argument)


def partial_sums(like: Tensor, count: int) -> tuple[int, Tensor]:
    """Blocks for `count` elements, and a buffer for one fp32 sum a block."""
    blocks = min(MAX_BLOCKS, -(-count // THREADS))
    return blocks, torch.empty(blocks, dtype=torch.float32, device=like.device)


def finish_sum(name: str, partials: Tensor, factor: float) -> Tensor:
    """factor * sum(partials) as a 0-dim fp32 tensor, added in a fixed order."""
    result = torch.empty((), dtype=torch.float32, device=partials.device)
    launch(name, "sum_partials", (1,), partials, len(partials), factor, result)
    return result
