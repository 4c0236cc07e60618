"""The exceptions of this library: one small tree, each also the builtin that a caller expects.

Bad arguments are plain `ValueError` and `TypeError`; what is here tells of communication.
"""

from __future__ import annotations

from collections.abc import Sequence


def where(op: str, rank: int, world_size: int, group_name: str) -> str:
    """Which call on which rank it was: how every error and warning of a collective begins.

    Example:
        >>> where("all_gather", 1, 4, "sp")
        "all_gather on rank 1 of 4 in group 'sp'"
        >>> where("all_gather", 1, 4, "")
        'all_gather on rank 1 of 4'

    Args:
        op: the op's name.
        rank: this process's rank in the group.
        world_size: the number of ranks in the group.
        group_name: the communicator's `unique_name`; nothing is said of an empty one.
    """
    return f"{op} on {place(rank, world_size, group_name)}"


def place(rank: int, world_size: int, group_name: str) -> str:
    """This rank in its group: `rank 1 of 4 in group 'sp'`."""
    group = f" in group {group_name!r}" if group_name else ""
    return f"rank {rank} of {world_size}{group}"


class CommunicationError(Exception):
    """The root: catch it to catch everything this library raises about communication.

    Attributes:
        peers: The ranks that the failed call waited for or that are gone; empty where the failure
            has no peer.
    """

    def __init__(self, message: str, *, peers: Sequence[int] = ()) -> None:
        """Keep the message and the ranks that it is about."""
        super().__init__(message)
        self.peers = tuple(peers)


class CollectiveError(CommunicationError, RuntimeError):
    """The backend failed during a collective; the message names op, group and rank."""


class MismatchError(CollectiveError):
    """The ranks asked for different things; every rank raises it, and none has a result."""


class ClosedError(CommunicationError, ConnectionError, RuntimeError):
    """The communicator was destroyed, or the group closed, before the call."""


class CommunicationTimeoutError(CommunicationError, TimeoutError):
    """A call reached its timeout; the message names op, group, ranks, message number, seconds."""


class MessageExpiredError(CommunicationTimeoutError):
    """The awaited message was older than `data_expiration_seconds` and has been removed unread."""


class PeerLostError(CommunicationError, ConnectionError):
    """A rank that the call needs died, or has left the group; `peers` says which."""


class AuthenticationError(CommunicationError, ValueError):
    """A message, or the other end of a connection, is not from a holder of the group's secret."""


class DecodeError(CommunicationError, ValueError):
    """An accepted message does not hold an object that this rank's codec can build."""


class JoinError(CommunicationError, ConnectionError):
    """This rank could not join the group: rank taken, settings that differ, port in other use."""


class JoinTimeoutError(JoinError, CommunicationTimeoutError):
    """Not every rank joined within the timeout; the message names the missing ones."""
