"""Ranks on GPUs decide together whether they write into each other's memory."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from device_ranks import Segments, present, twin_kernels
from rank_threads import run_ranks
from ranks import Ranks

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.collective import device_connection
from fastvideo_comm.collective import group as group_module
from fastvideo_comm.collective.group import Group, MemoryMode
from fastvideo_comm.collective.route import MEMORY_VARIABLE, memory_mode
from fastvideo_comm.errors import CollectiveError, CommunicationTimeoutError, MismatchError
from fastvideo_comm.memory import symmetric
from fastvideo_comm.memory.device import DeviceMemory
from fastvideo_comm.memory.shared import Shared

WORLD = 3
NUM_BYTES = 1 << 20
HERE = torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A GPU for each rank, on the CPU; what is put in here is said of rank 1."""
    segments = Segments(WORLD, NUM_BYTES, "cpu")
    of_rank_1: dict[str, Any] = {}
    rendezvous = threading.Barrier(WORLD, timeout=20)

    def here(name: str, otherwise: Any) -> Any:
        return of_rank_1.get(name, otherwise) if dist.get_rank() == 1 else otherwise

    def allocate(num_bytes: int, device: torch.device) -> torch.Tensor:
        error = here("memory", None)
        if error is not None:
            raise error
        return segments.segments[dist.get_rank()]

    def share(group: dist.ProcessGroup, segment: torch.Tensor) -> Shared:
        rendezvous.wait()
        error = here("error", None)
        if error is not None:
            raise error
        return segments.shared(dist.get_rank())

    monkeypatch.setattr(symmetric, "refusal", lambda device: here("refusal", ""))
    monkeypatch.setattr(symmetric, "uuid_of", lambda device: f"GPU {dist.get_rank()}")
    monkeypatch.setattr(symmetric, "unreachable", lambda device, others: here("unreachable", ""))
    monkeypatch.setattr(symmetric, "allocate", allocate)
    monkeypatch.setattr(symmetric, "share", share)
    monkeypatch.setattr(device_connection, "_host", lambda: here("host", "one host"))
    with present(segments):
        yield of_rank_1


def connected(group: dist.ProcessGroup, num_bytes: int = NUM_BYTES) -> str:
    """Connects, and exchanges if that was possible; why it was not."""
    communicator = DeviceCommunicatorBase(group, unique_name="gpus", memory="off")
    own = communicator._runner.group
    memory, refusal = device_connection.connect_device(
        group, own._everyone, HERE, num_bytes, "gpus"
    )
    assert (memory is None) == bool(refusal)
    own.device_memory = memory
    x = torch.arange(24.0).view(1, 2, 3, 4)
    y = communicator.all_to_all_4D(communicator.all_to_all_4D(x), 1, 2)
    assert torch.equal(x, y)
    communicator.destroy()
    return refusal


def test_ranks_that_all_can_are_connected(gpus):
    with twin_kernels() as twins:
        assert run_ranks(WORLD, connected) == [""] * WORLD
        assert twins.num_posts == 2 * WORLD


@pytest.mark.parametrize(
    ("said", "refusal"),
    [
        ({"refusal": "triton is not installed"}, "rank 1: triton is not installed"),
        ({"host": "another"}, "rank 1: it is not on the host of rank 0"),
        ({"unreachable": "no peer access to rank 2"}, "rank 1: no peer access to rank 2"),
        ({"memory": RuntimeError("out of memory")}, "rank 1: RuntimeError: out of memory"),
        ({"error": RuntimeError("no descriptor")}, "rank 1: RuntimeError: no descriptor"),
        ({"error": ValueError("\u00fc" * 5000)}, "rank 1: ValueError: " + "\u00fc" * 488),
    ],
)
def test_one_that_cannot_is_named_on_all_ranks(gpus, said, refusal):
    gpus.update(said)
    with twin_kernels() as twins:
        assert run_ranks(WORLD, connected) == [refusal] * WORLD
        assert twins.num_posts == 0


def test_each_rank_looks_at_the_gpus_of_the_others(gpus, monkeypatch):
    """Its own is not one that it shares with another rank."""
    seen: dict[int, dict[int, str]] = {}

    def unreachable(device: torch.device, others: dict[int, str]) -> str:
        seen[dist.get_rank()] = others
        return ""

    monkeypatch.setattr(symmetric, "unreachable", unreachable)
    with twin_kernels():
        assert run_ranks(WORLD, connected) == [""] * WORLD
    for rank in range(WORLD):
        assert seen[rank] == {other: f"GPU {other}" for other in range(WORLD) if other != rank}


