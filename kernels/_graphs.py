"""Sequences of launches on a GPU: recorded as CUDA graphs, and timed as such."""

from __future__ import annotations

import functools
import gc
import logging
import math
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)


@functools.cache
def announce_no_graph(reason: str) -> None:
    """Say, once a process, that there is no CUDA graph for this reason."""
    log.info("no CUDA graph, kernels are launched one by one: %s", reason)


class Recorded:
    """A fixed sequence of launches: made one by one at first, then replayed as a CUDA graph.

    The launches have to use the same memory each time, and to need nothing from the host. On a CPU, and where they
    cannot be captured or replayed, they are always made one by one; so they are inside a larger sequence that is being
    captured.
    """

    WARM_UP = 2  # calls before the capture: they compile the kernels

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._calls_to_capture = self.WARM_UP if self._on_gpu else -1
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, launches: Callable[[], None]) -> None:
        """Make the `launches`, which are the same each time."""
        if self._on_gpu and torch.cuda.is_current_stream_capturing():
            launches()
            return
        if self._calls_to_capture == 0:
            self._graph = _capture(launches)
        self._calls_to_capture -= 1
        if self._graph is not None:
            try:
                self._graph.replay()
                return
            except RuntimeError as error:  # none of it has run: a graph is launched as a whole or not at all
                announce_no_graph(f"replay: {error}")
                self._graph = None
        launches()


class Counters:
    """Memory of which kernels of a library use a piece each, and which it clears before each of them.

    A node that clears memory takes some 4 us of a CUDA graph, with the gaps around it. In the graphs of `Recorded` all
    of it is cleared once, at the beginning, so each piece is for one launch in a graph.
    """

    PIECE = 512  # bytes
    _all: ClassVar[weakref.WeakSet[Counters]] = weakref.WeakSet()

    def __init__(self, pieces: int, device: torch.device) -> None:
        self.memory = torch.zeros(pieces * self.PIECE, dtype=torch.uint8, device=device)
        self._free = list(self.memory.split(self.PIECE))
        with capturing:  # which goes through all of them
            Counters._all.add(self)

    def take(self) -> Tensor:
        """A piece that nobody has."""
        return self._free.pop()

    @classmethod
    def clear_at_once(cls, captured: torch.cuda.CUDAGraph) -> None:
        """Give a graph one node at its beginning in the place of all that clear a part of such memory."""
        from cuda.bindings import runtime

        def made(result: tuple[Any, ...]) -> Any:
            error, *values = result
            if error != runtime.cudaError_t.cudaSuccess:
                raise RuntimeError(f"CUDA graph: {error}")
            return values[0] if values else None

        def listed(function: Callable[..., tuple[Any, ...]], of: Any) -> list[Any]:
            error, *_, count = function(of)  # without a number, it only counts
            made((error,))
            return list(made(function(of, count)))[:count] if count else []

        graph = runtime.cudaGraph_t(init_value=captured.raw_cuda_graph())
        memset, used = runtime.cudaGraphNodeType.cudaGraphNodeTypeMemset, list[Counters]()
        for node in listed(runtime.cudaGraphGetNodes, graph):
            if made(runtime.cudaGraphNodeGetType(node)) != memset:
                continue
            given = made(runtime.cudaGraphMemsetNodeGetParams(node))
            places = ((each, int(given.dst) - each.memory.data_ptr()) for each in cls._all)
            owner = next((each for each, place in places if 0 <= place < each.memory.nbytes), None)
            if owner is None or given.value != 0:
                continue
            for before in listed(runtime.cudaGraphNodeGetDependencies, node):
                for after in listed(runtime.cudaGraphNodeGetDependentNodes, node):
                    made(runtime.cudaGraphAddDependencies(graph, [before], [after], None, 1))
            made(runtime.cudaGraphDestroyNode(node))
            used += [] if owner in used else [owner]
        for owner in used:
            roots = listed(runtime.cudaGraphGetRootNodes, graph)
            clearing = runtime.cudaMemsetParams()
            clearing.dst, clearing.value = owner.memory.data_ptr(), 0
            clearing.elementSize, clearing.width, clearing.height = 4, owner.memory.nbytes // 4, 1
            first = made(runtime.cudaGraphAddMemsetNode(graph, None, 0, clearing))
            for root in roots:
                made(runtime.cudaGraphAddDependencies(graph, [first], [root], None, 1))


_thread = threading.local()
capturing = threading.Lock()  # most captures begin with a wait for the device, which no other one survives


def stand_captures(place: str) -> None:
    """On a GPU, let the calling thread, from now on, allocate and ask for events while another one captures a graph.

    CUDA forbids that while there is a capture in the mode that ONNX Runtime uses, and breaks the capture as well; it
    does not in threads that do not look at the captures of others.
    """
    if not place.startswith("cuda") or hasattr(_thread, "stands"):
        return
    from cuda.bindings import driver

    torch.cuda.init()
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    status, _ = driver.cuThreadExchangeStreamCaptureMode(mode)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"mode of captures: {status.name}")
    _thread.stands = True


def _capture(launches: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
    """The launches as a graph; they do not run meanwhile. None if they cannot be captured."""
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with capturing:
        collecting = gc.isenabled()
        gc.disable()  # what a graph or a library of the past gives back now would break the capture
        try:  # other threads may go on using the device meanwhile
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                launches()
            Counters.clear_at_once(graph)
            graph.instantiate()
        except RuntimeError as error:
            announce_no_graph(f"capture: {error}")
            return None
        finally:
            if collecting:
                gc.enable()
    return graph


REPLAYS = 20  # of one timing
MARGIN = 0.9  # of the first way's time, that another one has to stay below
_fastest: dict[Hashable, str] = {}
_timing = threading.Lock()  # what runs beside it would spoil it


def fastest(ways: Mapping[str, Callable[[], None]], device: torch.device, key: Hashable) -> str:
    """Which of several `ways` to the same result is the fastest on the device, timed once a process for each `key`.

    The first is kept unless another one is clearly faster; one that fails is out.
    """
    key = (torch.cuda.get_device_name(device), *ways, key)
    with _timing:
        if key not in _fastest:
            best, least = "", math.inf
            for name, way in ways.items():
                try:
                    taken = seconds(way, device)
                except (RuntimeError, OSError) as error:  # OSError: a library is missing
                    log.info("%s: not possible here: %s", name, error)
                    continue
                if not best or taken < MARGIN * least:
                    best, least = name, taken
                log.info("%s: %.1f us for %s", name, 1e6 * taken, key[-1])
            if not best:
                raise RuntimeError(f"none of {', '.join(ways)} works on {key[0]}")
            _fastest[key] = best
        return _fastest[key]


def seconds(way: Callable[[], None], device: torch.device, replays: int = REPLAYS) -> float:
    """Of one call, as it will be in use: captured, where that is possible; the least of three rounds of `replays`."""
    recorded, rounds = Recorded(device), []
    for _ in range(Recorded.WARM_UP + 1):
        recorded(way)
    for _ in range(3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(replays):
            recorded(way)
        end.record()
        end.synchronize()
        rounds.append(begin.elapsed_time(end) / 1000 / replays)
    return min(rounds)
