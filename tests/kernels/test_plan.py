"""Coalescing and tiling: the same bytes go to the same places, in the widest units there are."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from production_copies import ProductionCopy, production_copies
from strided_layouts import NAMED_PAIRS, StridedLayout, pairs_of_layouts
from torch import Tensor

from fastvideo_comm.kernels.plan import ACCESS_BYTES, MAX_OUTER, Dim, Plan, coalesce, plan_copy

ITEMSIZES = st.sampled_from((1, 2, 4, 8, 16))


def _plan(dst: StridedLayout, src: StridedLayout, itemsize: int) -> Plan:
    dims, run = coalesce(dst.shape, dst.strides, src.strides, itemsize)
    return plan_copy(dims, run, (dst.offset | src.offset) * itemsize)


def _pairs(dims: list[Dim]) -> Tensor:
    """The (dst, src) offsets of every index, as one sorted number each."""
    dst = src = torch.zeros(1, dtype=torch.int64)
    for size, to, fro in dims:
        steps = torch.arange(size)
        dst = (dst[:, None] + steps * to).flatten()
        src = (src[:, None] + steps * fro).flatten()
    return (dst * 2**32 + src).sort().values


def _bytes_of_layouts(dst: StridedLayout, src: StridedLayout, itemsize: int) -> list[Dim]:
    dims = zip(dst.shape, dst.strides, src.strides, strict=True)
    return [(size, to * itemsize, fro * itemsize) for size, to, fro in dims] + [(itemsize, 1, 1)]


def _bytes_of_plan(plan: Plan) -> list[Dim]:
    """What the kernel does with the plan's numbers, as dims in bytes."""
    width = plan.element_bytes
    row_vector, column_vector = (1, plan.vector) if plan.transposed else (plan.vector, 1)
    rows, columns = plan.rows, plan.columns
    return [
        *(
            (size, to * plan.vector * width, fro * plan.vector * width)
            for size, to, fro in plan.outer
        ),
        (rows[0] * column_vector, rows[1] * plan.vector * width, rows[2] * row_vector * width),
        (columns[0] * plan.vector, columns[1] * width, columns[2] * column_vector * width),
        (width, 1, 1),
    ]


@given(pairs_of_layouts(), ITEMSIZES)
def test_coalesced_dims_pair_the_same_bytes_as_the_strides(layouts, itemsize):
    dst, src = layouts
    if 0 in dst.shape:  # not planned: nothing is launched
        return
    dims, run = coalesce(dst.shape, dst.strides, src.strides, itemsize)
    assert torch.equal(_pairs([*dims, (run, 1, 1)]), _pairs(_bytes_of_layouts(dst, src, itemsize)))


@given(pairs_of_layouts(), ITEMSIZES)
def test_coalesced_dims_merge_no_further_and_stand_in_the_order_of_dst(layouts, itemsize):
    dst, src = layouts
    if 0 in dst.shape:
        return
    dims, run = coalesce(dst.shape, dst.strides, src.strides, itemsize)
    assert [stride for _, stride, _ in dims] == sorted(
        (stride for _, stride, _ in dims), reverse=True
    )
    for (_, *outer), inner in itertools.pairwise([*dims, (run, 1, 1)]):
        assert tuple(outer) != tuple(inner[0] * stride for stride in inner[1:])


def _assert_pairs_the_same_bytes(dst: StridedLayout, src: StridedLayout, itemsize: int) -> None:
    assert torch.equal(
        _pairs(_bytes_of_plan(_plan(dst, src, itemsize))),
        _pairs(_bytes_of_layouts(dst, src, itemsize)),
    )


def _assert_aligned(dst: StridedLayout, src: StridedLayout, itemsize: int) -> None:
    """The kernel's strides are multiples of VECTOR elements; so are the bytes they stand for."""
    plan = _plan(dst, src, itemsize)
    access = plan.element_bytes * plan.vector
    assert access <= ACCESS_BYTES
    assert dst.offset * itemsize % access == 0
    assert src.offset * itemsize % access == 0
    for size, to, fro in _bytes_of_plan(plan)[:-1]:
        # A dim that is contiguous on one side is walked in steps of an element there.
        assert to % access == 0 or (to == plan.element_bytes and size * to % access == 0)
        assert fro % access == 0 or (fro == plan.element_bytes and size * fro % access == 0)


@given(pairs_of_layouts(), ITEMSIZES)
def test_a_plan_pairs_the_same_bytes_as_the_strides(layouts, itemsize):
    if 0 not in layouts[0].shape:
        _assert_pairs_the_same_bytes(*layouts, itemsize)


