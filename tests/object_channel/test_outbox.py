"""The list of messages that may be unread: what stays on it, and what expires."""

import time
from collections import deque

import pytest

from fastvideo_comm.object_channel import outbox
from fastvideo_comm.object_channel.message_seal import EVERYONE, Address, Op
from fastvideo_comm.object_channel.outbox import Outbox


class Transport:
    """Knows which messages were read, and notes what is asked of it."""

    def __init__(self):
        self.read = set()
        self.num_asked = 0
        self.expired = []
        self.fails = False

    def is_read(self, address):
        self.num_asked += 1
        return address in self.read

    def expire(self, address, deadline):
        if self.fails:
            raise TimeoutError(deadline)
        self.expired.append((address, deadline))


@pytest.fixture
def transport():
    return Transport()


@pytest.fixture
def clock(monkeypatch):
    """The clock of the outbox, which moves when it is told to."""
    now = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def place(number, dst=1, op=Op.SEND):
    return Address(op, 0, dst, number)


def keys(entries):
    return [key for key, _time in entries]


def test_only_what_was_read_is_dropped_and_that_is_not_looked_for_at_every_message(transport):
    entries = deque()
    box = Outbox(entries, transport)
    unread = [place(number) for number in range(0, 8000, 7)]
    for number in range(8000):
        if number % 7:
            transport.read.add(place(number))
        box.note(place(number))
    noted = keys(entries)
    assert {address.key for address in unread} <= set(noted)
    assert noted == sorted(noted, key=lambda key: int(key.split("/")[-1]))
    assert len(noted) < 3 * len(unread)
    assert transport.num_asked < 3 * 8000


def test_few_unread_messages_do_not_make_every_message_look(transport, monkeypatch):
    monkeypatch.setattr(outbox, "_PRUNE_FROM", 100)
    box = Outbox(deque(), transport)
    box.note(place(0))
    for number in range(1, 1000):
        transport.read.add(place(number))
        box.note(place(number))
    assert transport.num_asked < 1200


def test_the_last_old_message_of_each_channel_expires_and_younger_ones_stay(transport, clock):
    entries = deque()
    box = Outbox(entries, transport)
    old = [place(0), place(1), place(0, dst=2), place(0, EVERYONE, Op.GATHER), place(2)]
    old += [place(0, EVERYONE, Op.BROADCAST)]
    for address in old:
        box.note(address)
    clock[0] += 10
    box.note(place(3))
    box.expire(5, 7.0)
    assert sorted(transport.expired) == sorted(
        (address, 7.0) for address in (place(2), old[2], old[3], old[5])
    )
    assert keys(entries) == [place(3).key]
    clock[0] += 5
    box.expire(5, 8.0)
    assert len(transport.expired) == 4  # it is not older than 5 s
    clock[0] += 1
    box.expire(5, 9.0)
    assert transport.expired[4:] == [(place(3), 9.0)]
    assert not entries


def test_what_the_store_did_not_hear_of_expires_the_next_time(transport, clock):
    entries = deque()
    box = Outbox(entries, transport)
    box.note(place(0))
    clock[0] += 10
    transport.fails = True
    with pytest.raises(TimeoutError):
        box.expire(5, 7.0)
    transport.fails = False
    box.expire(5, 8.0)
    assert transport.expired == [(place(0), 8.0)]
