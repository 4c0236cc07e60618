"""The differentiable ops, as autograd Functions that save and delegate.

Convention: the loss is the sum over ranks of each rank's local loss, so the gradient of a tensor on
one rank is the derivative of that sum. Every backward calls these same Functions, so derivatives of
every order are correct. `requires_grad` must be the same on all ranks, because the backward is a
collective too.

`group` is a `torch.distributed.ProcessGroup`, or a `Group`, which adds a name and reused buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .collective import quantised
from .collective.group import AnyGroup, Group
from .collective.layout import Split, Splits
from .collective.route import route
from .forward_mode import last_call, primals
from .kernels import contiguous_copy
from .recording import (
    AsyncExchange,
    along,
    before_backward,
    before_backward_of_exchange,
    before_backward_of_part,
    op,
    run,
)


@op
class AllToAll(torch.autograd.Function):
    """Trades the parts of one dim for the parts of another, of several tensors.

        (y_1, .., y_n) = exchange(x_1, .., x_n)        dx = reverse exchange(g_1, .., g_n)

    If a head goes to several ranks, its gradient is the sum of the gradients of those ranks. If
    tensors are rounded while they travel, the rounding is not differentiated, tangents travel as
    they are, and so does everything in derivatives of second and higher order.
    """

    @staticmethod
    def forward(group: AnyGroup, splits: Splits, *inputs: Tensor) -> tuple[Tensor, ...]:
        way, routed = route(group)
        if splits.wire is None:
            return tuple(way.all_to_all(routed, inputs, splits))
        return tuple(quantised.all_to_all(way, routed, inputs, splits, splits.wire))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.group, ctx.splits = inputs[:2]
        ctx.call = last_call(ctx.group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        before_backward_of_exchange(ctx.group, grad_outputs, ctx.splits, of_call=ctx.call)
        return None, None, *run(AllToAll, ctx.group, ctx.splits.reverse(), *grad_outputs)

    @staticmethod
    def tangent(ctx: Any, _: None, __: None, *tangents: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = along(AllToAll, ctx.group, ctx.splits.exact(), *tangents)
        return outputs


@op
class StartAllToAll(torch.autograd.Function):
    """The first half of `AllToAll`: sends, and returns a token that `FinishAllToAll` takes.

    In the backward the order is reversed: the backward of `FinishAllToAll` starts the reverse
    exchange, and the backward of `StartAllToAll` waits for it. So communication overlaps with
    computation in the backward too, and in derivatives of every order.
    """

    @staticmethod
    def forward(group: Group, exchange: AsyncExchange, *inputs: Tensor) -> Tensor:
        way, routed = route(group)
        exchange.work = quantised.start_all_to_all(way, routed, inputs, exchange.splits)
        exchange.call = last_call(group)
        return torch.empty(0, device=inputs[0].device)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group, ctx.exchange = inputs[:2]

    @staticmethod
    def backward(ctx: Any, grad_token: Tensor) -> tuple[Tensor | None, ...]:
        returning = ctx.exchange.returning
        return None, None, *run(FinishAllToAll, ctx.group, returning, grad_token)

    @staticmethod
    def tangent(ctx: Any, _: None, __: None, *tangents: Tensor) -> Tensor:
        token: Tensor = along(StartAllToAll, ctx.group, ctx.exchange.tangents(), *tangents)
        return token


@op
class FinishAllToAll(torch.autograd.Function):
    """The second half of `AllToAll`: waits. Its backward starts to send the gradients."""

    @staticmethod
    def forward(group: Group, exchange: AsyncExchange, token: Tensor) -> tuple[Tensor, ...]:
        return tuple(exchange.land())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.group, ctx.exchange = inputs[:2]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None, Tensor]:
        splits = ctx.exchange.splits
        before_backward_of_exchange(
            ctx.group, grad_outputs, splits, of_call=ctx.exchange.call, async_op=True
        )
        ctx.exchange.returning = AsyncExchange(splits.reverse())
        return None, None, run(StartAllToAll, ctx.group, ctx.exchange.returning, *grad_outputs)

    @staticmethod
    def tangent(ctx: Any, _: None, __: None, tangent_token: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = along(
            FinishAllToAll, ctx.group, ctx.exchange.tangents(), tangent_token
        )
        return outputs


@op
class AllGather(torch.autograd.Function):
    """Joins every rank's tensor.

    y = concat_r x_r        dx_r = sum_q g_q[part r]        (reduce_scatter)
    """

    @staticmethod
    def forward(group: AnyGroup, input_: Tensor, split: Split) -> Tensor:
        way, routed = route(group)
        output: Tensor = way.all_gather(routed, input_, split)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group, _, ctx.split = inputs
        ctx.call = last_call(ctx.group)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None]:
        split = ctx.split
        before_backward(
            *(ctx.group, "all_gather", grad_output, (split.dim,)),
            of_call=ctx.call,
            gather_sizes=split.sizes,
        )
        return None, run(ReduceScatter, ctx.group, grad_output, split), None

    @staticmethod
    def tangent(ctx: Any, _: None, tangent: Tensor, __: None) -> Tensor:
        output: Tensor = along(AllGather, ctx.group, tangent, ctx.split)
        return output


@op
class ReduceScatter(torch.autograd.Function):
    """The sum over ranks of this rank's part.

    y_r = sum_q x_q[part r]        dx_r = concat_q g_q        (all_gather)
    """

    @staticmethod
    def forward(group: AnyGroup, input_: Tensor, split: Split) -> Tensor:
        way, routed = route(group)
        output: Tensor = way.reduce_scatter(routed, input_, split)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group, _, ctx.split = inputs
        ctx.call = last_call(ctx.group)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None]:
        before_backward_of_part(ctx.group, "reduce_scatter", grad_output, ctx.split, ctx.call)
        return None, run(AllGather, ctx.group, grad_output, ctx.split), None

    @staticmethod
    def tangent(ctx: Any, _: None, tangent: Tensor, __: None) -> Tensor:
        output: Tensor = along(ReduceScatter, ctx.group, tangent, ctx.split)
        return output


@op
class Broadcast(torch.autograd.Function):
    """One rank's tensor, on every rank.

    y_r = x_src        dx_src = sum_q g_q, dx_r = 0 elsewhere        (reduce to src)
    """

    @staticmethod
    def forward(group: AnyGroup, input_: Tensor, src: int) -> Tensor:
        way, routed = route(group)
        output: Tensor = way.broadcast(routed, input_, src)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group, _, ctx.src = inputs
        ctx.call = last_call(ctx.group)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None]:
        before_backward(ctx.group, "broadcast", grad_output, (ctx.src,), of_call=ctx.call)
        return None, run(Reduce, ctx.group, grad_output, ctx.src), None

    @staticmethod
    def tangent(ctx: Any, _: None, tangent: Tensor, __: None) -> Tensor:
        output: Tensor = along(Broadcast, ctx.group, tangent, ctx.src)
        return output


@op
class Reduce(torch.autograd.Function):
    """The sum over ranks, on one rank.

    y_dst = sum_q x_q, y_r = 0 elsewhere        dx_r = g_dst        (broadcast from dst)
    """

    @staticmethod
    def forward(group: AnyGroup, input_: Tensor, dst: int) -> Tensor:
        way, routed = route(group)
        output: Tensor = way.reduce(routed, input_, dst)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group, _, ctx.dst = inputs
        ctx.call = last_call(ctx.group)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None]:
        before_backward(ctx.group, "reduce", grad_output, (ctx.dst,), of_call=ctx.call)
        return None, run(Broadcast, ctx.group, grad_output, ctx.dst), None

    @staticmethod
    def tangent(ctx: Any, _: None, tangent: Tensor, __: None) -> Tensor:
        output: Tensor = along(Reduce, ctx.group, tangent, ctx.dst)
        return output


@op
class Slice(torch.autograd.Function):
    """This rank's part of a tensor that all ranks hold.

        y_r = x[part r]        dx = concat_r g_r, divided by P if scale_grad        (all_gather)

    The input is one tensor that all ranks hold. Every rank gets its whole gradient `dx`.
    """

    @staticmethod
    def forward(group: AnyGroup, input_: Tensor, split: Split, scale_grad: bool) -> Tensor:
        return contiguous_copy(split.part_of(input_, group.rank(), group.size()))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group, _, ctx.split, ctx.scale_grad = inputs
        ctx.call = last_call(ctx.group)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None, None]:
        before_backward_of_part(ctx.group, "slice", grad_output, ctx.split, ctx.call)
        grad_input = run(Unslice, ctx.group, grad_output, ctx.split)
        if ctx.scale_grad:
            grad_input = grad_input / ctx.group.size()
        return None, grad_input, None, None

    @staticmethod
    def tangent(ctx: Any, _: None, tangent: Tensor, __: None, ___: None) -> Tensor:
        output: Tensor = along(Slice, ctx.group, tangent, ctx.split, ctx.scale_grad)
        return output


@op
class Unslice(torch.autograd.Function):
    """Joins the parts of one tensor; all ranks then hold the tensor.

        y = concat_r x_r        dx_r = g[part r]

    `Unslice` is the adjoint of `Slice`: an all_gather whose result is one tensor that all ranks
    hold. The gradient of the result is the same on every rank and is counted once.
    """

    @staticmethod
    def forward(group: AnyGroup, input_: Tensor, split: Split) -> Tensor:
        if isinstance(group, Group):
            return AllGather.forward(group, input_, split)
        return AllGather.forward(group, input_[None], split.moved(1)).squeeze(0)  # see `AllReduce`

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group, _, ctx.split = inputs

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None]:
        return None, run(Slice, ctx.group, grad_output, ctx.split, False), None

    @staticmethod
    def tangent(ctx: Any, _: None, tangent: Tensor, __: None) -> Tensor:
        output: Tensor = along(Unslice, ctx.group, tangent, ctx.split)
        return output


@op
class AllReduce(torch.autograd.Function):
    """The reduction over ranks, element by element.

    With x_r the input and g_r the gradient on rank r, y the output, and G = sum_r g_r:

        SUM      y = sum_r x_r        dx_r = G
        AVG      y = sum_r x_r / P    dx_r = G / P
        MAX, MIN y = max_r x_r        dx_r = G * [x_r == y] / (number of ranks with x_q == y)
        PRODUCT  y = prod_r x_r       dx_r = G * prod_{q != r} x_q, without division

    If `is_replicated`, all ranks compute the same loss from the output. Then g is the same on every
    rank and is counted once: G = g, as in Megatron.
    """

    @staticmethod
    def forward(group: AnyGroup, input_: Tensor, op: str, is_replicated: bool) -> Tensor:
        way, routed = route(group)
        output: Tensor
        if is_replicated and not isinstance(group, Group):
            # Where a compiled graph returns two equal collectives of one tensor, torch makes them
            # one output with one gradient. So this one is not equal to that of another gradient.
            output = way.all_reduce(routed, input_[None], op).squeeze(0)
        else:
            output = way.all_reduce(routed, input_, op)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group, input_, ctx.op, ctx.is_replicated = inputs
        ctx.call = last_call(ctx.group)
        saved = {"min": (input_, output), "max": (input_, output), "product": (input_,)}
        ctx.save_for_backward(*saved.get(ctx.op, ()))
        ctx.save_for_forward(*saved.get(ctx.op, ()))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None, None]:
        sends = not ctx.is_replicated or ctx.op in ("min", "max", "product")
        if sends:
            named = {"grad": "identity"} if ctx.is_replicated else {}
            before_backward(
                ctx.group, "all_reduce", grad_output, (ctx.op,), of_call=ctx.call, **named
            )
        if not ctx.is_replicated:
            op = "avg" if ctx.op == "avg" else "sum"
            grad_output = run(AllReduce, ctx.group, grad_output, op, False)
        elif ctx.op == "avg":
            grad_output = grad_output / ctx.group.size()
        grad_input = _times_local_derivative(ctx, grad_output, ctx.saved_tensors)
        return None, grad_input, None, None

    @staticmethod
    def tangent(ctx: Any, _: None, tangent: Tensor, __: None, ___: None) -> Tensor:
        op = "avg" if ctx.op == "avg" else "sum"
        tangent = _times_local_derivative(ctx, tangent, primals(ctx.saved_tensors))
        output: Tensor = along(AllReduce, ctx.group, tangent, op, ctx.is_replicated)
        return output


def _times_local_derivative(ctx: Any, gradient: Tensor, saved: Sequence[Tensor]) -> Tensor:
    """The factor of `AllReduce`'s equations that differs between ranks."""
    if ctx.op in ("min", "max"):
        return gradient * _part_of_extreme(ctx.group, *saved)
    if ctx.op == "product":
        return gradient * _product_of_others(ctx.group, *saved)
    return gradient


def _part_of_extreme(group: AnyGroup, input_: Tensor, output: Tensor) -> Tensor:
    """1 / (number of ranks that hold the extreme) on those ranks, 0 on the others."""
    holds = (input_ == output) | (input_.isnan() & output.isnan())
    part = holds.detach().to(input_.dtype)
    count: Tensor = along(AllReduce, group, part, "sum", False)
    return part / count


def _product_of_others(group: AnyGroup, input_: Tensor) -> Tensor:
    """The product over the other ranks, without division, so that zeros are correct."""
    gathered = along(AllGather, group, input_[None], Split(0))
    rank = group.rank()
    return torch.cat((gathered[:rank], gathered[rank + 1 :])).prod(0)
