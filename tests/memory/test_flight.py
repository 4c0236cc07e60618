"""Calls: every part arrives, in whatever order they are started and waited for."""

from __future__ import annotations

import random
import threading
import time

import memory_worlds as worlds
import pytest
import torch
from memory_worlds import ask_all, ask_pair, exchange, in_processes, in_threads, outputs, value

from fastvideo_comm.memory import host, memfd
from fastvideo_comm.memory.host import Ask, HostMemory, Place


@pytest.mark.parametrize("run", [in_processes, in_threads])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_part_arrives(run, ranks):
    def job(memory: HostMemory) -> None:
        for call in range(30):
            exchange(memory, call, size=call * call % 37, strided=bool(call % 2))
        exchange(memory, 31, size=1 << 17)
        exchange(memory, 32, size=1 << 14, strided=True)

    run(ranks, job)


def test_outputs_are_their_holders_and_nobody_else_writes_to_them():
    def job(memory: HostMemory) -> None:
        kept = {}
        generator = random.Random(5)
        for call in range(150):
            kept[call] = exchange(memory, call, size=generator.choice([1, 5, 40]))
            if generator.random() < 0.6:
                kept.pop(generator.choice(list(kept)))
            if generator.random() < 0.1:
                kept[call + 1000] = kept.get(call, torch.zeros(3)).clone().mul_(3)
        for call, tensor in kept.items():
            if call < 1000:
                want = worlds.expected_all(memory, call, tensor.shape[1])
                assert torch.equal(tensor, want)
        kept.clear()
        del tensor
        assert memory.pool.bytes_in_use == 0
        assert memory.pool.high_water_bytes > 0

    in_processes(3, job)


@pytest.mark.parametrize("run", [in_processes, in_threads])
def test_a_call_returns_only_when_slow_parts_are_there(run):
    def job(memory: HostMemory) -> None:
        def slow(part: torch.Tensor, number: int, target: int) -> None:
            if target != memory.rank:
                time.sleep(0.05 * (memory.rank + 1))
            part.fill_(number)

        for call in range(3):
            exchange(memory, call, copy=slow)

    run(3, job)


def shuffled(memory: HostMemory, seed: int) -> None:
    """Flights of all kinds in the air, waited for in an order of this rank's own, or dropped."""
    common, own = random.Random(seed), random.Random(seed * 10 + memory.rank)
    ranks = range(memory.world_size)
    in_air = []
    for call in range(40):
        background = own.random() < 0.5
        if common.random() < 0.6 or memory.world_size == 1:
            size, strided = common.choice([0, 1, 7, 5000]), common.random() < 0.5
            ask = ask_all(memory, call, size=size, strided=strided)
            want = worlds.expected_all(memory, call, size, strided)
        else:
            source, target = common.sample(ranks, 2)
            if memory.rank not in (source, target):
                continue
            ask = ask_pair(memory, source, target, call)
            want = torch.full((3,), value(call, source, target))
        flight = memory.start(ask, background=background)
        out = outputs(ask) if ask.posted else None
        if not background or own.random() < 0.7:
            in_air.append((flight, out, want))
        del ask, flight, out
        while in_air and own.random() < 0.4:
            _finish(in_air.pop(own.randrange(len(in_air))))
    own.shuffle(in_air)
    while in_air:
        _finish(in_air.pop())
    exchange(memory, 99)
    assert worlds.settled(memory) == 0


def _finish(entry: tuple) -> None:
    flight, out, want = entry
    if flight.is_background and random.random() < 0.3:
        deadline = time.monotonic() + 30
        while not flight.is_completed() and time.monotonic() < deadline:
            time.sleep(0.0002)
    flight.wait()
    assert flight.is_completed()
    if out is not None:
        assert torch.equal(out, want)


@pytest.mark.parametrize("run", [in_processes, in_threads])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_flights_are_waited_for_in_any_order_and_may_be_dropped(run, ranks):
    def job(memory: HostMemory) -> None:
        for seed in range(6):
            shuffled(memory, seed)

    run(ranks, job)


