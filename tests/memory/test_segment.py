"""The pool: blocks do not overlap, come back when nobody holds them, and leave no page unneeded."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import random
import sys
import threading
import time
import weakref
from types import FrameType
from typing import Any

import memory_worlds as worlds
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interruption import Interruption

from fastvideo_comm.memory import memfd, segment
from fastvideo_comm.memory.memfd import GRANULE, Segment, aligned
from fastvideo_comm.memory.segment import Pool, Run

FILES = (segment.__file__, memfd.__file__)


def new_segment(num_bytes: int) -> Segment:
    return Segment(memfd.create(num_bytes), num_bytes)


@pytest.fixture(autouse=True, scope="module")
def quick_garbage_collection():
    """What stands before these tests is not looked through again and again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def pool():
    made = Pool(new_segment, segment_bytes=4 * GRANULE)
    yield made
    made.close()


def tensors(run: Run) -> list[torch.Tensor]:
    return [torch.frombuffer(view, dtype=torch.uint8) for view in run.views if view is not None]


def where(pool: Pool, tensor: torch.Tensor) -> tuple[int, int]:
    """Segment and offset of a tensor's storage."""
    for number, one in enumerate(pool.segments):
        start = torch.frombuffer(one.view, dtype=torch.uint8).data_ptr()
        if start <= tensor.data_ptr() < start + one.num_bytes:
            return number, tensor.data_ptr() - start
    raise AssertionError("not in the pool")


class Model:
    """Tensors that are held, and what was written to them."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.held: dict[int, tuple[torch.Tensor, int, int]] = {}  # a view, its value, bytes
        self.in_use = self.high_water = 0
        self.names = itertools.count()

    def allocate(self, sizes: list[int]) -> None:
        run = self.pool.allocate(sizes)
        assert [view is None for view in run.views] == [size == 0 for size in sizes]
        offset = run.offset
        for size, tensor in zip(filter(None, sizes), tensors(run), strict=True):
            assert tensor.numel() == size
            assert where(self.pool, tensor) == (run.segment, offset)
            offset += aligned(size)
            name = next(self.names)
            tensor.fill_(name % 251)
            self.held[name] = (tensor, name % 251, size)
            self.in_use += aligned(size)
        self.high_water = max(self.high_water, self.in_use)

    def view(self, index: int) -> None:
        """Someone else holds a part, and the first holder lets go."""
        if self.held:
            name = list(self.held)[index % len(self.held)]
            tensor, number, size = self.held[name]
            self.held[name] = (tensor[-1:], number, size)

    def drop(self, index: int, *, how: str) -> None:
        if not self.held:
            return
        name = list(self.held)[index % len(self.held)]
        tensor, _, size = self.held.pop(name)
        self.in_use -= aligned(size)
        if how == "cycle":  # only garbage collection finds it
            cycle: list[Any] = [tensor]
            cycle.append(cycle)
        elif how == "thread":
            box = [tensor]
            del tensor
            thread = threading.Thread(target=box.clear)
            thread.start()
            thread.join()

    def check(self) -> None:
        gc.collect()
        for tensor, number, _ in self.held.values():
            assert (tensor == number).all()
        assert self.pool.bytes_in_use == self.in_use
        assert self.pool.high_water_bytes >= self.high_water


SIZES = st.lists(
    st.one_of(
        st.integers(0, 300), st.integers(0, 3 * GRANULE), st.sampled_from([0, 1, 64, 65, GRANULE])
    ),
    min_size=1,
    max_size=4,
)
STEPS = st.one_of(
    st.tuples(st.just("allocate"), SIZES),
    st.tuples(st.just("view"), st.integers(0, 99)),
    st.tuples(st.sampled_from(["name", "cycle", "thread"]), st.integers(0, 99)),
    st.tuples(st.just("trim"), st.integers(0, 8)),
)


@given(st.lists(STEPS, max_size=40))
def test_any_history_gives_blocks_that_nobody_else_writes_to(steps):
    pool = Pool(new_segment, segment_bytes=4 * GRANULE)
    model = Model(pool)
    for kind, argument in steps:
        if kind == "allocate":
            model.allocate(argument)
        elif kind == "view":
            model.view(argument)
        elif kind == "trim":
            pool.trim(argument * GRANULE)
        else:
            model.drop(argument, how=kind)
        model.check()
    while model.held:
        model.drop(0, how="name")
    model.check()
    free_whole(pool)
    pool.close()


def free_whole(pool: Pool) -> None:
    """Everything is merged again: each segment can be handed out as one block."""
    assert pool.bytes_in_use == 0
    sizes = sorted((one.num_bytes for one in pool.segments), reverse=True)
    held = [pool.allocate([size]) for size in sizes]
    assert len(pool.segments) == len(sizes)
    del held


def test_blocks_of_a_run_come_back_one_by_one(pool):
    run = pool.allocate([1000, 0, 64, 130])
    first, second, third = tensors(run)
    del run
    assert pool.bytes_in_use == 1024 + 64 + 192
    view = second[3:].view(-1, 1)
    del second
    assert pool.bytes_in_use == 1024 + 64 + 192
    del view
    assert pool.bytes_in_use == 1024 + 192
    del first
    del third
    assert pool.bytes_in_use == 0


def test_a_run_of_zero_bytes_needs_no_segment(pool):
    assert pool.allocate([0, 0]) == Run(0, 0, [None, None])
    assert pool.allocate([]) == Run(0, 0, [])
    assert pool.segments == []


def test_an_autograd_graph_holds_its_block(pool):
    (raw,) = tensors(pool.allocate([4096]))
    weight = torch.ones(1024, requires_grad=True)
    loss = (raw.view(torch.float32).fill_(3) * weight).sum()
    del raw
    assert pool.bytes_in_use == 4096
    (taken,) = tensors(pool.allocate([4096]))
    taken.fill_(7)
    loss.backward()
    assert (weight.grad == 3).all()
    del loss
    assert pool.bytes_in_use == 4096


def test_the_block_that_was_freed_last_is_handed_out_first(pool):
    runs = [pool.allocate([5000]) for _ in range(8)]
    wanted = [runs[index].offset for index in (5, 1, 3)]
    for index in (3, 1, 5):
        runs[index] = None
    held = [pool.allocate([5000]) for _ in range(3)]
    assert [run.offset for run in held] == wanted


@pytest.mark.parametrize("units", [64, 128, 1024])
def test_a_free_block_that_is_a_little_too_small_is_not_handed_out(pool, units):
    """It stands in the bin of the request's own size."""
    small = units * memfd.ALIGNMENT
    first, guard, second, other_guard = tensors(pool.allocate([small, 64, small, 64]))
    guard.fill_(1)
    other_guard.fill_(1)
    del first, second
    (taken,) = tensors(pool.allocate([small + 1]))
    taken.fill_(2)
    assert (guard == 1).all()
    assert (other_guard == 1).all()


