"""Compiles the `.cu` files with CuPy and launches their kernels on torch's memory and torch's current stream."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import re
import weakref
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

NAMES = ("gram", "losses", "gradients", "pixels", "temporal", "adam", "lbfgs", "network")
THREADS = 256  # of every block
MAX_BLOCKS = 1024  # of a kernel that strides over its input
_OVERLAPPING = 9, 0  # compute capability from which on a kernel can be brought to the device ahead of its turn
ELEMENTS = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
_CHOICES = {
    "typename T": tuple(ELEMENTS.values()),
    "typename H": tuple(ELEMENTS.values())[1:],  # of 16 bits
    "bool NHWC": ("false", "true"),
    "int C": ("64", "128"),
}


def text(file: str) -> str:
    """The text of a CUDA file, with the files that it includes in quotes in their place."""
    found = (resources.files(__package__) / file).read_text()
    return re.sub(r'#include "(.+)"\n', lambda include: text(include[1]), found)


@functools.cache
def expressions(name: str) -> tuple[str, ...]:
    """The C++ names of all kernels of `name`.cu, templates with each of their arguments."""
    found = []
    pattern = r"(?:template <(.+)>\n)?__global__ void (?:__launch_bounds__\(.+?\) )?(\w+)\("
    for parameters, kernel in re.findall(pattern, text(f"{name}.cu")):
        choices = [_CHOICES[parameter] for parameter in parameters.split(", ") if parameter]
        found += [f"{kernel}<{', '.join(each)}>" if each else kernel for each in itertools.product(*choices)]
    return tuple(found)


@functools.cache
def _module(name: str, element: str, device: int) -> Any:
    """The kernels of `name`.cu for an element type, or those without one: nobody waits for what is not used."""
    import cupy

    options = ("-std=c++17", *(f"-I{folder}" for folder in _include_folders()))
    wanted = [each for each in expressions(name) if _element(each) == element]
    with cupy.cuda.Device(device):
        return cupy.RawModule(code=text(f"{name}.cu"), options=options, name_expressions=wanted)


def _element(expression: str) -> str:
    """The type among the template arguments of a kernel, empty if there is none."""
    found = re.search(r"<(\w+)", expression)
    return found[1] if found else ""


def _include_folders() -> list[Path]:
    """Of cuda_fp16.h in the wheels that torch brings along; CuPy looks for a toolkit only."""
    found = importlib.util.find_spec("nvidia")
    roots = found.submodule_search_locations if found else None
    return [path.parent for root in roots or () for path in Path(root).glob("*/include/cuda_fp16.h")]


@functools.cache
def _function(name: str, kernel: str, device: int) -> Any:
    return _module(name, _element(kernel), device).get_function(kernel)


class Table:
    """Rows of addresses and numbers in device memory, 64 bits each; it keeps the tensors that it points to.

    None stands for a null pointer; a float is a double.
    """

    def __init__(self, rows: Sequence[Sequence[Tensor | float | None]], device: torch.device) -> None:
        self.rows = rows
        numbers = [[_bits(cell) for cell in row] for row in rows]
        self.tensor = torch.tensor(numbers, dtype=torch.int64).to(device)


def _bits(cell: Tensor | float | None) -> int:
    if isinstance(cell, Tensor):
        return cell.data_ptr()
    return int(np.float64(cell).view(np.int64)) if isinstance(cell, float) else cell or 0


_free_streams: list[torch.cuda.Stream] = []
_cupys_streams: list[Any] = []  # CuPy's objects, which would take their streams along


def own_stream(owner: object, place: torch.device) -> torch.cuda.Stream:
    """A stream that nobody else has while `owner` lives.

    torch's own come round again after 32, and what one thread queues could find its way into the graph that another one
    captures.
    """
    try:
        stream = _free_streams.pop()
    except IndexError:
        import cupy

        with cupy.cuda.Device(place.index):
            _cupys_streams.append(cupy.cuda.Stream(non_blocking=True))
        stream = torch.cuda.ExternalStream(_cupys_streams[-1].ptr, place)
    weakref.finalize(owner, _free_streams.append, stream).atexit = False
    return stream


Argument = Tensor | Table | int | float | None


def launch(name: str, kernel: str, grid: tuple[int, ...], *arguments: Argument) -> None:
    """Launch `kernel` of `name`.cu with THREADS threads a block, on the device of the first tensor.

    A tensor or a table is passed as its address, None as the null pointer, an int as a 64-bit, a float as a 32-bit
    number. Where the device can, the kernel is brought there while the one before it still runs: see `take_turn`.
    """
    import cupy
    from cuda.bindings import driver

    places = (each.tensor if isinstance(each, Table) else each for each in arguments)
    device = next(each.device.index for each in places if isinstance(each, Tensor))
    launching = driver.CUlaunchConfig()
    launching.gridDimX, launching.gridDimY, launching.gridDimZ = (*grid, 1, 1)[:3]
    launching.blockDimX, launching.blockDimY, launching.blockDimZ = THREADS, 1, 1
    launching.hStream = driver.CUstream(init_value=torch.cuda.current_stream(device).cuda_stream)
    if torch.cuda.get_device_capability(device) >= _OVERLAPPING:
        early = driver.CUlaunchAttribute()
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        launching.attrs, launching.numAttrs = [early], 1
    cells = np.concatenate([_cell(argument) for argument in arguments])
    addresses = cells.ctypes.data + 8 * np.arange(len(arguments), dtype=np.uint64)
    with cupy.cuda.Device(device):
        function = driver.CUfunction(init_value=_function(name, kernel, device).kernel.ptr)
        (status,) = driver.cuLaunchKernelEx(launching, function, addresses.ctypes.data, 0)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"kernel {kernel}: {status.name}")


def _cell(argument: Argument) -> np.ndarray[Any, Any]:
    """The eight bytes that hold an argument."""
    if isinstance(argument, Table):
        argument = argument.tensor
    if isinstance(argument, Tensor):
        return np.array([argument.data_ptr()], np.uint64)
    if isinstance(argument, float):
        return np.array([argument, 0], np.float32).view(np.uint64)
    return np.array([argument or 0], np.int64).view(np.uint64)


def blocks(count: int) -> int:
    """Blocks of a kernel that strides over `count` elements."""
    return min(MAX_BLOCKS, -(-count // THREADS))


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def shared_memory(device: torch.device) -> int:
    """Bytes of memory that the blocks on a multiprocessor share; each takes 1 kB more than it asks for."""
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
