"""Buffers for messages: reused, never handed out, never lost, never shared by two exchanges."""

from __future__ import annotations

import importlib
import threading
import time
import types
from typing import Any

import pytest
import torch
from large_tensors import entry_by_entry
from ranks import Ranks
from test_collectives import same, values

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.collective import buffers as wire_buffers
from fastvideo_comm.collective import messages
from fastvideo_comm.collective.buffers import WireBuffers
from fastvideo_comm.collective.validation import all_to_all_4D


def reuse(communicator: DeviceCommunicatorBase, batch: int) -> None:
    with entry_by_entry():
        _reuse(communicator, batch)


def _reuse(communicator: DeviceCommunicatorBase, batch: int) -> None:
    other = DeviceCommunicatorBase(communicator.cpu_group, unique_name="other", memory="off")
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
    ranks.run(3, reuse, batch, ways=["messages"])


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

    group.c10d._process_group = Broken()
    try:
        with pytest.raises(RuntimeError, match=r"all_to_all on rank 0 of 1 in group 'test' failed"):
            messages.all_to_all(group, [x], all_to_all_4D(x, 1, 2, 1))
        # What the backend may still be reading is not given to the next exchange.
        assert buffers._free == []
    finally:
        group.c10d._process_group = communicator.device_group


@pytest.mark.parametrize("batch", [1, 2])
def test_a_failed_exchange_says_so_and_its_buffer_is_not_reused(ranks: Ranks, batch):
    ranks.run(1, failing, batch, ways=["messages"])


def kept(communicator: DeviceCommunicatorBase) -> None:
    with entry_by_entry():
        _kept(communicator)


def _kept(communicator: DeviceCommunicatorBase) -> None:
    """A small tensor beside a large one: the buffers are of the larger size."""
    ranks, rank = communicator.world_size, communicator.rank
    other = DeviceCommunicatorBase(communicator.cpu_group, memory="off")
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
    ranks.run(3, kept, ways=["messages"])


def of_several_dtypes(communicator: DeviceCommunicatorBase) -> None:
    ranks, rank = communicator.world_size, communicator.rank
    communicator._runner.group.buffers.clear()
    shape = [1, 60 * ranks, 2 * ranks, 128]  # past what is allocated afresh
    for dtype in (torch.float32, torch.int32, torch.float32, torch.complex64, torch.int64):
        whole = values(shape, dtype, 1)
        there = communicator.all_to_all_4D(whole.chunk(ranks, 1)[rank])
        same(there, whole.chunk(ranks, 2)[rank])
        same(communicator.all_to_all_4D(there, 1, 2), whole.chunk(ranks, 1)[rank])


def test_a_buffer_of_one_dtype_is_none_of_another(ranks: Ranks):
    """float32 and int32 have one size, and so have complex64 and int64."""
    ranks.run(3, of_several_dtypes)


def interrupted(frame: types.FrameType, event: str, argument: object) -> Any:
    """A trace function: at every line of the pool another thread may go on."""
    if frame.f_code.co_filename != wire_buffers.__file__:
        return None
    if event == "line":
        time.sleep(0)
    return interrupted


def test_threads_that_take_at_once_never_hold_one_buffer():
    buffers = WireBuffers()
    like = torch.empty(0, dtype=torch.int64)
    sizes = (9_000, 10_000, 11_000)  # past what is allocated afresh
    held: set[int] = set()
    failures: list[object] = []

    def work(number: int) -> None:
        try:
            for step in range(60):
                wire = buffers.take((sizes[(step + number) % 3],), like)
                address = wire.data_ptr()
                if address in held:
                    raise ValueError(f"the buffer at {address} is held twice")
                held.add(address)
                time.sleep(0)
                held.discard(address)
                buffers.give_back(wire)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    threading.settrace(interrupted)
    try:
        for thread in threads:
            thread.start()
    finally:
        threading.settrace(None)
    for thread in threads:
        thread.join()
    assert failures == []


BYTE = torch.empty(0, dtype=torch.uint8)


