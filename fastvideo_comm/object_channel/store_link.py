"""One end of a connection between a rank and the store: frames over a non-blocking socket.

A frame is a header (kind, id, sizes), a tag, a short `meta` and a body. The tag is a keyed BLAKE2b
hash (RFC 7693) over direction, frame number, header and meta, under the key of this connection. So
nobody on the path can add, drop, repeat or alter a request or an answer. BLAKE2b takes a third of
the time of an HMAC here. A body carries the seal of the rank that made it (`message_seal`); the
store passes it on unread. A size is used only after the tag was checked, and a size above the limit
is refused. Memory is taken as bytes arrive, not as announced.
"""

from __future__ import annotations

import hashlib
import hmac
import mmap
import socket
import struct
from collections import deque
from collections.abc import Sequence
from enum import IntEnum
from itertools import islice
from typing import NamedTuple

Buffer = bytes | bytearray | memoryview | mmap.mmap

_HEADER = struct.Struct("<BIHQ")
_COUNTER = struct.Struct("<cQ")
_TAG_BYTES = 32
_RECV_BYTES = 64 * 1024
_LARGE_FROM = 64 * 1024
_CHUNK_BYTES = 1024 * 1024
# One connection moves at most this much before the others have their turn.
_FLUSH_BYTES = 4 * 1024 * 1024


class Kind(IntEnum):
    """What a frame asks for or brings."""

    JOIN = 1
    SEND = 2
    RECV = 3
    BARRIER = 4
    EXPIRE = 5
    MISSING = 6
    SET = 7
    GET = 8
    WAIT = 9
    ADD = 10
    DELETE = 11
    CHECK = 12
    COUNT = 13
    LEAVE = 14
    GIVE_UP = 15
    OK = 32
    REFUSED = 33
    LEFT = 34
    EXPIRED = 35
    LOST = 36


class Frame(NamedTuple):
    """A received frame."""

    kind: int
    ident: int
    meta: bytes
    body: Buffer


class FrameError(Exception):
    """The other end sent what this protocol does not allow."""


