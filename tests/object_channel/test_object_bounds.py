"""The limits of the encoded form, on both of their sides."""

import pytest

from fastvideo_comm.errors import DecodeError
from fastvideo_comm.object_channel.codec import ObjectCodec


def inside(kind, depth):
    """Return an empty container that stands inside `depth` others of its kind."""
    obj = kind()
    for _ in range(depth):
        obj = {"k": obj} if kind is dict else kind([obj])
    return obj


@pytest.mark.parametrize("kind", [list, tuple, dict, frozenset])
def test_an_object_stands_inside_at_most_128_others(kind):
    codec = ObjectCodec()
    assert codec.decode(codec.encode(inside(kind, 128))) == inside(kind, 128)
    with pytest.raises(ValueError, match="obj must nest at most 128 levels, got more"):
        codec.encode(inside(kind, 129))


def test_every_byte_between_attachments_must_be_zero():
    codec = ObjectCodec()
    obj = [b"a" * 65_537, b"b" * 65_537]
    data = codec.encode(obj)
    assert codec.decode(data) == obj
    between = range(data.index(b"a" * 65_537) + 65_537, data.index(b"b" * 65_537))
    before = range(data.index(b"a" * 65_537) - 8, data.index(b"a" * 65_537))
    zeros = [place for place in (*before, *between) if not data[place]]
    assert len(between) == 63
    assert set(between) <= set(zeros)
    for place in between:
        altered = bytearray(data)
        altered[place] = 1
        with pytest.raises(DecodeError, match="the bytes between attachments must be zero"):
            codec.decode(altered)
