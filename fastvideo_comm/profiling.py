"""What tools see of an op: named ranges while a profiler runs, and counters all the time.

The range of an op is `fastvideo_comm::<op>[<unique_name>]`. Inside are the phases
`fastvideo_comm::pack[..]`, `exchange[..]` and `unpack[..]`. `torch.profiler` shows the ranges. NVTX
tools show them under `torch.autograd.profiler.emit_nvtx()`. While no profiler runs, no name of a
range is built.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch.autograd import profiler


def span(word: str, name: str) -> AbstractContextManager[Any]:
    """A range in the profiler's trace; nothing while no profiler runs. Not for compiled code.

    Example:
        >>> with span("pack", "sp"):
        ...     pass

    Args:
        word: the op or the phase.
        name: the communicator's `unique_name`.
    """
    # Without a profiler torch's own range is cheaper than a nullcontext, which is Python.
    text = f"fastvideo_comm::{word}[{name}]" if profiler._is_profiler_enabled else ""
    return torch._C._profiler._RecordFunctionFast(text)


class OpStats(NamedTuple):
    """The counters of one op.

    Attributes:
        calls: how many calls succeeded.
        bytes: the bytes of this rank's inputs; for `recv` the bytes of the output.
        seconds: the time on the host. On an accelerator a call returns before it is done, so this
            is the time to enqueue it.
    """

    calls: int
    bytes: int
    seconds: float


class MemoryStats(NamedTuple):
    """The memory by which the ranks of a host exchange, on this rank.

    Attributes:
        bytes_in_use: what this rank's outputs take that somebody holds.
        high_water_bytes: the largest that `bytes_in_use` ever was.
        segments: how many segments this rank has made.
        refusal: why the ranks use messages; empty where they use memory, and before the first call.
    """

    bytes_in_use: int
    high_water_bytes: int
    segments: int
    refusal: str


class Stats:
    """The counters of one communicator. They leave out the backward and compiled code.

    Example:
        >>> stats = Stats()
        >>> stats.add_call("all_gather", seconds=0.5, num_bytes=1024)
        >>> stats.snapshot()["all_gather"]
        OpStats(calls=1, bytes=1024, seconds=0.5)
    """

    def __init__(self) -> None:
        """Starts at zero."""
        self._by_op: dict[str, list[float]] = {}

    def snapshot(self) -> dict[str, OpStats]:
        """The counters by op, in the order of the first calls."""
        return {
            op: OpStats(int(calls), int(num_bytes), seconds)
            for op, (calls, num_bytes, seconds) in list(self._by_op.items())
        }

    def add_call(self, op: str, seconds: float, num_bytes: int) -> None:
        """Counts a call that succeeded."""
        counters = self._by_op.get(op)
        if counters is None:
            counters = self._by_op[op] = [0, 0, 0.0]
        counters[0] += 1
        counters[1] += num_bytes
        counters[2] += seconds
