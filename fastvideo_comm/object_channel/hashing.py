"""Sets and dicts of received keys, built in bounded time.

Python hashes str and bytes with a random key, but numbers and tuples without one. So a sender can
choose thousands of them that all fall into one slot, and each insertion then passes all earlier
ones. Python does not tell the number of these steps, but the time can be measured. So insertions of
such keys are timed, and a message whose keys take many times longer than ordinary ones is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from fastvideo_comm.object_channel.format import KEY_COST, UNKEYED_KEY_COST

_KEYED = frozenset({str, bytes, type(None)})
# For a container that takes less time than this, the clock of the thread is not read.
_GRACE_SECONDS = 0.0001
# Ordinary keys take 0.2 us each and cost 64 bytes, which is 0.2 s for 64 MiB.
_SECONDS = 0.02
_SECONDS_PER_BYTE = 0.6 / (64 << 20)


def has_keyed_hashes(keys: Iterable[Any]) -> bool:
    """Whether no sender can know the hashes of these keys."""
    return _KEYED.issuperset(map(type, keys))


def cost_of_keys(count: int, is_keyed: bool) -> int:
    """Return the cost of a set or dict of so many keys, in bytes; see `format`."""
    return count * (KEY_COST if is_keyed else UNKEYED_KEY_COST)


class HashingClock:
    """The time that one message may take for the keys whose hashes its sender can know."""

    __slots__ = ("_seconds_left",)

    def __init__(self, num_bytes: int) -> None:
        """Start on a message of this many bytes."""
        self._seconds_left = _SECONDS + num_bytes * _SECONDS_PER_BYTE

    def build_set(self, keys: list[Any]) -> set[Any]:
        """Return the set of these keys.

        Raises:
            ValueError: It takes too long, as the keys collide.
            TypeError: A key has no hash.
        """
        built: set[Any] = set()
        self._insert(built.add, keys)
        return built

    def build_dict(self, pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
        """Return the dict of these keys and values; raises what `build_set` does."""
        built: dict[Any, Any] = {}
        self._insert(lambda pair: built.__setitem__(*pair), pairs)
        return built

    def _insert(self, insert: Callable[[Any], None], items: Iterable[Any]) -> None:
        # The wall clock is cheap but also counts what other processes do; where it says that the
        # time is up, the clock of this thread decides.
        began: float | None = None
        limit = time.monotonic() + _GRACE_SECONDS
        for item in items:
            insert(item)
            if time.monotonic() > limit:
                if began is None:
                    began = time.thread_time()
                left = self._seconds_left - (time.thread_time() - began)
                if left < 0:
                    raise ValueError("the keys of a set or dict collide")
                limit = time.monotonic() + left
        if began is not None:
            self._seconds_left -= time.thread_time() - began
