"""Strangers at the port of a group that forms: many, silent, fast, and with the secret unknown."""

import collections
import contextlib
import socket
import struct
import subprocess
import sys
import time

import pytest
from reserved_port import reserved_port
from stateless_proxy import Proxy
from stateless_ranks import CONTEXT, SECRET
from stateless_strangers import (
    answer_on,
    ask_to_join,
    connect,
    forming_group,
    proven_link,
    strangers_that_know_the_magic,
    strangers_that_only_talk,
)

from fastvideo_comm.errors import JoinError
from fastvideo_comm.object_channel import store_server
from fastvideo_comm.object_channel.store_handshake import MAGIC
from fastvideo_comm.object_channel.store_link import Kind
from fastvideo_comm.object_channel.store_messages import pack_text, unpack_text
from fastvideo_comm.object_channel.store_strangers import Strangers
from fastvideo_comm.stateless import StatelessProcessGroup


@pytest.mark.parametrize("secret", [None, SECRET])
def test_strangers_do_not_hinder_a_join(secret):
    with forming_group(secret=secret) as forming:
        sockets = strangers_that_only_talk(forming.port)
        groups = forming.finish(1)
        for number in range(20):
            groups[1].send_obj(number, 0)
            assert groups[0].recv_obj(1) == number
        for sock in sockets:
            sock.close()


def test_many_silent_strangers_are_dropped_oldest_first():
    with forming_group() as forming:
        sockets = [connect(forming.port) for _ in range(300)]
        assert sockets[0].recv(1) == b""
        sockets[-1].settimeout(0.1)
        with pytest.raises(TimeoutError):
            sockets[-1].recv(1)
        assert forming.finish(1).keys() == {0, 1}
        for sock in sockets:
            sock.close()


@pytest.mark.parametrize("says", [b"", MAGIC])
def test_a_few_silent_strangers_are_dropped_after_their_time(monkeypatch, says):
    monkeypatch.setattr(store_server, "_HANDSHAKE_SECONDS", 0.3)
    with forming_group() as forming:
        with connect(forming.port) as stranger:
            stranger.sendall(says)
            assert stranger.recv(1) == b""  # not the timeout of `connect`, 5 s
        assert forming.finish(1).keys() == {0, 1}


def test_a_rank_that_has_proved_itself_is_not_dropped_for_strangers_that_have_not():
    with forming_group(secret=SECRET) as forming:
        first = proven_link(forming.port, SECRET)
        sockets = strangers_that_know_the_magic(forming.port, 300)
        assert sockets[0].recv(1) == b""
        ask_to_join(first, 1, secret=SECRET)
        token = answer_on(first).meta
        second = proven_link(forming.port, SECRET)
        sockets += strangers_that_know_the_magic(forming.port, 300)
        assert sockets[300].recv(1) == b""
        ask_to_join(second, 1, token, is_lifeline=True, secret=SECRET)
        assert answer_on(second).kind == Kind.OK
        for sock in (*sockets, first.sock, second.sock):
            sock.close()


def test_who_has_come_further_stays():
    strangers = Strangers(most=2, seconds=10.0)
    assert strangers.add("proven") is None
    assert strangers.move_on("proven") is None
    assert strangers.move_on("proven") is None
    assert strangers.add("greeted") is None
    assert strangers.move_on("greeted") is None
    closed = [strangers.add(f"new {number}") for number in range(5)]
    assert closed == [None, None, "new 0", "new 0", "new 0"]  # the server drops what is returned
    for number in range(5):
        assert strangers.oldest() == f"new {number}"
        strangers.remove(f"new {number}")
    assert strangers.oldest() == "greeted"
    strangers.remove("greeted")
    assert strangers.everyone() == ["proven"]
    assert strangers.overdue() == []
    strangers.remove("proven")
    assert not strangers


class HangingUp(Proxy):
    """Closes the first connections when they have said something, and relays the others."""

    def __init__(self, port, number, after=1):
        super().__init__(port)
        self.number = number
        self.seen = 0
        self.after = after

    def _relay(self, source, sink, to_store):
        if to_store:
            self.seen += 1
            if self.seen in self.number:
                source.recv(65536)
                # A reset and no polite end, as of a server that closes what it has not read.
                source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                source.close()
                sink.close()
                return
        super()._relay(source, sink, to_store)


@pytest.mark.parametrize("which", [{1}, {1, 2, 3}, {2}, {1, 3}])
def test_a_rank_that_was_hung_up_on_before_it_joined_tries_again(which):
    """The second connection that is relayed is the lifeline's."""
    with forming_group(secret=SECRET) as forming:
        with HangingUp(forming.port, which) as proxy:
            forming.groups[1] = StatelessProcessGroup.create(
                "127.0.0.1", proxy.port, 1, 2, timeout=20, secret=SECRET
            )
            groups = forming.finish()
            groups[1].send_obj("joined", 0)
            assert groups[0].recv_obj(1) == "joined"
            groups[1].close()


def test_a_store_that_always_hangs_up_is_a_join_error_at_the_deadline():
    with forming_group(timeout=3.0) as forming:
        with HangingUp(forming.port, range(10_000)) as proxy:
            start = time.monotonic()
            with pytest.raises(JoinError, match=r"hung up: .*waited 0\.\d of 0.5 s"):
                StatelessProcessGroup.create("127.0.0.1", proxy.port, 1, 2, timeout=0.5)
            assert 0.4 < time.monotonic() - start < 1.5
        forming.finish(1)


