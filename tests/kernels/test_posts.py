"""Exchange by posted places: ranks as threads, whose waits really wait, on an emulated GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_gpu import EmulatedGPU, emulated_gpu
from memory_order import RaceError
from posted_ranks import (
    FIRST_BLOCK,
    Exchange,
    Kernels,
    PostedRank,
    PostedRanks,
    imported_kernels,
)
from recorded_graph import RecordedGraph
from test_native_kernel import CAPABILITIES, share

from fastvideo_comm.kernels import plan

RELEASE, ACQUIRE = "atom.global.sys.release", "ld.global.sys.acquire"
CALLS = 1 << 8  # that a post tells apart


@pytest.fixture(scope="module", params=CAPABILITIES)
def gpu(request: pytest.FixtureRequest, emulated_gpu_directory: Path) -> Iterator[EmulatedGPU]:
    with emulated_gpu(emulated_gpu_directory, CAPABILITIES[request.param]) as gpu:
        yield gpu


@pytest.fixture(scope="module")
def kernels(gpu: EmulatedGPU) -> Iterator[Kernels]:
    with imported_kernels() as kernels:
        yield kernels


@pytest.fixture
def edited(gpu: EmulatedGPU) -> Iterator[Callable[[Callable[[str], str]], Kernels]]:
    """`edited(edit)`: the kernels whose PTX was edited before it was loaded."""
    with imported_kernels() as kernels:

        def with_edit(edit: Callable[[str], str]) -> Kernels:
            gpu.edit = edit
            return kernels

        yield with_edit
        gpu.edit = str


def offset_of(rank: PostedRank, call: int = 0) -> int:
    """Of a rank's block in a call: ranks decide it by themselves."""
    return FIRST_BLOCK + 4096 * ((rank.rank + call) % 3) + 16 * rank.rank


