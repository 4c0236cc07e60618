"""Kinds of tensors, arrays and classes that few callers send; each comes back, or is refused."""

import dataclasses
import pickle
from datetime import datetime, timezone
from zoneinfo import ZoneInfo

import numpy as np
import pytest
import torch

from fastvideo_comm.errors import DecodeError
from fastvideo_comm.object_channel.codec import ObjectCodec
from fastvideo_comm.object_channel.pickle_codec import PickleCodec


def round_trip(obj, codec=None):
    codec = codec or ObjectCodec()
    return codec.decode(codec.encode(obj))


@pytest.mark.parametrize(
    "name",
    """bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 bfloat16 float32 float64
    complex32 complex64 complex128 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz
    float8_e8m0fnu""".split(),  # noqa: SIM905 - a list of literals would be one per line
)
def test_tensors_of_every_plain_dtype_come_back(name):
    dtype = getattr(torch, name)
    data = (torch.arange(2 * 3 * dtype.itemsize) % 2).to(torch.uint8)
    tensor = data.view(dtype).reshape(2, 3)
    received = round_trip(tensor)
    assert (received.dtype, received.shape) == (dtype, (2, 3))
    assert received.view(torch.uint8).tolist() == tensor.view(torch.uint8).tolist()


def test_the_values_of_a_view_travel():
    numbers = torch.tensor([1 + 2j, 3 - 4j])
    assert round_trip(numbers.conj().imag).tolist() == [-2.0, 4.0]
    negated = numbers[:1].conj().imag
    assert negated.is_neg()
    assert negated.is_contiguous()
    assert round_trip(negated).tolist() == [-2.0]
    assert round_trip(numbers.conj()).tolist() == [1 - 2j, 3 + 4j]
    weights = torch.arange(6.0, requires_grad=True)
    received = round_trip(weights[1::2])
    assert received.tolist() == [1.0, 3.0, 5.0]
    assert not received.requires_grad
    assert round_trip(torch.ones(1).expand(2, 3)).tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize(
    "array",
    [
        np.array(["ä", "\U0001f600"], ">U3"), np.array([1.5, -2], ">f8"), np.array([b"ab"], "S4"),
        np.array([3], "<m8[25s]"), np.array(["2026-01-01"], "<M8[D]"), np.arange(6)[::-2],
        np.array([True, False]), np.array(["\U0010ffff"]),
    ],
    ids=lambda array: array.dtype.str,
)  # fmt: skip
def test_arrays_of_either_byte_order_and_any_unit_come_back(array):
    received = round_trip(array)
    assert received.dtype == array.dtype
    assert received.tolist() == array.tolist()


@pytest.mark.parametrize("size", [65_535, 65_536, 65_537])
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_bytes_around_the_size_from_which_they_are_attached_come_back(kind, size):
    obj = [kind(size), kind(b"x") * size]
    received = round_trip(obj)
    assert received == obj
    assert [type(part) for part in received] == [kind, kind]


@pytest.mark.parametrize(
    ("obj", "text"),
    [
        (datetime(2026, 1, 1, tzinfo=ZoneInfo("UTC")), "obj must have a fixed offset, got"),
        ([np.zeros(1, "V4")], r"obj\[0\] must be sendable: an array must have a dtype of plain"),
        (
            [np.ma.array([1])],
            r"obj\[0\] must be of a supported or registered type, got MaskedArray",
        ),
        ([(1, {2, 1j})], r"obj\[0\]\[1\]\[\d\] must be of a supported .* got complex"),
        ({"k": {1j: 1}}, r'obj\["k"\]\[1j\] must be of a supported .* got complex'),
    ],
)
def test_what_has_no_plain_form_is_refused_with_its_path(obj, text):
    with pytest.raises(TypeError, match=text):
        ObjectCodec().encode(obj)


@dataclasses.dataclass(frozen=True)
class Pair:
    first: object
    second: object = None


@dataclasses.dataclass
class Swapped:
    second: object
    first: object


@dataclasses.dataclass
class Single:
    first: object


def codec_with(cls):
    codec = ObjectCodec()
    codec.register_type(cls, name="pair")
    return codec


@pytest.mark.parametrize("other", [Swapped("b", "a"), Single("a")], ids=["order", "number"])
def test_a_dataclass_has_the_same_fields_on_both_sides(other):
    pair = Pair(1, [datetime(2026, 1, 1, tzinfo=timezone.utc)])
    assert round_trip(pair, codec_with(Pair)) == pair
    for obj, receiver in ((pair, type(other)), (other, Pair)):
        with pytest.raises(DecodeError, match="the fields of pair must be"):
            codec_with(receiver).decode(codec_with(type(obj)).encode(obj))


def test_a_field_that_cannot_be_sent_is_named():
    with pytest.raises(TypeError, match=r'obj\[1\]\["second"\] must be of a supported'):
        codec_with(Pair).encode([0, Pair(1, 1j)])


@pytest.mark.parametrize(
    "data", [b"", b"no pickle", pickle.dumps([1])[:-3], b"cnowhere\nat_all\n."]
)
def test_what_is_no_pickle_is_a_decode_error(data):
    codec = PickleCodec()
    assert codec.decode(memoryview(codec.encode_parts({1: "x"})[0])) == {1: "x"}
    with pytest.raises(DecodeError, match="the message must hold a pickle: "):
        codec.decode(data)
