"""VGG-19 features of one image shape and their VJP: what every runtime offers, and which one runs on a device."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from torch import Tensor

from . import kernels
from .export import vgg
from .export.weights import Weights

_T = TypeVar("_T")


class Features(Protocol):
    """The forward pass and the VJP at one `spec`, with the memory they work in.

    `image` and `gradient` are (1, 3, H, W) float32; `features` holds the ReLU outputs of the loss layers at least,
    `cotangents` a tensor for each loss layer, both (1, C, H_l, W_l) in the precision of the spec and in the memory
    order of the runtime. A cotangent may be the features of its layer themselves, which it then takes the place of.
    Everything happens inside `use`.
    """

    image: Tensor
    gradient: Tensor

    @property
    def spec(self) -> vgg.Spec:
        """What it was opened for."""

    @property
    def features(self) -> Mapping[str, Tensor]:
        """ReLU outputs by layer."""

    @property
    def cotangents(self) -> Mapping[str, Tensor]:
        """What the losses write, by loss layer."""

    @property
    def products(self) -> kernels.Products | None:
        """The matrix products of the losses that suit this runtime best on a CPU; None is BLAS."""

    def use(self) -> AbstractContextManager[None]:
        """Own the memory; on a GPU, on the stream of the runtime, which is ordered with the caller's at both ends.

        It may be nested.
        """

    def forward(self) -> None:
        """image -> features."""

    def vjp(self, write: Callable[[tuple[str, ...]], None]) -> None:
        """features, cotangents -> gradient; the features are spent.

        Each loss layer is handed to `write`, with others or alone, from the deepest to the shallowest: it has to write
        their cotangents, and may read the features of these layers.
        """


class Open(Protocol):
    """Opens a network at the shape of a spec; with `forward_only` there are no cotangents, no gradient and no VJP."""

    def __call__(self, spec: vgg.Spec, *, forward_only: bool = False) -> Features:
        """The features at `spec`."""


def network(weights: Weights, layers: tuple[str, ...], device: str, threads: int, *, with_max: bool = False) -> Open:
    """The network down to the deepest of `layers` on a device; `threads` counts on a CPU.

    `with_max` asks for max pooling besides average pooling.
    On `cpu` it is the Winograd program, elsewhere the two ONNX graphs in ONNX Runtime. Raises BackendError if the
    device cannot run it.
    """
    if device == "cpu":
        from . import winograd

        transformed = winograd.Network(weights, layers, threads, with_max=with_max)

        def open_program(spec: vgg.Spec, *, forward_only: bool = False) -> Features:
            return winograd.Features(spec, transformed, forward_only=forward_only)

        return open_program
    from . import session

    def open_graphs(spec: vgg.Spec, *, forward_only: bool = False) -> Features:
        return session.Features(spec, weights, device, threads, forward_only=forward_only)

    return open_graphs


def within(network: Features, values: Iterator[_T]) -> Iterator[_T]:
    """Advance the iterator on the stream of `network`, whose memory is free for others between two iterations."""
    while True:
        with network.use():
            value = next(values, None)
        if value is None:
            return
        yield value


def give_back_freed_memory() -> None:
    """Making a network frees copies of its weights, which glibc would keep: a third of a small run's memory."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
