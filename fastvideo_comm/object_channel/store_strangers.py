"""Connections that have not joined: how many, for how long, and which one is closed first.

Whoever reaches the port can open connections faster than ranks can join. So a connection is never
closed to make room for one that is less far in the handshake. Among connections that are equally
far, the oldest is closed. Without the secret nobody gets as far as a rank.
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from typing import Generic, TypeVar

_Connection = TypeVar("_Connection", bound=Hashable)

# How far a connection is: nothing valid has come, it has greeted, or it has proved itself.
_NUM_STEPS = 3


class Strangers(Generic[_Connection]):
    """The connections between `accept` and a join request that was granted.

    >>> strangers = Strangers[str](most=1, seconds=10.0)
    >>> strangers.add("a rank")
    >>> strangers.move_on("a rank")
    >>> strangers.add("one")
    >>> strangers.add("two")
    'one'
    """

    def __init__(self, most: int, seconds: float) -> None:
        """Start without connections.

        Args:
            most: How many may be equally far in the handshake.
            seconds: How long one may take to join.
        """
        self._most = most
        self._seconds = seconds
        # For each step, the connections with their deadlines, the oldest first.
        self._steps: list[dict[_Connection, float]] = [{} for _ in range(_NUM_STEPS)]

    def __bool__(self) -> bool:
        """Whether there are any connections."""
        return any(self._steps)

    def add(self, connection: _Connection) -> _Connection | None:
        """Count a new connection in and return the one to close for it, if any."""
        return self._enter(0, connection, time.monotonic() + self._seconds)

    def move_on(self, connection: _Connection) -> _Connection | None:
        """Note that a step of the handshake is done, and return the connection to close for it."""
        for step, connections in enumerate(self._steps[:-1]):
            if connection in connections:
                return self._enter(step + 1, connection, connections.pop(connection))
        return None

    def remove(self, connection: _Connection) -> None:
        """Forget a connection that joined or ended."""
        for connections in self._steps:
            connections.pop(connection, None)

    def oldest(self) -> _Connection | None:
        """Return the connection to close first; None where there is none."""
        return next((c for connections in self._steps for c in connections), None)

    def overdue(self) -> list[_Connection]:
        """Return the connections that took too long."""
        now = time.monotonic()
        return [c for connections in self._steps for c, end in connections.items() if end < now]

    def everyone(self) -> list[_Connection]:
        """Return all connections."""
        return [c for connections in self._steps for c in connections]

    def _enter(self, step: int, connection: _Connection, end: float) -> _Connection | None:
        connections = self._steps[step]
        connections[connection] = end
        return next(iter(connections)) if len(connections) > self._most else None
