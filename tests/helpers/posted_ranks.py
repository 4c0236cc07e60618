"""Ranks as threads that exchange by posted places, with the kernels on an emulated GPU or on a GPU.

On the emulated GPU a kernel may write to the words of all ranks and, where it delivers, to the
blocks that were posted, and what ranks share is under the memory order of memory_order.py. On a GPU
each rank has a stream of its own, and plain memory of the GPU takes the place of what ranks in
several processes would share.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerator import GPU
from emulated_gpu import EmulatedGPU, bytes_of
from memory_order import MemoryOrder
from ptx_arithmetic import Array
from strided_layouts import random_buffer
from tile_copy_module import imported_anew
from torch import Tensor

# A rank whose peer does not come gives up after this time.
PATIENCE_SECONDS = 30.0
SEGMENT_BYTES = 1 << 17
# Where blocks may begin, behind the words.
FIRST_BLOCK = 256
_POISON = 0xA5


class Kernels(NamedTuple):
    """The modules with the kernels."""

    posts: ModuleType
    deliver: ModuleType


@contextlib.contextmanager
def imported_kernels() -> Iterator[Kernels]:
    """The modules as they are compiled; forgotten afterwards."""
    with (
        imported_anew("fastvideo_comm.kernels.posts") as posts,
        imported_anew("fastvideo_comm.kernels.deliver") as deliver,
    ):
        yield Kernels(posts, deliver)


class Block(NamedTuple):
    """Bytes of the segment of a rank."""

    offset: int
    num_bytes: int


class PostedRank:
    """One rank: its segment, its words, its launches."""

    def __init__(self, ranks: PostedRanks, rank: int) -> None:
        self.ranks, self.rank, self.world = ranks, rank, ranks.world
        self.segment = ranks.segments[rank]
        bases = torch.tensor([each.data_ptr() for each in ranks.segments], device=ranks.device)
        host = torch.zeros(1 + self.world, dtype=torch.int64, pin_memory=ranks.gpu is None)
        zeros = torch.zeros_like(bases)
        self.words = ranks.kernels.posts.Words(bases, zeros, zeros.clone(), host, rank)

    def block(self, offset: int, num_bytes: int) -> Block:
        """A block of this rank, in which it has written something else before."""
        self.segment[offset : offset + num_bytes].fill_(_POISON)
        return Block(offset, num_bytes)

    def post(self, block: Block, digest: int = 0xFFFFF) -> None:
        """Tells the others of a block, and waits for theirs."""
        self.ranks.blocks[self.rank] = block
        with self._exchanges_words():
            self.ranks.kernels.posts.launch_post(self.words, block.offset, digest)

    def deliver(self, deliveries: Sequence[Any]) -> None:
        """Copies; reads its sources, writes to what was posted."""
        with self._writes_blocks([delivery.src for delivery in deliveries]):
            self.ranks.kernels.deliver.launch_deliveries(self.words.places, deliveries)

    def done(self) -> None:
        """Tells the others that their blocks are written, and waits for them."""
        with self._exchanges_words():
            self.ranks.kernels.posts.launch_done(self.words)

    def read(self, block: Block, dtype: torch.dtype) -> Tensor:
        """What stands in a block, as this rank sees it."""
        return self.segment[block.offset :][: block.num_bytes].cpu().view(dtype)

    def late(self) -> list[int]:
        """The ranks that this one waits for or has given up."""
        return [rank for rank, step in enumerate(self.words.host[1:].tolist()) if step % 2]

    def stop(self) -> None:
        """Ends every wait."""
        self.words.host[0] = 1

    def _exchanges_words(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def _writes_blocks(self, sources: list[Tensor]) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class EmulatedRank(PostedRank):
    """A rank on the emulated GPU: what it may access, and in which order."""

    def __init__(self, ranks: PostedRanks, rank: int) -> None:
        super().__init__(ranks, rank)
        self.memory = ranks.order.of(rank)

    def block(self, offset: int, num_bytes: int) -> Block:
        block = Block(offset, num_bytes)
        address, data = self._range(self.rank, block)
        self.memory.store(
            address, data, np.arange(num_bytes), np.full(num_bytes, _POISON, dtype=np.uint8)
        )
        return block

    def read(self, block: Block, dtype: torch.dtype) -> Tensor:
        address, data = self._range(self.rank, block)
        values = self.memory.load(address, data, np.arange(block.num_bytes), [])
        return torch.from_numpy(values.copy()).view(dtype)

    def _exchanges_words(self) -> contextlib.AbstractContextManager[None]:
        words = Block(0, 2 * 8 * self.world)
        return self._accesses([self._range(rank, words) for rank in range(self.world)], [])

    def _writes_blocks(self, sources: list[Tensor]) -> contextlib.AbstractContextManager[None]:
        blocks = [self._range(rank, block) for rank, block in self.ranks.blocks.items()]
        return self._accesses(blocks, [bytes_of(source) for source in sources])

    def _range(self, rank: int, block: Block) -> tuple[int, Array]:
        address, data = bytes_of(self.ranks.segments[rank])
        return address + block.offset, data[block.offset : block.offset + block.num_bytes]

    def _accesses(
        self, shared: list[tuple[int, Array]], sources: list[tuple[int, Array]]
    ) -> contextlib.AbstractContextManager[None]:
        if self.ranks.gpu is None:
            raise ValueError("an emulated rank needs the emulated GPU")
        own = [bytes_of(each) for each in self.words[:4]]
        return self.ranks.gpu.accesses([*own, *sources, *shared], [*own, *shared], self.memory)


class PostedRanks:
    """The ranks of one group on one emulated GPU, or on a GPU where `gpu` is None."""

    def __init__(self, gpu: EmulatedGPU | None, kernels: Kernels, world: int) -> None:
        self.gpu, self.kernels, self.world = gpu, kernels, world
        self.device = GPU if gpu is None else "cpu"
        self.segments = [
            torch.zeros(SEGMENT_BYTES, dtype=torch.uint8, device=self.device) for _ in range(world)
        ]
        self.blocks: dict[int, Block] = {}
        kind = PostedRank if gpu is None else EmulatedRank
        if gpu is not None:
            self.order = MemoryOrder([bytes_of(segment) for segment in self.segments])
        self.ranks = [kind(self, rank) for rank in range(world)]

    def warm_up(self, exchange: Exchange) -> None:
        """Loads everything that `exchange.run` needs, and leaves no trace.

        On a GPU a kernel that waits may keep other threads from loading theirs.
        """
        alone = PostedRanks(self.gpu, self.kernels, 1)
        for rank in self.ranks:
            rank.deliver(exchange.deliveries(self.kernels, rank.rank))  # their places are 0
        (only,) = alone.ranks
        only.post(only.block(FIRST_BLOCK, exchange.num_bytes))
        only.done()
        only.read(Block(FIRST_BLOCK, exchange.num_bytes), exchange.dtype)

    def run(self, job: Callable[[PostedRank], Any]) -> list[Any]:
        """`job(rank)` on every rank, and what it returned; the first error is raised here."""
        results: list[Any] = [None] * self.world
        errors: list[BaseException] = []

        def rank_thread(rank: PostedRank) -> None:
            try:
                with self._stream():
                    results[rank.rank] = job(rank)
            except BaseException as error:
                errors.append(error)
                self.stop()

        timer = threading.Timer(PATIENCE_SECONDS, self.stop)
        timer.start()
        threads = [threading.Thread(target=rank_thread, args=(rank,)) for rank in self.ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        timer.cancel()
        timer.join()
        if errors:
            raise errors[0]
        return results

    @contextlib.contextmanager
    def _stream(self) -> Iterator[None]:
        """On a GPU, a stream of this thread; what was enqueued there is complete afterwards."""
        if self.gpu is not None:
            yield
            return
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            yield
            stream.synchronize()

    def stop(self) -> None:
        """Ends every wait of every rank."""
        for rank in self.ranks:
            rank.stop()


class Exchange:
    """`all_to_all_4D(x, 2, 1)` of several tensors `[B, s, H, D]`, H differs from tensor to tensor.

    The outputs `[B, P*s, h, D]` stand behind each other in one block.
    """

    def __init__(
        self,
        world: int,
        heads: Sequence[int],
        dtype: torch.dtype,
        seed: int,
        *,
        length: int = 6,
        device: str = "cpu",
    ) -> None:
        self.world, self.dtype = world, dtype
        self.batch, self.length, self.width = 2, length, 8
        self.inputs = [
            [
                random_buffer(self.numel(each), dtype, 100 * seed + 10 * rank + i, device).view(
                    self.batch, self.length, each, self.width
                )
                for i, each in enumerate(heads)
            ]
            for rank in range(world)
        ]

    def numel(self, heads: int) -> int:
        return self.batch * self.length * heads * self.width

    @property
    def num_bytes(self) -> int:
        return sum(each.nbytes for each in self.inputs[0])

    def output_shape(self, index: int) -> tuple[int, ...]:
        heads = self.inputs[0][index].shape[2] // self.world
        return (self.batch, self.world * self.length, heads, self.width)

    def deliveries(self, kernels: Kernels, rank: int) -> list[Any]:
        offset, deliveries = 0, []
        for index, x in enumerate(self.inputs[rank]):
            _, whole, heads, width = self.output_shape(index)
            strides = (whole * heads * width, heads * width, width, 1)
            src = x.unflatten(2, (self.world, heads)).movedim(2, 0)
            own = offset + rank * self.length * strides[1] * x.element_size()
            begin = (rank + 1) % self.world
            deliveries.append(kernels.deliver.Delivery(src, 0, begin, own, strides))
            offset += x.nbytes
        return deliveries

    def expected(self, rank: int) -> list[Tensor]:
        """The outputs of a rank, by slicing what all ranks have."""
        outputs = []
        for index in range(len(self.inputs[0])):
            whole = torch.cat([inputs[index].cpu() for inputs in self.inputs], 1)
            outputs.append(whole.chunk(self.world, 2)[rank])
        return outputs

    def run(self, rank: PostedRank, offset: int) -> list[Tensor]:
        """One call with its outputs at `offset`; what they are afterwards."""
        block = rank.block(offset, self.num_bytes)
        rank.post(block)
        rank.deliver(self.deliveries(rank.ranks.kernels, rank.rank))
        rank.done()
        return self.outputs(rank.read(block, self.dtype))

    def outputs(self, flat: Tensor) -> list[Tensor]:
        sizes = [each.numel() for each in self.inputs[0]]
        return [part.view(self.output_shape(index)) for index, part in enumerate(flat.split(sizes))]

    def assert_right(self, results: Sequence[list[Tensor]]) -> None:
        for rank, outputs in enumerate(results):
            self.assert_right_on(rank, outputs)

    def assert_right_on(self, rank: int, outputs: list[Tensor]) -> None:
        for output, expected in zip(outputs, self.expected(rank), strict=True):
            assert torch.equal(output.view(torch.uint8), expected.contiguous().view(torch.uint8))
