"""VGG-19 features and their VJP by cuDNN: every convolution of the forward pass is one kernel with its bias and ReLU.

The first convolution, of three channels, is a kernel of our own but for fp32, and so is its VJP.

ONNX Runtime's CUDA provider runs biases, ReLUs, masks and changes of layout as passes of their own over the
activations, which take longer than the convolutions. Here all stays in NHWC order, and what stands between the
convolutions is one pass (`kernels.network`). cuDNN could put the masks of the VJP behind its convolutions as well, with
kernels that it compiles at run time: half a second for each shape, to win what a better plan among the ready-made ones
wins, so only those are taken.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from . import kernels, provider
from .convolutions import Convolution, Library
from .export import graph, vgg
from .export.weights import Weights
from .features import DTYPES, Losses, Whole, ignore, nhwc_zeros, on_stream
from .kernels import network

PLACE = torch.device(provider.place("cudnn"))
LIBRARIES = 16 << 20  # bytes of workspaces of a network, half of them cuBLAS's; cuDNN's as seen on an H200
TORCHS_CUBLAS = 32 << 20  # bytes that torch keeps for a stream on which it multiplies matrices itself


class Network:
    """The weights of a VGG-19 on the GPU, turned for the VJP as well, once for each precision and pooling."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._made: dict[Hashable, dict[str, Tensor]] = {}
        self._lock = threading.Lock()

    def parameters(self, spec: vgg.Spec) -> dict[str, Tensor]:
        """By the names of the ONNX graphs' initializers; kernels in NHWC order, those at the pixels filled up."""
        with self._lock:
            made = self._made.setdefault((spec.precision, spec.pooling), {})
            if f"{spec.convs[-1].name}.weight" not in made:
                plain = replace(spec, precision="fp32", nhwc=False)
                arrays = graph.forward_initializers(plain, self._weights) | graph.vjp_initializers(plain, self._weights)
                new = [name for name in arrays if name not in made]
                made |= {name: self._placed(name, torch.from_numpy(arrays[name]), spec) for name in new}
                made["mean"] = torch.tensor(self._weights.mean, device=PLACE)
            return made

    @staticmethod
    def _placed(name: str, array: Tensor, spec: vgg.Spec) -> Tensor:
        array = array.to(PLACE, DTYPES[spec.precision])
        if name.endswith("bias"):
            return array.as_strided((1, len(array), 1, 1), (len(array), 1, len(array), len(array)))
        filling = network.FILLED - network.TAPS
        if name == "conv1_1.weight" and spec.precision == "fp32":
            array = functional.pad(array, (0, 0, 0, 0, 0, network.COLOURS - array.shape[1]))
        elif name == "conv1_1.weight":
            return functional.pad(array.permute(0, 2, 3, 1).flatten(1), (0, filling))
        elif name == "conv1_1.vjp" and spec.precision == "fp32":
            array = functional.pad(array, (0, 0, 0, 0, 0, 0, 0, network.EIGHT - array.shape[0]))
        elif name == "conv1_1.vjp":
            return functional.pad(array.permute(2, 3, 0, 1).reshape(network.TAPS, -1), (0, 0, 0, filling))
        return array.contiguous(memory_format=torch.channels_last)


