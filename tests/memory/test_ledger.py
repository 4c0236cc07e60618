"""The ledger of one rank alone: the test says by hand what the other ranks say."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from line_ends import heard

from fastvideo_comm.errors import CollectiveError, CommunicationTimeoutError, PeerLostError
from fastvideo_comm.memory import line
from fastvideo_comm.memory.flight import COPIED, Ask, Flight, Mismatch, Place, Posted, error_of
from fastvideo_comm.memory.ledger import Ledger
from fastvideo_comm.memory.line import Heard, Line, Record

DIGEST, OTHER = b"d" * 16, b"o" * 16
PLACE = (0, 64)


class FirstOfThree:
    """Rank 0 of 3, and the other ends of its lines to ranks 1 and 2."""

    rank = 0

    def __init__(self) -> None:
        self.here: dict[int, Line] = {}
        self.there: dict[int, Line] = {}
        for rank in (1, 2):
            ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.here[rank], self.there[rank] = Line(ends[0]), Line(ends[1])
        self.ledger = Ledger(0, self.here, lambda *_: None)

    def start(self, *, sources: Sequence[int] = (), targets: Sequence[int] = ()) -> Flight:
        """Posts a call of all ranks."""
        key = (-1, self.ledger.next_numbers[-1])
        posted = Posted([], Place(*PLACE))
        ask = Ask(
            *("op", b"question", b"question", lambda *_: None, lambda: b"of rank 0"),
            posted=posted,
            sources=sources,
            targets=targets,
        )
        mover: Any = self
        flight = Flight(mover, ask, key, self.ledger.others, DIGEST, time.monotonic())
        self.ledger.post(flight, ask, DIGEST)
        return flight

    def hear(self, rank: int, packed: bytes, text: bytes | None = None) -> None:
        """Lets a rank say something."""
        record = Record._make(line._RECORD.unpack(packed))
        self.there[rank].send_all([packed] if text is None else line.with_text(record, text))
        self.ledger.read(rank)

    def told(self, rank: int) -> list[Heard]:
        """What this rank has told another since the last time."""
        return heard(self.there[rank])

    def dies(self, rank: int) -> None:
        self.there[rank].close()
        for _ in range(3):  # that messages were left unread, the last record, the end
            self.ledger.read(rank)

    def close(self) -> None:
        for end in (*self.here.values(), *self.there.values()):
            end.close()


@pytest.fixture
def first() -> Iterator[FirstOfThree]:
    made = FirstOfThree()
    yield made
    made.close()


def post(number: int = 0, digest: bytes = DIGEST) -> bytes:
    return line.pack_post(0, number, digest, PLACE)


def fail(failure: int, origin: int, number: int = 0) -> bytes:
    return Record(line.FAIL, failure=failure, origin=origin, number=number).pack()


def detail(number: int = 0) -> bytes:
    return Record(line.DETAIL, number=number).pack()


class TestNothingIsKept:
    def test_of_a_post_that_came_before_the_call(self, first):
        first.hear(1, post())
        assert first.ledger._early
        flight = first.start()
        assert flight.unposted == {2}
        assert first.ledger._early == {}
        first.hear(2, post())
        assert flight.is_over
        assert first.ledger.flights == {}

    def test_of_a_call_that_this_rank_gave_up_before_it_started(self, first):
        first.hear(1, post())
        first.ledger.fail_next(line.ARGUMENTS, b"x must be 4-D", None)
        assert first.ledger._early == {}

    def test_of_what_is_said_about_a_call_that_is_over(self, first):
        first.start()
        first.hear(1, post())
        first.hear(2, post())
        first.hear(2, fail(line.TIMED_OUT, 0), b"late")
        assert first.ledger._early == {}

    @pytest.mark.parametrize("fails", [False, True])
    def test_among_the_calls_in_the_background(self, first, fails):
        """The thread there would look after a call that is over for ever."""
        flight = first.start(sources=[1])
        first.ledger.in_background[flight.key] = flight
        first.hear(1, post())
        if fails:  # rank 1 may still write: the call is over, and kept
            first.ledger.expire(flight, time.monotonic(), 1.0)
            assert flight.key in first.ledger.flights
        else:
            first.hear(1, line.pack_done(0, 0))
            first.hear(2, post())
        assert flight.is_over
        assert first.ledger.in_background == {}


class LoggedWaiter:
    def __init__(self) -> None:
        self.num_wakes = 0

    def wake(self) -> None:
        self.num_wakes += 1


@pytest.mark.parametrize("fails", [False, True])
def test_the_end_of_a_call_wakes_every_other_thread_that_waits_for_it(first, fails):
    flight: Any = first.start(sources=[1])
    me, other = LoggedWaiter(), LoggedWaiter()
    flight.waiters = {threading.get_ident(): me, -5: other}
    first.hear(1, post())
    first.hear(2, post())
    assert other.num_wakes == 0
    if fails:
        first.ledger.expire(flight, time.monotonic(), 1.0)
    else:
        first.hear(1, line.pack_done(0, 0))
    assert other.num_wakes > 0
    assert me.num_wakes == 0


@pytest.mark.parametrize(
    ("posts", "text", "peers"),
    [
        ([], "ranks 1, 2 did not come", (1, 2)),
        ([1], "rank 2 did not come and rank 1 came and did not finish", (2, 1)),
        ([2], "rank 1 did not come and rank 2 came and did not finish", (1, 2)),
        ([1, 2], "ranks 1, 2 came and did not finish", (1, 2)),
    ],
)
def test_a_call_whose_time_is_up_names_the_ranks_to_all(first, posts, text, peers):
    flight = first.start(sources=[0, 1, 2])
    for rank in posts:
        first.hear(rank, post())
    first.ledger.expire(flight, time.monotonic() + 60, 1.5)
    assert not flight.is_over
    first.ledger.expire(flight, time.monotonic(), 1.5)
    error = flight.failure
    assert isinstance(error, CommunicationTimeoutError)
    assert (str(error), error.peers) == (f"op waited 1.5 s: {text}", peers)
    for rank in (1, 2):
        heard = first.told(rank)[-1]
        theirs = error_of(heard.record.failure, heard.record.origin, heard.text.decode())
        assert isinstance(theirs, CommunicationTimeoutError)
        assert str(theirs) == f"rank 0 gave the call up: op waited 1.5 s: {text}"
        assert theirs.peers == peers[:1], "a rank that did not come, and not the one that says so"


def test_a_rank_that_is_late_with_its_own_copies_names_itself(first):
    flight = first.start(targets=[1])
    first.hear(1, post())
    first.hear(2, post())
    first.ledger.expire(flight, time.monotonic(), 2.0)
    error = flight.failure
    assert str(error) == "op waited 2 s: its own copies are not finished"
    assert isinstance(error, CommunicationTimeoutError)
    assert error.peers == (0,)


class TestMismatch:
    """Rank 1 asks for something else, or has bad arguments."""

    @pytest.fixture(params=["asks for something else", "bad arguments"])
    def flight(self, request, first) -> Flight:
        flight = first.start(sources=[1, 2], targets=[1, 2])
        first.hear(2, post())
        if request.param == "bad arguments":
            first.hear(1, fail(line.ARGUMENTS, 1), b"of rank 1")
        else:
            first.hear(1, post(digest=OTHER))
            first.hear(1, detail(), b"of rank 1")
        return flight

    def test_is_over_as_soon_as_every_rank_has_said_what_it_asked_for(self, first, flight):
        assert not flight.is_over
        first.hear(2, detail(), b"of rank 2")
        assert flight.is_over, "nobody is waited for"
        assert isinstance(flight.failure, Mismatch)
        assert flight.failure.details == {0: b"of rank 0", 1: b"of rank 1", 2: b"of rank 2"}
        assert first.ledger.flights == {}
        for rank in (1, 2):
            heard = first.told(rank)[-1]
            assert (heard.record.kind, heard.text) == (line.DETAIL, b"of rank 0")

    def test_does_not_wait_for_a_rank_that_is_gone(self, first, flight):
        first.dies(2)
        assert flight.is_over
        assert isinstance(flight.failure, Mismatch)
        assert sorted(flight.failure.details) == [0, 1]

    def test_does_not_wait_for_a_rank_that_gave_the_call_up(self, first, flight):
        first.hear(2, fail(line.INTERRUPTED, 2), b"KeyboardInterrupt")
        assert flight.is_over
        assert isinstance(flight.failure, Mismatch)
        assert sorted(flight.failure.details) == [0, 1]

    def test_ends_without_the_words_of_a_rank_that_computes(self, first, flight, monkeypatch):
        ends = flight.ends(time.monotonic() + 60)
        assert ends <= time.monotonic() + 1.5
        first.ledger.expire(flight, time.monotonic(), 1.0)  # the time of the call is not asked
        assert not flight.is_over
        monkeypatch.setattr(time, "monotonic", lambda: ends)
        first.ledger.expire(flight, ends + 60, 1.0)
        assert isinstance(flight.failure, Mismatch)
        assert sorted(flight.failure.details) == [0, 1]


class TestFailedBefore:
    """Rank 1 has given the call up before this rank started it."""

    def test_its_outputs_come_back_at_once(self, first):
        first.hear(1, fail(line.MEMORY, 1), b"no memory")
        flight = first.start(sources=[1, 2], targets=[1, 2])
        assert str(flight.failure) == "rank 1 gave the call up: no memory"
        assert first.ledger.flights == {}, "nobody has been told where they are"
        assert [heard.record.kind for heard in first.told(2)] == [line.FAIL]

    def test_its_outputs_come_back_after_a_mismatch_though_nobody_writes_there(self, first):
        first.hear(1, fail(line.ARGUMENTS, 1), b"of rank 1")
        flight = first.start(sources=[1, 2], targets=[1, 2])
        assert [heard.record.kind for heard in first.told(2)] == [line.DETAIL]
        assert not flight.is_over
        first.hear(2, detail(), b"of rank 2")
        assert isinstance(flight.failure, Mismatch)
        assert first.ledger.flights == {}


@pytest.mark.parametrize(
    ("failure", "kind", "text"),
    [
        (line.LOST, PeerLostError, "why"),
        (line.CLOSED, PeerLostError, "rank 3 closed its communicator during the call"),
        (line.TIMED_OUT, CommunicationTimeoutError, "why"),
        *[
            (failure, CollectiveError, "rank 3 gave the call up: why")
            for failure in (line.INTERRUPTED, line.MEMORY, line.DELIVERY)
        ],
    ],
)
def test_the_reason_of_another_rank_decides_on_the_error_and_its_rank_is_named(failure, kind, text):
    error = error_of(failure, 3, "why")
    assert type(error) is kind
    assert str(error) == text
    assert vars(error)["peers"] == (3,)


class TestGone:
    def test_a_rank_that_is_not_needed_any_more_may_leave(self, first):
        flight = first.start(sources=[1], targets=[1])
        first.hear(1, post())
        first.hear(1, line.pack_done(0, 0))
        first.there[1].send_all([Record(line.BYE).pack()])
        first.dies(1)
        assert first.ledger.lost == {1}
        assert flight.failure is None
        first.hear(2, post())
        flight.parts[1] = COPIED
        first.ledger.copied(flight, 1)
        assert flight.is_over
        assert flight.failure is None

    def test_a_rank_that_dies_before_it_has_written_fails_the_call(self, first):
        flight = first.start(sources=[1])
        first.hear(1, post())
        first.hear(2, post())
        first.dies(1)
        assert isinstance(flight.failure, PeerLostError)
        assert str(flight.failure) == "rank 1 has died"
        assert first.ledger.flights == {}, "it writes no more"
        heard = first.told(2)[-1]
        theirs = error_of(heard.record.failure, heard.record.origin, heard.text.decode())
        assert isinstance(theirs, PeerLostError)
        assert (str(theirs), theirs.peers) == ("rank 1 has died", (1,))
