"""How instances of a registered class become supported objects, and come back."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, NamedTuple


class RegisteredType(NamedTuple):
    """A class that a codec may send and build.

    Attributes:
        name: What messages call it.
        to_fields: Turns an instance into supported objects.
        from_fields: Turns these back into an instance.
    """

    name: str
    to_fields: Callable[[Any], Any]
    from_fields: Callable[[Any], Any]


def describe_type(
    cls: type,
    name: str | None,
    to_fields: Callable[[Any], Any] | None,
    from_fields: Callable[[Any], Any] | None,
) -> RegisteredType:
    """Return the entry of a class, by the given functions or as an enum or a dataclass.

    Raises:
        TypeError: `cls` is no class, one function lacks its partner, or the class needs both.
    """
    if not isinstance(cls, type):
        raise TypeError(f"cls must be a class, got {cls!r}")
    if name is None:
        name = f"{cls.__module__}.{cls.__qualname__}"
    if to_fields is not None and from_fields is not None:
        return RegisteredType(name, to_fields, from_fields)
    if to_fields is not None or from_fields is not None:
        raise TypeError(f"to_fields and from_fields must come together, got one for {name}")
    if issubclass(cls, enum.Flag):
        return _describe_flag(cls, name)
    if issubclass(cls, enum.Enum):
        return RegisteredType(name, lambda member: member.name, cls.__getitem__)
    if dataclasses.is_dataclass(cls):
        return _describe_dataclass(cls, name)
    raise TypeError(f"cls must be an enum, a dataclass, or come with two functions, got {name}")


def _describe_flag(cls: type[enum.Flag], name: str) -> RegisteredType:
    num_bits = max((member.value.bit_length() for member in cls), default=0) + 1

    def from_fields(value: Any) -> Any:
        # A class of Python 3.11 prints the bits of a value that it refuses.
        if type(value) is not int or value.bit_length() > num_bits:
            raise ValueError(f"a value of {name} must be a combination of its flags")
        return cls(value)

    return RegisteredType(name, lambda member: member.value, from_fields)


def _describe_dataclass(cls: type, name: str) -> RegisteredType:
    names = [field.name for field in dataclasses.fields(cls)]

    def to_fields(obj: Any) -> dict[str, Any]:
        return {name: getattr(obj, name) for name in names}

    def from_fields(fields: Any) -> Any:
        if type(fields) is not dict or list(fields) != names:
            raise ValueError(f"the fields of {name} must be {names}")
        obj: Any = object.__new__(cls)
        for key, value in fields.items():
            object.__setattr__(obj, key, value)
        return obj

    return RegisteredType(name, to_fields, from_fields)
