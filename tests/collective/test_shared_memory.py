"""Messages through memory that ranks share: the same results at any pace of the ranks."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import Ranks
from test_autograd import one_function
from test_collectives import DTYPES, GROUPS, STRIDES, WrittenBytes, restride, same, values

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.collective import shared_memory
from fastvideo_comm.collective.shared_memory import SharedMemory


@contextlib.contextmanager
def from_bytes(number: int) -> Iterator[None]:
    """Messages of so many bytes and more go through memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_memory, "MIN_SHARED_BYTES", number)
        yield


def mappings() -> int:
    """How many pieces of shared memory this process has mapped."""
    return Path("/proc/self/maps").read_text().count("/memfd:fastvideo_comm-")


@contextlib.contextmanager
def fresh(communicator: DeviceCommunicatorBase) -> Iterator[DeviceCommunicatorBase]:
    """Another communicator of the same ranks, that has shared nothing yet."""
    other = DeviceCommunicatorBase(communicator.cpu_group, unique_name="shared")
    try:
        yield other
    finally:
        other.destroy()


def exchange_both_ways(
    communicator: DeviceCommunicatorBase,
    shape: list[int],
    heads: list[int],
    dtype: torch.dtype,
    kind: str,
    seed: int,
) -> None:
    ranks, rank = communicator.world_size, communicator.rank
    batch, sequence, width = shape
    wholes = [
        values([batch, sequence * ranks, number * ranks, width], dtype, seed + i)
        for i, number in enumerate(heads)
    ]
    if kind == "expanded":
        wholes = [whole[:1].expand(whole.shape).clone() for whole in wholes]
    by_sequence = [restride(whole.chunk(ranks, 1)[rank], kind) for whole in wholes]
    by_heads = [restride(whole.chunk(ranks, 2)[rank], kind) for whole in wholes]
    with from_bytes(1):
        there = communicator.all_to_all_4D(by_sequence)
        back = communicator.all_to_all_4D(by_heads, 1, 2)
        alone = communicator.all_to_all_4D(by_sequence[0])
    for actual, expected in zip(there, by_heads, strict=True):
        same(actual, expected)
    for actual, expected in zip(back, by_sequence, strict=True):
        same(actual, expected)
    same(alone, by_heads[0])
    if ranks > 1:
        assert mappings() >= ranks  # the memory was what was used
        assert alone.is_contiguous()


@given(
    group=GROUPS,
    shape=st.tuples(*[st.integers(1, 3), *[st.integers(1, 5)] * 2]),
    heads=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    kind=STRIDES,
    seed=st.integers(0, 99),
)
def test_it_is_the_global_tensor_sliced_the_other_way(
    ranks: Ranks, group, shape, heads, dtype, kind, seed
):
    ranks.run(group, exchange_both_ways, list(shape), heads, dtype, kind, seed)


def gathered(
    communicator: DeviceCommunicatorBase,
    shape: list[int],
    dim: int,
    dtype: torch.dtype,
    kind: str,
    seed: int,
) -> None:
    ranks, rank = communicator.world_size, communicator.rank
    whole_shape = list(shape)
    whole_shape[dim] *= ranks
    whole = values(whole_shape, dtype, seed)
    if kind == "expanded":
        whole = whole[:1].expand(whole.shape).clone()
    if kind == "expanded" and dim == 0:
        kind = "contiguous"
    mine = restride(whole.chunk(ranks, dim)[rank], kind)
    with from_bytes(1):
        same(communicator.all_gather(mine, dim), whole)
    if ranks > 1:
        assert mappings() >= ranks


@given(
    group=GROUPS,
    shape=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    dim=st.integers(-3, 2),
    dtype=st.sampled_from(DTYPES),
    kind=STRIDES,
    seed=st.integers(0, 99),
)
def test_all_gather_is_the_global_tensor(ranks: Ranks, group, shape, dim, dtype, kind, seed):
    ranks.run(group, gathered, shape, dim, dtype, kind, seed)


