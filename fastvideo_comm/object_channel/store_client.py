"""A rank's end of the store: join, ask, wait, leave; every wait has a deadline.

No thread runs here. A call polls both of the rank's connections, so it hears of an answer, of a
lost rank and of Ctrl-C alike. An answer that comes after its call gave up is kept, and the same
question asked again finds it: no message is lost to a timeout.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from types import TracebackType

from fastvideo_comm.errors import (
    AuthenticationError,
    ClosedError,
    CommunicationError,
    CommunicationTimeoutError,
    JoinError,
    JoinTimeoutError,
    MessageExpiredError,
    PeerLostError,
)
from fastvideo_comm.object_channel.store_handshake import (
    ANSWER_BYTES,
    MAGIC,
    PROOF_BYTES,
    PROTOCOL_VERSION,
    SESSION_BYTES,
    Greeting,
    is_proof,
    link_key,
    make_hello,
    make_proof,
)
from fastvideo_comm.object_channel.store_link import Buffer, Frame, FrameError, Kind, Link
from fastvideo_comm.object_channel.store_messages import JoinRequest, pack_join, unpack_text
from fastvideo_comm.object_channel.store_sockets import (
    Heartbeat,
    call_after_fork,
    connect,
    receive_exactly,
    seconds_left,
    to_milliseconds,
)

# A call that ran out of time may ask for this long who is missing; a join for longer, as nothing
# else tells it.
_ASK_SECONDS = 0.3
_GIVE_UP_SECONDS = 0.8
_LEAVE_SECONDS = 5.0


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
            JoinError: The store refuses this rank, or is something else.
            JoinTimeoutError: Not every rank joined until the deadline, of this rank or another.
        """
        self._lock = threading.Lock()
        self._requests = 0
        self._answers: dict[int, Frame] = {}
        self._asked: dict[tuple[Kind, bytes], int] = {}
        self._questions: dict[int, tuple[Kind, bytes]] = {}  # the same the other way round
        self._error: CommunicationError | None = None
        self._links: list[Link] = []
        self._poll = select.poll()
        self.session = b""
        call_after_fork(self._abandon_in_child)
        try:
            self._open(host, port, secret, max_body_bytes, deadline)
            token = self._first(self._ask_now(Kind.JOIN, pack_join(join), 0), deadline)
            self._open(host, port, secret, max_body_bytes, deadline)
            heartbeat.apply(self._links[1].sock)
            second = join._replace(is_lifeline=True, token=token)
            self._first(self._ask_now(Kind.JOIN, pack_join(second), 1), deadline)
        except PeerLostError as error:
            self._close()
            raise JoinError(f"rank 0 ended the join: {error}", peers=(0,)) from None
        except BaseException:
            self._close()
            raise

    def _open(
        self, host: str, port: int, secret: bytes | None, max_body_bytes: int, deadline: float
    ) -> None:
        sock = connect(host, port, deadline)
        try:
            key, self.session = _shake_hands(sock, secret, deadline)
            self._links.append(Link(sock, max_body_bytes, key, of_store=False))
            self._poll.register(sock, select.POLLIN)
        except TimeoutError:
            sock.close()
            raise JoinTimeoutError(f"what listens on {host} port {port} does not answer") from None
        except (EOFError, OSError) as error:
            sock.close()
            raise JoinError(f"what listens on {host} port {port} hung up: {error}") from None
        except BaseException:
            sock.close()
            raise

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
            raise CommunicationTimeoutError("another thread is using this group")
        try:
            if self._answers and self._error is None:
                self._hear(0)  # a call that finds its answer here would not listen
            self._check()
        except BaseException:
            self._lock.release()
            raise

    def end_turn(self) -> None:
        """Give the connections back."""
        self._lock.release()

    def ask(self, kind: Kind, meta: bytes = b"", parts: Sequence[Buffer] = ()) -> int:
        """Begin a request and return its id for `wait`."""
        return self._ask_now(kind, meta, 0, parts)

    def ask_once(self, kind: Kind, meta: bytes) -> int:
        """Like `ask`, but an equal request that still waits for its answer is taken up again."""
        ident = self._asked.get((kind, meta))
        if ident is None:
            ident = self._asked[kind, meta] = self._ask_now(kind, meta, 0)
            self._questions[ident] = kind, meta
        return ident

    def wait(self, idents: Iterable[int], deadline: float) -> list[int]:
        """Wait for the answers to these requests and return the ids that have none yet.

        Raises:
            PeerLostError: A rank is gone.
        """
        waiting = list(idents)
        while True:
            waiting = [ident for ident in waiting if ident not in self._answers]
            if not waiting:
                return waiting
            left = seconds_left(deadline)
            if not left:
                self.own_unsent()
                return waiting
            try:
                self._hear(to_milliseconds(left))
            except BaseException:
                self.own_unsent()
                raise
            self._check()

    def take(self, ident: int) -> Frame:
        """Return the answer to a request, once.

        Raises:
            MessageExpiredError: The message was removed unread.
            PeerLostError: The rank that would have to act has left, or one is gone.
            JoinError: The store refuses, JoinTimeoutError if that is because ranks are missing.
        """
        frame = self._answers.pop(ident)
        question = self._questions.pop(ident, None)
        if question is not None:
            del self._asked[question]
        if frame.kind == Kind.OK:
            return frame
        if frame.kind == Kind.EXPIRED:
            raise MessageExpiredError("the message expired unread")
        peers, text = unpack_text(frame.meta)
        if frame.kind == Kind.LEFT:
            raise PeerLostError(f"rank(s) {list(peers)} left the group", peers=peers)
        if frame.kind == Kind.REFUSED:
            raise JoinTimeoutError(text, peers=peers) if peers else JoinError(text)
        raise self._lose(peers, text)

    def forget(self, ident: int) -> None:
        """Give a request up: its answer, when it comes, means nothing to anybody."""
        self._answers.pop(ident, None)

    def refuse(self, error: CommunicationError) -> None:
        """Raise this error, now and in every later call."""
        self._error = error
        raise error

    def own_unsent(self) -> None:
        """Copy what could not be sent yet, so that the caller may change its objects."""
        for link in self._links:
            link.own_unsent()

    def missing(self, group: bytes) -> tuple[int, ...]:
        """Return the ranks that a group's barrier waits for; none where the store is silent."""
        with contextlib.suppress(CommunicationError):
            ident = self._ask_now(Kind.MISSING, group, 0)
            if not self.wait([ident], time.monotonic() + _ASK_SECONDS):
                return unpack_text(self.take(ident).meta)[0]
        return ()

    def leave(self, seconds: float = _LEAVE_SECONDS) -> None:
        """Say goodbye, wait up to `seconds`, at most 5, for the store to hear it, and close."""
        seconds = min(seconds, _LEAVE_SECONDS)
        if not self._lock.acquire(timeout=seconds):
            return  # another thread is in a call; its own end closes the group
        try:
            if self._error is None and self._links:
                with contextlib.suppress(CommunicationError):
                    ident = self._ask_now(Kind.LEAVE, b"", 0)
                    self.wait([ident], time.monotonic() + seconds)
            self._close()
            self._error = ClosedError("the group is closed")
        finally:
            self._lock.release()

    def _abandon_in_child(self) -> None:
        """In a forked child: close its copies, or a rank that dies would seem to be alive."""
        self._lock = threading.Lock()
        self._close()
        self._error = ClosedError("the group belongs to the process that created it")

    def _close(self) -> None:
        for link in self._links:
            link.sock.close()
        self._links = []

    def _check(self) -> None:
        if self._error is not None:
            # A new one each time: an exception that is raised twice grows its traceback.
            raise type(self._error)(str(self._error), peers=self._error.peers)

    def _ask_now(
        self, kind: Kind, meta: bytes, link_index: int, parts: Sequence[Buffer] = ()
    ) -> int:
        self._requests = ident = self._requests % 0xFFFFFFFF + 1
        self._links[link_index].queue(kind, ident, meta, parts)
        return ident

    def _first(self, ident: int, deadline: float) -> bytes:
        if self.wait([ident], deadline):
            # The store then answers every rank that waits to join, this one included.
            self._ask_now(Kind.GIVE_UP, b"", 0)
            if self.wait([ident], time.monotonic() + _GIVE_UP_SECONDS):
                raise JoinTimeoutError("not every rank joined, and the store does not answer")
        return self.take(ident).meta

    def _hear(self, milliseconds: int) -> None:
        """Send what can be sent, then wait for something to arrive and take it in."""
        try:
            for link in self._links:
                if link.has_unsent:
                    events = select.POLLIN if link.flush() else select.POLLIN | select.POLLOUT
                    self._poll.modify(link.sock, events)
            ready = {number for number, _events in self._poll.poll(milliseconds)}
            # The lifeline first: it says who is lost, the other one only that it is closed.
            for link in reversed(self._links):
                if link.sock.fileno() in ready:
                    for frame in link.read():
                        self._take_in(frame)
        except (EOFError, FrameError, OSError) as error:
            if self._error is None:
                self._hear_last_words()
            if self._error is None:
                self._lose((0,), f"the connection to the store ended: {error}")

    def _hear_last_words(self) -> None:
        with contextlib.suppress(EOFError, FrameError, OSError, IndexError):
            for frame in self._links[1].read():
                self._take_in(frame)

    def _take_in(self, frame: Frame) -> None:
        if frame.kind == Kind.LOST:
            self._lose(*unpack_text(frame.meta))
        else:
            self._answers[frame.ident] = frame

    def _lose(self, peers: tuple[int, ...], reason: str) -> CommunicationError:
        if self._error is None:
            text = f"rank(s) {list(peers)} died" + (f" ({reason})" if reason else "")
            self._error = PeerLostError(text, peers=peers)
        return self._error


