"""Exchange by the memory of GPUs: ranks as threads, plain memory, and the kernels' twins."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import device_ranks
import pytest
import torch
from device_ranks import LoggedStream, Twins, device_memory_of, twin_kernels
from op_table import OF_SHAPE, SHAPE, calls_of
from recorded_graph import RecordedGraph
from torch import Tensor

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.errors import ClosedError, CollectiveError, CommunicationTimeoutError
from fastvideo_comm.memory.device import DeviceMemory

BY_MEMORY = ("all_to_all_4D", "all_gather", "reduce_scatter")


@pytest.fixture
def twins() -> Iterator[Twins]:
    with twin_kernels() as twins:
        yield twins


def integers(communicator: DeviceCommunicatorBase, call: int, *shape: int) -> Tensor:
    """Small integers in float64, so that sums are exact in any order."""
    generator = torch.Generator().manual_seed(100 * call + communicator.rank)
    return torch.randint(-4, 5, shape, generator=generator).double()


def by_messages(communicator: DeviceCommunicatorBase, job: Callable[[], Any]) -> Any:
    """What `job` gives when the ranks have no memory of each other."""
    group = communicator._runner.group
    memory, group.device_memory = group.device_memory, None
    try:
        return job()
    finally:
        group.device_memory = memory


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", {**OF_SHAPE, **calls_of("uneven")})
def test_every_op_its_gradient_and_the_gradient_of_that_are_those_by_messages(twins, name, world):
    if name not in OF_SHAPE and world != 3:
        pytest.skip("the sizes of this call are for 3 ranks")
    call = {**OF_SHAPE, **calls_of("uneven")}[name]
    shape = SHAPE if name in OF_SHAPE else (2, 3, 4)

    def job(communicator: DeviceCommunicatorBase) -> int:
        x, v = (integers(communicator, i, *shape).requires_grad_() for i in range(2))

        def derivatives() -> list[Tensor]:
            y = call(communicator, x)
            w = integers(communicator, 2, *y.shape).requires_grad_()
            (dx,) = torch.autograd.grad(y, x, w, create_graph=True)
            dw, *_ = torch.autograd.grad(dx, w, v, allow_unused=True)
            return [each.detach() for each in (y, dx, *(() if dw is None else (dw,)))]

        expected = by_messages(communicator, derivatives)
        call(communicator, x)
        num_posts = twins.posts_of[communicator.rank]
        actual = derivatives()
        for each, other in zip(actual, expected, strict=True):
            assert torch.equal(each, other)
            assert each.stride() == other.stride()
        return num_posts

    calls = 2 if name == "all_gather first, auto" else 1  # which asks the ranks for their sizes
    calls = calls if name.startswith(BY_MEMORY) else 0
    assert device_ranks.run(world, job) == [calls] * world


def test_gather_goes_to_one_rank(twins):
    def job(communicator: DeviceCommunicatorBase) -> None:
        x = integers(communicator, 0, 2, 3, 4)
        for dst in range(3):
            gathered = communicator.gather(x, dst, 1)
            expected = by_messages(communicator, functools.partial(communicator.gather, x, dst, 1))
            assert (gathered is None) == (expected is None) == (communicator.rank != dst)
            if gathered is not None:
                assert torch.equal(gathered, expected)

    device_ranks.run(3, job)
    assert twins.num_posts == 9


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.int8, torch.float8_e5m2, torch.bfloat16, torch.int64, torch.complex128],
)
def test_every_dtype_arrives_bit_by_bit(twins, dtype):
    def job(communicator: DeviceCommunicatorBase) -> None:
        numbers = torch.randint(0, 2, (1, 3, 4, 5 * dtype.itemsize), dtype=torch.uint8)
        x = (numbers if dtype is torch.bool else 60 * numbers).view(dtype)
        for each in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
            y = communicator.all_to_all_4D(each)
            expected = by_messages(communicator, lambda: communicator.all_to_all_4D(each))  # noqa: B023
            assert torch.equal(y.view(torch.uint8), expected.view(torch.uint8))

    device_ranks.run(2, job)
    assert twins.num_posts == 4


def test_a_lazy_conjugation_is_resolved(twins):
    def job(communicator: DeviceCommunicatorBase) -> None:
        x = torch.complex(*(integers(communicator, i, 1, 2, 4, 3) for i in range(2)))
        expected = communicator.all_to_all_4D(x.conj().resolve_conj())
        assert torch.equal(communicator.all_to_all_4D(x.conj()), expected)
        negated = communicator.all_to_all_4D(x.conj().imag.expand(1, 2, 4, 3))
        assert torch.equal(negated, expected.imag)

    device_ranks.run(2, job)


class TestOutputs:
    def test_belong_to_whoever_holds_them(self, twins):
        """They keep their values while others come and go, and their memory comes back."""

        def job(communicator: DeviceCommunicatorBase) -> None:
            memory = device_memory_of(communicator)
            held: list[tuple[Tensor, Tensor]] = []
            for call in range(40):
                x = integers(communicator, call, 1, 6, 4, 8)
                y = communicator.all_to_all_4D(x)
                y.add_(1)
                if call % 4 == communicator.rank:
                    held.append((y[:, 1:], y[:, 1:].clone()))
                if len(held) > 3:
                    held.pop(0)
                for view, values in held:
                    assert torch.equal(view, values)
            assert (
                0
                < memory.pool.bytes_in_use
                <= 5 * y.nbytes
                < memory.pool.high_water_bytes + y.nbytes
            )
            del held, view, values, y
            assert memory.pool.bytes_in_use == 0
            assert memory.num_staged == 0

        device_ranks.run(2, job, segment_bytes=1 << 16, staging_bytes=1 << 14)

    def test_are_copied_out_of_the_staging_where_a_rank_has_no_room(self, twins):
        """Its own decision: rank 1 holds everything, and rank 0 nothing."""

        def job(communicator: DeviceCommunicatorBase) -> int:
            held = []
            for call in range(12):
                x = integers(communicator, call, 1, 8, 4, 8)
                y = communicator.all_to_all_4D(x)
                whole = by_messages(communicator, functools.partial(communicator.all_to_all_4D, x))
                assert torch.equal(y, whole)
                if communicator.rank == 1:
                    held.append((y, whole))
            for y, whole in held:
                assert torch.equal(y, whole)
            return device_memory_of(communicator).num_staged

        staged = device_ranks.run(2, job, segment_bytes=1 << 13, staging_bytes=1 << 11)
        assert staged[0] == 0 < staged[1] < 12

    def test_in_the_staging_lie_behind_the_words_of_all_ranks(self, twins):
        """Five ranks have more words than one unit of alignment holds."""

        def job(communicator: DeviceCommunicatorBase) -> int:
            for call in range(3):
                x = integers(communicator, call, 1, 2, 5, 16)
                whole = by_messages(communicator, functools.partial(communicator.all_to_all_4D, x))
                assert torch.equal(communicator.all_to_all_4D(x), whole)
            return device_memory_of(communicator).num_staged

        segment_bytes, staging_bytes = (1 << 11) + (1 << 8), 1 << 11  # no room for a block
        staged = device_ranks.run(
            5, job, segment_bytes=segment_bytes, staging_bytes=staging_bytes, timeout=5
        )
        assert staged == [3] * 5

    def test_that_no_staging_holds_go_by_messages_on_all_ranks(self, twins):
        """Rank 0's outputs would fit, those of rank 2 do not."""

        def job(communicator: DeviceCommunicatorBase) -> None:
            x = integers(communicator, 0, 1, 16, 3, 16)[:, :5]
            sizes = [0, 1, 2]
            y = communicator.all_to_all_4D(x, scatter_sizes=sizes)
            expected = by_messages(
                communicator, lambda: communicator.all_to_all_4D(x, scatter_sizes=sizes)
            )
            assert torch.equal(y, expected)
            communicator.all_gather(x)
            communicator.reduce_scatter(x, 2)
            communicator.gather(x)

        device_ranks.run(3, job, staging_bytes=5 * 3 * 2 * 16 * 8 - 1024)
        assert twins.num_posts == 3, "only reduce_scatter, of which each rank gets 3 * 640 bytes"

    def test_that_are_sums_need_staging_for_each_term(self, twins):
        """Two ranks read the key head: its gradient has two terms, each as large as the head."""

        def job(communicator: DeviceCommunicatorBase) -> None:
            query = integers(communicator, 0, 1, 4, 2, 16).requires_grad_()
            key = integers(communicator, 1, 1, 4, 1, 16).requires_grad_()

            def gradients() -> tuple[Tensor, ...]:
                outputs = communicator.all_to_all_4D([query, key])
                weights = [integers(communicator, 2, *each.shape) for each in outputs]
                return torch.autograd.grad(outputs, [query, key], weights)

            expected = by_messages(communicator, gradients)
            for gradient, each in zip(gradients(), expected, strict=True):
                assert torch.equal(gradient, each)

        needed = 2 * 4 * 2 * 16 * 8  # as many bytes for the key as for the query
        device_ranks.run(2, job, staging_bytes=needed)
        assert twins.num_posts == 4, "the exchange and its gradients"
        device_ranks.run(2, job, staging_bytes=needed - 64)
        assert twins.num_posts == 4

    def test_of_a_compiled_operator_are_those_of_the_op(self, twins):
        def job(communicator: DeviceCommunicatorBase) -> None:
            x = integers(communicator, 0, 1, 3, 4, 2).requires_grad_()
            expected = communicator.all_to_all_4D(x)
            group = communicator._runner.group
            assert group.operator_name
            (y,) = torch.ops.fastvideo_comm.all_to_all([x], group.operator_name, [2, 1, 0, 1, 1, 0])
            assert torch.equal(y, expected)
            (dx,) = torch.autograd.grad(y, x, integers(communicator, 1, *y.shape))
            (expected_dx,) = torch.autograd.grad(expected, x, integers(communicator, 1, *y.shape))
            assert torch.equal(dx, expected_dx)

        device_ranks.run(2, job)
        assert twins.num_posts == 8


