"""One call of a group's method: its deadline, and errors that say which call failed."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

from fastvideo_comm.errors import CommunicationError
from fastvideo_comm.object_channel.settings import GroupSettings


class GroupCall:
    """The deadline of one call and the number of its message; used in one `with`.

    A CommunicationError that leaves the `with` is raised again with op, group, rank, the ranks
    waited for, message number and seconds. This is a class and not a generator, because a class
    takes less time and every message needs one.

    Attributes:
        deadline: When the call must end, in `time.monotonic`.
        number: The number of the message; None until it is known.
    """

    __slots__ = (
        "_op",
        "_peers",
        "_seconds",
        "_settings",
        "_started",
        "_turn",
        "deadline",
        "number",
    )

    def __init__(
        self, op: str, settings: GroupSettings, peers: tuple[int, ...], seconds: float
    ) -> None:
        """Start the clock.

        Args:
            op: The method that the user called.
            settings: The settings of the group.
            peers: The ranks that the call needs.
            seconds: The timeout of the call.
        """
        self._op = op
        self._settings = settings
        self._peers = peers
        self._seconds = seconds
        self._started = time.monotonic()
        self._turn: AbstractContextManager[None] = nullcontext()
        self.deadline = self._started + seconds
        self.number: int | None = None

    def take_turn(self, turn: AbstractContextManager[None]) -> None:
        """Hold the transport from here to the end of the `with`."""
        turn.__enter__()
        self._turn = turn

    def __enter__(self) -> GroupCall:
        """Return the call."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release the transport, and add the facts of this call to an error."""
        self._turn.__exit__(None, None, None)
        if isinstance(exc, CommunicationError):
            waited = time.monotonic() - self._started
            waited_for = exc.peers or self._peers
            message = "" if self.number is None else f" in message {self.number}"
            ranks = f" for rank(s) {list(waited_for)}" if waited_for else ""
            raise type(exc)(
                f"{self._op} in {self._settings.place}: {exc}; waited {waited:.1f} of "
                f"{self._seconds:g} s{message}{ranks}",
                peers=waited_for,
            ) from exc
