"""What keeps a rank's GPU from sharing memory is named before anybody waits for the rank."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastvideo_comm.memory import symmetric
from fastvideo_comm.memory.device import DeviceFlight
from fastvideo_comm.memory.shared import Region, Shared

GPU = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine whose first GPU can; a test changes what it says."""
    said = SimpleNamespace(
        hip=None, available=True, lacks="", capability=(7, 0), backend=None, uuids=["a", "b", "c"]
    )
    said.peers = {(one, other) for one in range(3) for other in range(3)}
    find_spec = importlib.util.find_spec
    fake = SimpleNamespace(get_backend=lambda device: said.backend)
    for where, name, value in (
        (torch.cuda, "is_available", lambda: said.available),
        (torch.cuda, "get_device_capability", lambda device: said.capability),
        (torch.cuda, "device_count", lambda: len(said.uuids)),
        (
            *(torch.cuda, "get_device_properties"),
            lambda device: SimpleNamespace(uuid=said.uuids[device.index]),
        ),
        (torch.cuda, "can_device_access_peer", lambda one, other: (one, other) in said.peers),
        (
            *(importlib.util, "find_spec"),
            lambda name: None if name == said.lacks else find_spec(name),
        ),
    ):
        monkeypatch.setattr(where, name, value)
    monkeypatch.setattr("torch._C._distributed_c10d._SymmetricMemory", fake)
    monkeypatch.delenv(symmetric.OVERLAP_VARIABLE, raising=False)
    return said


def refusal_of(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, **said: Any) -> str:
    vars(machine).update(said)
    monkeypatch.setattr(torch.version, "hip", machine.hip)
    return symmetric.refusal(GPU)


@pytest.mark.parametrize(
    "said", [{}, {"capability": (7, 5)}, {"capability": (9, 0)}, {"backend": "CUDA"}]
)
def test_a_gpu_from_volta_on_can(machine, monkeypatch, said):
    assert refusal_of(machine, monkeypatch, **said) == ""


@pytest.mark.parametrize(
    ("said", "refusal"),
    [
        ({"hip": "6.2"}, "torch is built for ROCm, where this was never tried"),
        ({"available": False}, "torch sees no GPU"),
        ({"lacks": "triton"}, "triton is not installed"),
        ({"lacks": "numpy"}, "numpy is not installed"),
        (
            {"capability": (6, 1)},
            r"cuda:0 has compute capability (6, 1), and (7, 0) is needed",
        ),
        (
            {"backend": "NVSHMEM"},
            "torch symmetric memory was set to the backend NVSHMEM, and CUDA is needed",
        ),
    ],
)
def test_what_a_gpu_lacks_is_named(machine, monkeypatch, said, refusal):
    assert refusal_of(machine, monkeypatch, **said) == refusal


def test_gpus_that_reach_each_other_can(machine):
    assert symmetric.unreachable(GPU, {1: "b", 2: "c"}) == ""
    assert symmetric.unreachable(torch.device("cuda", 2), {0: "a", 1: "b"}) == ""


def test_a_gpu_without_peer_access_is_named(machine):
    machine.peers.remove((0, 2))
    assert symmetric.unreachable(GPU, {1: "b", 3: "c"}) == (
        "its GPU has no peer access to the GPU of rank 3"
    )
    assert symmetric.unreachable(torch.device("cuda", 2), {0: "a"}) == "", "the other way it has"


def test_a_gpu_that_this_process_does_not_see_is_left_to_the_rendezvous(machine):
    """CUDA_VISIBLE_DEVICES may show each process its own GPU alone."""
    machine.uuids = ["a"]
    assert symmetric.unreachable(GPU, {1: "b"}) == ""


@pytest.mark.parametrize(
    ("variable", "refusal"),
    [(None, "it has the same GPU as rank 2"), ("0", "it has the same GPU as rank 2"), ("1", "")],
)
def test_one_gpu_for_two_ranks_is_refused_unless_it_is_asked_for(
    machine, monkeypatch, variable, refusal
):
    machine.peers.clear()
    if variable is not None:
        monkeypatch.setenv(symmetric.OVERLAP_VARIABLE, variable)
    assert symmetric.unreachable(GPU, {2: "a"}) == refusal


@pytest.mark.parametrize("pointers", [[0, None], [None, 4096]])
def test_a_segment_of_another_rank_that_was_not_opened_is_an_error(monkeypatch, pointers):
    segment = torch.zeros(64, dtype=torch.uint8)
    rank = pointers.index(None)
    pointers[rank] = segment.data_ptr()
    handle = SimpleNamespace(buffer_ptrs=pointers, offset=0)
    fake = SimpleNamespace(rendezvous=lambda tensor, name: handle)
    monkeypatch.setattr("torch._C._distributed_c10d._SymmetricMemory", fake)
    group: Any = SimpleNamespace(group_name="0", rank=lambda: rank)
    if 0 in pointers:
        with pytest.raises(RuntimeError, match=r"gave the addresses \[0, "):
            symmetric.share(group, segment)
    else:
        shared = symmetric.share(group, segment)
        assert shared.addresses == pointers
        assert shared.segment is segment


def test_a_segment_begins_with_zeros(monkeypatch):
    """The words of the ranks are there, and are counted up."""
    given = torch.full((256,), 7, dtype=torch.uint8)
    order: list[object] = []

    def empty_strided_p2p(*arguments: object) -> torch.Tensor:
        order.append(arguments)
        return given

    fake = SimpleNamespace(empty_strided_p2p=empty_strided_p2p)
    monkeypatch.setattr("torch._C._distributed_c10d._SymmetricMemory", fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append(given.sum().item()))
    assert symmetric.allocate(256, GPU) is given
    assert order == [((256,), (1,), torch.uint8, GPU), 0], "zero before another rank writes"


def test_a_block_is_described_by_its_own_bytes():
    segment = torch.zeros(1024, dtype=torch.uint8)
    region = Region(Shared(segment, [segment.data_ptr()]), 256)
    assert (region.start, region.num_bytes) == (256, 768)
    described = region.view[64:192].__cuda_array_interface__
    assert described == {
        "data": (segment.data_ptr() + 256 + 64, False),
        "shape": (128,),
        "typestr": "|u1",
        "version": 2,
    }


def test_a_region_is_handed_out_once_and_whole():
    region = Region(Shared(torch.zeros(1024, dtype=torch.uint8), [0]), 256)
    with pytest.raises(OSError, match="the segment has no room"):
        region.take(769)
    assert region.take(768) is region
    with pytest.raises(OSError, match="the segment has no room"):
        region.take(64)


@pytest.mark.parametrize(
    ("is_capturing", "event", "is_completed"),
    [(False, None, True), (False, False, False), (False, True, True), (True, False, True)],
)
def test_a_call_is_completed_when_the_device_has_reached_its_end(is_capturing, event, is_completed):
    """An event of a captured stream must not be asked."""
    memory: Any = SimpleNamespace(is_capturing=lambda: is_capturing)
    flight = DeviceFlight(memory, [], [])
    if event is not None:
        flight.launched(SimpleNamespace(query=lambda: event), [])
    assert flight.is_completed() is is_completed
