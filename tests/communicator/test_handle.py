"""Handles of asynchronous exchanges: several in flight, one dropped, the order of a backward."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from large_tensors import entry_by_entry
from ranks import Ranks
from test_collectives import same, values
from torch.autograd import forward_ad

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.errors import CollectiveError
from fastvideo_comm.handle import AsyncHandle


def several_in_flight(communicator: DeviceCommunicatorBase) -> None:
    with entry_by_entry():
        _several_in_flight(communicator)


def _several_in_flight(communicator: DeviceCommunicatorBase) -> None:
    ranks, rank = communicator.world_size, communicator.rank
    buffers = communicator._runner.group.buffers
    wholes = [values([2, 60 * ranks, ranks, 128], torch.float32, seed) for seed in range(5)]
    inputs = [whole.chunk(ranks, 1)[rank].clone().requires_grad_() for whole in wholes]
    buffers.clear()
    handles = [communicator.all_to_all_4D(x, async_op=True) for x in inputs]
    assert buffers._free == []  # five in flight, five buffers, none free
    outputs = [handle.wait() for handle in reversed(handles)][::-1]
    assert len(buffers._free) == 5
    for handle, output, whole in zip(handles, outputs, wholes, strict=True):
        assert handle.is_completed()
        assert handle.wait() is output
        same(output, whole.chunk(ranks, 2)[rank])
    sum((output * seed).sum() for seed, output in enumerate(outputs)).backward()
    for seed, x in enumerate(inputs):
        assert torch.equal(x.grad, torch.full_like(x, seed))
    # A second backward through the same graph sends again.
    output = communicator.all_to_all_4D(inputs[0], async_op=True).wait()
    for _ in range(2):
        (grad,) = torch.autograd.grad((output**2).sum(), inputs[0], retain_graph=True)
        assert torch.equal(grad, 2 * inputs[0])


def test_several_handles_are_in_flight_and_none_shares_a_buffer(ranks: Ranks):
    ranks.run(3, several_in_flight, ways=["messages"])


def dropped(communicator: DeviceCommunicatorBase) -> None:
    x = torch.rand(1, 2, communicator.world_size, 2)
    with pytest.warns(RuntimeWarning, match=r"all_to_all_4D\(async_op=True\) was dropped without"):
        communicator.all_to_all_4D(x, async_op=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle = communicator.all_to_all_4D(x, async_op=True)
        handle.wait()
        del handle
        gc.collect()
    assert torch.equal(communicator.all_gather(x, 0)[communicator.rank], x[0])


def test_a_handle_that_is_dropped_is_reported_and_the_group_goes_on(ranks: Ranks):
    ranks.run(2, dropped)


def order_of_backward(communicator: DeviceCommunicatorBase) -> None:
    with entry_by_entry():
        _order_of_backward(communicator)


def _order_of_backward(communicator: DeviceCommunicatorBase) -> None:
    """The gradient is on its way while the nodes between call and wait run backward."""
    events: list[str] = []
    communicator.all_gather(torch.zeros(1))  # the first call also asks who shares memory
    channel = communicator._runner.group.c10d
    start, wait = channel.all_to_all, channel.wait

    def spy_start(transfers, *, async_op):
        events.append("send")
        return start(transfers, async_op=async_op)

    def spy_wait(op, works):
        events.append("wait")
        return wait(op, works)

    channel.all_to_all, channel.wait = spy_start, spy_wait
    try:
        x = torch.rand(1, 2, communicator.world_size, 2, requires_grad=True)
        y = torch.rand(3, requires_grad=True)
        handle = communicator.all_to_all_4D(x, async_op=True)
        between = y.exp()
        between.register_hook(lambda grad: events.append("compute"))
        events.append("compute")
        loss = handle.wait().sum() + between.sum()
        assert events == ["send", "compute", "wait"]
        events.clear()
        loss.backward()
        assert events == ["send", "compute", "wait"]
    finally:
        del channel.all_to_all, channel.wait


def test_communication_overlaps_with_computation_in_the_backward_too(ranks: Ranks):
    ranks.run(2, order_of_backward, ways=["messages"])


def test_a_wait_that_failed_is_a_wait_and_the_next_one_says_so(recwarn):
    def fail() -> None:
        raise CollectiveError("the backend failed")

    handle = AsyncHandle("all_to_all_4D", "rank 0 of 2 in group 'sp'", fail, lambda: True)
    with pytest.raises(CollectiveError, match="the backend failed"):
        handle.wait()
    for _ in range(2):
        message = (
            "^all_to_all_4D on rank 0 of 2 in group 'sp' failed when it was waited for before$"
        )
        with pytest.raises(RuntimeError, match=message):
            handle.wait()
    assert handle.is_completed()
    del handle
    assert not recwarn.list


def waited_for_outside(communicator: DeviceCommunicatorBase) -> None:
    x, along = (values([1, 2, 4, 3], torch.float64, seed) for seed in range(2))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, along)
        handle = communicator.all_to_all_4D(dual, async_op=True)
        inside = communicator.all_to_all_4D(dual, async_op=True)
        inside.wait()
    with pytest.raises(RuntimeError, match=r"wait\(\) must be called inside the torch.func.jvp or"):
        handle.wait()
    assert communicator.all_reduce(torch.ones(1)).item() == 2, "still usable"


def test_a_wait_outside_the_transform_is_refused(ranks: Ranks):
    ranks.run(2, waited_for_outside)


def graph_without_result(communicator: DeviceCommunicatorBase) -> None:
    x = torch.rand(1, 64, 4, 64, requires_grad=True)
    communicator.all_to_all_4D(x.detach())
    before = communicator.memory_stats().bytes_in_use
    handle = communicator.all_to_all_4D(x, async_op=True)
    loss = handle.wait().sum()
    assert communicator.memory_stats().bytes_in_use > before
    del handle
    assert communicator.memory_stats().bytes_in_use == before
    loss.backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_a_graph_holds_no_result_that_its_backward_does_not_need(ranks: Ranks):
    ranks.run(2, graph_without_result, ways=("memory",))
