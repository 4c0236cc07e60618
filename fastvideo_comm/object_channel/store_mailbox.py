"""What the store keeps: messages until their last reader has them, barriers, and plain values.

This module uses no sockets: it calls `answer` with the waiter that an answer is for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

from fastvideo_comm.object_channel.message_seal import EVERYONE, Address
from fastvideo_comm.object_channel.store_link import Buffer, FrameError, Kind
from fastvideo_comm.object_channel.store_messages import (
    Channel,
    pack_number,
    pack_origin,
    pack_text,
)


class Waiter(NamedTuple):
    """A request that waits for its answer.

    Attributes:
        rank: The rank that asks.
        ident: The id of the request on its connection.
        connection: Where the answer goes.
    """

    rank: int
    ident: int
    connection: Any


class _Message:
    __slots__ = ("body", "readers")

    def __init__(self, body: Buffer, readers: set[int]) -> None:
        self.body = body
        self.readers = readers


class _Channel:
    __slots__ = ("expired", "first", "messages", "next_number", "waiting")

    def __init__(self) -> None:
        self.messages: dict[int, _Message] = {}
        self.waiting: dict[int, list[Waiter]] = {}
        self.next_number = 0  # the number of the message that comes next
        self.first = 0  # no message below this is left
        self.expired = 0  # messages below this that were unread have been removed

    def first_unread(self) -> int:
        while self.first < self.next_number and self.first not in self.messages:
            self.first += 1
        return self.first


class _Barrier:
    __slots__ = ("arrived", "number", "waiting")

    def __init__(self) -> None:
        self.number = 0
        self.arrived: set[int] = set()
        self.waiting: dict[int, Waiter] = {}  # those of the arrived ranks that have no answer


class Mailbox:
    """The messages, barriers and values of all groups on one store."""

    def __init__(
        self, world_size: int, answer: Callable[[Waiter, Kind, bytes, Buffer], None]
    ) -> None:
        """Start empty.

        Args:
            world_size: How many ranks there are.
            answer: Sends kind, meta and body to a waiter.
        """
        self._ranks = frozenset(range(world_size))
        self._answer = answer
        self._left: set[int] = set()
        self._channels: defaultdict[Channel, _Channel] = defaultdict(_Channel)
        self._barriers: defaultdict[bytes, _Barrier] = defaultdict(_Barrier)
        self._values: dict[bytes, tuple[bytes, Buffer]] = {}  # origin and value, by key
        self._value_waiters: defaultdict[bytes, list[tuple[Kind, Waiter]]] = defaultdict(list)

    def count(self, waiter: Waiter) -> None:
        """Answer how many values and unread messages there are."""
        num_unread = sum(len(box.messages) for box in self._channels.values())
        self._answer(waiter, Kind.OK, pack_number(len(self._values) + num_unread), b"")

    def send(self, waiter: Waiter, address: Address, channel: Channel, body: Buffer) -> None:
        """Take a message in, hand it to those who wait for it, and acknowledge it."""
        _op, src, dst, number = address
        if src != waiter.rank:
            raise FrameError(f"rank {waiter.rank} must send as itself, got {src}")
        readers = frozenset((dst,)) if dst != EVERYONE else self._ranks - {src}
        box = self._channels[channel]
        if number != box.next_number:
            raise FrameError(f"message {box.next_number} must come next, got {number}")
        box.next_number += 1
        if dst in self._left:
            self._answer(waiter, Kind.LEFT, pack_text([dst]), b"")
            return
        message = _Message(body, set(readers - self._left))
        for other in box.waiting.pop(number, ()):
            self._deliver(other, message)
        if message.readers:
            box.messages[number] = message
        self._answer(waiter, Kind.OK, pack_number(box.first_unread()), b"")

    def receive(self, waiter: Waiter, address: Address, channel: Channel) -> None:
        """Answer with a message now, or when it comes."""
        _op, src, dst, number = address
        if dst not in (waiter.rank, EVERYONE):
            raise FrameError(f"rank {waiter.rank} must receive what is meant for it, got {dst}")
        box = self._channels[channel]
        message = box.messages.get(number)
        if message is not None and waiter.rank in message.readers:
            self._deliver(waiter, message)
            if not message.readers:
                del box.messages[number]
        elif number < box.expired:
            self._answer(waiter, Kind.EXPIRED, b"", b"")
        elif number < box.next_number:
            raise FrameError(f"message {number} must be unread")
        elif src in self._left:
            self._answer(waiter, Kind.LEFT, pack_text([src]), b"")
        else:
            box.waiting.setdefault(number, []).append(waiter)

    def _deliver(self, waiter: Waiter, message: _Message) -> None:
        message.readers.discard(waiter.rank)
        self._answer(waiter, Kind.OK, b"", message.body)

    def expire(self, waiter: Waiter, address: Address, channel: Channel) -> None:
        """Remove the sender's messages up to this number; readers who ask later are told."""
        if address.src != waiter.rank:
            raise FrameError(f"rank {waiter.rank} must expire what it sent, got {address.src}")
        box = self._channels[channel]
        end = min(address.number + 1, box.next_number)
        for number in range(box.first_unread(), end):
            if box.messages.pop(number, None) is not None:
                box.expired = number + 1
        self._answer(waiter, Kind.OK, pack_number(box.first_unread()), b"")

    def barrier(self, waiter: Waiter, number: int, group: bytes) -> None:
        """Count a rank in; the last one releases all."""
        barrier = self._barriers[group]
        if number > barrier.number:
            raise FrameError(f"barrier {barrier.number} must come next, got {number}")
        if number < barrier.number:
            self._answer(waiter, Kind.OK, b"", b"")
            return
        barrier.arrived.add(waiter.rank)
        barrier.waiting[waiter.rank] = waiter
        if len(barrier.arrived) == len(self._ranks):
            barrier.arrived = set()
            barrier.number += 1
            self._release(barrier, Kind.OK, b"")
        else:
            self._release_impossible(barrier)

    def _release_impossible(self, barrier: _Barrier) -> None:
        never = sorted(self._left - barrier.arrived)
        if never:
            self._release(barrier, Kind.LEFT, pack_text(never))

    def _release(self, barrier: _Barrier, kind: Kind, meta: bytes) -> None:
        waiting, barrier.waiting = barrier.waiting, {}
        for waiter in waiting.values():
            self._answer(waiter, kind, meta, b"")

    def missing(self, waiter: Waiter, group: bytes) -> None:
        """Answer with the ranks that the group's present barrier waits for."""
        missing = sorted(self._ranks - self._barriers[group].arrived)
        self._answer(waiter, Kind.OK, pack_text(missing), b"")

    def leave(self, rank: int) -> None:
        """Forget what only this rank would read, and answer those who wait for it alone."""
        self._left.add(rank)
        for channel, box in self._channels.items():
            for number, message in list(box.messages.items()):
                message.readers.discard(rank)
                if not message.readers:
                    del box.messages[number]
            if channel[1] == rank:
                waiting, box.waiting = box.waiting, {}
                for waiters in waiting.values():
                    for waiter in waiters:
                        self._answer(waiter, Kind.LEFT, pack_text([rank]), b"")
        for barrier in self._barriers.values():
            self._release_impossible(barrier)

    def set(self, waiter: Waiter, number: int, key: bytes, body: Buffer) -> None:
        """Set a value, which has this number on its rank, and answer those who wait for it."""
        if number < 0:
            raise FrameError(f"the number of a value must be 0 or more, got {number}")
        self._put(key, pack_origin(waiter.rank, number), body)
        self._answer(waiter, Kind.OK, b"", b"")

    def _put(self, key: bytes, origin: bytes, body: Buffer) -> None:
        self._values[key] = origin, body
        for kind, other in self._value_waiters.pop(key, ()):
            self._answer(other, Kind.OK, origin, body if kind == Kind.GET else b"")

    def get(self, waiter: Waiter, key: bytes, kind: Kind) -> None:
        """Answer with a value (GET) or that it is there (WAIT), now or when it comes."""
        if key in self._values:
            origin, body = self._values[key]
            self._answer(waiter, Kind.OK, origin, body if kind == Kind.GET else b"")
        else:
            self._value_waiters[key].append((kind, waiter))

    def add(self, waiter: Waiter, key: bytes, amount: int) -> None:
        """Add to the decimal number under the key, 0 where there is none."""
        try:
            total = int(bytes(self._values.get(key, (b"", b"0"))[1])) + amount
        except ValueError as error:
            raise FrameError("the value must be a decimal number") from error
        text = str(total).encode()
        self._put(key, pack_origin(EVERYONE, 0, text), text)
        self._answer(waiter, Kind.OK, text, b"")

    def delete(self, waiter: Waiter, key: bytes) -> None:
        """Remove a value; the answer says whether there was one."""
        self._answer(waiter, Kind.OK, pack_number(self._values.pop(key, None) is not None), b"")

    def check(self, waiter: Waiter, key: bytes) -> None:
        """Answer whether there is a value."""
        self._answer(waiter, Kind.OK, pack_number(key in self._values), b"")
