"""Ranks as threads that exchange by the memory of GPUs, with plain memory in the place of it.

`run(world, job)` gives every rank a communicator. Its kernels are one of these:

- `twin_kernels`: functions of a few lines that do what the kernels do, on the CPU.
- `emulated_kernels`: the compiled kernels on the emulated GPU. What they share is under the memory
  order of memory_order.py.
- the kernels themselves, on a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerator import GPU
from emulated_gpu import EmulatedGPU, bytes_of
from memory_order import MemoryOrder, OrderedMemory
from posted_ranks import imported_kernels
from rank_threads import run_ranks
from recorded_graph import run_and_record
from torch import Tensor

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.kernels import deliver, posts
from fastvideo_comm.memory.device import DeviceMemory
from fastvideo_comm.memory.shared import Shared

# A rank that does not come is given up after this time, unless a test says otherwise.
TIMEOUT = 20.0
_PLACE_BITS, _DIGEST_BITS, _CALLS = 35, 20, 1 << 8


class PlainShared(Shared):
    """A segment on the CPU."""

    def block(self, start: int, stop: int) -> memoryview:
        return memoryview(self.segment.numpy())[start:stop]

    def tensor(self, block: memoryview) -> Tensor:
        return torch.frombuffer(block, dtype=torch.uint8)


class Segments:
    """The segments of one run, in the order of the ranks."""

    def __init__(self, world: int, num_bytes: int, device: str) -> None:
        self.segments = [
            torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(world)
        ]
        self.words_bytes = 2 * 8 * world

    @functools.cached_property
    def memories(self) -> list[OrderedMemory]:
        """The segments as each rank accesses them."""
        order = MemoryOrder([bytes_of(each) for each in self.segments])
        return [order.of(rank) for rank in range(len(self.segments))]

    def shared(self, rank: int) -> Shared:
        segment = self.segments[rank]
        kind = Shared if segment.is_cuda else PlainShared
        return kind(segment, [each.data_ptr() for each in self.segments])

    def check(self, address: int, num_bytes: int) -> None:
        """Fails where bytes are not behind the words of a segment."""
        for segment in self.segments:
            start = segment.data_ptr()
            if start + self.words_bytes <= address <= start + segment.numel() - num_bytes:
                return
        raise MemoryError(f"{num_bytes} bytes at {address:#x} are in no segment")


_present: list[Segments] = []  # of the run that goes on


@contextlib.contextmanager
def present(segments: Segments) -> Iterator[None]:
    """While it lasts, kernels may write to these."""
    _present.append(segments)
    try:
        yield
    finally:
        _present.remove(segments)


class LoggedStream:
    """A stream of which each wait is written down."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: LoggedStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        return self.name

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


def device_memory_of(communicator: DeviceCommunicatorBase) -> DeviceMemory:
    memory = communicator._runner.group.device_memory
    assert memory is not None
    return memory


def run(
    world: int,
    job: Callable[[DeviceCommunicatorBase], Any],
    *,
    segment_bytes: int = 1 << 18,
    staging_bytes: int = 1 << 17,
    timeout: float = TIMEOUT,
) -> list[Any]:
    """`job(communicator)` on every rank; its results in rank order."""
    segments = Segments(world, segment_bytes, "cpu")
    return _run(segments, job, staging_bytes, timeout)


def run_on_gpu(
    world: int, job: Callable[[DeviceCommunicatorBase], Any], *, timeout: float = TIMEOUT
) -> list[Any]:
    """`run`, with the kernels themselves, each rank on a stream of its own.

    The job runs twice: a kernel that waits may keep other threads from loading theirs, and from
    allocating memory. So the first time no kernel waits, and the results mean nothing. The second
    time torch's allocator has what the streams need.
    """
    streams = [torch.cuda.Stream() for _ in range(world)]

    def on_a_stream(communicator: DeviceCommunicatorBase) -> Any:
        with torch.cuda.stream(streams[communicator.rank]):
            result = job(communicator)
            torch.cuda.current_stream().synchronize()
        return result

    def without_waits(communicator: DeviceCommunicatorBase) -> None:
        memory = device_memory_of(communicator)
        memory._watch.close()  # a kernel may take longer to compile than ranks may take to come
        memory._words.host[0] = 1
        on_a_stream(communicator)

    for each in (without_waits, on_a_stream):
        results = _run(Segments(world, 1 << 24, GPU), each, 1 << 22, timeout)
    return results


def _run(
    segments: Segments,
    job: Callable[[DeviceCommunicatorBase], Any],
    staging_bytes: int,
    timeout: float,
) -> list[Any]:
    device = segments.segments[0].device

    def rank_job(group: dist.ProcessGroup) -> Any:
        communicator = DeviceCommunicatorBase(group, device, unique_name="gpus", memory="off")
        communicator._runner.group.device_memory = DeviceMemory(
            group.rank(),
            segments.shared(group.rank()),
            staging_bytes=staging_bytes,
            timeout=timeout,
            name="gpus",
        )
        try:
            return job(communicator)
        finally:
            communicator.destroy()

    with present(segments):
        return run_ranks(len(segments.segments), rank_job)


