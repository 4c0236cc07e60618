"""One call of an exchange by memory: what it asks for, and how far it has come.

`Ask` says what one rank wants, `Flight` is the call from its start to its end. A flight knows no
sockets: `engine.py` tells it what has happened, under the engine's lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from ..errors import CollectiveError, CommunicationTimeoutError, PeerLostError
from . import line

if TYPE_CHECKING:
    from .waiter import Waiter


class Place(NamedTuple):
    """Where the outputs of one rank stand in its segments."""

    segment: int
    offset: int


class Posted(NamedTuple):
    """Outputs in shared memory, and the place that tells the others where they are."""

    tensors: list[Tensor]
    place: Place


class Mismatch(Exception):  # noqa: N818 - the caller makes the error of it
    """The ranks of a call did not ask for the same.

    Attributes:
        details: What each rank said about its call, as far as it was heard in time.
    """

    def __init__(self, details: dict[int, bytes]) -> None:
        """Keeps the details."""
        super().__init__(f"ranks {sorted(details)} did not ask for the same")
        self.details = details


@dataclass(slots=True)
class Ask:
    """What this rank asks for in one call.

    Attributes:
        op: The name of the op, for errors.
        question: What this rank asks for, as bytes; equal bytes mean the same call.
        expects: The question that the other ranks must have.
        deliver: `deliver(rank, place)` copies this rank's part into the outputs of one target. It
            is called for each target, in any thread, under `torch.no_grad()`; again for the same
            target only after it raised KeyboardInterrupt.
        detail: A text about this call, for the table of a mismatch; called only then. It must not
            use the communicator.
        ranks: The two ranks that take part; None: all. Pairs have a call number of their own, one
            for both directions, even in a group of two.
        posted: Where the others write for this rank; None: nowhere.
        sources: The ranks that will write here; this rank itself is ignored.
        targets: The ranks that this rank writes to. Where this rank itself is among them,
            `deliver` is called for it too, with its own place.
    """

    op: str
    question: bytes
    expects: bytes
    deliver: Callable[[int, Place], None]
    detail: Callable[[], bytes]
    ranks: tuple[int, int] | None = None
    posted: Posted | None = None
    sources: Sequence[int] = ()
    targets: Sequence[int] = ()


# How far the part for one target has come. While a thread copies a part, an object of that thread
# stands in the place of these.
WAITING, READY, COPIED = "waiting", "ready", "copied"

# The lane of a call: the other rank of a pair, or this for all ranks. Each lane counts its calls.
ALL = -1
Key = tuple[int, int]


class Mover(Protocol):
    """Moves flights on: `engine.Engine`."""

    rank: int

    def wait(self, flight: Flight, timeout: float | None) -> None:
        """Moves flights on until this one is over; raises its failure."""

    def poll(self, flight: Flight) -> bool:
        """Whether a flight is over."""


class Flight:
    """One call in the air, or at its end."""

    def __init__(
        self,
        engine: Mover,
        ask: Ask,
        key: Key,
        others: Sequence[int],
        expected: bytes,
        started: float,
    ) -> None:
        """Makes a call that has heard from no rank yet.

        Args:
            engine: Moves the call on.
            ask: What this rank asks for.
            key: The lane and the number of the call.
            others: The other ranks that take part, in the order in which they are served.
            expected: The digest that the posts of the others must have.
            started: The time at which the call started.
        """
        self.engine, self.key, self.others, self.started = engine, key, others, started
        self.op, self.expected = ask.op, expected
        self.ask: Ask | None = ask
        self.is_background = False
        self.is_over = False
        self.is_told = False  # the others have heard that it failed
        self.failure: BaseException | None = None
        self.notice: list[bytes] = []  # the record that tells them
        self.unposted = set(others)  # ranks whose posts have not come
        self.places: dict[int, Place | None] = {}
        rank = engine.rank
        self.places[rank] = ask.posted.place if ask.posted is not None else None
        # Ranks whose DONE has not come. A rank stands here only as long as it may still write.
        self.undone: set[int] = set()
        targets = set(ask.targets)
        # Parts that the others were not told of. This rank's own part is copied last, while the
        # others are awaited.
        self.parts: dict[int, object] = {other: WAITING for other in others if other in targets}
        if rank in targets:
            self.parts[rank] = READY
        self.details: dict[int, bytes] | None = None  # what the ranks said, in a mismatch
        self.undisclosed: set[int] = set()  # ranks whose details have not come
        self.disclosed_until = 0.0
        self.waiters: dict[int, Waiter] = {}

    def wait(self, timeout: float | None = None) -> None:
        """Returns when this rank's outputs are complete and its inputs are free again.

        Args:
            timeout: Seconds after which the call fails on all ranks. The group's timeout, counted
                from the start of the call, ends it in any case.

        Raises:
            Mismatch: The ranks did not ask for the same.
            PeerLostError: A rank died or has left.
            CommunicationTimeoutError: A rank did not come in time.
            CollectiveError: A rank gave the call up; the message says which and why.
            ClosedError: This rank has closed the memory.
        """
        self.engine.wait(self, timeout)

    def is_completed(self) -> bool:
        """Whether the call is over, in whatever way; moves it on where nobody else does."""
        return self.engine.poll(self)

    def ends(self, deadline: float) -> float:
        """The latest time at which the call is over, if this is its deadline."""
        return deadline if self.details is None else self.disclosed_until

    @property
    def is_copying(self) -> bool:
        """Whether a thread copies a part at this moment."""
        return any(not isinstance(state, str) for state in self.parts.values())

    def release(self) -> None:
        """Lets go of inputs, and of outputs that nobody may write to any more."""
        self.ask = None
        self.parts.clear()

    def wake(self) -> None:
        """Wakes the other threads that wait for this flight."""
        me = threading.get_ident()
        for thread, waiter in list(self.waiters.items()):
            if thread != me:
                waiter.wake()


def error_of(failure: int, origin: int, text: str) -> Exception:
    """What this rank raises when another has told it that the call failed. See `Ledger.fail`."""
    if failure == line.LOST:
        return PeerLostError(text, peers=(origin,))
    if failure == line.TIMED_OUT:
        return CommunicationTimeoutError(text, peers=(origin,))
    if failure == line.CLOSED:
        return PeerLostError(
            f"rank {origin} closed its communicator during the call", peers=(origin,)
        )
    return CollectiveError(f"rank {origin} gave the call up: {text}", peers=(origin,))
