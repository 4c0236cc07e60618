"""A pool of blocks in shared memory, for tensors that live as long as anyone holds them.

`Pool.allocate(sizes)` gives neighbouring blocks, one for each size. A block comes back when the
last tensor on its storage dies, whoever held the tensor and in whichever thread it dies.

How a block comes back: a tensor made by `torch.frombuffer(view, ..)` keeps `view`, a memoryview of
the block, until its storage dies. A weak reference to `view` then appends itself to a deque. That
is all that happens at that moment, in C and without a lock, because garbage collection may run
it in the middle of an allocation of the same thread. The next allocation takes the block from the
deque.

How a block is found: free blocks stand in bins by size, 32 bins for each power of two, and an
integer has one bit for each bin that is not empty. A few blocks of the bin of a request's own size
are looked at. Otherwise the request is rounded up to the least size of a bin, so any block of that
bin or a higher one is large enough. The block that was freed last is taken first, because its pages
are likely in the cache, and its low end is used. A block that goes into a bin is merged with free
neighbours, which are found by where they start and where they end. The last freed block of each of
a few sizes stays out of the bins, for the next request of just its size.

An exception in the middle of an allocation (KeyboardInterrupt, no memory) may leave the bins half
changed. The blocks in use stay known: the next allocation rebuilds the bins from them.
"""

from __future__ import annotations

import itertools
import resource
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from .memfd import ALIGNMENT, GRANULE, aligned

# Free pages that are kept in any case.
RESERVE_BYTES = 64 << 20
# The address space of a segment costs nothing, so a program needs few segments.
SEGMENT_BYTES = 256 << 20
# As many pages are kept as were in use at the same time in the last one or two of these periods, so
# that a training step does not pay for the same pages again.
PERIOD_SECONDS = 60.0
# Freed blocks that are not yet in a bin, one of each size.
_MAX_KEPT = 8
# Blocks of one bin that are looked at, one by one.
_LOOKS = 4
# The address of a block is the number of its segment, then the offset in it.
_OFFSET_BITS = 48


class Memory(Protocol):
    """A segment as the pool sees it: `memfd.Segment`, or what a rank has of its GPU."""

    num_bytes: int

    @property
    def backed_bytes(self) -> int:
        """The memory that the system has given for it."""

    @property
    def view(self) -> Any:
        """`view[start:stop]` is what a tensor on these bytes keeps until its storage dies."""

    def back(self, start: int, stop: int) -> None:
        """Gets memory for a range; OSError where there is none."""

    def give_back(self, start: int, stop: int, num_bytes: int) -> int:
        """Returns memory of a range to the system; how many bytes."""

    def close(self) -> None:
        """Lets go of it; blocks in use stay."""


M = TypeVar("M", bound=Memory)


class Block(weakref.ref[Any]):
    """A block in use: a weak reference to the view that its tensor keeps."""

    __slots__ = ("address", "num_bytes")
    address: int
    num_bytes: int


class Run(NamedTuple):
    """Neighbouring blocks: where the first starts, and a view for each size that is not zero."""

    segment: int
    offset: int
    views: list[Any]


