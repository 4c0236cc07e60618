"""The line between two ranks of a host: a Unix socket that keeps records whole and in order.

A record is 44 bytes; failures and details of a mismatch add a text, in pieces. Nothing here
blocks: a record that does not fit into the socket waits in a queue. The descriptor of a segment
travels with the record that announces it. The end of the stream says that the other process has
died, or, after the record BYE, that the rank has left.

KeyboardInterrupt may come between any two steps of Python. A record is therefore received and put
into the inbox in one step of C, is taken out of the inbox only after it was handled, and is taken
out of the outbox only after it was sent. So a record may be sent or handled twice, and is never
lost.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections import deque
from typing import NamedTuple

POST, DONE, FAIL, DETAIL, SEGMENT, BYE = range(1, 7)
# The reasons of a FAIL.
ARGUMENTS, INTERRUPTED, TIMED_OUT, LOST, MEMORY, CLOSED, DELIVERY = range(7)

_RECORD = struct.Struct("<BBBBHHIQQ16s")
_TEXT_BYTES = 4096
_RECEIVE = (_RECORD.size + _TEXT_BYTES,)
_ANCILLARY = (socket.CMSG_SPACE(struct.calcsize("i")),)
_SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_NO_DIGEST = bytes(16)
# After these errors nothing can be sent any more: the other rank has closed its end, or this rank
# has. After other errors, such as ETOOMANYREFS for descriptors that the other rank has not taken
# yet, sending is tried again.
_ENDED = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF})


class Record(NamedTuple):
    """What one rank tells another."""

    kind: int
    is_pair: int = 0  # whether the call number counts the calls of this pair of ranks
    failure: int = 0  # of FAIL: why
    flag: int = 0  # of POST: there is a place; of a text: more pieces follow
    origin: int = 0  # of FAIL: the rank that failed first, or for which another waited in vain
    segment: int = 0
    piece: int = 0  # of a text: the number of this piece
    number: int = 0  # of the call; of SEGMENT: its bytes
    offset: int = 0
    digest: bytes = _NO_DIGEST

    def pack(self) -> bytes:
        """The bytes that travel."""
        return _RECORD.pack(*self)


def with_text(record: Record, text: bytes) -> list[bytes]:
    """A record and its text, as the pieces that travel."""
    pieces = [text[i : i + _TEXT_BYTES] for i in range(0, len(text), _TEXT_BYTES)] or [b""]
    last = len(pieces) - 1
    return [
        record._replace(flag=int(i < last), piece=i).pack() + piece
        for i, piece in enumerate(pieces)
    ]


def pack_post(is_pair: int, number: int, digest: bytes, place: tuple[int, int] | None) -> bytes:
    """The record POST, in one step, because every call needs one."""
    segment, offset = place or (0, 0)
    return _RECORD.pack(POST, is_pair, 0, place is not None, 0, segment, 0, number, offset, digest)


def pack_done(is_pair: int, number: int) -> bytes:
    """The record DONE."""
    return _RECORD.pack(DONE, is_pair, 0, 0, 0, 0, 0, number, 0, _NO_DIGEST)


class Heard(NamedTuple):
    """A record, its text, and the descriptor that came with it (or -1)."""

    record: Record
    text: bytes
    descriptor: int


class Line:
    """One end of the line to another rank; whoever uses it holds the lock of its owner."""

    def __init__(self, link: socket.socket) -> None:
        """Takes over a connected SOCK_SEQPACKET socket."""
        link.setblocking(False)
        self._link = link
        self._inbox: deque[tuple[bytes, list[tuple[int, int, bytes]], int, object]] = deque()
        self._outbox: deque[tuple[bytes, int]] = deque()
        self._texts: dict[tuple[int, int, int], list[bytes]] = {}
        self.has_left = False  # the other rank has said BYE
        self.is_lost = False  # nothing comes any more

    def fileno(self) -> int:
        """The descriptor of the socket; -1 after `close`."""
        return self._link.fileno()

    @property
    def is_blocked(self) -> bool:
        """Whether records wait in the queue."""
        return bool(self._outbox)

    def send(self, packed: bytes) -> None:
        """Sends a record, or queues it. What a dead rank does not take is dropped."""
        if self._outbox:
            self._outbox.append((packed, -1))
            self.flush()
            return
        try:
            self._link.send(packed, _SEND_FLAGS)
        except OSError as error:
            if error.errno not in _ENDED:
                self._outbox.append((packed, -1))

    def send_all(self, packed: list[bytes], descriptor: int = -1) -> None:
        """Sends the pieces of one record; the descriptor goes with the last of them."""
        self._outbox.extend((piece, descriptor if piece is packed[-1] else -1) for piece in packed)
        self.flush()

    def flush(self) -> None:
        """Sends what is queued, as far as the socket takes it."""
        try:
            while self._outbox:
                packed, descriptor = self._outbox[0]
                if descriptor >= 0:
                    socket.send_fds(self._link, [packed], [descriptor], _SEND_FLAGS)
                else:
                    self._link.send(packed, _SEND_FLAGS)
                self._outbox.popleft()
        except OSError as error:
            if error.errno in _ENDED:
                self._outbox.clear()

    def receive(self) -> None:
        """Moves one message from the socket to the inbox; for a socket that is readable."""
        try:
            # In one step of C: an interrupt between recvmsg and append would lose the message.
            self._inbox.extend(map(self._link.recvmsg, _RECEIVE, _ANCILLARY))
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            # The other end was closed with messages unread. Linux says so before it hands out
            # what the other has sent, and only once.
            if self._link.fileno() < 0:
                self.is_lost = True

    def first(self) -> Heard | None:
        """The oldest message of the inbox that is whole; `handled` takes it out."""
        while self._inbox:
            data, ancillary, _, _ = self._inbox[0]
            if not data:
                self.is_lost = True
                return None
            descriptor = -1
            for _, _, content in ancillary:
                if len(content) >= 4:
                    descriptor = int.from_bytes(content[:4], "little", signed=True)
            if len(data) == _RECORD.size:
                return Heard(Record._make(_RECORD.unpack(data)), b"", descriptor)
            record = Record._make(_RECORD.unpack_from(data))
            pieces = self._texts.setdefault((record.kind, record.is_pair, record.number), [])
            if record.piece == len(pieces):
                pieces.append(data[_RECORD.size :])
            if not record.flag:
                return Heard(record, b"".join(pieces), descriptor)
            self._inbox.popleft()
        return None

    def handled(self, heard: Heard) -> None:
        """Takes the oldest message out of the inbox."""
        if self._texts:
            record = heard.record
            self._texts.pop((record.kind, record.is_pair, record.number), None)
        self._inbox.popleft()

    def close(self) -> None:
        """Closes this process's end, and the descriptors that nobody took."""
        self.is_lost = True
        while self._inbox:
            _, ancillary, _, _ = self._inbox.popleft()
            for _, _, content in ancillary:
                with contextlib.suppress(OSError):
                    os.close(int.from_bytes(content[:4], "little", signed=True))
        self._outbox.clear()
        self._link.close()
