"""Objects to bytes and back without pickle: msgpack, with markers for what msgpack does not know.

A message cannot name code: dataclasses, enums and other classes are built only where this side has
registered them. `format` describes the bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack  # type: ignore[import-untyped]

from fastvideo_comm.errors import DecodeError
from fastvideo_comm.object_channel.array_codec import is_array_type
from fastvideo_comm.object_channel.decoder import Decoder, split
from fastvideo_comm.object_channel.encoder import (
    LOWER,
    PLAIN,
    Encoder,
    UnsupportedError,
)
from fastvideo_comm.object_channel.format import (
    ALIGNMENT,
    ARRAY_COST,
    FREE_COST,
    HEAD,
    ITEM_COST,
    LONG,
    MARKER_COSTS,
    PADDED,
    SIZE,
    Buffer,
)
from fastvideo_comm.object_channel.type_registry import RegisteredType, describe_type


class ObjectCodec:
    """Encodes objects strictly: what arrives equals what was sent, in value and in type.

    >>> codec = ObjectCodec()
    >>> codec.decode(codec.encode({"shape": (2, 3), "steps": {1, 2}}))
    {'shape': (2, 3), 'steps': {1, 2}}
    >>> codec.encode({"a": [0, 1, 2, object()]})
    Traceback (most recent call last):
    TypeError: obj["a"][3] must be of a supported or registered type, got object

    Supported: None, bool, int of any size, float, str, bytes, bytearray, list, tuple, dict with any
    hashable key, set, frozenset, datetime (naive or with a fixed offset), timedelta, torch.Size,
    dtype, device, dense CPU tensors, numpy arrays, and every type given to `register_type`, on the
    sender and on the receiver. A subclass of a supported type must be registered.
    """

    name = "msgpack"

    def __init__(self) -> None:
        """Start with the built-in types only."""
        self._by_type: dict[type, RegisteredType] = {}
        self._by_name: dict[str, RegisteredType] = {}

    def register_type(
        self,
        cls: type,
        *,
        name: str | None = None,
        to_fields: Callable[[Any], Any] | None = None,
        from_fields: Callable[[Any], Any] | None = None,
    ) -> None:
        r"""Allow instances of exactly this class; every rank that sends or receives one must do so.

        >>> import ctypes
        >>> class Handle(ctypes.Structure):
        ...     _fields_ = [("internal", ctypes.c_byte * 4)]
        >>> codec = ObjectCodec()
        >>> codec.register_type(Handle, to_fields=bytes, from_fields=Handle.from_buffer_copy)
        >>> bytes(codec.decode(codec.encode(Handle())))
        b'\x00\x00\x00\x00'

        Args:
            cls: An enum, a dataclass, or any class with the two functions given. A dataclass is
                rebuilt field by field, without calling its `__init__` or `__post_init__`.
            name: What the class is called in messages; its module and qualified name by default.
            to_fields: Turns an instance into supported objects.
            from_fields: Turns these back into an instance. It is called with what a peer sent.

        Raises:
            TypeError: `cls` is no class, or one that needs the two functions.
            ValueError: The class is supported already, or the name is taken.
        """
        entry = describe_type(cls, name, to_fields, from_fields)
        if cls in PLAIN or cls in LOWER or is_array_type(cls) or cls in self._by_type:
            raise ValueError(f"cls must not be supported already, got {cls.__qualname__}")
        if entry.name in self._by_name:
            raise ValueError(f"name must be unique in a codec, got {entry.name!r}")
        self._by_type[cls] = self._by_name[entry.name] = entry

    def encode(self, obj: object) -> bytes:
        """Return the encoded object in one piece.

        Raises:
            TypeError: Something in `obj` is not supported; the message gives the path to it.
            ValueError: `obj` nests deeper than 128 levels, or contains itself.
        """
        return b"".join(self.encode_parts(obj))

    def encode_parts(self, obj: object) -> list[bytes | memoryview]:
        """Return the encoded object as buffers, without copying large tensors and byte strings.

        Raises:
            TypeError: Something in `obj` is not supported; the message gives the path to it.
            ValueError: `obj` nests deeper than 128 levels, or contains itself.
        """
        try:
            encoder, doc = self._pack(obj, PLAIN)
        except UnicodeEncodeError:  # a code point that UTF-8 lacks
            encoder, doc = self._pack(obj, PLAIN - {str})
        attachments = encoder.attachments
        missing = encoder.cost - FREE_COST - len(doc) - sum(map(len, attachments))
        if missing > 0:
            doc = _PADDED + doc + msgpack.packb(bytes(missing + _PADDED_COST))
        if not attachments:
            return [HEAD.pack(len(doc), 0) + doc]
        sizes = b"".join(SIZE.pack(len(attachment)) for attachment in attachments)
        parts: list[bytes | memoryview] = [HEAD.pack(len(doc), len(attachments)) + sizes + doc]
        end = len(parts[0])
        for attachment in attachments:
            parts += [bytes(-end % ALIGNMENT), attachment]
            end += -end % ALIGNMENT + len(attachment)
        return parts

    def _pack(self, obj: object, plain: frozenset[type]) -> tuple[Encoder, bytes]:
        encoder = Encoder(self._by_type, plain)
        try:
            lowered = encoder.lower(obj, 0)
        except UnsupportedError as error:
            path = "obj" + "".join(reversed(error.steps))
            raise TypeError(f"{path} {error.reason}") from None
        return encoder, msgpack.packb(lowered, default=encoder.lower_big_int)

    def decode(self, data: Buffer) -> Any:
        """Return the object; its large arrays share `data` where `data` is writable.

        Raises:
            DecodeError: `data` is no encoded object, or holds a type that is not registered here.
        """
        try:
            doc, attachments = split(memoryview(data))
            decoder = Decoder(self._by_name, attachments, len(data))
            obj = msgpack.unpackb(
                doc,
                list_hook=decoder.raise_list,
                ext_hook=decoder.raise_ext,
                object_pairs_hook=decoder.raise_map,
                max_array_len=LONG,
                max_map_len=0,
            )
            return decoder.finish(obj)
        # msgpack, torch, numpy and registered functions raise nearly any exception for nonsense.
        except Exception as error:
            reason = _reason(error)
            raise DecodeError(f"the message must hold an encoded object: {reason}") from error


_PADDED = b"\x93" + msgpack.packb(msgpack.ExtType(PADDED, b""))
_PADDED_COST = MARKER_COSTS[PADDED] + ARRAY_COST + 3 * ITEM_COST
_REASON_CHARACTERS = 300


def _reason(error: Exception) -> str:
    try:
        return str(error)[:_REASON_CHARACTERS] or type(error).__name__
    except Exception:  # an error about an integer that is too long to be shown
        return type(error).__name__
