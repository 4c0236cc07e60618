"""The collectives by messages, for ranks that can only send: no autograd.

Each collective is a strided copy into messages, an exchange of contiguous messages by the process
group, and a strided copy out of them. `Message` leaves out a copy if the tensor's own memory is the
message.

`all_gather` and `reduce_scatter` pad parts of different sizes to the largest part, because gloo and
NCCL gather and reduce equal parts only. An all_to_all would need no padding, but it would send a
part to another host once for every rank there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import profiler

from ..kernels import copy_valid_
from ..profiling import span
from ..reduce_ops import REDUCE_OPS
from .buffers import SMALL_BYTES
from .c10d import Transfer
from .group import Group
from .layout import Split, Splits, even_exchange, message_view
from .message import Message, SummedMessage, pack, unpack

# If the whole tensor has at most so many bytes for each rank, all batch entries travel in one
# exchange: one more copy then costs less than an exchange for each entry. Between two gloo ranks,
# with batches of 2 and 4, both take the same time at 1 to 2 MiB a rank; below, one exchange takes
# 0.5 to 0.9 of the time. The measurement is in bench/NOTES.md, "Small batches".
TOGETHER_BYTES = 1 << 20


class Work:
    """An exchange in flight: its outputs, and what is left to do when the messages arrive."""

    __slots__ = ("_group", "_outputs", "_received", "_sent", "_works")

    def __init__(
        self,
        group: Group,
        works: list[dist.Work | None],
        outputs: list[Tensor],
        sent: list[Message],
        received: list[Message],
    ) -> None:
        """Takes an exchange that has started."""
        self._group = group
        self._works = works
        self._outputs = outputs
        self._sent = sent
        self._received = received

    def wait(self) -> list[Tensor]:
        """Waits for the outputs and returns them; called once."""
        with span("exchange", self._group.name):
            self._group.c10d.wait("all_to_all", self._works)
        unpack(self._received, self._group.name)
        for message in self._sent:
            message.release()
        return self._outputs

    def is_completed(self) -> bool:
        """Whether `wait` would return at once."""
        return all(work is None or work.is_completed() for work in self._works)


def all_to_all(group: Group, inputs: Sequence[Tensor], splits: Splits) -> list[Tensor]:
    """Trades `inputs` and waits for the outputs, each contiguous."""
    if len(inputs) == 1 and splits.is_even and not profiler._is_profiler_enabled:
        (input_,) = inputs
        # As `_travels_together` of even parts, which is two more calls.
        is_one = input_.shape[0] == 1 or input_.nbytes <= TOGETHER_BYTES
        if is_one and not (input_.is_conj() or input_.is_neg()):
            return [_all_to_all_as_one(group, input_, splits.scatter[0].dim, splits.gather[0].dim)]
    return start_all_to_all(group, inputs, splits, async_op=False).wait()


def _all_to_all_as_one(group: Group, input_: Tensor, scatter_dim: int, gather_dim: int) -> Tensor:
    """Trades one tensor in one exchange: as `start_all_to_all`, with less host time.

    It makes no `Message`, and no ranges for a profiler: both cost more than a small copy.
    """
    plan = even_exchange(input_.shape, input_.stride(), scatter_dim, gather_dim, group.size())
    output = input_.new_empty(plan.output_shape)
    if not output.numel():
        return output
    buffers, shape = group.buffers, plan.message_shape
    impl = group.copies_on_cpu if input_.is_cpu else "auto"
    # Whether `buffers` keeps messages of this size: to ask it costs more than the memory.
    is_kept = input_.is_cpu and input_.nbytes >= SMALL_BYTES
    sent = source = input_.as_strided(shape, plan.sent_strides)
    received = target = output.as_strided(shape, plan.received_strides)
    if plan.packs:
        sent = buffers.take(shape, input_) if is_kept else input_.new_empty(shape)
        copy_valid_(sent, source, impl=impl)
    if plan.unpacks:
        received = buffers.take(shape, input_) if is_kept else input_.new_empty(shape)
    group.c10d.all_to_all_one(received, sent)
    if plan.packs and is_kept:
        buffers.give_back(sent)
    if plan.unpacks:
        copy_valid_(target, received, impl=impl)
        if is_kept:
            buffers.give_back(received)
    return output


def start_all_to_all(
    group: Group, inputs: Sequence[Tensor], splits: Splits, *, async_op: bool
) -> Work:
    """Packs and sends; the caller may compute until it waits.

    Every batch entry of a tensor is a message of its own, and the exchange reads or writes it in
    place: one local pass for a batch of any size. A small batch travels as one message.
    """
    size, buffers = group.size(), group.buffers
    outputs: list[Tensor] = []
    sent: list[Message] = []
    received: list[Message] = []
    transfers: list[Transfer] = []
    for input_, scatter, gather in zip(inputs, splits.scatter, splits.gather, strict=True):
        shape = splits.output_shape(input_.shape, scatter, gather, group.rank(), size)
        output = input_.new_empty(shape)
        outputs.append(output)
        even = scatter.sizes is None and gather.sizes is None
        if not (output.numel() if even else shape[0] * shape[3]):
            continue  # no rank has anything to send
        to, from_ = output, input_
        if input_.shape[0] > 1 and _travels_together(input_, gather, size):
            to, from_ = output.unsqueeze(0), input_.unsqueeze(0)
            scatter, gather = scatter.moved(1), gather.moved(1)
        message = Message.of_split(buffers, from_, scatter, size)
        arrival = (
            SummedMessage(buffers, to, gather)
            if gather.replicas > 1
            else Message.of_split(buffers, to, gather, size)
        )
        sent.append(message)
        received.append(arrival)
        counts: tuple[list[int], list[int]] = ([], [])
        if not even:
            counts = (gather.counts(to, size), scatter.counts(from_, size))
        transfers += [
            Transfer(arrived, entry, *counts)
            for arrived, entry in zip(arrival.wire.unbind(0), message.wire.unbind(0), strict=True)
        ]
    pack(sent, group.name)
    works: list[dist.Work | None] = []
    if transfers:
        with span("exchange", group.name):
            works = group.c10d.all_to_all(transfers, async_op=async_op)
    return Work(group, works, outputs, sent, received)


def _travels_together(input_: Tensor, gather: Split, world_size: int) -> bool:
    """Whether all batch entries of a tensor travel in one exchange; the same on all ranks."""
    whole = gather.whole(input_.shape[gather.dim], world_size)
    entries = input_.numel() // max(input_.shape[gather.dim], 1) * whole
    return entries * input_.element_size() <= TOGETHER_BYTES * world_size


def all_gather(group: Group, input_: Tensor, split: Split) -> Tensor:
    """`[A, c, ..] -> [A, P*c, ..]`: every rank's tensor side by side along the split's dim."""
    shape = list(input_.shape)
    shape[split.dim] = split.whole(shape[split.dim], group.size())
    output = input_.new_empty(shape)
    if not output.numel():
        return output
    if split.sizes is None:
        sent = Message.of(group.buffers, input_)
        received = Message.of(group.buffers, message_view(output, split.dim, group.size(), 0))
    else:
        slot = output.numel() // shape[split.dim] * max(split.sizes)
        sent = Message.of_part(group.buffers, input_, slot)
        received = Message.of_parts(group.buffers, output, split.dim, split.sizes)
    pack([sent], group.name)
    with span("exchange", group.name):
        group.c10d.all_gather(received.wire, sent.wire)
    sent.release()
    unpack([received], group.name)
    return output


def reduce_scatter(group: Group, input_: Tensor, split: Split) -> Tensor:
    """`[A, P*c, ..] -> [A, c, ..]`: the sum over ranks of this rank's part of the split's dim."""
    shape = list(input_.shape)
    shape[split.dim] = split.part(shape[split.dim], group.rank(), group.size())
    output = input_.new_empty(shape)
    if not input_.numel():
        return output
    if split.sizes is None:
        sent = Message.of(group.buffers, message_view(input_, split.dim, group.size(), 0))
        received = Message.of(group.buffers, output)
    else:
        slot = input_.numel() // input_.shape[split.dim] * max(split.sizes)
        sent = Message.of_parts(group.buffers, input_, split.dim, split.sizes)
        received = Message.of_part(group.buffers, output, slot)
    pack([sent], group.name)
    with span("exchange", group.name):
        group.c10d.reduce_scatter(received.wire, sent.wire)
    sent.release()
    unpack([received], group.name)
    return output


def all_reduce(group: Group, input_: Tensor, op: str) -> Tensor:
    """The reduction over ranks, element by element, into a new tensor."""
    with span("pack", group.name):
        output = copy_valid_(input_.new_empty(input_.shape), input_)
    if output.numel():
        with span("exchange", group.name):
            group.c10d.all_reduce(output, REDUCE_OPS[op])
    return output


def add_buckets(group: Group, buckets: Sequence[Sequence[Tensor]]) -> None:
    """Writes sums over ranks in place; packs each bucket while the one before it travels."""
    in_flight: list[tuple[list[dist.Work | None], Message]] = []

    def land() -> None:
        works, bucket = in_flight.pop()
        with span("exchange", group.name):
            group.c10d.wait("all_reduce", works)
        unpack([bucket], group.name)

    for tensors in buckets:
        bucket = Message.of_tensors(group.buffers, tensors)
        pack([bucket], group.name)
        works = group.c10d.start_sum(bucket.wire)
        if in_flight:
            land()
        in_flight.append((works, bucket))
    if in_flight:
        land()


def broadcast(group: Group, input_: Tensor, src: int) -> Tensor:
    """Rank `src`'s tensor, as a new tensor on every rank."""
    output = input_.new_empty(input_.shape)
    if group.rank() == src:
        with span("pack", group.name):
            copy_valid_(output, input_)
    if output.numel():
        with span("exchange", group.name):
            group.c10d.broadcast(output, src)
    return output


