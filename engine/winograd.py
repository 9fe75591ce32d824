"""VGG-19 features and their VJP on a CPU, as two programs of Winograd convolutions; direct ones before max pooling.

Activations stand in NHWC order, fp32. The VJP works in place: it turns each ReLU output into its own masked cotangent.
What the losses add to a layer is written just before, where the features of deeper layers have been: when the VJP comes
to layer i it reads layer i + 1 and is done with those behind it. A convolution that is a loss layer itself has memory
of its own for its values, and its ReLU is a step of its own; their cotangent is added to the masked one of the ReLU.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController
from torch import Tensor

from .export import vgg
from .export.weights import Weights
from .features import give_back_freed_memory
from .kernels import direct, nhwc, program, vector, winograd
from .kernels.program import ADD, CONVOLVE, DIRECT, DIRECT_FIRST, FIRST, LAST, MASK, POOL, RECTIFY, UNPOOL


class Network:
    """The weights of a VGG-19 down to the deepest of `layers`, transformed once for all shapes, and its threads.

    Max pooling needs another copy of them, which is made if `with_max`.
    """

    def __init__(self, weights: Weights, layers: tuple[str, ...], threads: int, *, with_max: bool = False) -> None:
        self.threads = program.Threads(threads)
        self.arrays: dict[str, NDArray[Any]] = {"mean": np.array(weights.mean, np.float32)}
        for conv in vgg.cut(layers):
            kernel = weights.kernel(conv)
            if conv.in_channels == 3:
                self.arrays["first"], self.arrays["last"] = nhwc.first_weights(kernel), nhwc.last_weights(kernel)
                if with_max:
                    exact = weights.parameters[f"{conv.name}.weight"].numpy()
                    self.arrays["first.direct"] = direct.first_weights(exact, weights.mean, weights.std)
            else:
                self.arrays[conv.name] = winograd.transform_kernel(kernel)
                if with_max:
                    self.arrays[f"{conv.name}.direct"] = direct.panels(kernel)
            self.arrays[f"{conv.name}.bias"] = weights.parameters[f"{conv.name}.bias"].numpy().copy()
        give_back_freed_memory()

    def address(self, name: str) -> int:
        """Where the array `name` stands."""
        return self.arrays[name].ctypes.data


class Features:
    """The forward program and the VJP program of one `spec`, with the memory they work in.

    `image` and `gradient` are (1, 3, H, W) float32; `features` holds every ReLU output, `cotangents` one tensor for
    each loss layer, both (1, C, H_l, W_l) float32 in NHWC order. `forward` reads `image` and writes `features`; `vjp`
    reads `features` and the cotangents that it has asked for, writes `gradient` and leaves nothing of use in
    `features`. All of it happens inside `use`. With `forward_only` there is no VJP, and the features of other than the
    loss layers share memory.
    """

    def __init__(self, spec: vgg.Spec, network: Network, *, forward_only: bool = False) -> None:
        self.spec, self.products = spec, network.threads
        self._network, self._lock = network, threading.RLock()
        self.image = torch.zeros(1, 3, spec.height, spec.width)
        shapes = spec.shapes
        kept = [conv.relu for conv in spec.convs if conv.relu in spec.layers or not forward_only]
        # With room for a vector of positions to be read past the end of each.
        ends = list(itertools.accumulate((_room(shapes[name]) for name in kept), initial=0))
        begins = dict(zip(kept, ends, strict=False))
        dead = {}  # where a cotangent is written
        for i, name in enumerate(kept):
            dead[name] = dead[name.replace("relu", "conv")] = ends[min(i + 2, len(kept))]
        needed = ends[-1]
        if not forward_only:
            needed = max(needed, *(dead[name] + _count(shapes[name]) for name in spec.layers))
        memory = torch.zeros(needed)
        self.features = {name: _nhwc(memory[begins[name] :], shapes[name]) for name in kept}
        for name in (conv.name for conv in spec.convs if conv.name in spec.layers):
            self.features[name] = _nhwc(torch.zeros(_room(shapes[name])), shapes[name])
        largest = max((_count(shapes[conv.relu]) for conv in spec.convs if conv.relu not in kept), default=0)
        self._spare = [torch.zeros(largest) for _ in range(2 if largest else 0)]
        pooled = [_count(shapes[conv.relu]) // 4 for conv in spec.convs]
        self._pooled = torch.zeros(max(pooled))
        self._forward = program.table(self._forward_steps())
        self._vjp: list[tuple[tuple[str, ...], NDArray[Any]]] = []
        if not forward_only:
            self.gradient = torch.zeros_like(self.image)
            self.cotangents = {name: _nhwc(memory[dead[name] :], shapes[name]) for name in spec.layers}
            self._vjp = [(layers, program.table(steps)) for layers, steps in self._vjp_parts()]
        floats = max(program.scratch_size(table) for table in (self._forward, *(table for _, table in self._vjp)))
        self._scratch = [torch.zeros(floats) for _ in range(network.threads.count)]

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Own the memory, and keep torch to the calling thread: its OpenMP threads would spin on our processors."""
        with self._lock, _openmp().limit(limits=1, user_api="openmp"):
            yield

    def forward(self) -> None:
        """image -> features."""
        self.products.run(self._forward, self._scratch)

    def vjp(self, write: Callable[[tuple[str, ...]], None]) -> None:
        """features, cotangents -> gradient; each loss layer's cotangent is written by itself."""
        for layers, table in self._vjp:
            write(layers)
            self.products.run(table, self._scratch)

    def _vjp_parts(self) -> list[tuple[tuple[str, ...], list[dict[str, int]]]]:
        """The steps of the VJP in parts, each of which starts by reading the cotangent of one loss layer."""
        parts: list[tuple[tuple[str, ...], list[dict[str, int]]]] = []
        for layer, step in self._vjp_steps():
            if layer:
                parts.append(((layer,), []))
            parts[-1][1].append(step)
        return parts

    def _forward_steps(self) -> list[dict[str, int]]:
        spec, network, largest = self.spec, self._network, int(self.spec.pooling == "max")
        steps: list[dict[str, int]] = []
        source = self.image.data_ptr()
        for i, conv in enumerate(spec.convs):
            _, channels, height, width = spec.shapes[conv.relu]
            if conv.after_pool:
                _, below, tall, broad = spec.shapes[spec.convs[i - 1].relu]
                pooling = {"op": POOL, "tasks": height, "source": source, "target": self._pooled.data_ptr()}
                steps.append(pooling | {"height": tall, "width": broad, "c_out": below, "largest": largest})
                source = self._pooled.data_ptr()
            kept, bare = self.features.get(conv.relu), self.features.get(conv.name)
            rectified = self._spare[i % 2].data_ptr() if kept is None else kept.data_ptr()
            target, ending = (rectified, winograd.RELU) if bare is None else (bare.data_ptr(), winograd.BIASED)
            step = {"source": source, "target": target, "height": height, "width": width, "c_out": channels}
            step["ending"] = ending
            step |= {"extra": network.address(f"{conv.name}.bias"), "padding": nhwc.PADDINGS.index(spec.edge(conv))}
            if conv.in_channels == 3 and largest:
                step |= {"op": DIRECT_FIRST, "tasks": height, "weights": network.address("first.direct")}
            elif conv.in_channels == 3:
                step |= {"op": FIRST, "tasks": -(-height // nhwc.BAND), "mean": network.address("mean")}
                step["weights"] = network.address("first")
            elif largest:
                step |= {"op": DIRECT, "c_in": conv.in_channels, "weights": network.address(f"{conv.name}.direct")}
                step |= self._groups(direct.tiles(height, width), channels)
            else:
                step |= {"op": CONVOLVE, "c_in": conv.in_channels}
                step |= {"weights": network.address(conv.name)} | self._shares(step)
            steps.append(step)
            if bare is not None:
                steps.append(self._rows(RECTIFY, conv) | {"source": target, "target": rectified})
            source = rectified
        return steps

    def _vjp_steps(self) -> Iterator[tuple[str, dict[str, int]]]:
        """The steps, each with the loss layer whose cotangent it is the first to read, if there is one."""
        spec, network, largest = self.spec, self._network, int(self.spec.pooling == "max")
        deepest = spec.convs[-1]
        source = self.features[deepest.relu].data_ptr()
        if deepest.relu in self.cotangents:
            yield deepest.relu, self._rows(MASK, deepest) | {"source": self._own(deepest.relu), "target": source}
        for i, conv in reversed(list(enumerate(spec.convs))):
            _, channels, height, width = spec.shapes[conv.relu]
            if conv.name in self.cotangents:
                afresh = int(conv is deepest and conv.relu not in self.cotangents)
                step = {"source": self._own(conv.name), "target": source, "ending": afresh}
                yield conv.name, self._rows(ADD, conv) | step
            step = {"source": source, "height": height, "width": width, "c_in": channels}
            step["padding"] = nhwc.PADDINGS.index(spec.edge(conv))
            if conv.in_channels == 3:
                step |= {"op": LAST, "tasks": -(-height // nhwc.BAND), "target": self.gradient.data_ptr()}
                yield "", step | {"weights": network.address("last")}
                break
            below = spec.convs[i - 1]
            own, target = self._own(below.relu), self.features[below.relu].data_ptr()
            layer = below.relu if own else ""
            step |= {"op": CONVOLVE, "c_out": conv.in_channels, "turned": 1, "weights": network.address(conv.name)}
            step |= self._shares(step)
            if conv.after_pool:
                pooled = self._pooled.data_ptr()
                yield "", step | {"target": pooled, "ending": winograd.PLAIN}
                _, channels, height, width = spec.shapes[below.relu]
                step = {"op": UNPOOL, "tasks": -(-height // 2), "source": pooled, "target": target, "extra": own}
                yield layer, step | {"height": height, "width": width, "c_out": channels, "largest": largest}
            else:
                ending = winograd.MASKED_SUM if own else winograd.MASKED
                yield layer, step | {"target": target, "ending": ending, "extra": own}
            source = target

    def _rows(self, op: int, conv: vgg.Conv) -> dict[str, int]:
        """A step that goes through a layer row by row."""
        _, channels, height, width = self.spec.shapes[conv.relu]
        return {"op": op, "tasks": height, "width": width, "c_out": channels}

    def _own(self, layer: str) -> int:
        """Address of the cotangent that the losses give to a layer, or 0."""
        return self.cotangents[layer].data_ptr() if layer in self.cotangents else 0

    def _shares(self, step: dict[str, int]) -> dict[str, int]:
        """How a convolution is cut into tasks: blocks of tiles, and groups of channels where tiles are few."""
        tiles = -(-step["height"] // 4) * -(-step["width"] // 4)
        block = min(_BLOCKS[step["c_in"]], -(-tiles // winograd.TILES) * winograd.TILES)
        return {"tiles": block} | self._groups(-(-tiles // block), step["c_out"])

    def _groups(self, blocks: int, channels: int) -> dict[str, int]:
        """Groups of output channels, so that there are enough tasks for the threads."""
        groups = 1
        while blocks * groups < 2 * self.products.count and channels % (2 * groups * vector.BLOCK) == 0:
            groups *= 2
        return {"tasks": blocks * groups, "groups": groups}


# Tiles of one task by input channels: V and M stay in the second cache, and U is read once for as many as possible.
_BLOCKS = {64: 36, 128: 36, 256: 36, 512: 48}


@functools.cache
def _openmp() -> ThreadpoolController:
    """The OpenMP libraries of this process; a limit on their threads holds for the calling thread alone."""
    return ThreadpoolController()


def _nhwc(memory: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """A tensor (1, C, H, W) in NHWC order at the beginning of `memory`."""
    _, channels, height, width = shape
    return memory[: _count(shape)].view(1, height, width, channels).permute(0, 3, 1, 2)


def _room(shape: tuple[int, int, int, int]) -> int:
    return _count(shape) + vector.ROWS * shape[1]


def _count(shape: tuple[int, int, int, int]) -> int:
    return shape[1] * shape[2] * shape[3]
