"""How the Functions of the ops are run: recorded where somebody differentiates, else called.

And what the backward of each does before it sends: the ranks compare what they are about to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .collective.group import AnyGroup, Group
from .collective.layout import Split, Splits


def run(function: Any, group: AnyGroup, *arguments: Any) -> Any:
    """The output of a Function, which autograd records where somebody differentiates.

    Its bookkeeping is a third of a tiny call. And without a gradient to record, torch 2.13 cannot
    trace a Function of a variable number of tensors.
    """
    for argument in arguments:
        if isinstance(argument, Tensor) and is_observed(argument):
            # A compiled graph holds a process group.
            kind = function.eager if isinstance(group, Group) else function
            return kind.apply(group, *arguments)
    return function.forward(group, *arguments)


def is_observed(tensor: Tensor) -> bool:
    """Whether a transformation of torch has to see the Function of an op on `tensor`.

    Autograd does, and so do forward-mode derivatives and functorch.
    """
    return (
        (tensor.requires_grad and torch.is_grad_enabled())
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )


def op(function: Any) -> Any:
    """Gives a Function its form for eager code, `eager`: forward mode, and a refusal of vmap.

    A form of its own, because torch.compile traces no Function that has a `jvp` or a `vmap`.
    """
    methods = {"jvp": staticmethod(function.tangent), "vmap": staticmethod(_refuse_vmap)}
    function.eager = type(function)(function.__name__, (function,), methods)
    return function


def _refuse_vmap(*_: Any) -> Any:
    raise RuntimeError(
        "an op of a communicator must not be called under torch.vmap, which would exchange what "
        "the other ranks do not expect: give it a tensor with one dim more"
    )


def before_backward(
    group: AnyGroup,
    op: str,
    gradients: Tensor | Sequence[Tensor],
    arguments: Sequence[Any],
    **named: Any,
) -> None:
    """The ranks of a communicator compare what the backward of `op` is about to send."""
    if isinstance(group, Group):
        group.before_backward(op, gradients, arguments, **named)


def before_backward_of_part(group: AnyGroup, op: str, gradient: Tensor, split: Split) -> None:
    """`before_backward` where every rank brings the gradient of its part."""
    uneven_dim = None if split.sizes is None else split.dim
    before_backward(
        group, op, gradient, (split.dim,), uneven_dim=uneven_dim, scatter_sizes=split.sizes
    )


def before_backward_of_exchange(
    group: AnyGroup, gradients: Sequence[Tensor], splits: Splits, *, async_op: bool | None = None
) -> None:
    """`before_backward` for the way back of an exchange."""
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
