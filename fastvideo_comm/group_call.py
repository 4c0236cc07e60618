"""One call on a group: its deadline, and its failures told in full."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from fastvideo_comm.errors import CommunicationError
from fastvideo_comm.group_settings import GroupSettings


class GroupCall:
    """The time of one call, and the message it is about.

    Attributes:
        deadline: When it must end, in `time.monotonic`.
        number: Of the message; set when it is known.
    """

    __slots__ = ("_seconds", "_started", "deadline", "number")

    def __init__(self, seconds: float) -> None:
        """Start the clock."""
        self._seconds = seconds
        self._started = time.monotonic()
        self.deadline = self._started + seconds
        self.number: int | None = None

    @contextlib.contextmanager
    def explained(self, op: str, settings: GroupSettings, peers: tuple[int, ...]) -> Iterator[None]:
        """Add op, group, rank, the ranks waited for, message number and seconds to an error."""
        try:
            yield
        except CommunicationError as error:
            waited = time.monotonic() - self._started
            waited_for = error.peers or peers
            message = "" if self.number is None else f" in message {self.number}"
            raise type(error)(
                f"{op} in {settings.place}: {error}; waited {waited:.1f} of {self._seconds:g} s"
                f"{message} for rank(s) {list(waited_for)}",
                peers=waited_for,
            ) from error
