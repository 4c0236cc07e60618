"""The messages that a rank has sent and that may be unread: a short list for `expire_data`."""

from __future__ import annotations

import time
from collections import deque
from itertools import takewhile

from fastvideo_comm.object_channel.message_seal import Address, Op
from fastvideo_comm.object_channel.transport import Transport

# From this many entries on, those of messages that were read are dropped.
_PRUNE_FROM = 1024


class Outbox:
    """Works on a group's `entries`, oldest first; assumes the transport's turn is held."""

    def __init__(self, entries: deque[tuple[str, float]], transport: Transport) -> None:
        """Keep the entries in the deque `entries`."""
        self._entries = entries
        self._transport = transport
        self._prune_at = _PRUNE_FROM

    def note(self, address: Address) -> None:
        """Note a message that is being sent."""
        self._entries.append((address.key, time.perf_counter()))
        if len(self._entries) < self._prune_at:
            return
        unread = [e for e in self._entries if not self._transport.is_read(_address(e[0]))]
        self._entries.clear()
        self._entries.extend(unread)
        self._prune_at = max(_PRUNE_FROM, 2 * len(unread))

    def expire(self, age: float, deadline: float) -> None:
        """Remove the unread messages that were sent more than `age` seconds ago."""
        oldest = time.perf_counter() - age
        old = list(takewhile(lambda entry: entry[1] < oldest, self._entries))
        last: dict[tuple[Op, int], Address] = {}
        for key, _time in old:
            address = _address(key)
            last[address.op, address.dst] = address
        for address in last.values():
            self._transport.expire(address, deadline)
        for _entry in old:
            self._entries.popleft()


def _address(key: str) -> Address:
    op, src, dst, number = key.split("/")
    return Address(Op[op.upper()], int(src), int(dst), int(number))
