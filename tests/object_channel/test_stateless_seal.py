"""Seals: nothing but the message that was sealed, at its own address, is opened."""

import random

import pytest

from fastvideo_comm.errors import AuthenticationError
from fastvideo_comm.object_channel.codec import ObjectCodec
from fastvideo_comm.object_channel.message_seal import EVERYONE, TAG_BYTES, Address, MessageSeal, Op

ADDRESS = Address(Op.SEND, 0, 1, 7)
OBJECTS = [None, {"k": [1, 2.5, "x"]}, b"\0" * 40, (1, {2, 3}), "text" * 50]


def sealed_messages(seal):
    codec = ObjectCodec()
    return [b"".join(seal.seal(ADDRESS, codec.encode_parts(obj))) for obj in OBJECTS]


def is_opened(seal, address, message):
    try:
        seal.open(address, message)
    except AuthenticationError:
        return False
    return True


@pytest.fixture
def seal():
    return MessageSeal(b"secret", "group", b"session")


def test_a_sealed_message_is_opened_at_its_address(seal):
    codec = ObjectCodec()
    opened = [codec.decode(seal.open(ADDRESS, message)) for message in sealed_messages(seal)]
    assert opened == OBJECTS


def test_no_single_bit_flip_is_accepted(seal):
    for message in sealed_messages(seal):
        for bit in range(8 * len(message)):
            flipped = bytearray(message)
            flipped[bit // 8] ^= 1 << bit % 8
            assert not is_opened(seal, ADDRESS, flipped)


def test_no_truncation_and_no_extension_is_accepted(seal):
    for message in sealed_messages(seal):
        for length in range(len(message)):
            assert not is_opened(seal, ADDRESS, message[:length])
            assert not is_opened(seal, ADDRESS, message[length + 1 :])
        assert not is_opened(seal, ADDRESS, message + b"\0")
        assert not is_opened(seal, ADDRESS, b"\0" + message)


def test_no_mutation_of_20000_is_accepted(seal):
    random_ = random.Random(0)
    messages = sealed_messages(seal)
    for number in range(20_000):
        original = messages[number % len(messages)]
        message = bytearray(original)
        for _ in range(random_.randint(1, 5)):
            place = random_.randrange(len(message))
            if random_.random() < 0.5:
                message[place] = random_.randrange(256)
            else:
                message[place : place + random_.randint(0, 3)] = random_.randbytes(
                    random_.randint(0, 3)
                )
        if bytes(message) != original:
            assert not is_opened(seal, ADDRESS, message)


@pytest.mark.parametrize(
    "address",
    [
        ADDRESS._replace(number=6), ADDRESS._replace(number=8), ADDRESS._replace(src=1),
        ADDRESS._replace(dst=0), ADDRESS._replace(dst=EVERYONE), ADDRESS._replace(op=Op.BROADCAST),
        Address(Op.SEND, 1, 0, 7),
    ],
)  # fmt: skip
def test_a_replayed_reordered_or_misrouted_message_is_refused(seal, address):
    message = b"".join(seal.seal(ADDRESS, [b"body"]))
    with pytest.raises(AuthenticationError, match=f"must carry the seal of {address.key}"):
        seal.open(address, message)


def test_another_secret_group_session_or_part_order_is_refused(seal):
    message = b"".join(seal.seal(ADDRESS, [b"ab", b"c"]))
    assert bytes(seal.open(ADDRESS, message)) == b"abc"
    for other in (
        MessageSeal(b"secret2", "group", b"session"),
        MessageSeal(b"secret", "group2", b"session"),
        MessageSeal(b"secret", "group", b"session2"),
        MessageSeal(b"secret", "groups", b"ession"),
    ):
        assert not is_opened(other, ADDRESS, message)


def test_large_parts_are_covered_like_small_ones(seal):
    parts = [bytes(100_000), b"x" * 100_000]
    message = bytearray(b"".join(seal.seal(ADDRESS, parts)))
    assert seal.open(ADDRESS, message) == b"".join(parts)
    for place in (TAG_BYTES, 100_000, len(message) - 1):
        message[place] ^= 1
        assert not is_opened(seal, ADDRESS, message)
        message[place] ^= 1
