"""The threads that move flights on: they read the lines and copy parts.

One lock guards all state and is never held during a copy. Every thread that waits also works: it
reads what has come, and copies the next part that is ready, for whichever flight. A daemon thread
does the same for flights that were started in the background, while no other thread waits.

Before a thread copies a part, it puts an object of its own in the place of the part's state. So an
interrupt in the middle of the copy can be undone: the part is ready again, and is copied again.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
import time
from collections.abc import Callable, Sequence

import torch

from ..errors import ClosedError, CollectiveError
from . import line as records
from .flight import COPIED, READY, Ask, Flight
from .ledger import Ledger
from .line import Line, Record
from .waiter import Background, Waiter

# A queue that a socket did not take is tried again after this time.
_RETRY_SECONDS = 0.002
# How often a thread looks for messages before it sleeps.
_LOOKS = 60


class Engine:
    """The threads that work on one rank's ledger."""

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
            name: The name of the group in errors.
            add_segment: Called for each segment with its rank, its record and its descriptor.
        """
        self.rank = rank
        self._lines = lines
        self._timeout = timeout
        self._name = name
        self._ledger = Ledger(rank, lines, add_segment)
        self._digest = functools.lru_cache(4096)(_digest)
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._is_closed = False
        self._is_interrupted = False  # True: inboxes may hold unhandled messages
        self._foreground: dict[int, Waiter] = {}  # by thread
        # Waiters that no thread uses. One is made here: later there may be no descriptor for it.
        self._waiters = [Waiter()]
        self._background: Background | None = None

    def check(self) -> None:
        """Raises if this memory was closed, or belongs to another process."""
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
        self.check()  # before the lock, which may be locked for ever in a forked child
        ledger = self._ledger
        lane, others = ledger.lane(ask.ranks)
        digest, expected = self._digest(ask.question), self._digest(ask.expects)
        with self._lock:
            self.check()
            key = (lane, ledger.next_numbers[lane])
            flight = Flight(self, ask, key, others, expected, time.monotonic())
            try:
                ledger.post(flight, ask, digest)
                if background and not flight.is_over:
                    flight.is_background = True
                    ledger.in_background[key] = flight
            except BaseException as error:
                if ledger.flights.get(key) is flight:
                    ledger.next_numbers[lane] = key[1] + 1
                    ledger.interrupt(flight, error)
                raise
        if background:
            self._wake_background()
        return flight

    def fail_next(self, failure: int, text: bytes, ranks: tuple[int, int] | None) -> None:
        """Uses up the number of the next call, and tells the others that it fails."""
        self.check()
        with self._lock:
            self.check()
            self._ledger.fail_next(failure, text, ranks)
        self._leave()

    def wait(self, flight: Flight, timeout: float | None) -> None:
        """Moves flights on until this one is over."""
        if not flight.is_over:
            self.check()
            try:
                with torch.no_grad():
                    self._progress(flight, timeout)
            except BaseException as error:
                with self._lock:
                    self._ledger.interrupt(flight, error)
                self._leave()
                raise
        if flight.failure is not None:
            raise flight.failure

    def poll(self, flight: Flight) -> bool:
        """Whether a flight is over; moves flights on as far as that needs no waiting."""
        if not flight.is_over and not flight.is_background:
            self.check()
            waiter, lines, lost = Waiter(), self._lines, self._ledger.lost
            ready = waiter.ready(lines, lost, 0)
            with torch.no_grad():
                self._turn(ready)
                while not flight.is_over and (ready := waiter.ready(lines, lost, 0)):
                    self._turn(ready)
        return flight.is_over

    def close(self) -> None:
        """Fails flights in the air, says BYE, closes the lines; does nothing in a forked child."""
        if os.getpid() != self._process:
            return
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            for flight in list(self._ledger.flights.values()):
                text = f"the communicator {self._name!r} was destroyed during the call"
                self._ledger.fail(flight, ClosedError(text), records.CLOSED, self.rank, text)
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
                line.send_all([Record(records.BYE).pack()])
                line.close()
            self._ledger.flights.clear()
            self._waiters.clear()

    def forget(self) -> None:
        """Closes the lines of a forked child; the parent's stay as they are.

        While the child has them open, the other ranks would not see the parent die.
        """
        for line in self._lines.values():
            line.close()

    def work(self, waiter: Waiter) -> None:
        """One round of the background thread: it works, or it sleeps."""
        in_background = self._ledger.in_background
        if self._foreground or not (in_background or self._flush()):
            waiter.sleep()
            return
        self._turn(waiter.ready(self._lines, self._ledger.lost, 0))
        if self._is_closed:
            return
        # No flight is held here during the sleep: the error of one that failed holds its outputs.
        ends = [flight.ends(flight.started + self._timeout) for flight in [*in_background.values()]]
        seconds = min(ends, default=time.monotonic() + _RETRY_SECONDS) - time.monotonic()
        ready = waiter.ready(self._lines, self._ledger.lost, self._rest(seconds))
        # A thread that reads must also copy: another thread may sleep and not see what was read.
        self._turn(ready)
        with self._lock:
            for flight in [*in_background.values()]:
                self._ledger.expire(flight, flight.started + self._timeout, self._timeout)

    def _progress(self, flight: Flight, timeout: float | None) -> None:
        """Works until a flight is over; in the thread that waits for it."""
        seconds, begin = self._timeout, flight.started
        if timeout is not None and time.monotonic() + timeout < begin + seconds:
            seconds, begin = timeout, time.monotonic()
        deadline = begin + seconds
        lines, lost = self._lines, self._ledger.lost
        me = threading.get_ident()
        waiter = self._waiters.pop() if self._waiters else Waiter()
        try:
            flight.waiters[me] = self._foreground[me] = waiter
            ready = waiter.ready(lines, lost, 0)
            while not flight.is_over:
                self._turn(ready)
                if flight.is_over:
                    break
                ready = waiter.look(lines, lost, _LOOKS)
                # The look may have used up the wake of a thread that has ended the flight.
                if not (ready or flight.is_over):
                    seconds_left = flight.ends(deadline) - time.monotonic()
                    ready = waiter.ready(lines, lost, self._rest(seconds_left))
                    if not ready:
                        with self._lock:
                            self._ledger.expire(flight, deadline, seconds)
        finally:
            flight.waiters.pop(me, None)
            self._waiters.append(waiter)
            self._leave()

    def _leave(self) -> None:
        """Leaves the rest of the work of a thread that waited to the background thread."""
        self._foreground.pop(threading.get_ident(), None)
        if not self._foreground and (self._ledger.in_background or self._flush()):
            self._wake_background()

    def _turn(self, ready: Sequence[int]) -> None:
        """Reads one message of each line that is ready, and copies parts until none is ready."""
        token = object()
        job: tuple[Flight, int] | None = None
        ledger = self._ledger
        try:
            while True:
                with self._lock:
                    if job is not None:
                        ledger.copied(*job)
                    for rank in ledger.others if self._is_interrupted else ready:
                        ledger.read(rank)
                    self._is_interrupted = False
                    job = self._take(token)
                if job is None:
                    return
                self._copy(*job, token)
                ready = ()
        except BaseException:
            with self._lock:
                self._is_interrupted = True
                for flight in list(ledger.flights.values()):
                    for rank, state in flight.parts.items():
                        if state is token:
                            flight.parts[rank] = READY
                    ledger.tell(flight)
                    ledger.update(flight)
                waiters = list(self._foreground.values())
            for other in waiters:  # one of them copies what this thread has left
                other.wake()
            raise

    def _take(self, token: object) -> tuple[Flight, int] | None:
        """Takes the next part to copy for this thread."""
        for flight in self._ledger.flights.values():
            if flight.is_over or flight.details is not None:
                continue
            for rank, state in flight.parts.items():
                if state is READY:
                    flight.parts[rank] = token
                    return flight, rank
                if state is COPIED:  # an interrupt came before the other was told
                    return flight, rank
        return None

    def _copy(self, flight: Flight, rank: int, token: object) -> None:
        ask = flight.ask
        if flight.parts.get(rank) is not token or ask is None:
            return
        try:
            place = flight.places[rank]
            if place is None:
                raise CollectiveError(f"rank {rank} has posted no outputs", peers=(rank,))
            ask.deliver(rank, place)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            failure = records.MEMORY if isinstance(error, MemoryError) else records.DELIVERY
            with self._lock:
                self._ledger.fail(flight, error, failure, self.rank, text)
        flight.parts[rank] = COPIED

    def _rest(self, seconds: float) -> float:
        """How long a thread may sleep: shorter where a queue is to be sent."""
        seconds = max(0.0, seconds)
        return min(seconds, _RETRY_SECONDS) if self._flush() else seconds

    def _flush(self) -> bool:
        """Sends what is queued; returns whether something is queued still."""
        blocked = False
        for line in self._lines.values():
            if line.is_blocked:
                with self._lock:
                    line.flush()
                blocked = blocked or line.is_blocked
        return blocked

    def _is_copying(self) -> bool:
        with self._lock:
            return any(flight.is_copying for flight in self._ledger.flights.values())

    def _wake_background(self) -> None:
        with self._lock:
            if self._background is None and not self._is_closed:
                self._background = Background(self.work)
        if self._background is not None:
            self._background.wake()


def _digest(question: bytes) -> bytes:
    return hashlib.blake2b(question, digest_size=16).digest()