def flood(pipe):
    """Open connections that send the magic bytes, as fast as can be, until this is killed."""
    sockets = collections.deque()
    pipe.send("ready")
    port = pipe.recv()
    while True:
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(("127.0.0.1", port))
        sockets.append(sock)
        if len(sockets) > 10:
            with contextlib.suppress(OSError):
                sockets[-8].send(MAGIC)
        if len(sockets) > 800:
            sockets.popleft().close()


def test_a_group_forms_in_a_flood_of_strangers():
    floods = []
    for _ in range(2):
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=flood, args=(theirs,))
        process.start()
        floods.append((process, ours))
    try:
        for _process, pipe in floods:
            assert pipe.poll(60)
        with forming_group(3, secret=SECRET, timeout=40.0) as forming:
            for _process, pipe in floods:
                pipe.send(forming.port)
            time.sleep(0.5)
            groups = forming.finish(1, 2)
            assert not forming.failures
            groups[2].send_obj("joined", 0)
            assert groups[0].recv_obj(2) == "joined"
    finally:
        for process, pipe in floods:
            process.kill()
            process.join()
            process.close()
            pipe.close()


def test_a_lifeline_needs_the_token_of_its_rank():
    with forming_group() as forming:
        first = proven_link(forming.port, None)
        ask_to_join(first, 1)
        token = answer_on(first).meta
        for wrong in (bytes(16), token[:-1] + bytes([token[-1] ^ 1])):
            thief = proven_link(forming.port, None)
            ask_to_join(thief, 1, wrong, is_lifeline=True)
            answer = answer_on(thief)
            assert answer.kind == Kind.REFUSED
            assert unpack_text(answer.meta) == (
                (), "rank 1 must join with the token it was given",
            )  # fmt: skip
            thief.sock.close()
        second = proven_link(forming.port, None)
        ask_to_join(second, 1, token, is_lifeline=True)
        assert answer_on(second).kind == Kind.OK
        for link in (first, second):
            link.sock.close()


def test_settings_of_any_length_do_not_end_the_server():
    with forming_group(timeout=5.0) as forming:
        link = proven_link(forming.port, None)
        ask_to_join(link, 1, settings="x" * 65_500)
        peers, text = unpack_text(answer_on(link).meta)
        assert peers == ()
        assert text.startswith("rank 1 joined with xxx")
        forming.finish()
        assert "rank 1 joined with xxx" in str(forming.failures[0])
        link.sock.close()


def test_a_notice_is_cut_to_what_a_frame_takes():
    ranks, text = unpack_text(pack_text([3, 4], "ä" * 100_000))
    assert ranks == (3, 4)
    assert text == "ä" * 2048


WITHOUT_FILES = """
import os, resource, socket, sys, threading, time
from fastvideo_comm.stateless import StatelessProcessGroup as Group
tries = 0
accept = socket.socket.accept
def count(self):
    global tries
    tries += 1
    return accept(self)
socket.socket.accept = count
port = int(sys.argv[1])
outcome = []
def join(seconds):
    try:
        Group.create("127.0.0.1", port, 0, 2, timeout=seconds)
        outcome.append("joined")
    except Exception as error:
        outcome.append(str(error))
thread = threading.Thread(target=join, args=(float(sys.argv[2]),))
thread.start()
while tries < 2:
    time.sleep(0.01)  # rank 0's own two connections
time.sleep(0.3)
resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), 4096))
try:
    while True:
        os.open("/dev/null", os.O_RDONLY)
except OSError:
    print("full", flush=True)
sys.stdin.readline()
time.sleep(0.3)
before = tries
time.sleep(1.5)
print(tries - before, flush=True)
sys.stdin.readline()
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
thread.join()
print(outcome[0], flush=True)
os._exit(0)
"""


def run_without_files(seconds, then):
    with (
        reserved_port() as port,
        subprocess.Popen(
            [sys.executable, "-c", WITHOUT_FILES, str(port), str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        try:
            assert process.stdout.readline() == "full\n"
            with connect(port) as waiting:
                process.stdin.write("\n")
                process.stdin.flush()
                assert 0 < int(process.stdout.readline()) < 20  # in 1.5 s
                return then(port, process, waiting)
        finally:
            process.kill()


def test_rank_0_without_file_descriptors_sleeps_and_says_why():
    def then(port, process, waiting):
        process.stdin.write("\n")
        process.stdin.flush()
        return process.stdout.readline()

    text = run_without_files(8.0, then)
    assert "rank(s) [1] did not join" in text
    assert "rank 0 could not accept a connection: [Errno 24] Too many open files" in text


def test_a_rank_joins_when_rank_0_has_file_descriptors_again():
    def then(port, process, waiting):
        process.stdin.write("\n")
        process.stdin.flush()
        group = StatelessProcessGroup.create("127.0.0.1", port, 1, 2, timeout=20)
        group.close(timeout=1)
        return process.stdout.readline()

    assert run_without_files(30.0, then) == "joined\n"
