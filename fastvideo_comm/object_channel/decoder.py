"""The receiving half of `ObjectCodec`: builds objects from a document and checks every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

import torch
from msgpack import Timestamp  # type: ignore[import-untyped]

from fastvideo_comm.object_channel.array_codec import (
    build_array,
    build_tensor,
    device_from_name,
    dtype_from_name,
)
from fastvideo_comm.object_channel.format import (
    ALIGNMENT,
    ARRAY,
    ARRAY_COST,
    ATTACHED_FROM,
    BIG_INT,
    BYTEARRAY,
    BYTES,
    CONTAINERS,
    DATETIME,
    DEVICE,
    DICT,
    DTYPE,
    FREE_COST,
    FROZENSET,
    HEAD,
    IN_PIECES,
    ITEM_COST,
    LIST,
    MARKER_COSTS,
    PADDED,
    REGISTERED,
    SET,
    SIZE,
    TENSOR,
    TEXT,
    TIMEDELTA,
    TORCH_SIZE,
    TUPLE,
)
from fastvideo_comm.object_channel.hashing import HashingClock, cost_of_keys, has_keyed_hashes
from fastvideo_comm.object_channel.type_registry import RegisteredType


class _Marker(int):
    """The first element of an array that stands for something else."""


# No item may be one of these: a marker belongs in front of an array, and the codec does not use
# msgpack's own form of a time.
_NEVER_ITEMS = frozenset({_Marker, Timestamp})
_BIG_INT_BYTES = 9
_SHOWN = 100
_SMALL_INTS = range(-(2**63), 2**63)


class Decoder:
    """One run of `decode`: the hooks that msgpack calls for arrays and extension values."""

    __slots__ = ("attachments", "clock", "cost_left", "registered")

    def __init__(
        self,
        registered: dict[str, RegisteredType],
        attachments: list[memoryview | None],
        num_bytes: int,
    ) -> None:
        """Start on one message of this many bytes, with these types and attachments."""
        self.registered = registered
        self.attachments = attachments
        self.cost_left = num_bytes + FREE_COST
        self.clock = HashingClock(num_bytes)

    def spend(self, cost: int) -> None:
        """Count the cost of what is built next; ValueError where the message is too short."""
        self.cost_left -= cost
        if self.cost_left < 0:
            raise ValueError("it must be longer for as many objects as it holds")

    def raise_ext(self, code: int, data: bytes) -> Any:
        """Return the integer or the marker that an extension value stands for."""
        # The cost is counted before the array behind a marker is built.
        self.spend(MARKER_COSTS[code])
        if code == BIG_INT:
            if len(data) < _BIG_INT_BYTES:
                raise ValueError(f"a long integer must have at least {_BIG_INT_BYTES} bytes")
            return int.from_bytes(data, "little", signed=True)
        kind = code & ~IN_PIECES
        if data or kind not in _RAISE or (code != kind and kind not in CONTAINERS):
            raise ValueError(f"unknown extension value {code}")
        return _Marker(code)

    def raise_list(self, items: list[Any]) -> Any:
        """Return the array itself, or what its marker says."""
        self.spend(ARRAY_COST + ITEM_COST * len(items))
        code = 0
        if items and type(items[0]) is _Marker:
            code = items.pop(0)
        if not _NEVER_ITEMS.isdisjoint(map(type, items)):
            raise ValueError("an array must hold objects only")
        if not code:
            return items
        if code & IN_PIECES:
            items = _joined(items)
        return _RAISE[code & ~IN_PIECES](self, items)

    def raise_map(self, _pairs: Any) -> Any:
        """Refuse a map of msgpack: a dict travels as an array."""
        raise ValueError("a dict must be an array")

    def finish(self, obj: Any) -> Any:
        """Return the object of a document; ValueError if it is none or attachments are unused."""
        if type(obj) in _NEVER_ITEMS:
            raise ValueError("a document must hold an object")
        if any(attachment is not None for attachment in self.attachments):
            raise ValueError("an attachment is not used")
        return obj

    def build_set(self, keys: list[Any]) -> set[Any]:
        """Return the set of these keys, in bounded time."""
        is_keyed = has_keyed_hashes(keys)
        self.spend(cost_of_keys(len(keys), is_keyed))
        return set(keys) if is_keyed else self.clock.build_set(keys)

    def build_dict(self, items: list[Any]) -> dict[Any, Any]:
        """Return the dict of these keys and values, in bounded time."""
        keys, values = items[::2], items[1::2]
        is_keyed = has_keyed_hashes(keys)
        self.spend(cost_of_keys(len(keys), is_keyed))
        pairs = zip(keys, values, strict=True)
        return dict(pairs) if is_keyed else self.clock.build_dict(pairs)

    def raise_bytes(self, data: object) -> memoryview:
        """Return the bytes in the document, or the attachment with this index."""
        if type(data) is bytes:
            return memoryview(data)
        if type(data) is not int or not 0 <= data < len(self.attachments):
            raise ValueError("there is no such attachment")
        attachment = self.attachments[data]
        if attachment is None:
            raise ValueError(f"attachment {data} is used twice")
        self.attachments[data] = None
        return attachment

    def raise_registered(self, name: object, fields: object) -> Any:
        """Return an instance of a registered type."""
        entry = self.registered.get(name) if isinstance(name, str) else None
        if entry is None:
            shown = f"{name[:_SHOWN]!r}" if isinstance(name, str) else "of no name"
            raise ValueError(f"type {shown} is not registered on this rank")
        return entry.from_fields(fields)


def _joined(pieces: list[Any]) -> list[Any]:
    joined: list[Any] = []
    for piece in pieces:
        if type(piece) is not list:
            raise ValueError("a piece of a long container must be an array")
        joined += piece
        piece.clear()  # so that no more than one piece is held twice
    return joined


def _raise_padded(items: list[Any]) -> Any:
    obj, padding = items
    if type(padding) is not bytes or padding != bytes(len(padding)):
        raise ValueError("padding must be zeros")
    return obj


def _raise_datetime(fields: list[Any], fold: int, zone: list[Any] | None) -> datetime:
    tzinfo = None
    if type(fields) is not list or type(fold) is not int:
        raise ValueError("a datetime must be a list of fields and a fold")
    if zone is not None:
        name, *offset = zone
        delta = _raise_timedelta(offset)
        tzinfo = timezone(delta) if name is None else timezone(delta, name)
    year, month, day, hour, minute, second, microsecond = _ints(fields, 7)
    return datetime(year, month, day, hour, minute, second, microsecond, tzinfo, fold=fold)


def _raise_timedelta(fields: list[Any]) -> timedelta:
    days, seconds, microseconds = _ints(fields, 3)
    return timedelta(days, seconds, microseconds)


def _ints(fields: Sequence[Any], count: int) -> Sequence[int]:
    if len(fields) != count:
        raise ValueError(f"there must be {count} integers")
    if any(type(field) is not int or field not in _SMALL_INTS for field in fields):
        raise ValueError("the integers must have 64 bits")
    return fields


_RAISE: dict[int, Callable[[Decoder, list[Any]], Any]] = {
    TUPLE: lambda _, items: tuple(items),
    SET: lambda decoder, items: decoder.build_set(items),
    FROZENSET: lambda decoder, items: frozenset(decoder.build_set(items)),
    LIST: lambda _, items: items,
    DICT: lambda decoder, items: decoder.build_dict(items),
    BYTES: lambda decoder, items: bytes(decoder.raise_bytes(*items)),
    BYTEARRAY: lambda decoder, items: bytearray(decoder.raise_bytes(*items)),
    DATETIME: lambda _, items: _raise_datetime(*items),
    TIMEDELTA: lambda _, items: _raise_timedelta(items),
    TORCH_SIZE: lambda _, items: torch.Size(_ints(items, len(items))),
    DTYPE: lambda _, items: dtype_from_name(*items),
    DEVICE: lambda _, items: device_from_name(*items),
    TENSOR: lambda decoder, items: build_tensor(*_array_fields(decoder, *items)),
    ARRAY: lambda decoder, items: build_array(*_array_fields(decoder, *items)),
    REGISTERED: lambda decoder, items: decoder.raise_registered(*items),
    TEXT: lambda _, items: "".join(map(chr, items)),
    PADDED: lambda _, items: _raise_padded(items),
}


def _array_fields(
    decoder: Decoder, name: object, shape: object, data: object
) -> tuple[object, object, memoryview]:
    return name, shape, decoder.raise_bytes(data)


def split(view: memoryview) -> tuple[memoryview, list[memoryview | None]]:
    """Cut an encoded object into its document and its attachments; every byte must belong."""
    doc_size, num_attachments = HEAD.unpack_from(view)
    start = HEAD.size + num_attachments * SIZE.size
    end = start + doc_size
    if end > len(view):
        raise ValueError(f"it must have at least {end} bytes, got {len(view)}")
    doc = view[start:end]
    attachments: list[memoryview | None] = []
    for index in range(num_attachments):
        (size,) = SIZE.unpack_from(view, HEAD.size + index * SIZE.size)
        if size < ATTACHED_FROM:
            raise ValueError(f"an attachment must have at least {ATTACHED_FROM} bytes")
        begin = end + -end % ALIGNMENT
        if any(view[end:begin]):
            raise ValueError("the bytes between attachments must be zero")
        end = begin + size
        attachments.append(view[begin:end])
    if end != len(view):
        raise ValueError(f"it must have {end} bytes, got {len(view)}")
    return doc, attachments
