"""Calls that fail: every rank hears why, no block is reused early, and the next call works."""

from __future__ import annotations

import contextlib
import gc
import os
import random
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
from fastvideo_comm.memory.host import Flight, HostMemory, Mismatch
from fastvideo_comm.memory.waiter import Waiter

MODULES = {module.__file__ for module in (engine, flight, host, ledger, line)}


# Ranks that do not ask for the same


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
            assert caught.value.peers in ((2,), (1 - memory.rank,))
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
        condemned = memory.bytes_in_use
        assert condemned > 0
        posted = [memory.allocate([((2, 5), torch.int64)]).tensors[0].fill_(-1) for _ in range(9)]
        time.sleep(1.5)  # rank 1 writes
        assert all((tensor == -1).all() for tensor in posted)
        posted.clear()
        assert memory.bytes_in_use == condemned
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


# Interrupts


def interrupted(memory: HostMemory, at: int, background: bool) -> tuple[bool, str]:
    """One call, interrupted at a point; made again where it had not begun."""
    numbers = memory._engine._ledger.next_numbers
    before = numbers[-1]
    ask = ask_all(memory, at)
    with worlds.Interruption(at, MODULES) as interruption:
        try:
            memory.start(ask, background=background).wait()
            how = "completed"
        except KeyboardInterrupt:
            how = "interrupted"
    if numbers[-1] == before:
        exchange(memory, at)
        how = "completed"
    if how == "completed" and numbers[-1] == before + 1 and not interruption.fired:
        assert torch.equal(outputs(ask), worlds.expected_all(memory, at))
    return interruption.fired, how


@pytest.mark.parametrize("background", [False, True])
def test_an_interrupt_at_any_point_is_heard_by_the_other_and_harms_nothing(background):
    def job(memory: HostMemory) -> int:
        ways, reasons = set(), []
        at = 0
        while True:
            if memory.rank == 1:
                fired, how = interrupted(memory, at, background)
                ways.add(how)
            else:
                ask = ask_all(memory, at)
                try:
                    memory.start(ask).wait()
                    assert torch.equal(outputs(ask), worlds.expected_all(memory, at))
                except CollectiveError as error:
                    reasons.append(str(error))
                fired = True
                del ask
            at += 1
            # Both go on together: rank 1 says whether it was the last.
            stop = ask_pair(memory, 1, 0, at, size=1)
            memory.start(stop).wait()
            goes_on = ask_pair(memory, 1, 0, int(fired), size=1)
            memory.start(goes_on).wait()
            if memory.rank == 0:
                fired = bool(outputs(goes_on).item() - 100)
            if not fired:
                break
        exchange(memory, 3)
        del stop, goes_on
        assert worlds.settled(memory) == 0
        assert set(reasons) <= {"rank 1 gave the call up: KeyboardInterrupt"}
        if memory.rank == 0:
            assert len(reasons) > at // 5  # the other interrupts came before it or after it
        else:
            assert ways == {"completed", "interrupted"}
            assert at > (20 if background else 100)
        return at

    first, second = in_processes(2, job, timeout=20)
    assert first == second


def test_what_was_received_before_an_interrupt_is_not_forgotten():
    """Rank 1 is interrupted while it handles the last message that it will ever get."""

    def job(memory: HostMemory) -> None:
        asks = [ask_pair(memory, 0, 1, call) for call in range(2)]
        first, second = (memory.start(ask) for ask in asks)
        if memory.rank == 0:
            second.wait()
            time.sleep(1.5)
            return
        ledger = memory._engine._ledger
        hear = ledger._hear

        def interrupt(rank: int, end: line.Line, heard: line.Heard) -> None:
            if heard.record.kind == line.DONE and heard.record.number == 1:
                ledger._hear = hear
                raise KeyboardInterrupt
            hear(rank, end, heard)

        ledger._hear = interrupt
        waiter = Waiter()
        with contextlib.suppress(KeyboardInterrupt):
            first.wait()
        while ledger._hear is not hear:  # the message came later than that of the first call
            with contextlib.suppress(KeyboardInterrupt):
                memory._engine._turn(waiter, waiter.ready(ledger.lines, (), 0.01))
        begin = time.monotonic()
        second.wait(10)
        assert time.monotonic() - begin < 1
        assert outputs(asks[1]).tolist() == [worlds.value(1, 0, 1)] * 3

    in_processes(2, job)


def test_interrupts_by_signal_at_random_times():
    def handler(*_: object) -> None:
        raise KeyboardInterrupt

    def job(memory: HostMemory) -> None:
        generator = random.Random(memory.rank)
        signal.signal(signal.SIGALRM, handler)
        numbers = memory._engine._ledger.next_numbers
        for call in range(200):
            wanted = call + 1
            ask = None
            while numbers[-1] < wanted:
                try:
                    if generator.random() < 0.5:
                        signal.setitimer(signal.ITIMER_REAL, generator.uniform(5e-5, 2e-3))
                    ask = ask_all(memory, call)
                    memory.start(ask).wait()
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    assert torch.equal(outputs(ask), worlds.expected_all(memory, call))
                except (KeyboardInterrupt, CollectiveError):
                    signal.setitimer(signal.ITIMER_REAL, 0)
        exchange(memory, 999)
        del ask
        assert worlds.settled(memory) == 0

    in_processes(2, job, timeout=20)


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


def test_a_flight_that_failed_raises_the_same_error_at_every_wait():
    def job(memory: HostMemory) -> None:
        running: Flight = memory.start(ask_all(memory, question=b"%d" % memory.rank))
        for _ in range(2):
            with pytest.raises(Mismatch):
                running.wait()
        assert running.is_completed()

    in_processes(2, job)
