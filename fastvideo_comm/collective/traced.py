"""The collectives as torch.compile sees them: functional, nothing written in place.

The copies are views and `contiguous()`, which the compiler fuses with what stands before and
behind; the exchanges are torch's functional operators, named by their group. A batch is exchanged
in one call, since here the copy behind it costs nothing of its own.

The compiler may move an exchange, and ranks whose graphs differ may move it differently: compile
the same code with the same shapes on every rank of a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .group import Channel, Group
from .layout import Share, concatenate_messages, message_view

if TYPE_CHECKING:
    from .exchange import Exchange


def exchange(group: Group, inputs: Sequence[Tensor], what: Exchange) -> list[Tensor]:
    """As `exchange.exchange`: one exchange for all tensors of a dtype."""
    outputs: dict[int, Tensor] = {}
    for dtype in dict.fromkeys([input_.dtype for input_ in inputs]):
        indices = [index for index, input_ in enumerate(inputs) if input_.dtype == dtype]
        scatter = [what.scatter[index] for index in indices]
        gather = [what.gather[index] for index in indices]
        some = _exchange(group, [inputs[index] for index in indices], scatter, gather)
        outputs.update(zip(indices, some, strict=True))
    return [outputs[index] for index in range(len(inputs))]


def _exchange(
    group: Group, inputs: list[Tensor], scatter: list[Share], gather: list[Share]
) -> list[Tensor]:
    size, rank = group.size(), group.rank()
    parts = [_parts(*each, size) for each in zip(inputs, scatter, strict=True)]
    # [rank][tensor]: what goes to each rank, and the shapes of what comes from each.
    sent = list(zip(*parts, strict=True))
    shapes = [
        [_shape_from(other, *each) for each in zip(sent[rank], gather, strict=True)]
        for other in range(size)
    ]
    counts = [[math.prod(shape) for shape in each] for each in shapes]
    received = _wait(
        torch.ops._c10d_functional.all_to_all_single(
            torch.cat([part.reshape(-1) for message in sent for part in message]),
            [sum(each) for each in counts],
            [sum([part.numel() for part in message]) for message in sent],
            _name(group),
        )
    )
    flat = iter(received.split([count for each in counts for count in each]))
    messages = [[next(flat).view(shape) for shape in each] for each in shapes]
    return [
        _together([message[index] for message in messages], share)
        for index, share in enumerate(gather)
    ]


def _parts(tensor: Tensor, share: Share, size: int) -> list[Tensor]:
    """The message to each rank."""
    if share.holders > 1:
        return [tensor.narrow(share.dim, rank // share.holders, 1) for rank in range(size)]
    sizes = share.sizes or [tensor.shape[share.dim] // size] * size
    return list(tensor.split(list(sizes), share.dim))


def _shape_from(rank: int, own: Tensor, share: Share) -> list[int]:
    """The shape of a rank's message to this one, given this rank's to itself."""
    return list(own.shape) if share.sizes is None else _with_size(own, share.dim, share.sizes[rank])


def _together(messages: list[Tensor], share: Share) -> Tensor:
    """The message from each rank in its place; those for one head are added."""
    if share.holders > 1:
        heads = range(0, len(messages), share.holders)
        messages = [torch.stack(messages[i : i + share.holders]).sum(0) for i in heads]
    return torch.cat(messages, share.dim)


def all_gather(group: Group, input_: Tensor, share: Share) -> Tensor:
    """As `collectives.all_gather`."""
    if share.sizes is not None:
        return _all_gather_padded(group, input_, share.dim, share.sizes)
    received = _wait(
        torch.ops._c10d_functional.all_gather_into_tensor(
            input_.contiguous()[None], group.size(), _name(group)
        )
    )
    output = concatenate_messages(received, share.dim)
    # Not `contiguous()` alone, which may be `output` itself: torch 2.11 makes every intermediate of
    # an autograd Function an output, and of one tensor under two names one loses its gradient.
    return output if output.is_contiguous() else output.contiguous()


def _all_gather_padded(group: Group, input_: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    shapes = [_with_size(input_, dim, size) for size in sizes]
    slot = max(math.prod(shape) for shape in shapes)
    received = _wait(
        torch.ops._c10d_functional.all_gather_into_tensor(
            _padded(input_, slot)[None], group.size(), _name(group)
        )
    )
    messages = zip(received.unbind(0), shapes, strict=True)
    parts = [message[: math.prod(shape)].view(shape) for message, shape in messages]
    return torch.cat(parts, dim)


def reduce_scatter(group: Group, input_: Tensor, share: Share) -> Tensor:
    """As `collectives.reduce_scatter`: always along dim 0, the one that every backend has."""
    if share.sizes is not None:
        return _reduce_scatter_padded(group, input_, share.dim, share.sizes)
    sent = message_view(input_, share.dim, group.size(), 0).contiguous()
    return _wait(
        torch.ops._c10d_functional.reduce_scatter_tensor(sent, "sum", group.size(), _name(group))
    )[0]


def _reduce_scatter_padded(group: Group, input_: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    parts = input_.split(list(sizes), dim)
    own = parts[group.rank()]
    slot = max(part.numel() for part in parts)
    sent = torch.cat([_padded(part, slot) for part in parts])
    received = _wait(
        torch.ops._c10d_functional.reduce_scatter_tensor(sent, "sum", group.size(), _name(group))
    )
    return received[: own.numel()].view(own.shape)


def _padded(part: Tensor, slot: int) -> Tensor:
    """The elements in a row, and zeros up to `slot`."""
    flat = part.reshape(-1)
    return torch.cat((flat, flat.new_zeros(slot - flat.numel())))


def _with_size(tensor: Tensor, dim: int, size: int) -> list[int]:
    shape = list(tensor.shape)
    shape[dim] = size
    return shape


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
