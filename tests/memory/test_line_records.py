"""Records with texts on one line: what comes twice counts once, and nothing of them is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from line_ends import heard, linked

from fastvideo_comm.memory import line
from fastvideo_comm.memory.line import Line, Record


@pytest.fixture
def pair() -> Iterator[tuple[Line, Line]]:
    with linked() as lines:
        yield lines


FAILURE = Record(line.FAIL, failure=line.ARGUMENTS, number=3)
TEXT = b"".join(b"%04d" % number for number in range(2500))


@pytest.mark.parametrize("twice", [0, 1])
def test_a_piece_that_was_sent_twice_counts_once(pair, twice):
    """After an interrupt between the sending of a piece and its way out of the queue."""
    here, there = pair
    pieces = line.with_text(FAILURE, TEXT)
    assert len(pieces) == 3
    here.send_all(pieces[: twice + 1] + pieces[twice:])
    (message,) = heard(there)
    assert message.text == TEXT


def test_a_text_is_let_go_with_its_record(pair):
    here, there = pair
    for number in range(3):
        here.send_all(line.with_text(FAILURE._replace(number=number), TEXT))
    assert [message.text for message in heard(there)] == [TEXT] * 3
    assert there._texts == {}


@pytest.mark.parametrize("leaves_unread", [False, True])
def test_what_waits_for_a_rank_that_is_gone_is_dropped(pair, leaves_unread):
    """Otherwise this rank would try to send it every 2 ms, as long as it lives."""
    here, there = pair
    while not here.is_blocked:
        here.send(line.pack_done(0, 1))
    if not leaves_unread:
        with contextlib.suppress(BlockingIOError):
            while there._link.recv(100):
                pass
    there.close()
    for _ in range(2):
        here.flush()
    assert not here.is_blocked
    here.send_all(line.with_text(FAILURE, TEXT))
    assert not here.is_blocked
