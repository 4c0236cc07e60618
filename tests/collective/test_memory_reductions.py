"""Reductions by memory, and reduce_scatter by messages: in rank order, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from memory_ranks import fresh
from ranks import Ranks
from test_collectives import DTYPES, restride, same, values

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.collective import memory
from fastvideo_comm.collective.wire import REDUCED

OPS = {
    dist.ReduceOp.SUM: torch.add,
    dist.ReduceOp.AVG: torch.add,
    dist.ReduceOp.PRODUCT: torch.mul,
    dist.ReduceOp.MIN: torch.minimum,
    dist.ReduceOp.MAX: torch.maximum,
    dist.ReduceOp.BAND: torch.bitwise_and,
    dist.ReduceOp.BOR: torch.bitwise_or,
    dist.ReduceOp.BXOR: torch.bitwise_xor,
}
KINDS = ("contiguous", "transposed", "stepped", "offset")


def allowed(op: dist.ReduceOp, dtype: torch.dtype) -> bool:
    is_float = dtype.is_floating_point or dtype.is_complex
    if dtype not in REDUCED:
        return False
    if dtype.is_complex:
        return op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG)
    if op == dist.ReduceOp.AVG:
        return is_float
    return not (is_float and op in (dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR))


def everyones(ranks: int, shape: list[int], dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """A tensor for each rank, whose sum depends on the order of the ranks."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return [values(shape, dtype, seed * 10 + rank) for rank in range(ranks)]
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    scales = [10.0 ** (2 * ((rank + seed) % 3)) for rank in range(ranks)]
    return [
        (torch.randn(shape, generator=generator, dtype=wide) * scale).to(dtype) for scale in scales
    ]


def in_rank_order(tensors: list[torch.Tensor], op: dist.ReduceOp) -> torch.Tensor:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total = OPS[op](total, tensor)
    return total / len(tensors) if op == dist.ReduceOp.AVG else total


def all_reduced(communicator: DeviceCommunicatorBase, dtype: torch.dtype, num_bytes: int) -> None:
    ranks, rank = communicator.world_size, communicator.rank
    shape = [num_bytes // 2 // dtype.itemsize, 2, 1]
    for seed, op in enumerate(op for op in OPS if allowed(op, dtype)):
        tensors = everyones(ranks, shape, dtype, seed)
        mine = restride(tensors[rank], KINDS[seed % len(KINDS)])
        before = mine.clone()
        result = communicator.all_reduce(mine, op)
        same(result, in_rank_order(tensors, op))
        assert result.is_contiguous()
        result.zero_()
        same(mine, before)  # and is not the memory of the result


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype in REDUCED])
def test_all_reduce_is_the_reduction_in_rank_order_bit_for_bit(ranks: Ranks, dtype):
    limit = memory.WHOLE_REDUCE_BYTES
    for size, num_bytes in ((2, 64), (3, limit), (4, limit + 32), (3, 5 * limit + 32)):
        ranks.run(size, all_reduced, dtype, num_bytes, ways=["memory"])


def of_odd_shapes(communicator: DeviceCommunicatorBase) -> None:
    ranks, rank = communicator.world_size, communicator.rank
    many = memory.WHOLE_REDUCE_BYTES // 4
    # Fewer elements than ranks, no element, no dim; parts that cannot be equal.
    for shape in ([], [1], [0], [3, 0, 2], [2, 1], [many + 1], [many, 3], [1, many + 7, 1]):
        tensors = everyones(ranks, shape, torch.float32, len(shape))
        for op in (None, dist.ReduceOp.MAX):
            expected = in_rank_order(tensors, op or dist.ReduceOp.SUM)
            same(communicator.all_reduce(tensors[rank], op), expected)
    expanded = torch.full((1, 1), float(rank)).expand(many, 2)
    same(communicator.all_reduce(expanded), torch.full((many, 2), sum(range(ranks)) * 1.0))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_tensors_of_no_dim_no_element_and_parts_that_are_not_equal(ranks: Ranks, size):
    ranks.run(size, of_odd_shapes, ways=["memory"])


def not_a_number(communicator: DeviceCommunicatorBase, length: int) -> None:
    ranks, rank = communicator.world_size, communicator.rank
    for holder in range(ranks):
        mine = torch.full((length,), float(rank))
        if rank == holder:
            mine[1::2] = math.nan
        for op, extreme in ((dist.ReduceOp.MIN, 0.0), (dist.ReduceOp.MAX, ranks - 1.0)):
            result = communicator.all_reduce(mine, op)
            assert result[1::2].isnan().all(), "whichever rank holds it"
            assert (result[::2] == extreme).all()
    signs = torch.tensor([0.0, -0.0]).roll(rank)
    assert communicator.all_reduce(signs, dist.ReduceOp.SUM).abs().sum() == 0