class TestResults:
    @pytest.mark.parametrize(
        ("world", "dtype"),
        [(1, torch.int8), (2, torch.int8), (3, torch.bfloat16), (4, torch.complex128)],
    )
    def test_every_rank_has_its_heads_of_the_whole_sequence(self, gpu, kernels, world, dtype):
        exchange = Exchange(world, [2 * world, world, world], dtype, seed=world)
        ranks = PostedRanks(gpu, kernels, world)
        results = ranks.run(lambda rank: exchange.run(rank, offset_of(rank)))
        exchange.assert_right(results)
        assert [rank.late() for rank in ranks.ranks] == [[]] * world

    def test_calls_follow_each_other_at_other_places_and_at_the_same(self, gpu, kernels):
        """A block is posted again right after it was read: nobody may still write to it, or yet."""
        exchanges = [Exchange(3, [6, 3], torch.float32, seed) for seed in range(5)]

        def job(rank: PostedRank) -> list[Any]:
            return [
                exchange.run(rank, offset_of(rank, call // 2))
                for call, exchange in enumerate(exchanges)
            ]

        results = PostedRanks(gpu, kernels, 3).run(job)
        for call, exchange in enumerate(exchanges):
            exchange.assert_right([outputs[call] for outputs in results])

    def test_a_captured_call_replays_on_new_values(self, gpu, kernels):
        """Among calls that are not captured: every replay is a call of its own."""
        exchange, eager = (Exchange(2, [4, 2], torch.bfloat16, seed) for seed in range(2))
        renewed = [[x.neg() for x in inputs] for inputs in exchange.inputs]
        ranks = PostedRanks(gpu, kernels, 2)

        def job(rank: PostedRank) -> list[Any]:
            graph = RecordedGraph()
            results = []
            with graph:
                exchange.run(rank, offset_of(rank))
            for times in range(3):
                if times == 2:
                    inputs = zip(exchange.inputs[rank.rank], renewed[rank.rank], strict=True)
                    for x, values in inputs:
                        x.copy_(values)
                block = rank.block(offset_of(rank), exchange.num_bytes)
                rank.ranks.blocks[rank.rank] = block
                graph.replay()
                results.append(exchange.outputs(rank.read(block, exchange.dtype).clone()))
                eager.assert_right_on(rank.rank, eager.run(rank, offset_of(rank, 1)))
            return results

        before = [[x.clone() for x in inputs] for inputs in exchange.inputs]
        results = ranks.run(job)
        exchange.assert_right([outputs[2] for outputs in results])
        exchange.inputs = before
        for times in range(2):
            exchange.assert_right([outputs[times] for outputs in results])
        assert ranks.ranks[0].words.counts.tolist() == [0, 7]

    def test_numbers_of_calls_that_a_post_does_not_tell_apart(self, gpu, kernels):
        exchange = Exchange(2, [2], torch.bfloat16, seed=0)
        ranks = PostedRanks(gpu, kernels, 2)
        for rank in ranks.ranks:
            rank.words.counts.fill_(CALLS - 3)
        for call in range(5):
            exchange.assert_right(
                ranks.run(lambda rank: exchange.run(rank, offset_of(rank, call)))  # noqa: B023
            )

    def test_a_bounded_grid_copies_everything_once(self, gpu, kernels, monkeypatch):
        """3 programs for many more tiles. Where a warp touches 32 bytes it wants all of them."""
        monkeypatch.setattr(plan, "MAX_DELIVERY_PROGRAMS", 3)
        exchange = Exchange(2, [8, 4], torch.bfloat16, seed=0, length=200)
        deliveries = exchange.deliveries(kernels, 0)
        fixed = map(kernels.deliver._fixed, deliveries)
        launch = kernels.deliver._plan_launches(*fixed)
        num_tiles = sum(
            (numbers[0] - 3) // 2 * (parts[0] - 3) // 2
            for numbers, parts in zip(launch.numbers, launch.parts, strict=True)
        )
        assert launch.grid == (3, 1, 1)
        assert num_tiles > 8

        def job(rank: PostedRank) -> tuple[list[Any], list[int]]:
            block = rank.block(FIRST_BLOCK, exchange.num_bytes)
            rank.post(block)
            rank.deliver(exchange.deliveries(kernels, rank.rank))
            moved = gpu.last_moved
            rank.done()
            return exchange.outputs(rank.read(block, exchange.dtype)), moved

        results = PostedRanks(gpu, kernels, 2).run(job)
        exchange.assert_right([outputs for outputs, _ in results])
        size = exchange.num_bytes
        places_bytes = num_tiles * 32 * plan.NUM_WARPS * 8  # every thread reads its tile's place
        sectors = 2 * size // 32 + num_tiles * plan.NUM_WARPS
        assert [moved for _, moved in results] == [[size + places_bytes, size, sectors]] * 2


class TestWaits:
    def test_a_rank_that_comes_late_is_waited_for(self, gpu, kernels):
        """Once before its post and once before its done; the others say whom they wait for."""
        exchange = Exchange(3, [3], torch.bfloat16, seed=0)
        ranks = PostedRanks(gpu, kernels, 3)
        waited: list[list[list[int]]] = []

        def pause() -> None:
            others = [ranks.ranks[0], ranks.ranks[2]]
            deadline = time.monotonic() + 20
            while any(rank.late() != [1] for rank in others) and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.05)
            waited.append([rank.late() for rank in others])

        def job(rank: PostedRank) -> list[Any]:
            block = rank.block(offset_of(rank), exchange.num_bytes)
            if rank.rank == 1:
                pause()
            rank.post(block)
            if rank.rank == 1:
                pause()
            rank.deliver(exchange.deliveries(kernels, rank.rank))
            rank.done()
            return exchange.outputs(rank.read(block, exchange.dtype))

        exchange.assert_right(ranks.run(job))
        assert waited == [[[1], [1]]] * 2

    def test_stopped_waits_end_and_say_who_did_not_come(self, gpu, kernels):
        """Rank 1 does not come to call 2: nothing is written there, and nobody says that it was."""
        exchange = Exchange(3, [3], torch.bfloat16, seed=0)
        ranks = PostedRanks(gpu, kernels, 3)
        ranks.run(lambda rank: exchange.run(rank, offset_of(rank)))
        before = ranks.segments[1].clone()
        late: list[list[int]] = []

        def job(rank: PostedRank) -> None:
            if rank.rank == 1:
                while any(other.late() != [1] for other in (ranks.ranks[0], ranks.ranks[2])):
                    time.sleep(0.01)
                late.extend(other.late() for other in (ranks.ranks[0], ranks.ranks[2]))
                ranks.stop()
                return
            rank.post(rank.block(offset_of(rank, 1), exchange.num_bytes))
            assert rank.words.places[1] == 0
            rank.deliver(exchange.deliveries(kernels, rank.rank))
            rank.done()
            assert 1 in rank.late()

        ranks.run(job)
        assert late == [[1], [1]]
        posts, dones = ranks.segments[1].view(torch.int64)[:6].view(2, 3)
        assert (posts >> 55).tolist() == [2, 0, 2], "they had posted before they were stopped"
        assert dones.tolist() == [1, 0, 1]
        assert torch.equal(ranks.segments[1][48:], before[48:])

    def test_nothing_is_posted_by_a_rank_that_was_stopped(self, gpu, kernels):
        """Whoever comes late may otherwise write to a block that is in use again."""
        exchange = Exchange(2, [2], torch.bfloat16, seed=0)
        ranks = PostedRanks(gpu, kernels, 2)
        ranks.stop()
        ranks.ranks[0].post(ranks.ranks[0].block(FIRST_BLOCK, exchange.num_bytes))
        assert not ranks.segments[1].any()
        assert ranks.ranks[0].late() == [1]


class TestQuestions:
    @pytest.mark.parametrize("turn", range(7))
    def test_nothing_is_written_for_a_rank_that_asks_for_something_else(
        self, request, gpu, kernels, turn
    ):
        """Rank 2 does, in call 2: no wait is for it, and no call is posted any more.

        The capabilities take turns with the 20 bits of a digest.
        """
        bit = (share(request, range(20)) * 2)[turn]
        exchange = Exchange(3, [3], torch.bfloat16, seed=0)
        ranks = PostedRanks(gpu, kernels, 3)
        ranks.run(lambda rank: exchange.run(rank, offset_of(rank)))
        blocks = [segment[FIRST_BLOCK:].clone() for segment in ranks.segments]

        def job(rank: PostedRank) -> None:
            digest = 0b1010 << 16 | 1
            rank.post(
                rank.block(offset_of(rank, 1), exchange.num_bytes),
                digest ^ (1 << bit if rank.rank == 2 else 0),
            )
            others = [0, 1] if rank.rank == 2 else [2]
            assert [each for each in range(3) if rank.words.places[each] == 0] == others
            assert [int(rank.words.host[1 + each]) for each in others] == [-2] * len(others)
            rank.deliver(exchange.deliveries(kernels, rank.rank))
            rank.done()
            assert rank.words.host[0] == 1

        ranks.run(job)
        for rank, before in zip(ranks.ranks, blocks, strict=True):
            own = rank.segment[FIRST_BLOCK:].clone()
            written = own[offset_of(rank, 1) - FIRST_BLOCK :][: exchange.num_bytes]
            part = exchange.num_bytes // 3
            # Of the parts of its block, rank 2 has its own only; the others have each other's too.
            poisoned = int((written == 0xA5).sum())
            assert poisoned >= part * (2 if rank.rank == 2 else 1)
            written.copy_(before[offset_of(rank, 1) - FIRST_BLOCK :][: exchange.num_bytes])
            assert torch.equal(own, before), "nothing was written beside the block"
        before = [segment[:48].clone() for segment in ranks.segments]
        ranks.ranks[0].post(ranks.ranks[0].block(FIRST_BLOCK, exchange.num_bytes))
        for segment, words in zip(ranks.segments[1:], before[1:], strict=True):
            assert torch.equal(segment[:48], words)

    def test_the_digest_of_a_question_has_20_bits_that_all_depend_on_it(self, kernels):
        digests = {kernels.posts.digest_of(b"%d" % number) for number in range(2000)}
        assert len(digests) > 1990  # 2000**2 / 2 pairs, each the same once in 2**20
        assert 0 <= min(digests) < max(digests) < 1 << 20
        for bit in range(20):
            assert len({digest >> bit & 1 for digest in digests}) == 2


class TestBreaks:
    """What is broken here on purpose is noticed."""

    @pytest.mark.parametrize("kernel", ["post", "done"])
    @pytest.mark.parametrize("order", [RELEASE, ACQUIRE], ids=["release", "acquire"])
    def test_a_word_that_orders_nothing(self, gpu, edited, kernel, order):
        name = order.rpartition(".")[0]

        def edit(ptx: str) -> str:
            if f".entry {kernel}(" not in ptx:
                return ptx
            assert order in ptx
            return ptx.replace(order, f"{name}.relaxed")

        exchange = Exchange(2, [2], torch.bfloat16, seed=0)
        with pytest.raises(RaceError, match="and nothing orders the two"):
            PostedRanks(gpu, edited(edit), 2).run(lambda rank: exchange.run(rank, FIRST_BLOCK))

    def test_a_done_that_comes_before_the_copy(self, gpu, kernels):
        exchange = Exchange(2, [2], torch.bfloat16, seed=0)

        def job(rank: PostedRank) -> list[Any]:
            block = rank.block(FIRST_BLOCK, exchange.num_bytes)
            rank.post(block)
            rank.done()
            rank.deliver(exchange.deliveries(kernels, rank.rank))
            return exchange.outputs(rank.read(block, exchange.dtype))

        with pytest.raises((RaceError, AssertionError)):
            exchange.assert_right(PostedRanks(gpu, kernels, 2).run(job))

    def test_a_copy_that_does_not_wait_for_dones(self, gpu, kernels):
        exchange = Exchange(2, [2], torch.bfloat16, seed=0)

        def job(rank: PostedRank) -> list[Any]:
            block = rank.block(FIRST_BLOCK, exchange.num_bytes)
            rank.post(block)
            rank.deliver(exchange.deliveries(kernels, rank.rank))
            return exchange.outputs(rank.read(block, exchange.dtype))

        with pytest.raises((RaceError, AssertionError)):
            exchange.assert_right(PostedRanks(gpu, kernels, 2).run(job))

    def test_posts_that_are_not_counted(self, gpu, kernels):
        """Rank 0 takes rank 1's place of the call before, and so writes outside what is posted."""
        exchange = Exchange(2, [2], torch.bfloat16, seed=0)
        ranks = PostedRanks(gpu, kernels, 2)
        ranks.run(lambda rank: exchange.run(rank, FIRST_BLOCK))
        rank, other = ranks.ranks
        rank.words.counts.zero_()
        ranks.blocks[1] = other.block(FIRST_BLOCK + 4096, exchange.num_bytes)
        rank.post(rank.block(FIRST_BLOCK, exchange.num_bytes))
        with pytest.raises(MemoryError, match="are in none of"):
            rank.deliver(exchange.deliveries(kernels, 0))

    def test_a_delivery_outside_a_block(self, gpu, kernels):
        exchange = Exchange(2, [2], torch.bfloat16, seed=0)

        def job(rank: PostedRank) -> None:
            rank.post(rank.block(FIRST_BLOCK, exchange.num_bytes - 16))
            rank.deliver(exchange.deliveries(kernels, rank.rank))

        with pytest.raises(MemoryError, match="are in none of"):
            PostedRanks(gpu, kernels, 2).run(job)
