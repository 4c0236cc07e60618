"""Both connections of one rank to the store, polled together.

The first carries requests, answers and messages. The second, the lifeline, says which rank is lost.
`wake` ends a poll from another thread or from a signal handler.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable, Sequence

from fastvideo_comm.object_channel.store_link import Buffer, Frame, FrameError, Kind, Link
from fastvideo_comm.object_channel.store_sockets import seconds_left, to_milliseconds

# The end of the first connection may be known this much earlier than the news on the lifeline.
_LAST_WORDS_SECONDS = 0.25

# How a connection ends.
CUT = (EOFError, FrameError, OSError)


class LinkPair:
    """Sends what is queued and hands on the frames that arrive; one thread at a time."""

    def __init__(self, take_in: Callable[[Frame], None]) -> None:
        """Start without a connection; `take_in` is called with every frame that arrives."""
        self._take_in = take_in
        self._links: list[Link] = []
        self._alarm, self._alarm_end = socket.socketpair()
        self._poll = select.poll()
        self._poll.register(self._alarm_end, select.POLLIN)

    @property
    def is_open(self) -> bool:
        """Whether there is a connection."""
        return bool(self._links)

    @property
    def is_busy(self) -> bool:
        """Whether one of the connections is in the middle of a transfer."""
        return any(link.is_busy for link in self._links)

    def add(self, link: Link) -> None:
        """Take over a connection; the first is for requests, the second is the lifeline."""
        self._links.append(link)
        self._poll.register(link.sock, select.POLLIN)

    def queue(
        self, index: int, kind: Kind, ident: int, meta: bytes, parts: Sequence[Buffer]
    ) -> None:
        """Queue a frame on one of the connections; where there is none, the next `hear` raises."""
        # This does not ask first, because a signal handler may close the connection at any time.
        with contextlib.suppress(IndexError):
            self._links[index].queue(kind, ident, meta, parts)

    @property
    def num_requests(self) -> int:
        """How many frames were queued on the first connection; 0 where there is none."""
        return self._links[0].num_sent if self._links else 0

    def own_unsent(self) -> None:
        """Copy what could not be sent yet, so that the caller may change its objects."""
        for link in self._links:
            link.own_unsent()

    def hear(self, milliseconds: int) -> None:
        """Send what can be sent, then wait for something to arrive, or for `wake`.

        Raises:
            EOFError: A connection ended, or there is none.
            FrameError: What came is no frame.
            OSError: A connection is gone.
        """
        # `_poll` is read before the connections are checked. If a signal handler calls `close` in
        # between, this poll returns at once; a new poll without connections would wait.
        poll = self._poll
        if not self._links:
            raise EOFError("it was closed here")
        for link in self._links:
            if link.has_unsent:
                events = select.POLLIN if link.flush() else select.POLLIN | select.POLLOUT
                poll.modify(link.sock, events)
        ready = {number for number, _events in poll.poll(milliseconds)}
        # The lifeline is read first: it says who is lost, the other connection only that it ended.
        for link in reversed(self._links):
            if link.sock.fileno() in ready:
                for frame in link.read():
                    self._take_in(frame)

    def hear_last_words(self, is_enough: Callable[[], bool]) -> None:
        """After a connection ended, read the lifeline for another quarter of a second."""
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        poll = select.poll()
        with contextlib.suppress(*CUT, IndexError):
            lifeline = self._links[1]
            poll.register(lifeline.sock, select.POLLIN)
            while not is_enough() and (left := seconds_left(deadline)):
                poll.poll(to_milliseconds(left))
                for frame in lifeline.read():
                    self._take_in(frame)

    def wake(self) -> None:
        """End the present `hear` and the later ones until `ignore_alarm`."""
        with contextlib.suppress(OSError):  # closed already
            self._alarm.send(b"!")

    def ignore_alarm(self) -> None:
        """Let `hear` wait again, also in a signal handler that interrupted a `hear`."""
        # A new object: the old one may be in use, and must not be entered twice.
        self._poll = select.poll()
        for link in self._links:
            self._poll.register(link.sock, select.POLLIN)

    def close_links(self) -> None:
        """Close the connections; others may be added."""
        for link in self._links:
            with contextlib.suppress(KeyError):  # after `ignore_alarm`
                self._poll.unregister(link.sock)
            link.sock.close()
        self._links = []

    def close(self) -> None:
        """Close everything."""
        self.close_links()
        self._alarm.close()
        self._alarm_end.close()
