"""A message: the elements of a tensor that travel, and the memory that they travel from.

Only this module decides whether a tensor is copied before or after an exchange. A contiguous view
is its own wire, which means that the exchange uses its memory. Any other view gets a wire buffer. A
wire buffer is given back only when the exchange is complete, because after a failure the backend
may still read it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import copy_all_valid_
from ..profiling import span
from .layout import Split, padded_pairs, replicated_view

if TYPE_CHECKING:
    from .buffers import WireBuffers


class Message:
    """Elements of a tensor that travel.

    Attributes:
        wire: contiguous memory that holds the messages of all ranks in rank order.
        pairs: views of the tensor, each with its elements in `wire`. Empty if `wire` is the
            tensor's own memory.
    """

    __slots__ = ("_buffers", "pairs", "wire")

    def __init__(
        self,
        wire: Tensor,
        pairs: list[tuple[Tensor, Tensor]],
        buffers: WireBuffers | None = None,
    ) -> None:
        """`buffers` takes `wire` back at the end; None if `wire` is the tensor's own memory."""
        self.wire = wire
        self.pairs = pairs
        self._buffers = buffers

    @classmethod
    def of(cls, buffers: WireBuffers, view: Tensor) -> Message:
        """Makes a message of the elements of a view, in the order of the view."""
        if is_message(view):
            return cls(view, [])
        wire = buffers.take(view.shape, view)
        return cls(wire, [(view, wire)], buffers)

    @classmethod
    def of_split(
        cls, buffers: WireBuffers, tensor: Tensor, split: Split, world_size: int
    ) -> Message:
        """Makes a message of the parts of `[B, ..]`, in rank order in each batch entry."""
        if split.sizes is None:
            return cls.of(buffers, split.views(tensor, world_size)[0])
        if split.dim == 1 and is_message(tensor[0]):
            return cls(tensor, [])
        views = split.views(tensor, world_size)
        lengths = [math.prod(view.shape[1:]) for view in views]
        wire = buffers.take((len(tensor), sum(lengths)), tensor)
        slots = [
            slot.unflatten(1, view.shape[1:])
            for slot, view in zip(wire.split(lengths, 1), views, strict=True)
        ]
        return cls(wire, list(zip(views, slots, strict=True)), buffers)

    @classmethod
    def of_part(cls, buffers: WireBuffers, tensor: Tensor, slot: int) -> Message:
        """Makes a message of a tensor, padded to `slot` elements."""
        if tensor.numel() == slot:
            return cls.of(buffers, tensor)
        wire = buffers.take((slot,), tensor)
        return cls(wire, [(tensor, wire[: tensor.numel()].view(tensor.shape))], buffers)

    @classmethod
    def of_tensors(cls, buffers: WireBuffers, tensors: Sequence[Tensor]) -> Message:
        """Tensors of one dtype, one behind the other."""
        if len(tensors) == 1:
            return cls.of(buffers, tensors[0])
        lengths = [tensor.numel() for tensor in tensors]
        wire = buffers.take((sum(lengths),), tensors[0])
        slots = [
            slot.view(tensor.shape)
            for slot, tensor in zip(wire.split(lengths), tensors, strict=True)
        ]
        return cls(wire, list(zip(tensors, slots, strict=True)), buffers)

    @classmethod
    def of_parts(
        cls, buffers: WireBuffers, tensor: Tensor, dim: int, sizes: Sequence[int]
    ) -> Message:
        """Makes a message of the parts of `dim`, each padded to the size of the largest part."""
        slot = tensor.numel() // tensor.shape[dim] * max(sizes)
        wire = buffers.take((len(sizes), slot), tensor)
        return cls(wire, padded_pairs(tensor, dim, sizes, wire), buffers)

    def complete(self) -> None:
        """Does what is left after the messages have been unpacked: here nothing."""

    def release(self) -> None:
        """Gives the wire buffer back, when the exchange is complete."""
        if self._buffers is not None:
            self._buffers.give_back(self.wire)


class SummedMessage(Message):
    """A received message in which several ranks send the same entries; the parts are added."""

    __slots__ = ("_sum",)

    def __init__(self, buffers: WireBuffers, tensor: Tensor, split: Split) -> None:
        """Makes the message for a tensor whose entries of `split.dim` come from several ranks."""
        view = replicated_view(tensor, split.dim, split.replicas)
        super().__init__(buffers.take(view.shape, tensor), [], buffers)
        self._sum = view[:, :, 0]

    def complete(self) -> None:
        """Adds the parts of each entry."""
        torch.sum(self.wire, 2, out=self._sum)


def is_message(view: Tensor) -> bool:
    """Whether the memory of a view holds its elements in order, and no lazy conjugation or sign."""
    return view.is_contiguous() and not (view.is_conj() or view.is_neg())


def pack(messages: Sequence[Message], name: str) -> None:
    """Copies the pairs of all messages into the wires, in one launch.

    `name` is the group's, for the profiler.
    """
    pairs = [(wire, view) for message in messages for view, wire in message.pairs]
    if pairs:
        with span("pack", name):
            copy_all_valid_(pairs)


def unpack(messages: Sequence[Message], name: str) -> None:
    """Copies the pairs of all messages out of the wires, and gives the wires back."""
    pairs = [pair for message in messages for pair in message.pairs]
    if pairs:
        with span("unpack", name):
            copy_all_valid_(pairs)
    for message in messages:
        message.complete()
        message.release()
