"""From the copies of a call to the arguments of the kernel that makes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .memfd import aligned

if TYPE_CHECKING:
    from ..kernels.deliver import Delivery


class _Part(NamedTuple):
    """What one rank copies into one output of one other rank."""

    target: int
    src: Tensor
    offset: int  # bytes from the target's place to the first element
    strides: tuple[int, ...]  # there, in elements


def deliveries_of(
    specs_of: Callable[[int], list[tuple[Sequence[int], torch.dtype]]],
    copies_of: Callable[[int, Sequence[Tensor]], list[tuple[Tensor, Tensor]]],
    targets: Sequence[int],
    rank: int,
    world: int,
) -> list[Delivery]:
    """The deliveries of a call; see `DeviceMemory.start` for the first three arguments.

    The targets are served in the order rank + 1, rank + 2, .. Parts of one tensor for all targets
    make one delivery, if they differ only in where they are in the tensor.

    Example:
        >>> x = torch.arange(4).view(2, 2)  # a row for each rank; its output is its row, twice
        >>> def copies_of(target, outputs):
        ...     return [(outputs[0][0], x[target])]
        >>> deliveries = deliveries_of(
        ...     lambda _: [((2, 2), x.dtype)], copies_of, range(2), rank=0, world=2
        ... )
        >>> [(each.src.tolist(), each.begin, each.offset, each.strides) for each in deliveries]
        [([[0, 1], [2, 3]], 1, 0, (1,))]
    """
    from ..kernels.deliver import Delivery

    by_copy: dict[int, list[_Part]] = {}  # parts of all targets, by which copy of a call
    specs: list[tuple[Sequence[int], torch.dtype]] | None = None
    outputs: list[Tensor] = []
    for target in sorted(targets):
        wanted = specs_of(target)
        if wanted is not specs:  # even calls have one list for all ranks
            specs, outputs = wanted, _layouts(wanted)
        for index, (to, src) in enumerate(copies_of(target, outputs)):
            offset = int(to.storage_offset()) * to.element_size()
            by_copy.setdefault(index, []).append(_Part(target, src, offset, to.stride()))
    merged: list[Delivery] = []
    single: list[_Part] = []
    for parts in by_copy.values():
        together = _together(parts) if len(parts) == world else None
        if together is None:
            single += parts
        else:
            begin = (rank + 1) % world
            merged.append(Delivery(together, 0, begin, parts[0].offset, parts[0].strides))
    single.sort(key=lambda part: (part.target - rank - 1) % world)
    return merged + [
        Delivery(part.src[None], part.target, 0, part.offset, part.strides) for part in single
    ]


def _layouts(specs: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[Tensor]:
    """Outputs without memory, which begin as far behind their storage as behind the place."""
    outputs, start = [], 0
    for shape, dtype in specs:
        first, count = start // dtype.itemsize, math.prod(shape)
        whole = torch.empty(first + count, dtype=dtype, device="meta")
        outputs.append(whole[first:].view(tuple(shape)))
        start += aligned(count * dtype.itemsize)
    return outputs


def _together(parts: Sequence[_Part]) -> Tensor | None:
    """`[parts, *shape]`, if the parts differ only in where they are in one tensor."""
    _, src, offset, strides = parts[0]
    step = parts[1].src.data_ptr() - src.data_ptr() if len(parts) > 1 else 0
    for index, part in enumerate(parts):
        if (
            part.src.shape != src.shape
            or part.src.stride() != src.stride()
            or part.src.data_ptr() != src.data_ptr() + index * step
            or (part.offset, part.strides) != (offset, strides)
        ):
            return None
    step //= src.element_size()
    return src.as_strided((len(parts), *src.shape), (step, *src.stride()), src.storage_offset())
