"""By memory every byte is copied once: from the input to where it belongs in an output."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from ranks import Ranks
from test_collectives import WrittenBytes

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.collective import memory
from fastvideo_comm.collective.layout import Split
from fastvideo_comm.memory import deliveries, host


def count_copies(c: DeviceCommunicatorBase, batch: int) -> None:
    """Bytes that a rank writes in a call, in units of the bytes of its input."""
    ranks, rank = c.world_size, c.rank
    c.barrier()  # connects the memory
    engine = c._runner.group.memory._engine
    # `WrittenBytes` sees this thread only. After an earlier job's asynchronous calls the thread in
    # the background may be about to work, and would take a part of the next call.
    background, engine._background = engine._background, None
    if background is not None:
        background.stop()
    x = torch.rand(batch, 6, 2 * ranks, 8, requires_grad=True)
    y = torch.rand(batch, 6 * ranks, 2, 8, requires_grad=True)
    fused = torch.rand(batch, 6, 3 * 2 * ranks * 8).chunk(3, -1)[1].unflatten(-1, (-1, 8))
    by_head = torch.rand(batch, 2 * ranks, 6, 8).transpose(1, 2)
    rows = [2 + other for other in range(ranks)]
    own = torch.rand(batch, rows[rank], 2 * ranks, 8)
    heads = [2 * ranks, *[0] * (ranks - 1)]
    strided = torch.rand(batch, 6 * ranks, 8, 2).mT
    scarce = torch.rand(batch, 6, 1, 8)
    unit = x.nbytes
    for count, call in (
        (unit, lambda: c.all_to_all_4D(x)),
        (unit, lambda: c.all_to_all_4D(fused)),  # read in place
        (unit, lambda: c.all_to_all_4D(by_head)),
        (unit, lambda: c.all_to_all_4D(y, 1, 2)),
        (unit, lambda: c.all_to_all_4D(strided, 1, 2)),
        (2 * unit, lambda: c.all_to_all_4D((x, fused))),
        (own.nbytes, lambda: c.all_to_all_4D(own, scatter_sizes=heads, gather_sizes=rows)),
        # Every rank gets the head.
        (unit + ranks * scarce.nbytes, lambda: c.all_to_all_4D((x, scarce))),
        (ranks * unit, lambda: c.all_gather(x, 0)),
        (ranks * unit, lambda: c.all_gather(by_head, -1)),
        (ranks * own.nbytes, lambda: c.all_gather(own, 1, gather_sizes=rows)),
        (unit, lambda: c.gather(x, 0, 1)),
        # A part from each rank, and the sums of one part.
        (
            unit + (ranks - 1) * unit // ranks,
            lambda: memory.reduce_scatter(c._runner.group, x.detach(), Split(2)),
        ),
    ):
        with WrittenBytes() as written:
            call()
        assert written.count == count, (count, written.names)
    for call, leaf in (
        (lambda: c.all_to_all_4D(x), x),
        (lambda: c.all_to_all_4D(y, 1, 2), y),
    ):
        output = call()
        gradient = torch.rand_like(output).mT.contiguous().mT
        with WrittenBytes() as written:
            torch.autograd.grad(output, leaf, gradient)
        assert written.count == unit, written.names


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_byte_is_copied_once(ranks: Ranks, size, batch):
    ranks.run(size, count_copies, batch, ways=["memory"])


def plan_once(c: DeviceCommunicatorBase) -> None:
    row = torch.arange(960.0) + 1000 * c.rank
    c.all_to_all_4D(row.view(1, 8, 4, 30))  # connects the memory
    memory_of_group = c._runner.group.memory
    assert memory_of_group is not None
    plans = memory_of_group._plans
    plans.clear()

    def trade(start: int, length: int, *, batch: int = 1) -> int:
        """Makes an exchange there and back, and a gather; returns how often it planned."""
        with mock.patch.object(host, "parts_of", wraps=host.parts_of) as planning:
            trade_of(start, length, batch)
        return planning.call_count

    def trade_of(start: int, length: int, batch: int) -> None:
        x = row[start : start + batch * length * 24].view(batch, length, 4, 6)
        y = c.all_to_all_4D(x)
        assert torch.equal(c.all_to_all_4D(y, 1, 2), x)
        same = c.all_gather(y, 2)[:, c.rank * length : (c.rank + 1) * length]
        assert torch.equal(same, x)

    assert trade(0, 3) == 3
    assert trade(100, 3) == 0  # wherever the inputs are
    assert trade(0, 4) == 3
    assert trade(0, 3, batch=2) == 3
    assert trade(0, 4) == 0
    with mock.patch.object(deliveries, "_MAX_PLANS", len(plans) + 2):
        for length in range(5, 15):  # a length that grows does not fill the memory
            c.all_gather(torch.arange(length))
            assert len(plans) <= deliveries._MAX_PLANS


def test_a_call_is_planned_once_for_each_layout(ranks: Ranks):
    ranks.run(2, plan_once, ways=["memory"])
