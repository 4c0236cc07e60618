"""What one rank knows of its calls, and how each of them ends.

A ledger is used under the lock of its owner. It reads what the others say, compares their posts
with what this rank expects, and tells them when a part is there or the call has failed. It copies
nothing and waits for nothing: `engine.py` does both.

Why no block is reused while another rank may still write to it:

- A rank writes to the outputs of a post only between reading that post and sending DONE for it.
- It sends FAIL or DETAIL for a call only when none of its threads copies for that call, and starts
  no copy for the call afterwards. It closes its lines only when none of its threads copies at all.
- A flight holds its outputs until each of its sources that has its post has said DONE, FAIL or
  DETAIL, or has reached the end of its line. This holds for a flight that failed as well: it stays
  in `flights`, over but not settled, and its blocks stay allocated.

Sockets order memory: what a rank wrote before it sent a record is seen by whoever received it.

KeyboardInterrupt may come between any two steps of Python. Every change here is one step, or can be
made twice: a record stays in the inbox until it was handled (`line.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ..errors import CommunicationTimeoutError, PeerLostError
from . import line as records
from .flight import ALL, COPIED, READY, WAITING, Ask, Flight, Key, Mismatch, Place, error_of
from .line import Heard, Line, Record

# How long a rank waits for what the others say about a mismatch.
DISCLOSURE_SECONDS = 1.5


class Ledger:
    """The calls of one rank, and its lines to the others."""

    def __init__(
        self,
        rank: int,
        lines: dict[int, Line],
        add_segment: Callable[[int, Record, int], None],
    ) -> None:
        """Takes over the lines.

        Args:
            rank: This rank.
            lines: The line to each other rank.
            add_segment: Called for each segment with its rank, its record and its descriptor.
        """
        self.rank = rank
        self.lines = lines
        # In the order in which ranks are served: not all ranks write to one at the same time.
        size = len(lines) + 1
        self.others = [(rank + step) % size for step in range(1, size)]
        self.next_numbers = dict.fromkeys([ALL, *lines], 0)
        self.flights: dict[Key, Flight] = {}
        self.in_background: dict[Key, Flight] = {}
        self.lost: set[int] = set()
        self._early: dict[Key, list[tuple[int, Heard]]] = {}
        self._add_segment = add_segment

    def lane(self, ranks: tuple[int, int] | None) -> tuple[int, list[int]]:
        """The lane of a call, and the other ranks in it."""
        if ranks is None:
            return ALL, self.others
        (other,) = (rank for rank in ranks if rank != self.rank)
        return other, [other]

    def post(self, flight: Flight, ask: Ask, digest: bytes) -> None:
        """Gives a flight the next number of its lane, and tells the others of it."""
        lane, number = flight.key
        self.flights[flight.key] = flight
        self.next_numbers[lane] = number + 1
        others = flight.others
        flight.undone.update(rank for rank in ask.sources if rank in others)
        # All that the others say may have come early. The call is not over before this rank's post.
        flight.unposted.add(self.rank)
        for rank, heard in self._early.get(flight.key, ()):
            self._apply(flight, rank, heard)
        self._early.pop(flight.key, None)
        if flight.is_over or flight.details is not None:
            flight.undone.clear()  # nobody has been given a place to write to
            self.update(flight)
            return
        place = ask.posted.place if ask.posted is not None else None
        packed = records.pack_post(lane != ALL, number, digest, place)
        for other in others:
            self.lines[other].send(packed)
        flight.unposted.discard(self.rank)
        for rank in self.lost:
            self._lose(flight, rank)
        self.update(flight)

    def fail_next(self, failure: int, text: bytes, ranks: tuple[int, int] | None) -> None:
        """Uses up the next number of a lane, and tells the others that this call fails."""
        lane, others = self.lane(ranks)
        number = self.next_numbers[lane]
        record = Record(records.FAIL, lane != ALL, failure, origin=self.rank, number=number)
        packed = records.with_text(record, text)
        try:
            self.next_numbers[lane] = number + 1
            self._early.pop((lane, number), None)
        finally:  # an interrupt here must not leave the others waiting
            for other in others:
                self.lines[other].send_all(packed)

    # What the others say

    def read(self, rank: int) -> None:
        """Takes in one message of the line to a rank, if there is one."""
        line = self.lines[rank]
        line.receive()
        while (heard := line.first()) is not None:
            self._hear(rank, line, heard)
            line.handled(heard)
        if line.is_lost and rank not in self.lost:
            for flight in list(self.flights.values()):
                self._lose(flight, rank)
            self.lost.add(rank)

    def _hear(self, rank: int, line: Line, heard: Heard) -> None:
        record = heard.record
        if record.kind == records.SEGMENT:
            self._add_segment(rank, record, heard.descriptor)
        elif record.kind == records.BYE:
            line.has_left = True
        else:
            key = (rank if record.is_pair else ALL, record.number)
            flight = self.flights.get(key)
            if flight is not None:
                self._apply(flight, rank, heard)
            elif record.number >= self.next_numbers[key[0]]:
                self._early.setdefault(key, []).append((rank, heard))

    def _apply(self, flight: Flight, rank: int, heard: Heard) -> None:
        """Applies what a rank has said about a flight."""
        record = heard.record
        if record.kind == records.POST:
            if flight.is_over or rank not in flight.unposted:
                return
            flight.places[rank] = Place(record.segment, record.offset) if record.flag else None
            if record.digest != flight.expected:
                self._disclose(flight)
            elif flight.parts.get(rank) is WAITING:
                flight.parts[rank] = READY
            flight.unposted.discard(rank)
        else:
            if record.kind != records.DONE and not flight.is_over:
                self._give_up(flight, rank, heard)
            flight.undone.discard(rank)
        self.update(flight)

    def _give_up(self, flight: Flight, rank: int, heard: Heard) -> None:
        """Handles a FAIL or DETAIL of a rank."""
        record = heard.record
        if record.kind == records.DETAIL or record.failure == records.ARGUMENTS:
            self._disclose(flight)
            if flight.details is not None:
                flight.details[rank] = heard.text
        elif flight.details is None:
            text = heard.text.decode(errors="replace")
            error = error_of(record.failure, record.origin, text)
            self.fail(flight, error, record.failure, record.origin, text)
        flight.undisclosed.discard(rank)

    def _lose(self, flight: Flight, rank: int) -> None:
        """Fails a flight that needs a rank which is gone."""
        if rank in flight.unposted or rank in flight.undone:
            if flight.details is None:
                has_left = self.lines[rank].has_left
                text = f"rank {rank} has left the group" if has_left else f"rank {rank} has died"
                self.fail(flight, PeerLostError(text, peers=(rank,)), records.LOST, rank, text)
            flight.undone.discard(rank)
        flight.undisclosed.discard(rank)
        self.update(flight)

    # How flights end

    def copied(self, flight: Flight, rank: int) -> None:
        """Tells a rank that its part is there. If the call failed, tells all ranks why."""
        if flight.is_over or flight.details is not None:
            self.tell(flight)
        elif flight.parts.get(rank) is COPIED:
            if rank != self.rank:
                self.lines[rank].send(records.pack_done(flight.key[0] != ALL, flight.key[1]))
            del flight.parts[rank]
        self.update(flight)

    def fail(
        self, flight: Flight, error: BaseException, failure: int, origin: int, text: str
    ) -> None:
        """Ends a flight with an error, and tells the others why.

        Args:
            flight: The flight; nothing happens where it is over.
            error: What this rank raises.
            failure: The reason that the others hear, one of those in `line.py`.
            origin: The rank where it began; of a timeout, a rank that did not come or finish.
            text: What the others are told.
        """
        if flight.is_over:
            return
        if not flight.is_told:
            lane, number = flight.key
            record = Record(records.FAIL, lane != ALL, failure, origin=origin, number=number)
            flight.notice = records.with_text(record, text.encode())
        flight.failure = error
        self.tell(flight)
        self._end(flight)

    def interrupt(self, flight: Flight, error: BaseException) -> None:
        """Ends a flight whose thread does not wait for it any more."""
        self.fail(flight, error, records.INTERRUPTED, self.rank, type(error).__name__)
        # The interrupt may have come between two steps of its end.
        self.tell(flight)
        self.update(flight)

    def expire(self, flight: Flight, deadline: float, seconds: float) -> None:
        """Fails a flight whose time is up."""
        if flight.is_over or flight.details is not None:
            self.update(flight)
        elif time.monotonic() >= deadline:
            absent = sorted(flight.unposted)
            undone = sorted(flight.undone - flight.unposted)
            parts = [f"{_ranks(absent)} did not come"] if absent else []
            parts += [f"{_ranks(undone)} came and did not finish"] if undone else []
            missing = [*absent, *undone] or [self.rank]
            parts = parts or ["its own copies are not finished"]
            text = f"{flight.op} waited {seconds:g} s: {' and '.join(parts)}"
            error = CommunicationTimeoutError(text, peers=tuple(missing))
            told = f"rank {self.rank} gave the call up: {text}"
            self.fail(flight, error, records.TIMED_OUT, missing[0], told)

    def tell(self, flight: Flight) -> None:
        """Sends FAIL or DETAIL, once no thread copies for the flight."""
        if flight.notice and not flight.is_told and not flight.is_copying:
            for other in flight.others:
                self.lines[other].send_all(flight.notice)
            flight.is_told = True

    def update(self, flight: Flight) -> None:
        """Ends a flight that has nothing left to wait for."""
        if flight.is_over:
            # One that failed is kept until the others have heard it and write no more.
            if (flight.is_told or flight.failure is None) and not flight.undone:
                self._forget(flight)
        elif flight.details is not None:
            if not flight.undisclosed or time.monotonic() >= flight.disclosed_until:
                flight.failure = Mismatch(flight.details)
                self._end(flight)
        elif not (flight.unposted or flight.undone or flight.parts):
            flight.is_over = True
            self._forget(flight)

    def _forget(self, flight: Flight) -> None:
        """Lets go of a flight that is over.

        The flight leaves `flights` last: if an interrupt comes before that, the next `update` does
        the rest.
        """
        self.in_background.pop(flight.key, None)
        flight.release()
        flight.wake()
        self.flights.pop(flight.key, None)

    def _end(self, flight: Flight) -> None:
        flight.is_over = True
        self.in_background.pop(flight.key, None)
        flight.wake()
        self.update(flight)

    def _disclose(self, flight: Flight) -> None:
        """Tells the others what this rank asked for, and waits for the same of them."""
        if flight.is_over or flight.details is not None or flight.ask is None:
            return
        try:
            detail = flight.ask.detail()
        except Exception as error:
            detail = repr(error).encode()
        lane, number = flight.key
        flight.notice = records.with_text(
            Record(records.DETAIL, lane != ALL, number=number), detail
        )
        flight.undisclosed = {other for other in flight.others if other not in self.lost}
        flight.disclosed_until = time.monotonic() + DISCLOSURE_SECONDS
        flight.details = {self.rank: detail}
        self.tell(flight)


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
