"""Forward mode beyond one eager `jvp` of an op: jacfwd, second derivatives, compiled code."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from op_table import OF_SHAPE, SHAPE
from ranks import Ranks
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jvp

from fastvideo_comm import DeviceCommunicatorBase, functions
from fastvideo_comm.errors import MismatchError


def of_rank(communicator: DeviceCommunicatorBase, number: int) -> tuple[Tensor, ...]:
    """So many tensors of this rank, which differ from those of the other ranks."""
    generator = torch.Generator().manual_seed(communicator.rank)
    return torch.rand(number, *SHAPE, dtype=torch.float64, generator=generator).unbind(0)


def columns(communicator: DeviceCommunicatorBase, op: str) -> None:
    value, *directions = of_rank(communicator, 4)

    def apply(weights: Tensor) -> Tensor:
        moved = sum((w * each for w, each in zip(weights, directions, strict=True)), value)
        return OF_SHAPE[op](communicator, moved.sin())

    weights = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    jacobian = jacfwd(apply)(weights)
    for column, along in zip(jacobian.unbind(-1), torch.eye(3, dtype=torch.float64), strict=True):
        # In fp64; sums of many tangents are added in another order than those of one.
        expected = jvp(apply, (weights,), (along,))[1]
        torch.testing.assert_close(column, expected, rtol=1e-13, atol=1e-13)


# What differs with the number of ranks is the same for the ops of a kind.
@pytest.mark.parametrize(
    ("size", "op"),
    [
        *[((0, 2, 3), op) for op in OF_SHAPE],
        *[(size, op) for size in (1, 2) for op in ("all_to_all_4D grouped", "all_reduce product")],
    ],
)
def test_jacfwd_gives_the_columns_of_jvp(ranks: Ranks, size, op):
    ranks.run(size, columns, op)


def exchanges_of(call: Callable[[], Any]) -> list[list[torch.Size]]:
    """What each exchange of a call takes."""
    taken: list[list[torch.Size]] = []

    def counted(function: Any) -> Any:
        forward = function.forward

        def counting(group: Any, exchange: Any, *inputs: Tensor) -> Any:
            taken.append([each.shape for each in inputs])
            return forward(group, exchange, *inputs)

        return mock.patch.object(function, "forward", staticmethod(counting))

    with counted(functions.AllToAll), counted(functions.StartAllToAll):
        call()
    return taken


def exchanged(communicator: DeviceCommunicatorBase) -> None:
    (value,) = of_rank(communicator, 1)
    taken = exchanges_of(
        lambda: jacfwd(lambda scale: communicator.all_to_all_4D(value * scale.sum()))(torch.ones(5))
    )
    assert taken == [[SHAPE], [(5 * SHAPE[0], *SHAPE[1:])]]


def test_all_tangents_of_jacfwd_travel_in_one_exchange(ranks: Ranks):
    ranks.run(2, exchanged)


def along_many(communicator: DeviceCommunicatorBase, op: str) -> None:
    value, *tangents = of_rank(communicator, 4)

    def derivative(tangent: Tensor) -> Tensor:
        return jvp(lambda x: OF_SHAPE[op](communicator, x), (value,), (tangent,))[1]

    expected = [derivative(tangent) for tangent in tangents]
    for dim in range(5):
        many = torch.stack(tangents, dim)
        together = torch.vmap(derivative, in_dims=dim)(many)
        assert all(map(torch.equal, together, expected))


@pytest.mark.parametrize("op", ["all_to_all_4D heads", "all_gather middle", "slice"])
def test_many_tangents_may_stand_in_any_dim(ranks: Ranks, op):
    ranks.run(2, along_many, op)


def of_complex_tensors(communicator: DeviceCommunicatorBase) -> None:
    value, tangent = (torch.complex(*of_rank(communicator, 2)).mul(i) for i in (1, 2j))
    for op in ("all_to_all_4D heads", "all_gather middle", "all_reduce sum", "slice"):

        def function(x: Tensor, op: str = op) -> Tensor:
            return OF_SHAPE[op](communicator, x)

        # Each of them is linear.
        given = jvp(function, (value,), (tangent,))
        assert all(map(torch.equal, given, (function(value), function(tangent))))


def test_complex_tensors_have_tangents(ranks: Ranks):
    ranks.run(2, of_complex_tensors)


def beside_integers(communicator: DeviceCommunicatorBase, async_op: bool) -> None:
    value, tangent = of_rank(communicator, 2)
    tokens = torch.arange(value.numel()).view(SHAPE) + 1000 * communicator.rank

    def function(x: Tensor) -> Any:
        exchange = communicator.all_to_all_4D([x, tokens], async_op=async_op)
        return exchange.wait() if async_op else exchange

    moved, along, moved_tokens = jvp(function, (value,), (tangent,), has_aux=True)
    expected = function(value)
    assert torch.equal(moved, expected[0])
    assert torch.equal(along, function(tangent)[0])
    assert torch.equal(moved_tokens, expected[1])


@pytest.mark.parametrize("async_op", [False, True])
def test_integers_travel_beside_a_tensor_with_a_tangent(ranks: Ranks, async_op):
    ranks.run(2, beside_integers, async_op)


def batched(communicator: DeviceCommunicatorBase) -> None:
    value, tangent = of_rank(communicator, 2)

    def derivative(x: Tensor) -> Tensor:
        return jvp(communicator.all_to_all_4D, (x,), (tangent,))[1]

    with pytest.raises(RuntimeError, match="must not be called under torch"):
        torch.vmap(derivative)(value[None])


def test_vmap_over_the_values_of_a_jvp_is_refused(ranks: Ranks):
    ranks.run(2, batched)


NESTED = (
    "all_to_all_4D heads",
    "all_to_all_4D asynchronous",
    "all_gather middle",
    "all_reduce product",
    "all_reduce max",
)


def nested(communicator: DeviceCommunicatorBase, op: str) -> None:
    value, along, other = of_rank(communicator, 3)

    def derivative(x: Tensor) -> Tensor:
        return jvp(lambda x: OF_SHAPE[op](communicator, x.sin()), (x,), (along,))[1]

    # The second derivative as a difference of first ones; its error is step**2, and 1e-16 / step.
    step = 1e-5
    difference = (derivative(value + step * other) - derivative(value - step * other)) / (2 * step)
    first, second = jvp(derivative, (value,), (other,))
    torch.testing.assert_close(first, derivative(value), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(second, difference, rtol=1e-6, atol=1e-8)
    by_jacfwd = jacfwd(lambda step: derivative(value + step * other))(torch.zeros(()).double())
    torch.testing.assert_close(by_jacfwd, second, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("op", NESTED)
def test_the_jvp_of_a_jvp_is_the_second_derivative(ranks: Ranks, op):
    ranks.run(2, nested, op)


Derivative = Callable[[Tensor, Tensor], tuple[tuple[Tensor, ...], ...]]
# Strides make no other graph.
STRIDED = ("all_to_all_4D strided", "all_to_all_4D batch of one", "all_to_all_4D back, one")
OF_KIND = {
    "exchanges": [op for op in OF_SHAPE if op.startswith("all_to_all") and op not in STRIDED],
    "gathers": [op for op in OF_SHAPE if op.startswith(("all_gather", "slice", "broadcast"))],
    "reductions": [op for op in OF_SHAPE if "reduce" in op],
    "splits": [f"all_to_all_4D {name}" for name in ("packed", "grouped", "asynchronous", "uneven")],
    "some": ["all_to_all_4D grouped", "all_gather uneven", "all_reduce product", "slice"],
    # All their code is compiled by a C++ compiler, seconds for each loop.
    "two": ["all_to_all_4D heads", "all_reduce identity"],
}


def by_transform(communicator: DeviceCommunicatorBase, ops: list[str]) -> Derivative:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(OF_SHAPE[op](communicator, x.sin()) for op in ops)

    return lambda x, tangent: jvp(function, (x,), (tangent,))


def by_level(communicator: DeviceCommunicatorBase, ops: list[str]) -> Derivative:
    def function(x: Tensor, tangent: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, tangent).sin()
            duals = [forward_ad.unpack_dual(OF_SHAPE[op](communicator, dual)) for op in ops]
            return tuple(zip(*duals, strict=True))

    return function


def compiled(
    communicator: DeviceCommunicatorBase, kind: str, by: str, backend: str = "aot_eager"
) -> None:
    value, tangent = of_rank(communicator, 2)
    ops = OF_KIND[kind]
    expected = by_transform(communicator, ops)(value, tangent)
    leaf = value.clone().requires_grad_()
    torch._dynamo.reset()
    function = (by_transform if by == "transform" else by_level)(communicator, ops)
    counter = CompileCounterWithBackend(backend)
    traced = torch.compile(function, backend=counter, fullgraph=True)
    for _ in range(2):
        outputs = traced(value if by == "transform" else leaf, tangent)
    assert counter.frame_count == 1
    for op, *both in zip(ops, *expected, *outputs, strict=True):
        # The compiler reorders arithmetic in fp64.
        torch.testing.assert_close(
            both[2:], both[:2], rtol=1e-12, atol=1e-12, msg=lambda text, op=op: f"{op}: {text}"
        )
    if by == "transform":  # which has no gradient in compiled code
        return
    one_loss, other_loss = (
        sum((y * along).sum() for y, along in zip(*each(leaf, tangent), strict=True))
        for each in (function, traced)
    )
    gradients = [torch.autograd.grad(loss, leaf)[0] for loss in (one_loss, other_loss)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


# By memory the exchange alone is compiled to another operator. Values and tangents without a
# gradient travel in one exchange; the other ops are the same in both.
@pytest.mark.parametrize(
    ("size", "kind", "by", "way"),
    [
        (2, "exchanges", "level", "messages"),
        (2, "splits", "transform", "messages"),
        (2, "splits", "transform", "memory"),
        (2, "gathers", "level", "messages"),
        (2, "reductions", "level", "messages"),
        (1, "some", "level", "messages"),
        (1, "some", "transform", "messages"),
        ((0, 2, 3), "some", "level", "memory"),
        (2, "some", "transform", "messages"),
    ],
)
def test_compiled_tangents_and_their_gradients_are_those_of_eager(
    ranks: Ranks, size, kind, by, way
):
    ranks.run(size, compiled, kind, by, ways=(way,))


def test_tangents_compiled_to_code_are_those_of_eager(ranks: Ranks):
    ranks.run(2, compiled, "two", "level", "inductor", ways=("messages",))


def refused(communicator: DeviceCommunicatorBase) -> None:
    value, along, other = of_rank(communicator, 3)
    leaf = value.clone().requires_grad_()

    def op(x: Tensor) -> Tensor:
        return communicator.all_to_all_4D(x.sin())

    def derivative(x: Tensor) -> Tensor:
        return jvp(op, (x,), (along,))[1]

    cases: list[tuple[Callable[[Tensor], Any], Tensor, str]] = [
        (lambda x: jvp(derivative, (x,), (other,)), value, "differentiated by one transform"),
        (grad(lambda x: derivative(x).sum()), value, "differentiated by one transform"),
        (lambda x: torch.vmap(op)(x[None]), value, "must not be called under torch.vmap"),
        (jacfwd(lambda t: op(value + t)), torch.zeros(()).double(), "must not be called under"),
        (derivative, leaf, "must not be recorded by autograd inside torch.func.jvp"),
    ]
    for function, x, error in cases:
        torch._dynamo.reset()
        with pytest.raises(Exception, match=error):
            torch.compile(function, backend="aot_eager", fullgraph=True)(x)
        while forward_ad._current_level >= 0:  # torch leaves its levels behind
            forward_ad.exit_dual_level()


def test_what_compiled_code_cannot_differentiate_is_refused(ranks: Ranks):
    ranks.run(2, refused, ways=("messages",))


def together(communicator: DeviceCommunicatorBase) -> None:
    q, k, v, along = of_rank(communicator, 4)

    def op(*x: Tensor) -> tuple[Tensor, ...]:
        return communicator.all_to_all_4D(x)

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, along)
        assert exchanges_of(lambda: op(dual, k, v)) == [[SHAPE] * 6]
    leaf = q.clone().requires_grad_()
    for first in (q, leaf):
        assert exchanges_of(partial(jvp, op, (first,), (along,))) == [[SHAPE] * 2]
    # A loss of the values alone sends no gradients of the tangents.
    (value,), (tangent,) = jvp(op, (leaf,), (along.clone().requires_grad_(),))
    losses = value.square().sum(), (value * tangent).sum()
    for loss, count in zip(losses, (1, 2), strict=True):
        assert exchanges_of(partial(loss.backward, retain_graph=True)) == [[value.shape]] * count


def test_values_and_tangents_travel_in_one_exchange(ranks: Ranks):
    ranks.run(2, together)


def started_together(communicator: DeviceCommunicatorBase) -> None:
    q, k, along, other = of_rank(communicator, 4)

    def op(x: Tensor) -> Tensor:
        first = communicator.all_to_all_4D(x, async_op=True)
        second = communicator.all_to_all_4D((k, x.sin()), async_op=True)
        return first.wait() * second.wait()[1]

    def blocking(x: Tensor) -> Tensor:
        return communicator.all_to_all_4D(x) * communicator.all_to_all_4D(x.sin())

    assert exchanges_of(partial(jvp, op, (q,), (along,))) == [[SHAPE] * 2, [SHAPE] * 4]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, along)
        assert exchanges_of(lambda: op(dual)) == [[SHAPE] * 2, [SHAPE] * 4]
    gradients = []
    for function in (op, blocking):
        leaf, tangent = q.clone().requires_grad_(), along.clone().requires_grad_()
        values, derivatives = jvp(function, (leaf,), (tangent,))
        loss = (values * other.mean() + derivatives.square()).sum()
        gradients.append([values, derivatives, *torch.autograd.grad(loss, (leaf, tangent))])
    for each, expected in zip(*gradients, strict=True):
        # In fp64; gradients are added in another order.
        torch.testing.assert_close(each, expected, rtol=1e-12, atol=1e-12)


def test_started_values_and_tangents_travel_in_one_exchange(ranks: Ranks):
    ranks.run(2, started_together)


def alone_with_a_tangent(communicator: DeviceCommunicatorBase, memory: str) -> None:
    x, along = of_rank(communicator, 2)
    own = DeviceCommunicatorBase(communicator.cpu_group, validate="always", memory=memory)
    with forward_ad.dual_level():
        given = forward_ad.make_dual(x, along) if communicator.rank else x
        with pytest.raises(MismatchError, match="tangents=True"):
            own.all_to_all_4D(given)
    assert own.all_reduce(torch.ones(1)).item() == 2, "still usable"
    own.destroy()


@pytest.mark.parametrize("memory", ["off", "on"])
def test_a_tangent_on_some_ranks_alone_is_named(ranks: Ranks, memory: str):
    ranks.run(2, alone_with_a_tangent, memory, ways=("messages",))
