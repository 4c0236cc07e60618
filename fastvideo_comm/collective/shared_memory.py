"""Memory that the ranks of one host share, for messages on the CPU.

A socket copies every byte into the kernel and out again, and gloo's threads do that on the cores
that the ranks compute on. Ranks of one host need none of it: each packs its messages into memory
that the others have mapped, and reads theirs from where they were packed straight into its output.
What still travels through the group is one number for each rank, which says that its messages are
there.

The memory is a Linux memfd: it has no name that outlives a killed process, and no share of
`/dev/shm`, which containers keep small. A rank opens another's through `/proc`, and only after
the link there bears the name, a random token, that the other has sent. Where one rank cannot
(other hosts or containers, another system, `FASTVIDEO_COMM_SHARED_MEMORY=off`), none does, and
messages travel through the group.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .buffers import tensor_in

SHARED_MEMORY_VARIABLE = "FASTVIDEO_COMM_SHARED_MEMORY"
# Bytes of a rank from which sharing is the faster way; bench/NOTES.md has the measurement.
MIN_SHARED_BYTES = 1 << 20
# What a window holds starts at multiples of this: a line of cache.
_ALIGNMENT = 64

# `everyone(numbers)`: what every rank gave, in rank order.
Everyone = Callable[[list[int]], list[list[int]]]


class Window(NamedTuple):
    """The memory of one exchange: a part for each rank, which that rank fills and the others read.

    Two windows take turns. A rank that announces its second has read the first, so a window is
    written again only when every rank has read what it held.
    """

    parts: list[torch.UntypedStorage]
    start: int
    num_bytes: int

    def view(self, rank: int, offset: int, like: Tensor) -> Tensor:
        """A contiguous tensor of `like`'s shape and dtype, `offset` bytes into a rank's part."""
        return tensor_in(self.parts[rank], self.start + offset, like.shape, like.dtype)


def aligned_bytes(tensor: Tensor) -> int:
    """What a tensor takes in a window."""
    return -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT


class SharedMemory:
    """What the ranks of a group share, grown as exchanges need it."""

    def __init__(self) -> None:
        """Nothing shared yet."""
        self._parts: list[torch.UntypedStorage] = []
        self._capacity = 0
        self._second = False
        # Read once: ranks that disagree from call to call would wait for each other.
        self._is_off = os.environ.get(SHARED_MEMORY_VARIABLE) == "off"
        self.is_refused = False  # by one rank or more, for good

    @property
    def is_mapped(self) -> bool:
        """Whether the ranks have mapped each other's parts."""
        return bool(self._parts)

    @property
    def capacity(self) -> int:
        """The bytes that a window has in each rank's part."""
        return self._capacity

    def grow(self, num_bytes: int, everyone: Everyone) -> None:
        """Maps parts with room for `num_bytes`, on all ranks together and the same for all."""
        # Pages that nobody touches are not there, so the next power of two costs nothing.
        self._capacity = max(1 << 20, 1 << (num_bytes - 1).bit_length())
        self._parts = self._map(self._capacity, everyone)
        self.is_refused = not self._parts

    def window(self, num_bytes: int) -> Window | None:
        """The window whose turn it is, with `num_bytes` of use; None where a rank cannot share."""
        start = self._capacity if self._second else 0
        return Window(self._parts, start, num_bytes) if self._parts else None

    def turn(self) -> None:
        """To the other window; each time that a rank speaks, so that all stay in step."""
        self._second = not self._second

    def _map(self, capacity: int, everyone: Everyone) -> list[torch.UntypedStorage]:
        """Every rank's part, or none at all if one rank cannot map them."""
        token = secrets.randbits(62)
        descriptor = -1 if self._is_off else _create(token, 2 * capacity)
        try:
            offers = everyone([os.getpid(), descriptor, token])
            try:
                parts = [_open(*offer, num_bytes=2 * capacity) for offer in offers]
            except (OSError, RuntimeError):  # the second from torch's mmap
                parts = []
            mapped = everyone([bool(parts)])
            return parts if all(count for (count,) in mapped) else []
        finally:
            if descriptor >= 0:
                os.close(descriptor)


def _create(token: int, num_bytes: int) -> int:
    """A descriptor of new memory, or -1: the others are waiting to hear of either."""
    try:
        descriptor = os.memfd_create(_name(token))
    except (AttributeError, OSError):  # not Linux; too many open files
        return -1
    try:
        os.ftruncate(descriptor, num_bytes)
    except OSError:
        os.close(descriptor)
        return -1
    return descriptor


def _open(process: int, descriptor: int, token: int, *, num_bytes: int) -> torch.UntypedStorage:
    path = f"/proc/{process}/fd/{descriptor}"
    # Another container's process of that number has other files.
    if descriptor < 0 or os.readlink(path) != f"/memfd:{_name(token)} (deleted)":
        raise OSError(f"{path} is not the memory that was offered")
    storage = torch.UntypedStorage.from_file(path, shared=True, nbytes=num_bytes)
    return cast(torch.UntypedStorage, storage)


def _name(token: int) -> str:
    return f"fastvideo_comm-{token:016x}"