class TestCapture:
    def test_a_graph_replays_on_new_values_between_other_calls(self, twins, monkeypatch):
        """What a graph writes to belongs to the graph: nothing of it comes from the pool."""
        capturing = set()
        monkeypatch.setattr(DeviceMemory, "is_capturing", lambda memory: memory in capturing)

        def job(communicator: DeviceCommunicatorBase) -> None:
            memory = device_memory_of(communicator)
            x = torch.zeros(1, 3, 4, 2, dtype=torch.float64)

            def step() -> Tensor:
                y = communicator.all_to_all_4D(communicator.all_to_all_4D(x), 1, 2)
                return communicator.all_gather(y * 2, 1)

            step()
            in_use = memory.pool.bytes_in_use
            with RecordedGraph() as graph:
                capturing.add(memory)
                captured = step()
                capturing.remove(memory)
            assert (memory.num_staged, memory.pool.bytes_in_use) == (3, in_use)
            for call in range(3):
                x.copy_(integers(communicator, call, *x.shape))
                held = communicator.all_to_all_4D(x + 5)
                values = held.clone()
                graph.replay()
                replayed = captured.clone()
                assert torch.equal(replayed, step())
                assert torch.equal(held, values)

        device_ranks.run(2, job)


class TestFaults:
    def test_a_rank_that_comes_late_is_waited_for(self, twins):
        def job(communicator: DeviceCommunicatorBase) -> None:
            if communicator.rank == 1:
                time.sleep(0.4)
            x = integers(communicator, 0, 1, 2, 2, 2)
            y = communicator.all_to_all_4D(communicator.all_to_all_4D(x), 1, 2)
            assert torch.equal(x, y)

        device_ranks.run(2, job)

    def test_a_rank_that_does_not_come_is_named_by_the_next_call(self, twins):
        def job(communicator: DeviceCommunicatorBase) -> None:
            x = integers(communicator, 0, 1, 2, 3, 2)
            group = communicator._runner.group
            group.validate("off")  # a comparison of calls would notice it before
            communicator.all_to_all_4D(x)
            if communicator.rank == 2:
                return
            begin = time.monotonic()
            communicator.all_to_all_4D(x)
            assert time.monotonic() - begin < 10
            for _ in range(2):
                with pytest.raises(
                    CommunicationTimeoutError,
                    match=r"all_gather on rank . of 3 in group 'gpus': call 2 of group 'gpus' "
                    r"waited 0.3 s: rank 2 did not come",
                ) as caught:
                    communicator.all_gather(x)
                assert caught.value.peers == (2,)

        device_ranks.run(3, job, timeout=0.3)

    def test_after_an_interrupt_in_the_middle_of_a_call_there_is_no_other(self, twins, monkeypatch):
        def job(communicator: DeviceCommunicatorBase) -> None:
            x = integers(communicator, 0, 1, 2, 2, 2)
            group = communicator._runner.group
            group.validate("off")
            if communicator.rank == 1:
                memory = device_memory_of(communicator)
                memory._words = memory._words._replace(places=None)  # so that the post fails
                with pytest.raises(TypeError):
                    communicator.all_to_all_4D(x)
                with pytest.raises(CollectiveError, match="interrupted: TypeError"):
                    communicator.all_to_all_4D(x)
            else:
                communicator.all_to_all_4D(x)
                with pytest.raises(CommunicationTimeoutError, match="rank 1 did not come"):
                    communicator.all_to_all_4D(x)

        device_ranks.run(2, job, timeout=0.3)

    def test_a_closed_memory_takes_no_call(self, twins):
        def job(communicator: DeviceCommunicatorBase) -> None:
            x = integers(communicator, 0, 1, 2, 2, 2).requires_grad_()
            y = communicator.all_to_all_4D(x)
            memory = device_memory_of(communicator)
            communicator.destroy()
            with pytest.raises(ClosedError, match="'gpus' was destroyed before the call"):
                memory.check()
            with pytest.raises(ClosedError):
                y.sum().backward()
            assert y.sum().isfinite(), "what is held stays"
            assert communicator.memory_stats().refusal == "the communicator was destroyed"

        device_ranks.run(2, job)


