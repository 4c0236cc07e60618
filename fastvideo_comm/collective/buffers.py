"""Memory for messages, reused from call to call."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

# The C heap keeps blocks of up to this size ready: a fresh one costs no page faults.
SMALL_BYTES = 1 << 16


class WireBuffers:
    """Contiguous buffers for messages, reused from call to call.

    On the CPU, page faults of fresh memory cost more than the copy into it, so buffers are kept. On
    an accelerator torch's caching allocator already is such a pool, and it handles streams and
    graph captures. One exchange at a time uses a buffer, from any thread. The buffer is given back
    only when the exchange is complete, because after a failure the backend may still read it.
    """

    def __init__(self) -> None:
        """Starts empty."""
        self._free: list[Tensor] = []
        self._lock = threading.Lock()

    def take(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Returns a contiguous uninitialised tensor of `shape`, with `like`'s dtype and device."""
        num_bytes = math.prod(shape) * like.element_size()
        if not like.is_cpu or num_bytes < SMALL_BYTES:
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
                if self._free:  # all are too small: drop one for the larger one
                    self._free.pop()
                storage = torch.UntypedStorage(num_bytes)
        return _tensor_in(storage, shape, like.dtype)

    def give_back(self, wire: Tensor) -> None:
        """Takes a tensor of `take` back; no exchange may use the tensor any more."""
        if wire.is_cpu and wire.nbytes >= SMALL_BYTES:
            with self._lock:
                self._free.append(wire)

    def clear(self) -> None:
        """Frees all buffers that no exchange uses."""
        with self._lock:
            self._free.clear()


def _tensor_in(storage: torch.UntypedStorage, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Returns a contiguous tensor at the front of a storage."""
    # A tensor that is made in inference mode cannot be written outside inference mode.
    with torch.inference_mode(False):
        tensor = torch.empty(0, dtype=dtype, device="cpu")
        tensor.set_(storage, 0, tuple(shape))  # type: ignore[call-overload] # strides are optional
        return tensor
