"""Threads that wait: how long, what wakes them, and what they leave to the background."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fastvideo_comm.errors import CommunicationTimeoutError
from fastvideo_comm.memory import line
from fastvideo_comm.memory.engine import Engine
from fastvideo_comm.memory.flight import READY, Ask, Place, Posted
from fastvideo_comm.memory.line import Line
from fastvideo_comm.memory.waiter import Waiter

Ends = tuple[dict[int, Line], dict[int, Line]]
QUESTION = b"question"


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Both ends of the lines of rank 0 of 3."""
    here, there = {}, {}
    for rank in (1, 2):
        pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        here[rank], there[rank] = Line(pair[0]), Line(pair[1])
    yield here, there
    for end in (*here.values(), *there.values()):
        end.close()


def engine_of(ends: Ends, timeout: float = 60.0) -> Engine:
    return Engine(0, ends[0], timeout=timeout, name="alone", add_segment=lambda *_: None)


def ask(deliver: Callable[[int, Place], None] = lambda *_: None) -> Ask:
    """A call in which all ranks write to all."""
    posted = Posted([], Place(0, 0))
    return Ask(
        *("op", QUESTION, QUESTION, deliver, lambda: b"detail"),
        posted=posted,
        sources=range(3),
        targets=range(3),
    )


def post(ends: Ends, engine: Engine, rank: int, question: bytes = QUESTION) -> None:
    """Lets a rank post, and this rank read it."""
    digest = engine._digest(question)
    ends[1][rank].send(line.pack_post(0, 0, digest, (0, 0)))
    with engine._lock:
        engine._ledger.read(rank)


def records(end: Line) -> list[int]:
    """The kinds of the records that have come."""
    kinds = []
    for _ in range(20):
        end.receive()
        while (heard := end.first()) is not None:
            kinds.append(heard.record.kind)
            end.handled(heard)
    return kinds


def fill(ends: Ends) -> None:
    """Until the sockets take no more."""
    for end in ends[0].values():
        while not end.is_blocked:
            end.send(line.pack_done(0, 99))


def drained(end: Line) -> list[int]:
    """The kinds of the records that come within seconds, until the last is a FAIL."""
    kinds: list[int] = []
    deadline = time.monotonic() + 20
    while line.FAIL not in kinds and time.monotonic() < deadline:
        kinds += records(end)
    return kinds


@pytest.mark.parametrize(
    ("of_the_group", "of_the_wait", "seconds"), [(0.1, 60.0, "0.1"), (60.0, 0.05, "0.05")]
)
def test_a_wait_ends_with_the_shorter_of_two_timeouts(ends, of_the_group, of_the_wait, seconds):
    engine = engine_of(ends, of_the_group)
    flight = engine.start(ask(), background=False)
    begin = time.monotonic()
    with pytest.raises(CommunicationTimeoutError, match=f"op waited {seconds} s: ranks 1, 2 did"):
        flight.wait(of_the_wait)
    assert time.monotonic() - begin < 20
    engine.close()


def test_a_call_that_nobody_waits_for_moves_on_when_it_is_asked_whether_it_is_completed(ends):
    copied: list[int] = []
    engine = engine_of(ends)
    flight = engine.start(ask(lambda rank, place: copied.append(rank)), background=False)
    assert not flight.is_completed()
    for rank in (1, 2):
        ends[1][rank].send(line.pack_post(0, 0, engine._digest(QUESTION), (0, 0)))
        ends[1][rank].send(line.pack_done(0, 0))
    deadline = time.monotonic() + 20
    while not flight.is_completed() and time.monotonic() < deadline:
        pass
    assert flight.is_over
    assert sorted(copied) == [0, 1, 2]
    assert [records(end) for end in ends[1].values()] == [[line.POST, line.DONE]] * 2
    engine.close()


