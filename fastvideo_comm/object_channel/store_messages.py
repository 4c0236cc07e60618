"""The short binary forms inside frames: addresses, join requests, rank lists."""

from __future__ import annotations

import struct
from typing import NamedTuple

from fastvideo_comm.object_channel.message_seal import EVERYONE, Address, Op
from fastvideo_comm.object_channel.store_link import FrameError

TOKEN_BYTES = 16
_ADDRESS = struct.Struct("<BiiQ")
_JOIN = struct.Struct(f"<?i{TOKEN_BYTES}s")
_NUMBER = struct.Struct("<q")
_ORIGIN = struct.Struct("<iq")

# With these limits, every text and every list of ranks fits into the meta of a frame.
_MAX_TEXT_BYTES = 4096
_MAX_NAMED_RANKS = 8192

_OPS = {int(op): op for op in (Op.SEND, Op.BROADCAST, Op.GATHER)}

Channel = tuple[int, int, int, bytes]


class JoinRequest(NamedTuple):
    """What a rank says after the handshake, on each of its two connections.

    Attributes:
        is_lifeline: Whether this is the second connection.
        rank: The rank that it claims.
        token: On the lifeline, what the store gave on the first connection.
        settings: `key=value` words that must be the same on every rank.
    """

    is_lifeline: bool
    rank: int
    token: bytes
    settings: str


def pack_address(address: Address, group: bytes) -> bytes:
    """Return the meta of SEND, RECV and EXPIRE."""
    return _ADDRESS.pack(*address) + group


def unpack_address(meta: bytes) -> tuple[Address, Channel]:
    """Return address and channel; FrameError for anything else."""
    if len(meta) < _ADDRESS.size:
        raise FrameError("an address is too short")
    op, src, dst, number = _ADDRESS.unpack_from(meta)
    known = _OPS.get(op)
    if known is None:
        raise FrameError(f"there is no channel of op {op}")
    return Address(known, src, dst, number), (op, src, dst, meta[_ADDRESS.size :])


def pack_join(request: JoinRequest) -> bytes:
    """Return the meta of JOIN."""
    head = _JOIN.pack(request.is_lifeline, request.rank, request.token)
    return head + request.settings.encode()


def unpack_join(meta: bytes) -> JoinRequest:
    """Return the request; FrameError for anything else."""
    try:
        is_lifeline, rank, token = _JOIN.unpack_from(meta)
        return JoinRequest(is_lifeline, rank, token, meta[_JOIN.size :].decode())
    except (struct.error, UnicodeDecodeError) as error:
        raise FrameError("a join request is malformed") from error


def pack_number(number: int, rest: bytes = b"") -> bytes:
    """Return a number followed by other bytes."""
    return _NUMBER.pack(number) + rest


def unpack_number(meta: bytes) -> tuple[int, bytes]:
    """Return a number and the bytes after it; FrameError for anything else."""
    if len(meta) < _NUMBER.size:
        raise FrameError("a number is too short")
    return _NUMBER.unpack_from(meta)[0], meta[_NUMBER.size :]


def pack_origin(src: int, number: int, total: bytes = b"") -> bytes:
    """Return the origin of a value in an answer: its rank and number, or the total of `add`."""
    return _ORIGIN.pack(src, number) + total


def unpack_origin(meta: bytes) -> tuple[int, int, bytes]:
    """Return rank, number and total; FrameError for anything else."""
    if len(meta) < _ORIGIN.size:
        raise FrameError("the origin of a value is too short")
    src, number = _ORIGIN.unpack_from(meta)
    if src < EVERYONE or number < 0:
        raise FrameError("the origin of a value must be a rank and a number")
    return src, number, meta[_ORIGIN.size :]


def pack_text(ranks: list[int], text: str = "") -> bytes:
    """Return ranks and a text: what LOST, LEFT, REFUSED and the answer to MISSING carry.

    Of more than 8192 ranks only the first are named.
    """
    ranks = ranks[:_MAX_NAMED_RANKS]
    short = text.encode()[:_MAX_TEXT_BYTES].decode(errors="ignore")  # cuts no character in half
    return struct.pack(f"<H{len(ranks)}i", len(ranks), *ranks) + short.encode()


def unpack_text(meta: bytes) -> tuple[tuple[int, ...], str]:
    """Return ranks and text; FrameError for anything else."""
    try:
        (count,) = struct.unpack_from("<H", meta)
        ranks = struct.unpack_from(f"<{count}i", meta, 2)
        return ranks, meta[2 + 4 * count :].decode()
    except (struct.error, UnicodeDecodeError) as error:
        raise FrameError("a notice is malformed") from error


def unpack_decimal(meta: bytes) -> int:
    """Return a number in decimal digits; FrameError for anything else."""
    try:
        return int(meta)
    except ValueError as error:
        raise FrameError("a number must have decimal digits") from error