class Pool(Generic[M]):
    """Blocks from segments; it adds a segment when it has no room.

    Example:
        >>> from fastvideo_comm.memory import memfd
        >>> pool = Pool(lambda num_bytes: memfd.Segment(memfd.create(num_bytes), num_bytes))
        >>> run = pool.allocate([100, 0, 8])
        >>> run.segment, run.offset, pool.bytes_in_use
        (0, 0, 192)
        >>> del run
        >>> pool.bytes_in_use
        0
    """

    def __init__(
        self,
        new_segment: Callable[[int], M],
        *,
        reserve_bytes: int = RESERVE_BYTES,
        segment_bytes: int = SEGMENT_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """An empty pool.

        Args:
            new_segment: Makes a segment of so many bytes, or raises OSError.
            reserve_bytes: Free pages that are never given back.
            segment_bytes: The least size of a segment.
            clock: Tells the seconds that pass, for the decision which free pages are kept.
        """
        self.segments: list[M] = []
        self._new_segment = new_segment
        self._reserve_bytes = reserve_bytes
        self._segment_bytes = segment_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._torn = False
        self._freed: deque[Block] = deque()
        self._live: dict[int, Block] = {}
        self._in_use = self._high_water = 0
        self._peak = self._last_peak = 0
        self._period_ends = clock() + PERIOD_SECONDS
        self._clear_bins()

    @property
    def bytes_in_use(self) -> int:
        """The bytes that the blocks in use take."""
        with self._lock:
            self._settle()
            return self._in_use

    @property
    def high_water_bytes(self) -> int:
        """The largest value that `bytes_in_use` has had."""
        return self._high_water

    @property
    def backed_bytes(self) -> int:
        """The memory that the system has given for the segments."""
        return sum(segment.backed_bytes for segment in self.segments)

    def allocate(self, sizes: Sequence[int]) -> Run:
        """Neighbouring blocks, each at a multiple of 64 bytes; none for a size of zero.

        Raises:
            MemoryError: The system has no more memory; the message names bytes and limits.
        """
        total = sum(map(aligned, sizes))
        if not total:
            return Run(0, 0, [None] * len(sizes))
        with self._lock:
            self._settle()
            self._torn = True
            address = self._take(total)
            number, offset = address >> _OFFSET_BITS, address & ((1 << _OFFSET_BITS) - 1)
            segment = self.segments[number]
            try:
                segment.back(offset, offset + total)
            except OSError as error:
                raise _no_memory(total, error) from None
            views: list[Any] = []
            start = offset
            for num_bytes in sizes:
                if not num_bytes:
                    views.append(None)
                    continue
                view = segment.view[start : start + num_bytes]
                block = Block(view, self._freed.append)
                block.address = start - offset + address
                block.num_bytes = aligned(num_bytes)
                self._live[block.address] = block
                views.append(view)
                start += block.num_bytes
            self._in_use += total
            self._high_water = max(self._high_water, self._in_use)
            self._peak = max(self._peak, self._in_use)
            self._torn = False
        return Run(number, offset, views)

    def view_at(self, segment: int, offset: int) -> Any:
        """The view of the block in use that starts there; None where none does."""
        with self._lock:
            block = self._live.get((segment << _OFFSET_BITS) + offset)
            return None if block is None else block()

    def trim(self, keep_bytes: int) -> int:
        """Gives back the pages of free blocks until at most `keep_bytes` are backed in all.

        Returns:
            The bytes that were given back.
        """
        with self._lock:
            self._settle()
            return self._trim(keep_bytes)

    def close(self) -> None:
        """Closes the descriptors of the segments; blocks in use stay."""
        for segment in self.segments:
            segment.close()

    def _settle(self) -> None:
        """Takes back what was freed, and repairs what an exception left half done."""
        if self._torn:
            self._rebuild()
        while self._freed:
            self._torn = True
            block = self._freed[0]
            del self._live[block.address]
            self._freed.popleft()
            self._in_use -= block.num_bytes
            self._keep(block.address, block.num_bytes)
            self._torn = False
        if self._clock() >= self._period_ends:
            keep_bytes = max(self._peak, self._last_peak, self._in_use + self._reserve_bytes)
            self._last_peak, self._peak = self._peak, self._in_use
            self._period_ends = self._clock() + PERIOD_SECONDS
            self._trim(keep_bytes)

    def _keep(self, address: int, num_bytes: int) -> None:
        """Keeps a freed block whole for the next request of just its size."""
        before = self._kept.pop(num_bytes, None)
        self._kept[num_bytes] = address
        if before is not None:
            self._put(before, num_bytes)
        elif len(self._kept) > _MAX_KEPT:
            oldest = next(iter(self._kept))
            self._put(self._kept.pop(oldest), oldest)

    def _take(self, num_bytes: int) -> int:
        """The address of so many bytes, which are no longer free."""
        kept = self._kept.pop(num_bytes, None)
        if kept is not None:
            return kept
        address = self._find(num_bytes)
        if address is None and self._kept:
            self._put_kept()
            address = self._find(num_bytes)
        if address is None:
            address = self._grow(num_bytes)
        free_bytes = self._remove(address)
        if free_bytes > num_bytes:
            self._insert(address + num_bytes, free_bytes - num_bytes)
        return address

    def _find(self, num_bytes: int) -> int | None:
        """The free block to use, or None."""
        units = num_bytes // ALIGNMENT
        # Some blocks of this bin are large enough, and those that were freed last likely are.
        near = self._bins.get(_size_class(units))
        for address in itertools.islice(reversed(near), _LOOKS) if near else ():
            if self._sizes[address] >= num_bytes:
                return address
        if units >= 64:
            step = units.bit_length() - 6
            units = -(-units >> step) << step
        size_class = _size_class(units)
        found = self._filled >> size_class
        if not found:
            return None
        size_class += (found & -found).bit_length() - 1
        return next(reversed(self._bins[size_class]))

    def _put_kept(self) -> None:
        while self._kept:
            num_bytes, address = self._kept.popitem()
            self._put(address, num_bytes)

    def _put(self, address: int, num_bytes: int) -> None:
        """Makes a range free, together with its free neighbours."""
        before = self._starts.get(address)
        if before is not None:
            address, num_bytes = before, num_bytes + self._remove(before)
        if address + num_bytes in self._sizes:
            num_bytes += self._remove(address + num_bytes)
        self._insert(address, num_bytes)

    def _insert(self, address: int, num_bytes: int) -> None:
        size_class = _size_class(num_bytes // ALIGNMENT)
        self._bins.setdefault(size_class, {})[address] = None
        self._filled |= 1 << size_class
        self._sizes[address] = num_bytes
        self._starts[address + num_bytes] = address

    def _remove(self, address: int) -> int:
        num_bytes = self._sizes.pop(address)
        del self._starts[address + num_bytes]
        size_class = _size_class(num_bytes // ALIGNMENT)
        addresses = self._bins[size_class]
        del addresses[address]
        if not addresses:
            self._filled &= ~(1 << size_class)
        return num_bytes

    def _clear_bins(self) -> None:
        self._kept: dict[int, int] = {}  # addresses of blocks, by their bytes, the last freed last
        self._bins: dict[int, dict[int, None]] = {}  # addresses, the last freed last
        self._filled = 0  # a bit for each bin that is not empty
        self._sizes: dict[int, int] = {}  # of free blocks, by where they start
        self._starts: dict[int, int] = {}  # of free blocks, by where they end

    def _rebuild(self) -> None:
        """Makes the bins again from the blocks in use."""
        while self._freed:
            block = self._freed[0]
            if self._live.get(block.address) is block:
                del self._live[block.address]
            self._freed.popleft()
        self._clear_bins()
        free_from = {number: number << _OFFSET_BITS for number in range(len(self.segments))}
        self._in_use = 0
        for address, block in sorted(self._live.items()):
            number = address >> _OFFSET_BITS
            if address > free_from[number]:
                self._insert(free_from[number], address - free_from[number])
            free_from[number] = address + block.num_bytes
            self._in_use += block.num_bytes
        for number, address in free_from.items():
            end = (number << _OFFSET_BITS) + self.segments[number].num_bytes
            if end > address:
                self._insert(address, end - address)
        self._torn = False

    def _grow(self, num_bytes: int) -> int:
        """Adds a segment with room for so many bytes; where its free block starts."""
        total = sum(segment.num_bytes for segment in self.segments)
        large = max(self._segment_bytes, total, 1 << (num_bytes - 1).bit_length())
        try:
            segment = self._new_segment(large)
        except OSError:
            small = -(-num_bytes // GRANULE) * GRANULE
            try:
                segment = self._new_segment(small)
            except OSError as error:
                raise _no_memory(small, error) from None
        self.segments.append(segment)
        address = (len(self.segments) - 1) << _OFFSET_BITS
        self._insert(address, segment.num_bytes)
        return address

    def _trim(self, keep_bytes: int) -> int:
        excess = self.backed_bytes - keep_bytes
        if excess > 0:
            self._put_kept()
        returned = 0
        # From the top, because allocations prefer the low end.
        for address in sorted(self._sizes, reverse=True) if excess > 0 else ():
            if returned >= excess:
                break
            segment = self.segments[address >> _OFFSET_BITS]
            start = address & ((1 << _OFFSET_BITS) - 1)
            stop = start + self._sizes[address]
            returned += segment.give_back(start, stop, excess - returned)
        return returned


def _size_class(units: int) -> int:
    """The bin of a free block; 32 bins for each power of two.

    Example:
        >>> [_size_class(units) for units in (1, 63, 64, 65, 66, 127, 128, 132)]
        [1, 63, 64, 64, 65, 95, 96, 97]
    """
    if units < 64:
        return units
    step = units.bit_length() - 6
    return (step << 5) + (units >> step)


def _no_memory(num_bytes: int, error: OSError) -> MemoryError:
    limits = []
    for name in ("RLIMIT_AS", "RLIMIT_FSIZE"):
        limit, _ = resource.getrlimit(getattr(resource, name))
        if limit != resource.RLIM_INFINITY:
            limits.append(f"{name} is {limit} bytes")
    text = "; ".join(
        [f"the system refuses {num_bytes} bytes of shared memory", str(error), *limits]
    )
    return MemoryError(text)
