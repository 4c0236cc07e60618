"""What moves flights on: reads the lines, compares posts, lets parts be copied, tells when they are.

Threads. One lock guards all state and is never held during a copy. Every thread that waits also works:
it reads what has come, and copies the next part that is ready, for whichever flight. A daemon thread
does the same for flights that are started in the background, as long as no other thread waits.

Why no block is reused while another rank may still write to it:

- A rank writes to the outputs of a post only between reading that post and sending DONE for it.
- It sends FAIL or DETAIL for a call only when none of its threads copies for that call, and starts
  no copy for the call afterwards. It closes its lines only when none of its threads copies at all.
- A flight holds its outputs until each rank that has its post, and is one of its sources, has said
  DONE, FAIL or DETAIL or has reached the end of its line. This holds for a flight that failed as
  well: it stays in `_flights`, over but not settled, and its blocks stay allocated.

Sockets order memory: what a rank wrote before it sent a record is seen by whoever has received it.

KeyboardInterrupt may come between any two steps of Python. Every change is one step, or can be
done twice: records are handled until they are taken out of the inbox (`line.py`), and a part whose copy
was interrupted is ready again.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
import time
from collections.abc import Callable

import torch

from ..errors import ClosedError, CollectiveError, CommunicationTimeoutError, PeerLostError
from . import line as records
from .flight import ALL, COPIED, READY, WAITING, Ask, Flight, Key, Mismatch, Place, error_of
from .line import Heard, Line, Record
from .waiter import Background, Waiter

# How long a rank waits for what the others say about a mismatch.
DISCLOSURE_SECONDS = 1.5
# A queue that a socket did not take is tried again after this time.
_RETRY_SECONDS = 0.002
# How often a thread looks for messages before it sleeps.
_LOOKS = 60


class Engine:
    """The flights of one rank, and its lines to the others."""

    def __init__(
        self,
        rank: int,
        lines: dict[int, Line],
        *,
        timeout: float,
        name: str,
        add_segment: Callable[[int, Record, int], None],
    ) -> None:
        """Takes over the lines.

        Args:
            rank: This rank.
            lines: The line to each other rank.
            timeout: Seconds from the start of a call to its failure.
            name: What errors call the group.
            add_segment: Is told of a segment: its rank, its record and its descriptor.
        """
        self.rank = rank
        self._lines = lines
        self._timeout = timeout
        self._name = name
        self._add_segment = add_segment
        # In the order in which ranks are served: not all ranks write to one at the same time.
        size = len(lines) + 1
        self._others = [(rank + step) % size for step in range(1, size)]
        self._digest = functools.lru_cache(4096)(_digest)
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._is_closed = False
        self._next = dict.fromkeys([ALL, *lines], 0)
        self._flights: dict[Key, Flight] = {}
        self._early: dict[Key, list[tuple[int, Heard]]] = {}
        self._lost: dict[int, str] = {}
        self._foreground: dict[int, Waiter] = {}  # the threads that wait
        self._waiters: list[Waiter] = []  # of threads that no longer wait
        self._in_background: dict[Key, Flight] = {}
        self._background: Background | None = None

    def check(self) -> None:
        """Raises what stands against any use of this memory."""
        if os.getpid() != self._process:
            raise ClosedError(
                f"the communicator {self._name!r} belongs to process {self._process}; "
                f"process {os.getpid()} was forked from it and must make its own"
            )
        if self._is_closed:
            raise ClosedError(f"the communicator {self._name!r} was destroyed before the call")

    def announce(self, packed: list[bytes], descriptor: int) -> None:
        """Tells all ranks of a segment."""
        with self._lock:
            for line in self._lines.values():
                line.send_all(packed, descriptor)

    def start(self, ask: Ask, *, background: bool) -> Flight:
        """Posts a call."""
        self.check()
        lane, others = self._lane(ask.ranks)
        digest, expected = self._digest(ask.question), self._digest(ask.expects)
        with self._lock:
            key = (lane, self._next[lane])
            flight = Flight(self, ask, key, others, expected, time.monotonic())
            try:
                self._flights[key] = flight
                self._next[lane] = key[1] + 1
                self._post(flight, ask, digest)
                if background:
                    flight.is_background = True
                    self._in_background[key] = flight
            except BaseException as error:
                if self._flights.get(key) is flight:
                    self._next[lane] = key[1] + 1
                    self._interrupt(flight, error)
                raise
        if background:
            self._wake_background()
        return flight

    def fail_next(self, failure: int, text: bytes, ranks: tuple[int, int] | None) -> None:
        """Uses up the number of the next call and tells the others that it fails."""
        self.check()
        lane, others = self._lane(ranks)
        with self._lock:
            number = self._next[lane]
            record = Record(
                records.FAIL, int(lane != ALL), failure, origin=self.rank, number=number
            )
            packed = records.with_text(record, text)
            self._next[lane] = number + 1
            self._early.pop((lane, number), None)
            for other in others:
                self._lines[other].send_all(packed)

    def wait(self, flight: Flight, timeout: float | None) -> None:
        """Moves flights on until this one is over."""
        if not flight.is_over:
            self.check()
            try:
                self._progress(flight, timeout)
            except BaseException as error:
                with self._lock:
                    self._interrupt(flight, error)
                raise
        if flight.failure is not None:
            raise flight.failure

    def poll(self, flight: Flight) -> bool:
        """Whether a flight is over; moves flights on as far as that needs no waiting."""
        if not flight.is_over and not flight.is_background:
            self.check()
            with self._waiter() as waiter:
                while self._turn(waiter.ready(self._lines, self._lost, 0)):
                    pass
        return flight.is_over

    def close(self) -> None:
        """Fails what is in the air, says BYE and closes the lines; in a forked child, nothing."""
        if os.getpid() != self._process:
            return
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            for flight in list(self._flights.values()):
                error = ClosedError(
                    f"the communicator {self._name!r} was destroyed during the call"
                )
                self._fail(flight, error, records.CLOSED, self.rank)
            waiters = list(self._foreground.values())
        for waiter in waiters:
            waiter.wake()
        if self._background is not None:
            self._background.stop()
        # The end of a line tells the others that this rank writes no more.
        deadline = time.monotonic() + self._timeout
        while self._is_copying():
            if time.monotonic() > deadline:
                return
            time.sleep(0.0005)
        with self._lock:
            for line in self._lines.values():
                line.send(Record(records.BYE).pack())
                line.close()
            self._flights.clear()

    def _is_copying(self) -> bool:
        with self._lock:
            return any(flight.is_copying for flight in self._flights.values())

    def forked(self) -> None:
        """In a forked child: closes its copies of the lines, or the others would not see this rank's
        process die while the child lives.
        """
        for line in self._lines.values():
            line.close()

    # Calls

    def _lane(self, ranks: tuple[int, int] | None) -> tuple[int, list[int]]:
        """The lane of a call, and the other ranks in it."""
        if ranks is None:
            return ALL, self._others
        (other,) = (rank for rank in ranks if rank != self.rank)
        return other, [other]

    def _post(self, flight: Flight, ask: Ask, digest: bytes) -> None:
        lane, number = flight.key
        early = self._early.get(flight.key, ())
        for rank, heard in early:
            self._apply(flight, rank, heard)
        self._early.pop(flight.key, None)
        if not flight.is_over and flight.details is None:
            others = flight.others
            flight.undone.update(rank for rank in ask.sources if rank in others)
            place = ask.posted.place if ask.posted is not None else None
            packed = records.pack_post(lane != ALL, number, digest, place)
            for other in others:
                self._lines[other].send(packed)
        for rank in self._lost:
            self._lose_one(flight, rank)

    # What has been heard

    def _read(self, rank: int) -> None:
        """Takes in what the line to a rank has; under the lock."""
        line = self._lines[rank]
        line.receive()
        while (heard := line.first()) is not None:
            self._hear(rank, line, heard)
            line.handled(heard)
        if line.is_lost and rank not in self._lost and not self._is_closed:
            for flight in list(self._flights.values()):
                self._lose_one(flight, rank, line)
            self._lost[rank] = _loss(rank, line)

    def _hear(self, rank: int, line: Line, heard: Heard) -> None:
        record = heard.record
        if record.kind == records.SEGMENT:
            self._add_segment(rank, record, heard.descriptor)
        elif record.kind == records.BYE:
            line.has_left = True
        else:
            key = (rank if record.is_pair else ALL, record.number)
            flight = self._flights.get(key)
            if flight is not None:
                self._apply(flight, rank, heard)
            elif record.number >= self._next[key[0]]:
                self._early.setdefault(key, []).append((rank, heard))

    def _apply(self, flight: Flight, rank: int, heard: Heard) -> None:
        """What a rank has said about a flight; under the lock."""
        record = heard.record
        if record.kind == records.POST:
            if flight.is_over or rank not in flight.unposted:
                return
            flight.places[rank] = Place(record.segment, record.offset) if record.flag else None
            if record.digest != flight.expected:
                self._mismatch(flight)
            elif flight.parts.get(rank) is WAITING:
                flight.parts[rank] = READY
            flight.unposted.discard(rank)
        else:
            if record.kind != records.DONE and not flight.is_over:
                if record.kind == records.DETAIL or record.failure == records.ARGUMENTS:
                    self._mismatch(flight)
                    if flight.details is not None:
                        flight.details[rank] = heard.text
                elif flight.details is None:
                    text = heard.text.decode(errors="replace")
                    error = error_of(record.failure, record.origin, text)
                    self._fail(flight, error, record.failure, record.origin, text)
                flight.undisclosed.discard(rank)
            flight.undone.discard(rank)
        self._update(flight)

    def _lose_one(self, flight: Flight, rank: int, line: Line | None = None) -> None:
        """A rank of a flight is gone; under the lock."""
        if rank in flight.unposted or rank in flight.undone:
            if flight.details is None:
                text = _loss(rank, line or self._lines[rank])
                error = PeerLostError(text, peers=(rank,))
                self._fail(flight, error, records.LOST, rank, text)
            flight.undone.discard(rank)
        flight.undisclosed.discard(rank)
        self._update(flight)

    # How flights end

    def _mismatch(self, flight: Flight) -> None:
        """Tells the others what this rank asked for, and waits for the same of them."""
        if flight.is_over or flight.details is not None or flight.ask is None:
            return
        try:
            detail = flight.ask.detail()
        except Exception as error:
            detail = repr(error).encode()
        lane, number = flight.key
        record = Record(records.DETAIL, int(lane != ALL), number=number)
        flight.notice = records.with_text(record, detail)
        flight.undisclosed = {other for other in flight.others if other not in self._lost}
        flight.disclosed_until = time.monotonic() + DISCLOSURE_SECONDS
        flight.details = {self.rank: detail}
        self._tell(flight)

    def _interrupt(self, flight: Flight, error: BaseException) -> None:
        self._fail(flight, error, records.INTERRUPTED, self.rank, type(error).__name__)

    def _fail(
        self, flight: Flight, error: BaseException, failure: int, origin: int, text: str = ""
    ) -> None:
        """Ends a flight with an error, and tells the others; under the lock."""
        if flight.is_over:
            return
        lane, number = flight.key
        record = Record(records.FAIL, int(lane != ALL), failure, origin=origin, number=number)
        if not flight.is_told:
            flight.notice = records.with_text(record, text.encode())
        flight.failure = error
        self._tell(flight)
        self._end(flight)

    def _tell(self, flight: Flight) -> None:
        """Sends FAIL or DETAIL, once no thread copies for the flight."""
        if flight.notice and not flight.is_told and not flight.is_copying:
            for other in flight.others:
                self._lines[other].send_all(flight.notice)
            flight.is_told = True

    def _update(self, flight: Flight) -> None:
        """Ends a flight that has nothing left to wait for; under the lock."""
        if flight.is_over:
            if flight.is_told and not flight.undone:
                self._flights.pop(flight.key, None)
                flight.release()
        elif flight.details is not None:
            if not flight.undisclosed or time.monotonic() >= flight.disclosed_until:
                flight.failure = Mismatch(flight.details)
                self._end(flight)
        elif flight.is_arrived:
            flight.is_over = True
            self._flights.pop(flight.key, None)
            self._in_background.pop(flight.key, None)
            flight.release()
            flight.wake()

    def _end(self, flight: Flight) -> None:
        flight.is_over = True
        self._in_background.pop(flight.key, None)
        flight.wake()
        self._update(flight)

    def _expire(self, flight: Flight, deadline: float, seconds: float) -> None:
        """Fails a flight whose time has come; under the lock."""
        now = time.monotonic()
        if flight.is_over or flight.details is not None:
            self._update(flight)
        elif now >= deadline:
            absent, undone = flight.unready()
            parts = [f"{_ranks(absent)} did not come"] if absent else []
            parts += [f"{_ranks(undone)} came and did not finish"] if undone else []
            text = f"{flight.op} waited {seconds:g} s: {' and '.join(parts)}"
            error = CommunicationTimeoutError(text, peers=(*absent, *undone))
            self._fail(flight, error, records.TIMED_OUT, self.rank, text)

    # Threads that move flights on

    def _progress(self, flight: Flight, timeout: float | None) -> None:
        """Works until a flight is over; in the thread that waits for it."""
        seconds, begin = self._timeout, flight.started
        if timeout is not None and time.monotonic() + timeout < begin + seconds:
            seconds, begin = timeout, time.monotonic()
        deadline = begin + seconds
        me = threading.get_ident()
        with self._waiter() as waiter:
            try:
                flight.waiters[me] = waiter
                ready = waiter.ready(self._lines, self._lost, 0)
                while not flight.is_over:
                    if self._turn(ready) or flight.is_over:
                        ready = waiter.ready(self._lines, self._lost, 0)
                        continue
                    ready = waiter.look(self._lines, self._lost, _LOOKS)
                    if not ready:
                        until = deadline if flight.details is None else flight.disclosed_until
                        ready = waiter.ready(self._lines, self._lost, self._rest(until))
                        with self._lock:
                            self._expire(flight, deadline, seconds)
            finally:
                flight.waiters.pop(me, None)

    def _turn(self, ready: list[int]) -> bool:
        """Reads the lines that have something, and copies one part; whether it found any to copy."""
        token = object()
        try:
            with self._lock:
                for rank in ready:
                    self._read(rank)
                job = self._take(token)
            if job is None:
                return False
            flight, rank = job
            self._copy(flight, rank, token)
            with self._lock:
                self._copied(flight, rank)
        except BaseException:
            with self._lock:
                for flight in list(self._flights.values()):
                    for rank, state in flight.parts.items():
                        if state is token:
                            flight.parts[rank] = READY
                    self._tell(flight)
                    self._update(flight)
            raise
        return True

    def _take(self, token: object) -> tuple[Flight, int] | None:
        """The next part to copy, which is now this thread's."""
        for flight in self._flights.values():
            if flight.is_over or flight.details is not None:
                continue
            for rank, state in flight.parts.items():
                if state is READY:
                    flight.parts[rank] = token
                    return flight, rank
                if state is COPIED:  # interrupted before the other was told
                    return flight, rank
        return None

    def _copy(self, flight: Flight, rank: int, token: object) -> None:
        if flight.parts[rank] is not token or flight.ask is None:
            return
        try:
            place = flight.places[rank]
            if place is None:
                raise CollectiveError(f"rank {rank} has posted no outputs", peers=(rank,))
            if torch.is_grad_enabled():
                with torch.no_grad():
                    flight.ask.deliver(rank, place)
            else:
                flight.ask.deliver(rank, place)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            failure = records.MEMORY if isinstance(error, MemoryError) else records.DELIVERY
            with self._lock:
                self._fail(flight, error, failure, self.rank, text)
        flight.parts[rank] = COPIED

    def _copied(self, flight: Flight, rank: int) -> None:
        """Tells a rank that its part is there; under the lock."""
        if flight.is_over or flight.details is not None:
            self._tell(flight)
        elif flight.parts.get(rank) is COPIED:
            if rank != self.rank:
                lane, number = flight.key
                self._lines[rank].send(records.pack_done(lane != ALL, number))
            del flight.parts[rank]
        self._update(flight)

    def _rest(self, until: float) -> float:
        """How long a thread may sleep."""
        seconds = max(0.0, until - time.monotonic())
        if self._flush():
            return min(seconds, _RETRY_SECONDS)
        return seconds

    def _flush(self) -> bool:
        """Sends what is queued; whether something still is."""
        blocked = False
        for line in self._lines.values():
            if line.is_blocked:
                with self._lock:
                    line.flush()
                blocked = blocked or line.is_blocked
        return blocked

    def _waiter(self) -> _Waiting:
        return _Waiting(self)

    def _wake_background(self) -> None:
        with self._lock:
            if self._background is None and not self._is_closed:
                self._background = Background(self.work)
        if self._background is not None:
            self._background.wake()

    def work(self, waiter: Waiter) -> None:
        """One round of the background thread: works or sleeps."""
        flights = list(self._in_background.values())
        if self._foreground or not (flights or self._flush()):
            waiter.sleep()
            return
        until = min(
            (
                flight.started + self._timeout if flight.details is None else flight.disclosed_until
                for flight in flights
            ),
            default=time.monotonic() + _RETRY_SECONDS,
        )
        ready = waiter.ready(self._lines, self._lost, 0)
        if self._turn(ready):
            return
        if not self._in_background.keys() & {flight.key for flight in flights}:
            return
        ready = waiter.ready(self._lines, self._lost, self._rest(until))
        with self._lock:
            for rank in ready:
                self._read(rank)
            for flight in flights:
                self._expire(flight, flight.started + self._timeout, self._timeout)


class _Waiting:
    """A thread of the foreground, as long as it waits."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __enter__(self) -> Waiter:
        waiters = self._engine._waiters
        try:
            self._waiter = waiters.pop()
        except IndexError:
            self._waiter = Waiter()
        self._engine._foreground[threading.get_ident()] = self._waiter
        return self._waiter

    def __exit__(self, *_: object) -> None:
        engine = self._engine
        engine._foreground.pop(threading.get_ident(), None)
        engine._waiters.append(self._waiter)
        if not engine._foreground and (engine._in_background or engine._flush()):
            engine._wake_background()


def _digest(question: bytes) -> bytes:
    return hashlib.blake2b(question, digest_size=16).digest()


def _loss(rank: int, line: Line) -> str:
    return f"rank {rank} has left the group" if line.has_left else f"rank {rank} has died"


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