@given(pairs_of_layouts(), ITEMSIZES)
def test_every_access_of_a_plan_is_aligned(layouts, itemsize):
    if 0 not in layouts[0].shape:
        _assert_aligned(*layouts, itemsize)


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("layouts", NAMED_PAIRS.values(), ids=NAMED_PAIRS)
def test_a_plan_of_every_kind_of_layout_pairs_the_same_bytes_aligned(layouts, itemsize):
    _assert_pairs_the_same_bytes(*layouts, itemsize)
    _assert_aligned(*layouts, itemsize)


@pytest.mark.parametrize("layouts", NAMED_PAIRS.values(), ids=NAMED_PAIRS)
def test_neighbouring_programs_write_neighbouring_memory(layouts):
    strides = [to for _, to, _ in _plan(*layouts, 2).outer]
    assert strides == sorted(strides)


@given(pairs_of_layouts(), ITEMSIZES)
def test_tiles_are_powers_of_2_that_cover_every_element_once(layouts, itemsize):
    dst, src = layouts
    if 0 in dst.shape:
        return
    plan = _plan(dst, src, itemsize)
    *outer, rows, columns, _ = _bytes_of_plan(plan)
    for block in (plan.block_rows, plan.block_columns):
        assert block & (block - 1) == 0
    assert plan.num_programs == math.prod(size for size, _, _ in outer) * math.ceil(
        rows[0] / plan.block_rows
    ) * math.ceil(columns[0] / plan.block_columns)
    # No tile is mostly beside the tensor.
    assert plan.block_rows < 2 * rows[0]
    assert plan.block_columns < 2 * columns[0]


@pytest.mark.parametrize(
    ("shape", "strides", "dims", "run"),
    [
        ((), (), [], 2),
        ((1, 1), (7, 9), [], 2),
        ((4, 5), (5, 1), [], 40),
        ((4, 5), (1, 4), [], 40),  # the same order on both sides, whatever it is
        ((4, 1, 5), (10, 3, 1), [(4, 20, 20)], 10),
        ((5,), (2,), [(5, 4, 4)], 2),
    ],
)
def test_two_tensors_of_the_same_strides_are_one_run_where_they_are_dense(
    shape, strides, dims, run
):
    assert coalesce(shape, strides, strides, 2) == (dims, run)


def _plan_of(copy: ProductionCopy) -> Plan:
    itemsize = copy.dst.element_size()
    address = (copy.dst.storage_offset() | copy.src.storage_offset()) * itemsize
    shape = tuple(copy.dst.shape)
    return plan_copy(*coalesce(shape, copy.dst.stride(), copy.src.stride(), itemsize), address)


def test_production_copies_are_one_launch_of_16_byte_accesses_with_no_lane_idle():
    for copy in production_copies():
        plan = _plan_of(copy)
        assert len(plan.outer) <= MAX_OUTER, copy.name
        assert plan.element_bytes * plan.vector == ACCESS_BYTES, copy.name
        assert not plan.transposed, copy.name
        # Only the last tile of a run longer than a tile, or of a sequence, may reach over its end.
        columns = plan.columns[0] * plan.vector
        assert columns % plan.block_columns == 0 or columns > 64 * plan.block_columns, copy.name
        rows = plan.rows[0]
        lanes = math.ceil(rows / plan.block_rows) * plan.block_rows
        assert lanes - rows < plan.block_rows, copy.name
        assert lanes <= rows * 1.05, copy.name


def test_runs_of_production_copies_are_read_and_written_in_whole_lines():
    for copy in production_copies():
        plan = _plan_of(copy)
        run = plan.columns[0] * ACCESS_BYTES
        tile_run = plan.block_columns * plan.element_bytes
        assert tile_run >= min(run, 128), copy.name


def test_a_transpose_is_planned_along_both_contiguous_dims():
    plan = plan_copy(*coalesce((640, 512), (512, 1), (1, 640), 2), 0)
    assert plan.transposed
    assert plan.vector == 8
    assert plan.rows == (80, 64, 1)
    assert plan.columns == (64, 1, 80)
    assert (plan.block_rows, plan.block_columns) == (64, 64)