class Twins:
    """The kernels as functions, and how often each was launched, on all ranks together."""

    def __init__(self) -> None:
        self.posts_of: Counter[int] = Counter()  # by rank
        self.num_deliveries = 0
        self._lock = threading.Lock()

    @property
    def num_posts(self) -> int:
        return self.posts_of.total()

    def launch_post(self, words: posts.Words, offset: int, digest: int) -> None:
        def step() -> None:
            *_, rank = words
            bases = words.bases.tolist()
            with self._lock:
                self.posts_of[rank] += 1
            peers = [peer for peer in range(len(bases)) if peer != rank]
            words.places[rank] = bases[rank] + offset
            for peer in peers:
                words.counts[peer] += 1
                words.places[peer] = 0
                call = int(words.counts[peer])
                words.host[1 + peer] = 4 * call + 1
                if not words.host[0]:
                    asked = ((call % _CALLS) << _DIGEST_BITS) + digest
                    _word(bases[peer], rank).value = (asked << _PLACE_BITS) + offset // 16
            for peer in peers:
                call = int(words.counts[peer])
                shift = _PLACE_BITS + _DIGEST_BITS
                word = _waited(words, bases[rank], peer, call % _CALLS, shift)
                if word >> shift == call % _CALLS:
                    if (word >> _PLACE_BITS) % (1 << _DIGEST_BITS) == digest:
                        words.places[peer] = bases[peer] + word % (1 << _PLACE_BITS) * 16
                        words.host[1 + peer] = 4 * call + 2
                    else:
                        words.host[1 + peer] = -call

        run_and_record(step)

    def launch_deliveries(self, places: Tensor, deliveries: Sequence[Any]) -> None:
        (segments,) = _present

        def step() -> None:
            with self._lock:
                self.num_deliveries += len(deliveries)
            for src, first, begin, offset, strides in deliveries:
                if src.is_conj() or src.is_neg():
                    raise ValueError("the kernels copy the bytes of a tensor, not its values")
                for index in range(len(src)):
                    part = (begin + index) % len(src)
                    place = int(places[first + part])
                    if place and src[part].numel():
                        _copy_to(place + offset, strides, src[part], segments)

        run_and_record(step)

    def launch_done(self, words: posts.Words) -> None:
        def step() -> None:
            *_, rank = words
            bases = words.bases.tolist()
            world = len(bases)
            peers = [peer for peer in range(world) if peer != rank]
            came = [peer for peer in peers if words.places[peer]]
            if len(came) < len(peers):
                words.host[0] = 1
            for peer in came:
                call = int(words.counts[peer])
                words.host[1 + peer] = 4 * call + 3
                _word(bases[peer], world + rank).value = call
            for peer in came:
                call = int(words.counts[peer])
                if _waited(words, bases[rank], world + peer, call, 0) == call:
                    words.host[1 + peer] = 4 * call + 4

        run_and_record(step)


def _word(base: int, index: int) -> ctypes.c_int64:
    return ctypes.c_int64.from_address(base + 8 * index)


def _waited(words: posts.Words, base: int, index: int, wanted: int, shift: int) -> int:
    """The word, when its upper bits are `wanted` or the host has stopped the wait."""
    word = _word(base, index)
    while word.value >> shift != wanted and not words.host[0]:
        time.sleep(0.0001)
    return word.value


def _copy_to(address: int, strides: Sequence[int], src: Tensor, segments: Segments) -> None:
    extent = sum((size - 1) * stride for size, stride in zip(src.shape, strides, strict=True)) + 1
    num_bytes = extent * src.element_size()
    segments.check(address, num_bytes)
    memory = (ctypes.c_uint8 * num_bytes).from_address(address)
    flat = torch.frombuffer(memory, dtype=torch.uint8).view(src.dtype)
    with torch.no_grad():
        flat.as_strided(src.shape, tuple(strides)).copy_(src)


@contextlib.contextmanager
def twin_kernels() -> Iterator[Twins]:
    """The kernels' twins in their place."""
    twins = Twins()
    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (posts, "launch_post"),
            (deliver, "launch_deliveries"),
            (posts, "launch_done"),
        ):
            patch.setattr(module, name, getattr(twins, name))
        yield twins


@contextlib.contextmanager
def emulated_kernels(gpu: EmulatedGPU) -> Iterator[None]:
    """The compiled kernels, which may access what a call gives them."""
    here = threading.local()  # the words of the rank whose call runs in this thread
    with imported_kernels() as kernels, pytest.MonkeyPatch.context() as patch:
        launch_post, launch_done = kernels.posts.launch_post, kernels.posts.launch_done
        launch_deliveries = kernels.deliver.launch_deliveries

        def accesses(sources: Sequence[Tensor], *, words: bool) -> Any:
            (segments,) = _present
            own = [bytes_of(each) for each in here.words[:4]]
            behind = segments.words_bytes
            shared = [
                (address, data[:behind]) if words else (address + behind, data[behind:])
                for address, data in map(bytes_of, segments.segments)
            ]
            readable = [*own, *map(bytes_of, sources), *shared]
            return gpu.accesses(readable, [*own, *shared], segments.memories[here.words.rank])

        def post(words: Any, offset: int, digest: int) -> None:
            here.words = words
            with accesses([], words=True):
                launch_post(words, offset, digest)

        def done(words: Any) -> None:
            with accesses([], words=True):
                launch_done(words)

        def deliveries(places: Tensor, given: Sequence[Any]) -> None:
            with accesses([each.src for each in given], words=False):
                launch_deliveries(places, given)

        patch.setattr(kernels.posts, "launch_post", post)
        patch.setattr(kernels.posts, "launch_done", done)
        patch.setattr(kernels.deliver, "launch_deliveries", deliveries)
        yield
