"""How a dim is divided, and an exchange: its reverse, its parts and its shapes."""

from __future__ import annotations

import pytest
import torch

from fastvideo_comm.collective.layout import (
    HEADS_TO_SEQUENCE,
    SEQUENCE_TO_HEADS,
    Split,
    Splits,
    replicated_view,
)
from fastvideo_comm.collective.wire import WireFormat


@pytest.mark.parametrize(
    ("split", "starts", "sizes"),
    [
        (Split(1), [0, 2, 4], [2, 2, 2]),
        (Split(1, (1, 0, 5)), [0, 1, 1], [1, 0, 5]),
        (Split(1, None, 3), [0, 0, 0, 1, 1, 1], [1] * 6),
        (Split(1, None, 2), [0, 0, 1, 1], [1] * 4),
    ],
)
def test_the_part_of_a_rank_is_a_view_of_its_entries(split, starts, sizes):
    x = torch.arange(2 * 6 * 3).reshape(2, 6, 3)
    if split.replicas > 1:
        x = x[:, : len(sizes) // split.replicas]
    for rank, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        part = split.part_of(x, rank, len(sizes))
        assert torch.equal(part, x[:, start : start + size])
        assert part.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_a_split_of_a_tensor_with_more_dims_in_front_is_of_the_same_dim():
    assert Split(1, (1, 2), 1).moved(2) == Split(3, (1, 2), 1)


@pytest.mark.parametrize(("shape", "dim"), [((2, 5, 3, 4), 2), ((2, 3, 5, 4), 1)])
def test_the_replicated_shape_is_that_of_the_replicated_view(shape, dim):
    expected = replicated_view(torch.empty(shape), dim, 6).shape
    assert Split(dim, None, 6).replicated_shape(shape) == list(expected)


GRADIENT = WireFormat((torch.float8_e5m2, None), "stochastic")
WIRE = WireFormat((torch.float8_e4m3fn, None), gradient=GRADIENT)
UNEVEN = Splits((Split(2, (1, 2)), Split(2, None, 2)), (Split(1, (3, 4)), Split(1)))
ROUNDED = UNEVEN._replace(wire=WIRE)


@pytest.mark.parametrize(
    ("splits", "reverse"),
    [
        (UNEVEN, Splits(UNEVEN.gather, UNEVEN.scatter)),
        (ROUNDED, Splits(UNEVEN.gather, UNEVEN.scatter, GRADIENT)),
        (UNEVEN._replace(wire=GRADIENT), Splits(UNEVEN.gather, UNEVEN.scatter)),
    ],
)
def test_a_gradient_goes_back_as_it_is_rounded(splits, reverse):
    assert splits.reverse() == reverse


def test_the_usual_exchanges_are_each_others_reverse():
    """By identity: `is_even` knows them so."""
    assert HEADS_TO_SEQUENCE.reverse() is SEQUENCE_TO_HEADS
    assert SEQUENCE_TO_HEADS.reverse() is HEADS_TO_SEQUENCE
    assert HEADS_TO_SEQUENCE.is_even
    assert SEQUENCE_TO_HEADS.is_even


@pytest.mark.parametrize(
    ("scatter", "gather", "even"),
    [
        (Split(2), Split(1), True),
        (Split(2, (1, 2)), Split(1), False),
        (Split(2), Split(1, (1, 2)), False),
        (Split(2, None, 2), Split(1), False),
        (Split(2), Split(1, None, 2), False),
    ],
)
def test_an_exchange_is_even_where_every_part_is(scatter, gather, even):
    assert Splits((Split(2), scatter), (Split(1), gather)).is_even is even


def test_an_exact_exchange_rounds_nothing():
    assert ROUNDED.exact() == UNEVEN
    assert UNEVEN.exact() is UNEVEN


def test_an_exchange_of_some_tensors_is_theirs():
    assert ROUNDED.of([1]) == Splits(
        UNEVEN.scatter[1:], UNEVEN.gather[1:], WIRE._replace(dtypes=(None,))
    )
    assert UNEVEN.of([1, 0]) == Splits(UNEVEN.scatter[::-1], UNEVEN.gather[::-1])


def test_tangents_travel_behind_the_tensors_and_are_not_rounded():
    assert UNEVEN.with_tangents() == Splits(UNEVEN.scatter * 2, UNEVEN.gather * 2)
    wire = WIRE._replace(dtypes=(torch.float8_e4m3fn, None, None, None))
    assert ROUNDED.with_tangents() == Splits(UNEVEN.scatter * 2, UNEVEN.gather * 2, wire)


@pytest.mark.parametrize(
    ("scatter", "gather", "world_size", "shapes"),
    [
        (Split(2), Split(1), 2, [[2, 10, 2, 8]] * 2),
        (Split(1), Split(2), 5, [[2, 1, 20, 8]] * 5),
        (Split(2, (1, 3)), Split(1, (5, 6)), 2, [[2, 11, 1, 8], [2, 11, 3, 8]]),
        (Split(2, None, 2), Split(1), 8, [[2, 40, 1, 8]] * 8),
    ],
)
def test_the_output_has_a_part_of_one_dim_and_the_whole_other(scatter, gather, world_size, shapes):
    got = [
        Splits.output_shape((2, 5, 4, 8), scatter, gather, rank, world_size)
        for rank in range(world_size)
    ]
    assert got == shapes
