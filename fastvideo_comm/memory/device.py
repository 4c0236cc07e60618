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
be overwritten while that stream still reads it. The inputs of an asynchronous call are held until
it is waited for.

Captured graphs: a replay writes to the same memory again, long after the tensors have died in
Python. So a call that is captured takes its outputs from torch's allocator, which knows of graphs,
and the others write to the staging. The staging is used from the post of a call to the copy out of
it, and calls follow each other. So replays and calls share the staging, if they are ordered: replay
a graph on the stream on which the ranks exchange, while no asynchronous exchange is in flight.

A rank that does not come ends all calls from there on: see `watch.py`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ClosedError, CollectiveError
from ..kernels import copy_valid_
from .deliveries import CopiesOf, Plan, Spec, SpecsOf, deliveries_of, keep, layout_of, plan_of
from .memfd import aligned
from .segment import Pool
from .shared import Region, Shared
from .watch import Watch


class DeviceFlight:
    """A call whose kernels the host has launched."""

    def __init__(self, memory: DeviceMemory, outputs: list[Tensor], blocks: list[Any]) -> None:
        """A call that is to be launched. Without `blocks`, the outputs are torch's memory."""
        self.outputs = outputs
        self._memory = memory
        self._blocks = blocks
        self._end: Any = None  # an event
        self._sources: list[Tensor] = []

    def launched(self, end: Any, sources: list[Tensor]) -> None:
        """All kernels are launched; `end` is the event behind them.

        Args:
            end: the event.
            sources: what the kernels read, of a call that is not waited for at once. It is held
                until `wait`: it may be an output of another communicator, whose memory would
                otherwise come back there, and torch's allocator knows nothing of that memory.
        """
        self._end = end
        self._sources = sources

    def wait(self) -> None:
        """The current stream waits until this rank's outputs are complete, and its inputs read.

        Raises:
            CommunicationTimeoutError: the call was asynchronous, and a rank did not come in time to
                this call or an earlier one.
        """
        if self._sources:
            self._memory.check_waits()
            self._sources = []
        stream = self._memory.current_stream()
        stream.wait_event(self._end)
        for block in self._blocks:
            self._memory.uses(block, stream)
        if not self._blocks:
            for output in self.outputs:
                self._memory.record(output, stream)
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
        host = torch.zeros(1 + world, dtype=torch.int64, device="cpu", pin_memory=is_gpu)
        self._words = Words(bases, places, counts, host, rank)
        self._region = Region(shared, first)
        self.pool = Pool(self._region.take, segment_bytes=self._region.num_bytes)
        synchronize = functools.partial(self._module.synchronize, segment.device)
        synchronize()  # the kernels' stream reads what is zero now
        self._watch = Watch(host, timeout=timeout, name=name)
        self._name = name
        self._lock = threading.Lock()
        self._broken = self._gave_up = ""
        # Also where nobody calls `close`: kernels in flight still use the words and the segment.
        self._let_go = weakref.finalize(
            self, _let_go, synchronize, self._watch, self._words, shared
        )
        # The streams of blocks that came back: a later call may overwrite what they still read.
        self._released: deque[Any] = deque()
        self._plans: dict[Hashable, tuple[Plan, int]] = {}  # with the digests of the questions
        self.num_staged = 0  # calls whose outputs were copied out of the staging

    def check(self) -> None:
        """Raises if this memory cannot be used any more.

        Raises:
            ClosedError: it was closed.
            CommunicationTimeoutError: a rank did not come to an earlier call.
            MismatchError: a rank asked for something else in an earlier call.
            CollectiveError: this rank was interrupted in the middle of an earlier call.
        """
        if not self._let_go.alive:
            raise ClosedError(f"the communicator {self._name!r} was destroyed before the call")
        self.check_waits()
        if self._broken:
            raise CollectiveError(self._broken)

    def check_waits(self) -> None:
        """Raises if a wait for another rank was ended, or a rank asked for something else.

        Raises:
            CommunicationTimeoutError: a rank did not come to an earlier call.
            MismatchError: a rank asked for something else in an earlier call, or gave it up.
            CollectiveError: this rank gave an earlier call up.
        """
        if self._gave_up:
            raise CollectiveError(self._gave_up)
        self._watch.check()

    def give_up(self, why: str) -> None:
        """Fails this rank's next call, and lets the other ranks hear of it.

        After this no rank can use the memory again.

        Args:
            why: what this rank's later calls say.

        Raises:
            ClosedError, CommunicationTimeoutError, MismatchError, CollectiveError: as `check`.
        """
        from ..kernels.posts import digest_of, launch_done, launch_post

        with self._lock:
            self.check()
            if self.is_capturing():
                return  # a graph must not hold this
            # No rank asks for this, so nobody writes to the place.
            digest = digest_of(b"gave up")
            with self._module.stream(self._stream), self._in_one_piece():
                launch_post(self._words, self._staging, digest)
                launch_done(self._words)
            self._gave_up = f"this rank gave an earlier call up: {why}"

    def start(
        self,
        asked: Hashable,
        inputs: Sequence[Tensor],
        question: Callable[[], bytes],
        specs_of: SpecsOf,
        copies_of: CopiesOf,
        targets: Sequence[int],
        *,
        async_op: bool,
    ) -> DeviceFlight:
        """Launches a call of all ranks: post, deliver, done.

        Args:
            asked: what is asked for. The four arguments behind `inputs` are looked at once for
                each `asked` and layout of the inputs.
            inputs: what this rank sends.
            question: `question()` gives what must be the same on all ranks.
            specs_of: `specs_of(rank)` gives shape and dtype of the outputs of a rank.
            copies_of: `copies_of(target, outputs)` gives pairs (to, from): what this rank copies
                into the outputs of a target. `outputs` have no memory, only layouts. The first pair
                is for a part of the first input, and so on.
            targets: the ranks that this rank writes to.
            async_op: the caller does not wait at once. Otherwise it does, so that what the kernels
                read lives long enough.

        Raises:
            ClosedError, CommunicationTimeoutError, MismatchError, CollectiveError: as `check`.
        """
        from ..kernels.deliver import launch_deliveries
        from ..kernels.posts import digest_of, launch_done, launch_post

        with self._lock:
            self.check()
            for each in inputs:
                if each.device != self._device:
                    raise ValueError(
                        f"tensors must be on {self._device}, where the first call was, got "
                        f"{each.device}"
                    )
            layout = asked, layout_of(inputs)
            planned = self._plans.get(layout)
            if planned is None:
                plan = plan_of(inputs, specs_of, copies_of, targets, self.rank, self.world)
                planned = keep(self._plans, layout, (plan, digest_of(question())))
            plan, digest = planned
            deliveries = deliveries_of(plan, inputs, self.rank, self.world)
            flight, offset, staged = self._allocated(plan.specs)
            self._begin_after(self.current_stream())
            with self._module.stream(self._stream), self._in_one_piece():
                launch_post(self._words, offset, digest)
                launch_deliveries(self._words.places, deliveries)
                launch_done(self._words)
                for output, arrived in zip(flight.outputs, staged, strict=False):
                    # A memory copy: no kernel that would first have to be loaded, in a capture.
                    copy_valid_(output, arrived, impl="torch")
                sources = [each.src for each in deliveries] if async_op else []
                flight.launched(self._stream.record_event(), sources)
            if async_op:  # the caller may drop them while the kernels use them
                for tensor in (*sources, *flight.outputs):
                    self.record(tensor, self._stream)
        return flight

    def record_stream(self, tensor: Tensor, stream: Any) -> bool:
        """Says that `stream` uses an output; False where the tensor is not in the pool."""
        address = tensor.untyped_storage().data_ptr() - self._shared.segment.data_ptr()
        block = self.pool.view_at(0, address - self._region.start)
        if block is None:
            return False
        self.uses(block, stream)
        return True

    def record(self, tensor: Tensor, stream: Any) -> None:
        """Says that `stream` uses a tensor, for torch's allocator, which ignores other memory."""
        if self._device.type != "cpu":
            tensor.record_stream(stream)

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
        return is_capturing(self._device)

    def close(self) -> None:
        """Waits for the device, and lets go of the segment. Tensors that are held stay."""
        with self._lock:
            self._let_go()

    def _allocated(self, specs: list[Spec]) -> tuple[DeviceFlight, int, list[Tensor]]:
        """A flight with its outputs, where the others write, and the staged outputs if any."""
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in specs]
        if not self.is_capturing():
            with contextlib.suppress(MemoryError):  # the pool has no room
                run = self.pool.allocate(sizes)
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
        released = list(self._released)
        for other in set(released) - {stream}:
            self._stream.wait_event(other.record_event())
        for _ in released:  # not before: an interrupt must leave them to the next call
            self._released.popleft()

    @contextlib.contextmanager
    def _in_one_piece(self) -> Iterator[None]:
        """After an exception in the middle of a call, the counts of the ranks may differ."""
        try:
            yield
        except BaseException as error:
            self._broken = f"an earlier call was interrupted: {type(error).__name__}: {error}"
            raise


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of a device is captured in a graph.

    Example:
        >>> is_capturing(torch.device("cpu"))
        False
    """
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return False
    with torch.accelerator.device_index(device.index):  # torch looks at the current device
        return torch.cuda.is_current_stream_capturing()


def _let_go(synchronize: Callable[[], None], watch: Watch, *_kept: object) -> None:
    """Waits for the kernels that use what is kept, while the watch still ends their waits."""
    try:
        synchronize()
    finally:
        watch.close()


def _on(memory: Tensor, spec: Spec) -> Tensor:
    """A contiguous tensor on the storage of `memory`; no view, so that it can be written to."""
    shape, dtype = spec
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    tensor = torch.empty(0, dtype=dtype, device=memory.device)
    return tensor.set_(memory.untyped_storage(), 0, tuple(shape), strides)
