"""From two shapes and strides to one kernel launch: coalescing, alignment, tile shape.

The functions are pure and take integers. Dims are triples `(size, dst_stride, src_stride)`.
`coalesce` counts in bytes, so the same code works for every dtype.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

Dim: TypeAlias = tuple[int, int, int]

# The widest access of one thread: LDG.128, STG.128.
ACCESS_BYTES = 16
# Bytes of one tile. With 4 warps, each thread has four independent 16-byte accesses in flight. This
# was chosen by reasoning and is not measured on a GPU yet: see bench/NOTES.md.
TILE_BYTES = 8192
NUM_WARPS = 4
# If alignment allows narrow accesses only, 16 per thread: more would spill registers.
TILE_ACCESSES = 2048
# Elements of a tile of fp8 rows: 32 for each thread. Not measured on a GPU either.
ROWS_TILE_ELEMENTS = 4096
# Programs of a launch that writes to other GPUs. More writes in flight at a time are slower. The
# number is a guess, too.
MAX_DELIVERY_PROGRAMS = 128
# The kernel takes so many outer dims; the launcher loops over the other dims.
MAX_OUTER = 3


class Plan(NamedTuple):
    """One launch of `tile_copy`, with sizes and strides as the kernel takes them.

    `outer` begins with dst's smallest stride, so that neighbouring programs write neighbouring
    memory.
    """

    element_bytes: int
    vector: int
    transposed: bool
    rows: Dim
    columns: Dim
    outer: list[Dim]
    block_rows: int
    block_columns: int

    @property
    def num_programs(self) -> int:
        """The size of the grid."""
        row_limit = self.rows[0] * (self.vector if self.transposed else 1)
        blocks = math.ceil(row_limit / self.block_rows)
        blocks *= math.ceil(self.columns[0] * self.vector / self.block_columns)
        return blocks * math.prod(size for size, _, _ in self.outer)


def coalesce(
    shape: tuple[int, ...],
    dst_strides: tuple[int, ...],
    src_strides: tuple[int, ...],
    itemsize: int,
) -> tuple[list[Dim], int]:
    """Merges dims that are adjacent in both tensors, as TensorIterator does.

    Args:
        shape: sizes, none of them 0.
        dst_strides: in elements.
        src_strides: in elements.
        itemsize: bytes of one element.

    Returns:
        The remaining dims in bytes, with dst's largest stride first, and the length in bytes of the
        run that is contiguous on both sides. A copy between contiguous tensors has no dims left.

        >>> coalesce((2, 3, 4), (12, 4, 1), (24, 8, 1), 2)  # rows of 4 out of rows of 8
        ([(6, 8, 16)], 8)
    """
    dims = [
        (size, dst * itemsize, src * itemsize)
        for size, dst, src in zip(shape, dst_strides, src_strides, strict=True)
        if size != 1
    ]
    dims.sort(key=lambda dim: (dim[1], dim[2]))
    run = itemsize
    merged: list[Dim] = []
    for size, dst, src in dims:
        inner_size, inner_dst, inner_src = merged[-1] if merged else (run, 1, 1)
        if dst == inner_size * inner_dst and src == inner_size * inner_src:
            if merged:
                merged[-1] = (inner_size * size, inner_dst, inner_src)
            else:
                run *= size
        else:
            merged.append((size, dst, src))
    return merged[::-1], run


def plan_copy(dims: list[Dim], run: int, address: int) -> Plan:
    """Chooses the element, the tile and the programs for coalesced `dims` of runs of `run` bytes.

    `address` is a number that has the common alignment of dst and src.
    """
    strides = [stride for _, *pair in dims for stride in pair]
    granule = math.gcd(run, address, ACCESS_BYTES, *strides)
    if run > granule or not dims:
        return _plan_runs(dims, run, granule)
    return _plan_elements(dims, granule, address)


def _plan_runs(dims: list[Dim], run: int, granule: int) -> Plan:
    """Plans a copy of runs: columns are the run, rows are the largest of the other dims."""
    element_bytes = min(granule, 8)
    vector = granule // element_bytes
    dims = [(size, dst // granule, src // granule) for size, dst, src in dims]
    rows = max(dims, default=(1, 0, 0))  # of the largest size, then of dst's largest stride
    outer = dims[::-1]
    if dims:
        outer.remove(rows)
    block_columns = _fitting_block(run // granule, _tile_accesses(granule))
    block_rows = min(_next_power_of_2(rows[0]), _tile_accesses(granule) // block_columns)
    block_columns *= vector
    columns = (run // granule, 1, 1)
    return Plan(element_bytes, vector, False, rows, columns, outer, block_rows, block_columns)


def _plan_elements(dims: list[Dim], element_bytes: int, address: int) -> Plan:
    """Plans a copy without a common run: columns are dst's innermost dim, rows are src's."""
    if element_bytes == ACCESS_BYTES:  # it is two elements of 8
        return _plan_runs(dims, element_bytes, element_bytes)
    dims = [(size, dst // element_bytes, src // element_bytes) for size, dst, src in dims]
    columns = min(dims, key=lambda dim: dim[1])
    outer = dims[::-1]
    outer.remove(columns)
    # An expanded dim has stride 0 and does not count as innermost.
    rows = min(outer, key=lambda dim: (dim[2] == 0, dim[2]), default=(1, 0, 0))
    if outer:
        outer.remove(rows)
    vector = 1
    transposed = columns[1] == 1 and rows[2] == 1
    if transposed:
        sizes_and_strides = [rows[0], columns[0], rows[1], columns[2]]
        sizes_and_strides += [stride for _, *pair in outer for stride in pair]
        aligned = math.gcd(address, ACCESS_BYTES) // element_bytes
        vector = math.gcd(aligned, *sizes_and_strides)
        rows = (rows[0] // vector, rows[1] // vector, 1)
        columns = (columns[0] // vector, 1, columns[2] // vector)
        outer = [(size, dst // vector, src // vector) for size, dst, src in outer]
    tile = _tile_accesses(vector * element_bytes) * vector
    side = 1 << tile.bit_length() // 2  # a square, or twice as long in src's direction
    row_limit = rows[0] * vector
    block_rows = min(_next_power_of_2(row_limit), side)
    block_columns = min(_next_power_of_2(columns[0] * vector), tile // block_rows)
    block_rows = min(_next_power_of_2(row_limit), tile // block_columns)
    return Plan(element_bytes, vector, transposed, rows, columns, outer, block_rows, block_columns)


def _tile_accesses(access_bytes: int) -> int:
    return min(TILE_ACCESSES, TILE_BYTES // access_bytes)


def _fitting_block(columns: int, limit: int) -> int:
    """Returns the largest power of 2 that wastes few lanes of a tile on `columns` granules.

    The block has at least 8 granules (a 128-byte line), if the run has that many. For example, a
    run of 80 granules takes 5 blocks of 16 without an idle lane, and not one block of 128 with 48
    idle lanes.
    """
    block = min(8, _next_power_of_2(columns))
    best, best_lanes = block, math.inf
    while block <= min(limit, _next_power_of_2(columns)):
        lanes = math.ceil(columns / block) * block
        # A long block may have a few idle lanes: it needs fewer programs and has longer bursts.
        if lanes <= best_lanes or lanes <= columns * 17 // 16:
            best, best_lanes = block, min(lanes, best_lanes)
        block *= 2
    return best


def _next_power_of_2(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
