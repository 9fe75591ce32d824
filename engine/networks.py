"""The weights of a `Stylizer`, opened as deep as its runs need them."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from . import provider
from .export import vgg
from .export.weights import Weights
from .export.weights import load as load_weights
from .features import Open, give_back_freed_memory
from .features import network as open_network


def spec_of(
    device: str, precision: str, size: tuple[int, int], layers: tuple[str, ...], pooling: str, padding: str
) -> vgg.Spec:
    """The spec of a network on a device for pictures of (width, height)."""
    blocked = device == "onnxruntime" and precision == "fp32"
    nhwc = device in provider.GPUS and precision != "fp32"
    return vgg.Spec(size[1], size[0], layers, pooling, precision, blocked, nhwc, padding)


@dataclass(frozen=True)
class Network:
    """An open network: its convolutions, whether it pools by maximum, its weights' name, kind and digests by depth."""

    depth: int
    with_max: bool
    name: str
    kind: str
    digests: tuple[str, ...]
    open: Open


class Networks:
    """Opens the network of one set of weights on one device, anew only for what the last one cannot do yet.

    `source` is as for `engine.export.weights.load`, `precision` and `threads` count on a CPU. Safe to call from several
    threads.
    """

    def __init__(self, source: str | Path, device: str, precision: str, threads: int) -> None:
        self._source, self._place = source, (device, precision, threads)
        self._lock = threading.RLock()
        self._opened: Network | None = None
        self._digests: tuple[str, ...] = ()

    def __call__(self, layers: tuple[str, ...], pooling: str = "avg") -> Network:
        """The network down to the deepest of `layers`. Raises what loading and opening it raise."""
        depth, with_max = len(vgg.cut(layers)), pooling == "max"
        with self._lock:
            had = (self._opened.depth, self._opened.with_max) if self._opened else (0, False)
            if had[0] < depth or had[1] < with_max:
                depth, with_max = max(had[0], depth), had[1] or with_max
                layers = vgg.LAYERS[:depth]
                weights = load_weights(self._source, layers)
                self._check_same(weights, depth)
                self._opened = None  # before the new one is made: they need not stand side by side
                opener = open_network(weights, layers, *self._place, with_max=with_max)
                self._opened = Network(depth, with_max, weights.name, weights.kind, weights.digests, opener)
                del weights
                give_back_freed_memory()
            assert self._opened
            return self._opened

    def _check_same(self, weights: Weights, depth: int) -> None:
        """Raise ValueError if the weights are not those that were loaded before, which made what is cached."""
        self._source = weights.name if self._source == "auto" else self._source
        digests = weights.digests[:depth]
        if any(ours != theirs for ours, theirs in zip(self._digests, digests, strict=False)):
            raise ValueError(f"weights {weights.name} have changed since they were loaded: start afresh")
        self._digests = max(self._digests, digests, key=len)
