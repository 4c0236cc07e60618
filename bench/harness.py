"""What all benchmarks share: timing several systems in turn, rows, progress.

Systems of one case are timed in one run, in turn: a round gives each system one untimed call, so
that it starts from its own steady state (allocator, pages, branch predictors), and then its timed
calls; the order rotates from round to round, so that machine noise hits all alike. On a GPU a
sample is the device time between two events around a few calls that were queued behind a sleeping
kernel, so the host's launch time is not in it; on the CPU a sample is one call on a monotonic
clock, also where several calls follow each other without a barrier. Input is random, never zeros,
and rotates over sets that together are larger than the cache.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

# One call of a system on input set `i`; what it returns is dropped before the next call.
System = Callable[[int], object]
Item = TypeVar("Item")

GPU_CALLS_PER_SAMPLE = 5
# Device cycles of sleep per microsecond of host time to hide; the fastest clock of an H200 is 1.98
# GHz, and twice the host time is slept.
CYCLES_PER_MICROSECOND = 4000


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the middle, the best and the worst sample."""

    median_s: float
    min_s: float
    max_s: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """The statistics of at least one sample."""
        if not samples:
            raise ValueError("samples must hold at least one number, got none")
        return cls(statistics.median(samples), min(samples), max(samples), len(samples))


def time_in_turn(
    systems: Mapping[str, System],
    *,
    device: torch.device,
    seconds: float,
    num_sets: int = 1,
    calls: int = 1,
    barrier: Callable[[], object] = lambda: None,
    agree: Callable[[int], int] = int,
) -> dict[str, list[float]]:
    """Samples of every system, taken in turn for about `seconds`, at least three rounds.

    Args:
        systems: name -> call on input set i.
        device: decides the clock.
        seconds: time to spend on all systems together.
        num_sets: input sets that calls rotate over.
        calls: CPU calls behind each barrier, each of which is a sample; above 1 for tiny calls,
            which would otherwise begin with what the barrier leaves in the caches.
        barrier: runs before each sample; with real ranks, lets them start together.
        agree: one rank's number of rounds for all ranks.
    """
    sample = _gpu_sample if device.type == "cuda" else _cpu_sample
    turn = iter(range(1 << 62))
    started = time.perf_counter()
    for _ in range(2):  # first calls compile, allocate and fault pages in
        warm_started = time.perf_counter()
        for system in systems.values():
            sample(system, turn, num_sets, calls, barrier)
    per_round = time.perf_counter() - warm_started
    left = seconds - (time.perf_counter() - started)
    per_system = 2 if calls > 1 or device.type == "cuda" else 3
    rounds = agree(max(3, min(60, int(left / (per_round * (per_system + 1) / 2)))))
    samples: dict[str, list[float]] = {name: [] for name in systems}
    names = list(systems)
    for round_ in range(rounds):
        for offset in range(len(names)):
            name = names[(round_ + offset) % len(names)]
            barrier()
            systems[name](next(turn) % num_sets)
            for _ in range(per_system):
                samples[name] += sample(systems[name], turn, num_sets, calls, barrier)
    return samples


def _cpu_sample(
    system: System, turn: Iterator[int], num_sets: int, calls: int, barrier: Callable[[], object]
) -> list[float]:
    barrier()
    samples = []
    for _ in range(calls):
        start = time.perf_counter()
        system(next(turn) % num_sets)
        samples.append(time.perf_counter() - start)
    return samples


def _gpu_sample(
    system: System, turn: Iterator[int], num_sets: int, calls: int, barrier: Callable[[], object]
) -> list[float]:
    calls = max(calls, GPU_CALLS_PER_SAMPLE)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    barrier()
    start = time.perf_counter()
    system(next(turn) % num_sets)
    host_microseconds = (time.perf_counter() - start) * 1e6 * calls + 20
    torch.cuda.synchronize()
    # A first call may have compiled for seconds: the sleep has an upper end.
    torch.cuda._sleep(int(min(host_microseconds, 5000) * CYCLES_PER_MICROSECOND))
    begin.record()
    for _ in range(calls):
        system(next(turn) % num_sets)
    end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e-3 / calls]


def num_input_sets(bytes_per_set: int, device: torch.device) -> int:
    """How many sets make the input four times as large as the last cache, from 2 to 24."""
    cache = (
        torch.cuda.get_device_properties(device).L2_cache_size
        if device.type == "cuda"
        else 32 << 20
    )
    return max(2, min(24, -(-4 * cache // max(1, bytes_per_set))))


def random_like(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random bits as `dtype`: cheap for a gigabyte, and no two rows compress alike.

    Floating-point numbers are finite: each byte is below 0x40, where no exponent is all ones.
    """
    size = torch.empty((), dtype=dtype).element_size()
    numbers = torch.randint(
        0, 64, (*shape[:-1], shape[-1] * size), dtype=torch.uint8, device=device
    )
    return numbers.view(dtype)


@dataclass
class Report:
    """Rows of one benchmark, and what could not be measured."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(
        self,
        case: str,
        samples: Mapping[str, Sequence[float]],
        *,
        num_bytes: int,
        limit: str | None,
        **context: Any,
    ) -> None:
        """One row per system; `of_copy` is its share of the bandwidth of the system `limit`.

        Bandwidth counts bytes read plus bytes written by one pass, `num_bytes`, for all alike.
        """
        timings = {name: Timing.of(times) for name, times in samples.items()}
        bound = timings[limit].median_s if limit in timings else None
        for name, timing in timings.items():
            self.rows.append(
                {
                    "case": case,
                    "system": name,
                    "median_s": timing.median_s,
                    "min_s": timing.min_s,
                    "max_s": timing.max_s,
                    "samples": timing.samples,
                    "bytes": num_bytes,
                    "of_copy": None if bound is None else bound / timing.median_s,
                    **context,
                }
            )

    def problem(self, text: str) -> None:
        """Say what was not measured or came out wrong, once."""
        if text not in self.problems:
            self.problems.append(text)


@contextlib.contextmanager
def track(items: Sequence[Item], title: str, *, shown: bool = True) -> Iterator[Iterator[Item]]:
    """Iterate with a progress bar; without rich, or where not shown, just iterate."""
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )
    except ImportError:
        shown = False
    if not shown:
        yield iter(items)
        return
    columns = (TextColumn(f"{title:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    label = TextColumn("{task.description}")
    with Progress(*columns, label, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(items))

        def advance() -> Iterator[Item]:
            for item in items:
                progress.update(task, description=str(getattr(item, "name", item)))
                yield item
                progress.advance(task)
            progress.update(task, description="")

        yield advance()
