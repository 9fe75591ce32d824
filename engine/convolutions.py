"""Convolutions by cuDNN's graph API, each by the plan that was the fastest on this GPU."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .export import vgg
from .export.ort import BackendError
from .export.weights import cache_folder
from .image import atomic

log = logging.getLogger(__name__)

PLANS = 5  # of cuDNN's suggestions for a convolution that are timed
REPLAYS = 5  # of one round of timing
WORKSPACE = 32 << 20  # bytes that a convolution may ask for; some plans in fp32 would like gigabytes
_free_handles: list[int] = []


class Choices:
    """The plan that was chosen for each convolution, by what it is: its number among cuDNN's suggestions.

    Timing them takes longer than a picture, so they are kept in the cache folder, in a file for each GPU and version of
    cuDNN and its frontend. A file that cannot be read is written anew.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # what runs beside a timing would spoil it
        self._files: dict[Path, dict[str, int]] = {}
        self._new: set[Path] = set()

    def plan(self, about: str, choose: Callable[[], int], count: int) -> int:
        """The plan for a convolution with `count` suggestions, from `choose` if it is not known yet."""
        file = self._file()
        with self._lock:
            if file not in self._files:
                self._files[file] = _read(file)
            known = self._files[file]
            if not 0 <= known.get(about, -1) < count:
                known[about] = choose()
                self._new.add(file)
            return known[about]

    def forget(self, about: str) -> None:
        """Let the next one who asks for this plan choose anew."""
        with self._lock:
            self._files[self._file()].pop(about, None)

    def keep(self) -> None:
        """Write what is new, beside what another process has written meanwhile."""
        with self._lock:
            for file in self._new:
                try:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with atomic(file) as part:
                        part.write_text(json.dumps(_read(file) | self._files[file], indent=0, sort_keys=True) + "\n")
                except OSError as error:
                    log.info("cuDNN's plans are not kept for the next process: %s (%s)", file, error.strerror)
            self._new.clear()

    @staticmethod
    def _file() -> Path:
        import cudnn

        parts = torch.cuda.get_device_name(), str(cudnn.backend_version()), cudnn.__version__
        return cache_folder() / "cudnn" / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.json"


def _read(file: Path) -> dict[str, int]:
    """What a file holds; nothing if it is none of ours."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    whole = isinstance(found, dict) and all(type(plan) is int for plan in found.values())
    return found if whole else {}


CHOICES = Choices()


class Library:
    """cuDNN on a stream: its handle, and the workspace of all its convolutions, which run one after the other.

    Handles are used again and never destroyed: that would break the capture of a graph that is going on elsewhere.
    """

    def __init__(self, stream: torch.cuda.Stream, place: torch.device) -> None:
        import cudnn

        try:
            self.handle: int = _free_handles.pop()
        except IndexError:
            self.handle = cudnn.create_handle()
        weakref.finalize(self, _free_handles.append, self.handle).atexit = False
        cudnn.set_stream(handle=self.handle, stream=stream.cuda_stream)
        self.counters = kernels.Counters(2 * len(vgg.CONVS), place)  # there and back
        self.workspace = torch.empty(1, dtype=torch.uint8, device=place)

    def reserve(self, size: int) -> None:
        """Let the workspace have this many bytes at least."""
        if size > len(self.workspace):
            self.workspace = torch.empty(size, dtype=torch.uint8, device=self.workspace.device)


class Convolution:
    """target = convolution of source, with `bias` plus that, and `rectified` the ReLU of that; all on fixed memory."""

    def __init__(
        self,
        library: Library,
        source: Tensor,
        kernel: Tensor,
        target: Tensor,
        padding: int,
        bias: Tensor | None = None,
        rectified: bool = False,
    ) -> None:
        import cudnn

        io = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BFLOAT16"}[source.dtype]
        kind, exact = getattr(cudnn.data_type, io), cudnn.data_type.FLOAT
        plans = cudnn.pygraph(
            io_data_type=kind, intermediate_data_type=exact, compute_data_type=exact, handle=library.handle
        )

        def tensor(memory: Tensor) -> Any:
            return plans.tensor(dim=list(memory.shape), stride=list(memory.stride()), data_type=kind)

        self._memory = {tensor(source): source, tensor(kernel): kernel}
        image, weight = self._memory
        one, frame = [1, 1], [padding, padding]
        result = plans.conv_fprop(image=image, weight=weight, padding=frame, stride=one, dilation=one)
        if bias is not None:
            line = tensor(bias)
            self._memory[line] = bias
            result = plans.bias(input=result, bias=line)
        if rectified:
            result = plans.relu(input=result)
        result.set_output(True).set_data_type(kind).set_dim(list(target.shape)).set_stride(list(target.stride()))
        self._memory[result] = target
        self._plans, self._library, self._counter = plans, library, library.counters.take()
        try:
            plans.validate()
            plans.build_operation_graph()
            plans.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
            plans.deselect_behavior_notes([cudnn.behavior_note.RUNTIME_COMPILATION])
            plans.deselect_workspace_greater_than(WORKSPACE)
            if source.dtype == torch.float32:
                plans.deselect_numeric_notes([cudnn.numerical_note.TENSOR_CORE])  # they would round to TF32
            plans.check_support()
        except Exception as error:  # of cuDNN, or of what the frontend makes of it
            raise BackendError(f"device cudnn: no convolution {tuple(kernel.shape)} in {io} ({error})") from error
        shapes = (tuple(each.shape) for each in (source, kernel, target))
        about = f"{io} {padding}{' biased' * (bias is not None)}{' rectified' * rectified} {' '.join(map(str, shapes))}"
        count = self._plans.get_execution_plan_count()
        try:
            self._take(CHOICES.plan(about, lambda: self._fastest(about), count))
        except BackendError:
            raise
        except Exception as error:  # as above: another process, or one with more room, has chosen it
            log.info("cuDNN's plan for %s cannot be had again: %s", about, error)
            CHOICES.forget(about)
            self._take(CHOICES.plan(about, lambda: self._fastest(about), count))

    def run(self) -> None:
        """Queue it on the stream of the handle."""
        library = self._library
        workspace = self._counter if self._only_counts else library.workspace
        self._plans.execute_plan_at_index(self._memory, workspace, self._plan, handle=library.handle)

    def _take(self, plan: int) -> None:
        """Raises an error of cuDNN's if this plan cannot be had."""
        self._plans.build_plan_at_index(plan)
        size = self._plans.get_workspace_size_plan_at_index(plan)
        self._only_counts = size <= len(self._counter)
        if not self._only_counts:
            self._library.reserve(size)
        self._plan = plan

    def _fastest(self, about: str) -> int:
        """The plan to take of the first ones, which are thought to be the best.

        They are timed as graphs: what a plan does besides, like clearing its workspace, and what the host needs to
        launch it, count as they will.
        """
        best, least, tried = -1, math.inf, 0
        failure: Exception | None = None
        for plan in range(self._plans.get_execution_plan_count()):
            if tried == PLANS:
                break
            try:
                self._take(plan)
                taken = kernels.seconds(self.run, self._library.workspace.device, REPLAYS)
            except Exception as error:  # a plan that is not wanted, or that the GPU has no room for
                log.debug("plan %d of %s: %s", plan, about, error)
                failure = error
                continue
            tried += 1
            if taken < least:
                best, least = plan, taken
        if best < 0:
            raise BackendError(f"device cudnn: none of the plans for {about} runs here ({failure})") from failure
        return best