def reduced(
    communicator: DeviceCommunicatorBase, shape: list[int], dim: int, dtype: torch.dtype
) -> None:
    ranks, rank = communicator.world_size, communicator.rank
    whole_shape = list(shape)
    whole_shape[dim] *= ranks
    everyones = [values(whole_shape, dtype, seed) for seed in range(ranks)]
    leaf = torch.zeros(shape, dtype=dtype, requires_grad=True)
    with from_bytes(1):
        output = communicator.all_gather(leaf, dim)
        (gradient,) = torch.autograd.grad(output, leaf, everyones[rank])
    # Integers below 2^8 add up exactly in every one of these dtypes.
    same(gradient, sum(everyones).chunk(ranks, dim)[rank].contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.complex64])
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("group", [2, 3, (1, 3)])
def test_its_gradient_is_the_sum_over_ranks(ranks: Ranks, group, dim, dtype):
    ranks.run(group, reduced, [3, 5, 2], dim, dtype)


def written_once(communicator: DeviceCommunicatorBase) -> None:
    ranks = communicator.world_size
    x = torch.rand(2, 6, 2 * ranks, 8)
    num_bytes = x.numel() * 4
    with from_bytes(1):
        communicator.all_to_all_4D(x)
        with WrittenBytes() as written:
            communicator.all_to_all_4D(x)
    sent = num_bytes * (ranks - 1) // ranks
    # What goes to others is packed and read; a rank's own part is copied once; one number a rank.
    assert written.count - sent - num_bytes <= 64, written.names


@pytest.mark.parametrize("size", [2, 3])
def test_each_byte_is_packed_once_and_read_once(ranks: Ranks, size):
    ranks.run(size, written_once)


def at_any_pace(communicator: DeviceCommunicatorBase, slow: int) -> None:
    """Sizes that grow and shrink, one rank late before or after, results kept to the end."""
    ranks, rank = communicator.world_size, communicator.rank
    sizes = [1, 7, 3, 200, 5, 5, 900, 2, 4000, 1, 1, 1]
    results = []
    with from_bytes(1):
        for call, size in enumerate(sizes):
            whole = values([1, size * ranks, ranks, 4], torch.int32, call)
            if rank == slow % ranks:
                time.sleep(0.01)
            results.append((communicator.all_to_all_4D(whole.chunk(ranks, 1)[rank]), whole))
            if rank == (slow + call) % ranks:
                time.sleep(0.01)
    for actual, whole in results:
        same(actual, whole.chunk(ranks, 2)[rank])


@pytest.mark.parametrize("slow", [0, 1, 2])
def test_no_pace_of_the_ranks_changes_a_result(ranks: Ranks, slow):
    ranks.run(3, at_any_pace, slow)


def second_derivatives(communicator: DeviceCommunicatorBase) -> None:
    ranks = communicator.world_size

    def there_and_back(x: torch.Tensor) -> torch.Tensor:
        y = communicator.all_to_all_4D(x * x)
        return communicator.all_to_all_4D(y * y, 1, 2)

    x = torch.rand(ranks, 1, 2, ranks, 2, dtype=torch.float64, requires_grad=True)
    dist.broadcast(x.detach(), 0, group=communicator.cpu_group)
    with from_bytes(1):
        function = one_function(communicator, there_and_back)
        torch.autograd.gradcheck(function, x, nondet_tol=0.0)
        torch.autograd.gradgradcheck(function, x, nondet_tol=0.0)
        gathering = one_function(communicator, lambda x: communicator.all_gather(x * x, 1))
        torch.autograd.gradcheck(gathering, x)
        torch.autograd.gradgradcheck(gathering, x)


def test_derivatives_of_first_and_second_order(ranks: Ranks):
    ranks.run(2, second_derivatives)


