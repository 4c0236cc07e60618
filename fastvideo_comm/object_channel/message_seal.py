"""Seals: HMAC-SHA256 (RFC 2104) over where a message belongs and what it holds.

A receiver already knows which message it waits for, so the address is not sent: both ends feed it
to the HMAC, and a message that was altered, replayed, reordered or misrouted has the wrong tag.
A seal is no encryption: whoever sees the traffic can read it.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from fastvideo_comm.errors import AuthenticationError

SEAL_VERSION = 1
TAG_BYTES = 32
EVERYONE = -1

_CONTEXT = struct.Struct("<BBiiQQ")
_JOINED_BELOW = 64 * 1024


class Op(IntEnum):
    """What a message is for; part of its address."""

    SEND = 1
    BROADCAST = 2
    GATHER = 3
    BARRIER = 4
    VALUE = 5
    EXPIRY = 6


class Address(NamedTuple):
    """Where one message belongs: the channel (op, src, dst) and its number in that channel.

    Attributes:
        op: What the message is for.
        src: The sending rank.
        dst: The receiving rank, or `EVERYONE`.
        number: 0 for the first message of the channel, then 1, 2, ...
    """

    op: Op
    src: int
    dst: int
    number: int

    @property
    def key(self) -> str:
        """The address as a store key, `op/src/dst/number`."""
        return f"{self.op.name.lower()}/{self.src}/{self.dst}/{self.number}"


class MessageSeal:
    """Seals the messages of one group and opens them.

    >>> seal = MessageSeal(b"a shared secret", group="demo")
    >>> address = Address(Op.SEND, src=0, dst=1, number=0)
    >>> sealed = b"".join(seal.seal(address, [b"hello"]))
    >>> bytes(seal.open(address, sealed))
    b'hello'
    >>> seal.open(address._replace(number=1), sealed)
    Traceback (most recent call last):
    fastvideo_comm.errors.AuthenticationError: the message must carry the seal of send/0/1/1

    Without a secret nothing is added and nothing is checked.
    """

    def __init__(self, secret: bytes | None, group: str, session: bytes = b"") -> None:
        """Derive the key of this group and session from the secret.

        Args:
            secret: Shared by all ranks; None for no seals.
            group: The group's name.
            session: A value that is fresh for each run, where the store has one; it keeps the
                messages of an earlier run out.
        """
        self._key = (
            None
            if secret is None
            else hmac.digest(secret, b"fastvideo_comm message\0" + session, "sha256")
        )
        name = group.encode()
        self._prefix = struct.pack("<I", len(name)) + name

    @property
    def overhead(self) -> int:
        """How many bytes a seal adds."""
        return 0 if self._key is None else TAG_BYTES

    def seal(
        self, address: Address, parts: Sequence[bytes | memoryview]
    ) -> list[bytes | memoryview]:
        """Put the tag before the parts of one message; the parts are not copied."""
        if self._key is None:
            return list(parts)
        return [self._tag(self._key, address, parts), *parts]

    def open(self, address: Address, sealed: bytes | bytearray | memoryview) -> memoryview:
        """Return the body of a sealed message, a view into `sealed`.

        Raises:
            AuthenticationError: The tag is not the one of this body at this address.
        """
        view = memoryview(sealed)
        if self._key is None:
            return view
        body = view[TAG_BYTES:]
        tag = bytes(view[:TAG_BYTES])
        if not hmac.compare_digest(tag, self._tag(self._key, address, [body])):
            raise AuthenticationError(
                f"the message must carry the seal of {address.key}", peers=(address.src,)
            )
        return body

    def _tag(self, key: bytes, address: Address, parts: Sequence[bytes | memoryview]) -> bytes:
        length = sum(len(part) for part in parts)
        op, src, dst, number = address
        context = self._prefix + _CONTEXT.pack(SEAL_VERSION, op, src, dst, number, length)
        if length <= _JOINED_BELOW:
            return hmac.digest(key, b"".join((context, *parts)), "sha256")
        running = hmac.new(key, context, "sha256")
        for part in parts:
            running.update(part)
        return running.digest()
