"""The exceptions of this library: one small tree, each also the builtin that a caller expects.

Bad arguments are plain `ValueError` and `TypeError`; what is here tells of communication.
"""

from __future__ import annotations

from collections.abc import Sequence


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
