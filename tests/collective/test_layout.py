"""Layouts against their einops patterns, and collectives of P ranks played in one process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accelerator import DEVICES, GPU
from einops import rearrange, repeat
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastvideo_comm.collective.layout import (
    Split,
    concatenate_messages,
    message_view,
    near_even_sizes,
    padded_pairs,
    replicated_view,
)
from fastvideo_comm.kernels import strided_copy_

WORLD_SIZES = range(2, 9)
# On an accelerator the kernel even where torch would be called for being small.
IMPL = {"cpu": "torch", GPU: "triton"}

# The table of `layout`: pattern, dim and position of the view.
ROWS = [
    ("b s (P h) d -> b P s h d", 2, 1),
    ("b (P s) h d -> b P s h d", 1, 1),
    ("(P c) a b d -> P c a b d", 0, 0),
    ("a (P c) b d -> P a c b d", 1, 0),
    ("a b (P c) d -> P a b c d", 2, 0),
    ("a b d (P c) -> P a b d c", 3, 0),
    ("a b d (P c) -> P a b d c", -1, 0),
]


@given(
    row=st.sampled_from(ROWS),
    world_size=st.sampled_from(WORLD_SIZES),
    sizes=st.tuples(*[st.integers(1, 5)] * 4),
)
def test_every_view_is_its_einops_pattern(row, world_size, sizes):
    pattern, dim, position = row
    shape = list(sizes)
    shape[dim] *= world_size
    x = torch.arange(torch.Size(shape).numel()).reshape(shape)
    view = message_view(x, dim, world_size, position)
    expected = rearrange(x, pattern, P=world_size)
    assert torch.equal(view, expected)
    assert view.stride() == expected.stride()
    assert view.data_ptr() == x.data_ptr()


@given(
    num_dims=st.integers(1, 5),
    world_size=st.sampled_from(WORLD_SIZES),
    data=st.data(),
)
def test_concatenated_messages_are_the_tensor_again(num_dims, world_size, data):
    dim = data.draw(st.integers(0, num_dims - 1))
    shape = data.draw(st.lists(st.integers(1, 4), min_size=num_dims, max_size=num_dims))
    shape[dim] *= world_size
    x = torch.arange(torch.Size(shape).numel()).reshape(shape)
    messages = message_view(x, dim, world_size, 0)
    assert torch.equal(concatenate_messages(messages, dim), x)
    assert torch.equal(concatenate_messages(messages.contiguous(), dim), x)
    axes = [f"a{axis}" for axis in range(num_dims)]
    joined = [f"(P {name})" if axis == dim else name for axis, name in enumerate(axes)]
    pattern = f"P {' '.join(axes)} -> {' '.join(joined)}"
    assert torch.equal(concatenate_messages(messages, dim), rearrange(messages, pattern))


def test_a_message_view_of_a_strided_tensor_is_a_view():
    x = torch.arange(2 * 3 * 24).reshape(2, 3, 24).chunk(3, dim=-1)[1].unflatten(-1, (4, 2))
    view = message_view(x, 2, 2, 1)
    assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert torch.equal(view, rearrange(x, "b s (P h) d -> b P s h d", P=2))


@given(
    row=st.sampled_from(
        [(1, "b S h d -> b S r 1 h d"), (2, "b s H d -> b H r s 1 d")],
    ),
    sizes=st.tuples(*[st.integers(1, 4)] * 4),
    replicas=st.integers(1, 4),
)
def test_a_replicated_view_is_its_einops_pattern_and_takes_no_memory(row, sizes, replicas):
    dim, pattern = row
    x = torch.arange(torch.Size(sizes).numel()).reshape(sizes)
    view = replicated_view(x, dim, replicas)
    assert torch.equal(view, repeat(x, pattern, r=replicas))
    assert view.data_ptr() == x.data_ptr()
    assert view.stride(2) == 0 or replicas == 1


SIZES = st.lists(st.integers(0, 4), min_size=1, max_size=5).map(tuple)


@given(
    share=st.tuples(st.sampled_from((1, 2)), SIZES).map(lambda fields: Split(*fields))
    | st.tuples(st.sampled_from((1, 2)), st.none(), st.integers(1, 3)).map(
        lambda fields: Split(*fields)
    ),
    data=st.data(),
)
def test_a_share_counts_the_elements_of_its_views(share, data):
    """Each rank's part, their sum, and the elements of the messages: one truth in three places."""
    if share.sizes is None:
        entries = data.draw(st.integers(1, 4))
        world_size = entries * share.replicas
        size = entries if share.replicas > 1 else entries * data.draw(st.integers(1, 3))
    else:
        world_size, size = len(share.sizes), sum(share.sizes)
    shape = [2, 3, 5, 2]
    shape[share.dim] = size
    x = torch.empty(shape)
    views = share.views(x, world_size)
    if share.sizes is None:
        messages = views[0].reshape(2, world_size, -1).unbind(1)
    else:
        messages = tuple(view.reshape(2, -1) for view in views)
    assert [message[0].numel() for message in messages] == share.counts(x, world_size)
    for rank in range(world_size):
        assert share.whole(share.part(size, rank, world_size), world_size) == size


