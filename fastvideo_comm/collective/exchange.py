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

from ..kernels import copy_all_valid_, copy_valid_
from ..profiling import span
from . import traced
from .group import Channel, Group, Transfer, plain
from .layout import Share, message_view
from .shared_memory import Window, aligned_bytes


class Exchange(NamedTuple):
    """What is traded: for each tensor the dim that is dealt out and the dim that comes together."""

    scatter: tuple[Share, ...]
    gather: tuple[Share, ...]

    def reverse(self) -> Exchange:
        """The exchange that undoes this one; with replicated heads, its adjoint."""
        return Exchange(self.gather, self.scatter)


# One tensor, shared evenly.
HEADS_TO_SEQUENCE = Exchange((Share(2),), (Share(1),))
SEQUENCE_TO_HEADS = HEADS_TO_SEQUENCE.reverse()


class Pending:
    """An exchange in flight: what it will give, and what is left to do when it has arrived."""

    def __init__(self, channel: Channel) -> None:
        """Nothing sent yet."""
        self.channel = channel
        self.works: list[dist.Work | None] = []
        self.outputs: list[Tensor] = []
        self.wires: list[Tensor] = []
        self.unpacks: list[tuple[Tensor, Tensor]] = []
        self.sums: list[tuple[Tensor, Tensor]] = []

    def wait(self) -> list[Tensor]:
        """The outputs, once they are there; called once."""
        name = self.channel.name
        with span("exchange", name):
            self.channel.wait("all_to_all_4D", self.works)
        with span("unpack", name):
            _copy(self.unpacks)
            for output, gradients in self.sums:
                torch.sum(gradients, 2, out=output)
        for wire in self.wires:
            self.channel.buffers.give_back(wire)
        return self.outputs

    def is_completed(self) -> bool:
        """Whether `wait` would return at once."""
        return all(work is None or work.is_completed() for work in self.works)

    def wire(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """A message buffer, held until `wait` is done."""
        wire = self.channel.buffers.take(shape, like)
        self.wires.append(wire)
        return wire


def exchange_one(group: Group, input_: Tensor, what: Exchange) -> Tensor:
    """`exchange` of one tensor shared evenly.

    A batch of one takes a shorter way to the same collective: for small tensors what counts is the
    host's time, and there `start` costs more than the copy and the exchange together.
    """
    input_ = plain(input_)
    if torch.compiler.is_compiling():
        return traced.exchange(group, (input_,), what)[0]
    channel = Channel.of(group)
    batch, sequence, heads, width = input_.shape
    if batch != 1 or not input_.numel() or channel.may_share(input_):
        return start(channel, (input_,), what, async_op=False).wait()[0]
    size, name, buffers = channel.size(), channel.name, channel.buffers
    gathers_sequence = what.gather[0].dim == 1
    view = message_view(input_, 2, size, 1) if gathers_sequence else input_
    sent = view
    if not view.is_contiguous():
        with span("pack", name):
            sent = copy_valid_(buffers.take(view.shape, view), view)
    if gathers_sequence:
        output = input_.new_empty((1, sequence * size, heads // size, width))
        with span("exchange", name):
            channel.all_to_all_one(output, sent)
    else:
        received = buffers.take((1, size, sequence // size, heads, width), input_)
        with span("exchange", name):
            channel.all_to_all_one(received, sent)
        with span("unpack", name):
            output = input_.new_empty((1, sequence // size, heads * size, width))
            copy_valid_(message_view(output, 2, size, 1), received)
        buffers.give_back(received)
    if sent is not view:
        buffers.give_back(sent)
    return output


def exchange(group: Group, inputs: Sequence[Tensor], what: Exchange) -> list[Tensor]:
    """Trades `inputs` and waits for the outputs, each contiguous."""
    if torch.compiler.is_compiling():
        return traced.exchange(group, [plain(input_) for input_ in inputs], what)
    return start(group, inputs, what, async_op=False).wait()


def start(group: Group, inputs: Sequence[Tensor], what: Exchange, *, async_op: bool) -> Pending:
    """Packs and sends; the caller may compute until it waits."""
    channel = Channel.of(group)
    size = channel.size()
    pending = Pending(channel)
    tasks: list[Task] = []
    for each, scatter, gather in zip(inputs, what.scatter, what.gather, strict=True):
        input_ = plain(each)
        shape = list(input_.shape)
        shape[scatter.dim] = scatter.part(shape[scatter.dim], channel.rank(), size)
        shape[gather.dim] = gather.whole(shape[gather.dim], size)
        output = input_.new_empty(shape)
        pending.outputs.append(output)
        even = scatter.sizes is None and gather.sizes is None
        if output.numel() if even else shape[0] * shape[3]:
            tasks.append(Task(input_, output, scatter, gather))
        # else no rank has anything to send
    shareable = not async_op and all(task.is_even for task in tasks)
    window = channel.window(*[task.input for task in tasks]) if shareable else None
    if window is not None:
        _exchange_in_memory(channel, tasks, window)
    elif tasks:
        _start(pending, tasks, async_op=async_op)
    return pending


def _exchange_in_memory(channel: Channel, tasks: Sequence[Task], window: Window) -> None:
    """Packs for the others into memory that they read, and unpacks from theirs.

    What a rank sends to itself goes straight to its place, while the others pack.
    """
    rank, size = channel.rank(), channel.size()
    others = (slice(0, rank), slice(rank + 1, size))
    packs: list[tuple[Tensor, Tensor]] = []
    own: list[tuple[Tensor, Tensor]] = []
    unpacks: list[tuple[Tensor, Tensor]] = []
    offset = 0
    for input_, output, scatter, gather in tasks:
        sent = message_view(input_, scatter.dim, size, 1)
        received = message_view(output, gather.dim, size, 1)
        parts = [window.view(peer, offset, sent) for peer in range(size)]
        packs += [(parts[rank][:, ranks], sent[:, ranks]) for ranks in others]
        own.append((received[:, rank], sent[:, rank]))
        unpacks += [
            (received[:, peer], parts[peer][:, rank]) for peer in range(size) if peer != rank
        ]
        offset += aligned_bytes(input_)
    with span("pack", channel.name):
        _copy(packs)
    with span("exchange", channel.name):
        channel.meet(window, lambda: _copy(own))
    with span("unpack", channel.name):
        _copy(unpacks)


class Task(NamedTuple):
    """One tensor of an exchange that has something to send."""

    input: Tensor
    output: Tensor
    scatter: Share
    gather: Share

    @property
    def is_even(self) -> bool:
        """Whether all ranks send and receive messages of one size."""
        return all(share.sizes is None and share.holders == 1 for share in self[2:])


def _start(pending: Pending, tasks: list[Task], *, async_op: bool) -> None:
    """Fills the message buffers and sends them, all tensors and batch entries in one go."""
    size = pending.channel.size()
    packs: list[tuple[Tensor, Tensor]] = []
    transfers: list[Transfer] = []
    for input_, output, scatter, gather in tasks:
        sent, copies = _buffers(pending, input_, scatter)
        packs += copies
        if gather.holders > 1:
            received = _summed_later(pending, output, gather)
        else:
            received, copies = _buffers(pending, output, gather)
            pending.unpacks += [(to, from_) for from_, to in copies]
        splits: tuple[list[int], list[int]] = ([], [])
        if scatter.sizes is not None or gather.sizes is not None:
            splits = (gather.counts(output, size), scatter.counts(input_, size))
        transfers += [
            Transfer(to, from_, *splits)
            for to, from_ in zip(received.unbind(0), sent.unbind(0), strict=True)
        ]
    with span("pack", pending.channel.name):
        _copy(packs)
    with span("exchange", pending.channel.name):
        pending.works = pending.channel.all_to_all(transfers, async_op=async_op)


def _buffers(
    pending: Pending, tensor: Tensor, share: Share
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The message buffers of a tensor, one for each batch entry, and the copies that fill them.

    The tensor itself, and no copies, where its messages are contiguous as they stand.
    """
    views = share.views(tensor, pending.channel.size())
    if share.sizes is None:
        if views[0][0].is_contiguous():
            return views[0], []
        wire = pending.wire(views[0].shape, tensor)
        return wire, [(wire, views[0])]
    if share.dim == 1 and tensor[0].is_contiguous():
        return tensor, []
    sizes = [math.prod(view.shape[1:]) for view in views]
    wire = pending.wire((len(tensor), sum(sizes)), tensor)
    parts = [
        part.unflatten(1, view.shape[1:])
        for part, view in zip(wire.split(sizes, 1), views, strict=True)
    ]
    return wire, list(zip(parts, views, strict=True))


def _summed_later(pending: Pending, output: Tensor, share: Share) -> Tensor:
    """A buffer `[B, P, s, 1, D]` for the gradients of heads that several ranks hold."""
    batch, sequence, heads, width = output.shape
    wire = pending.wire((batch, heads * share.holders, sequence, 1, width), output)
    gradients = wire.unflatten(1, (heads, share.holders))
    pending.sums.append((output.movedim(2, 1).unsqueeze(3), gradients))
    return wire


def _copy(copies: list[tuple[Tensor, Tensor]]) -> None:
    copy_all_valid_(copies)