def test_a_quarter_of_the_segment_is_staging_and_errors_have_the_groups_name_and_time(gpus):
    def job(group: dist.ProcessGroup) -> None:
        own = Group(group, "gpus")
        memory, _ = device_connection.connect_device(group, own._everyone, HERE, NUM_BYTES, "sp")
        assert memory is not None
        assert memory.staging_bytes == NUM_BYTES // 4
        assert (memory._watch._name, memory._watch._timeout) == ("sp", 7.5)
        memory.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_connection, "group_timeout", lambda group: 7.5)
        run_ranks(WORLD, job)


FACTS = device_connection.Candidate("", "one", "GPU 0", "torch 2.15.0, triton 3.9.0", NUM_BYTES)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({}, ""),
        ({"gpu": "GPU 7"}, ""),
        ({"host": "two"}, "rank 2: it is not on the host of rank 0"),
        (
            {"versions": "torch 2.14.0, triton 3.9.0"},
            "rank 2: it has torch 2.14.0, triton 3.9.0, and rank 0 has torch 2.15.0, triton 3.9.0",
        ),
        (
            {"refusal": "torch sees no GPU", "host": "two", "num_bytes": 1},
            "rank 2: torch sees no GPU",
        ),
    ],
)
def test_what_a_rank_has_and_the_first_has_not_is_the_reason(other, reason):
    candidates = [FACTS, FACTS, FACTS._replace(**other)]
    assert device_connection.difference(candidates) == reason


def test_a_rank_says_which_versions_it_has(gpus, monkeypatch):
    """Kernels of other versions may put their words elsewhere."""
    versions = {"triton": "3.9.0", "fastvideo-comm": "1.2.0"}

    def version(package: str) -> str:
        if package not in versions:
            raise device_connection.importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(device_connection.importlib.metadata, "version", version)
    monkeypatch.setattr(torch, "__version__", "2.15.0")
    monkeypatch.setattr(symmetric, "refusal", lambda device: "")
    monkeypatch.setattr(symmetric, "uuid_of", lambda device: "GPU 5")
    monkeypatch.setattr(device_connection, "_host", lambda: "one")
    said = device_connection.own_facts(HERE, NUM_BYTES)
    expected = "torch 2.15.0, triton 3.9.0, fastvideo-comm 1.2.0"
    assert said == ("", "one", "GPU 5", expected, NUM_BYTES)
    del versions["fastvideo-comm"]
    said = device_connection.own_facts(HERE, NUM_BYTES)
    assert said.versions == "torch 2.15.0, triton 3.9.0, fastvideo-comm from a folder"


def test_different_sizes_are_named_on_all_ranks(gpus):
    refusals = run_ranks(WORLD, lambda group: connected(group, NUM_BYTES << (group.rank() == 2)))
    text = f"rank 2: memory_bytes is {2 * NUM_BYTES} there and {NUM_BYTES} on rank 0"
    assert refusals == [text] * WORLD


def test_a_rank_without_memory_keeps_nobody_waiting(gpus):
    """The others do not go to the rendezvous, where torch would wait for it for minutes."""
    gpus["memory"] = RuntimeError("out of memory")
    begin = time.monotonic()
    run_ranks(WORLD, connected)
    assert time.monotonic() - begin < 10


def test_a_first_call_in_inference_mode_leaves_waits_that_end(gpus):
    """The thread of the watch writes to what was made there."""

    def job(group: dist.ProcessGroup) -> None:
        own = Group(group, "gpus")
        with torch.inference_mode():
            memory, _ = device_connection.connect_device(
                group, own._everyone, HERE, NUM_BYTES, "gpus"
            )
        assert memory is not None
        memory._words.host[2] = 1  # as where a kernel waits for rank 1
        deadline = time.monotonic() + 20
        while not memory._words.host[0]:
            assert time.monotonic() < deadline, "the waits were not ended"
            time.sleep(0.01)
        with pytest.raises(CommunicationTimeoutError, match="rank 1 did not come"):
            memory.check()
        memory.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_connection, "group_timeout", lambda group: 0.2)
        run_ranks(WORLD, job)


def test_the_words_of_the_host_are_on_the_cpu_whatever_the_default_device_is():
    with torch.device("meta"):
        shared = Segments(1, NUM_BYTES, "cpu").shared(0)
        memory = DeviceMemory(0, shared, staging_bytes=64, timeout=20.0, name="gpus")
    assert memory._words.host.is_cpu
    memory.close()


