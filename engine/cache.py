"""What is kept for later runs, the least recently used going first, limited by bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

from torch import Tensor

_T = TypeVar("_T")


class Cache:
    """Values by key, whose tensors together hold at most `limit` bytes: a larger value is made, and not kept.

    Counted is the memory of the tensors whenever a value is asked for, once where they share it. What a runtime
    allocates beside them is unknown.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.RLock()
        self._kept: OrderedDict[Hashable, tuple[Any, Callable[[Any], Iterable[Tensor]]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def bytes(self) -> int:
        """What the values hold now: a network may get memory after it was made."""
        with self._lock:
            return sum(_memory(tensors(value)) for value, tensors in self._kept.values())

    def clear(self) -> None:
        """Keep nothing any more."""
        with self._lock:
            self._kept.clear()

    def get(self, key: Hashable, make: Callable[[], _T], tensors: Callable[[_T], Iterable[Tensor]]) -> _T:
        """The value of a key; one thread at a time makes a new one, whose memory is that of its `tensors`."""
        with self._lock:
            value: _T = self._kept.pop(key)[0] if key in self._kept else make()
            if _memory(tensors(value)) <= self.limit:
                self._kept[key] = value, tensors
            while self.bytes > self.limit:
                self._kept.popitem(last=False)
            return value


def _memory(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' memory."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())
