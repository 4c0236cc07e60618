"""Grouped heads over ranks: attention over the exchange is attention in one process."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import Ranks
from test_collectives import GROUPS, same
from test_exchange import finish, sizes_of

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.collective.grouped_heads import form_groups, grouped_splits
from fastvideo_comm.collective.layout import Split


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Grouped attention `[B, S, H, D]`, a head at a time: no head's value depends on the others."""
    if not q.shape[2]:
        return q.new_zeros(*q.shape[:3], v.shape[3]) + q.sum() + k.sum() + v.sum()
    group = q.shape[2] // k.shape[2]
    assert group * k.shape[2] == q.shape[2]
    heads = []
    for head in range(q.shape[2]):
        key, value = k[:, :, head // group], v[:, :, head // group]
        heads.append((q[:, :, head] @ key.mT).softmax(-1) @ value)
    return torch.stack(heads, 2)


def attends(
    communicator: DeviceCommunicatorBase,
    batch: int,
    sequence: int,
    key_heads: int,
    group: int,
    seed: int,
    async_op: bool,
) -> int:
    """How many heads this rank attended with."""
    ranks, rank = communicator.world_size, communicator.rank
    generator = torch.Generator().manual_seed(seed)
    rows = sizes_of(sequence, ranks, generator)

    def draw(heads: int, width: int) -> torch.Tensor:
        shape = (batch, sequence, heads, width)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    whole = [draw(key_heads * group, 3), draw(key_heads, 3), draw(key_heads, 2)]
    expected_leaves = [each.clone().requires_grad_() for each in whole]
    expected = attention(*expected_leaves)
    leaves = [each.split(rows, 1)[rank].clone().requires_grad_() for each in whole]
    q, k, v = finish(
        communicator.all_to_all_4D(
            leaves, scatter_sizes="auto", gather_sizes="auto", async_op=async_op
        )
    )
    attended = attention(q, k, v)
    back = finish(
        communicator.all_to_all_4D(
            attended, 1, 2, scatter_sizes=rows, gather_sizes="auto", async_op=async_op
        )
    )
    same(back.detach(), expected.detach().split(rows, 1)[rank])
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    (back * weights.split(rows, 1)[rank]).sum().backward()
    (expected * weights).sum().backward()
    for leaf, of_whole in zip(leaves, expected_leaves, strict=True):
        # A key head that several ranks hold adds their gradients in another order.
        torch.testing.assert_close(
            leaf.grad, of_whole.grad.split(rows, 1)[rank], rtol=1e-12, atol=1e-12
        )
    return q.shape[2]


@given(
    group_of_ranks=GROUPS,
    batch=st.integers(1, 2),
    sequence=st.integers(1, 7),
    key_heads=st.integers(1, 6),
    group=st.integers(1, 5),
    seed=st.integers(0, 99),
    async_op=st.booleans(),
)
def test_attention_over_the_exchange_is_attention_in_one_process(
    ranks: Ranks, group_of_ranks, batch, sequence, key_heads, group, seed, async_op
):
    heads = ranks.run(group_of_ranks, attends, batch, sequence, key_heads, group, seed, async_op)
    assert sum(heads) == key_heads * group
    if key_heads >= len(heads):
        assert max(heads) - min(heads) in (0, group)
    elif len(heads) % key_heads == 0 and group > 1:
        assert max(heads) - min(heads) <= 1


@pytest.mark.parametrize(("heads", "size"), [((12, 4), 3), ((6, 2), 3), ((20, 5), 3), ((6, 2), 4)])
def test_head_counts_that_ranks_do_not_divide(ranks: Ranks, heads, size):
    """Those that were once shared each as evenly as can be, with values off by up to 2.7."""
    total, key_heads = heads
    ranks.run(size, attends, 2, 5, key_heads, total // key_heads, 1, False)


@pytest.mark.parametrize("world_size", range(1, 13))
def test_every_rank_has_the_key_heads_of_its_query_heads_and_no_head_is_lost(world_size):
    for key_heads, group in itertools.product(range(1, 8), range(2, 7)):
        total = key_heads * group
        query, key, value = grouped_splits([total, key_heads, key_heads], world_size)
        assert key == value
        assert query.replicas == 1
        query_parts = [query.part(total, rank, world_size) for rank in range(world_size)]
        key_parts = [key.part(key_heads, rank, world_size) for rank in range(world_size)]
        assert sum(query_parts) == total
        if key.replicas > 1:
            assert key_parts == [1] * world_size
            starts = [rank // key.replicas for rank in range(world_size)]
            assert max(starts) == key_heads - 1
        else:
            starts = [sum(key_parts[:rank]) for rank in range(world_size)]
            assert sum(key_parts) == key_heads
        for rank in range(world_size):
            start = sum(query_parts[:rank])
            used = {head // group for head in range(start, start + query_parts[rank])}
            assert used <= set(range(starts[rank], starts[rank] + key_parts[rank]))


@pytest.mark.parametrize(
    ("heads", "world_size", "splits"),
    [
        ((12, 4), 2, [Split(2), Split(2)]),
        ((12, 4), 3, [Split(2, (6, 3, 3)), Split(2, (2, 1, 1))]),
        ((12, 2), 3, [Split(2, (6, 6, 0)), Split(2, (1, 1, 0))]),
        ((12, 2), 4, [Split(2), Split(2, None, 2)]),
        ((6, 2), 4, [Split(2, (2, 1, 2, 1)), Split(2, None, 2)]),
        ((4, 4), 8, [Split(2, (1, 1, 1, 1, 0, 0, 0, 0))] * 2),
    ],
)
def test_a_group_is_on_one_rank_or_on_as_many_ranks_as_every_other(heads, world_size, splits):
    assert grouped_splits(heads, world_size) == splits


@pytest.mark.parametrize("heads", [[12, 4, 4], [12, 0], [4, 12], [0, 0], []])
def test_multiples_of_the_smallest_count_form_groups(heads):
    assert form_groups(heads)


@pytest.mark.parametrize("heads", [[12, 5], [12, 6, 4], [0, 3, 2]])
def test_counts_that_are_no_multiples_form_no_groups(heads):
    assert not form_groups(heads)


def test_heads_of_one_count_are_not_replicated():
    assert grouped_splits([2, 2, 2], 4) == [Split(2, (1, 1, 0, 0))] * 3
    assert grouped_splits([4, 4, 4], 4) == [Split(2)] * 3


def test_a_tensor_without_heads_takes_part():
    assert grouped_splits([6, 0, 4], 2) == [Split(2), Split(2), Split(2)]
    assert grouped_splits([0, 0], 3) == [Split(2)] * 2
    assert grouped_splits([], 3) == []


def zeros(*heads: int) -> list[torch.Tensor]:
    return [torch.zeros(1, 2, number, 3) for number in heads]


MISTAKES: list[tuple[tuple[int, ...], dict[str, Any], str]] = [
    (
        (12, 4, 4),
        {},
        "size at scatter_dim=2 that world_size=3 divides, got 4 of shape [1, 2, 4, 3]; "
        "scatter_sizes='auto' gives every rank the key heads of its query heads",
    ),
    ((7, 3), {}, "divides, got 7 of shape [1, 2, 7, 3]; scatter_sizes= shares it unevenly"),
    ((7,), {}, "divides, got 7 of shape [1, 2, 7, 3]; scatter_sizes= shares it unevenly"),
    (
        (6, 4, 4),
        {"scatter_sizes": "auto"},
        "input_ must have head counts that are multiples of the smallest for "
        "scatter_sizes='auto', got [6, 4, 4]; scatter_sizes= takes sizes for each tensor",
    ),
]


def mistaken(communicator: DeviceCommunicatorBase) -> None:
    for heads, arguments, message in MISTAKES:
        with pytest.raises(ValueError, match=re.escape(message)):
            communicator.all_to_all_4D(zeros(*heads), **arguments)
    # The remedy that the message names.
    sizes = [[2, 2, 2], [2, 1, 1]]
    q, k = communicator.all_to_all_4D(zeros(6, 4), scatter_sizes=sizes)
    assert (q.shape[2], k.shape[2]) == (2, sizes[1][communicator.rank])


def test_an_error_about_heads_says_what_is_right(ranks: Ranks):
    ranks.run(3, mistaken)


def traced(communicator: DeviceCommunicatorBase, heads: tuple[int, ...]) -> None:
    torch._dynamo.reset()
    inputs = [torch.rand(2, 3, number, 4) for number in heads]

    def call(*inputs: torch.Tensor) -> Any:
        return communicator.all_to_all_4D([x * 2 for x in inputs], scatter_sizes="auto")

    expected = call(*inputs)
    actual = torch.compile(call, backend="aot_eager", fullgraph=True)(*inputs)
    for one, other in zip(actual, expected, strict=True):
        same(one, other)


# Shared by groups, one for all ranks, and each for two of them.
@pytest.mark.parametrize(
    ("heads", "size", "way"),
    [((12, 4, 4), 3, "messages"), ((6, 3, 1), 3, "memory"), ((4, 2), 4, "messages")],
)
def test_grouped_heads_trace_whole(ranks: Ranks, heads, size, way):
    ranks.run(size, traced, heads, ways=(way,))
