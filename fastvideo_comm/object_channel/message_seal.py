"""Seals: a receiver opens a message only if a holder of the secret has sealed it.

A receiver knows which message it waits for, so the address is not sent. Both ends compute the seal
over the address. So a message that was altered, replayed, reordered or misrouted does not open.

There are three kinds of seals (`SealKind`). AES-256-GCM (NIST SP 800-38D) encrypts the body and
authenticates it with its address. AES-256-GMAC authenticates in the same way without encryption.
HMAC-SHA256 (RFC 2104) is used where the package `cryptography` is missing. It does not encrypt
either.

AES-GCM is broken if two messages share a nonce under one key. Each key is for one secret, session
and group. Where the store gives each run a session of its own, the nonce is the address, and no
address is used twice. A store of torch has no session: there the nonce is random, and is sent.
"""

from __future__ import annotations

import hmac
import importlib.util
import os
import struct
from collections.abc import Sequence
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, NamedTuple

from fastvideo_comm.errors import AuthenticationError

if TYPE_CHECKING:
    from fastvideo_comm.object_channel.aes_gcm import AesGcm

SEAL_VERSION = 2
# The size of every seal: an HMAC, or the nonce and the tag of AES-GCM with 16 bytes each.
TAG_BYTES = 32
EVERYONE = -1
# The nonce of an address has room for so many ranks.
MAX_RANKS = 2**20 - 1

_CONTEXT = struct.Struct("<BBiiQQ")
_NONCE_BYTES = 12
_HALF = TAG_BYTES // 2
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


def has_cryptography() -> bool:
    """Whether the package `cryptography` is installed."""
    return importlib.util.find_spec("cryptography") is not None


class SealKind(Enum):
    """How the messages of a group are sealed; the value is its name in the group's settings."""

    NONE = "none"
    HMAC = "hmac-sha256"
    GMAC = "aes-256-gmac"
    GCM = "aes-256-gcm"

    @classmethod
    def choose(cls, encryption: str, *, has_secret: bool) -> SealKind:
        """Return the kind for a group.

        Args:
            encryption: "auto" encrypts where it can, "required" encrypts or fails, "off" does not.
            has_secret: Whether the group has a secret; without one nothing is sealed.

        Raises:
            ValueError: `encryption` is another word, or is required and impossible.
        """
        if encryption not in ("auto", "required", "off"):
            raise ValueError(f"encryption must be 'auto', 'required' or 'off', got {encryption!r}")
        if has_secret and has_cryptography():
            return cls.GMAC if encryption == "off" else cls.GCM
        if encryption == "required":
            need = "the package cryptography (the extra `secure`)" if has_secret else "a secret"
            raise ValueError(f"encryption must not be 'required' without {need}, got 'required'")
        return cls.HMAC if has_secret else cls.NONE