@pytest.mark.parametrize("length", [4, memory.WHOLE_REDUCE_BYTES])
def test_nan_on_any_rank_is_the_minimum_and_the_maximum(ranks: Ranks, length):
    ranks.run(3, not_a_number, length, ways=["memory"])


def scattered(communicator: DeviceCommunicatorBase, dtype: torch.dtype, way: str) -> None:
    ranks, rank = communicator.world_size, communicator.rank
    communicator.all_reduce(torch.ones(1))  # memory is connected
    assert (communicator._runner.group.memory is not None) == (way == "memory")
    for seed, kind in enumerate(KINDS):
        for dim in range(3):
            tensors = everyones(ranks, [2 * ranks, 3 * ranks, ranks], dtype, seed)
            total = in_rank_order(tensors, dist.ReduceOp.SUM)
            mine = restride(tensors[rank], kind)
            result = communicator.reduce_scatter(mine, dim)
            same(result, total.chunk(ranks, dim)[rank].contiguous())
            sizes = tuple([0, 2 * ranks][: ranks - 1] + [0] * (ranks - 3))
            sizes = (*sizes, total.shape[1] - sum(sizes))
            result = communicator.reduce_scatter(mine, 1, scatter_sizes=sizes)
            same(result, total.split(sizes, 1)[rank].contiguous())
    # The gradient of all_gather is the same sum.
    leaf = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    tensors = everyones(ranks, [2, 3 * ranks], dtype, 9)
    (gradient,) = torch.autograd.grad(communicator.all_gather(leaf, 1), leaf, tensors[rank])
    same(gradient, in_rank_order(tensors, dist.ReduceOp.SUM).chunk(ranks, 1)[rank].contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("way", ["memory", "messages"])
def test_reduce_scatter_adds_in_rank_order_bit_for_bit(ranks: Ranks, size, dtype, way):
    ranks.run(size, scattered, dtype, way, ways=[way])


def moved(communicator: DeviceCommunicatorBase, dtype: torch.dtype) -> None:
    """gather to each rank, and send and recv between all pairs, of shapes with and without dims."""
    ranks, rank = communicator.world_size, communicator.rank
    for seed, shape in enumerate(([], [0], [3, 0], [1], [2, 3, 5], [4, 1, 700])):
        tensors = [values([*shape], dtype, 100 * seed + other) for other in range(ranks)]
        for dst in range(ranks) if shape else ():
            gathered = communicator.gather(tensors[rank], dst, -1)
            if rank == dst:
                same(gathered, torch.cat(tensors, -1))
            else:
                assert gathered is None
        for src in range(ranks):
            dst = (src + 1 + seed) % ranks
            if src == dst:
                continue
            if rank == src:
                communicator.send(tensors[src], dst)
            if rank == dst:
                received = communicator.recv(shape, dtype, src)
                same(received, tensors[src])
                received.fill_(0)
        for dim in range(len(shape)):
            same(communicator.all_gather(tensors[rank], dim), torch.cat(tensors, dim))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_send_and_recv_of_any_shape_and_dtype(ranks: Ranks, dtype):
    ranks.run(3, moved, dtype, ways=["memory"])


def both_directions_at_once(communicator: DeviceCommunicatorBase) -> None:
    """Pairs count their calls apart from those of all ranks, and from those of other pairs."""
    ranks, rank = communicator.world_size, communicator.rank
    with fresh(communicator) as other:
        other.all_reduce(torch.ones(1))
        for call in range(20):
            for first in range(ranks):
                for second in range(first + 1, ranks):
                    if rank == first:
                        other.send(torch.full((5,), call * 100 + second), second)
                        answer = other.recv((5,), torch.int64, second)
                        assert torch.equal(answer, torch.full((5,), call * 200 + second))
                    elif rank == second:
                        question = other.recv((5,), torch.int64, first)
                        other.send(question + call * 100, first)
            if call % 3 == 0:
                assert other.all_reduce(torch.ones(1)).item() == ranks
        assert other.memory_stats().refusal == ""


def test_pairs_count_their_calls_apart(ranks: Ranks):
    ranks.run(4, both_directions_at_once, ways=["memory"])
