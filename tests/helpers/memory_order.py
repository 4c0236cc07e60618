"""What ranks may see of each other's accesses to memory that they share: PTX's memory order.

A rank's stores to memory of another rank are delayed until the rank releases. Every byte remembers
who wrote it last, who has read it since, and when. An access that touches what another rank wrote
or read is an error, unless an acquire has seen a release that came after that access: hardware may
order the two either way. So are a load and a store of words that are not atomic.

A rank counts its releases; a rank's clock says up to which release it has seen each of the others.
What is of one rank is in order: launches of one stream are. Sources: PTX ISA, "Memory Consistency
Model"; Flanagan and Freund, "FastTrack", 2009.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

# How long a rank lets the others run when it looks at a word.
_PAUSE_SECONDS = 0.001


class RaceError(Exception):
    """Two accesses of different ranks that nothing orders."""


class RankMemory:
    """Memory as one rank accesses it: here, memory that it shares with nobody.

    `start` is the address of a range of memory, `units` the range's words, `index` which of them.
    """

    def load(self, start: int, units: Array, index: Array, kinds: Sequence[str]) -> Array:
        return units[index]

    def store(self, start: int, units: Array, index: Array, values: Array) -> None:
        units[index] = values

    def exchange(
        self, start: int, units: Array, index: Array, values: Array, kinds: Sequence[str]
    ) -> Array:
        before = units[index]
        units[index] = values
        return before


class _Segment:
    """Who accessed each byte last, and when."""

    def __init__(self, owner: int, start: int, num_bytes: int, num_ranks: int) -> None:
        self.owner = owner
        self.range = range(start, start + num_bytes)
        self.writer = np.full(num_bytes, -1)
        self.written = np.zeros(num_bytes, dtype=np.int64)
        self.read = np.zeros((num_ranks, num_bytes), dtype=np.int64)
        self.released: dict[int, Array] = {}  # clocks, by the word that told them


class MemoryOrder:
    """The segments of ranks: `segments[rank]` is the address of its first byte, and its bytes."""

    def __init__(self, segments: Sequence[tuple[int, Array]]) -> None:
        size = len(segments)
        self.lock = threading.Lock()
        self.segments = [
            _Segment(owner, start, data.size, size) for owner, (start, data) in enumerate(segments)
        ]
        self.clocks = np.zeros((size, size), dtype=np.int64)
        np.fill_diagonal(self.clocks, 1)

    def of(self, rank: int) -> OrderedMemory:
        return OrderedMemory(self, rank)

    def find(self, address: int) -> _Segment | None:
        """The segment that an address is in."""
        return next((each for each in self.segments if address in each.range), None)


class OrderedMemory(RankMemory):
    """Memory as a rank accesses it that shares segments with others."""

    def __init__(self, order: MemoryOrder, rank: int) -> None:
        self.order, self.rank = order, rank
        self.delayed: list[tuple[Array, Array, Array]] = []

    def load(self, start: int, units: Array, index: Array, kinds: Sequence[str]) -> Array:
        segment = self.order.find(start)
        if segment is None:
            return units[index]
        if "acquire" in kinds:
            if "sys" not in kinds:
                raise RaceError(f"rank {self.rank} acquires at a scope without the other ranks")
            time.sleep(_PAUSE_SECONDS)
        with self.order.lock:
            if "acquire" in kinds:
                for word in _bytes(segment, start, units, index)[:: units.itemsize]:
                    told = segment.released.get(int(word))
                    if told is not None:
                        np.maximum(self._clock, told, out=self._clock)
            else:
                at = _bytes(segment, start, units, index)
                self._check_written(segment, at, "reads")
                segment.read[self.rank, at] = self._clock[self.rank]
            return units[index]

    def store(self, start: int, units: Array, index: Array, values: Array) -> None:
        segment = self.order.find(start)
        if segment is None:
            units[index] = values
            return
        with self.order.lock:
            at = _bytes(segment, start, units, index)
            self._check_written(segment, at, "writes")
            for other in range(len(segment.read)):
                if other != self.rank and (segment.read[other, at] > self._clock[other]).any():
                    raise RaceError(
                        f"rank {self.rank} writes to the segment of rank {segment.owner} what rank "
                        f"{other} has read, and nothing orders the two"
                    )
            segment.writer[at] = self.rank
            segment.written[at] = self._clock[self.rank]
            if segment.owner == self.rank:
                units[index] = values
            else:
                self.delayed.append((units, index, values))

    def exchange(
        self, start: int, units: Array, index: Array, values: Array, kinds: Sequence[str]
    ) -> Array:
        segment = self.order.find(start)
        if segment is None:
            return super().exchange(start, units, index, values, kinds)
        with self.order.lock:
            is_release = "release" in kinds and "sys" in kinds
            if is_release:
                for stored_units, stored_index, stored_values in self.delayed:
                    stored_units[stored_index] = stored_values
                self.delayed.clear()
            at = _bytes(segment, start, units, index)
            segment.writer[at] = self.rank
            segment.written[at] = self._clock[self.rank]
            for word in at[:: units.itemsize]:
                if is_release:
                    segment.released[int(word)] = self._clock.copy()
                else:
                    segment.released.pop(int(word), None)
            if is_release:
                self._clock[self.rank] += 1
            before = units[index]
            units[index] = values
            return before

    @property
    def _clock(self) -> Array:
        return self.order.clocks[self.rank]

    def _check_written(self, segment: _Segment, at: Array, verb: str) -> None:
        """Whether this rank has seen the last stores to these bytes."""
        writer = segment.writer[at]
        of_others = (writer >= 0) & (writer != self.rank)
        unseen = of_others & (segment.written[at] > self._clock[np.maximum(writer, 0)])
        if unseen.any():
            raise RaceError(
                f"rank {self.rank} {verb} in the segment of rank {segment.owner} what rank "
                f"{writer[unseen][0]} has written, and nothing orders the two"
            )


def _bytes(segment: _Segment, start: int, units: Array, index: Array) -> Array:
    """Which bytes of a segment these words of the range at `start` are."""
    first = start - segment.range.start + index.astype(np.int64) * units.itemsize
    return (first[:, None] + np.arange(units.itemsize)).ravel()
