"""What a rank that left or died leaves behind: messages, answers, news, and who is told when."""

import os
import signal
import socket
import threading
import time
from collections import Counter

import pytest
from stateless_ranks import SECRET, rank_processes, run_own
from stateless_strangers import forming_group, joined_link

from fastvideo_comm.errors import (
    CommunicationTimeoutError,
    MessageExpiredError,
    PeerLostError,
)
from fastvideo_comm.object_channel.store_answers import Answers
from fastvideo_comm.object_channel.store_link import Frame, FrameError, Kind
from fastvideo_comm.object_channel.store_messages import pack_text
from fastvideo_comm.object_channel.store_server import StoreServer


@pytest.mark.parametrize("secret", [None, SECRET])
def test_an_all_gather_without_a_rank_that_left_may_be_repeated(secret):
    def program(group):
        if group.rank == 1:
            group.barrier()
            return
        group.barrier()
        for _ in range(3):
            with pytest.raises(PeerLostError, match=r"rank\(s\) \[1\] left the group"):
                group.all_gather_obj(group.rank, timeout=10)
        other = 2 - group.rank
        group.send_obj(("still here", group.rank), other)
        assert group.recv_obj(other) == ("still here", other)

    run_own(3, program, secret=secret)


def test_an_all_gather_that_timed_out_before_it_sent_anything_may_be_repeated():
    def program(group):
        if group.rank == 0:
            expire = group._messenger.outbox.expire

            def time_out_once(age, deadline):
                group._messenger.outbox.expire = expire
                raise CommunicationTimeoutError("timed out before the store had it")

            group._messenger.outbox.expire = time_out_once
            with pytest.raises(CommunicationTimeoutError, match="before the store had it"):
                group.all_gather_obj("a")
        return group.all_gather_obj("ab"[group.rank], timeout=10)

    assert run_own(2, program) == [["a", "b"]] * 2


def test_an_all_gather_fails_at_once_though_another_rank_is_slow():
    def program(group):
        group.barrier()
        if group.rank == 2:
            return
        if group.rank == 0:
            with pytest.raises(PeerLostError, match=r"rank\(s\) \[2\] left the group"):
                group.recv_obj(2)
            start = time.monotonic()
            with pytest.raises(PeerLostError, match=r"rank\(s\) \[2\] left the group"):
                group.all_gather_obj("x", timeout=15)
            assert time.monotonic() - start < 5
            over.set()
        over.wait(20)

    over = threading.Event()
    run_own(3, program)


def test_messages_of_a_failed_round_are_there_in_the_next_try():
    answers = Answers()
    good, bad = answers.begin(), answers.begin()
    answers.remember(good, Kind.RECV, b"good")
    answers.remember(bad, Kind.RECV, b"bad")
    answers.put(Frame(Kind.OK, good, b"", b"body"))
    answers.put(Frame(Kind.LEFT, bad, pack_text([2]), b""))
    with pytest.raises(PeerLostError, match=r"rank\(s\) \[2\] left the group"):
        answers.take([good, bad])
    assert answers.find(Kind.RECV, b"good") == good
    assert answers.find(Kind.RECV, b"bad") is None  # asked anew
    assert answers.take([good])[0].body == b"body"
    assert answers.find(Kind.RECV, b"good") is None


def test_an_answer_that_nobody_waits_for_is_dropped():
    answers = Answers()
    given_up = answers.begin()
    answers.forget(given_up)
    for ident in (given_up, 77):
        answers.put(Frame(Kind.OK, ident, b"", b"body"))
    assert not answers


@pytest.mark.parametrize(
    "frame",
    [
        Frame(Kind.LEFT, 1, b"", b""),
        Frame(Kind.REFUSED, 1, b"\xff\xff", b""),
        Frame(Kind.LEFT, 1, pack_text([1]) + b"\xff", b""),
        Frame(99, 1, pack_text([1]), b""),
    ],
)
def test_a_malformed_answer_is_found(frame):
    answers = Answers()
    answers.begin()
    answers.put(frame)
    with pytest.raises(FrameError):
        answers.take([1])


def kept(group):
    return len(group.store.client._answers)


def test_answers_to_repeated_barriers_after_a_rank_left_do_not_pile_up():
    def program(group):
        group.barrier()
        if group.rank == 2:
            return
        with pytest.raises(PeerLostError):
            group.recv_obj(2)
        for _ in range(100):
            with pytest.raises(PeerLostError, match=r"rank\(s\) \[2\] left the group"):
                group.barrier()
        group.send_obj("done", 1 - group.rank)
        assert group.recv_obj(1 - group.rank) == "done"
        assert kept(group) <= 1

    run_own(3, program)


