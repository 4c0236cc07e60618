"""The settings of a StatelessProcessGroup, checked."""

from __future__ import annotations

import math
import os
import re
from datetime import timedelta
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote

from fastvideo_comm.object_channel.codec import ObjectCodec
from fastvideo_comm.object_channel.message_seal import MAX_RANKS, SealKind
from fastvideo_comm.object_channel.pickle_codec import PickleCodec

SECRET_VARIABLE = "FASTVIDEO_COMM_SECRET"
RUN_VARIABLE = "TORCHELASTIC_RUN_ID"  # set by torchrun
MIN_SECRET_BYTES = 16
DEFAULT_TIMEOUT_SECONDS = 300.0
DEFAULT_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
# Room for an object's description beside its data: a tensor of exactly the limit can be sent.
DESCRIPTION_BYTES = 4096
_LONGEST_SECONDS = 10 * 365 * 24 * 3600.0
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")
_MAX_RUN_CHARACTERS = 200


class Codec(Protocol):
    """Turns objects into bytes and back: `ObjectCodec`, `PickleCodec`."""

    name: str

    def encode_parts(self, obj: object) -> list[bytes | memoryview]:
        """Return the encoded object as buffers; TypeError where it cannot be sent."""

    def decode(self, data: bytes | bytearray | memoryview) -> Any:
        """Return the object; DecodeError where there is none."""


class GroupSettings(NamedTuple):
    """The settings of a group, after the checks.

    Attributes:
        rank: This process's place in the group.
        world_size: How many ranks there are.
        timeout: Seconds for a call that is given no timeout.
        secret: None for an unprotected group.
        codec: The codec object.
        max_message_bytes: The largest encoded object.
        group: The group's name.
        encryption: "auto", "required" or "off".
        run_id: The name of the run; "" where it has none.
    """

    rank: int
    world_size: int
    timeout: float
    secret: bytes | None
    codec: Codec
    max_message_bytes: int
    group: str
    encryption: str
    run_id: str

    @property
    def seal_kind(self) -> SealKind:
        """How the messages are sealed."""
        return SealKind.choose(self.encryption, has_secret=self.secret is not None)

    @property
    def words(self) -> str:
        """`key=value` for everything that must be equal on all ranks."""
        return (
            f"world_size={self.world_size} group={self.group} codec={self.codec.name} "
            f"max_message_bytes={self.max_message_bytes} seal={self.seal_kind.value} "
            f"run_id={quote(self.run_id, safe='')}"
        )

    @property
    def place(self) -> str:
        """Group and rank, for error messages."""
        return f"group {self.group!r} on rank {self.rank} of {self.world_size}"

    @classmethod
    def checked(
        cls,
        rank: int,
        world_size: int,
        timeout: float | timedelta,
        secret: bytes | None,
        codec: Codec | str,
        max_message_bytes: int,
        group: str,
        encryption: str,
        run_id: str | None,
    ) -> GroupSettings:
        """Check every argument.

        Raises:
            ValueError: An argument breaks its rule.
            TypeError: The secret is not bytes.
        """
        if world_size < 1:
            raise ValueError(f"world_size must be at least 1, got {world_size}")
        if world_size > MAX_RANKS:
            raise ValueError(f"world_size must be at most {MAX_RANKS}, got {world_size}")
        check_rank("rank", rank, world_size)
        if max_message_bytes < 1:
            raise ValueError(f"max_message_bytes must be at least 1, got {max_message_bytes}")
        if not _NAME.fullmatch(group):
            raise ValueError(f"group must be 1 to 100 of A-Z a-z 0-9 _ . -, got {group!r}")
        known_secret = _resolve_secret(secret)
        codec = _resolve_codec(codec, has_secret=known_secret is not None)
        SealKind.choose(encryption, has_secret=known_secret is not None)
        if run_id is None:
            run_id = os.environ.get(RUN_VARIABLE, "")
        if len(run_id) > _MAX_RUN_CHARACTERS:
            raise ValueError(
                f"run_id must have at most {_MAX_RUN_CHARACTERS} characters, got {len(run_id)}"
            )
        return cls(
            rank,
            world_size,
            to_seconds("timeout", timeout),
            known_secret,
            codec,
            max_message_bytes,
            group,
            encryption,
            run_id,
        )


def check_rank(name: str, rank: int, world_size: int) -> None:
    """Raise ValueError unless `rank` is one of the group's ranks."""
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < world_size:
        raise ValueError(f"{name} must be a rank from 0 to {world_size - 1}, got {rank!r}")


def to_seconds(name: str, timeout: float | timedelta) -> float:
    """Return a timeout in seconds; ValueError unless it is positive and finite."""
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
    if math.isnan(seconds) or not 0 < seconds <= _LONGEST_SECONDS:
        raise ValueError(f"{name} must be a positive number of seconds, got {timeout!r}")
    return seconds


def _resolve_secret(secret: bytes | None) -> bytes | None:
    name = "secret"
    if secret is None:
        name, secret = SECRET_VARIABLE, os.environ.get(SECRET_VARIABLE, "").encode()
        if not secret:
            return None
    if not isinstance(secret, bytes):
        raise TypeError(f"secret must be bytes, got {type(secret).__name__}")
    if not secret:
        raise ValueError("secret must not be empty, got b''")
    if len(secret) < MIN_SECRET_BYTES:
        raise ValueError(
            f"{name} must have at least {MIN_SECRET_BYTES} bytes, got {len(secret)}: "
            'make one by `python -c "import secrets; print(secrets.token_hex(32))"`'
        )
    return secret


def _resolve_codec(codec: Codec | str, *, has_secret: bool) -> Codec:
    if codec == "msgpack":
        return ObjectCodec()
    if codec == "pickle":
        codec = PickleCodec()
    if isinstance(codec, PickleCodec) and not has_secret:
        raise ValueError("codec must not be 'pickle' without a secret, got 'pickle'")
    if isinstance(codec, str):
        raise ValueError(f"codec must be 'msgpack', 'pickle' or an object, got {codec!r}")
    return codec
