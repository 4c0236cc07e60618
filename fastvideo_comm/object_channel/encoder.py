"""From objects to what msgpack can pack: the sending half of `ObjectCodec`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any, cast

import torch
from msgpack import ExtType  # type: ignore[import-untyped]

from fastvideo_comm.object_channel.array_codec import (
    array_fields,
    dtype_name,
    is_array_type,
    tensor_fields,
)
from fastvideo_comm.object_channel.format import (
    ARRAY,
    ATTACHED_FROM,
    BIG_INT,
    BYTEARRAY,
    BYTES,
    DATETIME,
    DEVICE,
    DICT,
    DTYPE,
    FROZENSET,
    IN_PIECES,
    LIST,
    LONG,
    MAX_DEPTH,
    REGISTERED,
    SET,
    TENSOR,
    TIMEDELTA,
    TORCH_SIZE,
    TUPLE,
)
from fastvideo_comm.object_channel.type_registry import RegisteredType

PLAIN = frozenset({type(None), bool, int, float, str})
_MARK = {code: ExtType(code, b"") for code in range(2 * IN_PIECES)}


class UnsupportedError(Exception):
    """Carries the path to the offending object outwards, one step per level."""

    def __init__(self, reason: str) -> None:
        """Start at the object itself."""
        super().__init__(reason)
        self.reason = reason
        self.steps: list[str] = []


class Encoder:
    """One run of `encode_parts`: turns an object into what msgpack can pack."""

    __slots__ = ("attachments", "registered")

    def __init__(self, registered: dict[type, RegisteredType]) -> None:
        """Start without attachments."""
        self.registered = registered
        self.attachments: list[bytes | memoryview] = []

    def lower(self, obj: Any, depth: int) -> Any:
        """Return what msgpack packs in place of this object."""
        kind = type(obj)
        if kind in PLAIN:
            return obj
        if depth > MAX_DEPTH:
            raise ValueError(f"obj must nest at most {MAX_DEPTH} levels, got more")
        function = LOWER.get(kind)
        if function is not None:
            return function(self, obj, depth)
        entry = self.registered.get(kind)
        if entry is not None:
            return [_MARK[REGISTERED], entry.name, self.lower(entry.to_fields(obj), depth + 1)]
        if is_array_type(kind):
            return self.lower_array(ARRAY, array_fields, obj)
        raise UnsupportedError(
            f"must be of a supported or registered type, got {kind.__qualname__}"
        )

    def lower_array(self, code: int, fields: Callable[[Any], Any], obj: Any) -> Any:
        """Lower a tensor or numpy array."""
        try:
            name, shape, data = fields(obj)
        except TypeError as error:
            raise UnsupportedError(f"must be sendable: {error}") from None
        return [_MARK[code], name, shape, self.lower_bytes(data)]

    def lower_bytes(self, data: bytes | memoryview) -> bytes | int:
        """Return short bytes as they are, and the index of a new attachment for long ones."""
        if len(data) < ATTACHED_FROM:
            return bytes(data)
        self.attachments.append(data)
        return len(self.attachments) - 1

    def lower_list(self, obj: list[Any], depth: int) -> Any:
        """Lower a list, which stays itself where all its items are plain."""
        if len(obj) < LONG and PLAIN.issuperset(map(type, obj)):
            return obj
        return _array(LIST, self.lower_items(obj, depth))

    def lower_tuple(self, obj: tuple[Any, ...], depth: int) -> Any:
        """Lower a tuple."""
        return _array(TUPLE, self.lower_items(obj, depth))

    def lower_items(self, items: Sequence[Any], depth: int) -> Sequence[Any]:
        """Lower the items of a container."""
        if PLAIN.issuperset(map(type, items)):
            return items
        try:
            return [self.lower(item, depth + 1) for item in items]
        except UnsupportedError as error:
            self.note_step(error, enumerate(items), depth)
            raise

    def lower_dict(self, obj: dict[Any, Any], depth: int) -> Any:
        """Lower a dict: as a map where all keys are plain, else as its keys and values."""
        lower, below = self.lower, depth + 1
        try:
            if PLAIN.issuperset(map(type, obj)):
                return {
                    key: value if type(value) in PLAIN else lower(value, below)
                    for key, value in obj.items()
                }
            flat: list[Any] = []
            for key, value in obj.items():
                flat += lower(key, below), lower(value, below)
        except UnsupportedError as error:
            self.note_step(error, ((key, (key, value)) for key, value in obj.items()), depth - 1)
            raise
        return _array(DICT, flat)

    def note_step(
        self, error: UnsupportedError, parts: Iterable[tuple[object, Any]], depth: int
    ) -> None:
        """Find the part that failed, by lowering each again, and note the step to it."""
        for key, part in parts:
            try:
                self.lower(part, depth + 1)
            except UnsupportedError:
                error.steps.append(f'["{key}"]' if isinstance(key, str) else f"[{key!r}]")
                return

    def lower_datetime(self, obj: datetime, _: int) -> Any:
        """Lower a datetime, which is naive or has a fixed offset."""
        zone: Any = None
        if obj.tzinfo is not None:
            if type(obj.tzinfo) is not timezone:
                raise UnsupportedError(f"must have a fixed offset, got {obj.tzinfo!r}")
            offset = cast(timedelta, obj.utcoffset())
            named = obj.tzname() != timezone(offset).tzname(None)
            zone = [obj.tzname() if named else None, *_timedelta_fields(offset)]
        fields = [obj.year, obj.month, obj.day, obj.hour, obj.minute, obj.second, obj.microsecond]
        return [_MARK[DATETIME], fields, obj.fold, zone]


def _array(code: int, lowered: Sequence[Any]) -> Any:
    if len(lowered) < LONG:
        return list(lowered) if code == LIST else [_MARK[code], *lowered]
    pieces = [list(lowered[i : i + LONG]) for i in range(0, len(lowered), LONG)]
    if len(pieces) >= LONG:
        raise ValueError(f"obj must hold fewer than {LONG * (LONG - 1)} items in one container")
    return [_MARK[code | IN_PIECES], *pieces]


def lower_big_int(obj: int) -> ExtType:
    """Pack an integer outside 64 bits, all that msgpack finds left after `Encoder.lower`."""
    return ExtType(BIG_INT, obj.to_bytes(obj.bit_length() // 8 + 1, "little", signed=True))


def _timedelta_fields(obj: timedelta) -> list[int]:
    return [obj.days, obj.seconds, obj.microseconds]


LOWER: dict[type, Callable[[Encoder, Any, int], Any]] = {
    list: Encoder.lower_list,
    tuple: Encoder.lower_tuple,
    set: lambda encoder, obj, depth: _array(SET, encoder.lower_items(list(obj), depth)),
    frozenset: lambda encoder, obj, depth: _array(FROZENSET, encoder.lower_items(list(obj), depth)),
    dict: Encoder.lower_dict,
    bytes: lambda encoder, obj, _: (
        obj if len(obj) < ATTACHED_FROM else [_MARK[BYTES], encoder.lower_bytes(obj)]
    ),
    bytearray: lambda encoder, obj, _: [
        _MARK[BYTEARRAY],
        encoder.lower_bytes(memoryview(obj)),
    ],
    datetime: Encoder.lower_datetime,
    timedelta: lambda _encoder, obj, _: [_MARK[TIMEDELTA], *_timedelta_fields(obj)],
    torch.Size: lambda _encoder, obj, _: [_MARK[TORCH_SIZE], *obj],
    torch.dtype: lambda _encoder, obj, _: [_MARK[DTYPE], dtype_name(obj)],
    torch.device: lambda _encoder, obj, _: [_MARK[DEVICE], str(obj)],
    torch.Tensor: lambda encoder, obj, _: encoder.lower_array(TENSOR, tensor_fields, obj),
}
