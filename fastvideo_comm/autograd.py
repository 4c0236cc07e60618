"""The differentiable ops, as autograd Functions that save and delegate.

Convention: the loss is the sum over ranks of each rank's local loss, so the gradient of a tensor on
one rank is the derivative of that sum. Every backward is written in these same Functions, which
makes every derivative of every order right. `requires_grad` must be the same on all ranks: the
backward is a collective too.

`group` is a `torch.distributed.ProcessGroup`, or a `Channel`, which is one with reused buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .collective import messages as collectives
from .collective import validation
from .collective.exchange import (
    HEADS_TO_SEQUENCE,
    SEQUENCE_TO_HEADS,
    Exchange,
    Pending,
    exchange,
    exchange_one,
    start,
)
from .collective.group import Channel, Group
from .collective.layout import Share


class DistributedAutograd:
    """The differentiable ops, for code that calls `.apply` itself.

    `DistributedAutograd.AllToAll4D.apply(group, x, world_size, 2, 1)` is what
    `DeviceCommunicatorBase.all_to_all_4D` does once the arguments are resolved, less the reused
    buffers.
    """

    class AllReduce(torch.autograd.Function):
        """`input_ [*]` on every rank -> `[*]`, the same on every rank.

        With x_r the input and g_r the gradient on rank r, y the output, and G = sum_r g_r:

            SUM      y = sum_r x_r        dx_r = G
            AVG      y = sum_r x_r / P    dx_r = G / P
            MAX, MIN y = max_r x_r        dx_r = G * [x_r == y] / (number of ranks with x_q == y)
            PRODUCT  y = prod_r x_r       dx_r = G * prod_{q != r} x_q, without division
        """

        @staticmethod
        def forward(
            ctx: Any, group: Group, input_: Tensor, op: validation.ReduceOp | None = None
        ) -> Tensor:
            ctx.group = group
            ctx.op = validation.all_reduce(input_, op)
            output = collectives.all_reduce(group, input_, ctx.op)
            if ctx.op in ("min", "max"):
                ctx.save_for_backward(input_, output)
            elif ctx.op == "product":
                ctx.save_for_backward(input_)
            return output

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None]:
            _compare(ctx.group, "all_reduce", grad_output, (ctx.op,))
            op = dist.ReduceOp.AVG if ctx.op == "avg" else dist.ReduceOp.SUM
            total = DistributedAutograd.AllReduce.apply(ctx.group, grad_output, op)
            return None, _times_local_derivative(ctx, total), None

    class ReplicatedAllReduce(torch.autograd.Function):
        """AllReduce whose output is one tensor that all ranks hold, as is the loss computed of it.

        The gradient g is then the same on every rank and is counted once: G = g in the equations
        of `AllReduce`. Megatron's convention; nothing is sent in the backward.
        """

        @staticmethod
        def forward(
            ctx: Any, group: Group, input_: Tensor, op: validation.ReduceOp | None = None
        ) -> Tensor:
            return DistributedAutograd.AllReduce.forward(ctx, group, input_, op)

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None]:
            if ctx.op in ("min", "max", "product"):  # the others send nothing
                _compare(ctx.group, "all_reduce", grad_output, (ctx.op,), grad="identity")
            if ctx.op == "avg":
                grad_output = grad_output / ctx.group.size()
            return None, _times_local_derivative(ctx, grad_output), None

    class AllGather(torch.autograd.Function):
        """`input_ [A, c, ..]` on every rank -> `[A, P*c, ..]`, the same on every rank.

            y = concat_r x_r        dx_r = sum_q g_q[part r]        (reduce_scatter)

        `dim` may be negative, or is a `Share` whose sizes are those of the parts; `world_size` is
        the group's.
        """

        @staticmethod
        def forward(
            ctx: Any, group: Group, input_: Tensor, world_size: int, dim: int | Share
        ) -> Tensor:
            validation.check_world_size(group, world_size)
            ctx.group, ctx.world_size = group, world_size
            ctx.share = validation.all_gather(input_, dim)
            return collectives.all_gather(group, input_, ctx.share)

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None, None]:
            sizes = ctx.share.sizes
            _compare(ctx.group, "all_gather", grad_output, (ctx.share.dim,), gather_sizes=sizes)
            grad_input = DistributedAutograd.ReduceScatter.apply(
                ctx.group, grad_output, ctx.world_size, ctx.share
            )
            return None, grad_input, None, None

    class ReduceScatter(torch.autograd.Function):
        """`input_ [A, P*c, ..]` on every rank -> `[A, c, ..]`: the adjoint of AllGather.

        y_r = sum_q x_q[part r]        dx_r = concat_q g_q        (all_gather)
        """

        @staticmethod
        def forward(
            ctx: Any, group: Group, input_: Tensor, world_size: int, dim: int | Share
        ) -> Tensor:
            validation.check_world_size(group, world_size)
            ctx.group, ctx.world_size = group, world_size
            ctx.share = validation.parts(input_, world_size, dim)
            return collectives.reduce_scatter(group, input_, ctx.share)

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None, None]:
            _compare_part(ctx.group, "reduce_scatter", grad_output, ctx.share)
            grad_input = DistributedAutograd.AllGather.apply(
                ctx.group, grad_output, ctx.world_size, ctx.share
            )
            return None, grad_input, None, None

    class Slice(torch.autograd.Function):
        """`input_ [A, P*c, ..]`, the same on every rank -> `[A, c, ..]`, this rank's part.

            y_r = x[part r]        dx = concat_r g_r, divided by P if scale_grad        (all_gather)

        `input_` is one tensor that all ranks hold, and `dx` is its whole gradient on every rank.
        """

        @staticmethod
        def forward(
            ctx: Any,
            group: Group,
            input_: Tensor,
            world_size: int,
            dim: int | Share,
            scale_grad: bool,
        ) -> Tensor:
            validation.check_world_size(group, world_size)
            ctx.group, ctx.world_size, ctx.scale_grad = group, world_size, scale_grad
            ctx.share = validation.slice_(input_, world_size, dim)
            return collectives.slice_(group, input_, ctx.share)

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None, None, None]:
            _compare_part(ctx.group, "slice", grad_output, ctx.share)
            grad_input = DistributedAutograd.Unslice.apply(
                ctx.group, grad_output, ctx.world_size, ctx.share
            )
            if ctx.scale_grad:
                grad_input = grad_input / ctx.world_size
            return None, grad_input, None, None, None

    class Unslice(torch.autograd.Function):
        """`input_ [A, c, ..]` -> `[A, P*c, ..]`, the same on every rank: the adjoint of Slice.

            y = concat_r x_r        dx_r = g[part r]

        An all_gather whose result is one tensor that all ranks hold: its gradient is the same on
        every rank and is counted once.
        """

        @staticmethod
        def forward(
            ctx: Any, group: Group, input_: Tensor, world_size: int, dim: int | Share
        ) -> Tensor:
            ctx.group, ctx.world_size = group, world_size
            ctx.share = validation.all_gather(input_, dim)
            return collectives.all_gather(group, input_, ctx.share)

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None, None]:
            grad_input = DistributedAutograd.Slice.apply(
                ctx.group, grad_output, ctx.world_size, ctx.share, False
            )
            return None, grad_input, None, None

    class AllToAll4D(torch.autograd.Function):
        """Trades the parts of one dim for the parts of another; h = H/P, S = P*s.

            (2, 1): [B, s, H, D] -> [B, S, h, D]        (1, 2): [B, S, h, D] -> [B, s, H, D]

        A permutation of the elements of all ranks, so the gradient is the inverse exchange:

            y = all_to_all_4D(x, scatter_dim, gather_dim)
            dx = all_to_all_4D(g, gather_dim, scatter_dim)
        """

        @staticmethod
        def forward(
            ctx: Any,
            group: Group,
            input_: Tensor,
            world_size: int,
            scatter_dim: int,
            gather_dim: int,
        ) -> Tensor:
            validation.check_world_size(group, world_size)
            ctx.group, ctx.world_size = group, world_size
            ctx.dims = validation.all_to_all_4D(input_, world_size, scatter_dim, gather_dim)
            what = HEADS_TO_SEQUENCE if ctx.dims[0] == 2 else SEQUENCE_TO_HEADS
            return exchange_one(group, input_, what)

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None, None, None]:
            _compare(ctx.group, "all_to_all_4D", grad_output, ctx.dims)
            scatter_dim, gather_dim = ctx.dims
            grad_input = DistributedAutograd.AllToAll4D.apply(
                ctx.group, grad_output, ctx.world_size, gather_dim, scatter_dim
            )
            return None, grad_input, None, None, None

    class Exchange4D(torch.autograd.Function):
        """`AllToAll4D` of several tensors, with shares of any size: one exchange for all.

            (y_1, .., y_n) = exchange(x_1, .., x_n)        dx = reverse exchange(g_1, .., g_n)

        A head that is replicated to several ranks gets the sum of their gradients.
        """

        @staticmethod
        def forward(ctx: Any, group: Group, what: Exchange, *inputs: Tensor) -> tuple[Tensor, ...]:
            ctx.group, ctx.what = group, what
            return tuple(exchange(group, inputs, what))

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
            _compare_exchange(ctx.group, grad_outputs, ctx.what)
            grads = exchange_tensors(ctx.group, ctx.what.reverse(), grad_outputs)
            return None, None, *grads

    class Start4D(torch.autograd.Function):
        """The first half of `Exchange4D`: sends, and returns a token that `Finish4D` takes.

        The gradient of the token is the token of the reverse exchange, which `Finish4D`'s backward
        has sent by then: communication overlaps with computation in the backward as well, and to
        any order.
        """

        @staticmethod
        def forward(ctx: Any, group: Group, flight: Flight, *inputs: Tensor) -> Tensor:
            ctx.group, ctx.flight = group, flight
            flight.pending = start(group, inputs, flight.what, async_op=True)
            return torch.empty(0, device=inputs[0].device)

        @staticmethod
        def backward(ctx: Any, grad_token: Tensor) -> tuple[Tensor | None, ...]:
            returning = ctx.flight.returning
            grads = DistributedAutograd.Finish4D.apply(ctx.group, returning, grad_token)
            return None, None, *grads

    class Finish4D(torch.autograd.Function):
        """The second half of `Exchange4D`: waits; its backward sends the gradients on their way."""

        @staticmethod
        def forward(ctx: Any, group: Group, flight: Flight, _: Tensor) -> tuple[Tensor, ...]:
            ctx.group, ctx.flight = group, flight
            return tuple(flight.land())

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None, Tensor]:
            _compare_exchange(ctx.group, grad_outputs, ctx.flight.what, async_op=True)
            returning = Flight(ctx.flight.what.reverse())
            ctx.flight.returning = returning
            token = DistributedAutograd.Start4D.apply(ctx.group, returning, *grad_outputs)
            return None, None, token


def exchange_tensors(group: Group, what: Exchange, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """`DistributedAutograd.Exchange4D`, also where torch.compile cannot trace its `apply`.

    Without a gradient to record, torch 2.13's tracer counts the arguments of `forward` to find out
    whether it takes a `ctx`, and a variable number of tensors misleads it.
    """
    if torch.compiler.is_compiling() and not (
        torch.is_grad_enabled() and any(input_.requires_grad for input_ in inputs)
    ):
        return exchange(group, inputs, what)
    outputs: tuple[Tensor, ...] = DistributedAutograd.Exchange4D.apply(group, what, *inputs)
    return outputs


class Flight:
    """An exchange between its start and its finish, and the one that brings its gradients back."""

    def __init__(self, what: Exchange) -> None:
        """Not sent yet."""
        self.what = what
        self.pending: Pending | None = None
        self.returning: Flight | None = None

    def is_completed(self) -> bool:
        """Whether `land` would return at once."""
        return self.pending is None or self.pending.is_completed()

    def land(self) -> list[Tensor]:
        """Waits for what `Start4D` sent."""
        if self.pending is None:
            raise RuntimeError("an exchange must be started before it is finished, and only once")
        pending, self.pending = self.pending, None
        return pending.wait()


def _compare(
    group: Group,
    op: str,
    gradients: Tensor | Sequence[Tensor],
    arguments: Sequence[Any],
    uneven_dim: int | None = None,
    **named: Any,
) -> None:
    """The ranks of a communicator compare what the backward of `op` is about to send."""
    if isinstance(group, Channel) and group.diagnosis is not None:
        group.diagnosis.before_backward(op, gradients, arguments, uneven_dim=uneven_dim, **named)


def _compare_part(group: Group, op: str, gradient: Tensor, share: Share) -> None:
    """`_compare` where every rank brings the gradient of its part."""
    uneven_dim = None if share.sizes is None else share.dim
    _compare(group, op, gradient, (share.dim,), uneven_dim, scatter_sizes=share.sizes)


def _compare_exchange(
    group: Group, gradients: Sequence[Tensor], what: Exchange, *, async_op: bool | None = None
) -> None:
    """`_compare` for the way back of an exchange."""
    sizes = [share.sizes for share in what.scatter]
    uneven = any(each is not None for each in sizes)
    dims = (what.scatter[0].dim, what.gather[0].dim)
    _compare(
        group,
        "all_to_all_4D",
        gradients,
        dims,
        dims[0] if uneven else None,
        scatter_sizes=sizes if uneven else None,
        async_op=async_op,
    )


def _times_local_derivative(ctx: Any, gradient: Tensor) -> Tensor:
    """The factor of `AllReduce`'s equations that differs between ranks."""
    if ctx.op in ("min", "max"):
        return gradient * _share_of_extreme(ctx.group, *ctx.saved_tensors)
    if ctx.op == "product":
        return gradient * _product_of_others(ctx.group, *ctx.saved_tensors)
    return gradient


def _share_of_extreme(group: Group, input_: Tensor, output: Tensor) -> Tensor:
    """1 / (number of ranks that hold the extreme) on those ranks, 0 on the others."""
    holds = (input_ == output) | (input_.isnan() & output.isnan())
    share = holds.detach().to(input_.dtype)
    return share / collectives.all_reduce(group, share, "sum")


def _product_of_others(group: Group, input_: Tensor) -> Tensor:
    """The product over the other ranks: multiplied out, so that zeros are exact."""
    gathered = DistributedAutograd.AllGather.apply(group, input_[None], group.size(), 0)
    rank = group.rank()
    return torch.cat((gathered[:rank], gathered[rank + 1 :])).prod(0)