class MessageSeal:
    """Seals the messages of one group and opens them; assumes one thread at a time.

    >>> seal = MessageSeal(b"a shared secret of 32 bytes, say", "demo")
    >>> address = Address(Op.SEND, src=0, dst=1, number=0)
    >>> sealed = b"".join(seal.seal(address, [b"hello"]))
    >>> bytes(seal.open(address, sealed))
    b'hello'
    >>> seal.open(address._replace(number=1), sealed)
    Traceback (most recent call last):
    fastvideo_comm.errors.AuthenticationError: the message must carry the seal of send/0/1/1

    Without a secret nothing is added and nothing is checked.
    """

    def __init__(
        self,
        secret: bytes | None,
        group: str,
        session: bytes = b"",
        kind: SealKind = SealKind.HMAC,
        *,
        keeps_buffer: bool = False,
    ) -> None:
        """Derive the key of this kind, group and session from the secret.

        Args:
            secret: Shared by all ranks; None for no seals.
            group: The group's name.
            session: A value that is fresh for each run, where the store has one; it keeps the
                messages of an earlier run out.
            kind: How to seal; the same on all ranks.
            keeps_buffer: Encrypt large messages into one buffer, which is kept, because new memory
                takes eight times as long as AES. What `seal` returned is then valid until the next
                `seal`.
        """
        name = group.encode()
        self._prefix = struct.pack("<I", len(name)) + name
        self._kind = SealKind.NONE if secret is None else kind
        label = b"fastvideo_comm message\0" + self._kind.value.encode() + b"\0"
        about = label + session + b"\0" + self._prefix
        self._key = b"" if secret is None else hmac.digest(secret, about, "sha256")
        self._has_session = bool(session)
        if self._kind in (SealKind.GCM, SealKind.GMAC):
            from fastvideo_comm.object_channel.aes_gcm import AesGcm  # needs cryptography

            self._aes: AesGcm = AesGcm(self._key, keeps_buffer=keeps_buffer)

    @property
    def overhead(self) -> int:
        """How many bytes a seal adds."""
        return 0 if self._kind is SealKind.NONE else TAG_BYTES

    def seal(
        self, address: Address, parts: Sequence[bytes | memoryview], about: bytes = b""
    ) -> list[bytes | memoryview]:
        """Seal the parts of one message; large parts are not copied, unless they are encrypted.

        Args:
            address: Where the message belongs. No two messages may have the same one.
            parts: The body, in pieces.
            about: What the receiver knows besides the address; the seal covers it, and it is not
                sent.
        """
        if self._kind is SealKind.NONE:
            return list(parts)
        context = self._context(address, sum(map(len, parts)), about)
        if self._kind is SealKind.HMAC:
            return [self._hmac(context, parts), *parts]
        nonce = self._nonce(address) if self._has_session else os.urandom(_NONCE_BYTES)
        head = bytes(_HALF) if self._has_session else nonce.ljust(_HALF, b"\0")
        if self._kind is SealKind.GMAC:
            return [head, self._aes.tag(nonce, context + head, parts), *parts]
        return [head, self._aes.encrypt(nonce, context + head, parts)]

    def open(
        self, address: Address, sealed: bytes | bytearray | memoryview, about: bytes = b""
    ) -> memoryview:
        """Return the body of a sealed message: a view into `sealed` where it is not encrypted.

        A large encrypted body is decrypted in place where `sealed` is writable.

        Raises:
            AuthenticationError: The message was not sealed for this address and `about`.
        """
        view = memoryview(sealed)
        if self._kind is SealKind.NONE:
            return view
        body = self._opened(address, view, about) if len(view) >= TAG_BYTES else None
        if body is None:
            raise AuthenticationError(
                f"the message must carry the seal of {address.key}", peers=(address.src,)
            )
        return body

    def _opened(self, address: Address, view: memoryview, about: bytes) -> memoryview | None:
        context = self._context(address, len(view) - TAG_BYTES, about)
        body = view[TAG_BYTES:]
        if self._kind is SealKind.HMAC:
            tag = self._hmac(context, [body])
            return body if hmac.compare_digest(tag, view[:TAG_BYTES]) else None
        head = bytes(view[:_HALF])
        nonce = self._nonce(address) if self._has_session else head[:_NONCE_BYTES]
        if self._kind is SealKind.GCM:
            return self._aes.decrypt(nonce, context + head, view[_HALF:])
        tag = self._aes.tag(nonce, context + head, [body])
        return body if hmac.compare_digest(tag, view[_HALF:TAG_BYTES]) else None

    def _context(self, address: Address, length: int, about: bytes) -> bytes:
        op, src, dst, number = address
        return self._prefix + _CONTEXT.pack(SEAL_VERSION, op, src, dst, number, length) + about

    def _hmac(self, context: bytes, parts: Sequence[bytes | memoryview]) -> bytes:
        if sum(map(len, parts)) <= _JOINED_BELOW:
            return hmac.digest(self._key, b"".join((context, *parts)), "sha256")
        running = hmac.new(self._key, context, "sha256")
        for part in parts:
            running.update(part)
        return running.digest()

    @staticmethod
    def _nonce(address: Address) -> bytes:
        """Return the address in 96 bits: op 4, src 20, dst 20, number 52."""
        op, src, dst, number = address
        packed = (((op << 20 | src) << 20 | dst & MAX_RANKS) << 52) | number
        return packed.to_bytes(_NONCE_BYTES, "big")
