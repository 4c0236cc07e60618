"""The exceptions of this library. Each is also the builtin exception that a caller expects.

Bad arguments are plain `ValueError` and `TypeError`. The exceptions here are about communication.
"""

from __future__ import annotations

from collections.abc import Sequence


def where(op: str, rank: int, world_size: int, group_name: str) -> str:
    """Names a call and its rank. Every error and warning of a collective begins with this text.

    Example:
        >>> where("all_gather", 1, 4, "sp")
        "all_gather on rank 1 of 4 in group 'sp'"
        >>> where("all_gather", 1, 4, "")
        'all_gather on rank 1 of 4'

    Args:
        op: the op's name.
        rank: this process's rank in the group.
        world_size: the number of ranks in the group.
        group_name: the communicator's `unique_name`; an empty name is left out.
    """
    return f"{op} on {place(rank, world_size, group_name)}"


def place(rank: int, world_size: int, group_name: str) -> str:
    """Names this rank in its group: `rank 1 of 4 in group 'sp'`."""
    group = f" in group {group_name!r}" if group_name else ""
    return f"rank {rank} of {world_size}{group}"


class CommunicationError(Exception):
    """The base class of all errors of this library about communication.

    Attributes:
        peers: The ranks that the failed call waited for, or that are gone. Empty if no other rank
            caused the failure.
    """

    def __init__(self, message: str, *, peers: Sequence[int] = ()) -> None:
        """Keeps the message, and the ranks that the message is about."""
        super().__init__(message)
        self.peers = tuple(peers)


class CollectiveError(CommunicationError, RuntimeError):
    """A collective failed after it began; the message names op, group and rank."""


class MismatchError(CollectiveError):
    """The ranks asked for different things. Every rank raises this error and has no result."""


class ClosedError(CommunicationError, ConnectionError, RuntimeError):
    """The communicator was destroyed, or the group was closed, before the call."""


class CommunicationTimeoutError(CommunicationError, TimeoutError):
    """A call reached its timeout; the message names op, group, ranks, message number, seconds."""


class MessageExpiredError(CommunicationTimeoutError):
    """The awaited message was older than `data_expiration_seconds` and has been removed unread."""


class PeerLostError(CommunicationError, ConnectionError):
    """A rank that the call needs died, or has left the group; `peers` says which."""


class AuthenticationError(CommunicationError, ValueError):
    """A message or a connection comes from someone who does not have the group's secret."""


class DecodeError(CommunicationError, ValueError):
    """A message was accepted, but this rank's codec cannot build an object from it."""


class JoinError(CommunicationError, ConnectionError):
    """This rank could not join: its rank is taken, settings differ, or the port is in use."""


class JoinTimeoutError(JoinError, CommunicationTimeoutError):
    """Not every rank joined within the timeout; the message names the missing ones."""