def test_a_step_that_allocates_the_same_again_gets_the_same_pages(pool):
    def step() -> set[tuple[int, int]]:
        held = [pool.allocate([size]) for size in (9000, 70_000, 9000, 300_000, 128) * 4]
        return {(run.segment, run.offset) for run in held}

    step()
    backed = pool.backed_bytes
    for _ in range(5):
        step()
        assert pool.backed_bytes == backed
    assert len(pool.segments) <= 3


def test_blocks_die_in_other_threads_while_one_allocates(pool):
    generator = random.Random(1)
    boxes: list[list[torch.Tensor]] = [[] for _ in range(3)]
    stop = threading.Event()
    wrong: list[str] = []

    def drop(box: list[torch.Tensor]) -> None:
        while not stop.is_set() or box:
            if box:
                tensor = box.pop(0)
                if not (tensor == int(tensor[0])).all():
                    wrong.append("another block wrote into this one")
            else:
                time.sleep(0.0001)

    def allocate(seed: int) -> None:
        own = random.Random(seed)
        for number in range(400):
            (tensor,) = tensors(pool.allocate([own.randrange(1, 20_000)]))
            generator.choice(boxes).append(tensor.fill_(number % 256))

    droppers = [threading.Thread(target=drop, args=(box,)) for box in boxes]
    allocators = [threading.Thread(target=allocate, args=(seed,)) for seed in range(2)]
    for thread in droppers + allocators:
        thread.start()
    for thread in allocators:
        thread.join()
    stop.set()
    for thread in droppers:
        thread.join()
    assert wrong == []
    free_whole(pool)


