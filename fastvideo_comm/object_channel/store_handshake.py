"""How a rank and the store prove to each other that they hold the secret, before anything else.

    rank -> store   HELLO   magic, protocol version, whether it has a secret, nonce
    store -> rank   ANSWER  the same of the store, session
    rank -> store   PROOF   proof over both
    store -> rank   PROOF   proof over both; zeros where the rank's is wrong

A proof is an HMAC under the secret over a label, HELLO and ANSWER. The key of the connection is
such an HMAC too. Nobody can reuse a proof, because each side puts in a fresh nonce. The rank proves
itself first. So whoever reaches the port without the secret gets nothing that depends on the
secret, and has nothing to check guesses against. All messages have fixed sizes: no length and no
text from the other side is read before its proof is checked.
"""

from __future__ import annotations

import hmac
import os
import socket
import struct
from typing import NamedTuple

from fastvideo_comm.errors import AuthenticationError, JoinError
from fastvideo_comm.object_channel.store_link import FrameError
from fastvideo_comm.object_channel.store_sockets import receive_exactly

PROTOCOL_VERSION = 2
MAGIC = b"FVCOMM\r\n"
SESSION_BYTES = 16
_NONCE_BYTES = 32
_GREETING = struct.Struct(f"<8sHB{_NONCE_BYTES}s")
HELLO_BYTES = _GREETING.size
PROOF_BYTES = 32
ANSWER_BYTES = _GREETING.size + SESSION_BYTES


class Greeting(NamedTuple):
    """What one side says of itself before it has proved anything."""

    version: int
    has_secret: bool

    @classmethod
    def parse(cls, data: bytes) -> Greeting:
        """Read the first bytes of a HELLO or an ANSWER."""
        _magic, version, has_secret, _nonce = _GREETING.unpack_from(data)
        return cls(version, bool(has_secret))


def make_hello(secret: bytes | None) -> bytes:
    """Return a HELLO with a fresh nonce."""
    return _GREETING.pack(MAGIC, PROTOCOL_VERSION, secret is not None, os.urandom(_NONCE_BYTES))


def make_proof(secret: bytes | None, label: bytes, exchange: bytes) -> bytes:
    """Return the proof of one side over HELLO and ANSWER."""
    if secret is None:
        return bytes(PROOF_BYTES)
    return hmac.digest(secret, b"fastvideo_comm " + label + b"\0" + exchange, "sha256")


def is_proof(proof: bytes, secret: bytes | None, label: bytes, exchange: bytes) -> bool:
    """Whether the other side's proof is right."""
    return hmac.compare_digest(proof, make_proof(secret, label, exchange))


def link_key(secret: bytes | None, exchange: bytes) -> bytes | None:
    """Return the key of this connection; None without a secret."""
    return None if secret is None else make_proof(secret, b"link", exchange)


class HandshakeError(FrameError):
    """The other side did not prove that it belongs to the group.

    Attributes:
        last_words: The last message to the other side, so that it can tell its user the reason.
    """

    def __init__(self, message: str, last_words: bytes = b"") -> None:
        """Keep the text of the error and the last message to the other side."""
        super().__init__(message)
        self.last_words = last_words


class ServerHandshake:
    """The store's half, fed with what arrives.

    Attributes:
        key: The key of the connection, when the handshake is done.
        is_done: Whether the rank has proved itself.
    """

    def __init__(self, secret: bytes | None, session: bytes) -> None:
        """Wait for a HELLO."""
        self._secret = secret
        self._session = session
        self._received = b""
        self._exchange = b""
        self.key: bytes | None = None
        self.is_done = False

    @property
    def num_missing(self) -> int:
        """How many bytes of the present message are still to come."""
        return (PROOF_BYTES if self._exchange else HELLO_BYTES) - len(self._received)

    def feed(self, data: bytes) -> bytes:
        """Take in at most `num_missing` bytes and return what to send.

        Raises:
            HandshakeError: The other side is something else, or holds another secret.
        """
        self._received += data
        if not self._exchange and not MAGIC.startswith(self._received[: len(MAGIC)]):
            raise HandshakeError("it does not speak this protocol")
        if self.num_missing:
            return b""
        message, self._received = self._received, b""
        if not self._exchange:
            return self._answer(message)
        if not is_proof(message, self._secret, b"rank", self._exchange):
            raise HandshakeError("it has another secret", bytes(PROOF_BYTES))
        self.key = link_key(self._secret, self._exchange)
        self.is_done = True
        return make_proof(self._secret, b"store", self._exchange)

    def _answer(self, hello: bytes) -> bytes:
        answer = make_hello(self._secret) + self._session
        rank = Greeting.parse(hello)
        if rank.version != PROTOCOL_VERSION:
            raise HandshakeError(f"it speaks protocol version {rank.version}", answer)
        if rank.has_secret != (self._secret is not None):
            has = "a secret" if rank.has_secret else "no secret"
            raise HandshakeError(f"it has {has}", answer)
        self._exchange = hello + answer
        return answer


def shake_hands(
    sock: socket.socket, secret: bytes | None, deadline: float
) -> tuple[bytes | None, bytes]:
    """Do the rank's half on a connected socket; return the connection's key and the session.

    Raises:
        AuthenticationError: The store does not hold the same secret.
        JoinError: What listens there is no store, or speaks another version.
        EOFError: The other side hung up.
        OSError: The connection is gone; TimeoutError where the other side does not answer.
    """
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
