"""AES-256-GCM (NIST SP 800-38D) of messages in pieces, by the optional package `cryptography`."""

from __future__ import annotations

from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM

NONCE_BYTES = 12
TAG_BYTES = 16

# Up to this size, it is faster to join the pieces and to encrypt them by one call.
_JOINED_BELOW = 64 * 1024


class AesGcm:
    """AES-256-GCM with one key. A nonce must not be used twice with the same key.

    >>> aes = AesGcm(bytes(32))
    >>> sealed = aes.encrypt(bytes(12), b"about", [b"hel", b"lo"])
    >>> bytes(aes.decrypt(bytes(12), b"about", memoryview(sealed)))
    b'hello'
    >>> aes.decrypt(bytes(12), b"other", memoryview(sealed)) is None
    True
    """

    def __init__(self, key: bytes, *, keeps_buffer: bool = False) -> None:
        """Take the key; `keeps_buffer` is explained at `MessageSeal`."""
        self._key = key
        self._aead = AESGCM(key)
        self._keeps_buffer = keeps_buffer
        self._buffer = bytearray()

    def encrypt(
        self, nonce: bytes, context: bytes, parts: Sequence[bytes | memoryview]
    ) -> bytes | memoryview:
        """Return the encrypted pieces and their tag, which covers the context as well."""
        length = sum(map(len, parts))
        if length <= _JOINED_BELOW:
            return self._aead.encrypt(nonce, b"".join(parts), context)
        buffer = self._buffer
        if len(buffer) < length + TAG_BYTES:
            buffer = bytearray(length + TAG_BYTES)
            if self._keeps_buffer:
                self._buffer = buffer
        sealed = memoryview(buffer)[: length + TAG_BYTES]
        encryptor = Cipher(AES(self._key), GCM(nonce)).encryptor()
        encryptor.authenticate_additional_data(context)
        start = 0
        for part in parts:
            encryptor.update_into(part, sealed[start:])
            start += len(part)
        encryptor.finalize()
        sealed[length:] = encryptor.tag
        return sealed

    def decrypt(self, nonce: bytes, context: bytes, sealed: memoryview) -> memoryview | None:
        """Return the decrypted bytes, or None where the tag is wrong.

        More than 64 KiB are decrypted in place where `sealed` is writable.
        """
        length = len(sealed) - TAG_BYTES
        try:
            if length <= _JOINED_BELOW:
                return memoryview(self._aead.decrypt(nonce, sealed, context))
            if sealed.readonly:
                sealed = memoryview(bytearray(sealed))
            decryptor = Cipher(AES(self._key), GCM(nonce, bytes(sealed[length:]))).decryptor()
            decryptor.authenticate_additional_data(context)
            decryptor.update_into(sealed[:length], sealed)
            decryptor.finalize()
        except InvalidTag:
            return None
        return sealed[:length]

    def tag(self, nonce: bytes, context: bytes, parts: Sequence[bytes | memoryview]) -> bytes:
        """Return the tag of pieces that are not encrypted (GMAC)."""
        if sum(map(len, parts)) <= _JOINED_BELOW:
            return self._aead.encrypt(nonce, b"", b"".join((context, *parts)))
        encryptor = Cipher(AES(self._key), GCM(nonce)).encryptor()
        for part in (context, *parts):
            encryptor.authenticate_additional_data(part)
        encryptor.finalize()
        return encryptor.tag
