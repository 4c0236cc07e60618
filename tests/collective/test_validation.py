"""The checks of arguments, without a group: what they let through, and what they return."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from test_validation_errors import (
    E4M3,
    E5M2,
    FP8,
    X,
    check_int,
    group_of,
    heads,
    on_device,
    rank,
    scatter,
    sizes_of_each,
    wire,
)

from fastvideo_comm.collective import validation
from fastvideo_comm.collective.layout import HEADS_TO_SEQUENCE, SEQUENCE_TO_HEADS, Split
from fastvideo_comm.collective.wire import WireFormat


class Three(int):
    """An int that is not exactly `int`, such as an enum's member."""


@pytest.mark.parametrize(
    ("check", "arguments"),
    [
        (validation.check_tensor, ("k", X)),
        (validation.check_device, ("k", X, torch.device("cpu"))),
        (validation.check_device, ("k", on_device("cuda:1"), torch.device("cuda"))),
        (validation.check_device, ("k", on_device("cuda:1"), torch.device("cuda:1"))),
        (validation.check_world_size, (group_of(3), 3)),
        (check_int, (Three(3),)),
        (validation.check_divisible, (X, "dim", 2, 4)),
        (rank, (0,)),
        (rank, (3, True)),
        (rank, (1,)),
        (validation.check_reduced, (X.cdouble(),)),
        (functools.partial(validation.choice, "k"), ("a", ("a", "b"))),
    ],
)
def test_what_is_right_is_let_through(check, arguments):
    check(*arguments)


@pytest.mark.parametrize(
    ("check", "arguments", "result"),
    [
        (validation.normal_dim, (X, -4), 0),
        (validation.normal_dim, (X, 3), 3),
        (validation.normal_dim, (X, 0), 0),
        (validation.all_to_all_4D_dims, (X, 2, 1), (2, 1)),
        (validation.all_to_all_4D_dims, (X, -3, -2), (1, 2)),
        (validation.all_to_all_4D_dims, (X, Three(2), 1), (2, 1)),
        (validation.tensors, (X,), (X,)),
        (validation.tensors, ([X, X],), (X, X)),
        (
            scatter,
            (heads(12, 4, 4), 2, "auto", 3),
            (Split(2, (6, 3, 3)), *[Split(2, (2, 1, 1))] * 2),
        ),
        # "auto" for some of the tensors: their heads alone are grouped.
        (
            scatter,
            (heads(5, 6, 3), 2, [[3, 2], "auto", "auto"], 2),
            (Split(2, (3, 2)), Split(2, (4, 2)), Split(2, (2, 1))),
        ),
        (scatter, (heads(4, 2), 1, "auto", 3), (Split(1, (1, 1, 0)),) * 2),
        # A key head for several ranks, in a sequence of tensors.
        (scatter, (heads(4, 2), 2, None, 4), (Split(2), Split(2, None, 2))),
        (scatter, (heads(4, 1), 2, None, 4), (Split(2), Split(2, None, 4))),
        (scatter, (heads(4, 4), 2, None, 4), (Split(2), Split(2))),
        (scatter, (heads(4, 0), 2, None, 4), (Split(2), Split(2))),
        (scatter, (heads(4), 2, [2, 2], 2), (Split(2),)),
        (validation.gather_splits, ((X, X), 1, (None, [3, 1]), 0, 2), (Split(1), Split(1, (3, 1)))),
        (sizes_of_each, (None, 2), [None, None]),
        (sizes_of_each, ("auto", 2), ["auto", "auto"]),
        (sizes_of_each, ([1, 2], 3), [[1, 2]] * 3),
        (sizes_of_each, ([None, [1, 2]], 2), [None, [1, 2]]),
        (sizes_of_each, (([1], "auto"), 2), [[1], "auto"]),
        (wire, ((X,),), None),
        (functools.partial(wire, wire_dtype=[None, E4M3]), ((X, FP8),), WireFormat((None, E4M3))),
        (functools.partial(wire, wire_dtype=E5M2), ((FP8.half(),),), WireFormat((E5M2,))),
        (
            functools.partial(wire, grad_wire_dtype=(E5M2, None), rounding="stochastic"),
            ((FP8.bfloat16(), X),),
            WireFormat((None, None), gradient=WireFormat((E5M2, None), "stochastic", None)),
        ),
        (validation.uneven_split, ("k", 1, [0, 2], 2), Split(1, (0, 2))),
        (validation.uneven_split, ("k", 1, [2, 2], 2), Split(1)),
        (validation.uneven_split, ("k", 1, [3], 1), Split(1)),
        (validation.all_gather, (X, -2), Split(2)),
        (validation.all_gather_sizes, (X, -2, None, 0, 2), Split(2)),
        (validation.all_gather_sizes, (X, -2, [1, 4], 1, 2), Split(2, (1, 4))),
        (validation.parts, (X, 5, -1), Split(3)),
        (validation.slice_, (X, 2, 0), Split(0)),
        (validation.slice_sizes, (X, 2, "auto", 3), Split(2, (2, 1, 1))),
        (validation.slice_sizes, (X, -1, [[4, 1]], 2), Split(3, (4, 1))),
        (validation.reduce_scatter, (X, 1, [1, 2], 2), Split(1, (1, 2))),
        (validation.reduce_scatter, (X, 0, None, 2), Split(0)),
        (validation.all_reduce, (X, None), "sum"),
        (validation.all_reduce, (X, dist.ReduceOp.AVG), "avg"),
        (validation.all_reduce, (X.cfloat(), dist.ReduceOp.AVG), "avg"),
        (validation.all_reduce, (X.cfloat(), dist.ReduceOp.SUM), "sum"),
        (validation.all_reduce, (X, dist.ReduceOp.MAX), "max"),
        (validation.all_reduce, (X.int(), dist.ReduceOp.BXOR), "bxor"),
        (validation.memory_bytes, (1 << 20,), 1 << 20),
        (validation.memory_bytes, ((1 << 20) + 4096,), (1 << 20) + 4096),
    ],
)
def test_arguments_are_returned_in_their_normal_form(check, arguments, result):
    assert check(*arguments) == result


@pytest.mark.parametrize(
    ("dims", "splits"), [((2, 1), HEADS_TO_SEQUENCE), ((-3, -2), SEQUENCE_TO_HEADS)]
)
def test_an_even_exchange_is_one_of_two_constants(dims, splits):
    """By identity: the usual call makes no splits of its own."""
    assert validation.all_to_all_4D(torch.zeros(1, 4, 4, 1), 4, *dims) is splits


def test_the_numbers_of_a_generator_round_the_gradient():
    generator = torch.Generator()
    result = wire((FP8,), grad_wire_dtype=E5M2, generator=generator)
    assert result is not None
    assert result.gradient is not None
    assert result.gradient.generator is generator


def test_a_number_of_replicas_is_an_int():
    """2.0 == 2, and is no size."""
    (_, split) = scatter(heads(4, 2), 2, None, 4)
    assert type(split.replicas) is int


def test_a_generator_is_refused_in_a_graph(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    message = "generator must be None where a call is compiled, got a generator"
    with pytest.raises(ValueError, match=f"^{message}$"):
        wire((FP8,), generator=torch.Generator())
