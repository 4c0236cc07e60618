"""How the Functions of the ops are run: recorded where somebody differentiates, else called.

And what the backward of each does before it sends: the ranks compare what they are about to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .collective.group import AnyGroup, Group, RecordedGroup
from .collective.layout import Split, Splits
from .collective.quantised import Work
from .forward_mode import (
    Arrived,
    check_transforms,
    refuse_vmap,
    requires_grad,
    run_on_duals,
    run_on_eager_duals,
)
from .make_fx import recorded

_functorch_is_active = torch._C._are_functorch_transforms_active


def run(function: Any, group: AnyGroup | RecordedGroup, *arguments: Any) -> Any:
    """The output of a Function, which autograd records where somebody differentiates.

    Its bookkeeping is a third of a tiny call. And without a gradient to record, torch 2.13 cannot
    trace a Function of a variable number of tensors.
    """
    is_forward = forward_ad._current_level >= 0
    if isinstance(group, Group):  # eager code
        if is_forward:
            is_forward = torch._C._is_fwd_grad_enabled()
            if is_forward and not isinstance(arguments[0], AsyncExchange):
                outputs = run_on_eager_duals(function, group, arguments)
                if outputs is not NotImplemented:
                    return outputs
        if is_forward or _functorch_is_active() or requires_grad(arguments):
            return function.eager.apply(group, *arguments)
        return function.forward(group, *arguments)
    if isinstance(group, RecordedGroup):
        form = function.eager.recorded
        is_watched = is_forward or _functorch_is_active() or requires_grad(arguments)
        return (form.apply if is_watched else form.forward)(group, *arguments)
    if _functorch_is_active():
        check_transforms(arguments, is_forward=is_forward)
    if is_forward:
        return run_on_duals(function, group, arguments)
    return (function.apply if requires_grad(arguments) else function.forward)(group, *arguments)


def along(function: Any, group: AnyGroup | RecordedGroup, *arguments: Any) -> Any:
    """As `run`, for tangents; many of them, as `torch.func.jacfwd` gives them, travel together.

    In compiled code there is one transform of forward mode, whose tangents have no tangents.
    """
    if isinstance(group, Group | RecordedGroup):
        return run(function.along, group, *arguments)
    return (function.apply if requires_grad(arguments) else function.forward)(group, *arguments)


def op(function: Any) -> Any:
    """Gives a Function its forms for eager code, which have forward mode, and say what vmap does.

    `eager` refuses vmap. `along` takes tangents, of which vmap may give many. Both are forms of
    their own, because torch.compile traces no Function that has a `jvp` or a `vmap`. `arrived`
    records an exchange that has taken place, and has the gradient that the exchange has. Each of
    the first two has a form `recorded` for make_fx.
    """

    def of_many(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return _of_many(function, info.batch_size, in_dims, arguments)

    def tangent(*arguments: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):  # for the level around this one
            return function.tangent(*arguments)

    def form(vmap: Any) -> Any:
        methods = {"jvp": staticmethod(tangent), "vmap": staticmethod(vmap)}
        return type(function)(function.__name__, (function,), methods)

    function.eager = form(refuse_vmap)
    function.along = form(of_many)
    function.along.eager = function.along
    function.arrived = _arrived(function)
    for each in (function.eager, function.along):
        each.recorded = recorded(each)
    return function


def _arrived(function: Any) -> Any:
    """The form of `AllToAll` that takes an `Arrived` in the place of its splits."""

    def forward(_: AnyGroup, exchange: Arrived, *__: Tensor) -> tuple[Tensor, ...]:
        outputs = tuple(exchange.outputs)
        exchange.outputs.clear()  # else the output would hold itself
        return outputs

    def setup_context(ctx: Any, inputs: tuple[Any, ...], _: tuple[Tensor, ...]) -> None:
        ctx.group, ctx.exchange = inputs[:2]

    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        splits, _, of, call = ctx.exchange
        before_backward_of_exchange(ctx.group, gradients, splits, of_call=call, of=of)
        return None, None, *run(function, ctx.group, splits.reverse(), *gradients)

    methods = {each.__name__: staticmethod(each) for each in (forward, setup_context, backward)}
    return type(function)(function.__name__, (function,), methods)


def _of_many(
    function: Any, number: int, in_dims: Sequence[int | None], arguments: Sequence[Any]
) -> tuple[Any, Any]:
    """Runs a Function once for `number` tangents, which stand in a dim of their own.

    An exchange takes them as one larger batch. The other ops take tensors of any number of dims.
    """
    is_exchange = isinstance(arguments[1], Splits | AsyncExchange)
    together: list[Any] = []
    for argument, dim in zip(arguments, in_dims, strict=True):
        if isinstance(argument, Tensor):
            many = (
                argument.expand(number, *argument.shape)
                if dim is None
                else argument.movedim(dim, 0)
            )
            together.append(many.flatten(0, 1) if is_exchange else many)
        else:
            together.append(argument.moved(1) if isinstance(argument, Split) else argument)
    outputs = along(function, *together)
    if is_exchange and not isinstance(outputs, Tensor):
        return tuple(_apart(output, number) for output in outputs), (0,) * len(outputs)
    return (_apart(outputs, number) if is_exchange else outputs), 0


def _apart(batch: Tensor, number: int) -> Tensor:
    """The inverse of `flatten(0, 1)`."""
    return batch.view(number, batch.shape[0] // number, *batch.shape[1:])


def before_backward(
    group: AnyGroup,
    op: str,
    gradients: Tensor | Sequence[Tensor],
    arguments: Sequence[Any],
    *,
    of_call: int | None,
    **named: Any,
) -> None:
    """The ranks of a communicator compare what the backward of `op` is about to send."""
    if isinstance(group, Group):
        group.before_backward(op, gradients, arguments, of_call=of_call, **named)


def before_backward_of_part(
    group: AnyGroup, op: str, gradient: Tensor, split: Split, of_call: int | None
) -> None:
    """`before_backward` where every rank brings the gradient of its part."""
    uneven_dim = None if split.sizes is None else split.dim
    before_backward(
        *(group, op, gradient, (split.dim,)),
        of_call=of_call,
        uneven_dim=uneven_dim,
        scatter_sizes=split.sizes,
    )


def before_backward_of_exchange(
    group: AnyGroup,
    gradients: Sequence[Tensor],
    splits: Splits,
    *,
    of_call: int | None,
    async_op: bool | None = None,
    of: str | None = None,
) -> None:
    """`before_backward` for the way back of an exchange."""
    sizes = [split.sizes for split in splits.scatter]
    uneven = any(each is not None for each in sizes)
    dims = (splits.scatter[0].dim, splits.gather[0].dim)
    before_backward(
        *(group, "all_to_all_4D", gradients, dims),
        of_call=of_call,
        uneven_dim=dims[0] if uneven else None,
        scatter_sizes=sizes if uneven else None,
        async_op=async_op,
        of=of,
        wire_dtype=splits.wire.gradient.dtypes if splits.wire and splits.wire.gradient else None,
    )


class AsyncExchange:
    """An exchange between its start and its finish, and those of its gradients and tangents."""

    def __init__(self, splits: Splits) -> None:
        """Not sent yet."""
        self.splits = splits
        self.call: int | None = None
        self.work: Work | None = None
        self.returning: AsyncExchange | None = None
        self._tangents: dict[int | None, AsyncExchange] = {}

    def tangents(self) -> AsyncExchange:
        """The exchange of the tangents at the current level of `torch.func`; levels nest."""
        level = torch._C._functorch.maybe_current_level()
        return self._tangents.setdefault(level, AsyncExchange(self.splits.exact()))

    def is_completed(self) -> bool:
        """Whether `land` would return at once."""
        return self.work is None or self.work.is_completed()

    def land(self) -> list[Tensor]:
        """Waits for what `StartAllToAll` sent."""
        if self.work is None:
            raise RuntimeError("an exchange must be started before it is finished, and only once")
        work, self.work = self.work, None
        return work.wait()
