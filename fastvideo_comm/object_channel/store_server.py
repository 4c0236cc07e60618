"""The store's server: one thread, one selector, in the process of rank 0.

Every rank holds two connections. Requests and messages travel on the first. The second, the
lifeline, carries next to nothing, so that the kernels on both ends keep it alive: they answer TCP
keep-alive probes for a process that is busy or stopped, close it when the process dies, and give up
on it when the machine or the way to it is gone. So the server knows a dead rank from a slow one
without a thread in the ranks, and news of a dead rank does not queue behind large messages.
"""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import socket
import threading
from collections import deque
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
    pack_text,
    unpack_address,
    unpack_join,
    unpack_number,
)
from fastvideo_comm.object_channel.store_roll import Member, Roll
from fastvideo_comm.object_channel.store_sockets import Heartbeat, call_after_fork, describe_peer
from fastvideo_comm.object_channel.store_strangers import Strangers

_HANDSHAKE_SECONDS = 10.0
# One more for each rank is allowed, because all ranks may come at once.
_MAX_STRANGERS = 128
_TICK_SECONDS = 0.2
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class ServerSettings(NamedTuple):
    """The settings that rank 0 gives to the server.

    Attributes:
        world_size: How many ranks join.
        secret: Shared by all ranks, or None.
        settings: The `key=value` words that every rank must repeat.
        max_body_bytes: The largest sealed message.
        heartbeat: The heartbeat of the lifelines.
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
        self._roll = Roll(settings.world_size, settings.settings)
        self._connections: set[_Connection] = set()
        self._strangers: Strangers[_Connection] = Strangers(
            _MAX_STRANGERS + settings.world_size, _HANDSHAKE_SECONDS
        )
        self._is_short = False  # no file descriptor is left, and the server does not listen
        self._mailbox = Mailbox(settings.world_size, self._answer)
        self._joined = False
        self._dying: deque[tuple[int, str]] = deque()  # lost ranks, until all others are told
        self._lost: bytes | None = None
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
            Kind.COUNT: lambda w, _: self._mailbox.count(w),
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
        """Close a forked child's copies: while they are open, a dead rank seems to be alive."""
        self._at_exit.cancel()
        self._close_all()

    def _close_all(self) -> None:
        self._selector.close()
        connected = [connection.sock for connection in self._connections]
        for sock in (self._listener, self._alarm, self._alarm_end, *connected):
            sock.close()

    # The loop

    def _serve(self) -> None:
        try:
            while not self._stopping and not self._over:
                was_short = self._is_short
                limit = _TICK_SECONDS if self._strangers or self._is_short else None
                for key, _events in self._selector.select(limit):
                    key.data()
                for connection in self._strangers.overdue():
                    self._drop(connection)
                self._tell_of_the_lost()
                if was_short and self._is_short:
                    self._listen_again()
        finally:
            self._at_exit.cancel()
            self._close_all()

    def _hear_alarm(self) -> None:
        self._alarm_end.recv(64)

    # Strangers come

    def _accept(self) -> None:
        if self._joined:
            return  # all ranks have joined since the selector saw the caller
        try:
            sock, _address = self._listener.accept()
        except OSError as error:
            if error.errno in _SHORTAGES:
                self._make_room(error)
            return  # another error means that the caller went away
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a second answer must not wait
        connection = _Connection(sock, ServerHandshake(self._settings.secret, self.session))
        self._connections.add(connection)
        self._selector.register(
            sock, selectors.EVENT_READ, lambda: self._guarded(connection, self._serve_one)
        )
        self._drop(self._strangers.add(connection))

    def _make_room(self, error: OSError) -> None:
        """Free a file descriptor for a caller that `accept` had none for, or stop listening."""
        self._roll.note_shortage(f"rank 0 could not accept a connection: {error}")
        stranger = self._strangers.oldest()
        if stranger is not None:
            self._drop(stranger)
        else:
            # The selector would report the caller again and again.
            self._selector.unregister(self._listener)
            self._is_short = True

    def _listen_again(self) -> None:
        self._is_short = False
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _stop_listening(self) -> None:
        """Stop listening, because all ranks have joined."""
        if not self._is_short:
            self._selector.unregister(self._listener)
        self._is_short = False
        self._listener.close()
        for stranger in self._strangers.everyone():
            self._drop(stranger)

    def _guarded(self, connection: _Connection, act: Callable[[_Connection], None]) -> None:
        """Act for a connection; its faults end that connection and nothing else."""
        if connection not in self._connections:
            return
        try:
            act(connection)
        except FrameError as error:
            self._roll.note(f"{describe_peer(connection.sock)}: {error}")
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
            answer = handshake.feed(data)
        except HandshakeError as error:
            connection.sock.sendall(error.last_words)
            raise
        connection.sock.sendall(answer)
        if answer or handshake.is_done:
            self._drop(self._strangers.move_on(connection))
        if handshake.is_done:
            connection.link = Link(
                connection.sock, self._settings.max_body_bytes, handshake.key, of_store=True
            )

    def _join(self, connection: _Connection, frame: Frame) -> None:
        request = unpack_join(frame.meta)
        waiter = Waiter(request.rank, frame.ident, connection)
        notice = self._roll.failure
        if notice is None and (reason := self._roll.refusal(request)) is not None:
            self._roll.note(reason)
            notice = pack_text([], reason)
        if notice is not None:
            self._answer(waiter, Kind.REFUSED, notice, b"")
            self._drop(connection)
            self._tell_of_failure()
            return
        connection.rank = request.rank
        self._strangers.remove(connection)
        members = self._roll.members
        if not request.is_lifeline:
            member = members[request.rank] = Member(connection)
            self._answer(waiter, Kind.OK, member.token, b"")
            return
        connection.waiter = waiter
        self._settings.heartbeat.apply(connection.sock)
        members[request.rank].lifeline = connection
        if self._roll.is_complete:
            self._joined = True
            self._stop_listening()
            for member in members.values():
                self._answer(member.lifeline.waiter, Kind.OK, b"", b"")

    def _give_up(self, waiter: Waiter) -> None:
        """End the join when one rank's time is up: all ranks then name the same missing ranks."""
        if self._joined or self._roll.failure is not None:
            return  # the answer to its request to join is on the way
        self._roll.give_up(waiter.rank)
        self._tell_of_failure()

    def _tell_of_failure(self) -> None:
        """Answer every rank that waits in a join which cannot succeed."""
        for member in list(self._roll.members.values()):
            waiter = None if member.lifeline is None else member.lifeline.waiter
            if waiter is not None and self._roll.failure is not None:
                member.lifeline.waiter = None
                self._answer(waiter, Kind.REFUSED, self._roll.failure, b"")

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
        member = self._roll.members[waiter.rank]
        member.has_left = True
        self._mailbox.leave(waiter.rank)
        self._answer(waiter, Kind.OK, b"", b"")
        self._check_over()

    def _check_over(self) -> None:
        gone = [rank for rank, member in self._roll.members.items() if member.has_left]
        self._over = self._joined and (
            len(gone) == len(self._roll.members) or (self._lost is not None and 0 in gone)
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

    def _drop(self, connection: _Connection | None, reason: str = "") -> None:
        if connection is None or connection not in self._connections:
            return
        self._connections.discard(connection)
        self._strangers.remove(connection)
        self._selector.unregister(connection.sock)
        connection.sock.close()
        rank = connection.rank
        member = None if rank is None else self._roll.members.get(rank)
        if rank is None or member is None or member.has_left:
            return
        if connection not in (member.connection, member.lifeline):
            return
        if self._joined:
            self._dying.append((rank, reason))
            return
        self._roll.note(f"rank {rank} went away while the group formed")
        del self._roll.members[rank]
        for other in (member.connection, member.lifeline):
            self._drop(other)

    def _tell_of_the_lost(self) -> None:
        """Tell every other rank of the first loss; rank 0 last, as others depend on its process.

        This is a queue and not a recursion: when many ranks die at once, the rank that is told may
        be the next one that is lost.
        """
        while self._dying:
            rank, reason = self._dying.popleft()
            member = self._roll.members[rank]
            member.has_left = True
            self._drop(member.connection)
            self._drop(member.lifeline)
            if self._lost is None:
                self._lost = pack_text([rank], reason)
                for other in sorted(self._roll.members, reverse=True):
                    member = self._roll.members[other]
                    if not member.has_left:
                        self._answer(Waiter(-1, 0, member.lifeline), Kind.LOST, self._lost, b"")
            self._check_over()
