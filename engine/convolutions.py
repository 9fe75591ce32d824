"""Convolutions by cuDNN's graph API, each by the plan that was the fastest on this GPU."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
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
_FORMAT = "1"  # of the files of `Choices`: of the names in them, and how the fastest one is found
_free_handles: list[int] = []


class Choices:
    """Which plan each convolution has, by what it is and by the plan's name: the fastest one, once it was timed.

    Timing them takes longer than a picture, so they are kept in the cache folder, in a file for each kind of GPU and
    version of cuDNN and its frontend. Processes time one after the other, as what runs beside it would spoil it, and
    threads too. A file that cannot be read is written anew.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[tuple[Path, str], int] = {}
        self._said: set[Path] = set()

    def plan(
        self,
        about: str,
        names: Callable[[], Iterator[str]],
        works: Callable[[int], bool],
        fastest: Callable[[], tuple[int, bool]],
    ) -> int:
        """The index of the plan for a convolution among those of these `names`, each of which takes its time.

        That of another process has to be one that `works`; else it is the `fastest`, whose errors are passed on, and
        which is kept unless it says that a full GPU had no room for another one.
        """
        file = _file()
        with self._lock:
            if (file, about) not in self._known:
                found = _kept(file, about, names, works)
                if found is None:
                    with self._alone(file):
                        found = _kept(file, about, names, works)
                        if found is None:
                            found, crowded = fastest()
                            if not crowded:
                                self._keep(file, about, next(itertools.islice(names(), found, None)))
                self._known[file, about] = found
            return self._known[file, about]

    @contextlib.contextmanager
    def _alone(self, file: Path) -> Iterator[None]:
        """While no other process times; where no file can be written, nobody knows of the others."""
        from filelock import FileLock

        lock = FileLock(f"{file}.lock")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except (OSError, NotImplementedError) as error:  # the latter where the file system has no locks
            self._say(file, error)
        try:
            yield
        finally:
            lock.release()

    def _keep(self, file: Path, about: str, name: str) -> None:
        try:
            with atomic(file) as temporary:
                temporary.write_text(json.dumps(_read(file) | {about: name}, indent=0, sort_keys=True) + "\n")
        except OSError as error:
            self._say(file, error)

    def _say(self, file: Path, error: Exception) -> None:
        if file not in self._said:
            log.info("cuDNN's plans are not kept for the next process: %s", error)
        self._said.add(file)


def _file() -> Path:
    import cudnn

    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    parts = device.name, device.multi_processor_count, cudnn.backend_version(), cudnn.__version__, _FORMAT
    return cache_folder() / "cudnn" / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.json"


def _kept(file: Path, about: str, names: Callable[[], Iterator[str]], works: Callable[[int], bool]) -> int | None:
    """The plan in the file, if it is there and works."""
    name = _read(file).get(about)
    index = None if name is None else next((i for i, each in enumerate(names()) if each == name), None)
    return index if index is not None and works(index) else None


def _read(file: Path) -> dict[str, str]:
    """What a file holds; nothing if it is none of ours."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


_choices = Choices()


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
        try:
            self._take(_choices.plan(about, self._names, partial(self._works, about), partial(self._fastest, about)))
        except BackendError:
            raise
        except Exception as error:  # as above; there may be less room than when it was chosen
            raise BackendError(f"device cudnn: the plan of {about} cannot be had again ({error})") from error

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

    def _names(self) -> Iterator[str]:
        return map(self._plans.get_plan_name_at_index, range(self._plans.get_execution_plan_count()))

    def _works(self, about: str, plan: int) -> bool:
        try:
            self._take(plan)
            self.run()
        except torch.OutOfMemoryError:  # is no fault of the plan's
            raise
        except Exception as error:  # as above
            log.info("cuDNN's plan %d for %s, which was kept, does not run here: %s", plan, about, error)
            return False
        return True

    def _fastest(self, about: str) -> tuple[int, bool]:
        """The plan to take of the first ones, which are thought to be the best; and whether one had no room.

        They are timed as graphs: what a plan does besides, like clearing its workspace, and what the host needs to
        launch it, count as they will.
        """
        best, least, tried, crowded = -1, math.inf, 0, False
        failure: Exception | None = None
        for plan in range(self._plans.get_execution_plan_count()):
            if tried == PLANS:
                break
            try:
                self._take(plan)
                taken = kernels.seconds(self.run, self._library.workspace.device, REPLAYS)
            except Exception as error:  # a plan that is not wanted, or that the GPU has no room for
                log.debug("plan %d of %s: %s", plan, about, error)
                failure, crowded = error, crowded or isinstance(error, torch.OutOfMemoryError)
                continue
            tried += 1
            if taken < least:
                best, least = plan, taken
        if best < 0:
            raise BackendError(f"device cudnn: none of the plans for {about} runs here ({failure})") from failure
        return best, crowded
