"""The exchange of tensors that travel as fp8: quantise, exchange, dequantise.

Each row of D elements becomes a row of fp8 numbers, the payload, and one float32 scale. Payload and
scales travel as they are on whichever way the group goes, so all ways give the same bits.

In eager code an even exchange quantises straight into the messages, and dequantises straight out of
them: one message for each rank holds the payload and behind it the scales. In all other cases the
payload `[B, s, H, D]` and the scales `[B, s, H, 1]` are exchanged as two tensors. In compiled code,
quantising is an operator of its own, because a compiler may divide less exactly.

A large tensor on the CPU that goes by messages is divided into pieces, each with an exchange of its
own. While one piece travels, the next one is quantised and the one before is dequantised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..kernels import dequantise_, quantise_
from . import messages, traced
from .group import AnyGroup, Group
from .layout import SEQUENCE_TO_HEADS, Split, Splits, message_view
from .wire import WireFormat

# A message begins at a multiple of so many bytes, the widest access of a thread.
_ALIGNMENT = 16
# A tensor travels in pieces of at least so many bytes, and in at most so many pieces. The
# measurement is in bench/NOTES.md, "The fp8 wire on the CPU".
PIECE_BYTES = 1 << 20
MAX_PIECES = 4


class Work(Protocol):
    """An exchange in flight."""

    def wait(self) -> list[Tensor]:
        """Waits for the outputs and returns them; called once."""

    def is_completed(self) -> bool:
        """Whether `wait` would return at once."""


class _Part(NamedTuple):
    """One tensor, or a piece of one, as it travels.

    `encode` makes what is exchanged instead of it, divided as `scatter` and `gather` say. `decode`
    makes of the tensors that arrive the output with this number, or writes a piece of it.
    """

    number: int
    encode: Callable[[], list[Tensor]]
    scatter: Split
    gather: Split
    decode: Callable[[Iterator[Tensor]], Tensor]


class _Exchanges:
    """Exchanges of parts in flight."""

    def __init__(self, works: list[Work], batches: list[list[_Part]]) -> None:
        self._works = works
        self._batches = batches

    def wait(self) -> list[Tensor]:
        results: dict[int, Tensor] = {}
        for work, parts in zip(self._works, self._batches, strict=True):
            results |= _decoded(work.wait(), parts)
        return [results[index] for index in sorted(results)]

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


def all_to_all(
    way: ModuleType, group: AnyGroup, inputs: Sequence[Tensor], splits: Splits, wire: WireFormat
) -> list[Tensor]:
    """As `way.all_to_all`, with what `wire` says rounded while it travels."""
    parts, *pieces = batches = _batches(way, group, inputs, splits, wire)
    if pieces:
        return _start(way, group, batches).wait()
    outputs = way.all_to_all(group, *_exchanged(parts))
    results = _decoded(outputs, parts)
    return [results[index] for index in range(len(inputs))]


def start_all_to_all(
    way: ModuleType, group: AnyGroup, inputs: Sequence[Tensor], splits: Splits
) -> Work:
    """As `way.start_all_to_all` with `async_op`; what travels rounded is quantised at once."""
    work: Work
    if splits.wire is None:
        work = way.start_all_to_all(group, inputs, splits, async_op=True)
        return work
    return _start(way, group, _batches(way, group, inputs, splits, splits.wire))


def _start(way: ModuleType, group: AnyGroup, batches: list[list[_Part]]) -> Work:
    """Starts one exchange after the other; each travels while the next one is quantised."""
    works = [way.start_all_to_all(group, *_exchanged(parts), async_op=True) for parts in batches]
    return _Exchanges(works, batches)


def _exchanged(parts: list[_Part]) -> tuple[list[Tensor], Splits]:
    """Returns what travels, and how it is divided."""
    tensors, scatter, gather = [], [], []
    for part in parts:
        encoded = part.encode()
        tensors += encoded
        scatter += [part.scatter] * len(encoded)
        gather += [part.gather] * len(encoded)
    return tensors, Splits(tuple(scatter), tuple(gather))


def _decoded(outputs: list[Tensor], parts: list[_Part]) -> dict[int, Tensor]:
    """Returns the tensors that arrived, by their numbers."""
    arrived = iter(outputs)
    return {part.number: part.decode(arrived) for part in parts}


def _batches(
    way: ModuleType, group: AnyGroup, inputs: Sequence[Tensor], splits: Splits, wire: WireFormat
) -> list[list[_Part]]:
    """Returns what travels in each exchange: all tensors together, then each piece by itself.

    Tensors that are not quantised begin to travel first.
    """
    together, pieces = [], []
    for number, (tensor, scatter, gather, dtype) in enumerate(
        zip(inputs, splits.scatter, splits.gather, wire.dtypes, strict=True)
    ):
        if dtype is None:
            together.append(_exact(number, tensor, scatter, gather))
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
        if not is_even or not tensor.numel() or not isinstance(group, Group):
            together.append(_as_two_tensors(number, way, tensor, dtype, seeds, scatter, gather))
            continue
        num_pieces = 1
        if way is messages and tensor.is_cpu:
            num_pieces = max(1, min(MAX_PIECES, tensor.numel() // PIECE_BYTES))
        dims = scatter.dim, gather.dim
        parts = _as_messages(number, tensor, dtype, seeds, *dims, group.size(), num_pieces)
        if len(parts) == 1:
            together += parts
        else:
            pieces += [[part] for part in parts]
    return [together, *pieces] if together else pieces


def _exact(number: int, tensor: Tensor, scatter: Split, gather: Split) -> _Part:
    """The tensor as it is."""
    return _Part(number, lambda: [tensor], scatter, gather, next)


def _as_messages(
    number: int,
    tensor: Tensor,
    dtype: torch.dtype,
    seeds: Tensor | None,
    scatter_dim: int,
    gather_dim: int,
    size: int,
    num_pieces: int,
) -> list[_Part]:
    """Pieces of about the same size, along the longest dim of a message."""
    view = message_view(tensor, scatter_dim, size, 0)
    shape = Splits.output_shape(tensor.shape, Split(scatter_dim), Split(gather_dim), 0, size)
    output = tensor.new_empty(shape)
    to = message_view(output, gather_dim, size, 0)
    of_rows = None if seeds is None else message_view(seeds, scatter_dim, size, 0)
    dim = max(range(1, view.dim() - 1), key=view.shape.__getitem__)
    length = -(-view.shape[dim] // num_pieces)
    starts = range(0, view.shape[dim], length)
    of_pieces = [None] * len(starts) if of_rows is None else of_rows.split(length, dim)
    pieces = zip(view.split(length, dim), of_pieces, to.split(length, dim), strict=True)
    return [
        _as_message(number, from_, seeds_of, dtype, place, output)
        for from_, seeds_of, place in pieces
    ]


def _as_message(
    number: int, view: Tensor, seeds: Tensor | None, dtype: torch.dtype, to: Tensor, output: Tensor
) -> _Part:
    """One row of bytes for each rank: the payload, then the scales, then padding.

    `view [P, ..]` is what goes to each rank, `to` the place in `output` of what comes from each.
    The rows of all ranks are exchanged as `[1, P, 1, bytes] -> [1, 1, P, bytes]`, for which no way
    copies anything.
    """
    size = view.shape[0]
    num_bytes = view[0].numel() + view[0].numel() // view.shape[-1] * 4
    stride = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT

    def encode() -> list[Tensor]:
        sent = torch.empty((1, size, 1, stride), dtype=torch.uint8, device=view.device)
        quantise_(*_planes(sent, view.shape, dtype), view, seeds)
        return [sent]

    def decode(arrived: Iterator[Tensor]) -> Tensor:
        dequantise_(to, *_planes(next(arrived), to.shape, dtype))
        return output

    (scatter,), (gather,), _ = SEQUENCE_TO_HEADS
    return _Part(number, encode, scatter, gather, decode)


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
    number: int,
    way: ModuleType,
    tensor: Tensor,
    dtype: torch.dtype,
    seeds: Tensor | None,
    scatter: Split,
    gather: Split,
) -> _Part:
    """The payload `[B, s, H, D]` and the scales `[B, s, H, 1]`, divided as the tensor is.

    Gradients of heads that several ranks hold are added, but fp8 numbers of different scales cannot
    be. So the gradient of each rank arrives as a head of its own, and they are added afterwards.
    """

    def encode() -> list[Tensor]:
        payload, scales = torch.ops.fastvideo_comm.quantise(traced.resolved(tensor), dtype, seeds)
        if way is traced:  # the tensors of one dtype travel in one exchange
            return [payload.view(torch.uint8), scales.view(torch.uint8)]
        return [payload, scales]

    def decode(arrived: Iterator[Tensor]) -> Tensor:
        numbers, factors = next(arrived).view(dtype), next(arrived).view(torch.float32)
        output: Tensor = torch.ops.fastvideo_comm.dequantise(numbers, factors, tensor.dtype)
        if gather.replicas > 1:
            output = output.unflatten(gather.dim, (-1, gather.replicas)).sum(gather.dim + 1)
        return output

    return _Part(number, encode, scatter, gather._replace(replicas=1), decode)


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