def reduce(group: Group, input_: Tensor, dst: int) -> Tensor:
    """The sum over ranks on rank `dst`, zeros elsewhere."""
    with span("pack", group.name):
        output = copy_valid_(input_.new_empty(input_.shape), input_)
    if output.numel():
        with span("exchange", group.name):
            group.c10d.reduce(output, dst)
    return output if group.rank() == dst else output.zero_()


def barrier(group: Group, device: torch.device) -> None:
    """Returns when every rank has come here."""
    with span("exchange", group.name):
        group.c10d.barrier(device)


def gather(group: Group, input_: Tensor, dst: int, dim: int) -> Tensor | None:
    """As `all_gather`, on rank `dst` only; None elsewhere."""
    shape = list(input_.shape)
    shape[dim] *= group.size()
    output = input_.new_empty(shape) if group.rank() == dst else None
    if not math.prod(shape):
        return output
    sent = Message.of(group.buffers, input_)
    pack([sent], group.name)
    received: list[Message] = []
    if output is not None:
        received = [Message.of(group.buffers, message_view(output, dim, group.size(), 0))]
    wires = [wire for message in received for wire in message.wire.unbind(0)]
    with span("exchange", group.name):
        group.c10d.gather(wires, sent.wire, dst)
    sent.release()
    unpack(received, group.name)
    return output


def send(group: Group, tensor: Tensor, dst: int) -> None:
    """Sends `tensor` to rank `dst`."""
    sent = Message.of(group.buffers, tensor)
    pack([sent], group.name)
    with span("exchange", group.name):
        group.c10d.send(sent.wire, dst)
    sent.release()


def recv(
    group: Group, size: Sequence[int], dtype: torch.dtype, src: int, device: torch.device
) -> Tensor:
    """Receives a tensor of `size` from rank `src`."""
    tensor = torch.empty(size, dtype=dtype, device=device)
    with span("exchange", group.name):
        group.c10d.recv(tensor, src)
    return tensor
