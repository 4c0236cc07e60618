"""One piece of memory that processes of a host share: a Linux memfd, and where it is mapped.

A memfd has no name that outlives a killed process, and takes no space in `/dev/shm`, which
containers keep small. It is sparse: a page takes no memory before it is used. A process that
touches a page for which the system has no memory is killed by SIGBUS. So the owner asks for the
pages first: that fails with an error that Python can catch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Every tensor in shared memory starts at a multiple of this: a line of cache.
ALIGNMENT = 64
# Pages are asked for and given back in units of this.
GRANULE = 1 << 18
_MADV_POPULATE_READ = 22  # Linux 5.14; the mmap module does not name it
# Python 3.13 can map a file without a second descriptor of it.
_MMAP_OPTIONS: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}


def aligned(num_bytes: int) -> int:
    """The bytes of shared memory that a tensor of so many bytes takes.

    Example:
        >>> aligned(1), aligned(64), aligned(0)
        (64, 64, 0)
    """
    return (num_bytes + ALIGNMENT - 1) & -ALIGNMENT


def create(num_bytes: int) -> int:
    """A descriptor of a new memfd, whose size nobody can change any more.

    Raises:
        OSError: The system refuses: no memfd, too many open files, RLIMIT_FSIZE.
    """
    if not hasattr(os, "memfd_create"):
        raise OSError("this system has no memfd")
    descriptor = os.memfd_create("fastvideo_comm", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, num_bytes)
        # A process that touches a page behind the end of a file is killed by SIGBUS.
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class Segment:
    """A memfd, mapped into this process.

    The mapping lives as long as any memoryview or tensor in it.
    """

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        """Maps the memfd; the descriptor stays the caller's until `close`.

        Raises:
            OSError: The system refuses to map so much, for example because of RLIMIT_AS.
        """
        if descriptor < 0:  # mmap would give memory that nobody else sees
            raise OSError(errno.EBADF, "the memfd is closed")
        self.num_bytes = num_bytes
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, num_bytes, **_MMAP_OPTIONS)
        self.view = memoryview(self._map)
        # For each granule, whether its pages are in this process's page table.
        self._present = bytearray(-(-num_bytes // GRANULE))
        self._whole: dict[torch.dtype, Tensor] = {}

    @property
    def descriptor(self) -> int:
        """The memfd's descriptor in this process; -1 after `close`."""
        return self._descriptor

    @property
    def backed_bytes(self) -> int:
        """The bytes whose pages `back` or `populate` got and `give_back` did not return."""
        return self._present.count(1) * GRANULE

    def back(self, start: int, stop: int) -> None:
        """Gets memory for the pages of a range, where they have none yet. For the owner.

        Raises:
            OSError: The system has no more memory for it.
        """
        for first, last in self._absent(start, stop):
            first_byte, last_byte = first * GRANULE, min(last * GRANULE, self.num_bytes)
            os.posix_fallocate(self._descriptor, first_byte, last_byte - first_byte)
            self._populate(first, last)

    def populate(self, start: int, stop: int) -> None:
        """Enters the pages of a range, which the owner has backed, into this page table.

        This takes a quarter of the time of the page faults that a copy runs into one by one.
        """
        for first, last in self._absent(start, stop):
            self._populate(first, last)

    def give_back(self, start: int, stop: int, num_bytes: int) -> int:
        """Returns pages of a range to the system, from its upper end. For the owner.

        Args:
            start: Where the range starts.
            stop: Where it ends.
            num_bytes: How much to return; whole granules inside the range are returned.

        Returns:
            How many bytes were returned.
        """
        first, last = -(-start // GRANULE), stop // GRANULE
        if stop == self.num_bytes:
            last = len(self._present)
        wanted = -(-num_bytes // GRANULE)
        returned = 0
        while returned < wanted and (end := self._present.rfind(1, first, last) + 1):
            last = max(self._present.rfind(0, first, end) + 1, first, end - wanted + returned)
            first_byte, last_byte = last * GRANULE, min(end * GRANULE, self.num_bytes)
            self._present[last:end] = bytes(end - last)
            self._map.madvise(mmap.MADV_REMOVE, first_byte, last_byte - first_byte)
            returned += end - last
        return returned * GRANULE

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor in the segment; its storage is the whole segment."""
        strides = [1] * len(shape)
        for dim in range(len(shape) - 1, 0, -1):
            strides[dim - 1] = strides[dim] * shape[dim]
        return self.strided(offset, shape, strides, dtype)

    def strided(
        self, offset: int, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """As `tensor`, with these strides in elements."""
        whole = self._whole.get(dtype)
        if whole is None:
            # A tensor that is made in inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                whole = torch.frombuffer(self.view, dtype=dtype)
            self._whole[dtype] = whole
        return torch.as_strided(whole, shape, strides, offset // dtype.itemsize)

    def close(self) -> None:
        """Closes the descriptor; what is mapped stays."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _absent(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The runs of granules of a range that are not present."""
        first, last = start // GRANULE, -(-stop // GRANULE)
        runs: list[tuple[int, int]] = []
        while (first := self._present.find(0, first, last)) >= 0 and first < last:
            end = self._present.find(1, first, last)
            end = last if end < 0 else end
            runs.append((first, end))
            first = end
        return runs

    def _populate(self, first: int, last: int) -> None:
        first_byte, last_byte = first * GRANULE, min(last * GRANULE, self.num_bytes)
        # An older kernel refuses: the pages then come by page faults.
        with contextlib.suppress(OSError):
            # Reading maps 16 pages at a time, and a shared page that was read may be written.
            self._map.madvise(_MADV_POPULATE_READ, first_byte, last_byte - first_byte)
        self._present[first:last] = b"\1" * (last - first)