@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    batch=st.integers(1, 2),
    data=st.data(),
)
def test_uneven_shares_traded_between_ranks_are_slices_of_the_global_tensor(lengths, batch, data):
    world_size = len(lengths)
    counts = st.lists(st.integers(0, 3), min_size=world_size, max_size=world_size)
    heads = tuple(data.draw(counts))
    x = _values(batch, sum(lengths), sum(heads), HEAD_DIM, device="cpu")
    sequence, head = Split(1, tuple(lengths)), Split(2, heads)
    sent = [head.views(part, world_size) for part in x.split(lengths, 1)]
    for rank, expected in enumerate(x.split(heads, 2)):
        output = torch.empty_like(expected)
        for view, messages in zip(sequence.views(output, world_size), sent, strict=True):
            _copy(view, messages[rank])
        assert torch.equal(output, expected)


# Ranks in one process: every rank packs, messages are traded in Python, every rank unpacks. Sizes
# are no powers of two: B = 1..3, s = 5, h = 3, D = 6.
BATCHES = (1, 2, 3)
LENGTH, HEADS, HEAD_DIM = 5, 3, 6


def _contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def _chunk_of_qkv(x: Tensor) -> Tensor:
    """`[B, s, H, D]` as the middle third of a fused projection."""
    fused = torch.cat([x.flatten(2)] * 3, dim=-1)
    return fused.chunk(3, dim=-1)[1].unflatten(-1, x.shape[2:])


def _transposed(x: Tensor) -> Tensor:
    """`[B, s, H, D]` in the memory of `[B, H, s, D]`."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


INPUTS = [_contiguous, _chunk_of_qkv, _transposed]


def _values(*shape: int, device: str) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), device=device, dtype=torch.int32).view(shape)


def _copy(view: Tensor, messages: Tensor) -> None:
    strided_copy_(view, messages, impl=IMPL[view.device.type])


def _all_to_all(inputs: list[Tensor], scatter_dim: int, gather_dim: int) -> list[Tensor]:
    """`all_to_all_4D` of every rank's input."""
    world_size = len(inputs)
    sent = []
    for x in inputs:
        view = message_view(x, scatter_dim, world_size, 1)
        messages = x.new_empty(view.shape)
        _copy(messages, view)
        sent.append(messages)
    outputs = []
    for rank in range(world_size):
        received = torch.stack([messages[:, rank] for messages in sent], dim=1)
        shape = list(inputs[rank].shape)
        shape[scatter_dim] //= world_size
        shape[gather_dim] *= world_size
        output = inputs[rank].new_empty(shape)
        _copy(message_view(output, gather_dim, world_size, 1), received)
        outputs.append(output)
    return outputs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strides", INPUTS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
class TestAllToAll:
    def test_scattered_heads_give_every_rank_the_sequence_of_its_heads(
        self, world_size, batch, strides, device
    ):
        x = _values(batch, world_size * LENGTH, world_size * HEADS, HEAD_DIM, device=device)
        inputs = [strides(part) for part in x.chunk(world_size, dim=1)]
        for rank, output in enumerate(_all_to_all(inputs, 2, 1)):
            assert torch.equal(output, x[:, :, rank * HEADS : (rank + 1) * HEADS])

    def test_scattered_sequence_gives_every_rank_the_heads_of_its_sequence(
        self, world_size, batch, strides, device
    ):
        x = _values(batch, world_size * LENGTH, world_size * HEADS, HEAD_DIM, device=device)
        inputs = [strides(part) for part in x.chunk(world_size, dim=2)]
        for rank, output in enumerate(_all_to_all(inputs, 1, 2)):
            assert torch.equal(output, x[:, rank * LENGTH : (rank + 1) * LENGTH])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strides", INPUTS)
@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
class TestAlongEveryDim:
    def test_gathered_parts_stand_in_rank_order(self, world_size, dim, strides, device):
        shape = [2, LENGTH, HEADS, HEAD_DIM]
        shape[dim] *= world_size
        x = _values(*shape, device=device)
        messages = torch.stack([strides(part) for part in x.chunk(world_size, dim)])
        output = torch.empty_like(x)
        _copy(message_view(output, dim, world_size, 0), messages)
        assert torch.equal(output, x)

    def test_reduced_parts_are_slices_of_the_sum(self, world_size, dim, strides, device):
        shape = [2, LENGTH, HEADS, HEAD_DIM]
        shape[dim] *= world_size
        inputs = [_values(*shape, device=device) * (rank + 1) for rank in range(world_size)]
        sent = []
        for x in inputs:
            view = message_view(strides(x), dim, world_size, 0)
            messages = x.new_empty(view.shape)
            _copy(messages, view)
            sent.append(messages)
        total: Tensor = sum(inputs)  # type: ignore[assignment]
        for rank, part in enumerate(total.chunk(world_size, dim)):
            assert torch.equal(sum(messages[rank] for messages in sent), part)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_partitions", [1, 2, 3, 5])
