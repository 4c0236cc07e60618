"""What lives how long where ranks exchange by the memory of GPUs, and who hears of a late rank."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import device_ranks
import pytest
import torch
from device_ranks import LoggedStream, Segments, Twins, device_memory_of, twin_kernels
from torch import Tensor

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.errors import CommunicationTimeoutError
from fastvideo_comm.memory import deliveries, device
from fastvideo_comm.memory.device import DeviceMemory


@pytest.fixture
def twins() -> Iterator[Twins]:
    with twin_kernels() as twins:
        yield twins


def memory_alone() -> DeviceMemory:
    """The memory of the only rank of a group."""
    shared = Segments(1, 1 << 12, "cpu").shared(0)
    return DeviceMemory(0, shared, staging_bytes=64, timeout=20.0, name="gpus")


class TestDropped:
    @pytest.mark.parametrize("is_in_a_cycle", [False, True])
    def test_a_memory_waits_for_its_kernels_and_then_ends_its_watch(
        self, monkeypatch, is_in_a_cycle
    ):
        """Kernels in flight write to the words, and the watch ends their waits."""
        seen: list[tuple[bool, bool]] = []

        def synchronize(_: torch.device) -> None:
            if threads:
                seen.append((threads[0].is_alive(), words() is not None))

        threads: list[threading.Thread] = []
        monkeypatch.setattr(torch.cpu, "synchronize", synchronize)
        memory: Any = memory_alone()
        words = weakref.ref(memory._words.places)
        threads.append(memory._watch._thread)
        if is_in_a_cycle:
            memory.itself = memory
        del memory
        gc.collect()
        assert seen == [(True, True)]
        threads[0].join(10)
        assert not threads[0].is_alive()
        assert words() is None

    def test_the_watch_ends_too_where_the_device_has_failed(self, monkeypatch):
        memory = memory_alone()

        def fails() -> None:
            raise RuntimeError("an illegal memory access was encountered")

        with pytest.raises(RuntimeError, match="illegal memory access"):
            device._let_go(fails, memory._watch)
        assert not memory._watch._thread.is_alive()


class TestInputs:
    def test_of_an_asynchronous_call_are_held_until_it_is_waited_for(self, twins):
        """An input may be an output of another communicator, which would use its memory again."""

        def job(communicator: DeviceCommunicatorBase) -> None:
            pool = device_memory_of(communicator).pool
            y = communicator.all_to_all_4D(torch.ones(1, 4, 2, 8))
            one = pool.bytes_in_use
            handle = communicator.all_to_all_4D(y, 1, 2, async_op=True)
            del y
            assert pool.bytes_in_use == 2 * one
            z = handle.wait()
            assert pool.bytes_in_use == one == z.nbytes

        device_ranks.run(2, job)


class TestPlans:
    def test_are_made_once_for_each_layout(self, twins, monkeypatch):
        """Wherever the inputs are: alone, in one memory, or behind others."""
        planned: list[int] = []

        def plan_of(*arguments: Any) -> Any:
            planned.append(arguments[-2])
            return deliveries.plan_of(*arguments)

        monkeypatch.setattr(device, "plan_of", plan_of)

        def job(communicator: DeviceCommunicatorBase) -> None:
            def trade(*inputs: Tensor) -> None:
                outputs = communicator.all_to_all_4D(inputs)
                for x, y in zip(inputs, communicator.all_to_all_4D(outputs, 1, 2), strict=True):
                    assert torch.equal(x, y)

            memory = torch.arange(10_000.0) + communicator.rank
            q, k = memory[:48].view(1, 3, 4, 4), memory[100:148].view(1, 3, 4, 4)
            for pair in ((q, k), (k, q), (q, q.clone()), (k, memory[7:55].view(1, 3, 4, 4))):
                trade(*pair)
            trade(q, memory[:384].view(1, 3, 8, 16)[:, :, ::2, :4])
            trade(q[:, :2], k)

        device_ranks.run(2, job)
        assert sorted(planned) == [0] * 5 + [1] * 5, "there and back, other strides, other sizes"

    def test_that_are_too_many_are_made_again(self, twins, monkeypatch):
        monkeypatch.setattr(deliveries, "_MAX_PLANS", 2)

        def job(communicator: DeviceCommunicatorBase) -> None:
            for length in (1, 2, 3, 1, 2, 3):
                x = torch.arange(16.0 * length).view(1, length, 4, 4)
                y = communicator.all_gather(x, 1)
                assert torch.equal(y, torch.cat([x, x], 1))
                assert len(device_memory_of(communicator)._plans) <= 2

        device_ranks.run(2, job)


class TestStreams:
    def test_that_waits_is_told_to_torch_for_an_output_in_torchs_memory(self, twins, monkeypatch):
        """The memory was allocated on the stream that was current at the start."""
        monkeypatch.setattr(DeviceMemory, "is_capturing", lambda memory: True)

        def job(communicator: DeviceCommunicatorBase) -> None:
            memory: Any = device_memory_of(communicator)
            recorded: list[tuple[int, str]] = []
            memory.record = lambda tensor, stream: recorded.append((tensor.data_ptr(), stream.name))
            kernels, main, side = (LoggedStream(name, []) for name in ("kernels", "main", "side"))
            memory._stream = kernels
            memory.current_stream = lambda: main
            x = torch.ones(1, 4, 2, 8)
            handle = communicator.all_to_all_4D(x, async_op=True)
            started = [(x.data_ptr(), "kernels"), recorded[-1]]
            assert recorded == started
            memory.current_stream = lambda: side
            y = handle.wait()
            assert recorded == [*started, (y.data_ptr(), "side")]
            assert started[1] == (y.data_ptr(), "kernels")

        device_ranks.run(2, job)

    def test_that_waits_is_where_a_sum_is_allocated(self, twins, monkeypatch):
        here = threading.local()
        new_empty = Tensor.new_empty

        def logged(tensor: Tensor, shape: Any) -> Tensor:
            here.log.append(f"allocates {list(shape)}")
            return new_empty(tensor, shape)

        def job(communicator: DeviceCommunicatorBase) -> None:
            here.log = []
            x = torch.ones(1, 4, 1, 8).requires_grad_()
            (y,) = communicator.all_to_all_4D([x])  # both ranks have its only head
            memory: Any = device_memory_of(communicator)
            current = LoggedStream("current", here.log)
            memory._stream = LoggedStream("kernels", here.log)
            memory.current_stream = lambda: current
            y.backward(torch.ones_like(y))
            expected = ["kernels waits for current", "current waits for kernels"]
            assert here.log == [*expected, "allocates [1, 4, 1, 8]"]
            assert torch.equal(x.grad, torch.full_like(x, 2))

        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "new_empty", logged)
            device_ranks.run(2, job)

    def test_that_held_a_block_is_waited_for_after_an_interrupt_too(self, twins):
        def job(communicator: DeviceCommunicatorBase) -> None:
            memory: Any = device_memory_of(communicator)
            log: list[str] = []
            memory._stream, main, side = (
                LoggedStream(name, log) for name in ("kernels", "main", "side")
            )
            memory.current_stream = lambda: main
            y = communicator.all_to_all_4D(torch.ones(1, 2, 2, 2))
            communicator.record_stream(y, side)
            del y

            def interrupted() -> str:
                del side.record_event
                raise KeyboardInterrupt

            side.record_event = interrupted
            with pytest.raises(KeyboardInterrupt):
                communicator.all_to_all_4D(torch.ones(1, 2, 2, 2))
            log.clear()
            for _ in range(2):
                communicator.all_to_all_4D(torch.ones(1, 2, 2, 2))
            once = ["kernels waits for main", "main waits for kernels"]
            assert log == [once[0], "kernels waits for side", once[1], *once]

        device_ranks.run(2, job)

    def test_is_looked_at_on_the_device_of_the_memory(self, monkeypatch):
        """torch says whether the current device captures, which may be another."""
        current = [0]

        @contextlib.contextmanager
        def device_index(index: int) -> Iterator[None]:
            current.append(index)
            yield
            current.pop()

        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] == 1)
        monkeypatch.setattr(torch.accelerator, "device_index", device_index)
        assert [device.is_capturing(torch.device("cuda", i)) for i in range(3)] == [0, 1, 0]


class TestLateRank:
    """The last rank does not come to the second call."""

    TEXT = r"call 2 of group 'gpus' waited 0.3 s: rank 2 did not come"

    def run(self, then: Callable[[DeviceCommunicatorBase, Tensor], None]) -> None:
        """`then(communicator, y)` on the others after that call; `y` is from the first call."""

        def job(communicator: DeviceCommunicatorBase) -> None:
            communicator._runner.group.validate("off")  # a comparison would notice it before
            x = torch.ones(1, 2, 3, 2, requires_grad=True)
            y = communicator.all_to_all_4D(x)
            if communicator.rank != 2:
                communicator.all_to_all_4D(x.detach())
                then(communicator, y)

        device_ranks.run(3, job, timeout=0.3)

    @pytest.mark.parametrize("op", ["all_reduce", "barrier", "slice", "send", "backward"])
    def test_is_heard_of_in_the_next_call_of_any_op(self, twins, op):
        """Also in one that moves nothing, or goes by messages."""

        def then(communicator: DeviceCommunicatorBase, y: Tensor) -> None:
            calls: dict[str, Callable[[], Any]] = {
                "all_reduce": lambda: communicator.all_reduce(y.detach()),
                "barrier": communicator.barrier,
                "slice": lambda: communicator.slice(y.detach(), 1),
                "send": lambda: communicator.send(y.detach()),
                "backward": y.sum().backward,
            }
            name = "all_to_all_4D backward" if op == "backward" else op
            with pytest.raises(
                CommunicationTimeoutError,
                match=rf"^{name} on rank . of 3 in group 'gpus': {self.TEXT}",
            ) as caught:
                calls[op]()
            assert caught.value.peers == (2,)

        self.run(then)

    def test_is_heard_of_where_an_asynchronous_call_is_waited_for(self, twins):
        handles: list[Any] = []

        def job(communicator: DeviceCommunicatorBase) -> None:
            communicator._runner.group.validate("off")
            x = torch.ones(1, 2, 3, 2)
            communicator.all_to_all_4D(x)
            if communicator.rank == 2:
                return
            handles.append(communicator.all_to_all_4D(x, async_op=True))
            with pytest.raises(
                CommunicationTimeoutError,
                match=rf"^all_to_all_4D on rank . of 3 in group 'gpus': {self.TEXT}",
            ):
                handles[-1].wait()

        device_ranks.run(3, job, timeout=0.3)
        assert len(handles) == 2

    def test_is_logged_at_once(self, twins, caplog):
        """There may be no further call."""
        with caplog.at_level(logging.ERROR, "fastvideo_comm"):
            self.run(lambda *_: None)
        assert len(caplog.messages) == 2
        for message in caplog.messages:
            assert message == self.TEXT + "; what was computed since that call is wrong"