def mixed_with_the_wire(communicator: DeviceCommunicatorBase) -> None:
    """Small, asynchronous and uneven ones between those that go through memory."""
    ranks, rank = communicator.world_size, communicator.rank
    whole = values([2, 8 * ranks, 4 * ranks, 16], torch.float32, 1)
    mine, expected = whole.chunk(ranks, 1)[rank], whole.chunk(ranks, 2)[rank]
    rows = [8 * ranks, *[0] * (ranks - 1)]
    one_head = whole[:, :, :1]  # for all ranks
    with from_bytes(mine.numel() * 4):
        for _ in range(3):
            handle = communicator.all_to_all_4D(mine, async_op=True)
            large = communicator.all_to_all_4D(mine)
            small = communicator.all_to_all_4D(mine[:1])
            uneven = communicator.all_to_all_4D(whole.split(rows, 1)[rank], gather_sizes=rows)
            grouped = communicator.all_to_all_4D([mine, one_head.chunk(ranks, 1)[rank]])
            for actual in (handle.wait(), large, uneven, grouped[0]):
                same(actual, expected)
            same(small, expected[:1])
            same(grouped[1], one_head)


def test_other_exchanges_in_between_are_not_disturbed(ranks: Ranks):
    ranks.run(3, mixed_with_the_wire)


def let_go(communicator: DeviceCommunicatorBase) -> None:
    before, files = mappings(), len(os.listdir("/proc/self/fd"))
    x = torch.rand(1, 6, communicator.world_size, 8)
    with from_bytes(1):
        with fresh(communicator) as other:
            other.all_to_all_4D(x)
            assert mappings() == before + communicator.world_size
            # The open files are closed while the memory is in use.
            assert len(os.listdir("/proc/self/fd")) == files
            leaf = x.clone().requires_grad_()
            graph = other.all_to_all_4D(leaf)
        assert mappings() == before
    del graph


def test_memory_is_let_go_with_the_communicator(ranks: Ranks):
    ranks.run(2, let_go)


def on_another_default_device(communicator: DeviceCommunicatorBase, size: int) -> None:
    ranks, rank = communicator.world_size, communicator.rank
    whole = values([2, 8 * ranks, ranks, 1 << 12], torch.float32, 1)
    mine = whole.chunk(ranks, 1)[rank]
    with fresh(communicator) as other, from_bytes(size), torch.device("meta"):
        there = other.all_to_all_4D(mine)
        gathered = other.all_gather(mine, 1)
    same(there, whole.chunk(ranks, 2)[rank])
    same(gathered, whole)


@pytest.mark.parametrize("size", [1, 1 << 40])
def test_torchs_default_device_is_none_of_its_concern(ranks: Ranks, size):
    ranks.run(2, on_another_default_device, size)


def inferred(communicator: DeviceCommunicatorBase) -> None:
    ranks, rank = communicator.world_size, communicator.rank
    whole = values([1, 8 * ranks, ranks, 4], torch.float32, 1)
    mine, expected = whole.chunk(ranks, 1)[rank], whole.chunk(ranks, 2)[rank]
    with fresh(communicator) as other, from_bytes(1):
        with torch.inference_mode():
            same(other.all_to_all_4D(mine), expected)
        same(other.all_to_all_4D(mine), expected)
        with torch.inference_mode():
            same(other.all_to_all_4D(mine), expected)


def test_inference_mode_and_outside_it(ranks: Ranks):
    ranks.run(2, inferred)


def below_the_limit(communicator: DeviceCommunicatorBase) -> None:
    before = mappings()
    with fresh(communicator) as other:
        small = torch.rand(1, 8, 8, 8)
        other.all_to_all_4D(small)
        other.all_to_all_4D([small, small])
        assert mappings() == before
        other.all_to_all_4D(torch.rand(1, 512, 8, 64))
        assert mappings() > before


def test_only_large_messages_need_it(ranks: Ranks):
    ranks.run(2, below_the_limit)


def test_one_rank_alone_maps_its_own_memory():
    def everyone(numbers: list[int]) -> list[list[int]]:
        return [numbers]

    memory = SharedMemory()
    assert memory.window(40) is None
    memory.grow(40, everyone)
    like = torch.arange(5)
    windows: list[Any] = []
    for _ in range(3):
        windows.append(memory.window(40))
        memory.turn()
    windows[0].view(0, 64, like).copy_(like)
    windows[1].view(0, 64, like).fill_(-1)
    assert torch.equal(windows[0].view(0, 64, like), like)
    assert torch.equal(windows[2].view(0, 64, like), like)  # the first one again
