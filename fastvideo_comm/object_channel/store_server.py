"""The store's server: one thread, one selector, in the process of rank 0.

Every rank holds two connections. Requests and messages travel on the first. The second, the
lifeline, carries next to nothing, so that the kernels on both ends keep it alive: they answer TCP
keep-alive probes for a process that is busy or stopped, close it when the process dies, and give up
on it when the machine or the way to it is gone. That is how a dead rank is told from a slow one,
with no thread in the ranks, and the news travels on it without queueing behind large messages.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing import util as process_exit
from typing import NamedTuple

from fastvideo_comm.object_channel.store_handshake import (
    SESSION_BYTES,
    HandshakeError,
    ServerHandshake,
)
from fastvideo_comm.object_channel.store_link import Buffer, Frame, FrameError, Kind, Link
from fastvideo_comm.object_channel.store_mailbox import Mailbox, Waiter
from fastvideo_comm.object_channel.store_messages import (
    TOKEN_BYTES,
    JoinRequest,
    pack_text,
    unpack_address,
    unpack_join,
    unpack_number,
)
from fastvideo_comm.object_channel.store_sockets import Heartbeat, call_after_fork, describe_peer

_HANDSHAKE_SECONDS = 10.0
_MAX_STRANGERS = 128
_MAX_NOTES = 8


class ServerSettings(NamedTuple):
    """What the server is told by rank 0.

    Attributes:
        world_size: How many ranks join.
        secret: Shared by all ranks, or None.
        settings: The `key=value` words that every rank must repeat.
        max_body_bytes: The largest sealed message.
        heartbeat: Of the lifelines.
    """

    world_size: int
    secret: bytes | None
    settings: str
    max_body_bytes: int
    heartbeat: Heartbeat


class _Connection:
    """One accepted socket: a stranger, then a rank's first connection or its lifeline."""

    __slots__ = ("handshake", "is_stuck", "link", "rank", "sock", "waiter")

    def __init__(self, sock: socket.socket, handshake: ServerHandshake) -> None:
        self.sock = sock
        self.handshake = handshake
        self.link: Link | None = None
        self.is_stuck = False  # bytes wait for the socket
        self.rank: int | None = None
        self.waiter: Waiter | None = None  # of a lifeline, until all have joined


class _Member:
    """A rank that has joined."""

    __slots__ = ("connection", "has_left", "lifeline", "token")

    def __init__(self, connection: _Connection) -> None:
        self.connection = connection
        self.token = os.urandom(TOKEN_BYTES)
        self.lifeline: _Connection | None = None
        self.has_left = False


