"""What ranks on GPUs refuse, resolve and go on after; ranks as threads, and the kernels' twins."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import device_ranks
import pytest
import torch
import torch.distributed as dist
from device_ranks import Segments, Twins, present, twin_kernels
from rank_threads import run_ranks
from test_device import by_messages, integers
from torch import Tensor

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.collective.group import Group
from fastvideo_comm.memory.device import DeviceMemory

Call = Callable[[DeviceCommunicatorBase, Tensor], Any]
BY_MEMORY: dict[str, Call] = {
    "all_to_all_4D": lambda c, x: c.all_to_all_4D(x),
    "all_gather": lambda c, x: c.all_gather(x, 1),
    "reduce_scatter": lambda c, x: c.reduce_scatter(x, 2),
    "gather": lambda c, x: c.gather(x, 1, 2),
}


@pytest.fixture
def twins() -> Iterator[Twins]:
    with twin_kernels() as twins:
        yield twins


@contextlib.contextmanager
def memory_alone(num_bytes: int = 1 << 12, staging_bytes: int = 1 << 10) -> Iterator[DeviceMemory]:
    """The memory of the only rank of a group."""
    segments = Segments(1, num_bytes, "cpu")
    with present(segments):
        memory = DeviceMemory(
            *(0, segments.shared(0)), staging_bytes=staging_bytes, timeout=20.0, name="gpus"
        )
        yield memory
        memory.close()


def start(memory: DeviceMemory, x: Tensor) -> Any:
    """A call in which nobody is given anything."""
    return memory.start(
        *("nothing", [x], lambda: b"nothing", lambda _: [(x.shape, x.dtype)]),
        *(lambda *_: [], []),
        async_op=False,
    )


@pytest.mark.parametrize("op", BY_MEMORY)
@pytest.mark.parametrize("lazily", ["conjugated", "negated"])
def test_every_op_resolves_what_is_lazy(twins, op, lazily):
    """The kernels copy bytes."""

    def job(communicator: DeviceCommunicatorBase) -> None:
        x = torch.complex(*(integers(communicator, i, 1, 2, 4, 3) for i in range(2)))
        lazy = x.conj() if lazily == "conjugated" else x.conj().imag
        call = BY_MEMORY[op]
        expected = by_messages(
            communicator, lambda: call(communicator, lazy.resolve_conj().resolve_neg())
        )
        output = call(communicator, lazy)
        assert (output is None) == (expected is None)
        if expected is not None:
            assert torch.equal(output, expected)

    device_ranks.run(2, job)
    assert twins.num_posts == 2


class Comparison:
    """A comparison of calls, of which the next one is due or not."""

    def __init__(self, *, is_due: bool) -> None:
        self.is_due = is_due

    def compares_next(self) -> bool:
        return self.is_due

    def failed(self, op: str, error: Exception) -> None:
        self.is_due = not self.is_due  # it is counted


@pytest.mark.parametrize(
    ("op", "is_due", "gives_up"),
    [
        *[(op, False, True) for op in BY_MEMORY],
        *[(op, True, False) for op in BY_MEMORY],
        ("all_reduce", False, False),
        ("slice", False, False),
    ],
)
def test_bad_arguments_end_the_memory_only_where_the_others_would_wait(op, is_due, gives_up):
    """A comparison tells the others, who then launch nothing; NCCL's ops do not wait by memory."""
    told: list[str] = []
    comparison: Any = Comparison(is_due=is_due)
    memory: Any = SimpleNamespace(give_up=told.append, close=lambda: None)

    def job(group: dist.ProcessGroup) -> None:
        own = Group(group, "gpus", comparison)
        own.device_memory = memory
        own.failed(op, TypeError("input_ must be a tensor"))

    run_ranks(1, job)
    assert told == ["TypeError: input_ must be a tensor"] * gives_up


def test_a_rank_that_gives_a_call_up_while_a_graph_is_captured_leaves_nothing_in_it(
    twins, monkeypatch
):
    """Every replay would fail the others' calls."""
    with memory_alone() as memory:
        with monkeypatch.context() as patch:
            patch.setattr(DeviceMemory, "is_capturing", lambda memory: True)
            memory.give_up("bad arguments")
        assert twins.num_posts == 0
        memory.check()


def test_a_tensor_on_another_device_is_refused_before_anything_is_launched(twins):
    with memory_alone() as memory:
        with pytest.raises(ValueError, match="must be on cpu, where the first call was, got meta"):
            start(memory, torch.empty(2, device="meta"))
        assert twins.num_posts == 0
        assert start(memory, torch.empty(2)).outputs[0].is_cpu


def test_outputs_that_neither_the_pool_nor_the_staging_holds_are_refused(twins):
    with memory_alone(num_bytes=64 + 128, staging_bytes=128) as memory:
        for length in (8, 16):
            assert start(memory, torch.arange(length)).outputs[0].shape == (length,)
        with pytest.raises(ValueError, match=r"must fit into 128 bytes, got \[136\]"):
            start(memory, torch.arange(17))
        assert (twins.num_posts, memory.num_staged) == (2, 2)


@pytest.mark.parametrize("num_bytes", [64 + 127, 64 + 128])
def test_a_segment_has_room_for_the_words_and_the_staging(num_bytes):
    if num_bytes == 64 + 128:
        with memory_alone(num_bytes, staging_bytes=100) as memory:
            assert memory.staging_bytes == 128
    else:
        error = pytest.raises(ValueError, match="must have 192 bytes for words and staging, got 19")
        with error, memory_alone(num_bytes, staging_bytes=100):
            pass
