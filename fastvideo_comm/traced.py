"""The collectives as torch.compile sees them: functional, nothing written in place.

The copies are views and `contiguous()`, which the compiler fuses with what stands before and
behind; the exchanges are torch's functional operators, named by their group. A batch is exchanged
in one call, since here the copy behind it costs nothing of its own.

The compiler may move an exchange, and ranks whose graphs differ may move it differently: compile
the same code with the same shapes on every rank of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .channel import Channel, Group
from .layout import concatenate_messages, message_view


def all_to_all_4D(group: Group, input_: Tensor, scatter_dim: int, gather_dim: int) -> Tensor:
    """As `collectives.all_to_all_4D`."""
    sent = message_view(input_, scatter_dim, group.size(), 0).contiguous()
    splits = [1] * group.size()
    received = _wait(
        torch.ops._c10d_functional.all_to_all_single(sent, splits, splits, _name(group))
    )
    return concatenate_messages(received, gather_dim).contiguous()


def all_gather(group: Group, input_: Tensor, dim: int) -> Tensor:
    """As `collectives.all_gather`."""
    received = _wait(
        torch.ops._c10d_functional.all_gather_into_tensor(
            input_.contiguous()[None], group.size(), _name(group)
        )
    )
    return concatenate_messages(received, dim).contiguous()


def reduce_scatter(group: Group, input_: Tensor, dim: int) -> Tensor:
    """As `collectives.reduce_scatter`: always along dim 0, the one that every backend has."""
    sent = message_view(input_, dim, group.size(), 0).contiguous()
    return _wait(
        torch.ops._c10d_functional.reduce_scatter_tensor(sent, "sum", group.size(), _name(group))
    )[0]


def all_reduce(group: Group, input_: Tensor, op: str) -> Tensor:
    """As `collectives.all_reduce`; gloo has no average, so it is a sum and a division."""
    reduced = _wait(
        torch.ops._c10d_functional.all_reduce(
            input_.contiguous(), "sum" if op == "avg" else op, _name(group)
        )
    )
    return reduced / group.size() if op == "avg" else reduced


def _wait(tensor: Tensor) -> Tensor:
    result: Tensor = torch.ops._c10d_functional.wait_tensor(tensor)
    return result


def _name(group: Group) -> str:
    group_of = group.group if isinstance(group, Channel) else group
    name: str = group_of.group_name
    return name
