"""The exchange of tensors that travel as fp8: quantise, exchange, dequantise.

Each row of D elements becomes a row of fp8 numbers, the payload, and one float32 scale. Payload and
scales travel as they are on whichever way the group goes, so all ways give the same bits.

In eager code an even exchange quantises straight into the messages, and dequantises straight out of
them: one message for each rank holds the payload and behind it the scales. In all other cases the
payload `[B, s, H, D]` and the scales `[B, s, H, 1]` are exchanged as two tensors. In compiled code,
quantising is an operator of its own, because a compiler may divide less exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..kernels import dequantise_, quantise_
from . import traced
from .group import AnyGroup, Group
from .layout import SEQUENCE_TO_HEADS, Split, Splits, message_view
from .wire import WireFormat

# A message begins at a multiple of so many bytes, the widest access of a thread.
_ALIGNMENT = 16


class Work(Protocol):
    """An exchange in flight."""

    def wait(self) -> list[Tensor]:
        """Waits for the outputs and returns them; called once."""

    def is_completed(self) -> bool:
        """Whether `wait` would return at once."""


class _Encoded(NamedTuple):
    """One tensor as it travels: what is exchanged instead of it, and how it is read afterwards."""

    tensors: list[Tensor]
    scatter: Split
    gather: Split
    decode: Callable[[list[Tensor]], Tensor]


class _QuantisedWork:
    """An exchange of encoded tensors in flight."""

    def __init__(self, work: Work, encoded: list[_Encoded]) -> None:
        self._work = work
        self._encoded = encoded

    def wait(self) -> list[Tensor]:
        return _decoded(self._work.wait(), self._encoded)

    def is_completed(self) -> bool:
        return self._work.is_completed()


def all_to_all(
    way: ModuleType, group: AnyGroup, inputs: Sequence[Tensor], splits: Splits
) -> list[Tensor]:
    """As `way.all_to_all`, with what `splits.wire` says rounded while it travels."""
    outputs: list[Tensor]
    if splits.wire is None:
        outputs = way.all_to_all(group, inputs, splits)
        return outputs
    encoded = _encode(way, group, inputs, splits, splits.wire)
    outputs = way.all_to_all(group, *_exchanged(encoded))
    return _decoded(outputs, encoded)


def start_all_to_all(
    way: ModuleType, group: AnyGroup, inputs: Sequence[Tensor], splits: Splits
) -> Work:
    """As `way.start_all_to_all` with `async_op`; what travels rounded is quantised at once."""
    work: Work
    if splits.wire is None:
        work = way.start_all_to_all(group, inputs, splits, async_op=True)
        return work
    encoded = _encode(way, group, inputs, splits, splits.wire)
    work = way.start_all_to_all(group, *_exchanged(encoded), async_op=True)
    return _QuantisedWork(work, encoded)


def _exchanged(encoded: list[_Encoded]) -> tuple[list[Tensor], Splits]:
    """Returns what travels, and how it is divided."""
    tensors, scatter, gather = [], [], []
    for each in encoded:
        tensors += each.tensors
        scatter += [each.scatter] * len(each.tensors)
        gather += [each.gather] * len(each.tensors)
    return tensors, Splits(tuple(scatter), tuple(gather))


def _decoded(outputs: list[Tensor], encoded: list[_Encoded]) -> list[Tensor]:
    """Returns the tensors that arrived."""
    results, at = [], 0
    for each in encoded:
        results.append(each.decode(outputs[at : at + len(each.tensors)]))
        at += len(each.tensors)
    return results


def _encode(
    way: ModuleType, group: AnyGroup, inputs: Sequence[Tensor], splits: Splits, wire: WireFormat
) -> list[_Encoded]:
    encoded = []
    for tensor, scatter, gather, dtype in zip(
        inputs, splits.scatter, splits.gather, wire.dtypes, strict=True
    ):
        if dtype is None:
            encoded.append(_Encoded([tensor], scatter, gather, lambda outputs: outputs[0]))
            continue
        seeds = None
        if wire.rounding == "stochastic":
            seeds = torch.randint(
                *(-(2**31), 2**31, (*tensor.shape[:-1], 1)),
                generator=wire.generator,
                dtype=torch.int32,
                device=tensor.device,
            )
        is_even = Splits((scatter,), (gather,)).is_even
        if is_even and tensor.numel() and isinstance(group, Group):
            encoded.append(_as_message(tensor, dtype, seeds, scatter.dim, gather.dim, group.size()))
        else:
            encoded.append(_as_two_tensors(way, tensor, dtype, seeds, scatter, gather))
    return encoded


def _as_message(
    tensor: Tensor,
    dtype: torch.dtype,
    seeds: Tensor | None,
    scatter_dim: int,
    gather_dim: int,
    size: int,
) -> _Encoded:
    """One row of bytes for each rank: the payload, then the scales, then padding.

    The rows of all ranks are exchanged as `[1, P, 1, bytes] -> [1, 1, P, bytes]`, for which no way
    copies anything.
    """
    view = message_view(tensor, scatter_dim, size, 0)
    num_bytes = view[0].numel() + view[0].numel() // view.shape[-1] * 4
    stride = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
    sent = torch.empty((1, size, 1, stride), dtype=torch.uint8, device=tensor.device)
    of_rows = None if seeds is None else message_view(seeds, scatter_dim, size, 0)
    quantise_(*_planes(sent, view.shape, dtype), view, of_rows)

    def decode(outputs: list[Tensor]) -> Tensor:
        shape = Splits.output_shape(tensor.shape, Split(scatter_dim), Split(gather_dim), 0, size)
        output = tensor.new_empty(shape)
        to = message_view(output, gather_dim, size, 0)
        dequantise_(to, *_planes(outputs[0], to.shape, dtype))
        return output

    (scatter,), (gather,), _ = SEQUENCE_TO_HEADS
    return _Encoded([sent], scatter, gather, decode)


def _planes(messages: Tensor, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the payload and the scales in the messages `[.., P, .., bytes]`: `shape`, `[.., 1]`.

    Example:
        >>> messages = torch.empty(1, 2, 1, 48, dtype=torch.uint8)  # for 2 ranks
        >>> [plane.shape for plane in _planes(messages, (2, 2, 16), torch.float8_e5m2)]
        [torch.Size([2, 2, 16]), torch.Size([2, 2, 1])]
    """
    rows = messages.view(shape[0], messages.shape[-1])
    num_bytes = math.prod(shape[1:])
    payload = rows[:, :num_bytes].view(dtype).view(shape)
    scales = rows[:, num_bytes : num_bytes + num_bytes // shape[-1] * 4].view(torch.float32)
    return payload, scales.view(*shape[:-1], 1)


def _as_two_tensors(
    way: ModuleType,
    tensor: Tensor,
    dtype: torch.dtype,
    seeds: Tensor | None,
    scatter: Split,
    gather: Split,
) -> _Encoded:
    """The payload `[B, s, H, D]` and the scales `[B, s, H, 1]`, divided as the tensor is.

    Gradients of heads that several ranks hold are added, but fp8 numbers of different scales cannot
    be. So the gradient of each rank arrives as a head of its own, and they are added afterwards.
    """
    payload, scales = torch.ops.fastvideo_comm.quantise(traced.resolved(tensor), dtype, seeds)
    tensors = [payload, scales]
    if way is traced:  # the tensors of one dtype travel in one exchange
        tensors = [each.view(torch.uint8) for each in tensors]

    def decode(outputs: list[Tensor]) -> Tensor:
        numbers, factors = outputs[0].view(dtype), outputs[1].view(torch.float32)
        output: Tensor = torch.ops.fastvideo_comm.dequantise(numbers, factors, tensor.dtype)
        if gather.replicas > 1:
            output = output.unflatten(gather.dim, (-1, gather.replicas)).sum(gather.dim + 1)
        return output

    return _Encoded(tensors, scatter, gather._replace(replicas=1), decode)


@torch.library.custom_op("fastvideo_comm::quantise", mutates_args=())
def _quantise(src: Tensor, dtype: torch.dtype, seeds: Tensor | None) -> tuple[Tensor, Tensor]:
    """`quantise_` into new tensors."""
    payload = torch.empty(src.shape, dtype=dtype, device=src.device)
    scales = torch.empty((*src.shape[:-1], 1), dtype=torch.float32, device=src.device)
    quantise_(payload, scales, src, seeds)
    return payload, scales


@_quantise.register_fake
def _(src: Tensor, dtype: torch.dtype, seeds: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    scales = src.new_empty((*src.shape[:-1], 1), dtype=torch.float32)
    return src.new_empty(src.shape, dtype=dtype), scales


@torch.library.custom_op("fastvideo_comm::dequantise", mutates_args=())
def _dequantise(payload: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`dequantise_` into a new tensor."""
    dst = torch.empty(payload.shape, dtype=dtype, device=payload.device)
    dequantise_(dst, payload, scales)
    return dst


@_dequantise.register_fake
def _(payload: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG001
    return payload.new_empty(payload.shape, dtype=dtype)
