"""Messages through memory that ranks share: the same results at any pace of the ranks."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import memory_ranks
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import Ranks
from test_autograd import one_function
from test_collectives import DTYPES, GROUPS, STRIDES, WrittenBytes, restride, same, values

from fastvideo_comm import DeviceCommunicatorBase, shared_memory
from fastvideo_comm import exchange as exchange_module
from fastvideo_comm.errors import CollectiveError
from fastvideo_comm.shared_memory import SharedMemory


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


def refuse(*_: object) -> int:
    raise OSError("refused")


def where_one_cannot(communicator: DeviceCommunicatorBase, how: str) -> None:
    ranks, rank = communicator.world_size, communicator.rank
    whole = values([1, 8 * ranks, ranks, 4], torch.float32, 1)
    before, files = mappings(), len(os.listdir("/proc/self/fd"))
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1 and how == "off":
            patch.setenv(shared_memory.SHARED_MEMORY_VARIABLE, "off")
        if rank == 1 and how == "another host":
            patch.setattr(shared_memory.os, "readlink", lambda path: f"{path} is a socket")
        if rank == 1 and how == "another system":
            patch.delattr(shared_memory.os, "memfd_create")
        if rank == 1 and how == "no descriptor left":
            patch.setattr(shared_memory.os, "memfd_create", refuse)
        if rank == 1 and how == "no room":
            patch.setattr(shared_memory.os, "ftruncate", refuse)
        with fresh(communicator) as other, from_bytes(1):
            for _ in range(2):
                same(other.all_to_all_4D(whole.chunk(ranks, 1)[rank]), whole.chunk(ranks, 2)[rank])
            assert mappings() == before
            assert len(os.listdir("/proc/self/fd")) == files


@pytest.mark.parametrize(
    "how", ["off", "another host", "another system", "no descriptor left", "no room"]
)
def test_where_one_rank_cannot_share_all_use_the_group(ranks: Ranks, how):
    ranks.run(3, where_one_cannot, how)


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


def other_sizes(communicator: DeviceCommunicatorBase, first: list[int]) -> str:
    """Ranks that send different amounts, which only wrong programs do."""
    group, rank = communicator.cpu_group, communicator.rank
    other = DeviceCommunicatorBase(group, unique_name="shared", validate="off")
    with from_bytes(1):
        if first:
            other.all_to_all_4D(torch.rand(1, 64, 2, 64))
        try:
            other.all_to_all_4D(torch.rand(1, (first or [1 << 12, 1 << 14])[rank], 2, 64))
        except CollectiveError as error:
            return str(error)
        finally:
            other.destroy()
    return "nothing"


# Both ranks need more memory than before; neither; one of them.
@pytest.mark.parametrize("first", [[], [3, 5], [3, 1 << 14], [1 << 14, 3]])
def test_other_sizes_on_another_rank_are_an_error_on_both(ranks: Ranks, first):
    for text in ranks.run(2, other_sizes, first):
        assert "sharing memory on rank" in text
        assert "'shared'" in text
        sizes = " ".join(str(512 * size) for size in (first or [1 << 12, 1 << 14]))
        assert f"all ranks must send as much, got {sizes.replace(' ', ', ')} bytes" in text


def interrupted(communicator: DeviceCommunicatorBase) -> None:
    """One rank is interrupted before it has told the others anything, and calls again."""
    ranks, rank = communicator.world_size, communicator.rank
    whole = values([1, 8 * ranks, ranks, 4], torch.float32, 1)
    mine = whole.chunk(ranks, 1)[rank]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    other = DeviceCommunicatorBase(communicator.cpu_group, validate="off")
    with from_bytes(1):
        other.all_to_all_4D(mine)
        for _ in range(3):
            if rank == 1:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(exchange_module, "_copy", interrupt)
                    with pytest.raises(KeyboardInterrupt):
                        other.all_to_all_4D(mine)
            same(other.all_to_all_4D(mine), whole.chunk(ranks, 2)[rank])
            same(other.all_gather(mine, 1), whole)
    other.destroy()


def test_a_rank_that_was_interrupted_may_call_again(ranks: Ranks):
    ranks.run(3, interrupted)


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


def test_a_killed_rank_is_an_error_on_the_other_and_no_wait():
    text, seconds = memory_ranks.killed_between_exchanges()
    assert "sharing memory on rank 0 of 2" in text
    assert seconds < 10  # half the group's timeout


def test_memory_that_was_not_offered_is_not_opened(tmp_path: Path):
    decoy = tmp_path / "fastvideo_comm-0000000000000007"
    decoy.write_bytes(b"private")
    with decoy.open() as file, pytest.raises(OSError, match="not the memory that was offered"):
        shared_memory._open(os.getpid(), file.fileno(), 7, num_bytes=7)
    with pytest.raises(FileNotFoundError):
        shared_memory._open(os.getpid(), 1 << 20, 7, num_bytes=7)
    with pytest.raises(OSError, match="not the memory that was offered"):
        shared_memory._open(os.getpid(), -1, 7, num_bytes=7)
    assert decoy.read_bytes() == b"private"


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
