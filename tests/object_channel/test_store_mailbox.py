"""What the store keeps, without a socket: who is answered, when, and with what."""

import pytest

from fastvideo_comm.object_channel.message_seal import EVERYONE, Address, Op
from fastvideo_comm.object_channel.store_link import FrameError, Kind
from fastvideo_comm.object_channel.store_mailbox import Mailbox, Waiter
from fastvideo_comm.object_channel.store_messages import pack_number, pack_origin, pack_text

GROUP = b"group"


class Ranks:
    """Asks a mailbox as its ranks do; each request returns what it made the mailbox answer."""

    def __init__(self, world_size=3):
        self.mailbox = Mailbox(world_size, self._answer)
        self.answers = []
        self.idents = 0

    def _answer(self, waiter, kind, meta, body):
        assert waiter.connection == f"connection of {waiter.rank}"
        self.answers.append((waiter.rank, kind, meta, body))

    def ask(self, verb, rank, *arguments):
        self.idents += 1
        waiter = Waiter(rank, self.idents, f"connection of {rank}")
        getattr(self.mailbox, verb)(waiter, *arguments)
        return self.taken()

    def taken(self):
        answers, self.answers = self.answers, []
        return answers

    def send(self, src, dst, number, body=b"", group=GROUP):
        return self.ask("send", src, *place(src, dst, number, group), body)

    def receive(self, src, dst, number, rank=None, group=GROUP):
        rank = dst if rank is None else rank
        return self.ask("receive", rank, *place(src, dst, number, group))

    def expire(self, src, dst, number):
        return self.ask("expire", src, *place(src, dst, number))

    def barrier(self, rank, number, group=GROUP):
        return self.ask("barrier", rank, number, group)

    def leave(self, rank):
        self.mailbox.leave(rank)
        return self.taken()

    def count(self):
        ((_rank, _kind, meta, _body),) = self.ask("count", 0)
        return int.from_bytes(meta, "little")


def place(src, dst, number, group=GROUP):
    op = Op.BROADCAST if dst == EVERYONE else Op.SEND
    return Address(op, src, dst, number), (op, src, dst, group)


def ok(rank, meta=b"", body=b""):
    return rank, Kind.OK, meta, body


def acknowledged(rank, first_unread):
    return ok(rank, pack_number(first_unread))


@pytest.fixture
def ranks():
    return Ranks()


# Messages


def test_a_message_waits_for_its_reader(ranks):
    assert ranks.send(0, 1, 0, b"first") == [acknowledged(0, 0)]
    assert ranks.send(0, 1, 1, b"second") == [acknowledged(0, 0)]
    assert ranks.count() == 2
    assert ranks.receive(0, 1, 0) == [ok(1, body=b"first")]
    assert ranks.count() == 1
    assert ranks.receive(0, 1, 1) == [ok(1, body=b"second")]
    assert ranks.count() == 0
    assert ranks.send(0, 1, 2) == [acknowledged(0, 2)]


def test_a_reader_that_waits_is_answered_by_the_message_with_its_number(ranks):
    assert ranks.receive(0, 1, 1) == []
    assert ranks.receive(0, 1, 0) == []
    assert ranks.send(0, 1, 0, b"first") == [ok(1, body=b"first"), acknowledged(0, 1)]
    assert ranks.send(0, 1, 1, b"second") == [ok(1, body=b"second"), acknowledged(0, 2)]
    assert ranks.count() == 0


def test_messages_that_are_read_out_of_order_are_acknowledged_up_to_the_first_unread(ranks):
    for number in range(3):
        ranks.send(0, 1, number)
    ranks.receive(0, 1, 1)
    assert ranks.send(0, 1, 3) == [acknowledged(0, 0)]
    ranks.receive(0, 1, 0)
    assert ranks.send(0, 1, 4) == [acknowledged(0, 2)]


def test_a_channel_knows_no_message_of_another(ranks):
    ranks.send(0, 1, 0, b"to 1")
    ranks.send(0, 2, 0, b"to 2")
    ranks.send(1, 2, 0, b"from 1")
    ranks.send(0, 1, 0, b"other group", b"other")
    assert ranks.receive(0, 1, 0, group=b"other") == [ok(1, body=b"other group")]
    assert ranks.receive(1, 2, 0) == [ok(2, body=b"from 1")]
    assert ranks.receive(0, 2, 0) == [ok(2, body=b"to 2")]
    assert ranks.receive(0, 1, 0) == [ok(1, body=b"to 1")]


def test_a_broadcast_is_kept_until_its_last_reader_has_it(ranks):
    assert ranks.receive(0, EVERYONE, 0, rank=1) == []
    sent = ranks.send(0, EVERYONE, 0, b"to all")
    assert sent == [ok(1, body=b"to all"), acknowledged(0, 0)]
    assert ranks.count() == 1
    assert ranks.receive(0, EVERYONE, 0, rank=2) == [ok(2, body=b"to all")]
    assert ranks.count() == 0


