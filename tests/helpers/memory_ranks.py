"""What the tests of exchange by memory share: communicators, tensors and what becomes of them."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from fastvideo_comm import DeviceCommunicatorBase


@contextlib.contextmanager
def fresh(
    communicator: DeviceCommunicatorBase, memory: str | None = "on", validate: str = "auto"
) -> Iterator[DeviceCommunicatorBase]:
    """Another communicator of the same ranks, that has made no call yet."""
    other = DeviceCommunicatorBase(
        communicator.cpu_group, unique_name="fresh", memory=memory, validate=validate
    )
    try:
        yield other
    finally:
        other.destroy()


def numbered(communicator: DeviceCommunicatorBase, call: int, length: int = 3) -> torch.Tensor:
    """A `[1, length, P, 4]` of this rank, whose values say rank, call and place."""
    count = length * communicator.world_size * 4
    values = torch.arange(count, dtype=torch.int64) + 1_000_000 * call
    return (values + 10_000 * communicator.rank).view(1, length, communicator.world_size, 4)


def exchanged(communicator: DeviceCommunicatorBase, call: int, length: int = 3) -> torch.Tensor:
    """What `all_to_all_4D` makes of the `numbered` tensors of all ranks, on this rank."""
    ranks, rank = communicator.world_size, communicator.rank
    mine = numbered(communicator, call, length)[:, :, rank : rank + 1] - 10_000 * rank
    return torch.cat([mine + 10_000 * other for other in range(ranks)], 1)


def exchange(communicator: DeviceCommunicatorBase, call: int, length: int = 3) -> torch.Tensor:
    """An exchange of `numbered` tensors, compared."""
    output = communicator.all_to_all_4D(numbered(communicator, call, length))
    assert torch.equal(output, exchanged(communicator, call, length))
    return output


def num_descriptors() -> int:
    """The open descriptors of this process."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def num_mappings() -> int:
    """How many segments of shared memory this process has mapped."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count("/memfd:fastvideo_comm")


def resident_bytes() -> int:
    """The memory of this process that is not shared, in pages that are there."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status must have a line RssAnon")
