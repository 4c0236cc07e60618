"""From a received document to objects, every step checked: the receiving half of `ObjectCodec`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

import torch

from fastvideo_comm.object_channel.array_codec import build_array, build_tensor, dtype_from_name
from fastvideo_comm.object_channel.format import (
    ALIGNMENT,
    ARRAY,
    BIG_INT,
    BYTEARRAY,
    BYTES,
    DATETIME,
    DEVICE,
    DICT,
    DTYPE,
    FROZENSET,
    HEAD,
    IN_PIECES,
    LIST,
    REGISTERED,
    SET,
    SIZE,
    TENSOR,
    TIMEDELTA,
    TORCH_SIZE,
    TUPLE,
)
from fastvideo_comm.object_channel.type_registry import RegisteredType


class _Marker(int):
    """The first element of an array that stands for something else."""


class Decoder:
    """One run of `decode`: the hooks that msgpack calls for arrays and extension values."""

    __slots__ = ("attachments", "markers", "registered")

    def __init__(
        self, registered: dict[str, RegisteredType], attachments: list[memoryview | None]
    ) -> None:
        """Start on one document with these types and attachments."""
        self.registered = registered
        self.attachments = attachments
        self.markers = 0

    def raise_ext(self, code: int, data: bytes) -> Any:
        """Return the integer or the marker that an extension value stands for."""
        if code == BIG_INT:
            return int.from_bytes(data, "little", signed=True)
        if data or (code & ~IN_PIECES) not in _RAISE:
            raise ValueError(f"unknown extension value {code}")
        self.markers += 1
        return _Marker(code)

    def raise_list(self, items: list[Any]) -> Any:
        """Return the array itself, or what its marker says."""
        if not items or type(items[0]) is not _Marker:
            return items
        self.markers -= 1
        code = items[0]
        del items[0]
        if code & IN_PIECES:
            items = [item for piece in items for item in _piece(piece)]
        return _RAISE[code & ~IN_PIECES](self, items)

    def finish(self) -> None:
        """Refuse a document with stray markers or unused attachments."""
        # A marker anywhere but in front of an array would be handed to the caller as an int.
        if self.markers:
            raise ValueError("a marker stands where no array begins")
        if any(attachment is not None for attachment in self.attachments):
            raise ValueError("an attachment is not used")

    def raise_bytes(self, data: object) -> memoryview:
        """Return bytes that stand in the document, or the attachment of that index."""
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
        """Return an instance of a registered type."""
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


def _raise_datetime(fields: list[Any], fold: int, zone: list[Any] | None) -> datetime:
    tzinfo = None
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
    if len(fields) != count or any(type(field) is not int for field in fields):
        raise ValueError(f"there must be {count} integers, got {fields!r}")
    return fields


_RAISE: dict[int, Callable[[Decoder, list[Any]], Any]] = {
    TUPLE: lambda _, items: tuple(items),
    SET: lambda _, items: set(items),
    FROZENSET: lambda _, items: frozenset(items),
    LIST: lambda _, items: items,
    DICT: lambda _, items: _raise_dict(items),
    BYTES: lambda decoder, items: bytes(decoder.raise_bytes(*items)),
    BYTEARRAY: lambda decoder, items: bytearray(decoder.raise_bytes(*items)),
    DATETIME: lambda _, items: _raise_datetime(*items),
    TIMEDELTA: lambda _, items: _raise_timedelta(items),
    TORCH_SIZE: lambda _, items: torch.Size(_ints(items, len(items))),
    DTYPE: lambda _, items: dtype_from_name(*items),
    DEVICE: lambda _, items: torch.device(*items),
    TENSOR: lambda decoder, items: build_tensor(*_array_fields(decoder, *items)),
    ARRAY: lambda decoder, items: build_array(*_array_fields(decoder, *items)),
    REGISTERED: lambda decoder, items: decoder.raise_registered(*items),
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
        begin = end + -end % ALIGNMENT
        if any(view[end:begin]):
            raise ValueError("the bytes between attachments must be zero")
        end = begin + size
        attachments.append(view[begin:end])
    if end != len(view):
        raise ValueError(f"it must have {end} bytes, got {len(view)}")
    return doc, attachments
