"""The differentiable ops with upstream's arguments, for code that calls `.apply` itself.

The loss is the sum over ranks of each rank's local loss; the equations are in `functions`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import functions
from .collective import validation
from .collective.group import AnyGroup
from .reduce_ops import ReduceOp


class DistributedAutograd:
    """The differentiable ops with upstream's arguments, for code that calls `.apply` itself.

    `DistributedAutograd.AllToAll4D.apply(group, x, world_size, 2, 1)` is what
    `DeviceCommunicatorBase.all_to_all_4D(x)` does, without the reused buffers. Each class checks
    its arguments. Then it does what the Function in `functions` does that the communicator's op
    calls too.
    """

    class AllReduce(torch.autograd.Function):
        """`input_ [*]` on every rank -> `[*]`, the same on every rank."""

        @staticmethod
        def forward(
            ctx: Any, group: AnyGroup, input_: Tensor, op: ReduceOp | None = None
        ) -> Tensor:
            name = validation.all_reduce(input_, op)
            return _recorded(ctx, functions.AllReduce, group, input_, name, False)

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None]:
            return functions.AllReduce.backward(ctx, grad_output)[:3]

    class AllGather(torch.autograd.Function):
        """`input_ [A, c, ..]` on every rank -> `[A, P*c, ..]`, the same on every rank."""

        @staticmethod
        def forward(ctx: Any, group: AnyGroup, input_: Tensor, world_size: int, dim: int) -> Tensor:
            validation.check_world_size(group, world_size)
            return _recorded(
                ctx, functions.AllGather, group, input_, validation.all_gather(input_, dim)
            )

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None, None]:
            return *functions.AllGather.backward(ctx, grad_output), None

    class ReduceScatter(torch.autograd.Function):
        """`input_ [A, P*c, ..]` on every rank -> `[A, c, ..]`: the adjoint of AllGather."""

        @staticmethod
        def forward(ctx: Any, group: AnyGroup, input_: Tensor, world_size: int, dim: int) -> Tensor:
            validation.check_world_size(group, world_size)
            split = validation.parts(input_, world_size, dim)
            return _recorded(ctx, functions.ReduceScatter, group, input_, split)

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None, None]:
            return *functions.ReduceScatter.backward(ctx, grad_output), None

    class Slice(torch.autograd.Function):
        """`input_ [A, P*c, ..]`, the same on every rank -> `[A, c, ..]`, this rank's part."""

        @staticmethod
        def forward(
            ctx: Any,
            group: AnyGroup,
            input_: Tensor,
            world_size: int,
            dim: int,
            scale_grad: bool,
        ) -> Tensor:
            validation.check_world_size(group, world_size)
            split = validation.slice_(input_, world_size, dim)
            return _recorded(ctx, functions.Slice, group, input_, split, scale_grad)

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None, None, None]:
            return *functions.Slice.backward(ctx, grad_output), None

    class AllToAll4D(torch.autograd.Function):
        """Trades the parts of one dim for the parts of another; h = H/P, S = P*s.

            (2, 1): [B, s, H, D] -> [B, S, h, D]        (1, 2): [B, S, h, D] -> [B, s, H, D]

        The exchange permutes the elements of all ranks, so the gradient is the inverse exchange:

            y = all_to_all_4D(x, scatter_dim, gather_dim)
            dx = all_to_all_4D(g, gather_dim, scatter_dim)
        """

        @staticmethod
        def forward(
            ctx: Any,
            group: AnyGroup,
            input_: Tensor,
            world_size: int,
            scatter_dim: int,
            gather_dim: int,
        ) -> Tensor:
            validation.check_world_size(group, world_size)
            validation.check_tensor("input_", input_)
            splits = validation.all_to_all_4D(input_, world_size, scatter_dim, gather_dim)
            return _recorded(ctx, functions.AllToAll, group, splits, input_)

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
            return None, functions.AllToAll.backward(ctx, grad_output)[2], None, None, None


def _recorded(ctx: Any, function: Any, *arguments: Any) -> Tensor:
    """Returns the first output of a Function; keeps in `ctx` what its backward needs."""
    output = function.forward(*arguments)
    function.setup_context(ctx, arguments, output)
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first
