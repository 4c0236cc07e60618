"""Exchange by memory for ranks on GPUs: kernels write straight into the outputs of other ranks.

Each rank has a segment, memory of its GPU that the kernels of all ranks can write to:

    words of the kernels (posts.py) | staging | pool

A rank takes its outputs from the pool. Where the pool has no room it takes them from torch's
allocator; then the others write to the staging, and the rank copies its outputs out of it. The
other ranks do not see which of the two a rank has chosen.

Streams: all kernels of a rank run on one stream, in the order of the calls. A call begins after
what is on the caller's current stream, and `DeviceFlight.wait` makes the then current stream wait
for its end. The host waits for nothing.

Lifetimes: an output is its holder's. Its block is handed out again when its storage has died. The
kernels of that later call wait for what is then on the stream on which the output was waited for,
and on the streams that `record_stream` was told. An output of another stream that was not told may
be overwritten while that stream still reads it.

Captured graphs: a replay writes to the same memory again, long after the tensors have died in
Python. So a call that is captured takes its outputs from torch's allocator, which knows of graphs,
and the others write to the staging. The staging is used from the post of a call to the copy out of
it, and calls follow each other. So replays and calls share the staging, if they are ordered: replay
a graph on the stream on which the ranks exchange, while no asynchronous exchange is in flight.

A rank that does not come ends all calls from there on: see `watch.py`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import ClosedError, CollectiveError
from ..kernels import copy_valid_
from .deliveries import deliveries_of
from .memfd import aligned
from .segment import Pool
from .shared import Region, Shared
from .watch import Watch

Spec: TypeAlias = "tuple[Sequence[int], torch.dtype]"
SpecsOf: TypeAlias = Callable[[int], "list[Spec]"]
CopiesOf: TypeAlias = Callable[[int, Sequence[Tensor]], "list[tuple[Tensor, Tensor]]"]


class DeviceFlight:
    """A call whose kernels the host has launched."""

    def __init__(self, memory: DeviceMemory, outputs: list[Tensor], blocks: list[Any]) -> None:
        """A call that is to be launched."""
        self.outputs = outputs
        self._memory = memory
        self._blocks = blocks
        self._end: Any = None  # an event

    def launched(self, end: Any) -> None:
        """All kernels are launched; `end` is the event behind them."""
        self._end = end

    def wait(self) -> None:
        """The current stream waits until this rank's outputs are complete, and its inputs read."""
        stream = self._memory.current_stream()
        stream.wait_event(self._end)
        for block in self._blocks:
            self._memory.uses(block, stream)
        self._blocks = []

    def is_completed(self) -> bool:
        """Whether the device has reached the end of the call."""
        return self._memory.is_capturing() or self._end is None or bool(self._end.query())


