"""How threads sleep until a line has something to read, and the background thread."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable, Collection, Mapping

import torch

from .line import Line

# The daemon thread looks whether it has been stopped at least this often.
_SLEEP_SECONDS = 60.0


class Waiter:
    """What one thread sleeps on: the lines, and an eventfd by which other threads wake it."""

    def __init__(self) -> None:
        """Makes the eventfd."""
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._event, select.POLLIN)
        self._ranks: dict[int, int] = {}  # by descriptor
        self._num_lost = -1
        self._alone = select.poll()
        self._alone.register(self._event, select.POLLIN)

    def __del__(self) -> None:
        """Closes the eventfd."""
        with contextlib.suppress(AttributeError, OSError):
            os.close(self._event)

    def wake(self) -> None:
        """Ends the sleep of the thread, or its next one."""
        os.eventfd_write(self._event, 1)

    def ready(self, lines: Mapping[int, Line], lost: Collection[int], seconds: float) -> list[int]:
        """The ranks whose lines can be read, as soon as one can; none after so many seconds."""
        if len(lost) != self._num_lost:
            self._register(lines, lost)
        events = self._poll.poll(min(seconds, _SLEEP_SECONDS) * 1000)
        return self._ranks_of(events) if events else []

    def look(self, lines: Mapping[int, Line], lost: Collection[int], times: int) -> list[int]:
        """Looks as `ready` does, so many times, without sleeping; other processes may run."""
        if len(lost) != self._num_lost:
            self._register(lines, lost)
        poll = self._poll.poll
        for _ in range(times):
            if events := poll(0):
                return self._ranks_of(events)
            os.sched_yield()
        return []

    def sleep(self) -> None:
        """Sleeps until another thread calls `wake`, but not for ever."""
        self._alone.poll(_SLEEP_SECONDS * 1000)
        self._drain()

    def _register(self, lines: Mapping[int, Line], lost: Collection[int]) -> None:
        for descriptor in self._ranks:
            self._poll.unregister(descriptor)
        self._ranks = {
            line.fileno(): rank
            for rank, line in lines.items()
            if rank not in lost and line.fileno() >= 0
        }
        for descriptor in self._ranks:
            self._poll.register(descriptor, select.POLLIN)
        self._num_lost = len(lost)

    def _ranks_of(self, events: list[tuple[int, int]]) -> list[int]:
        ranks = self._ranks
        ready = [ranks[descriptor] for descriptor, _ in events if descriptor in ranks]
        if len(ready) < len(events):
            self._drain()
        return ready

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event)


class Background:
    """A daemon thread that calls `work(waiter)` again and again until it is stopped."""

    def __init__(self, work: Callable[[Waiter], None]) -> None:
        """Starts the thread."""
        self._work = work
        self._waiter = Waiter()
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="fastvideo_comm.memory", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Tells the thread that there may be something to do."""
        self._waiter.wake()

    def stop(self) -> None:
        """Ends the thread, after the copy that it may be in."""
        self._is_stopped = True
        self._waiter.wake()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        with torch.no_grad():
            while not self._is_stopped:
                self._work(self._waiter)
