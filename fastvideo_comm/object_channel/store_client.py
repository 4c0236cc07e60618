"""A rank's end of the store: join, ask, wait, leave; every wait has a deadline.

This module starts no thread. A call polls both connections of the rank. So an answer, a lost rank,
`leave` in another thread and Ctrl-C all end its wait. An answer that comes after its call gave up
is kept, and the same request finds it later. So no message is lost to a timeout.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TypeVar

from fastvideo_comm.errors import (
    ClosedError,
    CommunicationError,
    CommunicationTimeoutError,
    JoinError,
    JoinTimeoutError,
    PeerLostError,
)
from fastvideo_comm.object_channel.store_answers import Answers
from fastvideo_comm.object_channel.store_handshake import shake_hands
from fastvideo_comm.object_channel.store_link import Buffer, Frame, FrameError, Kind, Link
from fastvideo_comm.object_channel.store_link_pair import CUT, LinkPair
from fastvideo_comm.object_channel.store_messages import JoinRequest, pack_join, unpack_text
from fastvideo_comm.object_channel.store_sockets import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    Heartbeat,
    call_after_fork,
    connect,
    seconds_left,
    to_milliseconds,
)

# After its timeout, a call may ask for this long which ranks are missing. A join may ask for
# longer, because nothing else names the missing ranks.
_ASK_SECONDS = 0.3
_GIVE_UP_SECONDS = 0.8
_LEAVE_SECONDS = 5.0

_T = TypeVar("_T")


class StoreClient:
    """The two connections of one rank; `turn` gives them to one thread at a time."""

    def __init__(
        self,
        host: str,
        port: int,
        join: JoinRequest,
        secret: bytes | None,
        max_body_bytes: int,
        heartbeat: Heartbeat,
        deadline: float,
    ) -> None:
        """Connect, authenticate and join; returns when every rank has joined.

        Raises:
            AuthenticationError: The store does not hold the same secret.
            JoinError: The store refuses this rank, or another program listens there.
            JoinTimeoutError: Not every rank joined until the deadline, of this rank or another.
        """
        self._lock = threading.Lock()
        self._holder: int | None = None  # the thread that has the turn
        self._answers = Answers()
        self._error: CommunicationError | None = None
        self._is_cut = False  # a connection ended without a reason
        self._was_there = False  # the store has answered
        self._owes_goodbye = self._leaves_late = False
        self._pair = LinkPair(self._take_in)
        self.session = b""
        call_after_fork(self._abandon_in_child)
        open_link = functools.partial(self._open, host, port, secret, max_body_bytes, deadline)
        try:
            self._join(open_link, join, heartbeat, deadline)
        except BaseException:
            self._pair.close()
            raise

    def _join(
        self,
        open_link: Callable[[], socket.socket],
        join: JoinRequest,
        heartbeat: Heartbeat,
        deadline: float,
    ) -> None:
        """Join; if the store hangs up before it has answered, try again until the deadline.

        A store with many strangers at its port hangs up on ranks as well.
        """
        pause = FIRST_PAUSE
        while True:
            try:
                open_link()
                token = self._first(self._ask_now(Kind.JOIN, pack_join(join), 0), deadline)
                self._was_there = True
                heartbeat.apply(open_link())
                second = join._replace(is_lifeline=True, token=token)
                self._first(self._ask_now(Kind.JOIN, pack_join(second), 1), deadline)
                return
            except PeerLostError as error:
                if not self._is_cut:
                    raise JoinError(str(error), peers=error.peers) from None
                time.sleep(min(pause, seconds_left(deadline)))
                if not seconds_left(deadline):
                    text = f"rank 0 ended the join: {error}"
                    raise JoinTimeoutError(text, peers=(0,)) from None
            self._pair.close_links()
            self._error, self._is_cut = None, False
            pause = min(2 * pause, LONGEST_PAUSE)

    def _open(
        self, host: str, port: int, secret: bytes | None, max_body_bytes: int, deadline: float
    ) -> socket.socket:
        sock = connect(host, port, deadline, was_there=self._was_there)
        try:
            key, self.session = shake_hands(sock, secret, deadline)
            self._pair.add(Link(sock, max_body_bytes, key, of_store=False))
        except CommunicationError:  # before those below: some of them are OSErrors as well
            sock.close()
            raise
        except TimeoutError:
            sock.close()
            raise JoinTimeoutError(f"what listens on {host} port {port} does not answer") from None
        except (EOFError, OSError) as error:
            sock.close()
            self._is_cut = True
            raise PeerLostError(f"what listens on {host} port {port} hung up: {error}") from None
        except BaseException:
            sock.close()
            raise
        return sock

    def turn(self, deadline: float) -> ClientTurn:
        """Hold the connections, in a `with`.

        Raises:
            CommunicationTimeoutError: Another thread held them until the deadline.
            PeerLostError: A rank is gone, now or since an earlier call.
            ClosedError: `leave` was called.
        """
        return ClientTurn(self, deadline)

    def begin_turn(self, deadline: float) -> None:
        """Take the connections; `end_turn` gives them back. See `turn`."""
        if not self._lock.acquire(timeout=seconds_left(deadline)):
            self._check()
            raise CommunicationTimeoutError("another thread is using this group")
        self._holder = threading.get_ident()
        try:
            if self._answers and self._error is None:
                self._hear(0)  # a call whose answer is kept would not hear of a loss
            self._check()
        except BaseException:
            self.end_turn()
            raise

    def end_turn(self) -> None:
        """Give the connections back."""
        self._holder = None
        self._lock.release()
        if self._leaves_late:
            self.leave()

    def ask(self, kind: Kind, meta: bytes = b"", parts: Sequence[Buffer] = ()) -> int:
        """Begin a request and return its id for `wait`."""
        return self._ask_now(kind, meta, 0, parts)

    @property
    def num_requests(self) -> int:
        """How many requests have begun; see `LinkPair.num_requests`."""
        return self._pair.num_requests

    def ask_once(self, kind: Kind, meta: bytes) -> int:
        """Like `ask`, but an equal request that still waits for its answer is taken up again."""
        ident = self._answers.find(kind, meta)
        if ident is None:
            ident = self._answers.begin()
            num_requests = self.num_requests
            try:
                self._answers.remember(ident, kind, meta)
                self._pair.queue(0, kind, ident, meta, ())
            finally:
                if self.num_requests == num_requests:  # an interrupt came first
                    self._answers.forget(ident)
        return ident

    def wait(self, idents: Iterable[int], deadline: float) -> list[int]:
        """Wait for the answers to these requests and return the ids that have none yet.

        Raises:
            CommunicationError: One of the answers is a refusal, see `Answers.raise_failure`; the
                other answers are kept. Or the group is closed.
            PeerLostError: A rank is gone.
        """
        idents = list(idents)
        try:
            while True:
                self._parsed(lambda: self._answers.raise_failure(idents))
                waiting = self._answers.missing(idents)
                left = seconds_left(deadline)
                if not waiting:
                    return waiting
                if not left:
                    self.own_unsent()
                    return waiting
                self._hear(to_milliseconds(left))
                self._check()
        except BaseException:
            self.own_unsent()
            raise

    def take(self, idents: Sequence[int]) -> list[Frame]:
        """Return the answers to these requests, once; all of them, or none and an error.

        Raises:
            CommunicationError: See `wait`.
        """
        return self._parsed(lambda: self._answers.take(idents))

    def answers(self, idents: Sequence[int]) -> list[Frame]:
        """As `take`, and keep the answers until `forget_question`."""
        return self._parsed(lambda: self._answers.all_of(idents))

    def forget_question(self, kind: Kind, meta: bytes) -> None:
        """Give up the request that `ask_once` began with this kind and meta."""
        ident = self._answers.find(kind, meta)
        if ident is not None:
            self._answers.forget(ident)

    def read(self, ident: int, parse: Callable[[Frame], _T]) -> _T:
        """Take the answer to a request and return what `parse` makes of it."""
        (frame,) = self.take([ident])
        return self._parsed(lambda: parse(frame))

    def forget(self, ident: int) -> None:
        """Give a request up: its answer is dropped, now or when it comes."""
        self._answers.forget(ident)

    def refuse(self, error: CommunicationError) -> None:
        """Raise this error, now and in every later call."""
        self._error = error
        raise error

    def own_unsent(self) -> None:
        """Copy what could not be sent yet, so that the caller may change its objects."""
        self._pair.own_unsent()

    def missing(self, group: bytes) -> tuple[int, ...]:
        """Return the ranks that a group's barrier waits for; none where the store is silent."""
        with contextlib.suppress(CommunicationError):
            ident = self._ask_now(Kind.MISSING, group, 0)
            if not self.wait([ident], time.monotonic() + _ASK_SECONDS):
                return self.read(ident, lambda frame: unpack_text(frame.meta))[0]
            self.forget(ident)
        return ()

    def leave(self, seconds: float = _LEAVE_SECONDS) -> bool:
        """Say goodbye, wait up to `seconds`, at most 5, for the store to hear it, and close.

        A call of another thread ends with ClosedError. If a signal handler calls `leave`, the call
        that the handler interrupted ends with ClosedError as well.

        Returns:
            False if the goodbye is left to the call that a signal handler interrupted: it was in
            the middle of a transfer, and ends when the handler returns.
        """
        deadline = time.monotonic() + min(seconds, _LEAVE_SECONDS)
        if self._error is None:
            self._owes_goodbye = True
            self._error = ClosedError("the group is closed")
        self._pair.wake()
        is_inside = self._holder == threading.get_ident()
        if not is_inside and not self._lock.acquire(timeout=seconds_left(deadline)):
            self._leaves_late = True  # when the call that has the turn ends
            return True
        self._leaves_late = is_inside and self._pair.is_busy
        if self._leaves_late:
            return False
        try:
            if self._owes_goodbye and self._pair.is_open:
                self._owes_goodbye = False
                self._say_goodbye(deadline)
            self._pair.close()
            self._error = ClosedError("the group is closed")
            return True
        finally:
            if not is_inside:
                self._lock.release()

    def _say_goodbye(self, deadline: float) -> None:
        self._pair.ignore_alarm()
        ident = self._ask_now(Kind.LEAVE, b"", 0)
        while self._answers.missing([ident]) and (left := seconds_left(deadline)):
            if not self._hear(to_milliseconds(left)):
                return

    def _abandon_in_child(self) -> None:
        """Close a forked child's copies: while they are open, a dead rank seems to be alive."""
        self._lock = threading.Lock()
        self._pair.close()
        self._error = ClosedError("the group belongs to the process that created it")

    def _check(self) -> None:
        if self._error is not None:
            # A new exception each time: the traceback of one that is raised again would grow.
            raise type(self._error)(str(self._error), peers=self._error.peers)

    def _ask_now(
        self, kind: Kind, meta: bytes, link_index: int, parts: Sequence[Buffer] = ()
    ) -> int:
        ident = self._answers.begin()
        self._pair.queue(link_index, kind, ident, meta, parts)
        return ident

    def _first(self, ident: int, deadline: float) -> bytes:
        if self.wait([ident], deadline):
            # The store then answers every rank that waits to join, this one included.
            self._ask_now(Kind.GIVE_UP, b"", 0)
            if self.wait([ident], time.monotonic() + _GIVE_UP_SECONDS):
                raise JoinTimeoutError("not every rank joined, and the store does not answer")
        return self.take([ident])[0].meta

    def _parsed(self, act: Callable[[], _T]) -> _T:
        """Return what `act` makes of an answer; a malformed answer ends the group."""
        try:
            return act()
        except FrameError as error:
            raise self._lose((0,), f"it broke the protocol: {error}") from None

    def _hear(self, milliseconds: int) -> bool:
        """Send what can be sent, then wait for something to arrive; False if a connection ended."""
        try:
            self._pair.hear(milliseconds)
        except CUT as error:
            if self._error is None:
                self._pair.hear_last_words(lambda: self._error is not None)
            if self._error is None:
                self._is_cut = True
                self._lose((0,), f"the connection to the store ended: {error}")
            return False
        return True

    def _take_in(self, frame: Frame) -> None:
        if frame.kind == Kind.LOST:
            self._lose(*unpack_text(frame.meta))
        else:
            self._answers.put(frame)

    def _lose(self, peers: tuple[int, ...], reason: str) -> CommunicationError:
        if self._error is None:
            text = f"rank(s) {list(peers)} died" + (f" ({reason})" if reason else "")
            self._error = PeerLostError(text, peers=peers)
        return self._error


class ClientTurn:
    """`StoreClient.begin_turn` and `end_turn` as a context manager."""

    __slots__ = ("_client", "_deadline")

    def __init__(self, client: StoreClient, deadline: float) -> None:
        """Prepare the turn; `__enter__` takes it."""
        self._client = client
        self._deadline = deadline

    def __enter__(self) -> None:
        """Begin the turn."""
        self._client.begin_turn(self._deadline)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End it."""
        self._client.end_turn()