class DeviceMemory:
    """The segment of one rank, and its calls."""

    def __init__(
        self, rank: int, shared: Shared, *, staging_bytes: int, timeout: float, name: str
    ) -> None:
        """Takes over the segment. All ranks must have one before any of them makes a call.

        Args:
            rank: this rank.
            shared: the segment, the same size on all ranks.
            staging_bytes: how much of the segment the staging takes, the same on all ranks. The
                outputs of one call may take so many bytes on a rank, each rounded up to 64.
            timeout: seconds that a kernel waits for another rank.
            name: what errors call the group.

        Raises:
            ValueError: the segment has no room for the words and the staging.
        """
        from ..kernels.posts import Words

        world, segment = len(shared.addresses), shared.segment
        self.rank, self.world, self.staging_bytes = rank, world, aligned(staging_bytes)
        self._staging = aligned(2 * 8 * world)
        first = self._staging + self.staging_bytes
        if segment.numel() < first:
            raise ValueError(
                f"the segment must have {first} bytes for words and staging, got {segment.numel()}"
            )
        self._shared = shared
        self._device = segment.device
        self._module = torch.get_device_module(segment.device)
        is_gpu = segment.is_cuda
        self._stream: Any = torch.cuda.Stream(segment.device) if is_gpu else torch.cpu.Stream()
        bases = torch.tensor(shared.addresses, dtype=torch.int64, device=segment.device)
        places, counts = torch.zeros_like(bases), torch.zeros_like(bases)
        host = torch.zeros(1 + world, dtype=torch.int64, pin_memory=is_gpu)
        self._words = Words(bases, places, counts, host, rank)
        self._region = Region(shared, first)
        self._pool = Pool(self._region.take, segment_bytes=self._region.num_bytes)
        self._module.synchronize(segment.device)  # the kernels' stream reads what is zero now
        self._watch = Watch(host, timeout=timeout, name=name)
        self._name = name
        self._lock = threading.Lock()
        self._broken = ""
        self._is_closed = False
        # The streams of blocks that came back: a later call may overwrite what they still read.
        self._released: deque[Any] = deque()
        self.num_staged = 0  # calls whose outputs were copied out of the staging

    @property
    def bytes_in_use(self) -> int:
        """What this rank's tensors take of the pool."""
        return self._pool.bytes_in_use

    @property
    def high_water_bytes(self) -> int:
        """The largest that `bytes_in_use` ever was."""
        return self._pool.high_water_bytes

    def check(self) -> None:
        """Raises if this memory cannot be used any more.

        Raises:
            ClosedError: it was closed.
            CommunicationTimeoutError: a rank did not come to an earlier call.
            CollectiveError: this rank was interrupted in the middle of an earlier call.
        """
        if self._is_closed:
            raise ClosedError(f"the communicator {self._name!r} was destroyed before the call")
        self._watch.check()
        if self._broken:
            raise CollectiveError(self._broken)

    def start(
        self, specs_of: SpecsOf, copies_of: CopiesOf, targets: Sequence[int], *, async_op: bool
    ) -> DeviceFlight:
        """Launches a call of all ranks: post, deliver, done.

        Args:
            specs_of: `specs_of(rank)` gives shape and dtype of the outputs of a rank.
            copies_of: `copies_of(target, outputs)` gives pairs (to, from): what this rank copies
                into the outputs of a target. `outputs` have no memory, only layouts.
            targets: the ranks that this rank writes to.
            async_op: the caller does not wait at once. Otherwise it does, so that what the kernels
                read lives long enough.

        Raises:
            ClosedError, CommunicationTimeoutError, CollectiveError: as `check`.
        """
        from ..kernels.deliver import launch_deliveries
        from ..kernels.posts import launch_done, launch_post

        with self._lock:
            self.check()
            deliveries = deliveries_of(specs_of, copies_of, targets, self.rank, self.world)
            for each in deliveries:
                if each.src.device != self._device:
                    raise ValueError(
                        f"tensors must be on {self._device}, where the first call was, got "
                        f"{each.src.device}"
                    )
            flight, offset, staged = self._allocated(specs_of(self.rank))
            self._begin_after(self.current_stream())
            with self._module.stream(self._stream), self._in_one_piece():
                launch_post(self._words, offset)
                launch_deliveries(self._words.places, deliveries)
                launch_done(self._words)
                for output, arrived in zip(flight.outputs, staged, strict=False):
                    # A memory copy: no kernel that would first have to be loaded, in a capture.
                    copy_valid_(output, arrived, impl="torch")
                flight.launched(self._stream.record_event())
            if async_op and self._device.type != "cpu":
                # The caller may drop them while the kernels use them.
                for tensor in (*[each.src for each in deliveries], *flight.outputs):
                    tensor.record_stream(self._stream)
        return flight

    def record_stream(self, tensor: Tensor, stream: Any) -> bool:
        """Says that `stream` uses an output; False where the tensor is not in the pool."""
        address = tensor.untyped_storage().data_ptr() - self._shared.segment.data_ptr()
        block = self._pool.view_at(0, address - self._region.start)
        if block is None:
            return False
        self.uses(block, stream)
        return True

    def uses(self, block: Any, stream: Any) -> None:
        """Says that `stream` uses the tensors on a block that the pool gave."""
        # Of the weak references to an object the newest is called first: the stream stands in the
        # queue before the pool can hand the block out again.
        weakref.finalize(block, self._released.append, stream).atexit = False

    def current_stream(self) -> Any:
        """The stream on which this thread's work is."""
        return self._module.current_stream(self._device)

    def is_capturing(self) -> bool:
        """Whether the current stream is captured in a graph."""
        return self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def close(self) -> None:
        """Waits for the device, and lets go of the segment. Tensors that are held stay."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._module.synchronize(self._device)
            self._watch.close()

    def _allocated(self, specs: list[Spec]) -> tuple[DeviceFlight, int, list[Tensor]]:
        """A flight with its outputs, where the others write, and the staged outputs if any."""
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in specs]
        if not self.is_capturing():
            with contextlib.suppress(MemoryError):  # the pool has no room
                run = self._pool.allocate(sizes)
                outputs = [
                    _on(self._shared.tensor(view), spec) if view is not None else self._empty(spec)
                    for view, spec in zip(run.views, specs, strict=True)
                ]
                blocks = [view for view in run.views if view is not None]
                return DeviceFlight(self, outputs, blocks), self._region.start + run.offset, []
        if sum(map(aligned, sizes)) > self.staging_bytes:
            raise ValueError(
                f"the outputs of a call must fit into {self.staging_bytes} bytes, got {sizes}"
            )
        self.num_staged += 1
        starts = itertools.accumulate(map(aligned, sizes), initial=self._staging)
        staged = [
            self._shared.segment[start : start + size].view(dtype).view(tuple(shape))
            for start, size, (shape, dtype) in zip(starts, sizes, specs, strict=False)
        ]
        return DeviceFlight(self, [*map(self._empty, specs)], []), self._staging, staged

    def _empty(self, spec: Spec) -> Tensor:
        shape, dtype = spec
        return torch.empty(tuple(shape), dtype=dtype, device=self._device)

    def _begin_after(self, stream: Any) -> None:
        """The stream of the kernels waits for what its next call may overwrite or read."""
        self._stream.wait_stream(stream)
        if self.is_capturing():
            return  # no block of the pool is overwritten
        others = {self._released.popleft() for _ in range(len(self._released))} - {stream}
        for other in others:
            self._stream.wait_event(other.record_event())

    @contextlib.contextmanager
    def _in_one_piece(self) -> Iterator[None]:
        """After an exception in the middle of a call, the counts of the ranks may differ."""
        try:
            yield
        except BaseException as error:
            self._broken = f"an earlier call was interrupted: {type(error).__name__}: {error}"
            raise


def _on(memory: Tensor, spec: Spec) -> Tensor:
    """A contiguous tensor on the storage of `memory`; no view, so that it can be written to."""
    shape, dtype = spec
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    tensor = torch.empty(0, dtype=dtype, device=memory.device)
    return tensor.set_(memory.untyped_storage(), 0, tuple(shape), strides)
