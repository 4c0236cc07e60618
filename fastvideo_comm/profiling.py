"""What tools see of an op: named ranges while a profiler listens, and counters all the time.

Ranges are `fastvideo_comm::<op>[<unique_name>]`, and inside them the phases
`fastvideo_comm::pack[..]`, `exchange[..]` and `unpack[..]`; `torch.profiler` shows them, and NVTX
tools do under `torch.autograd.profiler.emit_nvtx()`. While nobody listens a range is the reading of
one flag: no name is put together and nothing is entered.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from time import perf_counter
from types import TracebackType
from typing import Any, Final, NamedTuple

import torch
from torch.autograd import profiler

_NOTHING: Final[AbstractContextManager[None]] = contextlib.nullcontext()


def span(word: str, name: str) -> AbstractContextManager[Any]:
    """A range in the profiler's trace; nothing while no profiler listens, or in compiled code.

    Example:
        >>> with span("pack", "sp"):
        ...     pass

    Args:
        word: the op or the phase.
        name: the communicator's `unique_name`.
    """
    if not profiler._is_profiler_enabled or torch.compiler.is_compiling():
        return _NOTHING
    return torch._C._profiler._RecordFunctionFast(f"fastvideo_comm::{word}[{name}]")


class OpStats(NamedTuple):
    """What one op has cost so far.

    Attributes:
        calls: how often it was called, with success.
        bytes: of this rank's inputs (of the output for `recv`).
        seconds: on the host; on an accelerator, where calls return before they are done, that is
            the time to enqueue them.
    """

    calls: int
    bytes: int
    seconds: float


class Stats:
    """The counters of one communicator. Not counted: backward, and calls in compiled code.

    Example:
        >>> stats = Stats("sp")
        >>> with stats.measured("all_gather"):
        ...     stats.add_bytes("all_gather", 1024)
        >>> stats.snapshot()["all_gather"][:2]
        (1, 1024)
    """

    def __init__(self, name: str = "") -> None:
        """Starts at zero; `name` is the communicator's `unique_name`."""
        self._name = name
        self._calls: dict[str, int] = {}
        self._bytes: dict[str, int] = {}
        self._seconds: dict[str, float] = {}

    def measured(self, op: str) -> AbstractContextManager[Any]:
        """Counts and times what is inside, in a range of the op's name."""
        return _NOTHING if torch.compiler.is_compiling() else _Measured(op, self)

    def add_bytes(self, op: str, num_bytes: int) -> None:
        """Counts the bytes of a call."""
        if not torch.compiler.is_compiling():
            self._bytes[op] = self._bytes.get(op, 0) + num_bytes

    def snapshot(self) -> dict[str, OpStats]:
        """The counters by op, in the order of the first calls."""
        return {
            op: OpStats(calls, self._bytes.get(op, 0), self._seconds[op])
            for op, calls in self._calls.items()
        }

    def reset(self) -> None:
        """Back to zero."""
        for counter in (self._calls, self._bytes, self._seconds):
            counter.clear()

    def _add(self, op: str, seconds: float) -> None:
        self._calls[op] = self._calls.get(op, 0) + 1
        self._seconds[op] = self._seconds.get(op, 0.0) + seconds


class _Measured:
    """One call: cheaper than a generator."""

    __slots__ = ("_begin", "_op", "_span", "_stats")

    def __init__(self, op: str, stats: Stats) -> None:
        self._op = op
        self._stats = stats

    def __enter__(self) -> None:
        self._span = span(self._op, self._stats._name)
        self._span.__enter__()
        self._begin = perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        seconds = perf_counter() - self._begin
        self._span.__exit__(kind, error, traceback)
        if error is None:
            self._stats._add(self._op, seconds)
