"""Forward-mode derivatives: eager and compiled, of every op, of derivatives and of attention."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from op_table import CALLS, OF_SHAPE, SHAPE
from ranks import RankError, Ranks
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

from fastvideo_comm import DeviceCommunicatorBase, ulysses_attention
from fastvideo_comm.collective import memory
from fastvideo_comm.collective.group import Group

# Any other op is linear, so it is its own derivative.
NONLINEAR = ("all_reduce product", "all_reduce max", "all_reduce min")
LINEAR = [name for name in OF_SHAPE if name not in NONLINEAR]
# gloo adds in an order that depends on where in the message an element stands.
ADDS = ("all_reduce", "reduce_scatter", "broadcast's", "all_to_all_4D grouped")
LEAVES_OUT_TANGENTS = torch.__version__ < (2, 15)


def of_rank(communicator: DeviceCommunicatorBase, number: int = 3) -> tuple[Tensor, ...]:
    """A value and tangents of this rank."""
    generator = torch.Generator().manual_seed(communicator.rank)
    return torch.rand(number, *SHAPE, dtype=torch.float64, generator=generator).unbind(0)


def by_dual_level(function: Callable[[Tensor], Tensor], value: Tensor, tangent: Tensor) -> Any:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(function(forward_ad.make_dual(value, tangent))))


def linear(communicator: DeviceCommunicatorBase, op: str) -> None:
    value, tangent, _ = of_rank(communicator)

    def apply(x: Tensor) -> Tensor:
        return CALLS[op].call(communicator, x)

    expected = (apply(value), apply(tangent))
    tolerance = 1e-15 if op.startswith(ADDS) else 0
    for given in (value, value.clone().requires_grad_()):
        for outputs in (
            torch.func.jvp(apply, (given,), (tangent,)),
            by_dual_level(apply, given, tangent),
        ):
            for output, each in zip(outputs, expected, strict=True):
                torch.testing.assert_close(output, each, rtol=tolerance, atol=0)


@pytest.mark.parametrize("op", LINEAR)
@pytest.mark.parametrize("size", [1, 2, (0, 2, 3)])
def test_the_tangent_of_a_linear_op_is_the_op_of_the_tangent(ranks: Ranks, size, op):
    ranks.run(size, linear, op)


def compiled(communicator: DeviceCommunicatorBase) -> None:
    value, tangent, _ = of_rank(communicator)

    def of_all(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(call(communicator, x.sin()) for call in OF_SHAPE.values())

    def by_jvp(x: Tensor, t: Tensor) -> Any:
        return torch.func.jvp(of_all, (x,), (t,))

    def by_level(x: Tensor, t: Tensor) -> Any:
        with forward_ad.dual_level():
            duals = of_all(forward_ad.make_dual(x, t))
            pairs = [tuple(forward_ad.unpack_dual(dual)) for dual in duals]
            return tuple(zip(*pairs, strict=True))

    def gradient(function: Callable[[Tensor, Tensor], Any]) -> Tensor:
        leaf = value.clone().requires_grad_()
        pairs = zip(*function(leaf, tangent), strict=True)
        return torch.autograd.grad(sum((y * ty).sum() for y, ty in pairs), leaf)[0]

    expected = by_jvp(value, tangent)
    for function in (by_jvp, by_level):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        traced = torch.compile(function, backend=counter, fullgraph=True)
        for _ in range(2):
            outputs = traced(value, tangent)
            for name, *pair in zip(OF_SHAPE, *expected, *outputs, strict=True):
                # The compiler reorders arithmetic in fp64.
                for one, other in zip(pair[:2], pair[2:], strict=True):
                    torch.testing.assert_close(
                        one,
                        other,
                        rtol=1e-12,
                        atol=1e-12,
                        msg=lambda text, op=name: f"{op}: {text}",
                    )
        assert counter.frame_count == 1
    torch.testing.assert_close(gradient(traced), gradient(by_jvp), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, (0, 2, 3)])
def test_compiled_tangents_and_their_gradients_are_those_of_eager(ranks: Ranks, size):
    ranks.run(size, compiled)


SENDS = ("all_to_all", "all_to_all_one", "all_gather", "reduce_scatter", "all_reduce")


@contextlib.contextmanager
def counted(communicator: DeviceCommunicatorBase) -> Iterator[list[str]]:
    """What this rank exchanges: calls of c10d by messages, calls of the protocol by memory."""
    seen: list[str] = []

    def counting(owner: Any, name: str) -> Any:
        method = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            seen.append(name)
            return method(*arguments, **named)

        return mock.patch.object(owner, name, call)

    with contextlib.ExitStack() as stack:
        for name in (*SENDS, "broadcast", "reduce"):
            stack.enter_context(counting(Group, name))
        stack.enter_context(counting(memory, "_start_call"))
        yield seen


def exchanges(communicator: DeviceCommunicatorBase, op: str) -> None:
    value, tangent, _ = of_rank(communicator)

    def apply(x: Tensor) -> Tensor:
        return CALLS[op].call(communicator, x)

    apply(value)  # the first call connects memory
    with counted(communicator) as alone:
        apply(value)
    with counted(communicator) as both:
        torch.func.jvp(apply, (value,), (tangent,))
        by_dual_level(apply, value, tangent)
    assert both == 2 * alone
    if "asynchronous" in op:  # the backward would send zeros for tangents that no loss uses
        return
    leaf = value.clone().requires_grad_()
    with counted(communicator) as recorded:
        output, _ = torch.func.jvp(apply, (leaf,), (tangent,))
    assert recorded == alone
    with counted(communicator) as backward:
        output.sum().backward()
    leaf.grad = None
    with counted(communicator) as backward_alone:
        apply(leaf).sum().backward()
    assert alone + backward == backward_alone  # nothing for the tangent, which is not used


@pytest.mark.parametrize("op", [name for name in LINEAR if name != "slice"])
def test_value_and_tangent_travel_in_one_exchange(ranks: Ranks, op):
    ranks.run(2, exchanges, op)


def compiled_exchanges(communicator: DeviceCommunicatorBase) -> None:
    torch._dynamo.reset()
    value, tangent, _ = of_rank(communicator)
    communicator.all_to_all_4D(value)  # connects memory
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def apply(x: Tensor) -> Tensor:
        return communicator.all_to_all_4D(communicator.all_gather(x.sin(), 1))

    def function(x: Tensor, t: Tensor) -> Any:
        return torch.func.jvp(apply, (x,), (t,))

    outputs = torch.compile(function, backend=backend, fullgraph=True)(value, tangent)
    torch.testing.assert_close(outputs, function(value, tangent), rtol=1e-12, atol=1e-12)
    assert len([each for each in seen if "all_to_all" in each]) == 1
    assert len([each for each in seen if "all_gather" in each]) == 1


def test_in_compiled_code_value_and_tangent_travel_in_one_exchange(ranks: Ranks):
    ranks.run(2, compiled_exchanges)


def written_in_place(communicator: DeviceCommunicatorBase, op: str) -> None:
    value, tangent, _ = of_rank(communicator)
    leaf = value.clone().requires_grad_()

    def apply(x: Tensor) -> Tensor:
        return CALLS[op].call(communicator, x).mul_(2)

    output, derivative = torch.func.jvp(apply, (leaf,), (tangent,))
    torch.testing.assert_close((output, derivative), (apply(value), apply(tangent)))
    (output * derivative).sum().backward()
    assert leaf.grad is not None


@pytest.mark.parametrize("op", ["all_to_all_4D heads", "all_gather middle"])
def test_a_dual_output_may_be_written_in_place_before_its_backward(ranks: Ranks, op):
    ranks.run(2, written_in_place, op)


def of_asked_sizes(communicator: DeviceCommunicatorBase) -> None:
    value, tangent, _ = of_rank(communicator)
    rows = 2 + communicator.rank

    def apply(x: Tensor) -> Tensor:
        return communicator.all_gather(x[:, :rows], 1, gather_sizes="auto")

    outputs = torch.func.jvp(apply, (value,), (tangent,))
    assert torch.equal(outputs[0], apply(value))
    assert torch.equal(outputs[1], apply(tangent))


def test_sizes_are_asked_for_under_forward_mode_too(ranks: Ranks):
    ranks.run(2, of_asked_sizes)


OF_DERIVATIVES = (
    "all_to_all_4D heads",
    "all_to_all_4D asynchronous",
    "all_to_all_4D uneven",
    "all_gather middle",
    "all_reduce avg",
    "all_reduce product",
    "reduce_scatter",
    "slice",
)


def of_derivatives(communicator: DeviceCommunicatorBase, op: str) -> None:
    value, along, other = of_rank(communicator)
    jvp = torch.func.jvp

    def apply(x: Tensor) -> Tensor:
        return CALLS[op].call(communicator, x.sin())

    weight = torch.rand_like(apply(value))

    def loss(x: Tensor) -> Tensor:
        return (weight * apply(x)).sum()

    def close(one: Any, another: Any) -> None:
        torch.testing.assert_close(one, another, rtol=1e-12, atol=1e-12)  # fp64, rounding

    # Reverse mode twice, which gradgradcheck has tested.
    leaf = value.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (twice,) = torch.autograd.grad((gradient * along).sum(), leaf)
    close(jvp(torch.func.grad(loss), (value,), (along,)), (gradient.detach(), twice))
    if op != "slice":  # its gradient is not its adjoint
        close(
            torch.func.grad(lambda x: (weight * jvp(apply, (x,), (along,))[1]).sum())(value), twice
        )
        for derivative in (
            jvp(apply, (leaf,), (along,))[1],
            torch.func.linearize(apply, leaf)[1](along),
        ):
            (by_backward,) = torch.autograd.grad((weight * derivative).sum(), leaf)
            close(by_backward, twice)
    # The second derivative as a difference of first ones; its error is step**2, and 1e-16 / step.
    step = 1e-5
    ahead, behind = (jvp(apply, (value + s * other,), (along,))[1] for s in (step, -step))
    nested = jvp(lambda x: jvp(apply, (x,), (along,))[1], (value,), (other,))
    torch.testing.assert_close(nested[1], (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)
    close(nested[0], jvp(apply, (value,), (along,))[1])


@pytest.mark.parametrize("op", OF_DERIVATIVES)
def test_derivatives_of_derivatives_are_those_of_reverse_mode(ranks: Ranks, op):
    ranks.run(2, of_derivatives, op)


def many_tangents(communicator: DeviceCommunicatorBase, op: str) -> None:
    value = torch.rand(1, 2, 2, 1, dtype=torch.float64)
    basis = torch.eye(value.numel(), dtype=torch.float64).view(-1, *value.shape)

    def apply(x: Tensor) -> Tensor:
        return CALLS[op].call(communicator, x.sin())

    columns = [torch.func.jvp(apply, (value,), (each,))[1] for each in basis]
    expected = torch.stack(columns, -1).unflatten(-1, value.shape)
    assert torch.equal(torch.func.jacfwd(apply)(value), expected)
    output, linear = torch.func.linearize(apply, value)
    torch.testing.assert_close(output, apply(value))
    for each, column in zip(basis, columns, strict=True):
        torch.testing.assert_close(linear(each), column)
    # What ran while a graph was recorded leaves nothing to the next call.
    assert torch.equal(apply(value), output)


@pytest.mark.parametrize(
    "op",
    ["all_to_all_4D heads", "all_gather middle", "all_reduce sum", "all_reduce max", "broadcast"],
)
def test_jacfwd_and_linearize_give_the_columns_of_jvp(ranks: Ranks, op):
    ranks.run(2, many_tangents, op)


def from_outside(communicator: DeviceCommunicatorBase) -> None:
    torch._dynamo.reset()
    value, tangent, _ = of_rank(communicator)

    def apply(x: Tensor) -> Tensor:
        return communicator.all_reduce(communicator.all_to_all_4D(x.sin()))

    expected = torch.func.jvp(apply, (value,), (tangent,))
    function = torch.compile(apply, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(function(value), expected[0], rtol=1e-12, atol=1e-12)
        outputs = torch.func.jvp(function, (value,), (tangent,))
        torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
        if LEAVES_OUT_TANGENTS:
            with pytest.raises(RuntimeError, match="all_to_all_4D must get a tensor with a tan"):
                by_dual_level(function, value, tangent)
        else:
            outputs = by_dual_level(function, value, tangent)
            torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)


def test_a_compiled_function_may_be_differentiated_from_outside(ranks: Ranks):
    ranks.run(2, from_outside)


def refused(communicator: DeviceCommunicatorBase) -> None:
    value, along, other = of_rank(communicator)
    jvp = torch.func.jvp

    def nested(x: Tensor) -> Any:
        return jvp(lambda y: jvp(communicator.all_to_all_4D, (y,), (along,)), (x,), (other,))

    def under_vmap(x: Tensor) -> Tensor:
        return torch.vmap(communicator.all_to_all_4D)(x[None])

    for function, error in (
        (nested, "all_to_all_4D must be differentiated by one transform"),
        (under_vmap, "all_to_all_4D must not be called under torch.vmap"),
    ):
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match=error):
            torch.compile(function, backend="aot_eager")(value)
        while forward_ad._current_level >= 0:  # torch 2.15 leaves a level behind
            forward_ad.exit_dual_level()


def test_what_compiled_code_cannot_differentiate_is_refused_by_name(ranks: Ranks):
    ranks.run(2, refused)


def attention_of(communicator: DeviceCommunicatorBase, pipeline: int, is_joint: bool) -> None:
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(communicator.rank)
    numbers = torch.rand(6, 1, 3, 4, 2, dtype=torch.float64, generator=generator).unbind(0)
    values, tangents = numbers[:3], numbers[3:]

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = torch.einsum("bshd,bthd->bhst", query, key).softmax(-1)
        return torch.einsum("bhst,bthd->bshd", weights, value)

    def layer(*video: Tensor) -> Any:
        return ulysses_attention(
            communicator, *video, attention, pipeline=pipeline, joint=video if is_joint else None
        )

    def derivative(values: Any, tangents: Any) -> Any:
        return torch.func.jvp(layer, values, tangents)[1]

    step = 1e-6
    ahead, behind = (
        layer(*(v + s * t for v, t in zip(values, tangents, strict=True))) for s in (step, -step)
    )
    difference = torch.utils._pytree.tree_map(lambda a, b: (a - b) / (2 * step), ahead, behind)
    # The difference's own error: step**2, and rounding of values up to 1 by 1e-16 / step.
    eager = derivative(values, tangents)
    torch.testing.assert_close(eager, difference, rtol=1e-7, atol=1e-8)
    traced = torch.compile(derivative, backend="aot_eager", fullgraph=True)(values, tangents)
    torch.testing.assert_close(traced, eager, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("pipeline", "is_joint"), [(1, False), (2, True)])
def test_attention_has_tangents(ranks: Ranks, pipeline, is_joint):
    ranks.run(2, attention_of, pipeline, is_joint)


def one_without(communicator: DeviceCommunicatorBase) -> None:
    value, tangent, _ = of_rank(communicator)
    communicator.all_to_all_4D(value)
    with forward_ad.dual_level():
        if communicator.rank == 0:
            value = forward_ad.make_dual(value, tangent)
        communicator.all_to_all_4D(value)


def test_a_rank_without_a_tangent_is_named(ranks: Ranks):
    with pytest.raises(RankError, match=r"(?s)MismatchError.*tangents_of"):
        ranks.run(2, one_without, ways=["memory"])
