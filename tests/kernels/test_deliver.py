"""Deliveries are `copy_` of every part to its place, for every layout; the kernel in emulation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from emulated_gpu import EmulatedGPU, bytes_of, emulated_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from posted_ranks import Kernels, imported_kernels
from strided_layouts import (
    DTYPES,
    NAMED_PAIRS,
    StridedLayout,
    pairs_of_layouts,
    random_buffer,
)
from test_native_kernel import CAPABILITIES, share

from fastvideo_comm.kernels import plan


@pytest.fixture(scope="module", params=CAPABILITIES)
def gpu(request: pytest.FixtureRequest, emulated_gpu_directory: Path) -> Iterator[EmulatedGPU]:
    with emulated_gpu(emulated_gpu_directory, CAPABILITIES[request.param]) as gpu:
        yield gpu


@pytest.fixture(scope="module")
def kernels(gpu: EmulatedGPU) -> Iterator[Kernels]:
    with imported_kernels() as kernels:
        yield kernels


class Parts(NamedTuple):
    """Parts of one tensor for some ranks: part i of `src`, which is for rank `first + i`."""

    dst: StridedLayout
    src: StridedLayout
    dtype: torch.dtype
    first: int
    begin: int


def parts_of(
    layouts: tuple[StridedLayout, StridedLayout],
    dtype: torch.dtype,
    num_parts: int,
    *,
    first: int = 0,
    begin: int = 0,
    gap: int = 0,
) -> Parts:
    """Parts of one layout behind each other, so many elements between them."""
    dst, src = layouts
    step = src.num_elements() + gap if num_parts > 1 else 0
    whole = StridedLayout((num_parts, *src.shape), (step, *src.strides), src.offset)
    return Parts(dst, whole, dtype, first, begin)


@st.composite
def some_parts(draw: st.DrawFn, world: int) -> Parts:
    first = draw(st.integers(0, world - 1))
    num_parts = draw(st.integers(1, world - first))
    return parts_of(
        draw(pairs_of_layouts()),
        draw(st.sampled_from(DTYPES)),
        num_parts,
        first=first,
        begin=draw(st.integers(0, num_parts - 1)),
        gap=draw(st.sampled_from((0, 1, 16))),
    )


def assert_delivered_like_torch(
    gpu: EmulatedGPU, kernels: Kernels, all_parts: Sequence[Parts], world: int, absent: int = -1
) -> None:
    """Every rank's memory, with all around the parts, is as `copy_` leaves it; none for `absent`.

    The parts stand behind each other in the memory of each rank, which begins at its place.
    """
    starts, end = [], 0
    for parts in all_parts:
        starts.append(end)
        end += -(-parts.dst.num_elements() * parts.dtype.itemsize // 16) * 16
    memories = [random_buffer(end + 16, torch.uint8, rank, "cpu") for rank in range(world)]
    expected = [memory.clone() for memory in memories]
    deliveries: list[Any] = []
    for seed, (parts, start) in enumerate(zip(all_parts, starts, strict=True)):
        src = parts.src.of(random_buffer(parts.src.num_elements(), parts.dtype, seed, "cpu"))
        offset = start + parts.dst.offset * parts.dtype.itemsize
        deliveries.append(
            kernels.deliver.Delivery(src, parts.first, parts.begin, offset, parts.dst.strides)
        )
        for rank, part in enumerate(src, parts.first):
            if rank != absent:
                stop = start + parts.dst.num_elements() * parts.dtype.itemsize
                there = expected[rank][start:stop].clone().view(parts.dtype)
                parts.dst.of(there).copy_(part)
                expected[rank][start:stop] = there.view(torch.uint8)
    places = torch.tensor([0 if r == absent else memories[r].data_ptr() for r in range(world)])
    readable = [bytes_of(places), *[bytes_of(delivery.src) for delivery in deliveries]]
    present = [memory for rank, memory in enumerate(memories) if rank != absent]
    with gpu.accesses(readable, [bytes_of(memory) for memory in present]):
        kernels.deliver.launch_deliveries(places, deliveries)
    for memory, right in zip(memories, expected, strict=True):
        assert torch.equal(memory, right)


# Every example is compiled.
@settings(max_examples=4)
@given(st.data())
def test_parts_of_any_layout_go_to_their_ranks_and_nothing_else(gpu, kernels, data):
    world = data.draw(st.integers(1, 4))
    parts = data.draw(st.lists(some_parts(world), min_size=1, max_size=2))
    assert_delivered_like_torch(gpu, kernels, parts, world)


def test_every_kind_of_layout_beside_every_other(request, gpu, kernels):
    """In one launch."""
    dtypes = (torch.bfloat16, torch.int8, torch.float32)
    parts = [
        parts_of(pair, dtypes[index % 3], 2, first=1, begin=1)
        for index, pair in enumerate(share(request, NAMED_PAIRS.values()))
    ]
    before = gpu.num_launches
    assert_delivered_like_torch(gpu, kernels, parts, world=3)
    assert gpu.num_launches == before + 1


def test_parts_at_an_odd_distance_are_copied_by_narrow_accesses(request, gpu, kernels):
    contiguous = StridedLayout((3, 64), (64, 1), 0)
    for gap in share(request, (0, 1, 2, 4, 8)):
        parts = parts_of((contiguous, contiguous), torch.int8, 3, gap=gap)
        assert_delivered_like_torch(gpu, kernels, [parts], world=3)


def test_no_part_goes_to_a_rank_that_did_not_come(gpu, kernels):
    parts = parts_of(NAMED_PAIRS["even runs in odd rows of src"], torch.bfloat16, 3, begin=1)
    assert_delivered_like_torch(gpu, kernels, [parts], world=3, absent=1)


def test_parts_without_elements_launch_nothing(gpu, kernels):
    empty = StridedLayout((3, 0), (1, 1), 0)
    before = gpu.num_launches
    parts = parts_of((empty, empty), torch.int8, 2)
    assert_delivered_like_torch(gpu, kernels, [parts], world=2)
    assert gpu.num_launches == before


@pytest.mark.parametrize("num_dims", [6, 7])
def test_parts_of_more_dims_than_a_launch_takes(gpu, kernels, num_dims):
    """No two dims merge, so the launcher goes over the smallest."""
    shape = (2, 3, 2, 3, 2, 2, 4)[-num_dims:]
    dst, src = [1], [1]
    for size in reversed(shape[1:]):
        dst.insert(0, dst[0] * size + 1)
        src.insert(0, src[0] * size + 2)
    layouts = (StridedLayout(shape, tuple(dst), 0), StridedLayout(shape, tuple(src), 0))
    before = gpu.num_launches
    parts = parts_of(layouts, torch.int8, 2, begin=1, gap=3)
    assert_delivered_like_torch(gpu, kernels, [parts] * 2, world=2)
    assert gpu.num_launches > before + 1


@pytest.mark.parametrize("begin", range(3))
def test_a_program_goes_around_the_ranks_from_the_part_to_begin_with(
    gpu, kernels, monkeypatch, begin
):
    """All parts go to one place, so the last one stays."""
    monkeypatch.setattr(plan, "MAX_DELIVERY_PROGRAMS", 1)
    src = torch.arange(3.0).repeat_interleave(8).view(3, 8)
    memory = torch.zeros(8)
    places = torch.tensor([memory.data_ptr()] * 3)
    with gpu.accesses([bytes_of(places), bytes_of(src)], [bytes_of(memory)]):
        kernels.deliver.launch_deliveries(
            places, [kernels.deliver.Delivery(src, 0, begin, 0, (1,))]
        )
    assert memory.tolist() == [(begin - 1) % 3] * 8


def test_the_index_of_a_program_stays_below_2_31_one_step_beyond_the_last_tile():
    """It is a number of 32 bits: otherwise it would start again from below zero."""
    deliver = pytest.importorskip("fastvideo_comm.kernels.deliver", reason="needs triton")

    def launch(num_tiles: int) -> Any:
        layout = (num_tiles * plan.TILE_BYTES,), (1,), (1,), 1, 0, 0
        return deliver._plan_launches(deliver._Fixed(layout, 1, 0, 0, 0, 0))

    most = 2**31 - 1 - plan.MAX_DELIVERY_PROGRAMS
    assert launch(most).grid == (plan.MAX_DELIVERY_PROGRAMS, 1, 1)
    assert launch(most + 1) is None
