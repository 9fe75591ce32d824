"""VGG-19 features by ONNX Runtime: the forward and the VJP graph on a provider, bound to memory once."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import kernels, provider
from .export import graph, vgg
from .export.ort import BackendError, onnxruntime
from .export.ort import options as session_options
from .export.weights import Weights
from .features import DTYPES, Whole, give_back_freed_memory, ignore, nhwc_zeros, on_stream

log = logging.getLogger(__name__)

_CAPTURING_RUN = 3  # of a thread, by which ONNX Runtime has captured
_ELEMENTS = {DTYPES[precision]: element for precision, element in graph.ELEMENTS.items()}


Model = tuple[onnx.ModelProto, Mapping[str, NDArray[Any]]]  # a graph and its external initializers


class _Graph:
    """A session whose inputs and outputs are bound to tensors; `run` allocates and copies nothing.

    `make` is called when the session is opened, and again if it has to be opened without a CUDA graph: ONNX Runtime
    only knows whether it can have one when it captures.
    """

    def __init__(
        self,
        make: Callable[[], Model],
        tensors: Mapping[str, Tensor],
        device: str,
        precision: str,
        threads: int,
        stream: int,
    ) -> None:
        self._make = make
        self._tensors = dict(tensors)  # the binding holds addresses only
        self._place = (device, precision, threads, stream)
        self._options = onnxruntime().RunOptions()
        if device in provider.GPUS:  # what follows is on the same stream: nobody has to wait
            self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._start(captured=True)

    def _start(self, captured: bool) -> None:
        device = self._place[0]
        model, arrays = self._make()
        self._session, settings = _open(model, arrays, *self._place, captured)
        self._captured = "enable_cuda_graph" in settings
        self._runs = threading.local()
        provider.verify(self._session, device)
        give_back_freed_memory()
        self._binding = self._session.io_binding()
        for infos, bind in (
            (self._session.get_inputs(), self._binding.bind_input),
            (self._session.get_outputs(), self._binding.bind_output),
        ):
            for info in infos:
                tensor = self._tensors[info.name]
                place = ("cuda" if device in provider.GPUS else "cpu", 0, _ELEMENTS[tensor.dtype])
                bind(info.name, *place, tuple(info.shape), tensor.data_ptr())

    def run(self) -> None:
        """Inputs -> outputs, which are no inputs: a run that failed can be made again. Raises BackendError."""
        self._runs.made = made = getattr(self._runs, "made", 0) + 1
        may_capture = self._captured and made <= _CAPTURING_RUN
        try:
            with kernels.capturing if may_capture else contextlib.nullcontext():
                self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            if not self._captured:
                raise BackendError(f"device {self._place[0]}: a run of ONNX Runtime broke ({error})") from error
            kernels.announce_no_graph(f"ONNX Runtime: {error}")
            failure = error
        else:
            return
        if torch.cuda.is_current_stream_capturing():  # what was queued now would be recorded, and never run
            raise BackendError(f"device cuda: a failed capture has left its stream recording ({failure})") from failure
        del self._session, self._binding  # two sessions need not stand side by side
        self._start(captured=False)
        self.run()


def _open(
    model: onnx.ModelProto,
    arrays: Mapping[str, NDArray[Any]],
    device: str,
    precision: str,
    threads: int,
    stream: int,
    captured: bool,
) -> tuple[Any, dict[str, Any]]:
    """A session on the device and the provider's options; raises BackendError if ONNX Runtime cannot open one."""
    ort = onnxruntime()
    options = session_options(arrays)  # the session keeps its own, reordered copy
    options.intra_op_num_threads = threads
    # Spinning threads take the cores from the BLAS calls between the two graphs: they cost more than they save.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if device in provider.GPUS:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        ort.set_default_logger_severity(3)  # or it warns, session after session, of a plugin that nobody asked for
    content = model.SerializeToString()
    for settings in provider.attempts(device, precision, stream, content, captured):
        providers = [(provider.PROVIDERS[device], settings)]
        try:
            return ort.InferenceSession(content, options, providers=providers), settings
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            log.info("device %s: %s does not open with %s: %s", device, model.graph.name, settings, error)
            failure = error
    raise BackendError(f"device {device}: ONNX Runtime cannot open {model.graph.name} ({failure})") from failure


class Features(Whole):
    """The graph pair of one `spec` (see `features.Features`); all ReLU outputs are handed from one to the other."""

    recordable = False  # ONNX Runtime captures its own graphs
    overlapping = None

    def __init__(
        self, spec: vgg.Spec, weights: Weights, device: str, threads: int, *, forward_only: bool = False
    ) -> None:
        self.spec = spec
        self.products: kernels.Products | None = None
        self._lock = threading.RLock()
        place = torch.device(provider.place(device))
        self._stream = kernels.own_stream(self, place) if place.type == "cuda" else None
        dtype = DTYPES[spec.precision]
        names = spec.layers if forward_only else tuple(spec.shapes)
        self.image = torch.zeros(1, 3, spec.height, spec.width, device=place)
        self.features = {name: _zeros(spec, name, dtype, place) for name in names}
        shared = (device, spec.precision, threads, self._stream.cuda_stream if self._stream else 0)
        self._forward = _Graph(
            lambda: (graph.forward(spec, weights, names), graph.forward_initializers(spec, weights)),
            {"image": self.image, **self.features},
            *shared,
        )
        if forward_only:
            return
        self.gradient = torch.zeros_like(self.image)
        self.cotangents = {name: torch.zeros_like(self.features[name]) for name in spec.layers}
        inputs = {f"cotangent.{name}": tensor for name, tensor in self.cotangents.items()}
        tensors = {**self.features, **inputs, "gradient": self.gradient}
        self._vjp = _Graph(lambda: (graph.vjp(spec, weights), graph.vjp_initializers(spec, weights)), tensors, *shared)

    @property
    def memory(self) -> list[Tensor]:
        """What it works in; the arenas of ONNX Runtime are beside it."""
        return [self.image, self.gradient, *self.features.values(), *self.cotangents.values()]

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Own the memory, on the CUDA stream of the graphs, which is ordered with the caller's at both ends."""
        with self._lock, on_stream(self._stream):
            yield

    def forward(self, read: Callable[[tuple[str, ...]], None] = ignore, pixels: Tensor | None = None) -> None:
        """image, or pixels, which are copied there -> features, which are read all at once."""
        if pixels is not None:
            self.image.copy_(pixels)
        self._forward.run()
        read(self.spec.layers)

    def chains(self, name: str, *, style: bool, content: bool) -> bool:
        """It reads all cotangents from memory."""
        return False

    def vjp(self, write: Callable[[tuple[str, ...]], None], terms: Mapping[str, kernels.Term] | None = None) -> None:
        """features, cotangents -> gradient; all cotangents are written at once."""
        write(self.spec.layers)
        self._vjp.run()


def _zeros(spec: vgg.Spec, name: str, dtype: torch.dtype, place: torch.device) -> Tensor:
    """Memory for a layer's features, (1, C, H, W) in the order of the spec."""
    if spec.nhwc:
        return nhwc_zeros(spec.shapes[name], dtype, place)
    return torch.zeros(spec.shapes[name], dtype=dtype, device=place)
