"""Shared memory that a rank cannot have, ranks that disagree, are interrupted or die."""

from __future__ import annotations

import os
from pathlib import Path

import memory_ranks
import pytest
import torch
from ranks import Ranks
from test_collectives import same, values
from test_shared_memory import fresh, from_bytes, mappings

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.collective import exchange as exchange_module
from fastvideo_comm.collective import shared_memory
from fastvideo_comm.errors import CollectiveError


def refuse(*_: object) -> int:
    raise OSError("refused")


def where_one_cannot(communicator: DeviceCommunicatorBase, how: str) -> None:
    ranks, rank = communicator.world_size, communicator.rank
    whole = values([1, 8 * ranks, ranks, 4], torch.float32, 1)
    before, files = mappings(), len(os.listdir("/proc/self/fd"))
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1 and how == "off":
            patch.setenv(shared_memory.SHARED_MEMORY_VARIABLE, "off")
        if rank == 1 and how == "another host":
            patch.setattr(shared_memory.os, "readlink", lambda path: f"{path} is a socket")
        if rank == 1 and how == "another system":
            patch.delattr(shared_memory.os, "memfd_create")
        if rank == 1 and how == "no descriptor left":
            patch.setattr(shared_memory.os, "memfd_create", refuse)
        if rank == 1 and how == "no room":
            patch.setattr(shared_memory.os, "ftruncate", refuse)
        with fresh(communicator) as other, from_bytes(1):
            for _ in range(2):
                same(other.all_to_all_4D(whole.chunk(ranks, 1)[rank]), whole.chunk(ranks, 2)[rank])
            assert mappings() == before
            assert len(os.listdir("/proc/self/fd")) == files


@pytest.mark.parametrize(
    "how", ["off", "another host", "another system", "no descriptor left", "no room"]
)
def test_where_one_rank_cannot_share_all_use_the_group(ranks: Ranks, how):
    ranks.run(3, where_one_cannot, how)


def other_sizes(communicator: DeviceCommunicatorBase, first: list[int]) -> str:
    """Ranks that send different amounts, which only wrong programs do."""
    group, rank = communicator.cpu_group, communicator.rank
    other = DeviceCommunicatorBase(group, unique_name="shared", validate="off")
    with from_bytes(1):
        if first:
            other.all_to_all_4D(torch.rand(1, 64, 2, 64))
        try:
            other.all_to_all_4D(torch.rand(1, (first or [1 << 12, 1 << 14])[rank], 2, 64))
        except CollectiveError as error:
            return str(error)
        finally:
            other.destroy()
    return "nothing"


# Both ranks need more memory than before; neither; one of them.
@pytest.mark.parametrize("first", [[], [3, 5], [3, 1 << 14], [1 << 14, 3]])
def test_other_sizes_on_another_rank_are_an_error_on_both(ranks: Ranks, first):
    for text in ranks.run(2, other_sizes, first):
        assert "sharing memory on rank" in text
        assert "'shared'" in text
        sizes = " ".join(str(512 * size) for size in (first or [1 << 12, 1 << 14]))
        assert f"all ranks must send as much, got {sizes.replace(' ', ', ')} bytes" in text


def interrupted(communicator: DeviceCommunicatorBase) -> None:
    """One rank is interrupted before it has told the others anything, and calls again."""
    ranks, rank = communicator.world_size, communicator.rank
    whole = values([1, 8 * ranks, ranks, 4], torch.float32, 1)
    mine = whole.chunk(ranks, 1)[rank]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    other = DeviceCommunicatorBase(communicator.cpu_group, validate="off")
    with from_bytes(1):
        other.all_to_all_4D(mine)
        for _ in range(3):
            if rank == 1:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(exchange_module, "_copy", interrupt)
                    with pytest.raises(KeyboardInterrupt):
                        other.all_to_all_4D(mine)
            same(other.all_to_all_4D(mine), whole.chunk(ranks, 2)[rank])
            same(other.all_gather(mine, 1), whole)
    other.destroy()


def test_a_rank_that_was_interrupted_may_call_again(ranks: Ranks):
    ranks.run(3, interrupted)


def test_a_killed_rank_is_an_error_on_the_other_and_no_wait():
    text, seconds = memory_ranks.killed_between_exchanges()
    assert "sharing memory on rank 0 of 2" in text
    assert seconds < 10  # half the group's timeout


def test_memory_that_was_not_offered_is_not_opened(tmp_path: Path):
    decoy = tmp_path / "fastvideo_comm-0000000000000007"
    decoy.write_bytes(b"private")
    with decoy.open() as file, pytest.raises(OSError, match="not the memory that was offered"):
        shared_memory._open(os.getpid(), file.fileno(), 7, num_bytes=7)
    with pytest.raises(FileNotFoundError):
        shared_memory._open(os.getpid(), 1 << 20, 7, num_bytes=7)
    with pytest.raises(OSError, match="not the memory that was offered"):
        shared_memory._open(os.getpid(), -1, 7, num_bytes=7)
    assert decoy.read_bytes() == b"private"
