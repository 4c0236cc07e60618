"""Where the elements of a tensor are in the messages of a collective. All functions return views.

By messages, a collective is a strided copy into messages, an exchange of contiguous messages, and a
strided copy out of them. Both copies are between a buffer `[.., P, ..]` and `message_view` of a
tensor. One dim of that tensor holds the parts of P ranks side by side:

    all_to_all_4D(x, 2, 1)      sent      message_view(x, 2, P, 1)     b s (P h) d -> b P s h d
                                received  message_view(out, 1, P, 1)   b (P s) h d -> b P s h d
    all_to_all_4D(x, 1, 2)      sent      message_view(x, 1, P, 1)     b (P s) h d -> b P s h d
                                received  message_view(out, 2, P, 1)   b s (P h) d -> b P s h d
    all_gather(x, dim), gather  received  message_view(out, dim, P, 0)   A (P c) .. -> P A c ..
    reduce_scatter(x, dim)      sent      message_view(x, dim, P, 0)     A (P c) .. -> P A c ..
    slice(x, dim)               part r    message_view(x, dim, P, 0)[r]  A (P c) .. -> P A c ..
    split_tensor_along_last_dim chunks    message_view(x, -1, P, 0)        .. (P c) -> P .. c

The two sides of an exchange have the same shape. If a view is contiguous, the exchange reads or
writes the tensor itself, and no copy is needed.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .wire import WireFormat


def message_view(tensor: Tensor, dim: int, world_size: int, position: int) -> Tensor:
    """Splits `dim` into one part for each rank, and moves the axis of ranks to `position`.

    Example:
        >>> import torch
        >>> x = torch.empty(2, 5, 6, 8)  # [B, s, H, D]
        >>> message_view(x, 2, 3, 1).shape  # b s (P h) d -> b P s h d
        torch.Size([2, 3, 5, 2, 8])

    Args:
        tensor: any shape; the size at `dim` is a multiple of `world_size`.
        dim: the dim that holds the parts of all ranks, in rank order.
        world_size: P, the number of parts.
        position: the place of the new axis of size P in the result.

    Returns:
        A view of `tensor` with one more dim.
    """
    shape = tensor.shape
    dim %= len(shape)
    view = tensor.view(*shape[:dim], world_size, shape[dim] // world_size, *shape[dim + 1 :])
    return view if dim == position else view.movedim(dim, position)


class EvenExchange(NamedTuple):
    """Where the messages are if one tensor with even splits is traded in one exchange.

    Attributes:
        output_shape: of the output, which is contiguous.
        message_shape: of all messages, `[P, B, ..]`.
        sent_strides: of the messages in the input.
        packs: whether the messages must be copied into a row.
        received_strides: of the messages in the output.
        unpacks: the same for the messages that arrive.
    """

    output_shape: tuple[int, ...]
    message_shape: tuple[int, ...]
    sent_strides: tuple[int, ...]
    packs: bool
    received_strides: tuple[int, ...]
    unpacks: bool


@functools.lru_cache(maxsize=4096)
def even_exchange(
    shape: torch.Size,
    strides: tuple[int, ...],
    scatter_dim: int,
    gather_dim: int,
    world_size: int,
) -> EvenExchange:
    """Plans the exchange of an input of this shape and these strides; remembers the plan.

    A tiny call between two ranks takes a fifth less time than with views that it makes itself.

    Example:
        >>> plan = even_exchange(torch.Size([1, 5, 6, 8]), (240, 48, 8, 1), 2, 1, 3)
        >>> plan.message_shape, plan.sent_strides, plan.packs, plan.unpacks
        ((3, 1, 5, 2, 8), (16, 240, 48, 8, 1), True, False)
    """
    output_shape = list(shape)
    output_shape[scatter_dim] //= world_size
    output_shape[gather_dim] *= world_size
    input_ = torch.empty_strided(shape, strides, device="meta")
    output = torch.empty(output_shape, device="meta")
    sent = message_view(input_, scatter_dim, world_size, 0)
    received = message_view(output, gather_dim, world_size, 0)
    return EvenExchange(
        tuple(output_shape),
        tuple(sent.shape),
        sent.stride(),
        not sent.is_contiguous(),
        received.stride(),
        not received.is_contiguous(),
    )


def concatenate_messages(messages: Tensor, dim: int) -> Tensor:
    """The inverse of `message_view(.., position=0)`: `P A c .. -> A (P c) ..`.

    Returns a view if the strides allow it, else a copy. Compiled code uses this function: there the
    compiler fuses the copy with the code that reads it.

    Example:
        >>> import torch
        >>> concatenate_messages(torch.tensor([[[1, 2]], [[3, 4]]]), 1)
        tensor([[1, 2, 3, 4]])
    """
    return messages.movedim(0, dim).flatten(dim, dim + 1)


def padded_pairs(
    tensor: Tensor, dim: int, sizes: Sequence[int], messages: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Pairs parts of different sizes with their elements in messages of one size.

    A part fills the front of its message. The rest of the message is padding.

    Example:
        >>> import torch
        >>> messages = torch.tensor([[1, 2], [3, 4], [5, 0]])  # slots for 2 elements
        >>> x = torch.empty(5, dtype=torch.int64)
        >>> for part, message in padded_pairs(x, 0, [2, 2, 1], messages):
        ...     _ = part.copy_(message)
        >>> x
        tensor([1, 2, 3, 4, 5])

    Args:
        tensor: any shape, with the parts of all ranks side by side at `dim`.
        dim: the dim of the parts.
        sizes: every rank's size of `dim`.
        messages: `[P, slot]`; a slot has the size of the largest part.

    Returns:
        A pair of views of the same shape for each run of equal sizes. Near even sizes have at most
        two runs, for any number of ranks.
    """
    pairs = []
    rank = start = 0
    for size, run in itertools.groupby(sizes):
        ranks = len(list(run))
        parts = message_view(tensor.narrow(dim, start, ranks * size), dim, ranks, 0)
        if parts.numel():
            own = messages[rank : rank + ranks, : parts[0].numel()]
            pairs.append((parts, own.view(parts.shape)))
        rank, start = rank + ranks, start + ranks * size
    return pairs


