"""Calls that fail: every rank hears why, no block is reused early, and the next call works."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
from typing import Any

import memory_worlds as worlds
import pytest
import torch
from memory_worlds import KILLED, ask_all, ask_pair, exchange, in_processes, in_threads, outputs

from fastvideo_comm.errors import (
    ClosedError,
    CollectiveError,
    CommunicationTimeoutError,
    PeerLostError,
)
from fastvideo_comm.memory import engine, flight, host, ledger, line
from fastvideo_comm.memory.host import HostMemory

MODULES = {module.__file__ for module in (engine, flight, host, ledger, line)}


# Copies that fail


def test_an_exception_in_a_copy_is_raised_there_and_named_elsewhere():
    def job(memory: HostMemory) -> None:
        def copy(part: torch.Tensor, number: int, target: int) -> None:
            if memory.rank == 1 and target == 0:
                raise ZeroDivisionError("no copy")
            part.fill_(number)

        for background in (False, True):
            running = memory.start(ask_all(memory, copy=copy), background=background)
            if memory.rank == 1:
                with pytest.raises(ZeroDivisionError, match="no copy"):
                    running.wait()
            elif memory.rank == 0:
                text = "rank 1 gave the call up: ZeroDivisionError: no copy"
                with pytest.raises(CollectiveError, match=text) as caught:
                    running.wait()
                assert caught.value.peers == (1,)
                del caught
            else:  # may have had its part from rank 1 before
                with contextlib.suppress(CollectiveError):
                    running.wait()
            exchange(memory, 1)
            del running
        exchange(memory, 2)
        assert worlds.settled(memory) == 0

    in_processes(3, job)


def test_a_target_that_posts_nothing_is_an_error_of_both():
    def job(memory: HostMemory) -> None:
        ask = ask_all(memory)
        if memory.rank == 0:
            ask.posted = None
            ask.targets = [1]
        with pytest.raises(CollectiveError, match="rank 0 has posted no outputs"):
            memory.start(ask).wait()

    in_processes(2, job)


# Ranks that do not come


def test_a_timeout_names_the_ranks_that_did_not_come_and_is_heard_when_they_do():
    def job(memory: HostMemory) -> None:
        exchange(memory)
        if memory.rank == 2:
            time.sleep(2.5)
            with pytest.raises(CommunicationTimeoutError, match="gave the call up: all waited"):
                memory.start(ask_all(memory)).wait()
        else:
            begin = time.monotonic()
            with pytest.raises(CommunicationTimeoutError, match="rank 2 did not come") as caught:
                memory.start(ask_all(memory), background=memory.rank == 1).wait()
            assert 0.5 < time.monotonic() - begin < 2.5
            assert caught.value.peers == (2,)
            del caught
            time.sleep(1.5)
        exchange(memory, 2)
        assert worlds.settled(memory) == 0

    in_processes(3, job, timeout=1.0)


def test_a_wait_with_a_timeout_of_its_own_ends_the_call_everywhere():
    def job(memory: HostMemory) -> None:
        if memory.rank == 0:
            with pytest.raises(CommunicationTimeoutError, match=r"all waited 0\.2 s: rank 1 did"):
                memory.start(ask_all(memory)).wait(0.2)
        else:
            time.sleep(1)
            with pytest.raises(CommunicationTimeoutError, match=r"rank 0 gave the call up"):
                memory.start(ask_all(memory)).wait()
        exchange(memory, 1)

    in_processes(2, job)


def test_the_time_of_a_call_counts_from_its_start():
    def job(memory: HostMemory) -> None:
        if memory.rank == 0:
            begin = time.monotonic()
            running = memory.start(ask_all(memory))
            time.sleep(0.8)
            with pytest.raises(CommunicationTimeoutError, match="rank 1 did not come"):
                running.wait()
            assert time.monotonic() - begin < 1.8  # from the wait on it would be 2
        else:
            time.sleep(2.4)

    in_processes(2, job, timeout=1.2)


def test_a_flight_in_the_background_times_out_though_nobody_waits():
    def job(memory: HostMemory) -> None:
        if memory.rank == 0:
            running = memory.start(ask_all(memory), background=True)
            deadline = time.monotonic() + 20
            while not running.is_completed() and time.monotonic() < deadline:
                time.sleep(0.01)
            with pytest.raises(CommunicationTimeoutError, match="rank 1 did not come"):
                running.wait()
        else:
            time.sleep(1.2)

    in_processes(2, job, timeout=0.6)


def test_a_condemned_block_is_not_handed_out_until_it_is_settled():
    """Rank 1 copies slowly while rank 0 gives the call up, allocates again and writes."""

    def job(memory: HostMemory) -> None:
        def slow(part: torch.Tensor, number: int, target: int) -> None:
            if target == 0:
                time.sleep(1.5)
            part.fill_(number)

        exchange(memory)
        if memory.rank == 1:
            memory.start(ask_all(memory, 7, copy=slow)).wait()  # it has all that it needs
            exchange(memory, 1)
            return
        ask = ask_all(memory, 7)
        with pytest.raises(CommunicationTimeoutError, match="came and did not finish") as caught:
            memory.start(ask).wait(0.7)
        del caught
        del ask
        condemned = memory.pool.bytes_in_use
        assert condemned > 0
        posted = [memory.allocate([((2, 5), torch.int64)]).tensors[0].fill_(-1) for _ in range(9)]
        time.sleep(1.5)  # rank 1 writes
        assert all((tensor == -1).all() for tensor in posted)
        posted.clear()
        assert memory.pool.bytes_in_use == condemned
        exchange(memory, 1)
        assert worlds.settled(memory) == 0

    in_processes(2, job)


def test_outputs_that_were_dropped_in_the_air_are_not_handed_out():
    """Rank 1 comes late to a call whose outputs rank 0 has dropped at once."""

    def job(memory: HostMemory) -> None:
        if memory.rank == 1:
            time.sleep(1)
            exchange(memory)
            return
        memory.start(ask_all(memory), background=True)
        posted = [memory.allocate([((2, 5), torch.int64)]).tensors[0].fill_(-1) for _ in range(9)]
        time.sleep(2)
        assert all((tensor == -1).all() for tensor in posted)
        posted.clear()
        assert worlds.settled(memory) == 0

    in_processes(2, job)


def test_a_stopped_rank_is_named_within_the_timeout_and_goes_on_later():
    def meanwhile(processes: list[int]) -> None:
        time.sleep(0.7)
        os.kill(processes[1], signal.SIGSTOP)
        time.sleep(4)
        os.kill(processes[1], signal.SIGCONT)

    def job(memory: HostMemory) -> list[str]:
        failures = []
        for call in range(60):  # all ranks make as many calls, so they meet at the last
            begin = time.monotonic()
            try:
                exchange(memory, call)
            except CommunicationTimeoutError as error:
                failures.append(str(error))
                assert memory.rank == 1 or time.monotonic() - begin < 4
            time.sleep(0.03)
        exchange(memory, 99)
        return failures

    results = in_processes(3, job, timeout=1.5, meanwhile=meanwhile)
    for rank in (0, 2):
        assert any("rank 1" in text or "gave the call up" in text for text in results[rank])


# Ranks that are gone


@pytest.mark.parametrize("where", ["before", "in a copy", "after its post"])
def test_a_killed_rank_is_named_at_once_and_at_every_later_call(where):
    def job(memory: HostMemory) -> Any:
        def copy(part: torch.Tensor, number: int, target: int) -> None:
            if memory.rank == 1 and target == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            part.fill_(number)

        held = exchange(memory, 5)
        if memory.rank == 1:
            time.sleep(0.3)
            if where == "in a copy":
                memory.start(ask_all(memory, copy=copy)).wait()
            if where == "after its post":
                memory.start(ask_all(memory))
            os.kill(os.getpid(), signal.SIGKILL)
        begin = time.monotonic()
        with pytest.raises(PeerLostError, match="rank 1 has died") as caught:
            memory.start(ask_all(memory), background=memory.rank == 2).wait()
        seconds = time.monotonic() - begin
        assert caught.value.peers == (1,)
        with pytest.raises(PeerLostError, match="rank 1 has died"):
            memory.start(ask_all(memory)).wait()
        memory.start(ask_pair(memory, 0, 2)).wait()
        assert torch.equal(held, worlds.expected_all(memory, 5))
        return seconds

    first, killed, last = in_processes(3, job)
    assert killed is KILLED
    assert max(first, last) < 1.5


def test_a_rank_that_left_is_named_as_such():
    def job(memory: HostMemory) -> None:
        exchange(memory)
        if memory.rank == 1:
            ask = ask_all(memory)
            memory.close()
            memory.close()
            with pytest.raises(ClosedError, match="'test' was destroyed before the call"):
                memory.start(ask)
            with pytest.raises(ClosedError, match="was destroyed before"):
                memory.allocate([])
            return
        with pytest.raises(PeerLostError, match="rank 1 has left the group"):
            memory.start(ask_all(memory)).wait()

    in_processes(3, job)


def test_what_a_rank_said_before_it_left_is_heard_though_it_left_messages_unread():
    def job(memory: HostMemory) -> None:
        if memory.rank == 0:
            memory.start(ask_all(memory, 3), background=True).wait()
            memory.close()
        else:
            running = memory.start(ask := ask_all(memory, 3))
            memory.start(ask_pair(memory, 1, 0))  # never read by rank 0
            time.sleep(0.5)
            running.wait()
            assert torch.equal(outputs(ask), worlds.expected_all(memory, 3))

    def job_of_both(memory: HostMemory) -> None:
        for _ in range(1):
            job(memory)

    in_processes(2, job_of_both)


def test_closing_fails_what_is_in_the_air_on_all_ranks():
    def job(memory: HostMemory) -> None:
        exchange(memory)
        if memory.rank == 1:
            running = [
                memory.start(ask_pair(memory, 1, 0), background=True),
                memory.start(ask_pair(memory, 2, 1)),
            ]
            threading.Timer(0.3, memory.close).start()
            for one in reversed(running):
                with pytest.raises(ClosedError, match="was destroyed during the call"):
                    one.wait()
        elif memory.rank == 0:
            time.sleep(0.6)
            with pytest.raises(PeerLostError, match=r"rank 1 (has left|closed)"):
                memory.start(ask_pair(memory, 1, 0)).wait()

    before = worlds.num_descriptors()
    in_threads(3, job)
    assert worlds.num_descriptors() == before


def test_closing_waits_for_a_copy_before_it_says_goodbye():
    """The end of a line means that nothing is written any more: rank 0 uses its memory again."""

    def job(memory: HostMemory) -> None:
        def slow(part: torch.Tensor, number: int, target: int) -> None:
            time.sleep(1)
            part.fill_(number)

        exchange(memory)
        ask = ask_all(memory, 1, copy=slow)
        ask.targets = [0] if memory.rank else []
        if memory.rank == 1:
            threading.Timer(0.3, memory.close).start()
            with pytest.raises(ClosedError):
                memory.start(ask).wait()
            return
        with pytest.raises(PeerLostError):
            memory.start(ask).wait()
        del ask
        gc.collect()
        posted = [memory.allocate([((2, 5), torch.int64)]).tensors[0].fill_(-1) for _ in range(9)]
        time.sleep(1.2)
        assert all((tensor == -1).all() for tensor in posted)

    in_processes(2, job)


# Forks


def test_a_forked_child_neither_uses_nor_closes_what_is_its_parents():
    def job(memory: HostMemory) -> None:
        held = exchange(memory, 1)
        running = memory.start(ask_all(memory, 2), background=True)
        child = worlds._fork()
        if not child:
            status = 1
            try:
                with pytest.raises(ClosedError, match="was forked from it and must make its own"):
                    memory.start(ask_all(memory))
                with pytest.raises(ClosedError, match="belongs to process"):
                    memory.allocate([((1,), torch.int8)])
                with pytest.raises(ClosedError, match="belongs to process"):
                    memory.fail_next(b"")
                if not running.is_completed():
                    with pytest.raises(ClosedError, match="belongs to process"):
                        running.wait()
                assert torch.equal(held, worlds.expected_all(memory, 1))
                memory.close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        running.wait()
        for call in range(5):
            exchange(memory, call)

    in_processes(2, job)


def test_a_rank_that_dies_is_seen_though_its_forked_child_lives():
    def job(memory: HostMemory) -> None:
        exchange(memory)
        if memory.rank == 1:
            child = worlds._fork()
            if not child:
                time.sleep(8)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
        begin = time.monotonic()
        with pytest.raises(PeerLostError, match="rank 1 has died"):
            memory.start(ask_all(memory)).wait()
        assert time.monotonic() - begin < 4

    in_processes(2, job)
