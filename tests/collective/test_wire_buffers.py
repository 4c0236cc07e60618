"""Buffers for messages: reused, never handed out, never lost, never shared by two exchanges."""

from __future__ import annotations

import pytest
import torch
from ranks import Ranks
from test_collectives import same

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.collective import messages
from fastvideo_comm.collective.validation import all_to_all_4D


def reuse(communicator: DeviceCommunicatorBase, batch: int) -> None:
    other = DeviceCommunicatorBase(communicator.cpu_group, unique_name="other")
    buffers = communicator._runner.group.buffers
    buffers.clear()
    x = torch.rand(batch, 60, 2 * communicator.world_size, 128)  # past what is allocated afresh
    outputs = [communicator.all_to_all_4D(x + step) for step in range(4)]
    assert len(buffers._free) == 1  # one buffer served all four
    address = buffers._free[0].data_ptr()
    with torch.inference_mode():
        outputs.append(communicator.all_to_all_4D(x))
    back = [communicator.all_to_all_4D(output, 1, 2) for output in outputs]
    assert [wire.data_ptr() for wire in buffers._free] == [address]
    addresses = {output.untyped_storage().data_ptr() for output in outputs + back}
    assert address not in addresses  # a wire buffer is never what the caller gets
    assert len(addresses) == 10
    for step in range(4):
        same(back[step], x + step)
    larger = communicator.all_to_all_4D(torch.cat((x, x), 1))  # outgrows it: replaced, not added
    assert len(buffers._free) == 1
    assert larger.shape[1] == 120 * communicator.world_size
    assert other._runner.group.buffers._free == []


@pytest.mark.parametrize("batch", [1, 2])
def test_wire_buffers_are_reused_and_never_returned(ranks: Ranks, batch):
    ranks.run(3, reuse, batch)


def failing(communicator: DeviceCommunicatorBase, batch: int) -> None:
    group = communicator._runner.group
    buffers = group.buffers
    buffers.clear()
    x = torch.rand(batch, 16, 64, 64).mT  # is packed, into more than what is allocated afresh

    class Broken:
        def alltoall_base(self, *arguments):
            raise RuntimeError("connection closed by peer")

        def _get_backend(self, device):
            return communicator.device_group._get_backend(device)

    group._process_group = Broken()
    try:
        with pytest.raises(RuntimeError, match=r"all_to_all on rank 0 of 1 in group 'test' failed"):
            messages.all_to_all(group, [x], all_to_all_4D(x, 1, 2, 1))
        # What the backend may still be reading is not given to the next exchange.
        assert buffers._free == []
    finally:
        group._process_group = communicator.device_group


@pytest.mark.parametrize("batch", [1, 2])
def test_a_failed_exchange_says_so_and_its_buffer_is_not_reused(ranks: Ranks, batch):
    ranks.run(1, failing, batch)


def kept(communicator: DeviceCommunicatorBase) -> None:
    """A small tensor beside a large one: the buffers are of the larger size."""
    ranks, rank = communicator.world_size, communicator.rank
    other = DeviceCommunicatorBase(communicator.cpu_group)
    sizes = [20_000] + [10] * (ranks - 1)
    leaf = torch.rand(sizes[rank], requires_grad=True)
    lengths = []
    for step in range(4):
        with torch.inference_mode(step == 0):
            gathered = other.all_gather(leaf, 0, gather_sizes=sizes)
        if step:
            gathered.sum().backward()
        lengths.append(len(other._runner.group.buffers._free))
    assert lengths[1] == lengths[2] == lengths[3]
    assert not any(wire.is_inference() for wire in other._runner.group.buffers._free)
    query = torch.rand(1, 80, 8 * ranks, 64)
    for _ in range(3):
        other.all_to_all_4D((query, query[:, :, :1].clone()))
        lengths.append(len(other._runner.group.buffers._free))
    assert lengths[-1] == lengths[-2] <= lengths[3] + 3


def test_buffers_do_not_pile_up_where_sizes_differ(ranks: Ranks):
    ranks.run(3, kept)
