"""The sending half of `ObjectCodec`: turns objects into what msgpack can pack."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
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
    ARRAY_COST,
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
    ITEM_COST,
    LIST,
    LONG,
    MARKER_COSTS,
    MAX_DEPTH,
    NUM_CODES,
    REGISTERED,
    SET,
    TENSOR,
    TEXT,
    TIMEDELTA,
    TORCH_SIZE,
    TUPLE,
)
from fastvideo_comm.object_channel.hashing import cost_of_keys, has_keyed_hashes
from fastvideo_comm.object_channel.type_registry import RegisteredType

PLAIN = frozenset({type(None), bool, int, float, str})
_MARK = [ExtType(code, b"") for code in range(NUM_CODES)]
_MARKED_COSTS = [cost + ARRAY_COST + ITEM_COST for cost in MARKER_COSTS]


class UnsupportedError(Exception):
    """Carries the path to the offending object outwards, one step per level."""

    def __init__(self, reason: str) -> None:
        """Start at the object itself."""
        super().__init__(reason)
        self.reason = reason
        self.steps: list[str] = []


class Encoder:
    """One run of `encode_parts`: turns an object into what msgpack can pack.

    Attributes:
        attachments: The byte strings that travel beside the document.
        cost: The cost of decoding what was lowered, in bytes; see `format`.
    """

    __slots__ = ("attachments", "cost", "plain", "registered")

    def __init__(
        self, registered: dict[type, RegisteredType], plain: frozenset[type] = PLAIN
    ) -> None:
        """Start without attachments; `plain` are the types that msgpack packs as they are."""
        self.registered = registered
        self.plain = plain
        self.attachments: list[bytes | memoryview] = []
        self.cost = 0

    def lower(self, obj: Any, depth: int) -> Any:
        """Return what msgpack packs in place of this object."""
        kind = type(obj)
        if kind in self.plain:
            return obj
        if depth > MAX_DEPTH:
            raise ValueError(f"obj must nest at most {MAX_DEPTH} levels, got more")
        function = LOWER.get(kind)
        if function is not None:
            return function(self, obj, depth)
        entry = self.registered.get(kind)
        if entry is not None:
            fields = self.lower(entry.to_fields(obj), depth + 1)
            return self.mark(REGISTERED, entry.name, fields)
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
        return self.mark(code, name, self.array(LIST, shape), self.lower_bytes(data))

    def lower_bytes(self, data: bytes | memoryview) -> bytes | int:
        """Return short bytes as they are, and the index of a new attachment for long ones."""
        if len(data) < ATTACHED_FROM:
            return bytes(data)
        self.attachments.append(data)
        return len(self.attachments) - 1

    def lower_list(self, obj: list[Any], depth: int) -> Any:
        """Lower a list; a list whose items are all plain is returned as it is."""
        if len(obj) < LONG and self.plain.issuperset(map(type, obj)):
            self.cost += ARRAY_COST + ITEM_COST * len(obj)
            return obj
        return self.array(LIST, self.lower_items(obj, depth))

    def lower_tuple(self, obj: tuple[Any, ...], depth: int) -> Any:
        """Lower a tuple."""
        return self.array(TUPLE, self.lower_items(obj, depth))

    def lower_set(self, code: int, obj: Set[Any], depth: int) -> Any:
        """Lower a set or frozenset."""
        keys = list(obj)
        self.cost += cost_of_keys(len(keys), has_keyed_hashes(keys))
        return self.array(code, self.lower_items(keys, depth))

    def lower_items(self, items: Sequence[Any], depth: int) -> Sequence[Any]:
        """Lower the items of a container."""
        if self.plain.issuperset(map(type, items)):
            return items
        try:
            return [self.lower(item, depth + 1) for item in items]
        except UnsupportedError as error:
            self.note_step(error, enumerate(items), depth)
            raise

    def lower_dict(self, obj: dict[Any, Any], depth: int) -> Any:
        """Lower a dict to an array of its keys and values in turn."""
        lower, below, plain = self.lower, depth + 1, self.plain
        self.cost += cost_of_keys(len(obj), has_keyed_hashes(obj))
        flat: list[Any] = []
        try:
            for key, value in obj.items():
                flat.append(key if type(key) in plain else lower(key, below))
                flat.append(value if type(value) in plain else lower(value, below))
        except UnsupportedError as error:
            self.note_step(error, ((key, (key, value)) for key, value in obj.items()), depth - 1)
            raise
        return self.array(DICT, flat)

    def note_step(
        self, error: UnsupportedError, parts: Iterable[tuple[object, Any]], depth: int
    ) -> None:
        """Lower each part again to find the part that failed, and note the step to it."""
        for key, part in parts:
            try:
                self.lower(part, depth + 1)
            except UnsupportedError:
                error.steps.append(f'["{key}"]' if isinstance(key, str) else f"[{key!r}]")
                return

    def lower_text(self, obj: str, _: int) -> Any:
        """Lower a str; a str that UTF-8 cannot encode becomes its code points."""
        try:
            obj.encode()
        except UnicodeEncodeError:
            return self.array(TEXT, list(map(ord, obj)))
        return obj

    def lower_datetime(self, obj: datetime, depth: int) -> Any:
        """Lower a datetime, which is naive or has a fixed offset."""
        zone: Any = None
        if obj.tzinfo is not None:
            if type(obj.tzinfo) is not timezone:
                raise UnsupportedError(f"must have a fixed offset, got {obj.tzinfo!r}")
            offset = cast(timedelta, obj.utcoffset())
            named = obj.tzname() != timezone(offset).tzname(None)
            name = self.lower(obj.tzname(), depth) if named else None
            zone = self.array(LIST, [name, *_timedelta_fields(offset)])
        fields = [obj.year, obj.month, obj.day, obj.hour, obj.minute, obj.second, obj.microsecond]
        return self.mark(DATETIME, self.array(LIST, fields), obj.fold, zone)

    def mark(self, code: int, *fields: Any) -> list[Any]:
        """Return the array of a marker and its fields."""
        self.cost += _MARKED_COSTS[code] + ITEM_COST * len(fields)
        return [_MARK[code], *fields]

    def array(self, code: int, lowered: Sequence[Any]) -> list[Any]:
        """Return the array of a container; a long one is cut into pieces, and these again."""
        size = 1
        while size * (LONG - 1) < len(lowered):
            size *= LONG - 1
        if size > 1:
            starts = range(0, len(lowered), size)
            pieces = [self.array(LIST, lowered[start : start + size]) for start in starts]
            return self.mark(code | IN_PIECES, *pieces)
        if code != LIST:
            return self.mark(code, *lowered)
        self.cost += ARRAY_COST + ITEM_COST * len(lowered)
        return list(lowered)

    def lower_big_int(self, obj: int) -> ExtType:
        """Pack an integer outside 64 bits; msgpack itself packs everything else after `lower`."""
        self.cost += MARKER_COSTS[BIG_INT]
        return ExtType(BIG_INT, obj.to_bytes(obj.bit_length() // 8 + 1, "little", signed=True))


def _timedelta_fields(obj: timedelta) -> list[int]:
    return [obj.days, obj.seconds, obj.microseconds]


LOWER: dict[type, Callable[[Encoder, Any, int], Any]] = {
    list: Encoder.lower_list,
    tuple: Encoder.lower_tuple,
    set: lambda encoder, obj, depth: encoder.lower_set(SET, obj, depth),
    frozenset: lambda encoder, obj, depth: encoder.lower_set(FROZENSET, obj, depth),
    dict: Encoder.lower_dict,
    bytes: lambda encoder, obj, _: (
        obj if len(obj) < ATTACHED_FROM else encoder.mark(BYTES, encoder.lower_bytes(obj))
    ),
    bytearray: lambda encoder, obj, _: encoder.mark(
        BYTEARRAY, encoder.lower_bytes(memoryview(obj))
    ),
    str: Encoder.lower_text,
    datetime: Encoder.lower_datetime,
    timedelta: lambda encoder, obj, _: encoder.mark(TIMEDELTA, *_timedelta_fields(obj)),
    torch.Size: lambda encoder, obj, _: encoder.array(TORCH_SIZE, list(obj)),
    torch.dtype: lambda encoder, obj, _: encoder.mark(DTYPE, dtype_name(obj)),
    torch.device: lambda encoder, obj, _: encoder.mark(DEVICE, str(obj)),
    torch.Tensor: lambda encoder, obj, _: encoder.lower_array(TENSOR, tensor_fields, obj),
}
