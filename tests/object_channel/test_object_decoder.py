"""What the decoder says of a message that it refuses, word for word, and what each object costs."""

from datetime import datetime, timedelta, timezone

import msgpack
import numpy as np
import pytest
import torch
from object_attacks import array, big_int, long_array, marked, message, pack, padded
from object_classes import Access, Opaque, Point, new_codec

from fastvideo_comm.errors import DecodeError
from fastvideo_comm.object_channel.codec import ObjectCodec
from fastvideo_comm.object_channel.decoder import Decoder
from fastvideo_comm.object_channel.encoder import PLAIN
from fastvideo_comm.object_channel.format import (
    ALIGNMENT,
    ARRAY_COST,
    ATTACHED_FROM,
    BIG_INT,
    BYTEARRAY,
    BYTES,
    DATETIME,
    DICT,
    DTYPE,
    FREE_COST,
    HEAD,
    IN_PIECES,
    ITEM_COST,
    LONG,
    MARKER_COSTS,
    PADDED,
    REGISTERED,
    SET,
    SIZE,
    TEXT,
    TIMEDELTA,
    TORCH_SIZE,
    TUPLE,
)

START = "the message must hold an encoded object: "


def attached(document, *attachments, between=b""):
    """Return the message of a document with these attachments."""
    sizes = b"".join(SIZE.pack(len(attachment)) for attachment in attachments)
    data = HEAD.pack(len(document), len(attachments)) + sizes + document
    for attachment in attachments:
        data += between or bytes(-len(data) % ALIGNMENT)
        data += attachment
    return data


LARGE = bytes(ATTACHED_FROM)
FIELDS = pack([2026, 11, 1, 1, 30, 0, 0])
USED_TWICE = array([marked(BYTES, pack(0)), marked(BYTES, pack(0))])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (HEAD.pack(5, 0), "it must have at least 13 bytes, got 8"),
        (HEAD.pack(1, 2) + SIZE.pack(0), "it must have at least 25 bytes, got 16"),
        (message(pack(None)) + b"\0", "it must have 9 bytes, got 10"),
        (attached(pack(None), LARGE)[:-1], "it must have 65600 bytes, got 65599"),
        (attached(pack(None), LARGE[1:]), "an attachment must have at least 65536 bytes"),
        (
            attached(pack(None), LARGE, between=b"\0" * 46 + b"\1"),
            "the bytes between attachments must be zero",
        ),
        (attached(pack(None), LARGE), "an attachment is not used"),
        (attached(marked(BYTES, pack(0)), LARGE, LARGE), "an attachment is not used"),
        (attached(USED_TWICE, LARGE), "attachment 0 is used twice"),
        (attached(marked(BYTES, pack(1)), LARGE), "there is no such attachment"),
        (attached(marked(BYTES, pack(-1)), LARGE), "there is no such attachment"),
        (attached(marked(BYTEARRAY, pack(False)), LARGE), "there is no such attachment"),
        (message(marked(BYTES, pack("text"))), "there is no such attachment"),
        (message(b"\xc7\x00\x02"), "a document must hold an object"),
        (message(b"\xd6\xff" + bytes(4)), "a document must hold an object"),
        (message(array([pack(1), b"\xc7\x00\x02"])), "an array must hold objects only"),
        (message(marked(TUPLE, b"\xd6\xff" + bytes(4))), "an array must hold objects only"),
        (message(array([b"\xd6\xff" + bytes(4)])), "an array must hold objects only"),
        (message(b"\x80"), "a dict must be an array"),
        (
            message(pack(msgpack.ExtType(BIG_INT, bytes(8)))),
            "a long integer must have at least 9 bytes",
        ),
        (message(pack(msgpack.ExtType(PADDED + 1, b""))), "unknown extension value 19"),
        (message(pack(msgpack.ExtType(0, b""))), "unknown extension value 0"),
        (message(b"\xd4\xfe\x00"), "unknown extension value -2"),
        (message(pack(msgpack.ExtType(TUPLE, b"x"))), "unknown extension value 2"),
        (message(marked(DTYPE | IN_PIECES, pack([]))), "unknown extension value 76"),
        (message(marked(BIG_INT | IN_PIECES)), "unknown extension value 65"),
        (
            message(marked(TUPLE | IN_PIECES, pack(1))),
            "a piece of a long container must be an array",
        ),
        (
            message(marked(TUPLE | IN_PIECES, marked(TUPLE, pack(1)))),
            "a piece of a long container must be an array",
        ),
        (message(marked(PADDED, pack(None), pack(b"\0\1"))), "padding must be zeros"),
        (message(marked(PADDED, pack(None), pack("\0"))), "padding must be zeros"),
        (message(marked(PADDED, pack(None), pack([0]))), "padding must be zeros"),
        (
            message(marked(DATETIME, pack(1), pack(0), pack(None))),
            "a datetime must be a list of fields and a fold",
        ),
        (
            message(marked(DATETIME, FIELDS, pack(False), pack(None))),
            "a datetime must be a list of fields and a fold",
        ),
        (
            message(marked(DATETIME, pack([2026]), pack(0), pack(None))),
            "there must be 7 integers",
        ),
        (
            message(marked(DATETIME, pack([2026, 1, 1, 0, 0, 0, 0.0]), pack(0), pack(None))),
            "the integers must have 64 bits",
        ),
        (message(marked(TIMEDELTA, pack(1), pack(1))), "there must be 3 integers"),
        (
            message(marked(TIMEDELTA, pack(1), pack(True), pack(1))),
            "the integers must have 64 bits",
        ),
        (message(marked(TORCH_SIZE, pack(1), pack("2"))), "the integers must have 64 bits"),
        (message(marked(TORCH_SIZE, pack(2**63))), "the integers must have 64 bits"),
        (message(marked(TORCH_SIZE, big_int(-(2**63) - 1))), "the integers must have 64 bits"),
        (
            message(marked(REGISTERED, pack(5), pack(1))),
            "type of no name is not registered on this rank",
        ),
        (
            message(marked(REGISTERED, pack([1]), pack(1))),
            "type of no name is not registered on this rank",
        ),
        (
            message(marked(REGISTERED, pack("x" * 99 + "yz"), pack(1))),
            f"type '{'x' * 99}y' is not registered on this rank",
        ),
        (
            message(long_array([pack([])] * 2000)),
            "it must be longer for as many objects as it holds",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "message",
)
def test_a_message_is_refused_with_its_reason(data, reason):
    with pytest.raises(DecodeError) as caught:
        ObjectCodec().decode(data)
    assert str(caught.value) == START + reason