def test_a_dropped_flight_is_delivered_while_its_rank_computes():
    def job(memory: HostMemory) -> float:
        ask = ask_all(memory, 1)
        begin = time.monotonic()
        if memory.rank == 0:
            memory.start(ask, background=True)
            del ask
            time.sleep(3)
            return 0.0
        memory.start(ask).wait()
        assert torch.equal(outputs(ask), worlds.expected_all(memory, 1))
        return time.monotonic() - begin

    assert max(in_processes(3, job)) < 2


def test_starting_in_the_background_does_not_wait_for_the_copy():
    def job(memory: HostMemory) -> tuple[float, float]:
        exchange(memory)

        def slow(part: torch.Tensor, number: int, target: int) -> None:
            time.sleep(0.5)
            part.fill_(number)

        ask = ask_all(memory, 2, copy=slow)
        begin = time.monotonic()
        flight = memory.start(ask, background=True)
        started = time.monotonic() - begin
        flight.wait()
        assert torch.equal(outputs(ask), worlds.expected_all(memory, 2))
        return started, time.monotonic() - begin

    for started, whole in in_processes(2, job):
        assert started < 0.4  # less than one copy
        assert whole > 0.45  # the two copies, by two threads


def test_a_rank_that_waits_for_one_flight_delivers_for_another():
    """Rank 0 waits for the second call first, rank 1 for the first, none in the background."""

    def job(memory: HostMemory) -> None:
        asks = [ask_all(memory, call) for call in range(2)]
        flights = [memory.start(ask) for ask in asks]
        for flight in flights if memory.rank else reversed(flights):
            flight.wait()
        for call, ask in enumerate(asks):
            assert torch.equal(outputs(ask), worlds.expected_all(memory, call))

    in_processes(2, job)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_call_that_moves_nothing_is_posted_also_where_the_others_have_posted_before(ranks):
    """The last rank reads the others' posts of the second call while it is in the first.

    While it copies for another rank, the others finish their parts; while it copies for itself,
    they have all their parts and go on.
    """

    def job(memory: HostMemory) -> None:
        def slow(part: torch.Tensor, number: int, target: int) -> None:
            if memory.rank == ranks - 1:
                time.sleep(0.3)
            part.fill_(number)

        exchange(memory)  # the others know this rank's segment
        if memory.rank == ranks - 1:
            time.sleep(0.3)  # the others post first, so that this rank copies its own part last
        exchange(memory, 1, copy=slow)
        memory.start(Ask("nothing", b"n", b"n", lambda rank, place: None, lambda: b"")).wait()
        assert not memory._engine._ledger.flights
        exchange(memory, 2)

    in_processes(ranks, job, timeout=10)


