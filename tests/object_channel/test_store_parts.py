"""The small parts of the own store, each by itself: the roll, the sockets, the answers."""

import contextlib
import socket
import threading
import time

import pytest
from stateless_strangers import answer_on, ask_to_join, forming_group, proven_link

from fastvideo_comm.errors import JoinError, JoinTimeoutError
from fastvideo_comm.object_channel.message_seal import Address, Op
from fastvideo_comm.object_channel.store_answers import Answers
from fastvideo_comm.object_channel.store_link import Frame, FrameError, Kind, Link
from fastvideo_comm.object_channel.store_link_pair import LinkPair
from fastvideo_comm.object_channel.store_messages import (
    JoinRequest,
    pack_address,
    pack_join,
    pack_text,
    unpack_address,
    unpack_join,
    unpack_text,
)
from fastvideo_comm.object_channel.store_roll import Member, Roll
from fastvideo_comm.object_channel.store_sockets import (
    connect,
    describe_peer,
    listen,
    receive_exactly,
    to_milliseconds,
)
from fastvideo_comm.object_channel.store_strangers import Strangers

# The roll


def request(rank=1, token=bytes(16), settings="world_size=3 group=a", is_lifeline=False):
    return JoinRequest(is_lifeline, rank, token, settings)


@pytest.fixture
def roll():
    return Roll(3, "world_size=3 group=a")


def joined(roll, *ranks):
    for rank in ranks:
        roll.members[rank] = Member("first connection")
        roll.members[rank].lifeline = "lifeline"


def test_a_rank_joins_once_with_both_connections_and_its_token(roll):
    assert roll.refusal(request()) is None
    needs_token = "rank 1 must join with the token it was given"
    assert roll.refusal(request(is_lifeline=True)) == needs_token
    member = roll.members[1] = Member("first connection")
    assert roll.refusal(request()) == "rank 1 is already taken"
    assert roll.refusal(request(is_lifeline=True)) == needs_token
    right = request(token=member.token, is_lifeline=True)
    assert roll.refusal(right._replace(rank=0)) == "rank 0 must join with the token it was given"
    assert roll.refusal(right) is None
    assert roll.missing() == [0, 1, 2]
    member.lifeline = "lifeline"
    assert roll.missing() == [0, 2]
    assert roll.refusal(right) == "a lifeline must be opened once"
    for rank in (-1, 3):
        assert roll.refusal(request(rank)) == f"rank must be below world_size=3, got {rank}"
    assert roll.refusal(request(0)) is roll.refusal(request(2)) is None
    assert roll.failure is None


def test_a_group_is_complete_when_every_rank_has_both_connections(roll):
    joined(roll, 0, 1)
    assert not roll.is_complete
    roll.members[2] = Member("first connection")
    assert not roll.is_complete
    joined(roll, 2)
    assert roll.is_complete
    assert len({member.token for member in roll.members.values()}) == 3


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ("world_size=4 group=a", "world_size=4 (rank 0 has world_size=3)"),
        (
            "world_size=2 group=b",
            "world_size=2 (rank 0 has world_size=3), group=b (rank 0 has group=a)",
        ),
        ("world_size=3", "other settings"),
    ],
)
def test_other_settings_end_the_join_and_are_named(roll, settings, text):
    reason = f"rank 1 joined with {text}"
    assert roll.refusal(request(settings=settings)) == reason
    assert unpack_text(roll.failure) == ((), reason)


def test_a_join_that_fails_names_the_missing_ranks_and_a_few_reasons(roll):
    joined(roll, 1)
    for number in range(20):
        roll.note(f"stranger {number}")
    roll.note_shortage("no file descriptor")
    roll.give_up(1)
    peers, text = unpack_text(roll.failure)
    assert peers == (0, 2)
    notes = "; ".join(f"stranger {number}" for number in range(8))
    assert text == (
        "rank(s) [0, 2] did not join before the time of rank 1 was up; no file descriptor; " + notes
    )


def test_a_rank_that_went_away_while_the_group_formed_is_named():
    with forming_group(timeout=0.5) as forming:
        link = proven_link(forming.port, None)
        ask_to_join(link, 1)
        assert answer_on(link).kind == Kind.OK
        link.sock.close()
        forming.finish()
        assert isinstance(forming.failures[0], JoinTimeoutError)
        assert "rank 1 went away while the group formed" in str(forming.failures[0])
        assert forming.failures[0].peers == (1,)


# The sockets


@contextlib.contextmanager
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_bytes_that_drip_in_have_one_deadline():
    has_ended = threading.Event()

    def drip(sock):
        for _ in range(100):  # 5 s in all
            if has_ended.wait(0.05):
                return
            sock.send(b"x")

    with pair() as (ours, theirs):
        thread = threading.Thread(target=drip, args=(theirs,))
        thread.start()
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            receive_exactly(ours, 100, start + 0.2)
        assert time.monotonic() - start < 1
        has_ended.set()
        thread.join()


class InTwos:
    """A socket that gives at most two bytes at a time."""

    def __init__(self, data):
        self.data = data

    def settimeout(self, seconds):
        assert seconds > 0

    def recv(self, size):
        part, self.data = self.data[: min(size, 2)], self.data[min(size, 2) :]
        return part


def test_exactly_the_bytes_that_are_due_are_received():
    sock = InTwos(b"due and more")
    assert receive_exactly(sock, 3, time.monotonic() + 5) == b"due"
    assert sock.data == b" and more"
    with pair() as (ours, theirs):
        theirs.sendall(b"due and more")
        assert receive_exactly(ours, 3, time.monotonic() + 5) == b"due"
        theirs.close()
        with pytest.raises(EOFError, match="the connection was closed"):
            receive_exactly(ours, 100, time.monotonic() + 5)