def test_no_array_has_more_than_128_items_and_no_map_has_one():
    codec = ObjectCodec()
    assert codec.decode(message(pack([1] * LONG))) == [1] * LONG
    with pytest.raises(DecodeError, match=r": 129 exceeds max_array_len\(128\)$"):
        codec.decode(message(pack([1] * (LONG + 1))))
    with pytest.raises(DecodeError, match=r": 1 exceeds max_map_len\(0\)$"):
        codec.decode(message(pack({"key": 1})))


class UnshowableError(Exception):
    def __str__(self):
        raise ValueError("no text")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyError("key"), "'key'"),
        (RuntimeError(), "RuntimeError"),
        (UnshowableError(), "UnshowableError"),
        (ValueError("x" * 299 + "yz"), "x" * 299 + "y"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_of_a_registered_function_is_the_reason(error, reason):
    def fail(fields):
        raise error

    codec = ObjectCodec()
    codec.register_type(Opaque, name="opaque", to_fields=lambda obj: obj.value, from_fields=fail)
    with pytest.raises(DecodeError) as caught:
        codec.decode(codec.encode(Opaque(1)))
    assert str(caught.value) == START + reason
    assert caught.value.__cause__ is error


def test_a_type_that_is_registered_already_is_refused_by_name():
    codec = ObjectCodec()
    codec.register_type(Opaque, name="x", to_fields=str, from_fields=int)
    for cls in (Opaque, int, dict, np.ndarray, torch.Size):
        with pytest.raises(ValueError, match="cls must") as caught:
            codec.register_type(cls, name="y", to_fields=str, from_fields=int)
        assert str(caught.value) == f"cls must not be supported already, got {cls.__qualname__}"
    with pytest.raises(ValueError, match="name must") as caught:
        codec.register_type(Point, name="x")
    assert str(caught.value) == "name must be unique in a codec, got 'x'"
    codec.register_type(Point, name="y")
    assert codec.decode(codec.encode(Point(1))) == Point(1)


# Values at the limits of the form


def test_every_number_of_64_bits_is_a_size():
    sizes = torch.Size([-(2**63), 2**63 - 1])
    assert ObjectCodec().decode(ObjectCodec().encode(sizes)) == sizes


def test_the_shortest_long_integer_has_9_bytes():
    data = message(pack(msgpack.ExtType(BIG_INT, bytes(8) + b"\x80")))
    assert ObjectCodec().decode(data) == -(2**71)


def test_pieces_are_joined_in_their_order():
    for code, joined in (
        (TUPLE, tuple(range(300))),
        (SET, set(range(300))),
        (DICT, {i: i + 1 for i in range(0, 300, 2)}),
        (TORCH_SIZE, torch.Size(range(300))),
        (TEXT, "".join(map(chr, range(300)))),
    ):
        data = message(long_array([pack(i) for i in range(300)], code))
        received = ObjectCodec().decode(data)
        assert (type(received), received) == (type(joined), joined)


@pytest.mark.parametrize(
    "zone",
    [None, timezone.utc, timezone(timedelta(hours=2)), timezone(timedelta(hours=2), "CET")],
    ids=str,
)
def test_a_datetime_has_all_of_its_fields(zone):
    obj = datetime(2026, 11, 1, 1, 30, 7, 123_456, zone, fold=1)
    received = ObjectCodec().decode(ObjectCodec().encode(obj))
    assert received.isoformat() == obj.isoformat()
    assert (received.fold, received.tzname()) == (1, obj.tzname())


# What each object costs


def spent_by_decoder(codec, obj):
    """Return the cost that the encoder counted, and the one that the decoder did."""
    encoder, document = codec._pack(obj, PLAIN)
    decoder = Decoder(codec._by_name, list(map(memoryview, encoder.attachments)), 2**40)
    built = msgpack.unpackb(
        document,
        list_hook=decoder.raise_list,
        ext_hook=decoder.raise_ext,
        object_pairs_hook=decoder.raise_map,
    )
    decoder.finish(built)
    return encoder.cost, 2**40 + FREE_COST - decoder.cost_left


@pytest.mark.parametrize(
    "obj",
    [
        None, 1, "text", b"bytes", 2**80, [], [1, 2], (), (1, [2]), {}, {"k": 1}, {1: {2: 3}},
        set(), {1}, {"k"}, frozenset({1, 2}), frozenset({"k", b"k"}), bytearray(b"k"), timedelta(1),
        datetime(2020, 1, 1), datetime(2020, 1, 1, tzinfo=timezone.utc), torch.float32,
        torch.Size([1, 2]), torch.device("cpu"), torch.ones(3), np.ones(3), Access.READ, Point(3),
        [0] * 1000, set(range(1000)), dict.fromkeys(range(200), "v"), LARGE, torch.zeros(2**16),
    ],
    ids=lambda obj: type(obj).__name__,
)  # fmt: skip
def test_decoder_and_encoder_count_the_same_cost(obj):
    counted, spent = spent_by_decoder(new_codec(), obj)
    assert spent == counted


class RefusingClock:
    def build_set(self, keys):
        raise ValueError("timed")

    build_dict = build_set


def test_the_time_of_keys_counts_where_their_sender_can_know_the_hashes():
    decoder = Decoder({}, [], 0)
    decoder.clock = RefusingClock()
    assert decoder.build_set(["k", b"k", None]) == {"k", b"k", None}
    assert decoder.build_dict(["k", 1, b"k", 2]) == {"k": 1, b"k": 2}
    for keys in ([1], ["k", ()], [1.5]):
        with pytest.raises(ValueError, match="timed"):
            decoder.build_set(keys)
        with pytest.raises(ValueError, match="timed"):
            decoder.build_dict([part for key in keys for part in (key, "value")])


def test_a_message_may_cost_its_bytes_and_64_kib_and_no_more():
    document = array([b"\x90"] * 100)  # 100 empty arrays and the one around them
    num_bytes = 101 * ARRAY_COST + 100 * ITEM_COST - FREE_COST
    enough = Decoder({}, [], num_bytes)
    assert msgpack.unpackb(document, list_hook=enough.raise_list) == [[]] * 100
    too_short = Decoder({}, [], num_bytes - 1)
    with pytest.raises(ValueError, match="it must be longer for as many objects as it holds"):
        msgpack.unpackb(document, list_hook=too_short.raise_list)


@pytest.mark.parametrize("lacks", [-1000, -1, 0, 1, 2, 1000, 100_000])
def test_an_object_of_many_parts_is_padded_by_what_it_lacks(lacks):
    codec = ObjectCodec()
    arrays = [[]] * 4000
    encoder, document = codec._pack([arrays, "x" * 100_000], PLAIN)
    lacks_now = encoder.cost - FREE_COST - len(document)
    obj = [arrays, "x" * (100_000 + lacks_now - lacks)]
    padding = len(codec.encode(obj)) - len(codec._pack(obj, PLAIN)[1]) - HEAD.size
    if lacks <= 0:
        assert padding == 0
    else:
        own_cost = MARKER_COSTS[PADDED] + ARRAY_COST + 3 * ITEM_COST
        # 4 bytes before the document and at most 5 before the zeros
        assert lacks + own_cost + 4 < padding <= lacks + own_cost + 9
    assert codec.decode(codec.encode(obj)) == obj


def test_attachments_count_as_bytes_of_the_message():
    codec = ObjectCodec()
    obj = [[[]] * 900, bytes(ATTACHED_FROM), [[]] * 900]
    document, attachment = codec._pack(obj, PLAIN)[1], bytes(ATTACHED_FROM)
    assert codec.decode(codec.encode(obj)) == obj
    assert len(codec.encode(obj)) == len(attached(document, attachment))


def test_every_attachment_begins_at_a_multiple_of_64_bytes():
    for sizes in ([1], [64], [1, 63, 64, 65]):
        pieces = [bytes([number]) * (ATTACHED_FROM + size) for number, size in enumerate(sizes, 1)]
        data = b"".join(ObjectCodec().encode_parts(pieces))
        places = [data.index(piece) for piece in pieces]
        assert [place % ALIGNMENT for place in places] == [0] * len(sizes)
        ends = [0, *(place + len(piece) for place, piece in zip(places, pieces, strict=True))]
        between = [place - end for place, end in zip(places[1:], ends[1:], strict=False)]
        assert all(0 <= gap < ALIGNMENT for gap in between)
        assert ends[-1] == len(data)


def test_padding_of_any_length_is_taken_off():
    for num_zeros in (0, 1, 1000):
        assert ObjectCodec().decode(padded(pack("object"), num_zeros)) == "object"
