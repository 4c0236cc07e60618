"""Ranks that do not ask for the same: all of them hear it, and the next call works."""

from __future__ import annotations

import time

import memory_worlds as worlds
import pytest
import torch
from memory_worlds import ask_all, ask_pair, exchange, in_processes, in_threads

from fastvideo_comm.errors import CollectiveError
from fastvideo_comm.memory import engine, flight, host, ledger, line
from fastvideo_comm.memory.host import Flight, HostMemory, Mismatch

MODULES = {module.__file__ for module in (engine, flight, host, ledger, line)}


@pytest.mark.parametrize("run", [in_processes, in_threads])
@pytest.mark.parametrize("at", [0, 999])
def test_a_mismatch_is_found_by_all_with_what_each_asked_and_the_next_call_works(run, at):
    def job(memory: HostMemory) -> float:
        for call in range(at):
            exchange(memory, call)
        question = b"other" if memory.rank == 1 else b"same"
        held = exchange(memory, at)
        begin = time.monotonic()
        ask = ask_all(memory, question=question)
        with pytest.raises(Mismatch, match=r"ranks \[0, 1, 2\] did not ask") as caught:
            memory.start(ask, background=memory.rank == 2).wait()
        seconds = time.monotonic() - begin
        assert caught.value.details == {
            rank: b"rank %d asked %b" % (rank, b"other" if rank == 1 else b"same")
            for rank in range(3)
        }
        assert torch.equal(held, worlds.expected_all(memory, at))
        for call in range(3):
            exchange(memory, call)
        del ask, held, caught
        assert worlds.settled(memory) == 0
        return seconds

    assert max(run(3, job)) < 2


def test_posts_of_one_size_that_ask_for_different_things_do_not_match():
    def job(memory: HostMemory) -> None:
        strided = memory.rank == 1  # the same bytes, in other places
        with pytest.raises(Mismatch):
            memory.start(ask_all(memory, size=2, strided=strided)).wait()

    in_processes(2, job)


def test_a_mismatch_of_a_pair_is_found_by_both():
    def job(memory: HostMemory) -> None:
        if memory.rank < 2:
            size = 3 + memory.rank
            with pytest.raises(Mismatch):
                memory.start(ask_pair(memory, 0, 1, size=size)).wait()
            memory.start(ask_pair(memory, 1, 0)).wait()
        exchange(memory)

    in_processes(3, job)


def test_details_of_any_length_arrive_whole():
    def job(memory: HostMemory) -> None:
        ask = ask_all(memory, question=b"%d" % memory.rank)
        ask.detail = lambda: bytes([memory.rank]) * 300_000
        with pytest.raises(Mismatch) as caught:
            memory.start(ask).wait()
        assert caught.value.details == {rank: bytes([rank]) * 300_000 for rank in range(2)}
        exchange(memory)

    in_processes(2, job)


def test_a_detail_that_cannot_be_made_is_an_error_in_its_place():
    def job(memory: HostMemory) -> None:
        ask = ask_all(memory, question=b"%d" % memory.rank)

        def detail() -> bytes:
            raise RuntimeError("no words")

        ask.detail = detail
        with pytest.raises(Mismatch) as caught:
            memory.start(ask).wait()
        assert caught.value.details[1 - memory.rank] == b"RuntimeError('no words')"

    in_processes(2, job)


def test_a_mismatch_does_not_wait_for_a_rank_that_computes():
    def job(memory: HostMemory) -> float:
        if memory.rank == 2:
            time.sleep(4)
        begin = time.monotonic()
        with pytest.raises(Mismatch) as caught:
            memory.start(ask_all(memory, question=b"%d" % memory.rank)).wait()
        seconds = time.monotonic() - begin
        assert set(caught.value.details) >= {0, 1}
        return seconds

    assert max(in_processes(3, job)) < 3.5  # 1.5 s for the details, and a busy machine


@pytest.mark.parametrize("late", [0, 1])
def test_bad_arguments_of_one_rank_are_heard_by_all(late):
    def job(memory: HostMemory) -> None:
        exchange(memory)
        if memory.rank == late:
            time.sleep(0.3)
        if memory.rank == 1:
            begin = time.monotonic()
            memory.fail_next(b"x must be 4-D")
            assert time.monotonic() - begin < 1
        else:
            with pytest.raises(Mismatch) as caught:
                memory.start(ask_all(memory)).wait()
            assert caught.value.details[1] == b"x must be 4-D"
            assert caught.value.details[memory.rank].startswith(b"rank")
        exchange(memory, 2)
        if memory.rank < 2:
            if memory.rank == 1:
                memory.fail_next(b"of a pair", (1, 0), failure="memory")
            else:
                with pytest.raises(CollectiveError, match="rank 1 gave the call up: of a pair"):
                    memory.start(ask_pair(memory, 0, 1)).wait()
        exchange(memory, 3)
        assert worlds.settled(memory) == 0

    in_processes(3, job)


def test_a_reason_that_does_not_exist_is_an_error():
    def job(memory: HostMemory) -> None:
        with pytest.raises(ValueError, match="failure must be one of"):
            memory.fail_next(b"", failure="mood")

    in_processes(1, job)


def test_a_flight_that_failed_raises_the_same_error_at_every_wait():
    def job(memory: HostMemory) -> None:
        running: Flight = memory.start(ask_all(memory, question=b"%d" % memory.rank))
        for _ in range(2):
            with pytest.raises(Mismatch):
                running.wait()
        assert running.is_completed()

    in_processes(2, job)
