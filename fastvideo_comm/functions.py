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
from torch.autograd import forward_ad

from .collective.group import AnyGroup, Group
from .collective.layout import Split, Splits
from .collective.messages import Work
from .collective.route import route
from .kernels import contiguous_copy

_functorch_is_active = torch._C._are_functorch_transforms_active


def run(function: Any, group: AnyGroup, *arguments: Any) -> Any:
    """Calls a Function. Autograd records the call only if a derivative may be asked for.

    Recording takes a large part of the host time of a tiny call. And torch 2.13 cannot trace a
    Function of a variable number of tensors if there is no gradient to record.
    """
    is_eager = isinstance(group, Group)  # a compiled graph holds no `Group`
    is_recorded = is_eager and (forward_ad._current_level >= 0 or _functorch_is_active())
    if not is_recorded and torch.is_grad_enabled():
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.requires_grad:
                is_recorded = True
    if is_recorded:
        return (function.eager if is_eager else function).apply(group, *arguments)
    return function.forward(group, *arguments)


def op(function: Any) -> Any:
    """Gives a Function its form for eager code, `eager`: forward mode, and a refusal of vmap.

    Eager code needs a form of its own, because torch.compile traces no Function that has a `jvp` or
    a `vmap`.
    """
    methods = {"jvp": staticmethod(function.tangent), "vmap": staticmethod(_refuse_vmap)}
    function.eager = type(function)(function.__name__, (function,), methods)
    return function


def _refuse_vmap(*_: Any) -> Any:
    raise RuntimeError(
        "an op of a communicator must not be called under torch.vmap, which would exchange what "
        "the other ranks do not expect: give it a tensor with one dim more"
    )


@op
class AllToAll(torch.autograd.Function):
    """Trades the parts of one dim for the parts of another, of several tensors.

        (y_1, .., y_n) = exchange(x_1, .., x_n)        dx = reverse exchange(g_1, .., g_n)

    If a head goes to several ranks, its gradient is the sum of the gradients of those ranks.
    """

    @staticmethod
    def forward(group: AnyGroup, splits: Splits, *inputs: Tensor) -> tuple[Tensor, ...]:
        way, routed = route(group)
        return tuple(way.all_to_all(routed, inputs, splits))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.group, ctx.splits = inputs[:2]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        before_backward_of_exchange(ctx.group, grad_outputs, ctx.splits)
        return None, None, *run(AllToAll, ctx.group, ctx.splits.reverse(), *grad_outputs)

    @staticmethod
    def tangent(ctx: Any, _: None, __: None, *tangents: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = run(AllToAll, ctx.group, ctx.splits, *tangents)
        return outputs


@op
class StartAllToAll(torch.autograd.Function):
    """The first half of `AllToAll`: sends, and returns a token that `FinishAllToAll` takes.

    In the backward the order is reversed: the backward of `FinishAllToAll` starts the reverse
    exchange, and the backward of `StartAllToAll` waits for it. So communication overlaps with
    computation in the backward too, and in derivatives of every order.
    """

    @staticmethod
    def forward(group: Group, flight: Flight, *inputs: Tensor) -> Tensor:
        way, routed = route(group)
        flight.work = way.start_all_to_all(routed, inputs, flight.splits, async_op=True)
        return torch.empty(0, device=inputs[0].device)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group, ctx.flight = inputs[:2]

    @staticmethod
    def backward(ctx: Any, grad_token: Tensor) -> tuple[Tensor | None, ...]:
        returning = ctx.flight.returning
        return None, None, *run(FinishAllToAll, ctx.group, returning, grad_token)

    @staticmethod
    def tangent(ctx: Any, _: None, __: None, *tangents: Tensor) -> Tensor:
        ctx.flight.tangents = Flight(ctx.flight.splits)
        token: Tensor = run(StartAllToAll, ctx.group, ctx.flight.tangents, *tangents)
        return token


@op
class FinishAllToAll(torch.autograd.Function):
    """The second half of `AllToAll`: waits. Its backward starts to send the gradients."""

    @staticmethod
    def forward(group: Group, flight: Flight, token: Tensor) -> tuple[Tensor, ...]:
        return tuple(flight.land())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.group, ctx.flight = inputs[:2]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None, Tensor]:
        splits = ctx.flight.splits
        before_backward_of_exchange(ctx.group, grad_outputs, splits, async_op=True)
        ctx.flight.returning = Flight(splits.reverse())
        return None, None, run(StartAllToAll, ctx.group, ctx.flight.returning, *grad_outputs)

    @staticmethod
    def tangent(ctx: Any, _: None, __: None, tangent_token: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = run(
            FinishAllToAll, ctx.group, ctx.flight.tangents, tangent_token
        )
        return outputs


class Flight:
    """An exchange that is under way, and the exchanges of its gradients and tangents."""

    def __init__(self, splits: Splits) -> None:
        """Sends nothing yet."""
        self.splits = splits
        self.work: Work | None = None
        self.returning: Flight | None = None
        self.tangents: Flight | None = None

    def is_completed(self) -> bool:
        """Whether `land` would return at once."""
        return self.work is None or self.work.is_completed()

    def land(self) -> list[Tensor]:
        """Waits for the exchange that `StartAllToAll` started; returns its outputs."""
        if self.work is None:
            raise RuntimeError("an exchange must be started before it is finished, and only once")
        work, self.work = self.work, None
        return work.wait()


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

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None]:
        split = ctx.split
        before_backward(
            ctx.group, "all_gather", grad_output, (split.dim,), gather_sizes=split.sizes
        )
        return None, run(ReduceScatter, ctx.group, grad_output, split), None

    @staticmethod
    def tangent(ctx: Any, _: None, tangent: Tensor, __: None) -> Tensor:
        output: Tensor = run(AllGather, ctx.group, tangent, ctx.split)
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

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None]:
        before_backward_of_part(ctx.group, "reduce_scatter", grad_output, ctx.split)
        return None, run(AllGather, ctx.group, grad_output, ctx.split), None

    @staticmethod
    def tangent(ctx: Any, _: None, tangent: Tensor, __: None) -> Tensor:
        output: Tensor = run(ReduceScatter, ctx.group, tangent, ctx.split)
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

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None, None]:
        before_backward_of_part(ctx.group, "slice", grad_output, ctx.split)
        grad_input = run(Unslice, ctx.group, grad_output, ctx.split)
        if ctx.scale_grad:
            grad_input = grad_input / ctx.group.size()
        return None, grad_input, None, None

    @staticmethod
    def tangent(ctx: Any, _: None, tangent: Tensor, __: None, ___: None) -> Tensor:
        output: Tensor = run(Slice, ctx.group, tangent, ctx.split, ctx.scale_grad)
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
        return AllGather.forward(group, input_, split)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group, _, ctx.split = inputs

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None]:
        return None, run(Slice, ctx.group, grad_output, ctx.split, False), None

    @staticmethod
    def tangent(ctx: Any, _: None, tangent: Tensor, __: None) -> Tensor:
        output: Tensor = run(Unslice, ctx.group, tangent, ctx.split)
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
        output: Tensor = way.all_reduce(routed, input_, op)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group, input_, ctx.op, ctx.is_replicated = inputs
        saved = {"min": (input_, output), "max": (input_, output), "product": (input_,)}
        ctx.save_for_backward(*saved.get(ctx.op, ()))
        ctx.save_for_forward(*saved.get(ctx.op, ()))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None, None]:
        sends = not ctx.is_replicated or ctx.op in ("min", "max", "product")
        if sends:
            named = {"grad": "identity"} if ctx.is_replicated else {}
            before_backward(ctx.group, "all_reduce", grad_output, (ctx.op,), **named)
        if not ctx.is_replicated:
            op = "avg" if ctx.op == "avg" else "sum"
            grad_output = run(AllReduce, ctx.group, grad_output, op, False)
        elif ctx.op == "avg":
            grad_output = grad_output / ctx.group.size()
        return None, _times_local_derivative(ctx, grad_output), None, None

    @staticmethod
    def tangent(ctx: Any, _: None, tangent: Tensor, __: None, ___: None) -> Tensor:
        op = "avg" if ctx.op == "avg" else "sum"
        tangent = _times_local_derivative(ctx, tangent)
        output: Tensor = run(AllReduce, ctx.group, tangent, op, ctx.is_replicated)
        return output


