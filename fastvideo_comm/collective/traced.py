"""The collectives as torch.compile sees them: functional, without writes in place.

The copies are views and `contiguous()`. The compiler fuses them with the code before and after. The
exchanges are torch's functional operators, which get their group by name. A batch is exchanged in
one call, because the compiler fuses the copy after it with other code.

The compiler may move an exchange. If the graphs of the ranks differ, the ranks may move it
differently. So compile the same code with the same shapes on every rank of a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .layout import Split, Splits, concatenate_messages, message_view
from .wire import moved, moved_back, moved_counts


def all_to_all(group: ProcessGroup, inputs: Sequence[Tensor], splits: Splits) -> list[Tensor]:
    """As `messages.all_to_all`, with one exchange for all tensors of a dtype."""
    inputs = [resolved(input_) for input_ in inputs]
    outputs: dict[int, Tensor] = {}
    for dtype in dict.fromkeys([input_.dtype for input_ in inputs]):
        indices = [index for index, input_ in enumerate(inputs) if input_.dtype == dtype]
        scatter = [splits.scatter[index] for index in indices]
        gather = [splits.gather[index] for index in indices]
        some = _all_to_all(group, [inputs[index] for index in indices], scatter, gather)
        outputs.update(zip(indices, some, strict=True))
    return [outputs[index] for index in range(len(inputs))]


def _all_to_all(
    group: ProcessGroup, inputs: list[Tensor], scatter: list[Split], gather: list[Split]
) -> list[Tensor]:
    size, rank, dtype = group.size(), group.rank(), inputs[0].dtype
    parts = [_parts(*each, size) for each in zip(inputs, scatter, strict=True)]
    # [rank][tensor]: the message to each rank, and the shape of the message from each rank.
    sent = list(zip(*parts, strict=True))
    shapes = [
        [_shape_from(other, *each) for each in zip(sent[rank], gather, strict=True)]
        for other in range(size)
    ]
    counts = [[math.prod(shape) for shape in each] for each in shapes]
    received = _wait(
        torch.ops._c10d_functional.all_to_all_single(
            moved(torch.cat([part.reshape(-1) for message in sent for part in message])),
            moved_counts(dtype, [sum(each) for each in counts]),
            moved_counts(dtype, [sum([part.numel() for part in message]) for message in sent]),
            group.group_name,
        )
    )
    flat = iter(moved_back(received, dtype).split([count for each in counts for count in each]))
    messages = [[next(flat).view(shape) for shape in each] for each in shapes]
    return [
        _together([message[index] for message in messages], split)
        for index, split in enumerate(gather)
    ]


def _parts(tensor: Tensor, split: Split, size: int) -> list[Tensor]:
    """Returns the message to each rank."""
    if split.replicas > 1:
        return [tensor.narrow(split.dim, rank // split.replicas, 1) for rank in range(size)]
    sizes = split.sizes or [tensor.shape[split.dim] // size] * size
    return list(tensor.split(list(sizes), split.dim))


def _shape_from(rank: int, own: Tensor, split: Split) -> list[int]:
    """Returns the shape of `rank`'s message to this rank; `own` is the message to itself."""
    return list(own.shape) if split.sizes is None else _with_size(own, split.dim, split.sizes[rank])


def _together(messages: list[Tensor], split: Split) -> Tensor:
    """Joins the messages from all ranks; messages for the same head are added."""
    if split.replicas > 1:
        heads = range(0, len(messages), split.replicas)
        messages = [torch.stack(messages[i : i + split.replicas]).sum(0) for i in heads]
    return torch.cat(messages, split.dim)


def all_gather(group: ProcessGroup, input_: Tensor, split: Split) -> Tensor:
    """As `messages.all_gather`."""
    input_ = resolved(input_)
    if split.sizes is not None:
        return _all_gather_padded(group, input_, split.dim, split.sizes)
    received = _gathered(group, input_.contiguous())
    output = concatenate_messages(received.view(group.size(), *input_.shape), split.dim)
    # `contiguous()` alone may return `output` itself. torch 2.11 makes every intermediate tensor of
    # an autograd Function an output. If one tensor has two names, one name loses its gradient.
    return output if output.is_contiguous() else output.contiguous()


