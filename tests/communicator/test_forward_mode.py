"""Forward-mode derivatives: of every op, eager and compiled, against the same op of the tangent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from op_table import CALLS, OF_SHAPE, SHAPE
from ranks import Ranks
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

from fastvideo_comm import DeviceCommunicatorBase, ulysses_attention

# An op that is linear is its own derivative.
NONLINEAR = ("all_reduce product", "all_reduce max", "all_reduce min")
LINEAR = [name for name in OF_SHAPE if name not in NONLINEAR]


def of_rank(communicator: DeviceCommunicatorBase) -> tuple[Tensor, Tensor]:
    """A value and a tangent of this rank."""
    generator = torch.Generator().manual_seed(communicator.rank)
    value, tangent = torch.rand(2, *SHAPE, dtype=torch.float64, generator=generator).unbind(0)
    return value, tangent


def by_dual_level(
    function: Callable[[Tensor], Tensor], value: Tensor, tangent: Tensor
) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level():
        primal, derivative = forward_ad.unpack_dual(function(forward_ad.make_dual(value, tangent)))
        return primal, derivative


def linear(communicator: DeviceCommunicatorBase, op: str) -> None:
    value, tangent = of_rank(communicator)

    def apply(x: Tensor) -> Tensor:
        return CALLS[op].call(communicator, x)

    expected, along = apply(value), apply(tangent)
    for output, derivative in (
        torch.func.jvp(apply, (value,), (tangent,)),
        by_dual_level(apply, value, tangent),
    ):
        # gloo adds in an order that depends on where in the message an element stands.
        torch.testing.assert_close(output, expected, rtol=1e-15, atol=1e-15)
        torch.testing.assert_close(derivative, along, rtol=1e-15, atol=1e-15)
        if not op.startswith(("all_reduce", "reduce_scatter", "broadcast's")):
            assert torch.equal(output, expected)
            assert torch.equal(derivative, along)


@pytest.mark.parametrize("op", LINEAR)
@pytest.mark.parametrize("size", [1, 2, (0, 2, 3)])
def test_the_tangent_of_a_linear_op_is_the_op_of_the_tangent(ranks: Ranks, size, op):
    ranks.run(size, linear, op)


def compiled(communicator: DeviceCommunicatorBase, op: str) -> None:
    torch._dynamo.reset()
    value, tangent = of_rank(communicator)

    def apply(x: Tensor) -> Tensor:
        return CALLS[op].call(communicator, x.sin())

    def by_jvp(x: Tensor, t: Tensor) -> Any:
        return torch.func.jvp(apply, (x,), (t,))

    def by_level(x: Tensor, t: Tensor) -> Any:
        return by_dual_level(apply, x, t)

    expected = by_jvp(value, tangent)
    for function in (by_jvp, by_level):
        counter = CompileCounterWithBackend("aot_eager")
        traced = torch.compile(function, backend=counter, fullgraph=True)
        for _ in range(2):
            torch.testing.assert_close(traced(value, tangent), expected, rtol=1e-12, atol=1e-12)
        assert counter.frame_count == 1
    leaf = value.clone().requires_grad_()
    grads = [
        torch.autograd.grad((output * derivative).sum(), leaf)[0]
        for output, derivative in (by_jvp(leaf, tangent), traced(leaf, tangent))
    ]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", OF_SHAPE)
def test_compiled_tangents_and_their_gradients_are_those_of_eager(ranks: Ranks, op):
    ranks.run(2, compiled, op)
