"""Memory that one rank cannot have or does not want: all ranks hear it, and why."""

from __future__ import annotations

import resource

import mortal_ranks
import pytest
import torch
from memory_ranks import exchange, exchanged, fresh, num_descriptors, num_mappings
from ranks import Ranks

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.errors import (
    CollectiveError,
)

CULPRIT = 1


def short_of_memory(communicator: DeviceCommunicatorBase) -> list[str]:
    """The system refuses memory to one rank; in collectives and in a recv."""
    communicator.gather(torch.ones(1), 0, 0)  # connects
    if communicator.rank == CULPRIT:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    held = exchange(communicator, 0)
    large = torch.rand(1, 512, communicator.world_size, 1024)
    texts = []
    for call in (
        lambda: communicator.all_to_all_4D(large),
        lambda: communicator.all_reduce(large),
        lambda: communicator.all_to_all_4D(large, async_op=True).wait(),
    ):
        kind = MemoryError if communicator.rank == CULPRIT else CollectiveError
        with pytest.raises(kind, match="RLIMIT_FSIZE is 1048576 bytes") as error:
            call()
        texts.append(str(error.value))
    if communicator.rank == 0:
        with pytest.raises(CollectiveError, match="RLIMIT_FSIZE is 1048576 bytes"):
            communicator.send(large, CULPRIT)
        communicator.send(torch.ones(3), CULPRIT)
    elif communicator.rank == CULPRIT:
        with pytest.raises(MemoryError, match="RLIMIT_FSIZE is 1048576 bytes"):
            communicator.recv(large.shape, large.dtype, 0)
        assert communicator.recv((3,), torch.float32, 0).sum() == 3
    exchange(communicator, 1)
    assert torch.equal(held, exchanged(communicator, 0))
    return texts


def test_memory_that_one_rank_cannot_have_is_an_error_on_all_and_no_end():
    for rank, texts in enumerate(mortal_ranks.run(3, short_of_memory)):
        for text in texts:
            assert f"on rank {rank} of 3 in group 'mortal'" in text


def refuse(*_: object) -> int:
    raise OSError("refused")


def where_one_cannot(communicator: DeviceCommunicatorBase, how: str) -> str:
    """All ranks use messages; nothing is left of the try."""
    before, files = num_mappings(), num_descriptors()
    with pytest.MonkeyPatch.context() as patch:
        argument = None
        if communicator.rank == CULPRIT:
            if how == "variable":
                patch.setenv("FASTVIDEO_COMM_MEMORY", "off")
            elif how == "argument":
                argument = "off"
            elif how == "memfd":
                patch.setattr("fastvideo_comm.memory.memfd.create", refuse)
            elif how == "socket":
                patch.setattr("fastvideo_comm.memory.introduction._connect", refuse)
        with fresh(communicator, argument) as other:
            stats = other.memory_stats()
            assert (stats.segments, stats.refusal) == (0, "")
            for call in range(3):
                exchange(other, call)
            if other.rank == 0:
                other.send(torch.ones(2), 2)
            elif other.rank == 2:
                assert other.recv((2,), torch.float32, 0).sum() == 2
            stats = other.memory_stats()
            assert (stats.bytes_in_use, stats.high_water_bytes, stats.segments) == (0, 0, 0)
    assert num_mappings() == before
    assert num_descriptors() == files
    return stats.refusal


REASONS = {
    "variable": "rank 1: it is switched off there",
    "argument": "rank 1: it is switched off there",
    "memfd": "rank 1: it cannot share memory: refused",
    "socket": "rank 1: it cannot reach rank 0: refused",
}


@pytest.mark.parametrize("how", REASONS)
def test_where_one_rank_cannot_all_use_messages_and_say_why(ranks: Ranks, how):
    assert ranks.run(3, where_one_cannot, how, ways=["memory"]) == [REASONS[how]] * 3


def where_one_insists(communicator: DeviceCommunicatorBase, who: str) -> list[str]:
    """Errors of two calls."""
    texts = []
    with pytest.MonkeyPatch.context() as patch:
        argument = "on" if who == "all" or communicator.rank == 0 else "auto"
        if communicator.rank == CULPRIT:
            if who == "all":
                patch.setattr("fastvideo_comm.memory.memfd.create", refuse)
            else:
                argument = "off"
        with fresh(communicator, argument) as other:
            for call in range(2):
                with pytest.raises(CollectiveError) as error:
                    exchange(other, call)
                texts.append(str(error.value))
    return texts


@pytest.mark.parametrize("who", ["all", "one"])
def test_memory_on_where_one_cannot_is_an_error_on_all_that_says_why(ranks: Ranks, who):
    reason = REASONS["memfd" if who == "all" else "argument"]
    for rank, texts in enumerate(ranks.run(3, where_one_insists, who, ways=["memory"])):
        for text in texts:
            assert f"on rank {rank} of 3 in group 'fresh' failed: {reason}" in text
