"""The two ends of a line in one process."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from fastvideo_comm.memory.line import Heard, Line


@contextlib.contextmanager
def linked() -> Iterator[tuple[Line, Line]]:
    """Two lines that are connected with each other; both are closed in the end."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    first, second = Line(ends[0]), Line(ends[1])
    yield first, second
    first.close()
    second.close()


def heard(end: Line) -> list[Heard]:
    """Everything that has come, until nothing comes any more."""
    messages = []
    for _ in range(2000):
        end.receive()
        while (message := end.first()) is not None:
            messages.append(message)
            end.handled(message)
    return messages
