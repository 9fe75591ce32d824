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

    Counted is the memory of the tensors, once where they share it. What a runtime allocates beside them is unknown.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self._lock = threading.RLock()
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, make: Callable[[], _T], tensors: Callable[[_T], Iterable[Tensor]]) -> _T:
        """The value of a key; one thread at a time makes a new one, whose memory is that of its `tensors`."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]
            value = make()
            size = _memory(tensors(value))
            if size <= self.limit:
                self._kept[key] = value, size
                self.bytes += size
                while self.bytes > self.limit:
                    self.bytes -= self._kept.popitem(last=False)[1][1]
            return value


def _memory(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' memory."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())
