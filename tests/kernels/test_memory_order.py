"""The memory order of ranks lets pass what PTX orders, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from memory_order import MemoryOrder, RaceError, RankMemory
from ptx_arithmetic import Array

# Where the segments of three ranks begin.
STARTS = (0x1000, 0x2000, 0x3000)
# Of rank 1's segment: the word that tells of the others.
WORD, DATA = np.array([0]), np.array([4, 5, 7])
RELEASE, RELAXED = ["sys", "release"], ["sys", "relaxed"]
ACQUIRE = ["sys", "acquire"]


class World:
    """Three ranks that access rank 1's segment."""

    def __init__(self) -> None:
        self.data = [np.zeros(64, dtype=np.uint8) for _ in STARTS]
        order = MemoryOrder(list(zip(STARTS, self.data, strict=True)))
        self.ranks = [order.of(rank) for rank in range(3)]
        self.units = self.data[1].view(np.uint64)

    def store(self, rank: int, value: int) -> None:
        values = np.full(3, value, dtype=np.uint64)
        self.ranks[rank].store(STARTS[1], self.units, DATA, values)

    def load(self, rank: int) -> list[int]:
        return self.ranks[rank].load(STARTS[1], self.units, DATA, []).tolist()

    def tell(self, rank: int, kinds: list[str], value: int = 1, word: Array = WORD) -> int:
        new = np.array([value], dtype=np.uint64)
        return int(self.ranks[rank].exchange(STARTS[1], self.units, word, new, kinds)[0])

    def hear(self, rank: int, kinds: list[str], word: Array = WORD) -> int:
        return int(self.ranks[rank].load(STARTS[1], self.units, word, kinds)[0])


@pytest.fixture
def world() -> World:
    return World()


def test_what_was_released_and_acquired_is_seen(world):
    world.store(0, 7)
    assert world.units[4] == 0, "delayed until the release"
    assert world.tell(0, RELEASE, 3) == 0
    assert world.hear(1, ACQUIRE) == 3
    assert world.load(1) == [7, 7, 7]
    world.store(1, 8)  # and may be written again
    assert world.load(1) == [8, 8, 8]


def test_what_a_rank_has_heard_it_hands_on(world):
    """0 tells 1, which tells 2."""
    world.store(0, 7)
    world.tell(0, RELEASE)
    world.hear(1, ACQUIRE)
    other = np.array([1])
    world.tell(1, RELEASE, word=other)
    world.hear(2, ACQUIRE, other)
    assert world.load(2) == [7, 7, 7]


@pytest.mark.parametrize("released", [RELAXED, ["gpu", "release"]], ids=["relaxed", "gpu"])
def test_a_word_that_is_not_released_to_the_system_tells_nothing(world, released):
    world.store(0, 7)
    world.tell(0, released)
    assert world.hear(1, ACQUIRE) == 1
    assert world.units[4] == 0
    with pytest.raises(RaceError, match="rank 1 reads in the segment of rank 1 what rank 0 has wr"):
        world.load(1)


def test_a_word_that_another_has_written_over_tells_nothing(world):
    world.store(0, 7)
    world.tell(0, RELEASE)
    world.tell(2, RELAXED)
    world.hear(1, ACQUIRE)
    with pytest.raises(RaceError, match="what rank 0 has written"):
        world.load(1)


@pytest.mark.parametrize("acquired", [None, ["sys", "relaxed"]], ids=["unheard", "relaxed"])
def test_a_word_that_is_not_acquired_tells_nothing(world, acquired):
    world.store(0, 7)
    world.tell(0, RELEASE)
    with pytest.raises(RaceError, match="what rank 0 has written"):
        world.load(1) if acquired is None else world.hear(1, acquired)
    with pytest.raises(RaceError, match="rank 1 writes in the segment of rank 1 what rank 0 has"):
        world.store(1, 8)


def test_what_comes_after_a_release_is_not_told_by_it(world):
    world.tell(0, RELEASE)
    world.store(0, 7)
    world.hear(1, ACQUIRE)
    with pytest.raises(RaceError, match="what rank 0 has written"):
        world.load(1)


def test_what_another_rank_still_reads_is_not_written(world):
    world.load(1)
    with pytest.raises(RaceError, match="what rank 1 has read"):
        world.store(0, 7)
    world.tell(1, RELEASE)
    world.hear(0, ACQUIRE)
    world.store(0, 7)


def test_an_acquire_at_a_scope_without_the_others_is_an_error(world):
    with pytest.raises(RaceError, match="at a scope without the other ranks"):
        world.hear(1, ["gpu", "acquire"])


def test_memory_that_is_not_shared_has_no_order(world):
    units = np.zeros(8, dtype=np.uint64)
    for memory in (*world.ranks, RankMemory()):
        memory.store(0x9000, units, DATA, np.full(3, 5, dtype=np.uint64))
        assert memory.load(0x9000, units, DATA, []).tolist() == [5, 5, 5]
        assert memory.exchange(0x9000, units, WORD, np.array([6], np.uint64), RELAXED).size == 1
    assert units[0] == 6
