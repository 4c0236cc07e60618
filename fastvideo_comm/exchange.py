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
from .kernels import copy_valid_
from .layout import Share, message_view


class Exchange(NamedTuple):
    """What is traded: for each tensor the dim that is dealt out and the dim that comes together."""

    scatter: tuple[Share, ...]
    gather: tuple[Share, ...]

    def reverse(self) -> Exchange:
        """The exchange that undoes this one; with replicated heads, its adjoint."""
        return Exchange(self.gather, self.scatter)


# Elements up to which `exchange_one` is the shorter way; bench/NOTES.md has the measurement.
_SMALL_NUMEL = 1 << 16

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
        self.channel.wait("all_to_all_4D", self.works)
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

    A small one takes a shorter way to the same collective: below some tens of KiB what counts is
    the host's time, and there `start` costs more than the copy and the exchange together.
    """
    if torch.compiler.is_compiling():
        return traced.exchange(group, (input_,), what)[0]
    channel = Channel.of(group)
    if len(input_) != 1 or input_.numel() > _SMALL_NUMEL or not input_.numel():
        return start(channel, (input_,), what, async_op=False).wait()[0]
    size = channel.size()
    sent = message_view(input_, what.scatter[0].dim, size, 1)
    wire = sent
    if not sent.is_contiguous():
        wire = copy_valid_(channel.buffers.take(sent.shape, sent), sent)
    _, _, sequence, heads, width = sent.shape
    gathers_sequence = what.gather[0].dim == 1
    output = input_.new_empty(
        (1, sequence * size, heads, width)
        if gathers_sequence
        else (1, sequence, heads * size, width)
    )
    if gathers_sequence:
        channel.all_to_all_one(output, wire)
    else:
        received = channel.buffers.take(sent.shape, sent)
        channel.all_to_all_one(received, wire)
        copy_valid_(message_view(output, 2, size, 1), received)
        channel.buffers.give_back(received)
    if wire is not sent:
        channel.buffers.give_back(wire)
    return output


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
    tasks: list[Task] = []
    for input_, scatter, gather in zip(inputs, what.scatter, what.gather, strict=True):
        shape = list(input_.shape)
        shape[scatter.dim] = scatter.part(shape[scatter.dim], channel.rank(), size)
        shape[gather.dim] = gather.whole(shape[gather.dim], size)
        output = input_.new_empty(shape)
        pending.outputs.append(output)
        even = scatter.sizes is None and gather.sizes is None
        if output.numel() if even else shape[0] * shape[3]:
            tasks.append(Task(input_, output, scatter, gather))
        # else no rank has anything to send
    if not tasks:
        return pending
    num_bytes = 0  # of all ranks together, so that all choose alike
    for task in tasks:
        totals = task.input.shape[task.scatter.dim] * task.output.shape[task.gather.dim]
        outer = task.input.shape[0] * task.input.shape[3]
        num_bytes += totals * outer * task.input.element_size()
    if not async_op and channel.trades(inputs[0].device, num_bytes):
        _start_trade(pending, tasks)
    else:
        _start_collective(pending, tasks, async_op=async_op)
    return pending


class Task(NamedTuple):
    """One tensor of an exchange that has something to send."""

    input: Tensor
    output: Tensor
    scatter: Share
    gather: Share


def _start_collective(pending: Pending, tasks: list[Task], *, async_op: bool) -> None:
    """Message buffers into a collective: on NCCL one grouped call for all tensors and entries."""
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
    _copy(packs)
    pending.works = pending.channel.all_to_all(transfers, async_op=async_op)


def _start_trade(pending: Pending, tasks: list[Task]) -> None:
    """Message by message; what this rank has for itself goes straight to its place meanwhile."""
    rank, size = pending.channel.rank(), pending.channel.size()
    packs: list[tuple[Tensor, Tensor]] = []
    own: list[tuple[Tensor, Tensor]] = []
    outgoing: list[tuple[Tensor, int]] = []
    incoming: list[tuple[Tensor, int]] = []
    for input_, output, scatter, gather in tasks:
        sent = scatter.messages(input_, size)
        if gather.holders > 1:
            received = list(_summed_later(pending, output, gather).unbind(1))
        else:
            received = gather.messages(output, size)
        sent_from, received_at = _places(pending, sent), _places(pending, received)
        own.append((received[rank], sent[rank]))
        for other in (other for other in range(size) if other != rank):
            if sent[other].numel():
                outgoing += [(message, other) for message in sent_from[other].unbind(0)]
                if sent_from is not sent:
                    packs.append((sent_from[other], sent[other]))
            if received[other].numel():
                incoming += [(message, other) for message in received_at[other].unbind(0)]
                if received_at is not received:
                    pending.unpacks.append((received[other], received_at[other]))
    _copy(packs)
    pending.works = pending.channel.trade(incoming, outgoing)
    _copy(own)


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


def _places(pending: Pending, messages: list[Tensor]) -> list[Tensor]:
    """Where each rank's message is contiguous: `messages` themselves, or parts of a buffer.

    Nobody asks for the place of this rank's own.
    """
    rank = pending.channel.rank()
    others = [message for other, message in enumerate(messages) if other != rank]
    if all(not message.numel() or message[0].is_contiguous() for message in others):
        return messages
    sizes = [message.numel() for message in others]
    parts = pending.wire((sum(sizes),), messages[0]).split(sizes)
    places = [part.view(message.shape) for part, message in zip(parts, others, strict=True)]
    return [*places[:rank], messages[rank], *places[rank:]]


def _summed_later(pending: Pending, output: Tensor, share: Share) -> Tensor:
    """A buffer `[B, P, s, 1, D]` for the gradients of heads that several ranks hold."""
    batch, sequence, heads, width = output.shape
    wire = pending.wire((batch, heads * share.holders, sequence, 1, width), output)
    gradients = wire.unflatten(1, (heads, share.holders))
    pending.sums.append((output.movedim(2, 1).unsqueeze(3), gradients))
    return wire


def _copy(copies: list[tuple[Tensor, Tensor]]) -> None:
    for to, from_ in copies:
        copy_valid_(to, from_)