def test_blocks_may_die_by_garbage_collection_in_the_middle_of_an_allocation(pool):
    def collect(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename == segment.__file__:
            cycle: list[Any] = [pool_views.pop() if pool_views else None]
            cycle.append(cycle)
            del cycle
            gc.collect()
            return collect
        return None

    pool_views = [tensors(pool.allocate([size])) for size in range(64, 64 * 200, 64)]
    held = []
    try:
        sys.settrace(collect)
        for number in range(40):
            (tensor,) = tensors(pool.allocate([64 * number + 1]))
            held.append(tensor.fill_(number))
    finally:
        sys.settrace(None)
    assert all((tensor == number).all() for number, tensor in enumerate(held))
    del tensor
    pool_views.clear()
    held.clear()
    free_whole(pool)


def test_an_interrupt_at_any_point_of_an_allocation_loses_no_block(pool):
    held = [tensors(pool.allocate([100 * size]))[0].fill_(size) for size in range(1, 30)]
    for at in itertools.count():
        spare = [tensors(pool.allocate([900, 70])) for _ in range(3)]
        del spare[1], spare
        new = None
        with Interruption(at, FILES), contextlib.suppress(KeyboardInterrupt):
            new = pool.allocate([900, 70, 4 * GRANULE if at % 7 == 0 else 1])
        if new is not None and at > 60:
            break
        new = None
        in_use = sum(aligned(100 * size) for size in range(1, 30))
        assert pool.bytes_in_use == in_use
        assert all((tensor == size).all() for size, tensor in enumerate(held, 1))
    held.clear()
    new = None
    free_whole(pool)


def test_free_pages_go_back_to_the_system_beyond_the_reserve():
    now = [0.0]
    pool = Pool(new_segment, reserve_bytes=2 * GRANULE, clock=lambda: now[0])
    held = [pool.allocate([10 * GRANULE]) for _ in range(3)]
    keep = pool.allocate([100])
    assert pool.backed_bytes >= 30 * GRANULE
    held.clear()
    now[0] += 61  # in use in the last period
    assert pool.bytes_in_use == 128
    assert pool.backed_bytes >= 30 * GRANULE
    now[0] += 61
    assert pool.bytes_in_use == 128
    assert pool.backed_bytes >= 30 * GRANULE  # and in the one before
    now[0] += 61
    assert pool.bytes_in_use == 128
    assert pool.backed_bytes <= 3 * GRANULE
    assert blocks_of_file(pool) <= 3 * GRANULE
    (again,) = tensors(pool.allocate([10 * GRANULE]))
    assert (again == 0).all()  # fresh pages
    assert blocks_of_file(pool) >= 10 * GRANULE
    del keep
    pool.close()


def blocks_of_file(pool: Pool) -> int:
    """The memory that the system has given, as the system says."""
    return sum(os.fstat(one.descriptor).st_blocks * 512 for one in pool.segments)


def test_a_program_that_uses_the_same_memory_in_each_period_keeps_it():
    now = [0.0]
    pool = Pool(new_segment, reserve_bytes=0, clock=lambda: now[0])
    for step in range(6):
        held = [tensors(pool.allocate([7 * GRANULE]))[0] for _ in range(3)]
        # Pages that had been given back would be fresh ones, full of zeros.
        assert step == 0 or all((tensor == 7).all() for tensor in held)
        for tensor in held:
            tensor.fill_(7)
        del tensor
        held.clear()
        now[0] += 45
    pool.close()


def test_pages_are_there_before_they_are_touched(pool):
    run = pool.allocate([3 * GRANULE])
    assert blocks_of_file(pool) >= 3 * GRANULE
    del run


def test_a_pool_that_is_gone_leaves_its_tensors_and_no_descriptor():
    before = worlds.num_descriptors()
    pool = Pool(new_segment, segment_bytes=GRANULE)
    held = [tensors(pool.allocate([GRANULE]))[0].fill_(number) for number in range(4)]
    pool.close()
    gone = weakref.ref(pool)
    del pool
    assert gone() is None
    assert all((tensor == number).all() for number, tensor in enumerate(held))
    held.clear()
    assert worlds.num_descriptors() == before


@pytest.mark.slow
@pytest.mark.timeout(1500)
@settings(max_examples=2000)
@given(st.lists(STEPS, max_size=150))
def test_long_histories(steps):
    test_any_history_gives_blocks_that_nobody_else_writes_to.hypothesis.inner_test(steps)
