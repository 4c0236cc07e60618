"""Mixed calls by memory for a long time: memory and descriptors stay as they are."""

from __future__ import annotations

import gc
import random
import time

import pytest
import torch
import torch.distributed as dist
from memory_ranks import (
    exchange,
    exchanged,
    fresh,
    num_descriptors,
    num_mappings,
    numbered,
    resident_bytes,
)
from ranks import Ranks

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.errors import MismatchError
from fastvideo_comm.handle import AsyncHandle

MIB = 1 << 20


def mixed_call(
    c: DeviceCommunicatorBase,
    call: int,
    random_: random.Random,
    flying: list[tuple[int, int, AsyncHandle[torch.Tensor]]],
) -> torch.Tensor | None:
    """One call, the same kind on all ranks; its result is compared."""
    ranks, rank = c.world_size, c.rank
    length = random_.choice((0, 1, 2, 3, 7, 7, 7, 50, 400))
    kind = random_.randrange(17)
    if kind < 3:
        return exchange(c, call, length)
    if kind < 5:
        x = numbered(c, call, length)
        flying.append((call, length, c.all_to_all_4D(x, async_op=True)))
        return None
    if kind == 5:
        leaf = torch.full((1, 1 + length, ranks, 4), float(rank), requires_grad=True)
        output = c.all_to_all_4D(leaf)
        (output * (call % 7)).sum().backward()
        assert (leaf.grad == call % 7).all()
        return output.detach()
    if kind == 6:
        total = c.all_reduce(torch.full((length * 100,), call + rank), dist.ReduceOp.MAX)
        assert (total == call + ranks - 1).all()
        return total
    if kind == 7:
        rows = [(call + other) % 4 for other in range(ranks)]
        whole = c.all_gather(torch.full((rows[rank], 5), rank), 0, gather_sizes="auto")
        assert whole[:, 0].tolist() == [other for other in range(ranks) for _ in range(rows[other])]
        return whole
    if kind == 8:
        dst = call % ranks
        gathered = c.gather(torch.full((length,), rank), dst, 0)
        assert (gathered is not None) == (rank == dst)
        return gathered
    if kind == 9:
        src, dst = random_.sample(range(ranks), 2)
        if rank == src:
            c.send(torch.full((length,), call), dst)
        if rank == dst:
            received = c.recv((length,), torch.int64, src)
            assert (received == call).all()
            return received
        return None
    if kind == 10 and call % 10 == 0:
        with pytest.raises(MismatchError, match="<- shape"):
            c.all_reduce(torch.ones(1 + (rank == call % ranks)))
        return None
    if kind == 11:
        part = c.slice(torch.arange(ranks * length), 0)  # nothing travels but the question
        assert part.tolist() == [*range(rank * length, (rank + 1) * length)]
        return part
    if kind == 12:
        c.barrier()
        return None
    if kind == 13:
        whole = c.broadcast(torch.full((length,), call + rank), call % ranks)
        assert (whole == call + call % ranks).all()
        return whole
    if kind == 14:
        part = c.reduce_scatter(torch.full((ranks, length), call + rank), 0)
        assert (part == ranks * call + ranks * (ranks - 1) // 2).all()
        return part
    if kind == 15:
        weights = [torch.zeros(length, requires_grad=True) for _ in range(3)]
        for weight in weights[: 1 + rank]:  # on some ranks some have no gradient
            weight.grad = torch.ones(length)
        c.reduce_gradients(weights)
        assert all((w.grad == ranks - index).all() for index, w in enumerate(weights))
        return None
    x = torch.full((1, 2, ranks, 4), float(rank), requires_grad=True)
    q, k = c.all_to_all_4D((x, x[:, :, :1].detach() * 2))
    assert (k.view(ranks, -1) == 2 * torch.arange(ranks).view(-1, 1)).all()
    return q.detach()


def soak(communicator: DeviceCommunicatorBase, num_calls: int, seed: int) -> None:
    with fresh(communicator) as c:
        shared, own = random.Random(seed), random.Random(1000 * seed + c.rank)
        flying: list[tuple[int, int, AsyncHandle[torch.Tensor]]] = []
        held: list[tuple[torch.Tensor, torch.Tensor]] = []
        measured: list[tuple[int, int, int]] = []
        for call in range(num_calls):
            if own.random() < 0.1:  # the others go on to the calls behind this one
                time.sleep(own.random() / 500)
            output = mixed_call(c, call, shared, flying)
            if output is not None and own.random() < 0.3:
                held.append((output, output.clone()))
            while len(flying) > own.randrange(6):
                number, length, handle = flying.pop(own.randrange(len(flying)))
                assert torch.equal(handle.wait(), exchanged(c, number, length))
                del handle
            while len(held) > own.randrange(12):
                tensor, copy = held.pop(own.randrange(len(held)))
                assert torch.equal(tensor, copy)
                del tensor, copy
            del output
            if call % (num_calls // 4) == num_calls // 4 - 1:
                gc.collect()
                held_bytes = sum(-(-tensor.nbytes // 64) * 64 for tensor, _ in held)
                measured.append((num_descriptors(), num_mappings(), resident_bytes()))
                # Outputs of what is still in the air are in use too.
                assert c.memory_stats().bytes_in_use <= held_bytes + (len(flying) + 1) * MIB
        while flying:
            number, length, handle = flying.pop()
            assert torch.equal(handle.wait(), exchanged(c, number, length))
            del handle
        held.clear()
        c.all_reduce(torch.ones(1))
        gc.collect()
        assert c.memory_stats().bytes_in_use == 0
        assert c.memory_stats().segments == 1
        # The first quarter brings up threads and caches.
        for descriptors, mappings, resident in measured[2:]:
            assert descriptors <= measured[1][0]
            assert mappings == measured[1][1]
            assert resident < measured[1][2] + 16 * MIB


def test_a_few_hundred_mixed_calls_leave_memory_and_descriptors_as_they_were(ranks: Ranks):
    ranks.run(4, soak, 400, 1, ways=["memory"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_20_000_mixed_calls(ranks: Ranks, monkeypatch):
    monkeypatch.setattr("ranks.JOB_TIMEOUT_SECONDS", 3000.0)
    ranks.run(4, soak, 20_000, 2, ways=["memory"])
