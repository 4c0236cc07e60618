"""What a backward does before it sends: the ranks compare what they are about to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .collective.group import AnyGroup, Group
from .collective.layout import Split, Splits


def last_call(group: AnyGroup) -> int | None:
    """The number of the last call, which a backward names; None where calls have no number."""
    return group.last_call if isinstance(group, Group) else None


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
    )
