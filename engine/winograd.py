"""VGG-19 features and their VJP on a CPU, as two programs of Winograd convolutions.

Activations stand in NHWC order, fp32. In bf16 the factors of most products are rounded to it: those of the VJP but for
its last, and with average pooling those of the forward pass from the third block on; all sums are fp32. In fp32 max
pooling has direct convolutions. Of the forward pass the VJP reads one bit of each activation: whether its ReLU let it
pass, and with max pooling another one, whether it was the largest. So only what the losses read outlives its next
layer, and the losses write their cotangents where they have read; all other memory is used again and again
(`program.layout`).
A convolution that is a loss layer itself has its ReLU as a step of its own.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController
from torch import Tensor

from . import kernels
from .export import vgg
from .export.weights import Weights
from .features import Whole, ignore
from .kernels import direct, nhwc, program, vector, winograd
from .kernels.network import PADDINGS
from .kernels.program import ADD, CONVOLVE, DIRECT, DIRECT_FIRST, FIRST, LAST, MASK, POOL, RECTIFY, UNPOOL, Step


class Network:
    """The weights of a VGG-19 down to the deepest of `layers`, transformed once for all shapes, and its threads.

    They serve specs of one `precision`, fp32 or bf16. Max pooling needs other copies of them, in bf16 twice the memory,
    which are made if `with_max`.
    """

    def __init__(
        self,
        weights: Weights,
        layers: tuple[str, ...],
        threads: int,
        *,
        precision: str = "fp32",
        with_max: bool = False,
    ) -> None:
        self.precision = precision
        halves = precision == "bf16"
        self.threads = program.Threads(threads, halves=halves)
        self.arrays: dict[str, NDArray[Any]] = {"mean": np.array(weights.mean, np.float32)}
        for conv in vgg.cut(layers):
            kernel = weights.kernel(conv)
            if conv.in_channels == 3:
                self.arrays["first"], self.arrays["last"] = nhwc.first_weights(kernel), nhwc.last_weights(kernel)
                if with_max and not halves:
                    exact = weights.parameters[f"{conv.name}.weight"].numpy()
                    self.arrays["first.direct"] = direct.first_weights(exact, weights.mean, weights.std)
            else:
                if halves:
                    turned = kernel.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1]
                    self.arrays[f"{conv.name}.vjp"] = vector.in_halves(winograd.transform_kernel(turned))
                panels, rounded = winograd.transform_kernel(kernel), halves and conv.block >= _ROUNDED
                if not rounded or with_max:
                    self.arrays[conv.name] = panels
                if rounded:
                    self.arrays[f"{conv.name}.halves"] = vector.in_halves(panels)
                if with_max and not halves:
                    self.arrays[f"{conv.name}.direct"] = direct.panels(kernel)
            self.arrays[f"{conv.name}.bias"] = weights.parameters[f"{conv.name}.bias"].numpy().copy()

    def address(self, name: str) -> int:
        """Where the array `name` stands."""
        return self.arrays[name].ctypes.data


_HOST, _NOWHERE = torch.device("cpu"), torch.device("meta")


class Features(Whole):
    """The forward program and the VJP program of one `spec`, with the memory they work in.

    `image` and `gradient` are (1, 3, H, W) float32; `features` holds those of the loss layers, (1, C, H_l, W_l) float32
    in NHWC order, and `cotangents` are the same memory. `forward` reads `image` and writes `features`;
    `vjp` writes `gradient` and leaves nothing of use in `features`. All of it happens inside `use`. With `forward_only`
    there is no VJP.
    """

    recordable = False
    overlapping = None

    def __init__(
        self, spec: vgg.Spec, network: Network, *, forward_only: bool = False, place: torch.device = _HOST
    ) -> None:
        assert spec.precision == network.precision
        self.spec, self.products = spec, network.threads
        self._network, self._lock, self._forward_only = network, threading.RLock(), forward_only
        self.image = torch.zeros(1, 3, spec.height, spec.width, device=place)
        self._sizes: dict[str, int] = {}
        forward = self._forward_steps()
        parts: list[tuple[tuple[str, ...], list[Step]]] = []
        if not forward_only:
            self.gradient = torch.zeros(self.image.shape, device=place)
            parts = self._vjp_parts()
        kept = spec.layers if forward_only else ()
        steps = [*forward, *(step for _, part in parts for step in part)]
        places, floats = program.layout(steps, self._sizes, kept)
        self._memory = torch.zeros(floats, device=place)
        self.features = {name: _nhwc(self._memory[places[name] :], spec.shapes[name]) for name in spec.layers}
        self.cotangents = self.features
        addresses = {name: self._memory.data_ptr() + 4 * place for name, place in places.items()}
        self._forward = program.table(forward, addresses)
        self._vjp = [(layers, program.table(part, addresses)) for layers, part in parts]
        floats = max(program.scratch_size(table) for table in (self._forward, *(table for _, table in self._vjp)))
        self._scratch = [torch.zeros(floats, device=place) for _ in range(network.threads.count)]

    @property
    def memory(self) -> list[Tensor]:
        """The tensors that it works in."""
        return [self.image, *([] if self._forward_only else [self.gradient]), self._memory, *self._scratch]

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Own the memory, and keep torch to the calling thread: its OpenMP threads would spin on our processors."""
        with self._lock, _openmp().limit(limits=1, user_api="openmp"):
            yield

    def forward(self, read: Callable[[tuple[str, ...]], None] = ignore, pixels: Tensor | None = None) -> None:
        """image, or pixels, which are copied there -> features, which are read all at once."""
        if pixels is not None:
            self.image.copy_(pixels)
        self.products.run(self._forward, self._scratch)
        read(self.spec.layers)

    def chains(self, name: str, *, style: bool, content: bool) -> bool:
        """It reads all cotangents from memory."""
        return False

    def vjp(self, write: Callable[[tuple[str, ...]], None], terms: Mapping[str, kernels.Term] | None = None) -> None:
        """features, cotangents -> gradient; a loss layer's cotangent is written when it is needed."""
        for layers, table in self._vjp:
            write(layers)
            self.products.run(table, self._scratch)

    def _forward_steps(self) -> list[Step]:
        spec, network, largest = self.spec, self._network, int(self.spec.pooling == "max")
        straight = largest and spec.precision == "fp32"
        steps: list[Step] = []
        source: int | str = self.image.data_ptr()
        for i, conv in enumerate(spec.convs):
            _, channels, height, width = spec.shapes[conv.relu]
            if conv.after_pool:
                below = spec.convs[i - 1]
                pooled = self._buffer(f"{below.relu} pooled", height * width, below.out_channels)
                step: Step = {"op": POOL, "tasks": height, "source": source, "target": pooled, "largest": largest}
                steps.append(step | self._shape(below) | self._winners(below))
                source = pooled
            bare = conv.name in spec.layers
            target = self._buffer(conv.name if bare else conv.relu, height * width, channels)
            bits = self._bits(f"{conv.relu} bits", height * width * channels)
            step = {"source": source, "target": target, "bits": bits, "padding": PADDINGS.index(spec.edge(conv))}
            step["ending"] = winograd.BIASED if bare else winograd.RELU
            step |= self._shape(conv) | {"extra": network.address(f"{conv.name}.bias")}
            if conv.in_channels == 3 and straight:
                step |= {"op": DIRECT_FIRST, "tasks": height, "weights": network.address("first.direct")}
            elif conv.in_channels == 3:
                step |= {"op": FIRST, "tasks": -(-height // nhwc.BAND), "mean": network.address("mean")}
                step["weights"] = network.address("first")
            elif straight:
                step |= {"op": DIRECT, "c_in": conv.in_channels, "weights": network.address(f"{conv.name}.direct")}
                step |= self._groups(direct.tiles(height, width), channels)
            else:
                rounded = spec.precision == "bf16" and not largest and conv.block >= _ROUNDED
                place = network.address(f"{conv.name}.halves" if rounded else conv.name)
                step |= {"op": CONVOLVE, "c_in": conv.in_channels, "weights": place, "halves": int(rounded)}
                step |= self._shares(height, width, conv.in_channels, channels)
            steps.append(step)
            source = target
            if bare and (conv is not spec.convs[-1] or conv.relu in spec.layers):
                source = self._buffer(conv.relu, height * width, channels)
                step = {"op": RECTIFY, "tasks": height, "source": target, "target": source}
                steps.append(step | self._shape(conv))
        return steps

    def _vjp_parts(self) -> list[tuple[tuple[str, ...], list[Step]]]:
        """The steps of the VJP in parts, each with the loss layers whose cotangents it is the first to read."""
        parts: list[tuple[tuple[str, ...], list[Step]]] = []
        for layers, step in self._vjp_steps():
            if layers:
                parts.append((layers, []))
            parts[-1][1].append(step)
        return parts

    def _vjp_steps(self) -> Iterator[tuple[tuple[str, ...], Step]]:
        """The steps, each with the loss layers whose cotangents it is the first to read."""
        spec, network, largest = self.spec, self._network, int(self.spec.pooling == "max")
        deepest = spec.convs[-1]
        source = deepest.relu if deepest.relu in spec.layers else deepest.name
        read: tuple[str, ...] = (source,)  # layers that the next step reads
        if source == deepest.relu:
            _, _, height, width = spec.shapes[source]
            step: Step = {"op": MASK, "tasks": height, "target": source, "bits": f"{source} bits"}
            yield read, step | self._shape(deepest)
            read = ()
        for i, conv in reversed(list(enumerate(spec.convs))):
            _, channels, height, width = spec.shapes[conv.relu]
            if conv.name in spec.layers and source != conv.name:
                step = {"op": ADD, "tasks": height, "source": conv.name, "target": source}
                yield (conv.name,), step | self._shape(conv)
            step = {"source": source, "height": height, "width": width, "c_in": channels}
            step["padding"] = PADDINGS.index(spec.edge(conv))
            if conv.in_channels == 3:
                step |= {"op": LAST, "tasks": -(-height // nhwc.BAND), "target": self.gradient.data_ptr()}
                yield read, step | {"weights": network.address("last")}
                break
            below = spec.convs[i - 1]
            _, _, tall, broad = spec.shapes[below.relu]
            adds = int(below.relu in spec.layers)
            target = below.relu if adds else self._buffer(f"{below.relu} cotangent", tall * broad, conv.in_channels)
            step |= {"op": CONVOLVE, "c_out": conv.in_channels}
            if spec.precision == "bf16":
                step |= {"halves": 1, "weights": network.address(f"{conv.name}.vjp")}
            else:
                step |= {"turned": 1, "weights": network.address(conv.name)}
            step |= self._shares(height, width, channels, conv.in_channels)
            own: Step = {"target": target, "bits": f"{below.relu} bits"}
            layers = (below.relu,) if adds else ()
            if conv.after_pool:
                pooled = self._buffer(f"{below.relu} pooled cotangent", height * width, conv.in_channels)
                yield read, step | {"target": pooled, "ending": winograd.PLAIN}
                read = ()
                step = {"op": UNPOOL, "tasks": -(-tall // 2), "source": pooled, "adds": adds, "largest": largest}
                yield layers, step | own | self._shape(below) | self._winners(below)
            else:
                yield (*read, *layers), step | own | {"ending": winograd.MASKED_SUM if adds else winograd.MASKED}
            source, read = target, ()

    def _shape(self, conv: vgg.Conv) -> Step:
        _, channels, height, width = self.spec.shapes[conv.relu]
        return {"height": height, "width": width, "c_out": channels}

    def _winners(self, conv: vgg.Conv) -> Step:
        """The bits of the largest in each window behind a layer."""
        if self.spec.pooling != "max":
            return {}
        return {"winners": self._bits(f"{conv.relu} winners", _count(self.spec.shapes[conv.relu]))}

    def _buffer(self, name: str, positions: int, channels: int) -> str:
        """Make room for an array, and for a vector of positions to be read past its end."""
        self._sizes[name] = (positions + vector.ROWS) * channels
        return name

    def _bits(self, name: str, count: int) -> str:
        """Make room for as many bits."""
        self._sizes[name] = -(-count // (32 * vector.LANES)) * vector.LANES
        return name

    def _shares(self, height: int, width: int, c_in: int, c_out: int) -> Step:
        """How a convolution is cut into tasks: blocks of tiles, and groups of channels where tiles are few."""
        tiles = -(-height // 4) * -(-width // 4)
        block = min(_BLOCKS[c_in], -(-tiles // winograd.TILES) * winograd.TILES)
        return {"tiles": block} | self._groups(-(-tiles // block), c_out)

    def _groups(self, blocks: int, channels: int) -> Step:
        """Groups of output channels, so that there are enough tasks for the threads."""
        groups = 1
        while blocks * groups < 2 * self.products.count and channels % (2 * groups * vector.BLOCK) == 0:
            groups *= 2
        return {"tasks": blocks * groups, "groups": groups}


class _Unopened(Network):
    """Without weights, for programs that are laid out and never run."""

    def __init__(self, precision: str, threads: int) -> None:
        self.precision, self.threads = precision, program.Threads(threads)

    def address(self, name: str) -> int:
        """Nowhere."""
        return 0


def memory(spec: vgg.Spec, threads: int, *, forward_only: bool = False) -> int:
    """Bytes of the tensors of `Features` at a spec, of which none is allocated."""
    found = Features(spec, _Unopened(spec.precision, threads), forward_only=forward_only, place=_NOWHERE)
    return sum(each.nbytes for each in found.memory)


# In bf16 the first block whose forward pass has bf16 factors: rounding in the blocks before it turns so many ReLUs over
# that the gradient would be off five times as far. Max pooling decides by differences that are smaller still.
_ROUNDED = 3
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


def _count(shape: tuple[int, int, int, int]) -> int:
    return shape[1] * shape[2] * shape[3]
