"""Memory that the system refuses: a named error on this rank, which the others hear."""

from __future__ import annotations

import resource

import memory_worlds as worlds
import pytest
import torch
from memory_worlds import in_processes

from fastvideo_comm.errors import CollectiveError
from fastvideo_comm.memory.host import HostMemory


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_FSIZE"])
def test_memory_that_the_system_refuses_is_an_error_that_names_bytes_and_limit(limit):
    def job(memory: HostMemory) -> None:
        worlds.exchange(memory)
        if memory.rank == 1:
            used = 1 << 20
            if limit == "RLIMIT_AS":
                with open("/proc/self/statm") as file:
                    used = int(file.read().split()[0]) * 4096
            number = getattr(resource, limit)
            bound = used + (100 << 20)
            resource.setrlimit(number, (bound, resource.getrlimit(number)[1]))
            with pytest.raises(MemoryError, match=f"bytes of shared memory.*{limit} is {bound}"):
                memory.allocate([((600 << 20,), torch.uint8)])
            memory.fail_next(b"no memory", failure="memory")
        else:
            with pytest.raises(CollectiveError, match="rank 1 gave the call up: no memory"):
                memory.start(worlds.ask_all(memory)).wait()
        worlds.exchange(memory, 1)

    in_processes(2, job)


def test_a_rank_that_cannot_map_the_memory_of_another_says_so_to_both():
    def job(memory: HostMemory) -> None:
        if memory.rank == 1:
            with open("/proc/self/statm") as file:
                used = int(file.read().split()[0]) * 4096
            old = resource.getrlimit(resource.RLIMIT_AS)
            memory.allocate([((8,), torch.uint8)])
            resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20), old[1]))
        with pytest.raises(CollectiveError, match="rank 1 cannot map segment 0 of rank 0"):
            memory.start(worlds.ask_all(memory)).wait()
        if memory.rank == 1:
            resource.setrlimit(resource.RLIMIT_AS, old)
        worlds.exchange(memory, 1)

    in_processes(2, job)
