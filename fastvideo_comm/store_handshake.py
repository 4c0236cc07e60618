"""How a rank and the store prove to each other that they hold the secret, before anything else.

    rank -> store   HELLO   magic, protocol version, whether it has a secret, nonce
    store -> rank   ANSWER  the same of the store, session, proof over both
    rank -> store   PROOF   proof over both

A proof is an HMAC under the secret over a label and the whole exchange, and so is the key of the
connection; nobody can reuse one, because each side put a fresh nonce in. All three messages have
fixed sizes: before the proof was checked, no length and no text from the other side is looked at.
"""

from __future__ import annotations

import hmac
import os
import struct
from typing import NamedTuple

PROTOCOL_VERSION = 1
MAGIC = b"FVCOMM\r\n"
SESSION_BYTES = 16
_NONCE_BYTES = 32
_GREETING = struct.Struct(f"<8sHB{_NONCE_BYTES}s")
HELLO_BYTES = _GREETING.size
PROOF_BYTES = 32
ANSWER_BYTES = _GREETING.size + SESSION_BYTES + PROOF_BYTES


class Greeting(NamedTuple):
    """What one side says of itself before it is believed."""

    magic: bytes
    version: int
    has_secret: bool
    nonce: bytes

    @classmethod
    def parse(cls, data: bytes) -> Greeting:
        """Read the first bytes of a HELLO or an ANSWER."""
        magic, version, has_secret, nonce = _GREETING.unpack_from(data)
        return cls(magic, version, bool(has_secret), nonce)


def make_hello(secret: bytes | None) -> bytes:
    """Return a HELLO with a fresh nonce."""
    return _GREETING.pack(MAGIC, PROTOCOL_VERSION, secret is not None, os.urandom(_NONCE_BYTES))


def make_answer(secret: bytes | None, hello: bytes, session: bytes) -> bytes:
    """Return the store's ANSWER to a HELLO."""
    answer = make_hello(secret) + session
    return answer + make_proof(secret, b"store", hello + answer)


def make_proof(secret: bytes | None, label: bytes, exchange: bytes) -> bytes:
    """Return the proof of one side over HELLO and ANSWER (without its proof)."""
    if secret is None:
        return bytes(PROOF_BYTES)
    return hmac.digest(secret, b"fastvideo_comm " + label + b"\0" + exchange, "sha256")


def is_proof(proof: bytes, secret: bytes | None, label: bytes, exchange: bytes) -> bool:
    """Whether the other side's proof is right."""
    return hmac.compare_digest(proof, make_proof(secret, label, exchange))


def link_key(secret: bytes | None, exchange: bytes) -> bytes | None:
    """Return the key of this connection; None without a secret."""
    return None if secret is None else make_proof(secret, b"link", exchange)