def test_chunks_of_the_last_dim_are_one_copy(num_partitions, device):
    x = _values(2, 3, num_partitions * 7, device=device)
    view = message_view(x, -1, num_partitions, 0)
    chunks = x.new_empty(view.shape)
    _copy(chunks, view)
    for chunk, expected in zip(chunks, x.chunk(num_partitions, dim=-1), strict=True):
        assert torch.equal(chunk, expected)
        assert chunk.is_contiguous()


@pytest.mark.parametrize(
    ("dims", "contiguous"),
    [((2, 1), (False, True)), ((1, 2), (True, False))],
    ids=["scatter heads", "scatter sequence"],
)
@pytest.mark.parametrize("batch", BATCHES)
def test_each_direction_needs_one_copy_at_any_batch(batch, dims, contiguous):
    """Of a batch entry's two sides of the exchange, one is contiguous: it is its own message."""
    x = torch.empty(batch, 6, 4, 2)
    sides: list[Callable[[Tensor], bool]] = [
        lambda x: message_view(x, dims[0], 2, 1)[0].is_contiguous(),
        lambda x: message_view(x, dims[1], 2, 1)[0].is_contiguous(),
    ]
    assert tuple(side(x) for side in sides) == contiguous


@pytest.mark.parametrize(
    ("share", "shape", "parts"),
    [
        (Split(2), (2, 5, 6, 4), [2, 2, 2]),
        (Split(1), (2, 6, 5, 4), [2, 2, 2]),
        (Split(2, (1, 0, 5)), (2, 5, 6, 4), [1, 0, 5]),
        (Split(1, (0, 0, 0)), (2, 0, 6, 4), [0, 0, 0]),
        (Split(2, None, 3), (2, 5, 2, 4), [1, 1, 1, 1, 1, 1]),
        (Split(2, None, 3), (2, 5, 1, 4), [1, 1, 1]),
    ],
)
def test_a_share_says_what_each_rank_has_and_where_its_message_is(share, shape, parts):
    size, world_size = shape[share.dim], len(parts)
    x = torch.arange(torch.Size(shape).numel()).reshape(shape)
    got = [share.part(size, rank, world_size) for rank in range(world_size)]
    assert got == parts
    wholes = [share.whole(part, world_size) for part in parts]
    assert wholes == [size] * world_size
    counts = share.counts(x, world_size)
    others = shape[3] * shape[3 - share.dim]  # the other of sequence and heads
    assert counts == [part * others for part in parts]
    assert {type(number) for number in got + wholes + counts} == {int}  # 2.0 == 2, and is no size
    # Every message, as the rank that gets it finds it.
    messages = share.views(x, world_size)
    if share.sizes is None:
        (view,) = messages
        assert view.data_ptr() == x.data_ptr()
        messages = list(view.flatten(1, 2).unbind(1) if share.replicas > 1 else view.unbind(1))
    for rank in range(world_size):
        start = rank // share.replicas if share.replicas > 1 else sum(parts[:rank])
        assert torch.equal(messages[rank], x.narrow(share.dim, start, parts[rank]))


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize(
    ("sizes", "pairs"),
    [((2, 2, 2), 1), ((3, 3, 1), 2), ((1, 0, 0, 2, 2), 2), ((0, 4, 0), 1), ((0, 0), 0)],
)
def test_parts_fill_the_front_of_their_messages(sizes, pairs, dim):
    shape = [2, 3, 5]
    shape[dim] = sum(sizes)
    x = torch.arange(torch.Size(shape).numel()).reshape(shape)
    parts = x.split(sizes, dim)
    slot = max(part.numel() for part in parts)
    messages = torch.full((len(sizes), slot), -1)
    found = padded_pairs(x, dim, sizes, messages)
    assert len(found) == pairs  # a run of equal sizes is one copy
    for part, message in found:
        message.copy_(part)
    for part, message in zip(parts, messages, strict=True):
        assert message[: part.numel()].tolist() == part.flatten().tolist()
        assert (message[part.numel() :] == -1).all()
    there = torch.full_like(x, -1)
    for part, message in padded_pairs(there, dim, sizes, messages):
        part.copy_(message)
    assert torch.equal(there, x)


@given(st.integers(0, 50), st.integers(1, 9))
def test_near_even_sizes_are_those_of_tensor_split(size, num_parts):
    expected = [len(part) for part in torch.empty(size).tensor_split(num_parts)]
    assert near_even_sizes(size, num_parts) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 3), "size must not be negative, got -1"),
        ((3, 0), "num_parts must be at least 1, got 0"),
    ],
)
def test_sizes_that_cannot_be_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        near_even_sizes(*arguments)
