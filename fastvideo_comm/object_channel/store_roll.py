"""The roll of the ranks: who has joined, who may not, and what is said when a join fails."""

from __future__ import annotations

import hmac
import os
from typing import Any

from fastvideo_comm.object_channel.store_messages import TOKEN_BYTES, JoinRequest, pack_text

_MAX_NOTES = 8


class Member:
    """A rank that has joined with its first connection.

    Attributes:
        connection: Its first connection.
        token: What it must show to open its lifeline.
        lifeline: Its second connection; None until it is open.
        has_left: Whether it said goodbye or is lost.
    """

    __slots__ = ("connection", "has_left", "lifeline", "token")

    def __init__(self, connection: Any) -> None:
        """Make the token with which the rank must open its lifeline."""
        self.connection = connection
        self.token = os.urandom(TOKEN_BYTES)
        self.lifeline: Any = None
        self.has_left = False


class Roll:
    """Knows the ranks of one group while it forms and afterwards; uses no sockets.

    Attributes:
        members: By rank.
        failure: Why the join failed, for every rank that comes; None while it can succeed.
    """

    def __init__(self, world_size: int, settings: str) -> None:
        """Start without a member.

        Args:
            world_size: How many ranks join.
            settings: The `key=value` words that every rank must repeat.
        """
        self.members: dict[int, Member] = {}
        self.failure: bytes | None = None
        self._world_size = world_size
        self._settings = settings
        self._shortage = ""
        self._notes: list[str] = []

    @property
    def is_complete(self) -> bool:
        """Whether every rank has both of its connections."""
        return len(self.members) == self._world_size and not self.missing()

    def missing(self) -> list[int]:
        """Return the ranks that have not joined."""
        here = [rank for rank, member in self.members.items() if member.lifeline is not None]
        return sorted(set(range(self._world_size)).difference(here))

    def note(self, text: str) -> None:
        """Keep a possible reason for a missing rank; only a few, as strangers cause some too."""
        if len(self._notes) < _MAX_NOTES:
            self._notes.append(text)

    def note_shortage(self, text: str) -> None:
        """Keep why rank 0 itself could not take a connection."""
        self._shortage = text

    def fail(self, missing: list[int], reason: str) -> None:
        """End the join, for every rank that waits and every rank that comes."""
        self.failure = pack_text(missing, reason)

    def give_up(self, rank: int) -> None:
        """End the join, as the time of this rank is up."""
        missing = self.missing()
        reason = f"rank(s) {missing} did not join before the time of rank {rank} was up"
        shortage = [self._shortage] if self._shortage else []
        self.fail(missing, "; ".join((reason, *shortage, *self._notes)))

    def refusal(self, request: JoinRequest) -> str | None:
        """Return why a request to join is refused; None where it is not.

        A rank with other settings ends the join for all.
        """
        if request.settings != self._settings:
            ours, theirs = self._settings.split(" "), request.settings.split(" ")
            differences = [
                f"{their} (rank 0 has {our})"
                for our, their in zip(ours, theirs, strict=False)
                if our != their
            ]
            reason = f"rank {request.rank} joined with {', '.join(differences) or 'other settings'}"
            self.fail([], reason)
            return reason
        member = self.members.get(request.rank)
        if request.is_lifeline:
            if member is None or not hmac.compare_digest(member.token, request.token):
                return f"rank {request.rank} must join with the token it was given"
            return None if member.lifeline is None else "a lifeline must be opened once"
        if not 0 <= request.rank < self._world_size:
            return f"rank must be below world_size={self._world_size}, got {request.rank}"
        return None if member is None else f"rank {request.rank} is already taken"