class StoreServer:
    """Accepts ranks, keeps their messages, and tells them when one is gone.

    The thread ends by itself when every rank has left, or when one is lost and rank 0 has left; a
    process that exits earlier waits for that, at most `EXIT_LINGER_SECONDS`.
    """

    EXIT_LINGER_SECONDS = 30.0

    def __init__(self, listener: socket.socket, settings: ServerSettings) -> None:
        """Serve on a listening socket, which the server owns from now on."""
        self.session = os.urandom(SESSION_BYTES)
        self._settings = settings
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._alarm, self._alarm_end = socket.socketpair()
        self._members: dict[int, _Member] = {}
        self._connections: set[_Connection] = set()
        self._strangers: dict[_Connection, float] = {}  # and until when each may take
        self._mailbox = Mailbox(settings.world_size, self._answer)
        self._joined = False
        self._failure: bytes | None = None
        self._lost: bytes | None = None
        self._notes: list[str] = []
        self._stopping = False
        self._over = False
        self._handlers: dict[int, Callable[[Waiter, Frame], None]] = {
            Kind.SEND: lambda w, f: self._mailbox.send(w, *unpack_address(f.meta), f.body),
            Kind.RECV: lambda w, f: self._mailbox.receive(w, *unpack_address(f.meta)),
            Kind.EXPIRE: lambda w, f: self._mailbox.expire(w, *unpack_address(f.meta)),
            Kind.BARRIER: lambda w, f: self._mailbox.barrier(w, *unpack_number(f.meta)),
            Kind.MISSING: lambda w, f: self._mailbox.missing(w, f.meta),
            Kind.SET: lambda w, f: self._mailbox.set(w, *unpack_number(f.meta), f.body),
            Kind.GET: lambda w, f: self._mailbox.get(w, f.meta, Kind.GET),
            Kind.WAIT: lambda w, f: self._mailbox.get(w, f.meta, Kind.WAIT),
            Kind.ADD: lambda w, f: self._mailbox.add(w, *unpack_number(f.meta)[::-1]),
            Kind.DELETE: lambda w, f: self._mailbox.delete(w, f.meta),
            Kind.CHECK: lambda w, f: self._mailbox.check(w, f.meta),
            Kind.COUNT: lambda w, _: self._answer(
                w, Kind.OK, str(self._mailbox.num_keys()).encode(), b""
            ),
        }
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._alarm_end, selectors.EVENT_READ, self._hear_alarm)
        self._thread = threading.Thread(
            target=self._serve, name="fastvideo_comm store", daemon=True
        )
        self._at_exit = process_exit.Finalize(
            None, self.stop, args=(self.EXIT_LINGER_SECONDS,), exitpriority=0
        )
        call_after_fork(self._abandon)
        self._thread.start()

    def stop(self, linger: float = 0.0) -> None:
        """Wait up to `linger` seconds until all ranks have left, then close every connection."""
        self._thread.join(linger)
        self._stopping = True
        with contextlib.suppress(OSError):
            self._alarm.send(b"!")
        self._thread.join()

    def _abandon(self) -> None:
        """In a forked child: close its copies, or a rank that dies would seem to be alive."""
        self._at_exit.cancel()
        self._close_all()

    def _close_all(self) -> None:
        self._selector.close()
        for sock in (self._listener, self._alarm, self._alarm_end):
            sock.close()
        for connection in self._connections:
            connection.sock.close()

    # The loop

    def _serve(self) -> None:
        try:
            while not self._stopping and not self._over:
                for key, _events in self._selector.select(1.0 if self._strangers else None):
                    key.data()
                if self._strangers:
                    self._drop_silent_strangers()
        finally:
            self._at_exit.cancel()
            self._close_all()

    def _hear_alarm(self) -> None:
        self._alarm_end.recv(64)

    def _accept(self) -> None:
        try:
            sock, _address = self._listener.accept()
        except OSError:
            return  # the caller went away, or file descriptors ran out
        sock.setblocking(False)
        connection = _Connection(sock, ServerHandshake(self._settings.secret, self.session))
        self._connections.add(connection)
        self._selector.register(
            sock, selectors.EVENT_READ, lambda: self._guarded(connection, self._serve_one)
        )
        self._strangers[connection] = time.monotonic() + _HANDSHAKE_SECONDS
        if len(self._strangers) > _MAX_STRANGERS:
            self._drop(next(iter(self._strangers)))

    def _drop_silent_strangers(self) -> None:
        now = time.monotonic()
        for connection in [c for c, limit in self._strangers.items() if limit < now]:
            self._drop(connection)

    def _guarded(self, connection: _Connection, act: Callable[[_Connection], None]) -> None:
        """Act for a connection; its faults end that connection and nothing else."""
        if connection not in self._connections:
            return
        try:
            act(connection)
        except FrameError as error:
            self._note(f"{describe_peer(connection.sock)}: {error}")
            self._drop(connection, str(error))
        except BlockingIOError:
            return
        # ValueError and MemoryError: a size that no memory is found for.
        except (EOFError, OSError, ValueError, MemoryError) as error:
            self._drop(connection, str(error))

    def _serve_one(self, connection: _Connection) -> None:
        if connection.link is None:
            self._shake_hands(connection)
            return
        if connection.is_stuck:
            self._flush(connection, connection.link)
        for frame in connection.link.read():
            self._handle(connection, frame)
            if connection not in self._connections:
                return

    # A stranger becomes a rank

    def _shake_hands(self, connection: _Connection) -> None:
        handshake = connection.handshake
        data = connection.sock.recv(handshake.num_missing)
        if not data:
            raise EOFError("the connection was closed")
        try:
            connection.sock.sendall(handshake.feed(data))
        except HandshakeError as error:
            connection.sock.sendall(error.last_words)
            raise
        if handshake.is_done:
            connection.link = Link(
                connection.sock, self._settings.max_body_bytes, handshake.key, of_store=True
            )

    def _join(self, connection: _Connection, frame: Frame) -> None:
        request = unpack_join(frame.meta)
        waiter = Waiter(request.rank, frame.ident, connection)
        notice = self._failure
        if notice is None and (reason := self._refusal(request)) is not None:
            self._note(reason)
            notice = pack_text([], reason)
        if notice is not None:
            self._answer(waiter, Kind.REFUSED, notice, b"")
            self._drop(connection)
            return
        connection.rank = request.rank
        self._strangers.pop(connection, None)
        if not request.is_lifeline:
            member = self._members[request.rank] = _Member(connection)
            self._answer(waiter, Kind.OK, member.token, b"")
            return
        connection.waiter = waiter
        self._settings.heartbeat.apply(connection.sock)
        self._members[request.rank].lifeline = connection
        lifelines = [member.lifeline for member in self._members.values()]
        if len(lifelines) == self._settings.world_size and None not in lifelines:
            self._joined = True
            for lifeline in lifelines:
                if lifeline is not None and lifeline.waiter is not None:
                    self._answer(lifeline.waiter, Kind.OK, b"", b"")

    def _refusal(self, request: JoinRequest) -> str | None:
        if request.settings != self._settings.settings:
            ours, theirs = self._settings.settings.split(" "), request.settings.split(" ")
            differences = [
                f"{their} (rank 0 has {our})"
                for our, their in zip(ours, theirs, strict=False)
                if our != their
            ]
            reason = f"rank {request.rank} joined with {', '.join(differences) or 'other settings'}"
            if not self._joined:
                self._fail([], reason)
            return reason
        member = self._members.get(request.rank)
        if request.is_lifeline:
            if member is None or not hmac.compare_digest(member.token, request.token):
                return f"rank {request.rank} must join with the token it was given"
            return None if member.lifeline is None else "a lifeline must be opened once"
        if not 0 <= request.rank < self._settings.world_size:
            return f"rank must be below world_size={self._settings.world_size}, got {request.rank}"
        return None if member is None else f"rank {request.rank} is already taken"

    def _give_up(self, waiter: Waiter) -> None:
        """End the join, as one rank's time is up: all then name the same ranks, and at once."""
        if self._joined or self._failure is not None:
            return  # the answer to its request to join is on the way
        here = [rank for rank, member in self._members.items() if member.lifeline is not None]
        missing = sorted(set(range(self._settings.world_size)).difference(here))
        reason = f"rank(s) {missing} did not join before the time of rank {waiter.rank} was up"
        self._fail(missing, "; ".join((reason, *self._notes)))

    def _fail(self, missing: list[int], reason: str) -> None:
        """End a join that cannot succeed, on every rank that waits in it."""
        self._failure = pack_text(missing, reason)
        for member in list(self._members.values()):
            if member.lifeline is not None and member.lifeline.waiter is not None:
                waiter = member.lifeline.waiter
                self._answer(waiter, Kind.REFUSED, self._failure, b"")

    # A rank's requests

    def _handle(self, connection: _Connection, frame: Frame) -> None:
        if connection.rank is None:
            if frame.kind != Kind.JOIN:
                raise FrameError("a connection must begin with a join request")
            self._join(connection, frame)
            return
        waiter = Waiter(connection.rank, frame.ident, connection)
        handler = self._handlers.get(frame.kind)
        if frame.kind == Kind.LEAVE:
            self._leave(waiter)
        elif frame.kind == Kind.GIVE_UP:
            self._give_up(waiter)
        elif self._lost is not None:
            self._answer(waiter, Kind.LOST, self._lost, b"")
        elif handler is not None and self._joined:
            handler(waiter, frame)
        else:
            raise FrameError(f"there is no request {frame.kind} at this point")

    def _leave(self, waiter: Waiter) -> None:
        member = self._members[waiter.rank]
        member.has_left = True
        self._mailbox.leave(waiter.rank)
        self._answer(waiter, Kind.OK, b"", b"")
        self._check_over()

    def _check_over(self) -> None:
        gone = [rank for rank, member in self._members.items() if member.has_left]
        self._over = self._joined and (
            len(gone) == len(self._members) or (self._lost is not None and 0 in gone)
        )

    def _answer(self, waiter: Waiter, kind: Kind, meta: bytes, body: Buffer) -> None:
        connection: _Connection = waiter.connection
        link = connection.link
        if connection in self._connections and link is not None:
            link.queue(kind, waiter.ident, meta, (body,))
            self._flush(connection, link)

    def _flush(self, connection: _Connection, link: Link) -> None:
        try:
            if link.flush() and not connection.is_stuck:
                return
        except OSError as error:
            self._drop(connection, str(error))
            return
        connection.is_stuck = link.has_unsent
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.is_stuck else 0)
        key = self._selector.get_key(connection.sock)
        self._selector.modify(connection.sock, events, key.data)

    # A connection ends

    def _drop(self, connection: _Connection, reason: str = "") -> None:
        if connection not in self._connections:
            return
        self._connections.discard(connection)
        self._strangers.pop(connection, None)
        self._selector.unregister(connection.sock)
        connection.sock.close()
        rank = connection.rank
        member = None if rank is None else self._members.get(rank)
        if rank is None or member is None or member.has_left:
            return
        if connection not in (member.connection, member.lifeline):
            return
        if not self._joined:
            self._note(f"rank {rank} went away while the group formed")
            del self._members[rank]
            for other in (member.connection, member.lifeline):
                if other is not None:
                    self._drop(other)
            return
        self._lose(rank, reason)

    def _lose(self, rank: int, reason: str) -> None:
        member = self._members[rank]
        if self._lost is None:
            self._lost = pack_text([rank], reason)
        member.has_left = True
        for connection in (member.connection, member.lifeline):
            if connection is not None:
                self._drop(connection)
        for other in self._members.values():
            if not other.has_left and other.lifeline is not None:
                self._answer(Waiter(-1, 0, other.lifeline), Kind.LOST, self._lost, b"")
        self._check_over()

    def _note(self, text: str) -> None:
        if len(self._notes) < _MAX_NOTES:
            self._notes.append(text)