def test_threads_of_one_rank_wait_for_their_own_flights():
    def job(memory: HostMemory) -> None:
        # One thread after the other starts a call, so that all ranks have the same order.
        asks = [ask_all(memory, call, size=2000) for call in range(24)]
        flights = [memory.start(ask) for ask in asks]
        threads = [
            threading.Thread(target=worlds.wait_all, args=(flights[i::4],), daemon=True)
            for i in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        for call, ask in enumerate(asks):
            assert torch.equal(outputs(ask), worlds.expected_all(memory, call, 2000))

    in_processes(3, job)


def test_outputs_that_nobody_else_reads_are_not_posted():
    """A gather: only rank 1 posts, and a rank that sends holds nothing afterwards."""

    def job(memory: HostMemory) -> None:
        ranks, specs = memory.world_size, [((memory.world_size, 4), torch.int32)]

        def deliver(target: int, place: Place) -> None:
            memory.tensors_at(target, place, specs)[0][memory.rank].fill_(memory.rank)

        receives = memory.rank == 1
        ask = Ask(
            "gather",
            b"gather",
            b"gather",
            deliver,
            lambda: b"",
            posted=memory.allocate(specs) if receives else None,
            sources=range(ranks) if receives else (),
            targets=[1],
        )
        memory.start(ask).wait()
        if receives:
            assert outputs(ask).tolist() == [[rank] * 4 for rank in range(ranks)]
        else:
            assert memory.pool.high_water_bytes == 0

    in_processes(3, job)


def test_outputs_are_ordinary_tensors_under_every_mode():
    def job(memory: HostMemory) -> None:
        specs = [((2, 3), torch.bfloat16), ((0, 4), torch.float32), ((), torch.complex64)]
        with torch.inference_mode(), torch.device("meta"):
            posted = memory.allocate(specs)
            seen = memory.tensors_at(memory.rank, posted.place, specs)
            out = exchange_under_modes(memory)
        for tensor, (shape, dtype) in zip(posted.tensors, specs, strict=True):
            assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
            assert tensor.is_cpu
            assert tensor.is_contiguous()
            assert tensor.is_inference()  # as what torch makes in that mode
            assert tensor.data_ptr() % 64 == 0
            with torch.inference_mode():
                tensor.fill_(2)
        for tensor, same in zip(posted.tensors, seen, strict=True):
            assert torch.equal(tensor, same)
        out = out.clone().add_(1)
        weight = torch.ones(5, dtype=torch.double, requires_grad=True)
        (out.double() * weight).sum().backward()
        assert weight.grad is not None

    def exchange_under_modes(memory: HostMemory) -> torch.Tensor:
        ask = ask_all(memory, 3, copy=lambda part, number, target: part.fill_(number))
        memory.start(ask, background=True).wait()
        return outputs(ask)

    in_processes(2, job)


def test_a_part_may_require_a_gradient_and_leaves_no_graph():
    def job(memory: HostMemory) -> None:
        x = torch.ones(4, requires_grad=True)
        specs = [((memory.world_size, 4), torch.float32)]

        def deliver(target: int, place: Place) -> None:
            memory.tensors_at(target, place, specs)[0][memory.rank].copy_(x * 2)
            assert not memory.tensors_at(target, place, specs)[0].requires_grad

        for background in (False, True):
            posted = memory.allocate(specs)
            ranks = range(memory.world_size)
            ask = Ask("g", b"g", b"g", deliver, bytes, posted=posted, sources=ranks, targets=ranks)
            with torch.enable_grad():
                memory.start(ask, background=background).wait()
            assert not posted.tensors[0].requires_grad
            assert posted.tensors[0].tolist() == [[2.0] * 4] * memory.world_size

    in_processes(2, job)


def test_two_threads_may_be_the_first_to_copy_into_a_segment(monkeypatch):
    def slow(*arguments: int) -> memfd.Segment:
        time.sleep(0.3)
        return memfd.Segment(*arguments)

    def job(memory: HostMemory) -> None:
        specs = [((4,), torch.int64)]
        posted = memory.allocate(specs)
        monkeypatch.setattr(host, "Segment", slow)
        failures = []

        def deliver(target: int, place: Place) -> None:
            def write(index: int) -> None:
                try:
                    memory.tensors_at(target, place, specs)[0][index] = index
                except Exception as error:
                    failures.append(error)

            threads = [threading.Thread(target=write, args=(index,)) for index in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        other = [1 - memory.rank]
        ask = Ask("w", b"w", b"w", deliver, bytes, posted=posted, sources=other, targets=other)
        memory.start(ask).wait()
        assert failures == []
        assert posted.tensors[0].tolist() == [0, 1, 2, 3]

    in_processes(2, job)


def test_a_flight_that_is_over_holds_neither_inputs_nor_outputs():
    def job(memory: HostMemory) -> None:
        ask = ask_all(memory)
        flight = memory.start(ask)
        flight.wait()
        del ask
        assert memory.pool.bytes_in_use == 0
        flight.wait()

    in_processes(2, job)
