"""Objects to bytes and back without pickle: msgpack, with markers for what msgpack does not know.

The encoded form is `<doc bytes><number of attachments><their sizes>`, the msgpack document, then
the attachments (byte strings and arrays from 64 KiB on), each aligned to 64 bytes so that an array
can be used where it was received. A type that msgpack lacks is an array whose first element is a
marker (an empty extension value), so nothing nests in nothing else and both ways are linear.

Nothing received names code: dataclasses, enums and other classes are built only where this side
registered them. No array header above `_LONG` items is accepted, so that a document which lies
about its lengths cannot make the decoder reserve memory; longer lists travel in pieces.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any, cast

import msgpack
import torch

from fastvideo_comm.array_codec import (
    array_fields,
    build_array,
    build_tensor,
    dtype_from_name,
    dtype_name,
    is_array_type,
    tensor_fields,
)
from fastvideo_comm.errors import DecodeError
from fastvideo_comm.type_registry import RegisteredType, describe_type

Buffer = bytes | bytearray | memoryview

_HEAD = struct.Struct("<II")
_SIZE = struct.Struct("<Q")
_ALIGNMENT = 64
_ATTACHED_FROM = 64 * 1024
_LONG = 16384
_MAX_DEPTH = 128

_PLAIN = frozenset({type(None), bool, int, float, str})

(
    _BIG_INT, _TUPLE, _SET, _FROZENSET, _LIST, _DICT, _BYTES, _BYTEARRAY, _DATETIME, _TIMEDELTA,
    _TORCH_SIZE, _DTYPE, _DEVICE, _TENSOR, _ARRAY, _REGISTERED,
) = range(1, 17)  # fmt: skip
_IN_PIECES = 64


class _Marker(int):
    """The first element of an array that stands for something else."""


class _UnsupportedError(Exception):
    """Carries the path to the offending object outwards, one step per level."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.steps: list[str] = []


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
    sender and on the receiver. Subclasses of these are not supported as such.
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
        """Allow instances of exactly this class; every rank that meets them must do the same.

        >>> import ctypes
        >>> class Handle(ctypes.Structure):
        ...     _fields_ = [("internal", ctypes.c_byte * 4)]
        >>> codec = ObjectCodec()
        >>> codec.register_type(Handle, to_fields=bytes, from_fields=Handle.from_buffer_copy)
        >>> bytes(codec.decode(codec.encode(Handle())))
        b'\\x00\\x00\\x00\\x00'

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
        if cls in _PLAIN or cls in _LOWER or is_array_type(cls) or cls in self._by_type:
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
        encoder = _Encoder(self._by_type)
        try:
            doc = msgpack.packb(
                encoder.lower(obj, 0),
                default=_lower_big_int,
                strict_types=True,
                unicode_errors="surrogatepass",
            )
        except _UnsupportedError as error:
            path = "obj" + "".join(reversed(error.steps))
            raise TypeError(f"{path} {error.reason}") from None
        attachments = encoder.attachments
        if not attachments:
            return [_HEAD.pack(len(doc), 0) + doc]
        sizes = b"".join(_SIZE.pack(len(attachment)) for attachment in attachments)
        parts: list[bytes | memoryview] = [_HEAD.pack(len(doc), len(attachments)) + sizes + doc]
        end = len(parts[0])
        for attachment in attachments:
            parts += [bytes(-end % _ALIGNMENT), attachment]
            end += -end % _ALIGNMENT + len(attachment)
        return parts

    def decode(self, data: Buffer) -> Any:
        """Return the object; its large arrays share `data` where that is writable.

        Raises:
            DecodeError: `data` is not an encoded object, or one of a type not registered here.
        """
        try:
            doc, attachments = _split(memoryview(data))
            decoder = _Decoder(self._by_name, attachments)
            obj = msgpack.unpackb(
                doc,
                list_hook=decoder.raise_list,
                ext_hook=decoder.raise_ext,
                strict_map_key=False,
                unicode_errors="surrogatepass",
                max_array_len=_LONG,
            )
            decoder.finish()
        # msgpack, torch, numpy and registered functions answer nonsense with nearly anything.
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise DecodeError(f"the message must hold an encoded object: {reason}") from error
        return obj


class _Encoder:
    """One run of `encode_parts`: turns an object into what msgpack can pack."""

    __slots__ = ("attachments", "registered")

    def __init__(self, registered: dict[type, RegisteredType]) -> None:
        self.registered = registered
        self.attachments: list[bytes | memoryview] = []

    def lower(self, obj: Any, depth: int) -> Any:
        kind = type(obj)
        if kind in _PLAIN:
            return obj
        if depth > _MAX_DEPTH:
            raise ValueError(f"obj must nest at most {_MAX_DEPTH} levels, got more")
        function = _LOWER.get(kind)
        if function is not None:
            return function(self, obj, depth)
        entry = self.registered.get(kind)
        if entry is not None:
            return [_mark(_REGISTERED), entry.name, self.lower(entry.to_fields(obj), depth + 1)]
        if is_array_type(kind):
            return self.lower_array(_ARRAY, array_fields, obj)
        raise _UnsupportedError(
            f"must be of a supported or registered type, got {kind.__qualname__}"
        )

    def lower_array(self, code: int, fields: Callable[[Any], Any], obj: Any) -> Any:
        try:
            name, shape, data = fields(obj)
        except TypeError as error:
            raise _UnsupportedError(f"must be sendable: {error}") from None
        return [_mark(code), name, shape, self.lower_bytes(data)]

    def lower_bytes(self, data: bytes | memoryview) -> bytes | int:
        if len(data) < _ATTACHED_FROM:
            return bytes(data)
        self.attachments.append(data)
        return len(self.attachments) - 1

    def lower_items(self, code: int, items: Sequence[Any], depth: int) -> Any:
        if _PLAIN.issuperset(map(type, items)):
            return _array(code, items)
        return _array(code, [self.lower_step(i, item, depth) for i, item in enumerate(items)])

    def lower_dict(self, obj: dict[Any, Any], depth: int) -> Any:
        if _PLAIN.issuperset(map(type, obj)):
            if _PLAIN.issuperset(map(type, obj.values())):
                return obj
            return {
                key: value if type(value) in _PLAIN else self.lower_step(key, value, depth)
                for key, value in obj.items()
            }
        flat: list[Any] = []
        for key, value in obj.items():
            flat += self.lower_step(key, key, depth), self.lower_step(key, value, depth)
        return _array(_DICT, flat)

    def lower_step(self, key: object, obj: Any, depth: int) -> Any:
        try:
            return self.lower(obj, depth + 1)
        except _UnsupportedError as error:
            error.steps.append(f'["{key}"]' if isinstance(key, str) else f"[{key!r}]")
            raise

    def lower_datetime(self, obj: datetime, depth: int) -> Any:
        zone: Any = None
        if obj.tzinfo is not None:
            if type(obj.tzinfo) is not timezone:
                raise _UnsupportedError(f"must have a fixed offset, got {obj.tzinfo!r}")
            offset = obj.utcoffset()
            zone = [None if obj.tzinfo is timezone.utc else obj.tzname()]
            zone += _timedelta_fields(cast(timedelta, offset))
        fields = [obj.year, obj.month, obj.day, obj.hour, obj.minute, obj.second, obj.microsecond]
        return [_mark(_DATETIME), fields, obj.fold, zone]


def _mark(code: int) -> msgpack.ExtType:
    return msgpack.ExtType(code, b"")


def _array(code: int, lowered: Sequence[Any]) -> Any:
    if len(lowered) < _LONG:
        return list(lowered) if code == _LIST else [_mark(code), *lowered]
    pieces = [list(lowered[i : i + _LONG]) for i in range(0, len(lowered), _LONG)]
    if len(pieces) >= _LONG:
        raise ValueError(f"obj must hold fewer than {_LONG * (_LONG - 1)} items in one container")
    return [_mark(code | _IN_PIECES), *pieces]


def _lower_big_int(obj: int) -> msgpack.ExtType:
    # msgpack calls this for integers outside 64 bits; `lower` has refused all other types.
    return msgpack.ExtType(_BIG_INT, obj.to_bytes(obj.bit_length() // 8 + 1, "little", signed=True))


def _timedelta_fields(obj: timedelta) -> list[int]:
    return [obj.days, obj.seconds, obj.microseconds]


_LOWER: dict[type, Callable[[_Encoder, Any, int], Any]] = {
    list: lambda encoder, obj, depth: encoder.lower_items(_LIST, obj, depth),
    tuple: lambda encoder, obj, depth: encoder.lower_items(_TUPLE, obj, depth),
    set: lambda encoder, obj, depth: encoder.lower_items(_SET, list(obj), depth),
    frozenset: lambda encoder, obj, depth: encoder.lower_items(_FROZENSET, list(obj), depth),
    dict: _Encoder.lower_dict,
    bytes: lambda encoder, obj, _: (
        obj if len(obj) < _ATTACHED_FROM else [_mark(_BYTES), encoder.lower_bytes(obj)]
    ),
    bytearray: lambda encoder, obj, _: [
        _mark(_BYTEARRAY),
        encoder.lower_bytes(memoryview(obj)),
    ],
    datetime: _Encoder.lower_datetime,
    timedelta: lambda _encoder, obj, _: [_mark(_TIMEDELTA), *_timedelta_fields(obj)],
    torch.Size: lambda _encoder, obj, _: [_mark(_TORCH_SIZE), *obj],
    torch.dtype: lambda _encoder, obj, _: [_mark(_DTYPE), dtype_name(obj)],
    torch.device: lambda _encoder, obj, _: [_mark(_DEVICE), str(obj)],
    torch.Tensor: lambda encoder, obj, _: encoder.lower_array(_TENSOR, tensor_fields, obj),
}


class _Decoder:
    """One run of `decode`: the hooks that msgpack calls for arrays and extension values."""

    __slots__ = ("attachments", "markers", "registered")

    def __init__(
        self, registered: dict[str, RegisteredType], attachments: list[memoryview | None]
    ) -> None:
        self.registered = registered
        self.attachments = attachments
        self.markers = 0

    def raise_ext(self, code: int, data: bytes) -> Any:
        if code == _BIG_INT:
            return int.from_bytes(data, "little", signed=True)
        if data or (code & ~_IN_PIECES) not in _RAISE:
            raise ValueError(f"unknown extension value {code}")
        self.markers += 1
        return _Marker(code)

    def raise_list(self, items: list[Any]) -> Any:
        if not items or type(items[0]) is not _Marker:
            return items
        self.markers -= 1
        code = items[0]
        del items[0]
        if code & _IN_PIECES:
            items = [item for piece in items for item in _piece(piece)]
        return _RAISE[code & ~_IN_PIECES](self, items)

    def finish(self) -> None:
        # A marker anywhere but in front of an array would be handed to the caller as an int.
        if self.markers:
            raise ValueError("a marker stands where no array begins")
        if any(attachment is not None for attachment in self.attachments):
            raise ValueError("an attachment is not used")

    def raise_bytes(self, data: object) -> memoryview:
        if type(data) is bytes:
            return memoryview(data)
        if type(data) is not int or not 0 <= data < len(self.attachments):
            raise ValueError(f"there is no attachment {data!r}")
        attachment = self.attachments[data]
        if attachment is None:
            raise ValueError(f"attachment {data} is used twice")
        self.attachments[data] = None
        return attachment

    def raise_registered(self, name: object, fields: object) -> Any:
        entry = self.registered.get(name) if isinstance(name, str) else None
        if entry is None:
            raise ValueError(f"type {name!r} is not registered on this rank")
        return entry.from_fields(fields)


def _piece(piece: object) -> list[Any]:
    if type(piece) is not list:
        raise ValueError("a piece of a long container must be an array")
    return piece


def _raise_dict(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))


def _raise_datetime(fields: list[int], fold: int, zone: list[Any] | None) -> datetime:
    tzinfo = None
    if zone is not None:
        name, *offset = zone
        delta = _raise_timedelta(*offset)
        tzinfo = timezone.utc if name is None else timezone(delta, name)
    return datetime(*_ints(fields, 7), fold=fold, tzinfo=tzinfo)  # type: ignore[misc]


def _raise_timedelta(*fields: int) -> timedelta:
    return timedelta(**dict(zip(("days", "seconds", "microseconds"), _ints(fields, 3), strict=True)))


def _ints(fields: Sequence[Any], count: int) -> Sequence[int]:
    if len(fields) != count or any(type(field) is not int for field in fields):
        raise ValueError(f"there must be {count} integers, got {fields!r}")
    return fields


_RAISE: dict[int, Callable[[_Decoder, list[Any]], Any]] = {
    _TUPLE: lambda _, items: tuple(items),
    _SET: lambda _, items: set(items),
    _FROZENSET: lambda _, items: frozenset(items),
    _LIST: lambda _, items: items,
    _DICT: lambda _, items: _raise_dict(items),
    _BYTES: lambda decoder, items: bytes(decoder.raise_bytes(*items)),
    _BYTEARRAY: lambda decoder, items: bytearray(decoder.raise_bytes(*items)),
    _DATETIME: lambda _, items: _raise_datetime(*items),
    _TIMEDELTA: lambda _, items: _raise_timedelta(*items),
    _TORCH_SIZE: lambda _, items: torch.Size(_ints(items, len(items))),
    _DTYPE: lambda _, items: dtype_from_name(*items),
    _DEVICE: lambda _, items: torch.device(*items),
    _TENSOR: lambda decoder, items: build_tensor(*_array_fields(decoder, *items)),
    _ARRAY: lambda decoder, items: build_array(*_array_fields(decoder, *items)),
    _REGISTERED: lambda decoder, items: decoder.raise_registered(*items),
}


def _array_fields(
    decoder: _Decoder, name: object, shape: object, data: object
) -> tuple[object, object, memoryview]:
    return name, shape, decoder.raise_bytes(data)


def _split(view: memoryview) -> tuple[memoryview, list[memoryview | None]]:
    """Cut an encoded object into its document and its attachments; every byte must belong."""
    doc_size, num_attachments = _HEAD.unpack_from(view)
    start = _HEAD.size + num_attachments * _SIZE.size
    end = start + doc_size
    if end > len(view):
        raise ValueError(f"it must have at least {end} bytes, got {len(view)}")
    doc = view[start:end]
    attachments: list[memoryview | None] = []
    for index in range(num_attachments):
        (size,) = _SIZE.unpack_from(view, _HEAD.size + index * _SIZE.size)
        begin = end + -end % _ALIGNMENT
        if any(view[end:begin]):
            raise ValueError("the bytes between attachments must be zero")
        end = begin + size
        attachments.append(view[begin:end])
    if end != len(view):
        raise ValueError(f"it must have {end} bytes, got {len(view)}")
    return doc, attachments
