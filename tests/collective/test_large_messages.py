"""Large tensors, whichever way they travel: their values, and what they leave behind."""

from __future__ import annotations

import gc
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import Ranks
from test_collectives import same, values
from test_exchange import finish

from fastvideo_comm import DeviceCommunicatorBase

# Elements of a head, so that a tensor is of a few MiB: past every threshold.
LARGE = 1 << 16


def odd_first(communicator: DeviceCommunicatorBase, width: int, async_op: bool) -> None:
    """The first tensor ends at an odd byte, and what comes behind it has wider elements."""
    ranks, rank = communicator.world_size, communicator.rank
    dtypes = (torch.int8, torch.float64, torch.bool, torch.bfloat16, torch.complex128)
    sequence = 5
    wholes = [
        values([1, sequence * ranks, ranks, width + 1 - index % 2], dtype, index)
        for index, dtype in enumerate(dtypes)
    ]
    by_sequence = [whole.chunk(ranks, 1)[rank] for whole in wholes]
    assert by_sequence[0].nbytes % 2 == 1
    there = finish(communicator.all_to_all_4D(by_sequence, async_op=async_op))
    back = finish(communicator.all_to_all_4D(there, 1, 2, async_op=async_op))
    for actual, returned, whole in zip(there, back, wholes, strict=True):
        same(actual, whole.chunk(ranks, 2)[rank])
        same(returned, whole.chunk(ranks, 1)[rank])


@pytest.mark.parametrize("width", [2, LARGE])
@pytest.mark.parametrize("async_op", [False, True])
def test_packed_tensors_of_several_dtypes_behind_an_odd_number_of_bytes(
    ranks: Ranks, width, async_op
):
    ranks.run(3, odd_first, width, async_op)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def growing(communicator: DeviceCommunicatorBase) -> None:
    ranks = communicator.world_size
    first = DeviceCommunicatorBase(communicator.cpu_group, unique_name="first")
    first.all_to_all_4D(torch.ones(1, 2, ranks, LARGE))  # what a process opens once
    first.destroy()
    gc.collect()
    before = descriptors()
    growing = DeviceCommunicatorBase(communicator.cpu_group, unique_name="growing")
    counts = set()
    for doublings in range(5):
        x = torch.ones(1, 2 << doublings, ranks, LARGE)
        growing.all_to_all_4D(x)
        growing.all_gather(x[:, :2], 1)
        counts.add(descriptors() - before)
    assert len(counts) == 1, counts
    leaf = torch.ones(1, 2, ranks, LARGE, requires_grad=True)
    graph = growing.all_to_all_4D(leaf)
    growing.destroy()
    # Before 3.13 Python keeps a descriptor of its own of a file in which a tensor lives.
    assert descriptors() - before <= (sys.version_info < (3, 13))
    del graph
    gc.collect()
    assert descriptors() == before


def test_growing_exchanges_and_destroy_leave_no_descriptor_open(ranks: Ranks):
    ranks.run(2, growing)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def kept_graph(communicator: DeviceCommunicatorBase, async_op: bool) -> None:
    ranks = communicator.world_size
    other = DeviceCommunicatorBase(communicator.cpu_group, unique_name="other")
    leaf = torch.ones(2, 64, ranks, LARGE, requires_grad=True)  # 32 MiB for each rank
    output = finish(other.all_to_all_4D(leaf, async_op=async_op))
    graph = output.sum()
    del output
    gc.collect()
    before = resident_bytes()
    other.destroy()
    gc.collect()
    freed = before - resident_bytes()
    # At least the buffer that a message was packed into; other memory is not freed meanwhile.
    assert freed >= leaf.nbytes // 2, f"{freed} bytes were freed of {leaf.nbytes}"
    assert graph.requires_grad


@pytest.mark.parametrize("async_op", [False, True])
def test_destroy_frees_the_memory_of_messages_while_a_graph_lives(ranks: Ranks, async_op):
    ranks.run(2, kept_graph, async_op)


def before_the_others(communicator: DeviceCommunicatorBase) -> None:
    """Rank 1 makes its call only after rank 0's has returned, or after 20 s."""
    rank, ranks = communicator.rank, communicator.world_size
    other = DeviceCommunicatorBase(communicator.cpu_group, unique_name="async", validate="off")
    x = torch.full((1, 4, ranks, LARGE), float(rank))
    other.all_to_all_4D(x)  # what only the first call does
    number = other.all_gather(torch.randint(2**40, (1,)))[0].item()
    store = other.cpu_group.get_group_store()
    returned = True
    if rank:
        deadline = time.monotonic() + 20
        while not (returned := store.check([f"returned/{number}"])):
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
    handle = other.all_to_all_4D(x, async_op=True)
    store.set(f"returned/{number}", "1")
    y = handle.wait()
    other.destroy()
    expected = torch.arange(ranks).repeat_interleave(4).view(1, -1, 1, 1).expand_as(y)
    same(y, expected.float())
    assert returned, "rank 0's call waited for rank 1's"


def test_an_asynchronous_exchange_returns_before_the_others_call(ranks: Ranks):
    ranks.run(2, before_the_others)