def test_an_expired_round_leaves_no_answers_behind():
    def program(group):
        group.barrier()
        for _ in range(20):
            if group.rank == 0:
                with pytest.raises(CommunicationTimeoutError):
                    group.all_gather_obj("mine", timeout=0.02)
                group.data_expiration_seconds = 0
                group.expire_data()
                group.data_expiration_seconds = 3600
            group.barrier()
            if group.rank:
                with pytest.raises(MessageExpiredError):
                    group.all_gather_obj("mine")
            else:
                group.all_gather_obj("mine")
            group.barrier()
        return kept(group)

    assert max(run_own(3, program)) <= 1


def test_broadcasts_to_a_rank_that_has_left_are_not_kept():
    def program(group):
        group.barrier()
        if group.rank == 2:
            return None
        if group.rank == 0:
            group.broadcast_obj("before", 0)
            with pytest.raises(PeerLostError):
                group.recv_obj(2)
            group.broadcast_obj("after", 0)
            assert group.recv_obj(1) == "read"
            return group.store.num_keys()
        assert [group.broadcast_obj(None, 0) for _ in range(2)] == ["before", "after"]
        group.send_obj("read", 0)
        return None

    assert run_own(3, program)[0] == 0


def test_what_only_a_rank_that_has_left_would_read_is_not_kept():
    """The others have read the broadcast before it leaves; the message is to it alone."""

    def program(group):
        if group.rank == 0:
            group.broadcast_obj("to all", 0)
            group.send_obj("to one", 2)
        elif group.rank == 1:
            assert group.broadcast_obj(None, 0) == "to all"
        group.barrier()
        if group.rank == 2:
            return None
        with pytest.raises(PeerLostError):
            group.recv_obj(2)
        return group.store.num_keys()

    assert run_own(3, program)[:2] == [0, 0]


def test_a_dead_rank_is_noticed_by_a_call_whose_answer_is_already_there():
    with forming_group(3) as forming:
        links = joined_link(forming.port, None, 2, 3)
        groups = forming.finish(1)
        # Rank 0's message to rank 1 comes while rank 1 waits for something else.
        with pytest.raises(CommunicationTimeoutError):
            groups[1].recv_obj(0, timeout=0.1)
        groups[0].send_obj("early", 1)
        with pytest.raises(CommunicationTimeoutError):
            groups[1].recv_obj(1, timeout=0.3)
        assert kept(groups[1]) == 1
        for link in links:
            link.sock.close()
        with pytest.raises(PeerLostError, match=r"rank\(s\) \[2\] died"):
            groups[0].recv_obj(2)
        with pytest.raises(PeerLostError, match=r"rank\(s\) \[2\] died"):
            groups[1].recv_obj(0)


# Who is told, and when


def test_rank_0_is_told_of_a_loss_after_all_others(monkeypatch):
    told = []
    answer = StoreServer._answer

    def note(self, waiter, kind, meta, body):
        if kind == Kind.LOST:
            told.extend(r for r, m in self._roll.members.items() if m.lifeline is waiter.connection)
        answer(self, waiter, kind, meta, body)

    monkeypatch.setattr(StoreServer, "_answer", note)
    with forming_group(6) as forming:
        links = {rank: joined_link(forming.port, None, rank, 6) for rank in range(1, 5)}
        groups = forming.finish(5)
        for link in links[3]:
            link.sock.close()
        with pytest.raises(PeerLostError, match=r"rank\(s\) \[3\] died"):
            groups[0].recv_obj(3)
        assert told == [5, 4, 2, 1, 0]
        for rank in (1, 2, 4):
            for link in links[rank]:
                link.sock.close()


def die_with_the_first(group, pipe):
    """Wait for rank 3, which never comes; rank 0's process ends the moment it hears of a loss."""
    if group.rank == 3:
        pipe.recv()
    try:
        group.barrier(timeout=20)
    except PeerLostError:
        if group.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        raise


def test_a_rank_0_that_ends_on_the_news_of_a_loss_is_not_blamed_for_it():
    blamed = Counter()
    with rank_processes(6, die_with_the_first) as ranks:
        time.sleep(0.3)
        ranks[3].signal(signal.SIGKILL)
        for rank in ranks:
            if rank.rank not in (0, 3):
                kind, text, peers, _seconds = rank.outcome(20)
                assert kind == "PeerLostError", text
                blamed[peers] += 1
    assert blamed == {(3,): 4}


