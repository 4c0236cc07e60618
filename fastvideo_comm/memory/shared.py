"""The memory of a GPU that the kernels of other ranks can write to, and tensors on parts of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Shared:
    """The segment of this rank, and where the segments of all ranks are.

    Attributes:
        segment: uint8, zeros at the words before any rank posts.
        addresses: the segment of each rank, as the kernels of this rank see it.
    """

    def __init__(self, segment: Tensor, addresses: Sequence[int], *keeps: object) -> None:
        """Takes the segment; `keeps` lives as long as any memory of it is used."""
        self.segment = segment
        self.addresses = list(addresses)
        self._keeps = keeps

    def block(self, start: int, stop: int) -> Any:
        """What a tensor on these bytes keeps until its storage dies."""
        return _Bytes(self, start, stop)

    def tensor(self, block: Any) -> Tensor:
        """A tensor uint8 on the bytes of `block`, with a storage of its own."""
        return torch.as_tensor(block, device=self.segment.device)


class _Bytes:
    """Bytes of a segment, in the form of which torch makes a tensor without a copy."""

    def __init__(self, shared: Shared, start: int, stop: int) -> None:
        self._shared = shared
        self._start, self._stop = start, stop

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        address = self._shared.segment.data_ptr() + self._start
        shape = (self._stop - self._start,)
        return {"data": (address, False), "shape": shape, "typestr": "|u1", "version": 2}


class Region:
    """The part of a segment that the pool hands out: one segment, as the pool sees it."""

    backed_bytes = 0  # nothing is given back

    def __init__(self, shared: Shared, start: int) -> None:
        """The part behind `start`."""
        self._shared = shared
        self._is_taken = False
        self.start = start
        self.num_bytes = shared.segment.numel() - start

    @property
    def view(self) -> Region:
        """What blocks are slices of."""
        return self

    def __getitem__(self, part: slice) -> Any:
        """A block; what a tensor on it keeps."""
        return self._shared.block(self.start + part.start, self.start + part.stop)

    def take(self, num_bytes: int) -> Region:
        """For a pool that wants a segment: this one, once."""
        if self._is_taken or num_bytes > self.num_bytes:
            raise OSError("the segment has no room")
        self._is_taken = True
        return self

    def back(self, start: int, stop: int) -> None:
        """All of it has memory."""

    def give_back(self, start: int, stop: int, num_bytes: int) -> int:  # noqa: ARG002
        """Nothing is given back before all of it is."""
        return 0

    def close(self) -> None:
        """The tensors on it keep it."""
