"""Objects round trip exactly; what cannot be sent or built is an error and nothing else."""

import doctest
import math
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from object_classes import Access, Color, Late, Level, Opaque, Point, new_codec

import fastvideo_comm.object_channel.codec
import fastvideo_comm.object_channel.message_seal
import fastvideo_comm.object_channel.pickle_codec
from fastvideo_comm.errors import DecodeError
from fastvideo_comm.object_channel.codec import ObjectCodec
from fastvideo_comm.object_channel.format import LONG


def same(left, right):
    """Whether two objects agree in type and value, all the way down."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return (
            left.dtype == right.dtype
            and left.shape == right.shape
            and bytes_of(left) == bytes_of(right)
        )
    if isinstance(left, np.ndarray):
        return (left.dtype, left.shape, left.tobytes()) == (
            right.dtype,
            right.shape,
            right.tobytes(),
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return same(list(left), list(right)) and same(list(left.values()), list(right.values()))
    if isinstance(left, float):
        return (math.isnan(left) and math.isnan(right)) or (
            left == right and math.copysign(1, left) == math.copysign(1, right)
        )
    if isinstance(left, datetime):
        return (left, left.fold, repr(left.tzinfo)) == (right, right.fold, repr(right.tzinfo))
    if isinstance(left, set | frozenset):
        return left == right and {type(x) for x in left} == {type(x) for x in right}
    return left == right


def bytes_of(tensor):
    return bytes(tensor.contiguous().untyped_storage())


def round_trip(obj, codec=None):
    codec = codec or new_codec()
    return codec.decode(codec.encode(obj))


offsets = st.timedeltas(timedelta(hours=-23), timedelta(hours=23)).map(timezone)


hashable_leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**200), 2**200)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.datetimes()
    | st.datetimes(timezones=offsets)
    | st.timedeltas()
    | st.sampled_from([torch.float32, torch.bfloat16, torch.device("cpu"), torch.device("cuda:1")])
    | st.sampled_from([Color.RED, Color.BLUE, Level.LOW, Access.READ, Access.READ | Access.WRITE])
    | st.builds(Point, st.integers(0, 9))
    | st.lists(st.integers(0, 9)).map(torch.Size)
)


hashables = st.recursive(
    hashable_leaves,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=5,
)


tensors = st.builds(
    lambda shape, dtype: torch.arange(math.prod(shape)).reshape(shape).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64,
                     torch.uint16, torch.float8_e4m3fn]),
)  # fmt: skip


arrays = st.builds(
    lambda shape, dtype: np.arange(math.prod(shape)).reshape(shape).astype(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(["<f4", ">i8", "|b1", "<U5", "|S3", "<M8[ns]", "<c16", "<f2"]),
)


objects = st.recursive(
    hashables | st.floats() | st.binary().map(bytearray) | tensors | arrays | st.builds(Late),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(hashables, inner, max_size=4)
        | st.sets(hashables, max_size=4)
    ),
    max_leaves=12,
)


@given(objects)
def test_every_supported_object_comes_back_equal_in_value_and_type(obj):
    assert same(round_trip(obj), obj)


@pytest.mark.parametrize(
    "obj",
    [
        2**63, 2**64, -(2**63) - 1, -(2**1000), float("nan"), -0.0, float("inf"), "\ud800", "\0",
        [1] * (LONG + 5), tuple(range(LONG - 1)), tuple(range(LONG)), set(range(LONG + 1)),
        {(i,): i for i in range(LONG)}, [[]] * LONG, b"x" * 70_000, bytearray(b"x") * 70_000,
        torch.tensor(2.5), torch.zeros(0, 3), torch.zeros(3, 0, dtype=torch.bool), np.array(1.5),
        np.zeros((0, 2)), torch.arange(50_000.0), np.arange(50_000), torch.ones(2, 3).T,
        np.asfortranarray(np.arange(6).reshape(2, 3)), torch.tensor([1 + 2j]).conj(),
        {1: "int", "1": "str", b"1": "bytes", (1,): "tuple", None: 0, frozenset({1}): 1},
        datetime(2026, 11, 1, 1, 30, fold=1, tzinfo=timezone(timedelta(hours=-5), "EST")),
        datetime(2026, 11, 1, tzinfo=timezone.utc), timedelta(-1, 5, 7), torch.Size([]), Late(),
    ],
    ids=lambda obj: f"{type(obj).__name__}",
)  # fmt: skip
def test_edges_come_back(obj):
    received = round_trip(obj)
    if isinstance(obj, torch.Tensor):
        obj = obj.resolve_conj().contiguous().clone()
    assert same(received, obj)


def test_received_arrays_are_writable_and_aligned():
    for obj in (torch.arange(5.0), torch.arange(50_000.0), [torch.ones(3), torch.ones(30_000)]):
        parts = new_codec().encode_parts(("some text of odd length", obj))
        _text, received = new_codec().decode(bytearray(b"".join(parts)))
        for tensor in received if isinstance(received, list) else [received]:
            tensor += 1
            assert tensor.data_ptr() % tensor.element_size() == 0
    array = round_trip(np.arange(50_000))
    array += 1


def test_large_buffers_are_not_copied_by_the_sender():
    tensor = torch.zeros(1 << 20)
    parts = new_codec().encode_parts([tensor])
    tensor += 1
    assert new_codec().decode(b"".join(parts))[0].sum() == 1 << 20


def nested(depth):
    obj = []
    for _ in range(depth):
        obj = [obj]
    return obj


def test_nesting_has_a_limit_that_is_told():
    assert round_trip(nested(100)) == nested(100)
    with pytest.raises(ValueError, match="obj must nest at most 128 levels, got more"):
        new_codec().encode(nested(200))
    endless = []
    endless.append(endless)
    with pytest.raises(ValueError, match="obj must nest at most 128 levels, got more"):
        new_codec().encode(endless)


class Text(str):
    pass


@pytest.mark.parametrize(
    ("obj", "path"),
    [
        ({"a": [0, 1, 2, object()]}, r'obj["a"][3] must be of a supported or registered type'),
        (Text("x"), "obj must be of a supported or registered type, got Text"),
        ([{1: {(1, 2): lambda: None}}], "obj[0][1][(1, 2)] must be of a supported"),
        ({"k": memoryview(b"x")}, 'obj["k"] must be of a supported or registered type, got memory'),
        ((1, 1j), "obj[1] must be of a supported or registered type, got complex"),
        ([Opaque(1)], "obj[0] must be of a supported or registered type, got Opaque"),
        ([np.array([object()])], "obj[0] must be sendable: an array must have a dtype of plain"),
        ([np.zeros(1, [("a", "i4")])], "obj[0] must be sendable: an array must have a dtype of"),
        ([np.float32(1)], "obj[0] must be of a supported or registered type, got float32"),
        ([torch.ones(2).to_sparse()], "obj[0] must be sendable: a tensor must be dense and on the"),
        ([torch.ones(2, device="meta")], "obj[0] must be sendable: a tensor must be dense and on"),
        (
            [torch.ones([1] * 65)],
            "obj[0] must be sendable: a tensor must have at most 64 dims, got",
        ),
        ([torch.nn.Parameter(torch.ones(1))], "obj[0] must be of a supported or registered type"),
        ([Access], "obj[0] must be of a supported or registered type, got EnumType"),
    ],
    ids=lambda value: None,
)
def test_what_cannot_be_sent_is_a_type_error_with_the_path(obj, path):
    with pytest.raises(TypeError) as caught:
        new_codec().encode(obj)
    assert str(caught.value).replace("EnumMeta", "EnumType").startswith(path)


def test_registering_decides_what_is_built():
    sender, receiver = ObjectCodec(), ObjectCodec()
    for codec in (sender, receiver):
        codec.register_type(Opaque, name="opaque", to_fields=lambda o: o.value, from_fields=Opaque)
    sender.register_type(Point)
    assert receiver.decode(sender.encode(Opaque((1, 2)))).value == (1, 2)
    with pytest.raises(DecodeError, match=r"object_classes.Point' is not registered"):
        receiver.decode(sender.encode(Point(1)))


def test_a_received_dataclass_runs_no_code_of_its_own():
    point = object.__new__(Point)
    object.__setattr__(point, "x", 13)
    object.__setattr__(point, "tags", ())
    assert round_trip(point) == point


def test_a_field_that_no_constructor_takes_arrives():
    late = Late()
    late.made = 7
    assert round_trip(late).made == 7


def test_bad_registrations_are_told():
    codec = new_codec()
    with pytest.raises(ValueError, match="cls must not be supported already, got Point"):
        codec.register_type(Point)
    with pytest.raises(ValueError, match="cls must not be supported already, got int"):
        codec.register_type(int, to_fields=str, from_fields=int)
    codec.register_type(Opaque, name="x", to_fields=str, from_fields=int)
    with pytest.raises(ValueError, match="name must be unique in a codec, got 'x'"):
        codec.register_type(Text, name="x", to_fields=str, from_fields=Text)
    with pytest.raises(TypeError, match="cls must be an enum, a dataclass, or come with two"):
        codec.register_type(list.__class__)
    with pytest.raises(TypeError, match="to_fields and from_fields must come together"):
        codec.register_type(Text, to_fields=str)
    with pytest.raises(TypeError, match="cls must be a class, got 5"):
        codec.register_type(5)


@pytest.mark.parametrize("name", ["codec", "message_seal", "pickle_codec"])
def test_docstring_examples_run(name):
    module = getattr(fastvideo_comm.object_channel, name)
    failed, attempted = doctest.testmod(module, optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    assert attempted
    assert not failed
