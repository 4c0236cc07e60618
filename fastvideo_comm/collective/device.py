"""The collectives of ranks on GPUs that can write into each other's memory: no autograd.

`all_to_all`, `all_gather`, `reduce_scatter` and `gather` go by memory. All ranks know from the
shapes how much the outputs of a call take on any rank. Where that is more than the staging, the
call goes by messages, on all ranks. The other collectives always go by messages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..memory.memfd import aligned
from . import memory, messages
from .group import Group
from .layout import Split, Splits
from .memory_call import Work
from .messages import add_buckets, all_reduce, barrier, broadcast, recv, reduce, send
from .traced import resolved

__all__ = [
    "add_buckets",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "gather",
    "recv",
    "reduce",
    "reduce_scatter",
    "send",
    "start_all_to_all",
]


def all_to_all(group: Group, inputs: Sequence[Tensor], splits: Splits) -> list[Tensor]:
    """Trades `inputs` and waits for the outputs, each contiguous."""
    return start_all_to_all(group, inputs, splits, async_op=False).wait()


def start_all_to_all(
    group: Group, inputs: Sequence[Tensor], splits: Splits, *, async_op: bool
) -> Work | messages.Work:
    """Launches the exchange; the current stream waits for it in `wait()`."""
    size = group.size()
    needed = [0] * (1 if splits.is_even else size)
    for input_, scatter, gather in zip(inputs, splits.scatter, splits.gather, strict=True):
        for owner in range(len(needed)):
            shape = splits.output_shape(input_.shape, scatter, gather, owner, size)
            terms = gather.replicas  # what is added up arrives term by term
            needed[owner] += aligned(math.prod(shape) * terms * input_.element_size())
    way = _way(group, needed)
    inputs = [resolved(input_) for input_ in inputs]
    work: Work | messages.Work = way.start_all_to_all(group, inputs, splits, async_op=async_op)
    return work


def all_gather(group: Group, input_: Tensor, split: Split) -> Tensor:
    """`[A, c, ..] -> [A, P*c, ..]`: every rank's tensor side by side along the split's dim."""
    shape = list(input_.shape)
    shape[split.dim] = split.whole(shape[split.dim], group.size())
    way = _way(group, [_bytes(shape, input_.dtype)])
    output: Tensor = way.all_gather(group, resolved(input_), split)
    return output


def reduce_scatter(group: Group, input_: Tensor, split: Split) -> Tensor:
    """`[A, P*c, ..] -> [A, c, ..]`: the sum over ranks of this rank's part of the split's dim."""
    size, needed = group.size(), []
    for owner in range(size):
        shape = list(input_.shape)
        shape[split.dim] = split.part(shape[split.dim], owner, size)
        needed.append(size * _bytes(shape, input_.dtype))
    output: Tensor = _way(group, needed).reduce_scatter(group, resolved(input_), split)
    return output


def gather(group: Group, input_: Tensor, dst: int, dim: int) -> Tensor | None:
    """As `all_gather`, on rank `dst` only; None elsewhere."""
    way = _way(group, [aligned(group.size() * input_.nbytes)])
    output: Tensor | None = way.gather(group, resolved(input_), dst, dim)
    return output


def _bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return aligned(math.prod(shape) * dtype.itemsize)


def _way(group: Group, needed: Iterable[int]) -> ModuleType:
    """By memory if outputs of so many bytes fit into the staging of every rank."""
    connected = group.device_memory
    if connected is None or max(needed) > connected.staging_bytes:
        return messages
    return memory
