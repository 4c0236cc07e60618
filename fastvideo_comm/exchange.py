"""The exchange of heads for sequence: `all_to_all_4D` for one tensor or several.

Every batch entry of every tensor is a message buffer of its own, exchanged straight between where
it is packed and where it is read: one local pass per direction, however many tensors and batch
entries there are. Several exchanges may be in flight; the buffers of each are its own until it has
been waited for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import traced
from .channel import Channel, Group, Transfer
from .kernels import strided_copy_
from .layout import Share


class Exchange(NamedTuple):
    """What is traded: for each tensor the dim that is dealt out and the dim that comes together."""

    scatter: tuple[Share, ...]
    gather: tuple[Share, ...]

    @staticmethod
    def even(scatter_dim: int, gather_dim: int) -> Exchange:
        """One tensor, shared evenly."""
        return Exchange((Share(scatter_dim),), (Share(gather_dim),))

    def reverse(self) -> Exchange:
        """The exchange that undoes this one; with replicated heads, its adjoint."""
        return Exchange(self.gather, self.scatter)


class Pending:
    """An exchange in flight: what it will give, and the buffers that it holds until then."""

    def __init__(self, channel: Channel) -> None:
        """Nothing sent yet."""
        self.channel = channel
        self.works: list[dist.Work | None] = []
        self.outputs: list[Tensor] = []
        self.sent: list[Tensor] = []
        self.received: list[tuple[Tensor, Tensor, Share]] = []

    def wait(self) -> list[Tensor]:
        """The outputs, once they are there; called once."""
        self.channel.wait("all_to_all_4D", self.works)
        for wire in self.sent:
            self.channel.buffers.give_back(wire)
        copies: list[tuple[Tensor, Tensor]] = []
        for output, wire, share in self.received:
            views = share.views(output, self.channel.size())
            copies += zip(views, _parts(wire, views), strict=True)
            if share.holders > 1:  # the gradients of one head, from all ranks that hold it
                copies.pop()
                into = output.movedim(share.dim, 1).unsqueeze(share.dim + 1)
                torch.sum(wire.view(views[0].shape), 2, out=into)
        _copy(copies)
        for _, wire, _ in self.received:
            self.channel.buffers.give_back(wire)
        return self.outputs

    def is_completed(self) -> bool:
        """Whether `wait` would return at once."""
        return all(work is None or work.is_completed() for work in self.works)


def exchange(group: Group, inputs: Sequence[Tensor], what: Exchange) -> list[Tensor]:
    """Trades `inputs` and waits for the outputs, each contiguous."""
    if torch.compiler.is_compiling():
        return traced.exchange(group, inputs, what)
    return start(group, inputs, what, async_op=False).wait()


def start(group: Group, inputs: Sequence[Tensor], what: Exchange, *, async_op: bool) -> Pending:
    """Packs and sends; the caller may compute until it waits."""
    channel = Channel.of(group)
    size = channel.size()
    pending = Pending(channel)
    copies: list[tuple[Tensor, Tensor]] = []
    transfers: list[Transfer] = []
    for input_, scatter, gather in zip(inputs, what.scatter, what.gather, strict=True):
        shape = list(input_.shape)
        shape[scatter.dim] = scatter.part(shape[scatter.dim], channel.rank(), size)
        shape[gather.dim] = gather.whole(shape[gather.dim], size)
        output = input_.new_empty(shape)
        pending.outputs.append(output)
        even = scatter.sizes is None and gather.sizes is None
        if (even and not output.numel()) or not input_.shape[0] * input_.shape[3]:
            continue  # no rank has anything to send
        sent, packed = _messages(channel, input_, scatter)
        if packed:
            copies += packed
            pending.sent.append(sent)
        received, unpacked = _messages(channel, output, gather)
        if unpacked:
            pending.received.append((output, received, gather))
        splits: tuple[list[int], list[int]] = ([], [])
        if not even:
            splits = (gather.counts(output, size), scatter.counts(input_, size))
        transfers += [
            Transfer(to, from_, *splits)
            for to, from_ in zip(received.unbind(0), sent.unbind(0), strict=True)
        ]
    _copy(copies)
    pending.works = channel.all_to_all(transfers, async_op=async_op)
    return pending


def _messages(
    channel: Channel, tensor: Tensor, share: Share
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The message buffers of a tensor, one for each batch entry, and the copies that fill them.

    The tensor itself, and no copies, where its messages are contiguous as they stand.
    """
    views = share.views(tensor, channel.size())
    if share.sizes is None:
        if views[0][0].is_contiguous():
            return views[0], []
        wire = channel.buffers.take(views[0].shape, tensor)
    else:
        if share.dim == 1 and tensor[0].is_contiguous():
            return tensor, []
        wire = channel.buffers.take((len(tensor), math.prod(tensor.shape[1:])), tensor)
    return wire, list(zip(_parts(wire, views), views, strict=True))


def _parts(wire: Tensor, views: list[Tensor]) -> list[Tensor]:
    """The places in the message buffers `wire` `[B, ..]` of each of `views` `[B, ..]`."""
    if len(views) == 1:
        return [wire.view(views[0].shape)]
    sizes = [math.prod(view.shape[1:]) for view in views]
    return [
        part.unflatten(1, view.shape[1:])
        for part, view in zip(wire.split(sizes, 1), views, strict=True)
    ]


def _copy(copies: list[tuple[Tensor, Tensor]]) -> None:
    for to, from_ in copies:
        strided_copy_(to, from_)