def test_a_port_can_be_used_again_at_once_and_small_frames_leave_at_once():
    with listen("127.0.0.1", 0) as server:
        assert server.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
        host, port = server.getsockname()
        with connect(host, port, time.monotonic() + 5) as sock:
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert describe_peer(sock) == f"a connection from 127.0.0.1 port {port}"
    assert describe_peer(sock) == "a connection that is gone"


def test_a_store_that_was_there_and_is_not_any_more_has_ended_the_join():
    with listen("127.0.0.1", 0) as server:
        host, port = server.getsockname()
    start = time.monotonic()
    with pytest.raises(JoinError, match=r"nobody listens on 127.0.0.1 .* any more") as caught:
        connect(host, port, start + 5, was_there=True)
    assert time.monotonic() - start < 1
    assert not isinstance(caught.value, JoinTimeoutError)
    assert caught.value.peers == (0,)


def test_an_unknown_host_is_told_at_once(monkeypatch):
    def unknown(*_arguments, **_options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    start = time.monotonic()
    for call in (
        lambda: connect("no.such.host", 1, start + 5),
        lambda: listen("no.such.host", 0),
    ):
        with pytest.raises(JoinError, match=r"must be a known name.*, got 'no\.such\.host'"):
            call()
    assert time.monotonic() - start < 1


def test_a_wait_of_less_than_a_millisecond_is_one_millisecond():
    assert [to_milliseconds(seconds) for seconds in (0.0, 0.0001, 0.001, 1.0001)] == [0, 1, 1, 1001]


def test_a_connection_does_not_get_more_time_with_each_step(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    strangers = Strangers(most=1, seconds=10.0)
    strangers.add("one")
    now += 6
    strangers.move_on("one")
    strangers.add("two")
    now += 5
    assert strangers.overdue() == ["one"]
    assert strangers.everyone() == ["two", "one"]
    now += 6
    assert strangers.overdue() == ["two", "one"]


# Questions and answers


def test_a_question_has_an_id_that_a_frame_can_carry():
    answers = Answers()
    answers._last = 2**32 - 2
    assert [answers.begin() for _ in range(2)] == [2**32 - 1, 1]
    with pair() as (ours, theirs):
        link = Link(theirs, 100, None, of_store=False)
        link.queue(Kind.RECV, 2**32 - 1, b"meta")
        link.flush()
        frame = Frame(Kind.RECV, 2**32 - 1, b"meta", b"")
        assert Link(ours, 100, None, of_store=True).read() == [frame]


def test_a_refusal_among_the_answers_comes_before_those_that_are_missing():
    answers = Answers()
    first, second, third = (answers.begin() for _ in range(3))
    answers.put(Frame(Kind.REFUSED, second, pack_text([4], "no"), b""))
    answers.put(Frame(Kind.OK, third, b"", b"body"))
    answers.put(Frame(Kind.OK, third, b"", b"again"))
    with pytest.raises(JoinTimeoutError, match=r"^no$") as caught:
        answers.raise_failure([first, second, third])
    assert caught.value.peers == (4,)
    assert answers.missing([first, second, third]) == [first, second]
    assert answers.all_of([third])[0].body == b"body"
    assert len(answers) == 1
    answers.put(Frame(99, first, pack_text([]), b""))
    with pytest.raises(FrameError, match="there is no answer 99"):
        answers.take([first])


def test_short_forms_come_back_and_nothing_else_is_read():
    address = Address(Op.GATHER, 3, -1, 2**40)
    packed = pack_address(address, b"group")
    assert unpack_address(packed) == (address, (Op.GATHER, 3, -1, b"group"))
    for op in (Op.BARRIER, Op.VALUE, Op.EXPIRY, 0):
        with pytest.raises(FrameError, match=f"there is no channel of op {int(op)}"):
            unpack_address(bytes([op]) + packed[1:])
    with pytest.raises(FrameError, match="an address is too short"):
        unpack_address(packed[:16])
    wanted = request(rank=2, token=b"t" * 16, is_lifeline=True)
    assert unpack_join(pack_join(wanted)) == wanted
    with pytest.raises(FrameError, match="a join request is malformed"):
        unpack_join(pack_join(wanted)[:20])
    with pytest.raises(FrameError, match="a join request is malformed"):
        unpack_join(pack_join(wanted) + b"\xff")


# Both connections


def test_frames_come_from_both_connections_and_a_wake_ends_the_wait():
    heard = []
    links = LinkPair(heard.append)
    with pytest.raises(EOFError, match="it was closed here"):
        links.hear(0)
    with pair() as (first, far_first), pair() as (second, far_second):
        for sock in (first, second):
            links.add(Link(sock, 100, None, of_store=False))
        far = [Link(sock, 100, None, of_store=True) for sock in (far_first, far_second)]
        links.queue(1, Kind.JOIN, 5, b"meta", ())
        assert links.num_requests == 0
        links.queue(0, Kind.JOIN, 6, b"meta", ())
        assert links.num_requests == 1
        links.hear(0)
        assert [link.read()[0].ident for link in far] == [6, 5]
        for ident, link in enumerate(far):
            link.queue(Kind.OK, ident)
            link.flush()
        links.hear(1000)
        assert [frame.ident for frame in heard] == [1, 0]  # the lifeline is heard first
        links.wake()
        start = time.monotonic()
        for _ in range(2):
            links.hear(1000)
        assert time.monotonic() - start < 0.5
        links.ignore_alarm()
        links.hear(50)
        assert time.monotonic() - start > 0.04
        links.close_links()
        assert not links.is_open
        assert first.fileno() == second.fileno() == -1
        links.close()
        links.wake()
