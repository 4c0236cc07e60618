"""The Triton kernel that copies parts of tensors to the places that ranks have posted.

It is `tile_copy`, with two differences. The address of a destination is read from a table when the
kernel runs, and a program copies one tile after the other, so that the grid stays small.

This module is imported at the first launch, so the package can be imported without triton.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plan
from .loading import load
from .plan import ACCESS_BYTES
from .tile_copy import MAX_PAIRS, Layout, _copy_tile, _decoded, _encoded, _plan_launch


class Delivery(NamedTuple):
    """Parts of one tensor, each for another rank, all in the same layout there.

    Attributes:
        src: `[parts, *shape]`, any strides; part i is for rank `first + i`.
        first: The rank of part 0.
        begin: The part that is copied first; then come those behind it, then those before it. Ranks
            begin differently, so that not all of them write to one rank at the same time.
        offset: Bytes from the place of a rank to the first element of its part.
        strides: Those of a part where it is written, in elements.
    """

    src: Tensor
    first: int
    begin: int
    offset: int
    strides: tuple[int, ...]


@triton.jit
def deliver(places, srcs, numbers, parts, TILES: tl.constexpr):
    """Copies tiles to places: `dst[o, r, c] = src[part][o, r, c]`, one tile after the other.

    `srcs`, `numbers` and `TILES` are as in `tile_copy`, with an entry for each delivery; `numbers`
    are those of one part. `parts` has, for each delivery and each as `_encoded`: the number of its
    parts, the rank of part 0, the part to begin with, and two numbers in multiples of `VECTOR`
    elements: the distance of two parts in src, and of a part from the place that it goes to. No
    part is copied for a rank whose place is 0.

    Example, checked by hand: rank 0 of 2 sends `[s=2, H=4, D=2]` int64 by heads, into `[B=1, S=4,
    h=2, D=2]`. Parts are 2 rows of h*D = 4 elements, H*D = 8 apart in src, h*D = 4 apart in dst;
    VECTOR is 2. So a part is one tile, there are 2 parts, and part 1 begins 4 elements behind part
    0: 2 vectors. Rank 0's rows come first in every output: the distance from the place is 0. With
    part 1 to begin with, tile 0 is part 1: it goes to `places[1]`.
    """
    num_tiles = 0
    for delivery in tl.static_range(len(srcs)):
        num_tiles += _num_tiles(numbers[delivery], parts[delivery])
    for index in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        tile = index
        for delivery in tl.static_range(len(srcs)):
            num_tiles_here = _num_tiles(numbers[delivery], parts[delivery])
            if (tile >= 0) & (tile < num_tiles_here):
                _deliver_tile(
                    tile,
                    places,
                    srcs[delivery],
                    numbers[delivery],
                    parts[delivery],
                    TILES,
                    delivery,
                )
            tile -= num_tiles_here


@triton.jit
def _num_tiles(numbers, parts):
    return (_decoded(numbers[0]) * _decoded(parts[0])).to(tl.int32)


@triton.jit
def _deliver_tile(tile, places, src, numbers, parts, TILES: tl.constexpr, DELIVERY: tl.constexpr):
    """A tile of one delivery; `tile` counts from the delivery's first."""
    VECTOR: tl.constexpr = TILES[DELIVERY][0]
    tiles_of_part = _decoded(numbers[0]).to(tl.int32)
    num_parts = _decoded(parts[0]).to(tl.int32)
    part = (tile // tiles_of_part + _decoded(parts[2]).to(tl.int32)) % num_parts
    place = tl.load(places + _decoded(parts[1]) + part)
    if place != 0:
        # Places are multiples of 16; the compiler cannot know it of a number that it loads.
        dst = tl.multiple_of(place.to(src.dtype), 16) + _decoded(parts[4]) * VECTOR
        src += part.to(tl.int64) * _decoded(parts[3]) * VECTOR
        _copy_tile(tile % tiles_of_part, dst, src, numbers, TILES, DELIVERY)


def launch_deliveries(places: Tensor, deliveries: Sequence[Delivery]) -> None:
    """Copies the parts of all deliveries to the places of their ranks; checks nothing.

    Up to `MAX_PAIRS` deliveries take one launch. They take more launches if a part has more dims
    than a launch takes (see `launch_tile_copies`), or if there are almost 2**31 tiles.

    Args:
        places: int64, the address of each rank's place, a multiple of 16, or 0; on the device.
        deliveries: What goes where; all sources are on the device of `places`.
    """
    deliveries = [delivery for delivery in deliveries if delivery.src.numel()]
    for first in range(0, len(deliveries), MAX_PAIRS):
        _launch(places, deliveries[first : first + MAX_PAIRS])


def _launch(places: Tensor, deliveries: Sequence[Delivery]) -> None:
    launch = _plan_launches(*map(_fixed, deliveries))
    if launch is not None:
        launch.run(places, [delivery.src for delivery in deliveries])
    elif len(deliveries) > 1:
        for delivery in deliveries:
            _launch(places, [delivery])
    else:
        launch_deliveries(places, _slices(deliveries[0]))


def _slices(delivery: Delivery) -> list[Delivery]:
    """The same without one dim of the parts."""
    src, first, begin, offset, strides = delivery
    dim = min((size, dim) for dim, size in enumerate(src.shape[1:]) if size > 1)[1]
    others = strides[:dim] + strides[dim + 1 :]
    step = strides[dim] * src.element_size()
    return [
        Delivery(part, first, begin, offset + index * step, others)
        for index, part in enumerate(src.unbind(dim + 1))
    ]


class _Fixed(NamedTuple):
    """What a plan depends on: a delivery without its tensor."""

    layout: Layout  # of a part
    num_parts: int
    first: int
    begin: int
    step: int  # bytes from part to part in src
    offset: int


def _fixed(delivery: Delivery) -> _Fixed:
    src, first, begin, offset, strides = delivery
    num_parts, *shape = src.shape
    itemsize = src.element_size()
    step = src.stride(0) * itemsize if num_parts > 1 else 0
    addresses = offset % ACCESS_BYTES, (src.data_ptr() | step) % ACCESS_BYTES
    layout = (tuple(shape), strides, src.stride()[1:], itemsize, *addresses)
    return _Fixed(layout, num_parts, first, begin, step, offset)


class Launch(NamedTuple):
    """The arguments of one launch of `deliver`, without the tensors.

    `kernels` has the compiled kernel of each device.
    """

    grid: tuple[int, int, int]
    elements: tuple[torch.dtype, ...]
    numbers: tuple[tuple[int, ...], ...]
    parts: tuple[tuple[int, ...], ...]
    tiles: tuple[tuple[int, ...], ...]
    kernels: dict[int | None, Any]

    def run(self, places: Tensor, srcs: Sequence[Tensor]) -> None:
        """Launches it."""
        device = places.device.index
        with torch.accelerator.device_index(device):  # None, on the CPU: no change
            if device not in self.kernels:
                self.kernels[device] = self.load(places, srcs)
            addresses = tuple([src.data_ptr() for src in srcs])
            self.kernels[device][self.grid](
                places.data_ptr(), addresses, self.numbers, self.parts, self.tiles
            )

    def load(self, places: Tensor, srcs: Sequence[Tensor]) -> Any:
        """The compiled kernel, on the current device."""
        return load(
            deliver,
            places,
            tuple(map(triton.reinterpret, srcs, self.elements)),
            self.numbers,
            self.parts,
            grid=self.grid,
            TILES=self.tiles,
            num_warps=plan.NUM_WARPS,
        )


# As in tile_copy.py: planning takes longer than a launch.
@functools.lru_cache(maxsize=256)
def _plan_launches(*deliveries: _Fixed) -> Launch | None:
    """The launch of these deliveries; None if one launch is not enough."""
    copies = _plan_launch(*[delivery.layout for delivery in deliveries])
    if copies is None:
        return None
    num_tiles, parts = 0, []
    for delivery, element, numbers, tile in zip(
        deliveries, copies.elements, copies.numbers, copies.tiles, strict=True
    ):
        vector_bytes = tile[0] * element.itemsize
        num_tiles += (numbers[0] - _encoded(0)) // 2 * delivery.num_parts
        plain = [delivery.num_parts, delivery.first, delivery.begin]
        plain += [delivery.step // vector_bytes, delivery.offset // vector_bytes]
        parts.append(tuple(map(_encoded, plain)))
    # A program's index goes one step beyond the last tile.
    if num_tiles >= 2**31 - plan.MAX_DELIVERY_PROGRAMS:
        return None
    grid = (min(num_tiles, plan.MAX_DELIVERY_PROGRAMS), 1, 1)
    return Launch(grid, copies.elements, copies.numbers, tuple(parts), copies.tiles, {})
