"""How much memory a pool asks the system for, what it keeps, and what it does if it is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from memory_worlds import num_descriptors

from fastvideo_comm.memory import host, memfd
from fastvideo_comm.memory.host import HostMemory
from fastvideo_comm.memory.memfd import GRANULE, Segment
from fastvideo_comm.memory.segment import Pool


def new_segment(num_bytes: int) -> Segment:
    return Segment(memfd.create(num_bytes), num_bytes)


@pytest.fixture
def alone() -> Iterator[HostMemory]:
    memory, _ = HostMemory.connect(0, 1, lambda payload: [payload], timeout=10, name="alone")
    assert memory is not None
    yield memory
    memory.close()


def test_free_pages_up_to_the_reserve_are_kept_for_ever():
    now = [0.0]
    pool = Pool(new_segment, reserve_bytes=3 * GRANULE, clock=lambda: now[0])
    pool.allocate([10 * GRANULE])
    kept = []
    for _ in range(4):
        now[0] += 61
        assert pool.bytes_in_use == 0
        kept.append(pool.backed_bytes // GRANULE)
    assert kept == [10, 10, 3, 3], "the period of its use, the one behind it, the reserve"
    pool.close()


def test_the_reserve_of_a_memory_is_the_one_that_was_asked_for():
    memory, _ = HostMemory.connect(
        *(0, 1, lambda payload: [payload]), timeout=10, name="alone", reserve_bytes=2 * GRANULE
    )
    assert memory is not None
    memory.allocate([((7 * GRANULE,), torch.uint8)])
    for _ in range(3):
        memory.pool._period_ends = 0.0
        assert memory.pool.bytes_in_use == 0
    assert memory.pool.backed_bytes == 2 * GRANULE
    memory.close()


@pytest.mark.parametrize("keep", [0, 1, 4, 5, 9])
def test_no_more_pages_are_given_back_than_have_to_be(keep):
    pool = Pool(new_segment, segment_bytes=16 * GRANULE)
    held = [pool.allocate([size * GRANULE]) for size in (2, 1, 3, 1, 3)]
    del held[::2]
    assert pool.trim(keep * GRANULE) == min(8, 10 - keep) * GRANULE
    assert pool.backed_bytes == max(keep, 2) * GRANULE, "what is in use stays"
    assert len(held) == 2
    pool.close()


@pytest.mark.parametrize(("wanted", "granules"), [(1, 1), (3 * GRANULE, 3), (3 * GRANULE + 1, 4)])
def test_where_a_large_segment_is_refused_one_of_just_the_size_is_made(wanted, granules):
    asked = []

    def scarce(num_bytes: int) -> Segment:
        asked.append(num_bytes)
        if num_bytes > granules * GRANULE:
            raise OSError("no more memory")
        return new_segment(num_bytes)

    pool = Pool(scarce, segment_bytes=64 * GRANULE)
    run = pool.allocate([wanted])
    assert asked == [64 * GRANULE, granules * GRANULE]
    tensor = torch.frombuffer(run.views[0], dtype=torch.uint8).fill_(7)
    assert tensor.numel() == wanted
    pool.close()


def test_a_segment_is_as_large_as_all_before_it():
    """So a program needs few of them, each of which takes descriptors in all ranks."""
    pool = Pool(new_segment, segment_bytes=4 * GRANULE)
    held = [pool.allocate([4 * GRANULE]) for _ in range(16)]
    assert [each.num_bytes // GRANULE for each in pool.segments] == [4, 4, 8, 16, 32]
    assert len(held) == 16
    pool.close()


def test_pages_are_asked_for_before_anybody_touches_them(monkeypatch):
    """A page that the system cannot give would otherwise kill the process that touches it."""
    asked = []

    def refused(descriptor: int, offset: int, length: int) -> None:
        asked.append((offset, length))
        raise OSError("no space left on device")

    pool = Pool(new_segment, segment_bytes=4 * GRANULE)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", refused)
        with pytest.raises(MemoryError, match=f"refuses {2 * GRANULE} bytes .* no space left"):
            pool.allocate([2 * GRANULE])
    assert asked == [(0, 2 * GRANULE)]
    assert pool.bytes_in_use == 0
    run = pool.allocate([4 * GRANULE])
    assert (run.segment, run.offset) == (0, 0), "nothing was lost"
    pool.close()


def test_a_segment_that_cannot_be_mapped_leaves_no_descriptor(alone, monkeypatch):
    def refused(*_: object) -> Segment:
        raise OSError("no address space")

    before = num_descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(host, "Segment", refused)
        with pytest.raises(MemoryError, match="no address space"):
            alone.allocate([((8,), torch.uint8)])
    assert num_descriptors() == before
    assert alone.allocate([((8,), torch.uint8)]).place == (0, 0)


def test_what_is_given_back_ends_with_a_segment_that_is_no_multiple():
    segment = Segment(memfd.create(GRANULE + 4096), GRANULE + 4096)
    segment.back(0, GRANULE + 4096)
    assert segment.backed_bytes == 2 * GRANULE
    assert segment.give_back(0, GRANULE + 4096, 2 * GRANULE) == 2 * GRANULE
    assert os.fstat(segment.descriptor).st_blocks == 0
    segment.close()
