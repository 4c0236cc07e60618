"""Ranges in the profiler's trace, counters, and what both cost while nobody listens."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from ranks import Ranks

from fastvideo_comm import DeviceCommunicatorBase, op_runner
from fastvideo_comm.profiling import Stats, span


def traced(communicator: DeviceCommunicatorBase) -> list[str]:
    watched = DeviceCommunicatorBase(communicator.cpu_group, unique_name="sp")
    x = torch.zeros(1, 2, 4, 3)
    watched.all_to_all_4D(x)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
    ) as profile:
        watched.all_to_all_4D(x)
        watched.all_gather(x)
    return [event.key for event in profile.key_averages() if "fastvideo_comm::" in event.key]


def test_a_profiler_shows_each_op_with_the_name_of_its_communicator(ranks: Ranks):
    for names in ranks.run(2, traced):
        ops = {"fastvideo_comm::all_to_all_4D[sp]", "fastvideo_comm::all_gather[sp]"}
        assert ops <= set(names)


def test_a_range_encloses_what_happens_in_it():
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
    ) as profile:
        with span("op", "sp"):
            with span("pack", "sp"):
                torch.zeros(10).add_(1)
    events = {event.name: event for event in profile.events()}
    outer, inner = events["fastvideo_comm::op[sp]"], events["fastvideo_comm::pack[sp]"]
    assert inner.cpu_parent is outer
    assert events["aten::add_"].cpu_parent is inner


class Range:
    """In the place of a range in a trace: keeps what it was told."""

    def __init__(self, word: str, name: str) -> None:
        self.told = [f"{word}[{name}]"]

    def __enter__(self) -> None:
        self.told.append("begins")

    def __exit__(self, *error: object) -> None:
        self.told.append("ends")


def failed(communicator: DeviceCommunicatorBase) -> None:
    ranges: list[Range] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op_runner.profiler, "_is_profiler_enabled", True)
        patch.setattr(op_runner, "span", lambda *each: ranges.append(Range(*each)) or ranges[-1])
        with pytest.raises(ValueError, match="dim must be in"):
            communicator.all_gather(torch.zeros(3), 7)
    assert [each.told for each in ranges] == [["all_gather[test]", "begins", "ends"]]


def test_the_range_of_an_op_that_failed_ends_with_it(ranks: Ranks):
    ranks.run(1, failed)


class Unspoken:
    """A name that must not become a text."""

    def __format__(self, _: str) -> str:
        raise AssertionError("a name was built")


def test_while_nobody_listens_no_name_is_built():
    with span("op", Unspoken()), span("pack", Unspoken()):
        pass
    with torch.profiler.profile(acc_events=True):
        with pytest.raises(AssertionError, match="a name was built"):
            span("op", Unspoken())


def fastest(call: Any, repeats: int = 20, calls: int = 200) -> float:
    """Seconds per call, without what other processes cost."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - begin) / calls)
    return min(times)


def test_watching_costs_microseconds():
    """The fastest call of any backend takes some 50 us."""
    stats = Stats()

    def call() -> None:
        stats.add_call("op", 0.1, 8)

    def phase() -> None:
        with span("pack", "sp"):
            pass

    assert fastest(call) < 5e-6
    assert fastest(phase) < 2e-6


def watched_calls(communicator: DeviceCommunicatorBase) -> None:
    watched = DeviceCommunicatorBase(communicator.cpu_group)
    begin = time.perf_counter()
    for size in (3, 4):
        watched.all_reduce(torch.ones(size))
    elapsed = time.perf_counter() - begin
    watched.all_gather(torch.ones(2, dtype=torch.int8))
    with pytest.raises(ValueError, match="dim must be in"):
        watched.all_gather(torch.ones(2), 7)
    snapshot = watched.stats()
    assert list(snapshot) == ["all_reduce", "all_gather"]
    assert snapshot["all_reduce"][:2] == (2, 7 * 4)
    assert elapsed / 2 <= snapshot["all_reduce"].seconds <= elapsed
    assert snapshot["all_gather"][:2] == (1, 2)
    watched.all_reduce(torch.ones(1))
    assert snapshot["all_reduce"].calls == 2, "a snapshot stays as it was"


def test_counters_are_of_calls_that_succeeded_their_bytes_and_seconds(ranks: Ranks):
    ranks.run(2, watched_calls)


def tallied(communicator: DeviceCommunicatorBase) -> dict[str, int]:
    watched = DeviceCommunicatorBase(communicator.cpu_group)
    for _ in range(3):
        watched.all_reduce(torch.ones(2))
    compiled = torch.compile(lambda x: watched.all_reduce(x) + 1, backend="eager", fullgraph=True)
    assert compiled(torch.ones(2))[0] == communicator.world_size + 1
    return {op: stats.calls for op, stats in watched.stats().items()}


def test_compiled_calls_are_not_counted_and_do_not_break_the_graph(ranks: Ranks):
    assert ranks.run(2, tallied) == [{"all_reduce": 3}] * 2


def phases(communicator: DeviceCommunicatorBase) -> tuple[set[str], dict[str, tuple[int, int]]]:
    memory = communicator._runner.group._memory_mode
    watched = DeviceCommunicatorBase(communicator.cpu_group, unique_name="sp", memory=memory)
    x = torch.zeros(2, 64, 4, 128)
    watched.all_to_all_4D(x)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
    ) as profile:
        y = watched.all_to_all_4D(x)
        watched.all_to_all_4D(y, 1, 2)
        watched.all_gather(x, 1)
    watched.gather(x)
    if watched.rank == 0:
        watched.send(x[0])
    else:
        watched.recv((64, 4, 128), x.dtype)
    names = {event.key for event in profile.key_averages() if "fastvideo_comm::" in event.key}
    return names, {op: stats[:2] for op, stats in watched.stats().items()}


@pytest.mark.parametrize("way", ["messages", "memory"])
def test_ops_and_phases_are_ranges_and_stats_count_calls_and_bytes(ranks: Ranks, way):
    num_bytes = 2 * 64 * 4 * 128 * 4
    for rank, (names, stats) in enumerate(ranks.run(2, phases, ways=[way])):
        words = {"all_to_all_4D", "all_gather", "exchange"}
        if way == "messages":
            words |= {"pack", "unpack"}
        assert names == {f"fastvideo_comm::{word}[sp]" for word in words}
        assert stats == {
            "all_to_all_4D": (3, 3 * num_bytes),
            "all_gather": (1, num_bytes),
            "gather": (1, num_bytes),
            ("send", "recv")[rank]: (1, num_bytes // 2),
        }