class Features(Whole):
    """The two passes of one `spec` (see `features.Features`); all ReLU outputs stay.

    Each is replayed as a CUDA graph, but where it is read meanwhile or overlaps: that is part of a larger graph.
    """

    recordable = True

    def __init__(self, spec: vgg.Spec, weights: Network, *, forward_only: bool = False) -> None:
        self.spec = spec
        self.products: kernels.Products | None = None
        self._parameters = weights.parameters(spec)
        self._lock = threading.RLock()
        self._stream, self._beside = (kernels.own_stream(self, PLACE) for _ in range(2))
        self._dtype = DTYPES[spec.precision]
        self.image = torch.zeros(1, 3, spec.height, spec.width, device=PLACE)
        self.features = {name: nhwc_zeros(shape, self._dtype, PLACE) for name, shape in spec.shapes.items()}
        self._rooms = torch.zeros(_rooms(spec), dtype=self._dtype, device=PLACE)
        self._run_forward, self._run_vjp = kernels.Recorded(PLACE), kernels.Recorded(PLACE)
        self._terms: dict[str, kernels.Term] = {}  # while the VJP is queued
        self._ratios: dict[str, Tensor] = {}  # by convolution, in the same way
        self._recorded: dict[str, weakref.ref[kernels.Term]] = {}  # of the VJP that can be replayed
        if not forward_only:
            self.gradient = torch.zeros_like(self.image)
            self.cotangents: _Cotangents = _Cotangents(self.features, spec.layers)
            self.cotangents.of(spec.convs[-1].name)  # which is read where it is, if it is a loss layer
        # All of the memory above comes from the stream of the caller, to be of use to its next network, and so do the
        # cotangents that its losses ask for.
        with on_stream(self._stream):
            self._library = Library(self._stream, PLACE)
            self._ready: list[tuple[str, int]] = []  # each loss layer, and the steps until its features are there
            self._forward = self._forward_steps()
            self._joint = ("", 0)  # the first convolution on the way back that has a further loss, and the steps to it
            self._vjp = [] if forward_only else self._vjp_steps()

    @property
    def overlapping(self) -> Features | None:
        """Itself, where the deepest loss is not the only one and none is at the same convolution.

        In fp32 the convolutions take so long that it does not matter when the losses are computed.
        """
        alone = self.spec.convs[-1].name not in self.spec.layers[:-1]
        return self if self._joint[0] and alone and self.spec.precision != "fp32" else None

    @property
    def memory(self) -> list[Tensor]:
        """The tensors that it works in."""
        own = [self.image, self.gradient, self._rooms, self._library.workspace]
        return [*own, *self.features.values(), *self.cotangents.values()]

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Own the memory, on the CUDA stream of cuDNN, which is ordered with the caller's at both ends."""
        with self._lock, on_stream(self._stream):
            yield

    def forward(self, read: Callable[[tuple[str, ...]], None] = ignore, pixels: Tensor | None = None) -> None:
        """image, or pixels in its place -> features.

        All layers but the deepest are read beside those that follow, on a stream of their own; together, as every fork
        of a CUDA graph delays the network by some microseconds.
        """
        if read == ignore:
            assert pixels is None
            self._run_forward(lambda: _make(self._forward, self.image))
            return
        fork = self._to_fork(pixels)
        with self._joined():
            self._forward_read(read, fork)

    @contextlib.contextmanager
    def _joined(self) -> Iterator[None]:
        """Wait for the second stream at the end, after an error as well, as memory may be given back."""
        try:
            yield
        finally:
            torch.cuda.current_stream(PLACE).wait_stream(self._beside)

    @staticmethod
    def _fork(ready: Sequence[tuple[str, int]]) -> int:
        """Steps of the forward pass until all layers but the deepest are there, to be read on the second stream."""
        return ready[-2][1] if len(ready) > 1 else 1

    def _to_fork(self, pixels: Tensor | None) -> int:
        """Make the steps of the forward pass before the second stream reads; how many they are."""
        fork = self._fork(self._ready)
        _make(self._forward[:fork], self.image if pixels is None else pixels)
        return fork

    def _forward_read(self, read: Callable[[tuple[str, ...]], None], fork: int) -> None:
        *others, deepest = (name for name, _ in self._ready)
        self._queue_beside(lambda: read(tuple(others)) if others else None)
        _make(self._forward[fork:])
        read((deepest,))

    def _queue_beside(self, launches: Callable[[], None]) -> None:
        """Make the launches on the second stream, after what the current one holds."""
        self._beside.wait_stream(torch.cuda.current_stream(PLACE))
        with torch.cuda.stream(self._beside):
            launches()

    def chains(self, name: str, *, style: bool, content: bool) -> bool:
        """See the function of that name."""
        return chains(self.spec, name, style=style, content=content)

    def vjp(self, write: Callable[[tuple[str, ...]], None], terms: Mapping[str, kernels.Term] | None = None) -> None:
        """features, cotangents -> gradient; all cotangents that have no term are written at once."""
        terms = terms or {}
        if {name: term() for name, term in self._recorded.items()} != terms:
            self._run_vjp = kernels.Recorded(PLACE)
            self._recorded = {name: weakref.ref(term) for name, term in terms.items()}
        write(self.spec.layers)
        with self._lent(terms, {}):
            self._run_vjp(lambda: _make(self._vjp))

    @contextlib.contextmanager
    def _lent(self, terms: Mapping[str, kernels.Term], ratios: Mapping[str, Tensor]) -> Iterator[None]:
        """Let the steps of the VJP have these, which hold the memory of somebody's losses."""
        self._terms.update(terms)
        self._ratios.update(ratios)
        try:
            yield
        finally:
            self._terms.clear()
            self._ratios.clear()

    def both(self, losses: Losses, pixels: Tensor | None = None) -> None:
        """image, or pixels in its place -> features, gradient; see `features.Overlapping.both`."""
        convolution, steps = self._joint
        with self._lent(losses.terms, {convolution: losses.ratio}):
            fork = self._to_fork(pixels)
            with self._joined():
                self._forward_read(losses.read, fork)
                self._queue_beside(losses.go_on)
                losses.begin()
                _make(self._vjp[:steps])
            _make(self._vjp[steps:])

    def _room(self, index: int, shape: tuple[int, ...]) -> Tensor:
        one, channels, height, width = shape
        flat = self._rooms[index, : channels * height * width]
        return flat.view(one, height, width, channels).permute(0, 3, 1, 2)

    def _framed(self, source: Tensor, steps: list[Callable[[], object]]) -> tuple[Tensor, int]:
        """What a convolution reads for `source`, and the zeros it has to add around that."""
        if self.spec.padding != "circular":
            return source, 1
        one, channels, height, width = source.shape
        framed = self._room(2, (one, channels, height + 2, width + 2))
        steps.append(partial(network.wrap, source, framed))
        return framed, 0

    def _forward_steps(self) -> list[Callable[..., object]]:
        """The steps of the forward pass, of which the first is given the image."""
        # Steps hold tensors, never `self`: a network that is dropped gives its memory back at once.
        spec, own, steps = self.spec, self._parameters, list[Callable[..., object]]()
        frame = int(spec.padding != "zero")
        x = self.image
        for conv in spec.convs:
            if conv.after_pool:
                one, channels, height, width = x.shape
                pooled = self._room(0, (one, channels, height // 2, width // 2))
                steps.append(partial(network.pool, x, pooled, spec.pooling))
                x = pooled
            pair = own[f"{conv.name}.weight"], own[f"{conv.name}.bias"]
            relu, rectified = self.features[conv.relu], conv.name not in spec.layers
            out = relu if rectified else self.features[conv.name]
            if conv.in_channels == 3 and spec.precision != "fp32":
                given = {"means": own["mean"], "kernel": pair[0], "bias": pair[1], "out": out}
                steps.append(partial(network.convolve, **given, padding=spec.padding, rectified=rectified))
            else:
                if conv.in_channels == 3:
                    x = self._room(0, (1, network.COLOURS, spec.height + 2 * frame, spec.width + 2 * frame))
                    steps.append(partial(network.centre, means=own["mean"], out=x, padding=spec.padding))
                    zeros = 1 - frame
                else:
                    x, zeros = self._framed(x, steps)
                steps.append(Convolution(self._library, x, pair[0], out, zeros, pair[1], rectified).run)
            if not rectified:
                self._ready.append((conv.name, len(steps)))
                steps.append(partial(torch.clamp_min, out, 0, out=relu))
            if conv.relu in spec.layers:
                self._ready.append((conv.relu, len(steps)))
            x = relu
        return steps

    def _vjp_steps(self) -> list[Callable[[], object]]:
        spec, steps = self.spec, list[Callable[[], object]]()
        incoming: Tensor | None = None
        pooling = ""  # between the incoming cotangent and the layer below
        for conv in reversed(spec.convs):
            relu = self.features[conv.relu]
            if incoming is not None and not self._joint[0] and {conv.name, conv.relu} & set(spec.layers):
                self._joint = conv.name, len(steps)
            if conv.in_channels == 3 and spec.precision != "fp32":
                plane = -(-spec.height * spec.width // 8) * 8
                products = self._rooms[0, : network.TAPS * plane].view(network.TAPS, plane)
                taps = self._parameters[f"{conv.name}.vjp"]
                given = self.cotangents, self._terms, self._ratios, incoming, relu, products
                steps.append(partial(_descend, conv, *given, pooling, taps))
                steps.append(partial(network.gather, products, self.gradient, spec.padding))
                return steps
            x = self._room(0, relu.shape)
            if incoming is None and conv.relu not in spec.layers:
                x = self.cotangents[conv.name]  # the deepest of all
            else:
                given = self.cotangents, self._terms, self._ratios, incoming, relu, x
                steps.append(partial(_descend, conv, *given, pooling))
            at_pixels = conv.in_channels == 3
            folds = at_pixels and spec.padding in ("reflect", "replicate")
            source, zeros = (x, 2) if folds else self._framed(x, steps)
            grown = 2 * int(folds)
            channels = network.EIGHT if at_pixels else conv.in_channels
            incoming = self._room(1, (1, channels, x.shape[2] + grown, x.shape[3] + grown))
            steps.append(Convolution(self._library, source, self._parameters[f"{conv.name}.vjp"], incoming, zeros).run)
            pooling = spec.pooling if conv.after_pool else ""
        assert incoming is not None
        steps.append(partial(network.uncentre, incoming, self.gradient, spec.padding))
        return steps


def chains(spec: vgg.Spec, name: str, *, style: bool, content: bool) -> bool:
    """Whether the VJP at a spec makes the cotangent of a loss layer itself.

    In 16 bits it does for a content loss at any ReLU but the first, and for a style loss at those of few channels.
    """
    if spec.precision == "fp32" or (style and content):
        return False
    if not style:
        return name in vgg.LAYERS[1:]
    pooled = [below.relu for below, conv in itertools.pairwise(spec.convs) if conv.after_pool]
    fitting = [conv.relu for conv in spec.convs if conv.in_channels == 3 or conv.out_channels == network.CHAINED]
    return name in fitting and name not in pooled


def memory(spec: vgg.Spec, made: Collection[str], *, forward_only: bool = False) -> int:
    """Bytes of the tensors of `Features` at a spec; the VJP makes the cotangents `made` itself."""
    element, image = DTYPES[spec.precision].itemsize, 3 * 4 * spec.height * spec.width * (1 if forward_only else 2)
    features = {name: math.prod(shape) for name, shape in spec.shapes.items()}
    cotangents = 0 if forward_only else sum(features[name] for name in spec.layers if name not in made)
    return image + element * (sum(features.values()) + cotangents + math.prod(_rooms(spec)))


def memory_of_weights(spec: vgg.Spec) -> int:
    """Bytes of what `Network.parameters` holds at a spec, but for biases and filling."""
    return DTYPES[spec.precision].itemsize * sum(2 * 9 * conv.in_channels * conv.out_channels for conv in spec.convs)


def _rooms(spec: vgg.Spec) -> tuple[int, int]:
    """Two tensors of the largest layer, between which the passes go to and fro; a third where layers have a frame."""
    largest = spec.convs[0].out_channels * (spec.height + 2) * (spec.width + 2)
    return 3 if spec.padding == "circular" else 2, largest


class _Cotangents(dict[str, Tensor]):
    """Of the loss layers, each made when it is first asked for: those that have a `kernels.Term` need none."""

    def __init__(self, features: Mapping[str, Tensor], layers: Collection[str]) -> None:
        self._features = {name: features[name] for name in layers}

    def __missing__(self, name: str) -> Tensor:
        return self.setdefault(name, torch.zeros_like(self._features[name]))  # another thread may have been faster

    def of(self, name: str) -> Tensor | None:
        """None unless it is a loss layer."""
        return self[name] if name in self._features else None


def _descend(
    conv: vgg.Conv,
    cotangents: _Cotangents,
    terms: Mapping[str, kernels.Term],
    ratios: Mapping[str, Tensor],
    incoming: Tensor | None,
    relu: Tensor,
    out: Tensor,
    pooling: str,
    taps: Tensor | None = None,
) -> None:
    """Through the ReLU behind a convolution, and with `taps` half of the way through that; `incoming` has come down."""
    term, ratio = terms.get(conv.relu), ratios.get(conv.name)
    own = None if term else cotangents.of(conv.relu)
    if taps is None:
        network.mask(incoming, own, cotangents.of(conv.name), relu, out, pooling, term, ratio)
    else:
        network.first(incoming, own, cotangents.of(conv.name), relu, taps, out, term, ratio)


def _make(steps: list[Callable[..., object]], *given: Tensor) -> None:
    """Make the steps, of which the first gets what is `given`."""
    for step in steps:
        step(*given)
        given = ()