def _all_gather_padded(
    group: ProcessGroup, input_: Tensor, dim: int, sizes: Sequence[int]
) -> Tensor:
    shapes = [_with_size(input_, dim, size) for size in sizes]
    slot = max(math.prod(shape) for shape in shapes)
    received = _gathered(group, _padded(input_, slot)).view(group.size(), slot)
    messages = zip(received.unbind(0), shapes, strict=True)
    parts = [message[: math.prod(shape)].view(shape) for message, shape in messages]
    return torch.cat(parts, dim)


def _gathered(group: ProcessGroup, message: Tensor) -> Tensor:
    """Gathers the messages of all ranks, in a row."""
    received = _wait(
        torch.ops._c10d_functional.all_gather_into_tensor(
            moved(message), group.size(), group.group_name
        )
    )
    return moved_back(received, message.dtype)


def reduce_scatter(group: ProcessGroup, input_: Tensor, split: Split) -> Tensor:
    """As `messages.reduce_scatter`; the operator reduces along dim 0, which every backend can."""
    input_ = resolved(input_)
    if split.sizes is not None:
        return _reduce_scatter_padded(group, input_, split.dim, split.sizes)
    sent = message_view(input_, split.dim, group.size(), 0).contiguous()
    return _reduced_part(group, sent)[0]


def _reduce_scatter_padded(
    group: ProcessGroup, input_: Tensor, dim: int, sizes: Sequence[int]
) -> Tensor:
    parts = input_.split(list(sizes), dim)
    own = parts[group.rank()]
    slot = max(part.numel() for part in parts)
    received = _reduced_part(group, torch.cat([_padded(part, slot) for part in parts]))
    return received[: own.numel()].view(own.shape)


def _reduced_part(group: ProcessGroup, sent: Tensor) -> Tensor:
    """Returns the sum over ranks of this rank's part of dim 0."""
    return _wait(
        torch.ops._c10d_functional.reduce_scatter_tensor(
            sent, "sum", group.size(), group.group_name
        )
    )


def _padded(part: Tensor, slot: int) -> Tensor:
    """Returns the elements in a row, with zeros up to `slot` elements."""
    flat = part.reshape(-1)
    return torch.cat((flat, flat.new_zeros(slot - flat.numel())))


def _with_size(tensor: Tensor, dim: int, size: int) -> list[int]:
    shape = list(tensor.shape)
    shape[dim] = size
    return shape


def all_reduce(group: ProcessGroup, input_: Tensor, op: str) -> Tensor:
    """As `messages.all_reduce`. gloo has no average, so an average is a sum and a division."""
    reduced = _wait(
        torch.ops._c10d_functional.all_reduce(
            resolved(input_).contiguous(), "sum" if op == "avg" else op, group.group_name
        )
    )
    return reduced / group.size() if op == "avg" else reduced


def broadcast(group: ProcessGroup, input_: Tensor, src: int) -> Tensor:
    """As `messages.broadcast`."""
    input_ = resolved(input_)
    received = _wait(
        torch.ops._c10d_functional.broadcast(moved(input_.contiguous()), src, group.group_name)
    )
    return moved_back(received, input_.dtype).view(input_.shape)


def reduce(group: ProcessGroup, input_: Tensor, dst: int) -> Tensor:
    """As `messages.reduce`; torch has no functional one, so all send to `dst`, which adds.

    The zeros of the other ranks are the sum of the nothing that they receive: the compiler drops no
    exchange whose result is used.
    """
    input_ = resolved(input_)
    size, num_elements = group.size(), input_.numel()
    num_parts = size if group.rank() == dst else 0
    received = _wait(
        torch.ops._c10d_functional.all_to_all_single(
            moved(input_.contiguous()),
            moved_counts(input_.dtype, [num_elements if num_parts else 0] * size),
            moved_counts(input_.dtype, [num_elements if r == dst else 0 for r in range(size)]),
            group.group_name,
        )
    )
    parts = moved_back(received, input_.dtype).view(num_parts, *input_.shape)
    return parts.sum(0, dtype=input_.dtype)


def resolved(tensor: Tensor) -> Tensor:
    """Resolves a lazy conjugation or sign; a traced tensor cannot be asked whether it has one."""
    return tensor.resolve_conj().resolve_neg()


def _wait(tensor: Tensor) -> Tensor:
    result: Tensor = torch.ops._c10d_functional.wait_tensor(tensor)
    return result
