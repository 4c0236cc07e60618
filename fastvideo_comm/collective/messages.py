"""The collectives but the exchange: group and tensor in, tensor out, no autograd.

Each is a strided copy into messages, an exchange, a strided copy out of them; a copy is left out
where `message_view` is contiguous already. Under torch.compile the same is written in functional
collectives (`traced.py`), so that the compiler sees the copies and fuses them.

Parts of different sizes are padded to the largest: gloo and NCCL gather and reduce equal parts
only, and in an all_to_all a part would cross between two hosts once for every rank over there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import copy_all_valid_, copy_valid_
from ..profiling import span
from . import traced
from .group import Channel, Group, plain
from .layout import Share, message_view, padded_pairs
from .shared_memory import Window
from .validation import REDUCE_OPS


def all_gather(group: Group, input_: Tensor, share: Share) -> Tensor:
    """`[A, c, ..] -> [A, P*c, ..]`: every rank's tensor side by side along the share's dim."""
    input_ = plain(input_)
    if torch.compiler.is_compiling():
        return traced.all_gather(group, input_, share)
    channel = Channel.of(group)
    shape = list(input_.shape)
    shape[share.dim] = share.whole(shape[share.dim], channel.size())
    output = input_.new_empty(shape)
    if not output.numel():
        return output
    if share.sizes is not None:
        _all_gather_padded(channel, input_, output, share.dim, share.sizes)
        return output
    received = message_view(output, share.dim, channel.size(), 0)
    window = channel.window(input_)
    if window is not None:
        _all_gather_in_memory(channel, input_, received, window)
        return output
    inputs = _packed(channel, input_, contiguous=input_.is_contiguous())
    outputs = (
        received if received.is_contiguous() else channel.buffers.take(received.shape, received)
    )
    with span("exchange", channel.name):
        channel.all_gather(outputs, inputs)
    _release(channel, inputs, input_)
    _unpack(channel, received, outputs)
    return output


def _all_gather_in_memory(
    channel: Channel, input_: Tensor, received: Tensor, window: Window
) -> None:
    """Into `received [P, *input_.shape]`, from where each rank has put its tensor."""
    rank = channel.rank()
    with span("pack", channel.name):
        copy_valid_(window.view(rank, 0, input_), input_)
    with span("exchange", channel.name):
        channel.meet(window, lambda: copy_valid_(received[rank], input_))
    with span("unpack", channel.name):
        copy_all_valid_(
            [(received[peer], window.view(peer, 0, input_)) for peer in _others(channel)]
        )


def _all_gather_padded(
    channel: Channel, input_: Tensor, output: Tensor, dim: int, sizes: Sequence[int]
) -> None:
    """Into `output`, for parts of different sizes."""
    slot = output.numel() // output.shape[dim] * max(sizes)
    inputs = input_
    if input_.numel() < slot or not input_.is_contiguous():
        inputs = channel.buffers.take((slot,), input_)
        with span("pack", channel.name):
            copy_valid_(inputs[: input_.numel()].view(input_.shape), input_)
    received = channel.buffers.take((channel.size(), slot), output)
    with span("exchange", channel.name):
        channel.all_gather(received, inputs)
    _release(channel, inputs, input_)
    with span("unpack", channel.name):
        copy_all_valid_(padded_pairs(output, dim, sizes, received))
    channel.buffers.give_back(received)


def reduce_scatter(group: Group, input_: Tensor, share: Share) -> Tensor:
    """`[A, P*c, ..] -> [A, c, ..]`: the sum over ranks of this rank's part of the share's dim."""
    input_ = plain(input_)
    if torch.compiler.is_compiling():
        return traced.reduce_scatter(group, input_, share)
    channel = Channel.of(group)
    if share.sizes is not None:
        return _reduce_scatter_padded(channel, input_, share.dim, share.sizes)
    sent = message_view(input_, share.dim, channel.size(), 0)
    output = input_.new_empty(sent.shape[1:])
    if not output.numel():
        return output
    window = channel.window(input_)
    if window is not None:
        _reduce_scatter_in_memory(channel, sent, output, window)
        return output
    inputs = _packed(channel, sent, contiguous=sent.is_contiguous())
    with span("exchange", channel.name):
        channel.reduce_scatter(output, inputs)
    _release(channel, inputs, sent)
    return output


def _reduce_scatter_in_memory(
    channel: Channel, sent: Tensor, output: Tensor, window: Window
) -> None:
    """Into `output`, the sum of what the ranks have for this one; `sent` is `[P, *output.shape]`.

    Every element is summed on one rank alone, so that the order is no other rank's concern.
    """
    rank = channel.rank()
    mine = window.view(rank, 0, sent)
    with span("pack", channel.name):
        copy_all_valid_([(mine[peer], sent[peer]) for peer in _others(channel)])
    with span("exchange", channel.name):
        channel.meet(window, lambda: copy_valid_(output, sent[rank]))
    with span("unpack", channel.name):
        for peer in _others(channel):
            output.add_(window.view(peer, 0, sent)[rank])


def _others(channel: Channel) -> list[int]:
    return [rank for rank in range(channel.size()) if rank != channel.rank()]


def _reduce_scatter_padded(
    channel: Channel, input_: Tensor, dim: int, sizes: Sequence[int]
) -> Tensor:
    """For parts of different sizes."""
    shape = list(input_.shape)
    shape[dim] = sizes[channel.rank()]
    output = input_.new_empty(shape)
    if not input_.numel():
        return output
    slot = input_.numel() // input_.shape[dim] * max(sizes)
    inputs = channel.buffers.take((channel.size(), slot), input_)
    with span("pack", channel.name):
        copy_all_valid_([(to, from_) for from_, to in padded_pairs(input_, dim, sizes, inputs)])
    received = output
    if output.numel() < slot:
        received = channel.buffers.take((slot,), output)
    with span("exchange", channel.name):
        channel.reduce_scatter(received, inputs)
    channel.buffers.give_back(inputs)
    if received is not output:
        with span("unpack", channel.name):
            copy_valid_(output, received[: output.numel()].view(shape))
        channel.buffers.give_back(received)
    return output


def all_reduce(group: Group, input_: Tensor, op: str) -> Tensor:
    """The reduction over ranks, element by element, into a new tensor."""
    input_ = plain(input_)
    if torch.compiler.is_compiling():
        return traced.all_reduce(group, input_, op)
    channel = Channel.of(group)
    with span("pack", channel.name):
        output = copy_valid_(input_.new_empty(input_.shape), input_)
    if output.numel():
        with span("exchange", channel.name):
            channel.all_reduce(output, REDUCE_OPS[op])
    return output


def slice_(group: Group, input_: Tensor, share: Share) -> Tensor:
    """`[A, P*c, ..] -> [A, c, ..]`: this rank's part of the share's dim, in memory of its own."""
    input_ = plain(input_)
    if share.sizes is None:
        part = message_view(input_, share.dim, group.size(), 0)[group.rank()]
    else:
        part = input_.split(share.sizes, share.dim)[group.rank()]
    if torch.compiler.is_compiling():
        return part.clone(memory_format=torch.contiguous_format)
    return copy_valid_(part.new_empty(part.shape), part)


def gather(group: Group, input_: Tensor, dst: int, dim: int) -> Tensor | None:
    """As `all_gather`, on rank `dst` only; None elsewhere."""
    input_ = plain(input_)
    channel = Channel.of(group)
    here = channel.rank() == dst
    shape = list(input_.shape)
    shape[dim] *= channel.size()
    output = input_.new_empty(shape) if here else None
    if not input_.numel():
        return output
    inputs = _packed(channel, input_, contiguous=input_.is_contiguous())
    if output is None:
        channel.gather((), inputs, dst)
    else:
        received = message_view(output, dim, channel.size(), 0)
        outputs = (
            received if received.is_contiguous() else channel.buffers.take(received.shape, received)
        )
        channel.gather(outputs.unbind(0), inputs, dst)
        _unpack(channel, received, outputs)
    _release(channel, inputs, input_)
    return output


def send(group: Group, tensor: Tensor, dst: int) -> None:
    """`tensor` to rank `dst`."""
    tensor = plain(tensor)
    channel = Channel.of(group)
    wire = _packed(channel, tensor, contiguous=tensor.is_contiguous())
    channel.send(wire, dst)
    _release(channel, wire, tensor)


def recv(
    group: Group, size: Sequence[int], dtype: torch.dtype, src: int, device: torch.device
) -> Tensor:
    """A tensor of `size` from rank `src`."""
    tensor = torch.empty(size, dtype=dtype, device=device)
    Channel.of(group).recv(tensor, src)
    return tensor


def _packed(channel: Channel, view: Tensor, *, contiguous: bool) -> Tensor:
    """`view` where the exchange can read it as it stands, else its copy in a wire buffer."""
    if contiguous:
        return view
    with span("pack", channel.name):
        return copy_valid_(channel.buffers.take(view.shape, view), view)


def _unpack(channel: Channel, received: Tensor, wire: Tensor) -> None:
    """What the exchange did not write into the output itself goes there now."""
    if wire is not received:
        with span("unpack", channel.name):
            copy_valid_(received, wire)
        channel.buffers.give_back(wire)


def _release(channel: Channel, wire: Tensor, view: Tensor) -> None:
    """The exchange is complete: a wire buffer is free again."""
    if wire is not view:
        channel.buffers.give_back(wire)