def test_a_broadcast_is_not_kept_for_ranks_that_have_left(ranks):
    ranks.leave(1)
    ranks.send(0, EVERYONE, 0, b"to all")
    assert ranks.receive(0, EVERYONE, 0, rank=2) == [ok(2, body=b"to all")]
    assert ranks.count() == 0
    ranks.leave(2)
    assert ranks.send(0, EVERYONE, 1) == [acknowledged(0, 2)]
    assert ranks.count() == 0


def test_a_reader_of_an_expired_message_is_told(ranks):
    for number in range(4):
        ranks.send(0, 1, number, b"body")
    assert ranks.expire(0, 1, 1) == [acknowledged(0, 2)]
    assert ranks.count() == 2
    assert ranks.receive(0, 1, 1) == [(1, Kind.EXPIRED, b"", b"")]
    assert ranks.receive(0, 1, 0) == [(1, Kind.EXPIRED, b"", b"")]
    assert ranks.receive(0, 1, 2) == [ok(1, body=b"body")]


def test_only_messages_that_came_and_were_not_read_expire(ranks):
    for number in range(2):
        ranks.send(0, 1, number, b"body")
    ranks.receive(0, 1, 1)
    assert ranks.expire(0, 1, 10) == [acknowledged(0, 2)]
    assert ranks.receive(0, 1, 0) == [(1, Kind.EXPIRED, b"", b"")]
    with pytest.raises(FrameError, match="message 1 must be unread"):
        ranks.receive(0, 1, 1)
    assert ranks.receive(0, 1, 2) == []
    assert ranks.send(0, 1, 2, b"later") == [ok(1, body=b"later"), acknowledged(0, 3)]


class CountingDict(dict):
    num_looked_for = 0

    def pop(self, *arguments):
        self.num_looked_for += 1
        return super().pop(*arguments)


def test_messages_that_are_gone_are_not_looked_for_again(ranks):
    for number in range(100):
        ranks.send(0, 1, number)
        ranks.receive(0, 1, number)
    ranks.send(0, 1, 100)
    box = ranks.mailbox._channels[place(0, 1, 0)[1]]
    box.messages = CountingDict(box.messages)
    assert ranks.expire(0, 1, 100) == [acknowledged(0, 101)]
    assert box.messages.num_looked_for == 1


def test_messages_to_and_from_ranks_that_have_left_are_answered_so(ranks):
    ranks.send(2, 1, 0, b"last words")
    ranks.leave(2)
    assert ranks.receive(2, 1, 0) == [ok(1, body=b"last words")]
    assert ranks.receive(2, 1, 1) == [(1, Kind.LEFT, pack_text([2]), b"")]
    assert ranks.send(0, 2, 0, b"too late") == [(0, Kind.LEFT, pack_text([2]), b"")]
    assert ranks.send(0, 2, 1, b"too late") == [(0, Kind.LEFT, pack_text([2]), b"")]
    assert ranks.count() == 0


def test_a_rank_that_leaves_takes_what_only_it_would_read(ranks):
    ranks.send(0, 2, 0)
    ranks.send(0, 2, 1)
    ranks.send(0, 1, 0)
    ranks.send(0, EVERYONE, 0, b"to all")
    assert ranks.leave(2) == []
    assert ranks.count() == 2
    assert ranks.receive(0, EVERYONE, 0, rank=1) == [ok(1, body=b"to all")]
    assert ranks.count() == 1


def test_a_rank_that_leaves_is_named_to_those_who_wait_for_its_messages(ranks):
    for number in (0, 1):
        ranks.receive(2, 1, number)
    ranks.receive(2, 0, 0)
    ranks.receive(1, 0, 0)
    left = Kind.LEFT, pack_text([2]), b""
    assert ranks.leave(2) == [(1, *left), (1, *left), (0, *left)]
    assert ranks.leave(2) == []  # none of them is answered twice
    assert ranks.send(1, 0, 0, b"body") == [ok(0, body=b"body"), acknowledged(1, 1)]


# Barriers


def test_the_last_rank_releases_all(ranks):
    for number in range(3):
        assert ranks.barrier(2, number) == []
        assert ranks.barrier(0, number) == []
        assert ranks.barrier(1, number) == [ok(2), ok(0), ok(1)]


def test_a_barrier_that_is_over_is_answered_again(ranks):
    for rank in range(3):
        ranks.barrier(rank, 0)
    assert ranks.barrier(1, 0) == [ok(1)]
    assert ranks.ask("missing", 0, GROUP) == [ok(0, pack_text([0, 1, 2]))]


def test_a_rank_that_asks_for_a_barrier_again_is_counted_once(ranks):
    ranks.barrier(0, 0)
    ranks.barrier(0, 0)
    assert ranks.barrier(1, 0) == []
    assert ranks.barrier(2, 0) == [ok(0), ok(1), ok(2)]


def test_the_ranks_that_a_barrier_waits_for_are_named(ranks):
    ranks.barrier(1, 0)
    ranks.barrier(0, 0, b"other")
    assert ranks.ask("missing", 1, GROUP) == [ok(1, pack_text([0, 2]))]
    assert ranks.ask("missing", 2, b"other") == [ok(2, pack_text([1, 2]))]
    assert ranks.ask("missing", 2, b"third") == [ok(2, pack_text([0, 1, 2]))]


