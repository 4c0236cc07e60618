"""The exceptions of this library: one small tree, each also the builtin that a caller expects.

Bad arguments are plain `ValueError` and `TypeError`; what is here tells of communication.
"""

from __future__ import annotations


class CommunicationError(Exception):
    """The root: catch it to catch everything this library raises about communication."""


class CollectiveError(CommunicationError, RuntimeError):
    """The backend failed during a collective; the message names op, group and rank."""


class ClosedError(CommunicationError, ConnectionError, RuntimeError):
    """The communicator was destroyed, or the group closed, before the call."""
