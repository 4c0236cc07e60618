"""Memory for messages, reused from call to call."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

# Memory that the C heap has at hand: freshly allocated, it costs no page faults.
_SMALL_BYTES = 1 << 16


class WireBuffers:
    """Contiguous buffers for messages, reused from call to call.

    On the CPU the page faults of fresh memory cost more than the copy into it, so buffers are kept.
    On an accelerator torch's caching allocator is that pool already, and one that knows of streams
    and graph captures. A buffer is taken by one exchange at a time, from any thread, and given back
    only when the exchange is complete: after a failure the backend may still read it.
    """

    def __init__(self) -> None:
        """Starts empty."""
        self._free: list[Tensor] = []
        self._lock = threading.Lock()

    def take(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """A contiguous uninitialised tensor of `shape`, with `like`'s dtype and device."""
        num_bytes = math.prod(shape) * like.element_size()
        if not like.is_cpu or num_bytes < _SMALL_BYTES:
            return like.new_empty(shape)
        with self._lock:
            for index, wire in enumerate(self._free):
                if wire.dtype is like.dtype and wire.shape == shape:
                    return self._free.pop(index)
            fitting = [wire for wire in self._free if wire.untyped_storage().nbytes() >= num_bytes]
            if fitting:
                smallest = min(fitting, key=lambda wire: wire.untyped_storage().nbytes())
                self._free = [wire for wire in self._free if wire is not smallest]
                storage = smallest.untyped_storage()
            else:
                if self._free:  # one that is too small makes room for one that is not
                    self._free.pop()
                storage = torch.UntypedStorage(num_bytes)
        return tensor_in(storage, 0, shape, like.dtype)

    def give_back(self, wire: Tensor) -> None:
        """Ends the use of a tensor that `take` gave; no exchange may be using it."""
        if wire.is_cpu and wire.nbytes >= _SMALL_BYTES:
            with self._lock:
                self._free.append(wire)

    def clear(self) -> None:
        """Frees what is not in use."""
        with self._lock:
            self._free.clear()


def tensor_in(
    storage: torch.UntypedStorage, offset: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """A contiguous tensor that starts `offset` bytes into a storage."""
    # A tensor made in inference mode could not be written outside it.
    with torch.inference_mode(False):
        tensor = torch.empty(0, dtype=dtype, device="cpu")
        strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
        return tensor.set_(storage, offset // dtype.itemsize, tuple(shape), strides)
