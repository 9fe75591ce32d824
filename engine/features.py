"""VGG-19 features of one image shape and their VJP: what every runtime offers, and which one runs on a device."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from . import kernels
from .export import vgg
from .export.weights import Weights

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_T = TypeVar("_T")


def ignore(layers: tuple[str, ...]) -> None:
    """Nobody reads the features of these layers."""


Area = tuple[slice, slice]  # rows and columns of a layer


@dataclass(frozen=True)
class Part:
    """The features that are there at once: of all positions of the image, or of the `areas` of the loss layers."""

    features: Mapping[str, Tensor]
    cotangents: Mapping[str, Tensor]
    areas: Mapping[str, Area] | None = None


class Features(Protocol):
    """The forward pass and the VJP at one `spec`, with the memory they work in.

    `image` and `gradient` are (1, 3, H, W) float32. There are features and cotangents of one part, or of several, which
    may lie in the same memory, and have their turn one after the other: `turn` is the index of the part. Of a part
    `features` holds what the loss layers give out at least, `cotangents` a tensor for each loss layer, both (1, C, h,
    w) in the precision of the spec, on `cpu` in fp32, and in the memory order of the runtime. A cotangent may be the
    features of its layer themselves, which it then takes the place of. Everything happens inside `use`.
    """

    image: Tensor
    gradient: Tensor

    @property
    def spec(self) -> vgg.Spec:
        """What it was opened for."""

    @property
    def parts(self) -> Sequence[Part]:
        """What layers give out, by layer: ReLUs, or convolutions before their ReLU; and what the losses write."""

    @property
    def turn(self) -> int:
        """The part that is read or written."""

    @property
    def recordable(self) -> bool:
        """Whether both passes can be captured in a CUDA graph with what stands around them."""

    @property
    def overlapping(self) -> Overlapping | None:
        """The same network, where its VJP can begin while the losses of shallower layers are still computed."""

    @property
    def memory(self) -> list[Tensor]:
        """The tensors that it works in, where it has a VJP."""

    @property
    def products(self) -> kernels.Products | None:
        """The matrix products of the losses that suit this runtime best on a CPU; None is BLAS, or cuBLAS on a GPU."""

    def use(self) -> AbstractContextManager[None]:
        """Own the memory; on a GPU, on the stream of the runtime, which is ordered with the caller's at both ends.

        It may be nested.
        """

    def forward(self, read: Callable[[tuple[str, ...]], None] = ignore, pixels: Tensor | None = None) -> None:
        """image -> features; `pixels`, where they are given, take the place of what is in `image`.

        They are contiguous, with its shape and dtype and on its device; the runtime may read them where they are, or
        copy them; they stay as they are until the VJP. Each loss layer is handed to `read`, with others or alone, from
        the shallowest to the deepest, once its features are there; of several parts each in its turn. What `read`
        queues on a GPU may run beside the layers that follow, and is done before what comes after the forward pass.
        """

    def chains(self, name: str, *, style: bool, content: bool) -> bool:
        """Whether the VJP can make the cotangent of a loss layer itself, from a term with these losses."""

    def vjp(self, write: Callable[[tuple[str, ...]], None], terms: Mapping[str, kernels.Term] | None = None) -> None:
        """features, cotangents -> gradient; the features are spent.

        Each loss layer is handed to `write`, with others or alone, from the deepest to the shallowest: it has to write
        their cotangents, and may read the features of these layers; of several parts each in its turn. For those that
        have `terms`, which `chains` allows, it writes what these are made of.
        """


class Whole:
    """A network with one part."""

    features: Mapping[str, Tensor]
    cotangents: Mapping[str, Tensor]
    turn = 0

    @property
    def parts(self) -> Sequence[Part]:
        """That of the image as a whole."""
        return (Part(self.features, getattr(self, "cotangents", {})),)


@dataclass(frozen=True)
class Losses:
    """What `Overlapping.both` asks of the losses; `read` and `terms` are as in `Features`.

    When the deepest loss layer is read, `begin` writes its cotangent, or its term; when all are, `go_on` writes those
    of the others, and `ratio`, 0-dim fp32: of their scale to that of the deepest one.
    """

    read: Callable[[tuple[str, ...]], None]
    begin: Callable[[], None]
    go_on: Callable[[], None]
    ratio: Tensor
    terms: Mapping[str, kernels.Term]


class Overlapping(Protocol):
    """`Features` whose deepest loss layer has its convolution for itself, on a GPU in 16 bits."""

    def both(self, losses: Losses, pixels: Tensor | None = None) -> None:
        """image, or pixels in its place -> features, gradient: `forward`, then `vjp`, which overlap.

        `losses.go_on` runs beside what the VJP does until it comes to a second loss layer, where it multiplies what it
        has by `losses.ratio`.
        """


class Open(Protocol):
    """Opens a network at the shape of a spec; with `forward_only` there are no cotangents, no gradient and no VJP."""

    def __call__(self, spec: vgg.Spec, *, forward_only: bool = False, pixel_range: str = "auto") -> Features:
        """The features at `spec` of pixels as `Config.pixel_range` has them."""


def network(
    weights: Weights, layers: tuple[str, ...], device: str, precision: str, threads: int, *, with_max: bool = False
) -> Open:
    """The network down to the deepest of `layers` on a device; `with_max` asks for max pooling besides average pooling.

    On `cpu` it is the Winograd program, on so many `threads` and for specs of this `precision`; on `cudnn` its
    convolutions, elsewhere the two ONNX graphs in ONNX Runtime, both for any precision.
    Raises BackendError if the device cannot run it.
    """
    normalisation = weights.mean, weights.std  # not the weights, which the program has copies of
    if device == "cpu":
        from . import winograd

        transformed = winograd.Network(weights, layers, threads, precision=precision, with_max=with_max)

        def open_program(spec: vgg.Spec, *, forward_only: bool = False, pixel_range: str = "auto") -> Features:
            found = winograd.Features(spec, transformed, forward_only=forward_only)
            return _ranged(found, normalisation, pixel_range)

        return open_program
    if device == "cudnn":
        from . import fused

        placed = fused.Network(weights)

        def open_fused(spec: vgg.Spec, *, forward_only: bool = False, pixel_range: str = "auto") -> Features:
            found = fused.Features(spec, placed, forward_only=forward_only)
            return _ranged(found, normalisation, pixel_range)

        return open_fused
    from . import session

    def open_graphs(spec: vgg.Spec, *, forward_only: bool = False, pixel_range: str = "auto") -> Features:
        found = session.Features(spec, weights, device, threads, forward_only=forward_only)
        return _ranged(found, normalisation, pixel_range)

    return open_graphs


class Ranged:
    """A network whose first convolution sees `top` x - 255 m for pixels x in [0, 1], whatever its weights want.

    m is the mean that they are made for. It hands pixels on that the normalisation of the network turns into these.
    """

    def __init__(self, network: Features, mean: Sequence[float], std: Sequence[float], top: float) -> None:
        self._network = network
        self.spec, self.products, self.recordable = network.spec, network.products, network.recordable
        self._overlapping = network.overlapping
        self.parts, self.use, self.chains = network.parts, network.use, network.chains
        self.image = torch.zeros_like(network.image)
        if hasattr(network, "gradient"):  # it is not forward_only
            self.gradient = network.gradient
        both = torch.tensor([*mean, *std], dtype=torch.float64, device=self.image.device)
        means, deviations = both.view(2, 1, 3, 1, 1).unbind()
        self._factor, self._offset = top * deviations, means * (1 - 255 * deviations)

    @property
    def memory(self) -> list[Tensor]:
        """The tensors that it works in."""
        return [self.image, *self._network.memory]

    @property
    def turn(self) -> int:
        """The part that is read or written."""
        return self._network.turn

    @property
    def overlapping(self) -> Overlapping | None:
        """Itself, if the network is."""
        return self if self._overlapping else None

    def _hand_on(self, pixels: Tensor | None) -> None:
        seen = self.image if pixels is None else pixels
        self._network.image.copy_(seen.double() * self._factor + self._offset)  # rounded once

    def forward(self, read: Callable[[tuple[str, ...]], None] = ignore, pixels: Tensor | None = None) -> None:
        """image, or pixels in its place -> features; see `Features.forward`."""
        self._hand_on(pixels)
        self._network.forward(read)

    def vjp(self, write: Callable[[tuple[str, ...]], None], terms: Mapping[str, kernels.Term] | None = None) -> None:
        """features, cotangents -> gradient; see `Features.vjp`."""
        self._network.vjp(write, terms)
        self.gradient.mul_(self._factor)

    def both(self, losses: Losses, pixels: Tensor | None = None) -> None:
        """image, or pixels in its place -> features, gradient; see `Overlapping.both`."""
        assert self._overlapping is not None
        self._hand_on(pixels)
        self._overlapping.both(losses)
        self.gradient.mul_(self._factor)


def _ranged(network: Features, normalisation: tuple[Sequence[float], Sequence[float]], pixel_range: str) -> Features:
    """The network, made for (mean, deviation), as it sees pixels of a `Config.pixel_range`."""
    if pixel_range == "auto":
        return network
    return Ranged(network, *normalisation, float(pixel_range.removeprefix("0-")))


def pass_over(network: Features, read: Callable[[tuple[str, ...]], None]) -> None:
    """image -> features, read where they are all there, or part by part."""
    if len(network.parts) > 1:
        network.forward(read)
        return
    network.forward()
    read(network.spec.layers)


def features_of(network: Features, image: Tensor, layers: Collection[str]) -> list[dict[str, Tensor]]:
    """Copies of the features of an image (1, 3, H, W) at some loss layers, for each part of the network."""
    found: list[dict[str, Tensor]] = [{} for _ in network.parts]

    def keep(names: tuple[str, ...]) -> None:
        features = network.parts[network.turn].features
        found[network.turn].update({name: features[name].clone() for name in names if name in layers})

    with network.use():
        network.image.copy_(image)
        pass_over(network, keep)
    return found


def within(network: Features, values: Generator[_T, None, None]) -> Iterator[_T]:
    """Advance the iterator on the stream of `network`, whose memory is free for others between two iterations."""
    try:
        while True:
            with network.use():
                value = next(values, None)
            if value is None:
                return
            yield value
    finally:  # of an iterator that is left early as well: its last launches must not be amid those of others
        with network.use():
            values.close()


def give_back_freed_memory() -> None:
    """Making a network frees copies of its weights, which glibc would keep: a third of a small run's memory."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def nhwc_zeros(shape: tuple[int, int, int, int], dtype: torch.dtype, place: torch.device) -> Tensor:
    """Memory for (1, C, H, W) in NHWC order."""
    one, channels, height, width = shape
    return torch.zeros(one, height, width, channels, dtype=dtype, device=place).permute(0, 3, 1, 2)


@contextlib.contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Run on `stream` after what the current stream holds, and let the current one wait; nothing to do on a CPU."""
    current = torch.cuda.current_stream(stream.device) if stream else None
    if stream is None or current is None or current == stream:
        yield
        return
    kernels.stand_captures(str(stream.device))
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:  # after an error as well: memory that is given back now may still be written to
        current.wait_stream(stream)