def test_a_barrier_without_a_rank_that_left_is_impossible_at_once_and_later(ranks):
    ranks.barrier(0, 0)
    assert ranks.leave(2) == [(0, Kind.LEFT, pack_text([2]), b"")]
    assert ranks.barrier(1, 0) == [(1, Kind.LEFT, pack_text([2]), b"")]
    assert ranks.leave(1) == []
    assert ranks.barrier(0, 0, b"other") == [(0, Kind.LEFT, pack_text([1, 2]), b"")]


def test_a_rank_that_left_after_it_came_to_a_barrier_counts(ranks):
    ranks.barrier(2, 0)
    ranks.leave(2)
    assert ranks.barrier(0, 0) == []
    assert ranks.barrier(1, 0) == [ok(2), ok(0), ok(1)]


# Values


def test_a_value_is_answered_with_its_origin(ranks):
    assert ranks.ask("set", 1, 7, b"key", b"value") == [ok(1)]
    origin = pack_origin(1, 7)
    assert ranks.ask("get", 0, b"key", Kind.GET) == [ok(0, origin, b"value")]
    assert ranks.ask("get", 0, b"key", Kind.WAIT) == [ok(0, origin)]
    assert ranks.ask("set", 2, 0, b"key", b"newer") == [ok(2)]
    assert ranks.ask("get", 0, b"key", Kind.GET) == [ok(0, pack_origin(2, 0), b"newer")]


def test_those_who_wait_for_a_value_are_answered_once_when_it_comes(ranks):
    assert ranks.ask("get", 1, b"key", Kind.GET) == []
    assert ranks.ask("get", 2, b"key", Kind.WAIT) == []
    assert ranks.ask("get", 2, b"other", Kind.GET) == []
    origin = pack_origin(0, 0)
    answers = [ok(1, origin, b"value"), ok(2, origin), ok(0)]
    assert ranks.ask("set", 0, 0, b"key", b"value") == answers
    assert ranks.ask("set", 0, 1, b"key", b"again") == [ok(0)]


def test_a_sum_starts_at_0_and_is_a_value(ranks):
    assert ranks.ask("get", 2, b"number", Kind.GET) == []
    origin = pack_origin(EVERYONE, 0, b"5")
    assert ranks.ask("add", 0, b"number", 5) == [ok(2, origin, b"5"), ok(0, b"5")]
    assert ranks.ask("add", 1, b"number", -7) == [ok(1, b"-2")]
    ranks.ask("set", 1, 0, b"number", memoryview(b"40"))
    assert ranks.ask("add", 0, b"number", 2) == [ok(0, b"42")]


def test_values_are_counted_looked_for_and_removed(ranks):
    ranks.ask("set", 0, 0, b"a", b"1")
    ranks.ask("set", 0, 1, b"b", b"2")
    ranks.send(0, 1, 0)
    ranks.send(0, 2, 0)
    assert ranks.ask("count", 2) == [ok(2, pack_number(4))]
    assert ranks.ask("check", 1, b"a") == [ok(1, pack_number(1))]
    assert ranks.ask("delete", 1, b"a") == [ok(1, pack_number(1))]
    assert ranks.ask("delete", 1, b"a") == [ok(1, pack_number(0))]
    assert ranks.ask("check", 1, b"a") == [ok(1, pack_number(0))]
    assert ranks.ask("count", 2) == [ok(2, pack_number(3))]


# What the protocol does not allow


@pytest.mark.parametrize(
    ("text", "verb", "rank", "arguments"),
    [
        ("rank 1 must send as itself, got 0", "send", 1, (*place(0, 2, 0), b"")),
        ("message 2 must come next, got 3", "send", 0, (*place(0, 1, 3), b"")),
        ("message 2 must come next, got 1", "send", 0, (*place(0, 1, 1), b"")),
        ("rank 0 must receive what is meant for it, got 1", "receive", 0, place(0, 1, 0)),
        ("message 0 must be unread", "receive", 1, place(0, 1, 0)),
        ("message 0 must be unread", "receive", 1, place(0, EVERYONE, 0)),
        ("rank 1 must expire what it sent, got 0", "expire", 1, place(0, 1, 0)),
        ("barrier 1 must come next, got 2", "barrier", 0, (2, GROUP)),
        ("the number of a value must be 0 or more, got -1", "set", 0, (-1, b"key", b"")),
        ("the value must be a decimal number", "add", 0, (b"text", 1)),
    ],
)
def test_what_the_protocol_does_not_allow_is_told_and_answers_nobody(
    ranks, text, verb, rank, arguments
):
    for number in range(2):
        ranks.send(0, 1, number)
    ranks.receive(0, 1, 0)
    ranks.send(0, EVERYONE, 0)
    ranks.receive(0, EVERYONE, 0, rank=1)
    for other in range(3):
        ranks.barrier(other, 0)
    ranks.ask("set", 0, 0, b"text", b"no number")
    ranks.taken()
    with pytest.raises(FrameError) as caught:
        ranks.ask(verb, rank, *arguments)
    assert str(caught.value) == text
    assert ranks.taken() == []