@pytest.mark.parametrize(("itemsize", "vector"), [(1, 16), (2, 8), (4, 4), (8, 2)])
def test_a_transpose_of_every_width_is_staged(itemsize, vector):
    plan = plan_copy(*coalesce((640, 512), (512, 1), (1, 640), itemsize), 0)
    assert plan.transposed
    assert (plan.element_bytes, plan.vector) == (itemsize, vector)
    assert {type(plan.block_rows), type(plan.block_columns)} == {int}


def test_a_transpose_of_16_bytes_is_not_staged():
    """Every element is as wide as an access: there is nothing to gain."""
    plan = plan_copy(*coalesce((640, 512), (512, 1), (1, 640), 16), 0)
    assert not plan.transposed
    assert (plan.element_bytes, plan.vector) == (8, 2)


@pytest.mark.parametrize(("dst", "src"), [(2, 3), (1, 2), (2, 1)])
def test_single_elements_of_one_dim_are_a_row_that_is_not_staged(dst, src):
    plan = plan_copy(*coalesce((5,), (dst,), (src,), 2), 0)
    assert plan.rows == (1, 0, 0)
    assert plan.columns == (5, dst, src)
    assert not plan.transposed


def test_a_copy_of_contiguous_tensors_is_one_row():
    plan = plan_copy(*coalesce((64, 128), (128, 1), (128, 1), 2), 0)
    assert (plan.rows, plan.columns) == ((1, 0, 0), (1024, 1, 1))


def test_the_programs_of_a_transpose_write_neighbouring_memory():
    shape = (3, 5, 7, 64, 32)
    dst = (5 * 7 * 2048, 7 * 2048, 2048, 32, 1)
    src = (2048, 3 * 2048, 3 * 5 * 2048, 1, 64)
    plan = plan_copy(*coalesce(shape, dst, src, 2), 0)
    assert plan.transposed
    assert [size for size, _, _ in plan.outer] == [7, 5, 3]


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("layouts", NAMED_PAIRS.values(), ids=NAMED_PAIRS)
def test_a_plan_holds_integers_and_a_bool(layouts, itemsize):
    """Triton compiles for the type of a number: 2.0 is another kernel than 2."""
    plan = _plan(*layouts, itemsize)
    dims = [*plan.rows, *plan.columns, *(number for dim in plan.outer for number in dim)]
    numbers = [*dims, plan.element_bytes, plan.vector, plan.block_rows, plan.block_columns]
    assert {type(number) for number in [*numbers, plan.num_programs]} == {int}
    assert type(plan.transposed) is bool


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_transpose_beside_an_expanded_dim_is_planned_like_one_alone(position):
    """An expanded dim has stride 0 in src, which is less than that of src's contiguous dim."""
    shape, dst_strides, src_strides = [640, 512], [512, 1], [1, 640]
    shape.insert(position, 3)
    dst_strides.insert(position, 640 * 512)
    src_strides.insert(position, 0)
    dims, run = coalesce(tuple(shape), tuple(dst_strides), tuple(src_strides), 2)
    plan = plan_copy(dims, run, 0)
    assert plan.transposed
    assert (plan.rows, plan.columns) == ((80, 64, 1), (64, 1, 80))
    assert plan.outer == [(3, 640 * 512 // 8, 0)]


@pytest.mark.parametrize(
    ("granules", "block"),
    [(1, 1), (5, 8), (8, 8), (48, 16), (80, 16), (96, 32), (160, 32), (192, 64), (320, 64)],
)
def test_a_run_is_cut_into_blocks_that_leave_no_lane_idle(granules, block):
    """Runs of h*D elements: 80 granules of 16 bytes are 5 heads of 128 in bf16."""
    row = 16 * granules
    plan = plan_copy([(1000, row, 2 * row)], row, 0)
    assert plan.block_columns == block * plan.vector


@pytest.mark.parametrize(
    ("granules", "block"),
    [
        (9, 16),  # 16 lanes, as with blocks of 8
        (72, 8),  # 80 lanes with blocks of 16: more than 76
        (136, 16),  # 144 lanes, which is the most for 136
    ],
)
def test_a_longer_block_has_one_lane_in_16_idle_or_no_more_than_a_shorter_one(granules, block):
    row = 16 * granules
    plan = plan_copy([(1000, row, 2 * row)], row, 0)
    assert plan.block_columns == block * plan.vector


@pytest.mark.parametrize(("address", "access"), [(0, 16), (8, 8), (4, 4), (2, 2), (6, 2), (1, 1)])
def test_the_access_is_as_wide_as_the_addresses_are_aligned(address, access):
    plan = plan_copy([], 4096, address)
    assert plan.element_bytes * plan.vector == access