def _times_local_derivative(ctx: Any, gradient: Tensor) -> Tensor:
    """The factor of `AllReduce`'s equations that differs between ranks."""
    if ctx.op in ("min", "max"):
        return gradient * _part_of_extreme(ctx.group, *ctx.saved_tensors)
    if ctx.op == "product":
        return gradient * _product_of_others(ctx.group, *ctx.saved_tensors)
    return gradient


def _part_of_extreme(group: AnyGroup, input_: Tensor, output: Tensor) -> Tensor:
    """1 / (number of ranks that hold the extreme) on those ranks, 0 on the others."""
    holds = (input_ == output) | (input_.isnan() & output.isnan())
    part = holds.detach().to(input_.dtype)
    count: Tensor = run(AllReduce, group, part, "sum", False)
    return part / count


def _product_of_others(group: AnyGroup, input_: Tensor) -> Tensor:
    """The product over the other ranks, without division, so that zeros are correct."""
    gathered = run(AllGather, group, input_[None], Split(0))
    rank = group.rank()
    return torch.cat((gathered[:rank], gathered[rank + 1 :])).prod(0)


def before_backward(
    group: AnyGroup,
    op: str,
    gradients: Tensor | Sequence[Tensor],
    arguments: Sequence[Any],
    **named: Any,
) -> None:
    """Lets the ranks of a communicator compare what the backward of `op` is about to send."""
    if isinstance(group, Group):
        group.before_backward(op, gradients, arguments, **named)


def before_backward_of_part(group: AnyGroup, op: str, gradient: Tensor, split: Split) -> None:
    """`before_backward` for ops whose output is a part for each rank."""
    uneven_dim = None if split.sizes is None else split.dim
    before_backward(
        group, op, gradient, (split.dim,), uneven_dim=uneven_dim, scatter_sizes=split.sizes
    )


def before_backward_of_exchange(
    group: AnyGroup, gradients: Sequence[Tensor], splits: Splits, *, async_op: bool | None = None
) -> None:
    """`before_backward` for the backward of an exchange."""
    sizes = [split.sizes for split in splits.scatter]
    uneven = any(each is not None for each in sizes)
    dims = (splits.scatter[0].dim, splits.gather[0].dim)
    before_backward(
        group,
        "all_to_all_4D",
        gradients,
        dims,
        uneven_dim=dims[0] if uneven else None,
        scatter_sizes=sizes if uneven else None,
        async_op=async_op,
    )