class Link:
    """Frames over one connected socket; assumes one thread at a time.

    A signal handler may raise between a system call and the note of how many bytes it moved. The
    state of the stream is then unknown, and every later use of the link raises ConnectionError.
    """

    def __init__(
        self, sock: socket.socket, max_body_bytes: int, key: bytes | None, *, of_store: bool
    ) -> None:
        """Take over a socket on which the handshake is done.

        Args:
            sock: The socket.
            max_body_bytes: Longer bodies are refused.
            key: The key of this connection; None without a secret.
            of_store: Whether this is the store's end.
        """
        sock.setblocking(False)
        self.sock = sock
        self._max_body_bytes = max_body_bytes
        self._key = key
        self._head_bytes = _HEADER.size + (0 if key is None else _TAG_BYTES)
        self._labels = (b"S", b"R") if of_store else (b"R", b"S")
        self.num_sent = 0  # frames that were queued
        self._num_received = 0
        self._out: deque[bytes | memoryview] = deque()
        self._in = b""
        self._large: tuple[Frame, memoryview] | None = None
        self._filled = 0
        self._busy = False

    @property
    def has_unsent(self) -> bool:
        """Whether queued bytes wait for the socket."""
        return bool(self._out)

    @property
    def is_busy(self) -> bool:
        """Whether a transfer has begun and not ended: a signal handler or an error is inside it."""
        return self._busy

    def queue(
        self, kind: Kind, ident: int, meta: bytes = b"", parts: Sequence[Buffer] = ()
    ) -> None:
        """Queue one frame; large parts are not copied and must not change until they are sent."""
        size = sum(map(len, parts))
        head = _HEADER.pack(kind, ident, len(meta), size)
        if self._key is not None:
            head += self._tag(self._key, self._labels[0], self.num_sent, head + meta)
        if size <= _LARGE_FROM:
            pieces: list[bytes | memoryview] = [b"".join((head, meta, *parts))]
        else:
            pieces = [head + meta, *(memoryview(part) for part in parts if len(part))]
        # No signal handler runs between these two: Python looks for signals after calls.
        self.num_sent += 1
        self._out.extend(pieces)

    def flush(self) -> bool:
        """Send what the socket takes now; True when nothing is left.

        Raises:
            OSError: The connection is gone.
        """
        self._enter()
        budget = _FLUSH_BYTES
        out = self._out
        while out and budget > 0:
            try:
                if len(out) == 1:
                    num_sent = self.sock.send(out[0])
                else:
                    num_sent = self.sock.sendmsg(list(islice(out, 16)))
            except BlockingIOError:
                break
            budget -= num_sent
            while out and num_sent >= len(out[0]):
                num_sent -= len(out.popleft())
            if num_sent:
                out[0] = memoryview(out[0])[num_sent:]
        self._busy = False
        return not out

    def own_unsent(self) -> None:
        """Copy what is queued, so that the caller may change the memory it gave to `queue`."""
        self._out = deque(map(bytes, self._out))

    def read(self) -> list[Frame]:
        """Return the frames completed by one read of the socket.

        Raises:
            EOFError: The other end closed the connection.
            FrameError: What came is not a frame, is too large, or has a wrong tag.
            OSError: The connection is gone.
        """
        self._enter()
        try:
            if self._large is not None:
                frames = self._read_large(*self._large)
            else:
                data = self.sock.recv(_RECV_BYTES)
                if not data:
                    raise EOFError("the connection was closed")
                frames = self._parse(self._in + data if self._in else data)
        except BlockingIOError:
            frames = []
        self._busy = False
        return frames

    def _enter(self) -> None:
        if self._busy:
            raise ConnectionError("an exception interrupted an earlier transfer")
        self._busy = True

    def _read_large(self, frame: Frame, view: memoryview) -> list[Frame]:
        num_read = self.sock.recv_into(view[self._filled : self._filled + _CHUNK_BYTES])
        if not num_read:
            raise EOFError("the connection was closed")
        self._filled += num_read
        if self._filled < len(view):
            return []
        self._large = None
        return [frame]

    def _parse(self, data: bytes) -> list[Frame]:
        frames: list[Frame] = []
        start = 0
        while len(data) - start >= self._head_bytes:
            kind, ident, meta_size, size = _HEADER.unpack_from(data, start)
            if size > self._max_body_bytes:
                raise FrameError(f"a body must have at most {self._max_body_bytes} bytes")
            body_start = start + self._head_bytes + meta_size
            end = body_start + size
            if len(data) < body_start or (len(data) < end and size <= _LARGE_FROM):
                break
            meta = data[body_start - meta_size : body_start]
            if self._key is not None:
                self._check_tag(self._key, data, start, meta)
            self._num_received += 1
            if len(data) < end:
                self._begin_large(Frame(kind, ident, meta, b""), size, data[body_start:])
                start = len(data)
                break
            frames.append(Frame(kind, ident, meta, data[body_start:end]))
            start = end
        self._in = data[start:]
        return frames

    def _begin_large(self, frame: Frame, size: int, first: bytes) -> None:
        # Anonymous private memory: the kernel gives a page when a byte is written to it.
        body = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        view = memoryview(body)
        view[: len(first)] = first
        self._filled = len(first)
        self._large = (frame._replace(body=body), view)

    def _check_tag(self, key: bytes, data: bytes, start: int, meta: bytes) -> None:
        end = start + _HEADER.size
        expected = self._tag(key, self._labels[1], self._num_received, data[start:end] + meta)
        if not hmac.compare_digest(expected, data[end : end + _TAG_BYTES]):
            raise FrameError("a frame must carry the tag of its place in this connection")

    @staticmethod
    def _tag(key: bytes, label: bytes, number: int, data: bytes) -> bytes:
        data = _COUNTER.pack(label, number) + data
        return hashlib.blake2b(data, digest_size=_TAG_BYTES, key=key).digest()