class TestFullSockets:
    """What they do not take is sent though no thread of this rank waits any more."""

    def test_of_a_call_that_was_given_up_before_it_started(self, ends):
        engine = engine_of(ends)
        fill(ends)
        engine.fail_next(line.ARGUMENTS, b"x must be 4-D", None)
        for end in ends[1].values():
            assert drained(end)[-1] == line.FAIL
        engine.close()

    def test_of_a_wait_that_was_interrupted(self, ends):
        engine: Any = engine_of(ends)
        flight = engine.start(ask(), background=False)
        fill(ends)

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        engine._progress = interrupted
        with pytest.raises(KeyboardInterrupt):
            flight.wait()
        for end in ends[1].values():
            assert drained(end)[-1] == line.FAIL
        engine.close()


class TestInterruptedCopy:
    def test_is_left_to_another_thread_which_is_woken(self, ends):
        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        engine: Any = engine_of(ends)
        flight = engine.start(ask(interrupted), background=False)
        other = Waiter()
        engine._foreground[-5] = other
        with pytest.raises(KeyboardInterrupt):
            engine._turn([])
        assert flight.parts[0] is READY
        assert other._alone.poll(0), "it would sleep until another rank says something"
        engine._foreground.clear()
        engine.close()

    def test_lets_the_others_hear_of_a_failure_that_it_held_up(self, ends):
        """Nobody is told that a call failed while a thread copies for it."""

        def fails_meanwhile(*_: object) -> None:
            with engine._lock:
                engine._ledger.fail(flight, ValueError("why"), line.TIMED_OUT, 1, "why")
            assert not flight.is_told
            raise KeyboardInterrupt

        engine: Any = engine_of(ends)
        flight = engine.start(ask(fails_meanwhile), background=False)
        with pytest.raises(KeyboardInterrupt):
            engine._turn([])
        assert flight.is_told
        assert records(ends[1][1]) == [line.POST, line.FAIL]
        engine.close()


def test_nothing_is_copied_once_the_ranks_are_found_to_disagree(ends):
    """A rank that has said what it asked for writes no more: the other may use the memory again."""
    copied: list[int] = []
    engine = engine_of(ends)
    flight = engine.start(ask(lambda rank, place: copied.append(rank)), background=False)
    post(ends, engine, 1)
    assert flight.parts[1] is READY
    post(ends, engine, 2, b"another question")
    assert flight.details is not None
    engine._turn([])
    assert copied == []
    engine.close()


class TestWaiter:
    def test_that_was_woken_sleeps_again(self, ends):
        """Otherwise its thread would take all of a processor from then on."""
        waiter = Waiter()
        waiter.wake()
        waiter.sleep()
        assert waiter._alone.poll(0) == []
        waiter.wake()
        assert waiter.ready(ends[0], (), 10.0) == []
        assert waiter._poll.poll(0) == []

    def test_that_was_woken_beside_a_message_hears_of_both(self, ends):
        waiter = Waiter()
        waiter.wake()
        ends[1][2].send(line.pack_done(0, 1))
        assert waiter.ready(ends[0], (), 10.0) == [2]
        assert waiter._alone.poll(0) == []
        assert waiter.look(ends[0], (), 3) == [2]

    def test_that_looks_ends_its_look_when_it_is_woken(self, ends):
        waiter = Waiter()
        waiter.ready(ends[0], (), 0)
        waiter.wake()
        begin = time.monotonic()
        assert waiter.look(ends[0], (), 10**9) == []
        assert time.monotonic() - begin < 20


def test_a_thread_that_waits_is_woken_by_the_one_that_ends_its_call(ends):
    engine = engine_of(ends)
    flight = engine.start(ask(), background=False)
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            flight.wait()
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    while not flight.waiters:
        time.sleep(0.001)
    with engine._lock:
        engine._ledger.fail(flight, ValueError("ended"), line.TIMED_OUT, 1, "ended")
    thread.join(20)
    assert not thread.is_alive()
    assert [str(error) for error in errors] == ["ended"]
    engine.close()