def _taken_and_given_back(buffers: WireBuffers, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    wires = [buffers.take(shape, BYTE) for shape in shapes]
    for wire in wires:
        buffers.give_back(wire)
    return wires


@pytest.mark.parametrize(("size", "kept"), [(1, False), (65_535, False), (65_536, True)])
def test_a_buffer_is_kept_from_64_KiB_on(size, kept):
    buffers = WireBuffers()
    (wire,) = _taken_and_given_back(buffers, (size,))
    assert (wire.shape, wire.dtype, wire.is_cpu) == ((size,), torch.uint8, True)
    assert len(buffers._free) == kept
    assert (buffers.take((size,), BYTE) is wire) == kept
    assert buffers._free == []


@pytest.mark.parametrize("like", [torch.empty(0), torch.empty(0, dtype=torch.int64)])
def test_the_size_that_counts_is_in_bytes(like):
    buffers = WireBuffers()
    wire = buffers.take((65_536 // like.itemsize,), like)
    assert wire.untyped_storage().nbytes() == 65_536
    buffers.give_back(wire)
    assert len(buffers._free) == 1


def test_memory_of_an_accelerator_is_not_kept():
    buffers = WireBuffers()
    wire = buffers.take((100_000,), BYTE.to("meta"))
    assert wire.device.type == "meta"
    buffers.give_back(wire)
    assert buffers._free == []


def test_a_buffer_of_the_same_shape_and_dtype_is_taken_as_it_is():
    buffers = WireBuffers()
    wires = _taken_and_given_back(buffers, (4, 50_000), (200_000,), (2, 100_000))
    for wire in wires:
        assert buffers.take(tuple(wire.shape), BYTE) is wire
    assert buffers._free == []


def test_the_smallest_buffer_that_is_large_enough_is_taken():
    buffers = WireBuffers()
    wires = _taken_and_given_back(buffers, (100_000,), (300_000,), (200_000,), (400_000,))
    addresses = [wire.data_ptr() for wire in wires]
    middle = buffers.take((5, 10_000, 3), BYTE)
    assert (middle.data_ptr(), middle.shape) == (addresses[2], (5, 10_000, 3))
    assert middle.is_contiguous()
    assert middle.untyped_storage().nbytes() == 200_000
    # As large as asked for, in another shape and dtype.
    words = buffers.take((25, 3_000), torch.empty(0, dtype=torch.int32))
    assert (words.data_ptr(), words.shape, words.dtype) == (addresses[1], (25, 3_000), torch.int32)
    assert [wire.data_ptr() for wire in buffers._free] == [addresses[0], addresses[3]]


def test_a_larger_buffer_replaces_one_that_is_too_small():
    buffers = WireBuffers()
    smaller, _ = _taken_and_given_back(buffers, (100_000,), (100_001,))
    larger = buffers.take((100_002,), BYTE)
    assert larger.untyped_storage().nbytes() == 100_002
    (left,) = buffers._free
    assert left is smaller


def test_cleared_buffers_hold_nothing():
    buffers = WireBuffers()
    _taken_and_given_back(buffers, (100_000,), (200_000,))
    buffers.clear()
    assert buffers._free == []


def test_a_buffer_is_for_every_mode_and_on_the_cpu():
    with torch.inference_mode(), torch.device("meta"):
        wire = WireBuffers().take((2, 1, 50_000), BYTE)
    assert not wire.is_inference()
    assert wire.is_cpu
    assert wire.stride() == (50_000, 50_000, 1)


def under_poison(
    communicator: DeviceCommunicatorBase, module: str, job: str, arguments: list[Any]
) -> None:
    """Runs a job while every buffer is overwritten when it is taken and when it is given back."""
    take, give_back = WireBuffers.take, WireBuffers.give_back

    def poisoned(wire: torch.Tensor) -> torch.Tensor:
        wire.view(-1).view(torch.uint8).fill_(0xA5)
        return wire

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WireBuffers, "take", lambda *a: poisoned(take(*a)))
        patch.setattr(WireBuffers, "give_back", lambda self, wire: give_back(self, poisoned(wire)))
        getattr(importlib.import_module(module), job)(communicator, *arguments)


SHAPE = [2, 5, 3]
JOBS: dict[str, tuple[str, str, list[Any]]] = {
    "exchange": (
        "test_collectives",
        "both_directions",
        [[2, 3, 2, 4], torch.float32, "stepped", 1],
    ),
    "exchange of one entry": (
        *("test_collectives", "both_directions"),
        [[1, 3, 2, 4], torch.int16, "contiguous", 1],
    ),
    "gather": ("test_collectives", "joined_and_parted", [[2, 3, 4], 2, torch.int32, "stepped", 1]),
    "uneven": ("test_exchange", "uneven", [SHAPE, [4, 3], torch.float64, "chunk", 3, False]),
    "uneven, async": ("test_exchange", "uneven", [SHAPE, [4, 3], torch.float64, "chunk", 3, True]),
    "grouped": ("test_exchange", "grouped", [1, False]),
    "several": ("test_handle", "several_in_flight", []),
    "uneven gather": ("test_uneven", "dealt_and_gathered", [SHAPE, 1, torch.int64, "stepped", 2]),
    "uneven reduce_scatter": ("test_uneven", "against_cat", [SHAPE, 1, True, 2]),
    "reduce_scatter": ("test_wire_buffers", "gathered_and_reduced", []),
    "send": ("test_collectives", "sent_around", [torch.float32, "transposed"]),
}


def gathered_and_reduced(communicator: DeviceCommunicatorBase) -> None:
    """The gradient of an all_gather along the last dim: packed, and reduced over the ranks."""
    ranks, rank = communicator.world_size, communicator.rank
    leaf = torch.zeros(2, 5, 4, requires_grad=True)
    everyones = [values([2, 5, 4 * ranks], torch.float32, seed) for seed in range(ranks)]
    output = communicator.all_gather(leaf)
    (gradient,) = torch.autograd.grad(output, leaf, everyones[rank])
    # Integers below 2^8 add up exactly.
    same(gradient, sum(everyones).chunk(ranks, -1)[rank].contiguous())


@pytest.mark.parametrize("name", JOBS)
def test_no_op_reads_a_buffer_before_it_was_filled_or_after_it_was_given_back(ranks: Ranks, name):
    size = 4 if name == "send" else 3
    ranks.run(size, under_poison, *JOBS[name], ways=["messages"])