class TestStreams:
    def test_a_block_is_written_again_after_what_its_streams_were_given(self, twins, monkeypatch):
        def job(communicator: DeviceCommunicatorBase) -> None:
            memory = device_memory_of(communicator)
            log: list[str] = []
            kernels, main, side, other = (
                LoggedStream(name, log) for name in ("kernels", "main", "side", "other")
            )
            memory._stream = kernels
            streams = {communicator.rank: main}
            memory.current_stream = lambda: streams[communicator.rank]
            x = integers(communicator, 0, 1, 2, 2, 2)

            first = communicator.all_to_all_4D(x)
            assert log == ["kernels waits for main", "main waits for kernels"]
            handle = communicator.all_to_all_4D(x, async_op=True)
            streams[communicator.rank] = side
            second = handle.wait()
            communicator.record_stream(second[..., 0], other)
            log.clear()
            third = communicator.all_to_all_4D(x)
            assert log == ["kernels waits for side", "side waits for kernels"], "nothing was freed"
            del first
            log.clear()
            communicator.all_to_all_4D(x)
            assert log[:2] == ["kernels waits for side", "kernels waits for main"]
            del second, third, handle
            log.clear()
            streams[communicator.rank] = main
            communicator.all_to_all_4D(x)
            assert log[0] == "kernels waits for main"
            assert sorted(log[1:3]) == ["kernels waits for other", "kernels waits for side"]
            log.clear()
            communicator.all_to_all_4D(x)
            assert log == ["kernels waits for main", "main waits for kernels"]

        device_ranks.run(2, job)


class TestDeliveries:
    def test_even_parts_of_a_tensor_are_one_delivery(self, twins):
        """And so each exchange of q, k and v is one launch of three."""

        def job(communicator: DeviceCommunicatorBase) -> None:
            q, k, v = (integers(communicator, i, 1, 4, 6, 2) for i in range(3))
            communicator.all_to_all_4D((q, k, v.transpose(1, 2).contiguous().transpose(1, 2)))

        device_ranks.run(3, job)
        assert twins.num_deliveries == 3 * 3
