"""Exchange by posted places on one GPU: ranks as threads, whose kernels really wait.

They all have the memory of one process, so times say nothing about several GPUs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from accelerator import GPU, needs_gpu
from posted_ranks import FIRST_BLOCK, Exchange, Kernels, PostedRank, PostedRanks, imported_kernels
from torch import Tensor

from fastvideo_comm.errors import CommunicationTimeoutError
from fastvideo_comm.memory.watch import Watch

pytestmark = needs_gpu


@pytest.fixture(scope="module")
def kernels() -> Iterator[Kernels]:
    pytest.importorskip("triton", reason="the kernels need triton")
    with imported_kernels() as kernels:
        yield kernels


def exchange_of(world: int, seed: int = 0) -> Exchange:
    return Exchange(world, [2 * world, world], torch.bfloat16, seed, length=64, device=GPU)


def ranks_for(kernels: Kernels, exchange: Exchange) -> PostedRanks:
    ranks = PostedRanks(None, kernels, exchange.world)
    ranks.warm_up(exchange)
    return ranks


def offset_of(rank: PostedRank, call: int = 0) -> int:
    return FIRST_BLOCK + 16 * rank.rank + 4096 * (call % 3)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_calls_follow_each_other_at_other_places(kernels, world):
    exchanges = [exchange_of(world, seed) for seed in range(4)]

    def job(rank: PostedRank) -> list[list[Tensor]]:
        return [
            exchange.run(rank, offset_of(rank, call)) for call, exchange in enumerate(exchanges)
        ]

    results = ranks_for(kernels, exchanges[0]).run(job)
    for call, exchange in enumerate(exchanges):
        exchange.assert_right([outputs[call] for outputs in results])


def test_a_captured_call_replays_on_new_values(kernels):
    exchange = exchange_of(2)
    ranks = ranks_for(kernels, exchange)
    captures, captured = threading.Lock(), threading.Barrier(2, timeout=60)

    def job(rank: PostedRank) -> list[Tensor]:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        # A capture begins by waiting for the device: nothing may spin there meanwhile.
        with captures, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            block = rank.block(offset_of(rank), exchange.num_bytes)
            rank.post(block)
            rank.deliver(exchange.deliveries(kernels, rank.rank))
            rank.done()
        captured.wait()
        for _ in range(3):
            for x in exchange.inputs[rank.rank]:
                x.view(torch.int16).add_(1)
            graph.replay()
        return exchange.outputs(rank.read(block, exchange.dtype))

    exchange.inputs[0][0].view(torch.int16).add_(0)  # loads the kernel
    exchange.assert_right(ranks.run(job))
    assert ranks.ranks[0].words.counts.tolist() == [0, 3]


def test_a_rank_that_comes_late_is_waited_for(kernels):
    exchange = exchange_of(4)

    def job(rank: PostedRank) -> list[Tensor]:
        if rank.rank == 1:
            time.sleep(0.5)
        return exchange.run(rank, offset_of(rank))

    exchange.assert_right(ranks_for(kernels, exchange).run(job))


def test_kernels_end_when_a_rank_does_not_come(kernels):
    """And the device is as it was: the next exchange of other ranks is right."""
    exchange = exchange_of(2)
    ranks = ranks_for(kernels, exchange)

    def job(rank: PostedRank) -> None:
        if rank.rank == 1:
            return
        watch = Watch(rank.words.host, timeout=0.5, name="sp")
        rank.post(rank.block(FIRST_BLOCK, exchange.num_bytes))
        rank.deliver(exchange.deliveries(kernels, rank.rank))
        rank.done()
        torch.cuda.current_stream().synchronize()
        with pytest.raises(CommunicationTimeoutError, match="rank 1 did not come"):
            watch.check()
        watch.close()

    ranks.run(job)
    again = ranks_for(kernels, exchange)
    exchange.assert_right(again.run(lambda rank: exchange.run(rank, offset_of(rank))))