def test_numpy_is_needed(monkeypatch):
    """torch takes the memory of an output as an array interface, which it reads with numpy."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "numpy" else find_spec(name)
    )
    assert symmetric.refusal(torch.device("cuda", 0)) == "numpy is not installed"


@pytest.mark.parametrize("offset", [0, 64])
def test_addresses_must_be_those_of_the_segments(monkeypatch, offset):
    """Where torch adds the offset has changed before."""
    segment = torch.zeros(64, dtype=torch.uint8)
    own = segment.data_ptr()
    handle = SimpleNamespace(buffer_ptrs=[4096, own - 64], offset=offset)
    fake = SimpleNamespace(rendezvous=lambda tensor, name: handle)
    monkeypatch.setattr("torch._C._distributed_c10d._SymmetricMemory", fake)
    group: Any = SimpleNamespace(group_name="0", rank=lambda: 1)
    if offset:
        assert symmetric.share(group, segment).addresses == [4096 + 64, own]
    else:
        with pytest.raises(RuntimeError, match=rf"offset 0 for a segment at {own} of rank 1"):
            symmetric.share(group, segment)


def test_the_first_call_may_not_be_captured(monkeypatch):
    monkeypatch.setattr(group_module, "is_capturing", lambda device: True)

    def job(group: dist.ProcessGroup) -> None:
        own = Group(group, "gpus", memory="on", device=torch.device("cuda", 0))
        with pytest.raises(CollectiveError, match=r"must come before a capture: call `warmup`"):
            own.connects_memory()

    run_ranks(2, job)


@pytest.mark.parametrize(("given", "index"), [("cuda", 3), ("cuda:1", 1)])
def test_a_device_without_an_index_is_the_current_one(monkeypatch, given, index):
    """torch asks for the device of a segment with its index."""
    seen = []

    def connect(group: Any, everyone: Any, device: torch.device, *_: Any) -> tuple[None, str]:
        seen.append((device, *_))
        return None, ""

    monkeypatch.setattr(group_module, "is_capturing", lambda device: False)
    monkeypatch.setattr(group_module, "connect_device", connect)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)

    def job(group: dist.ProcessGroup) -> None:
        own = Group(group, "sp", memory="on", device=torch.device(given), memory_bytes=1 << 21)
        assert not own.connects_memory()
        assert not own.connects_memory(), "it is decided once"

    run_ranks(2, job)
    assert seen == [(torch.device("cuda", index), 1 << 21, "sp")] * 2


def test_on_is_an_error_on_all_ranks_where_there_is_no_gpu():
    """With the first rank's reason, in every call."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")

    def job(group: dist.ProcessGroup) -> None:
        own = Group(group, "gpus", memory="on", device=torch.device("cuda", 0))
        for _ in range(2):
            with pytest.raises(
                CollectiveError,
                match=r"connecting memory on rank . of 3 in group 'gpus' failed: rank 0: torch "
                r"sees no GPU",
            ):
                own.connects_memory()
        assert own.memory_stats().refusal == "rank 0: torch sees no GPU"

    run_ranks(WORLD, job)


def wanted_by_one(communicator: DeviceCommunicatorBase) -> None:
    mode: MemoryMode = "on" if communicator.rank == 1 else "auto"
    other = DeviceCommunicatorBase(communicator.cpu_group, torch.device("cuda"), memory=mode)
    own = other._runner.group
    with pytest.raises(MismatchError, match="memory=on"):
        own.before("all_gather", torch.ones(2), (0,))
    other.destroy()


def test_a_rank_that_wants_memory_alone_is_named_by_the_first_call(ranks: Ranks):
    """The others would not come to the decision, so this is noticed before."""
    ranks.run(WORLD, wanted_by_one, ways=["messages"])


def test_auto_means_off_on_gpus(monkeypatch):
    gpu = torch.device("cuda")

    def job(group: dist.ProcessGroup) -> None:
        for given in ("auto", "off", None):
            assert memory_mode(given, group, gpu) is None
        assert memory_mode("on", group, gpu) == "on"
        with pytest.raises(ValueError, match="not on CPUs or CUDA devices, got 'on' for xpu"):
            memory_mode("on", group, torch.device("xpu"))

    run_ranks(1, job)
    monkeypatch.setenv(MEMORY_VARIABLE, "on")
    run_ranks(1, lambda group: memory_mode(None, group, gpu) == "on" or pytest.fail("not on"))


@pytest.mark.parametrize("num_bytes", [1 << 19, (1 << 20) + 1])
def test_memory_bytes_are_checked(num_bytes):
    def job(group: dist.ProcessGroup) -> None:
        with pytest.raises(ValueError, match="memory_bytes must be a multiple of 4096 from 1 MiB"):
            DeviceCommunicatorBase(group, memory_bytes=num_bytes)
        with pytest.raises(TypeError, match="memory_bytes must be an int, got float"):
            DeviceCommunicatorBase(group, memory_bytes=1e9)

    run_ranks(1, job)
