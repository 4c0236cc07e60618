"""Notices that a rank does not come, or asks for something else, while kernels run on the device.

The host does not wait with them. A thread looks at the words in which these kernels write their
steps (`kernels/posts.py`). It ends the waits that last too long: it sets the word that every wait
looks at. So the device goes on, and the next use of the memory raises an error that names the rank.
This covers the replays of a captured graph too, of which the host knows nothing.

A rank that asks for something else has been found by the kernels, which then write nothing for it
and post no more.

After a wait was ended, the memory cannot be used again: a rank that comes late may still write to
what was posted, and the counts of the ranks differ.
"""

from __future__ import annotations

import logging
import threading
import time

from torch import Tensor

from ..errors import CommunicationError, CommunicationTimeoutError, MismatchError

logger = logging.getLogger("fastvideo_comm")

# How often the thread looks: so many times in a timeout, but at least once in so many seconds.
_LOOKS = 8
_MOST_SECONDS = 1.0


class Watch:
    """Ends the waits of one rank's kernels that take longer than a timeout.

    Example:
        >>> import time, torch
        >>> host = torch.zeros(3, dtype=torch.int64)  # of rank 0 of 2
        >>> watch = Watch(host, timeout=0.05, name="sequence")
        >>> host[2] = 1  # a kernel waits for the post of rank 1, which does not come
        >>> time.sleep(0.5)
        >>> host[0].item()  # the kernel ends
        1
        >>> watch.check()
        Traceback (most recent call last):
        fastvideo_comm.errors.CommunicationTimeoutError: call 0 of group 'sequence' waited 0.05 s: \
rank 1 did not come
        >>> watch.close()
    """

    def __init__(self, host: Tensor, *, timeout: float, name: str) -> None:
        """Begins to watch.

        Args:
            host: The words that the kernels share with the host, as `kernels/posts.py` says.
            timeout: Seconds that one wait may take.
            name: The name of the group in errors.
        """
        self._host = host
        self._timeout = timeout
        self._name = name
        self._failure: tuple[type[CommunicationError], str, tuple[int, ...]] | None = None
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fastvideo_comm watch", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises if a wait was ended, or a rank asked for something else.

        Raises:
            CommunicationTimeoutError: A rank did not come in time, or came and did not finish.
            MismatchError: A rank asked for something else in a call; nothing was written for it.
        """
        if self._failure is not None:
            kind, text, peers = self._failure
            raise kind(text, peers=peers)

    def close(self) -> None:
        """Stops watching; the device must have finished its work before."""
        self._is_closed.set()
        if threading.current_thread() is not self._thread:  # where garbage is collected in it
            self._thread.join()

    def _run(self) -> None:
        pause = min(self._timeout / _LOOKS, _MOST_SECONDS)
        steps: list[int] = self._host[1:].tolist()
        since = [time.monotonic()] * len(steps)
        while not self._is_closed.wait(pause):
            now = time.monotonic()
            for rank, step in enumerate(self._host[1:].tolist()):
                if step != steps[rank]:
                    steps[rank], since[rank] = step, now
            others = {rank: -step for rank, step in enumerate(steps) if step < 0}
            if others:
                self._mismatch(others)
                return
            waiting = [rank for rank, step in enumerate(steps) if step % 2]
            if any(now - since[rank] >= self._timeout for rank in waiting):
                self._time_out({rank: steps[rank] for rank in waiting})
                return

    def _mismatch(self, calls: dict[int, int]) -> None:
        """`calls` has, for each rank that asked for something else, the number of the call."""
        text = (
            f"the ranks must ask for the same thing in call {min(calls.values())} of group "
            f"{self._name!r}, got something else, or bad arguments, from {_ranks(list(calls))}; a "
            "communicator with validate='always' says what"
        )
        self._fail(MismatchError, text, tuple(calls))

    def _time_out(self, waiting: dict[int, int]) -> None:
        """`waiting` has the steps of the waits that have not ended, by rank."""
        absent = [rank for rank, step in waiting.items() if step % 4 == 1]
        undone = [rank for rank, step in waiting.items() if step % 4 == 3]
        parts = [f"{_ranks(absent)} did not come"] if absent else []
        parts += [f"{_ranks(undone)} came and did not finish"] if undone else []
        call = max(waiting.values()) // 4
        text = f"call {call} of group {self._name!r} waited {self._timeout:g} s: "
        text += " and ".join(parts)
        self._fail(CommunicationTimeoutError, text, (*absent, *undone))

    def _fail(self, kind: type[CommunicationError], text: str, peers: tuple[int, ...]) -> None:
        """Ends all waits."""
        self._failure = kind, text, peers
        self._host[0] = 1
        # No call may follow that raises it.
        logger.error("%s; what was computed since that call is wrong", text)


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
