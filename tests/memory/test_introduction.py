"""Who may connect to a rank, and what the ranks tell each other when one cannot."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Iterator

import pytest

from fastvideo_comm.memory import introduction

SECRET = bytes(range(16))


class Listener:
    """A rank of 3 that listens, and whoever connects."""

    def __init__(self) -> None:
        self.name = secrets.token_bytes(16)
        self.socket = introduction._listen(self.name, 3)
        self.links: dict[int, socket.socket] = {}
        self.visitors: list[socket.socket] = []

    def connect(self, claimed: int, secret: bytes = SECRET) -> None:
        visitor = introduction._connect(self.name, 5.0)
        visitor.send(introduction._HELLO.pack(claimed, secret))
        self.visitors.append(visitor)

    def accepted(self, rank: int) -> list[int]:
        introduction._accept(self.socket, SECRET, rank, 3, self.links)
        return sorted(self.links)


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    for link in (made.socket, *made.links.values(), *made.visitors):
        link.close()


def test_the_higher_ranks_are_accepted_whatever_their_order(listener):
    listener.connect(2)
    listener.connect(1)
    assert listener.accepted(0) == [1, 2]


@pytest.mark.parametrize("claimed", [0, 1, 3])
def test_no_other_rank_is_accepted(listener, claimed):
    listener.connect(claimed)
    assert listener.accepted(1) == []


def test_a_process_of_another_user_is_turned_away_though_it_knows_the_secret(listener, monkeypatch):
    listener.connect(1)
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert listener.accepted(0) == []
    with pytest.raises(ConnectionResetError):
        listener.visitors[0].recv(1)


def test_a_process_with_another_secret_is_turned_away(listener):
    listener.connect(1, bytes(16))
    assert listener.accepted(0) == []


def test_a_rank_that_is_connected_keeps_its_connection(listener):
    listener.connect(1)
    listener.accepted(0)
    link = listener.links[1]
    listener.connect(1)
    assert listener.accepted(0) == [1]
    assert listener.links[1] is link


def test_a_connection_that_is_not_taken_ends_with_the_timeout():
    name = secrets.token_bytes(16)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as full:
        full.bind(introduction._address(name))
        full.listen(0)
        waiting = introduction._connect(name, 5.0)
        begin = time.monotonic()
        with pytest.raises(BlockingIOError):
            introduction._connect(name, 0.05)
        assert 0.05 <= time.monotonic() - begin < 5
        waiting.close()


@pytest.mark.parametrize("length", [99, 100, 101, 5000])
def test_a_reason_of_any_length_is_told_in_messages_of_one_length(length):
    """Cut in the middle of a letter too."""
    reasons = ["", "a" + "\u00fc" * length]
    for own in reasons:
        lengths = []

        def everyone(payload: bytes) -> list[bytes]:
            lengths.append(len(payload))  # noqa: B023
            return [told(""), told(reasons[1])]

        _, refusal = introduction._agree(everyone, own, b"name")
        assert lengths == [204]
        expected = reasons[1] if length == 99 else "a" + "\u00fc" * 99 + "\ufffd"
        assert refusal == f"rank 1: {expected}"


def told(reason: str) -> bytes:
    """What a rank says that has this reason."""
    said = []

    def everyone(payload: bytes) -> list[bytes]:
        said.append(payload)
        return [payload]

    introduction._agree(everyone, reason, b"name")
    return said[0]


def test_what_the_ranks_bring_is_given_where_none_has_a_reason():
    brought, refusal = introduction._agree(lambda own: [own, own[:-4] + b"else"], "", b"name")
    assert (brought, refusal) == ([b"name", b"else"], "")