class Split(NamedTuple):
    """How one dim of a tensor is divided among the ranks.

    Attributes:
        dim: the dim.
        sizes: every rank's size of the dim; None means the same size for all.
        replicas: how many ranks hold each entry. It is more than 1 for the key and value heads of
            grouped-query attention if there are fewer heads than ranks. Then rank r's part is the
            one entry `r // replicas`.
    """

    dim: int
    sizes: tuple[int, ...] | None = None
    replicas: int = 1

    def moved(self, num_dims: int) -> Split:
        """Returns the same split for a tensor with `num_dims` more dims in front."""
        return self._replace(dim=self.dim + num_dims)

    def part(self, size: int, rank: int, world_size: int) -> int:
        """Returns the size of `rank`'s part of a dim that has `size` in all."""
        return size * self.replicas // world_size if self.sizes is None else self.sizes[rank]

    def whole(self, size: int, world_size: int) -> int:
        """Returns the size in all of a dim whose part on this rank has `size`."""
        return size * world_size // self.replicas if self.sizes is None else sum(self.sizes)

    def replicated_shape(self, shape: Sequence[int]) -> list[int]:
        """Returns the shape of `replicated_view` for a tensor of this shape."""
        dim = self.dim
        return [shape[0], shape[dim], self.replicas, *shape[1:dim], 1, *shape[dim + 1 :]]

    def start(self, size: int, rank: int) -> int:
        """Returns where `rank`'s part begins; the part has `size`."""
        return size * rank if self.sizes is None else sum(self.sizes[:rank])

    def part_of(self, tensor: Tensor, rank: int, world_size: int) -> Tensor:
        """Returns `rank`'s part of a tensor: a view."""
        if self.replicas > 1:
            return tensor.narrow(self.dim, rank // self.replicas, 1)
        size = self.part(tensor.shape[self.dim], rank, world_size)
        return tensor.narrow(self.dim, self.start(size, rank), size)

    def views(self, tensor: Tensor, world_size: int) -> list[Tensor]:
        """Returns the messages in `tensor`, in rank order: one view `[B, ..]`, or one per rank."""
        if self.sizes is not None:
            return list(tensor.split(self.sizes, self.dim))
        if self.replicas > 1:
            return [replicated_view(tensor, self.dim, self.replicas)]
        return [message_view(tensor, self.dim, world_size, 1)]

    def counts(self, tensor: Tensor, world_size: int) -> list[int]:
        """Returns the number of elements of one batch entry's message, for each rank."""
        size = tensor.shape[self.dim]
        others = math.prod(tensor.shape[1:]) // max(size, 1)
        return [others * self.part(size, rank, world_size) for rank in range(world_size)]


class Splits(NamedTuple):
    """What `all_to_all_4D` trades of each tensor.

    Attributes:
        scatter: for each tensor, how its scatter dim is divided among the ranks.
        gather: for each tensor, how its gather dim is joined from the ranks.
        wire: what the tensors are rounded to while they travel; None: they travel as they are.
    """

    scatter: tuple[Split, ...]
    gather: tuple[Split, ...]
    wire: WireFormat | None = None

    @property
    def is_even(self) -> bool:
        """Whether all parts have one size and no part has replicas."""
        if self is HEADS_TO_SEQUENCE or self is SEQUENCE_TO_HEADS:  # most calls
            return True
        for split in (*self.scatter, *self.gather):
            if split.sizes is not None or split.replicas > 1:
                return False
        return True

    def reverse(self) -> Splits:
        """Returns the exchange of the gradients: with replicated heads, the adjoint exchange."""
        if self is HEADS_TO_SEQUENCE:
            return SEQUENCE_TO_HEADS
        if self is SEQUENCE_TO_HEADS:
            return HEADS_TO_SEQUENCE
        return Splits(self.gather, self.scatter, self.wire.gradient if self.wire else None)

    def exact(self) -> Splits:
        """Returns the same exchange of tensors that travel as they are."""
        return self if self.wire is None else Splits(self.scatter, self.gather)

    def of(self, which: Sequence[int]) -> Splits:
        """Returns the same exchange of some of the tensors alone."""
        wire = self.wire
        if wire is not None:
            wire = wire._replace(dtypes=tuple([wire.dtypes[each] for each in which]))
        scatter, gather = ([parts[each] for each in which] for parts in self[:2])
        return Splits(tuple(scatter), tuple(gather), wire)

    def with_tangents(self) -> Splits:
        """Returns the same exchange of the tensors and, behind them, of a tangent of each."""
        wire = self.wire
        if wire is not None:
            wire = wire._replace(dtypes=wire.dtypes + (None,) * len(wire.dtypes))
        return Splits(self.scatter * 2, self.gather * 2, wire)

    @staticmethod
    def output_shape(
        shape: Sequence[int], scatter: Split, gather: Split, rank: int, world_size: int
    ) -> list[int]:
        """Returns the shape of one tensor after the exchange."""
        result = list(shape)
        result[scatter.dim] = scatter.part(shape[scatter.dim], rank, world_size)
        result[gather.dim] = gather.whole(shape[gather.dim], world_size)
        return result


# The splits of one tensor with even sizes, for the dims (2, 1) and (1, 2).
HEADS_TO_SEQUENCE = Splits((Split(2),), (Split(1),))
SEQUENCE_TO_HEADS = Splits((Split(1),), (Split(2),))


def replicated_view(tensor: Tensor, dim: int, replicas: int) -> Tensor:
    """Repeats every entry of `dim` for each of its replicas: `b s H d -> b H r s 1 d`.

    The result is a view: the new axis r has stride 0. H and r together are the ranks.

    Example:
        >>> import torch
        >>> replicated_view(torch.empty(1, 5, 2, 8), 2, 3).shape  # 2 heads, 6 ranks
        torch.Size([1, 2, 3, 5, 1, 8])
    """
    entries = tensor.movedim(dim, 1).unsqueeze(dim + 1)
    return entries.unsqueeze(2).expand(-1, -1, replicas, *[-1] * (tensor.dim() - 1))


def near_even_sizes(size: int, num_parts: int) -> list[int]:
    """Divides `size` into `num_parts` sizes that differ by at most 1; the larger sizes come first.

    `torch.tensor_split` divides a dim in the same way. Every rank computes the same list, so pass
    the list as `scatter_sizes` or `gather_sizes`.

    Example:
        >>> near_even_sizes(10, 4)
        [3, 3, 2, 2]

    Raises:
        ValueError: `size` is negative or `num_parts` is less than 1.
    """
    if size < 0:
        raise ValueError(f"size must not be negative, got {size}")
    if num_parts < 1:
        raise ValueError(f"num_parts must be at least 1, got {num_parts}")
    # Not divmod: torch.compile does not trace divmod for a size that may change.
    shorter, longer_parts = size // num_parts, size % num_parts
    return [shorter + 1 if part < longer_parts else shorter for part in range(num_parts)]
