"""torch.func.linearize: a graph of the tangents alone, exchanges included."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_table import OF_SHAPE
from ranks import Ranks
from test_attention_tangents import attention
from test_forward_mode import OF_KIND, of_rank
from torch import Tensor
from torch.func import grad, jvp
from torch.utils._python_dispatch import TorchDispatchMode

from fastvideo_comm import DeviceCommunicatorBase, ulysses_attention


def linearize(function: Callable[..., Any], *primals: Tensor) -> tuple[Any, Callable[..., Any]]:
    """`torch.func.linearize`, without a warning of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Attempted to insert a get_attr Node")
        both: tuple[Any, Callable[..., Any]] = torch.func.linearize(function, *primals)
        return both


def linearized(communicator: DeviceCommunicatorBase, kind: str) -> None:
    value, *tangents = of_rank(communicator, 3)
    # A helper of the tests, which make_fx cannot see.
    ops = [op for op in OF_KIND[kind] if op != "broadcast's gradient"]

    def apply(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(OF_SHAPE[op](communicator, x.sin()) for op in ops)

    gradient = grad(lambda x: sum(y.double().square().sum() for y in apply(x)))
    for function in (apply, gradient):
        expected = [jvp(function, (value,), (tangent,)) for tangent in tangents]
        output, derivative = linearize(function, value)
        for tangent, pair in zip(tangents, expected, strict=True):
            # In fp64; the graph adds gradients in another order.
            torch.testing.assert_close((output, derivative(tangent)), pair, rtol=1e-12, atol=1e-12)


# By memory only the exchange is recorded as something else.
@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("exchanges", "messages"),
        ("splits", "memory"),
        ("gathers", "messages"),
        ("reductions", "messages"),
    ],
)
def test_linearize_gives_the_jvp_of_every_tangent(ranks: Ranks, kind, way):
    ranks.run(2, linearized, kind, ways=(way,))


def linearized_attention(communicator: DeviceCommunicatorBase, pipeline: int) -> None:
    query, key, value, tangent = (x[:, :4] for x in of_rank(communicator, 4))

    def attended(x: Tensor) -> Tensor:
        return ulysses_attention(communicator, x, key, value, attention, pipeline=pipeline)

    derivative = linearize(attended, query)[1]
    for along in (tangent, tangent.sin()):
        expected = jvp(attended, (query,), (along,))[1]
        torch.testing.assert_close(derivative(along), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pipeline", [1, 2])
def test_linearize_goes_through_attention(ranks: Ranks, pipeline):
    ranks.run(2, linearized_attention, pipeline)


class Sent(TorchDispatchMode):
    """How many elements each exchange of a graph sends."""

    counts: tuple[int, ...] = ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            self.counts += (args[0].numel(),)
        return func(*args, **(kwargs or {}))


def sent_alone(communicator: DeviceCommunicatorBase) -> None:
    query, key, tangent = of_rank(communicator, 3)

    def apply(x: Tensor) -> tuple[Tensor, ...]:
        return communicator.all_to_all_4D((x.sin(), key, key.half()))

    derivative = linearize(apply, query)[1]
    with Sent() as sent:
        moved, *zeros = derivative(tangent)
    assert sent.counts == (query.numel(),)
    assert torch.equal(moved, communicator.all_to_all_4D(tangent * query.cos()))
    assert all(each.count_nonzero() == 0 for each in zeros)


def test_what_linearize_returns_exchanges_the_tangents_alone(ranks: Ranks):
    ranks.run(2, sent_alone, ways=("messages",))