def test_last_words_that_come_after_the_end_of_the_other_connection_are_heard():
    """On a real network, the end of one connection may overtake the news on the other."""
    with forming_group(2, timeout=20.0) as forming:
        groups = forming.finish(1)
        server = groups[0].store._server
        member = server._roll.members[1]
        news = Frame(Kind.LOST, 0, pack_text([7], "said late"), b"")

        def cut():
            time.sleep(0.1)
            member.connection.sock.shutdown(socket.SHUT_RDWR)
            time.sleep(0.05)
            member.lifeline.link.queue(Kind.LOST, 0, news.meta)
            member.lifeline.link.flush()

        # The server itself must not hear of the end before the news is out.
        server._selector.unregister(member.connection.sock)
        server._selector.register(member.connection.sock, 0x2, lambda: time.sleep(0.01))
        thread = threading.Thread(target=cut)
        thread.start()
        with pytest.raises(PeerLostError, match=r"rank\(s\) \[7\] died \(said late\)"):
            groups[1].recv_obj(0)
        thread.join()


def test_hundreds_of_ranks_that_die_at_once_do_not_end_the_server(monkeypatch):
    size = 402
    go = threading.Event()
    go.set()
    guarded = StoreServer._guarded

    def wait_first(self, connection, act):
        go.wait()
        guarded(self, connection, act)

    crashed = []
    monkeypatch.setattr(StoreServer, "_guarded", wait_first)
    monkeypatch.setattr(threading, "excepthook", crashed.append)
    with forming_group(size, timeout=60.0) as forming:
        links = [joined_link(forming.port, None, rank, size) for rank in range(2, size)]
        groups = forming.finish(1)
        go.clear()
        for pair in links:
            for link in pair:
                # Reset, as by a machine that is gone: the very first answer to it fails.
                link.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1" + bytes(7))
                link.sock.close()
        go.set()
        for rank in (0, 1):
            with pytest.raises(PeerLostError, match=r"rank\(s\) \[\d+\] died"):
                groups[rank].recv_obj(5, timeout=30)
            assert groups[rank].store.client._error.peers != (0,)
        assert not crashed


# A rank 0 that says what nobody understands


@pytest.mark.parametrize("op", ["recv_obj", "send_obj", "barrier", "add", "check", "num_keys"])
def test_a_malformed_notice_is_a_lost_rank_0_and_no_internal_error(monkeypatch, op):
    def say_nonsense(self, waiter, kind, meta, body):
        if self._joined and broken.is_set() and kind in (Kind.OK, Kind.LEFT):
            kind, meta = (Kind.LEFT, b"\xff") if op in ("recv_obj", "barrier") else (kind, b"?")
        answer(self, waiter, kind, meta, body)

    calls = {
        "recv_obj": lambda group: group.recv_obj(0),
        "send_obj": lambda group: group.send_obj(1, 0),
        "barrier": lambda group: group.barrier(),
        "add": lambda group: group.store.add("n", 1),
        "check": lambda group: group.store.check(["n"]),
        "num_keys": lambda group: group.store.num_keys(),
    }
    answer = StoreServer._answer
    broken = threading.Event()
    monkeypatch.setattr(StoreServer, "_answer", say_nonsense)

    def program(group):
        group.send_obj("before", 0)
        broken.set()
        for _ in range(2):
            with pytest.raises(PeerLostError, match=r"\[0\] died \(it broke the protocol: "):
                calls[op](group)
        broken.clear()

    run_own(1, program)


def test_the_servers_lifelines_are_kept_alive():
    """Rank 0 learns in this way that another machine is gone."""
    with forming_group(3, heartbeat_interval=2, heartbeat_limit=5) as forming:
        forming.finish(1, 2)
        kept_alive = Counter()
        for number in os.listdir("/proc/self/fd"):
            try:
                sock = socket.socket(fileno=os.dup(int(number)))
            except OSError:
                continue
            with sock:
                is_tcp = sock.family == socket.AF_INET and sock.type == socket.SOCK_STREAM
                if not is_tcp or sock.getsockname()[1] != forming.port:
                    continue
                if sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
                    kept_alive[
                        tuple(
                            sock.getsockopt(socket.IPPROTO_TCP, option)
                            for option in (
                                socket.TCP_KEEPIDLE,
                                socket.TCP_KEEPINTVL,
                                socket.TCP_KEEPCNT,
                                socket.TCP_USER_TIMEOUT,
                            )
                        )
                    ] += 1
    assert kept_alive == {(2, 2, 5, 10_000): 3}
