"""Encoded objects that no encoder makes: short ones that would cost much, and random ones."""

import time

import msgpack
import pytest
from object_classes import new_codec

from fastvideo_comm.errors import DecodeError
from fastvideo_comm.object_channel.codec import ObjectCodec
from fastvideo_comm.object_channel.format import (
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
    LONG,
    PADDED,
    SET,
    TENSOR,
    TEXT,
    TIMEDELTA,
    TORCH_SIZE,
    TUPLE,
)

pack = msgpack.packb
MIB = 1 << 20
SECONDS_PER_BYTE = 2 / (64 * MIB)
NEXT = 2**61 - 1  # two ints that differ by this have one hash


def message(document):
    """Return the encoded form of a document without attachments."""
    return HEAD.pack(len(document), 0) + document


def padded(document, num_zeros):
    """Return the message of a document with the padding of an encoder."""
    return message(b"\x93\xc7\x00\x12" + document + pack(bytes(num_zeros)))


def array(items):
    """Return the document of an array of these documents."""
    return b"\xdc" + len(items).to_bytes(2, "big") + b"".join(items)


def marked(code, *items):
    """Return the document of an array with a marker."""
    return array([b"\xc7\x00" + bytes([code]), *items])


def long_array(items, code=LIST):
    """Return the document of a container of any length, in pieces as the encoder makes them."""
    size = 1
    while size * (LONG - 1) < len(items):
        size *= LONG - 1
    if size == 1:
        return marked(code, *items)
    starts = range(0, len(items), size)
    return marked(code | IN_PIECES, *(long_array(items[i : i + size]) for i in starts))


def filled(unit, num_bytes):
    """Return a message of about this size that holds the unit as often as it can."""
    group = array([unit] * 100)
    return message(long_array([group] * max(1, num_bytes // len(group))))


def big_int(number):
    """Return the document of an integer as the encoder makes it for more than 64 bits."""
    data = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return pack(msgpack.ExtType(BIG_INT, data))


LEAVES = [
    pack(None), pack(True), pack(7), pack(300), pack(70_000), pack(2**40), pack(1.5), pack(""),
    pack("ab"), pack("\u0100"), pack("\u0100a"), pack("\U0001f600"), pack("abcdefgh"), pack(b""),
    pack(b"ab"), big_int(2**70), b"\xca" + bytes(4),
]  # fmt: skip

FIELDS = [
    (BYTES, [pack(b"ab")]),
    (BYTEARRAY, [pack(b"")]),
    (DATETIME, [pack([2020, 1, 1, 1, 1, 1, 1]), pack(0), pack(None)]),
    (DATETIME, [pack([2020, 1, 1, 1, 1, 1, 1]), pack(0), pack(["ab", 0, 100, 0])]),
    (TIMEDELTA, [pack(1), pack(2), pack(3)]),
    (TORCH_SIZE, [pack(300)]),
    (DTYPE, [pack("float32")]),
    (DEVICE, [pack("cuda:1")]),
    (TENSOR, [pack("int8"), pack([0]), pack(b"")]),
    (TENSOR, [pack("bool"), pack([1]), pack(b"\1")]),
    (ARRAY, [pack("|i1"), pack([0]), pack(b"")]),
    (ARRAY, [pack("<U1"), pack([1]), pack(b"a\0\0\0")]),
    (TEXT, [pack(0xD800)]),
    (PADDED, [pack(None), pack(b"")]),
    (LIST | IN_PIECES, [pack([]), pack([None])]),
    (TUPLE | IN_PIECES, [pack([1]), pack([2])]),
]


def random_unit(random, depth=0):
    """Return a small document of any form that the decoder knows."""
    kind = random.random()
    if kind < (0.3 if depth == 0 else 0.6):
        return random.choice(LEAVES)
    if kind < 0.7:
        code, fields = random.choice(FIELDS)
        return marked(code, *fields)
    items = [
        random_unit(random, depth + 1) for _ in range(random.randint(0, 4) if depth < 3 else 0)
    ]
    code = random.choice([None, TUPLE, SET, FROZENSET, DICT, LIST])
    if code == DICT:
        items = items[: len(items) // 2 * 2]
    # The shortest form, which costs most for its bytes.
    if code is None:
        return bytes([0x90 + len(items)]) + b"".join(items)
    return bytes([0x91 + len(items)]) + b"\xc7\x00" + bytes([code]) + b"".join(items)


def refused(data, match="the message must hold an encoded object"):
    with pytest.raises(DecodeError, match=match):
        new_codec().decode(data)


def attempt(data):
    """Decode, whatever comes of it; return whether an object did."""
    try:
        ObjectCodec().decode(data)
    except DecodeError:
        return False
    return True


def cpu_seconds(data, best_of=1):
    """Return the processor time of this thread, which a loaded machine stretches little."""
    times = []
    for _ in range(best_of):
        start = time.thread_time()
        attempt(data)
        times.append(time.thread_time() - start)
    return min(times)