class ClientTurn:
    """`StoreClient.begin_turn` and `end_turn` as a context manager."""

    __slots__ = ("_client", "_deadline")

    def __init__(self, client: StoreClient, deadline: float) -> None:
        """Take nothing yet."""
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


def _shake_hands(
    sock: socket.socket, secret: bytes | None, deadline: float
) -> tuple[bytes | None, bytes]:
    """Return the key of the connection and the store's session."""
    hello = make_hello(secret)
    sock.sendall(hello)
    answer = receive_exactly(sock, len(MAGIC), deadline)
    if answer != MAGIC:
        raise JoinError("what listens there is not a fastvideo_comm store")
    answer += receive_exactly(sock, ANSWER_BYTES - len(MAGIC), deadline)
    store = Greeting.parse(answer)
    if store.version != PROTOCOL_VERSION:
        raise JoinError(
            f"the store speaks protocol version {store.version}, this rank {PROTOCOL_VERSION}"
        )
    if store.has_secret != (secret is not None):
        ours, theirs = ("a", "no") if secret is not None else ("no", "a")
        raise AuthenticationError(f"this rank was given {ours} secret, the store {theirs} secret")
    exchange = hello + answer
    sock.sendall(make_proof(secret, b"rank", exchange))
    proof = receive_exactly(sock, PROOF_BYTES, deadline)
    if not is_proof(proof, secret, b"store", exchange):
        raise AuthenticationError("the store must hold the same secret as this rank")
    return link_key(secret, exchange), answer[-SESSION_BYTES:]
