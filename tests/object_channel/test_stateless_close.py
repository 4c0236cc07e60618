"""Leaving from another thread, from a signal handler, and at the end of a process."""

import signal
import subprocess
import sys
import threading
import time

import pytest
from stateless_programs import wait_in
from stateless_proxy import Proxy
from stateless_ranks import SECRET, rank_processes, run_own
from stateless_strangers import forming_group, joined_link

from fastvideo_comm.errors import ClosedError, PeerLostError
from fastvideo_comm.stateless import StatelessProcessGroup


@pytest.mark.parametrize("closing", [0, 1])
@pytest.mark.parametrize("op", ["recv_obj", "broadcast_obj", "all_gather_obj", "barrier"])
def test_close_wakes_the_call_of_another_thread_and_the_rank_leaves(op, closing):
    ended = {}

    def program(group):
        group.barrier()
        if group.rank != closing:
            # Neither a timeout nor a death: the rank said goodbye.
            with pytest.raises(PeerLostError, match=rf"rank\(s\) \[{closing}\] left the group"):
                group.recv_obj(closing, timeout=10)
            return

        def call():
            try:
                wait_in(group, op, 1 - closing, 15.0)
            except ClosedError as error:
                ended["text"] = str(error)
            ended["after"] = time.monotonic() - start

        start = time.monotonic()
        thread = threading.Thread(target=call)
        thread.start()
        time.sleep(0.3)
        group.close(timeout=5)
        thread.join()
        ended["closed"] = time.monotonic() - start

    run_own(2, program, secret=SECRET)
    assert f"{op} in group 'default' on rank {closing} of 2: the group is closed" in ended["text"]
    assert ended["after"] < 2
    assert ended["closed"] < 3


def test_the_others_go_on_after_a_close_during_a_call():
    def call(group):
        with pytest.raises(ClosedError, match="the group is closed"):
            group.recv_obj(0)

    def program(group):
        group.barrier()
        if group.rank == 2:
            thread = threading.Thread(target=call, args=(group,))
            thread.start()
            time.sleep(0.2)
            group.close()
            thread.join()
            return
        with pytest.raises(PeerLostError, match=r"rank\(s\) \[2\] left the group"):
            group.recv_obj(2, timeout=10)
        group.send_obj(group.rank, 1 - group.rank)
        assert group.recv_obj(1 - group.rank) == 1 - group.rank

    run_own(3, program)


def test_a_thread_that_waits_for_its_turn_is_told_of_the_close():
    def program(group):
        failures = []

        def call():
            with pytest.raises(ClosedError) as raised:
                group.recv_obj(0, timeout=15)
            failures.append(str(raised.value))

        threads = [threading.Thread(target=call) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        start = time.monotonic()
        group.close()
        for thread in threads:
            thread.join()
        assert time.monotonic() - start < 2
        assert len(failures) == 3

    run_own(1, program)


class Slow:
    def __init__(self, seconds):
        self.seconds = seconds


def build_slowly(seconds):
    time.sleep(seconds)
    return Slow(seconds)


def test_a_rank_that_is_building_an_object_leaves_when_it_is_built():
    def program(group):
        group.register_type(Slow, to_fields=lambda slow: slow.seconds, from_fields=build_slowly)
        group.barrier()
        if group.rank == 0:
            group.send_obj(Slow(1.0), 1)
            with pytest.raises(PeerLostError, match=r"rank\(s\) \[1\] left the group"):
                group.recv_obj(1, timeout=10)
            return
        received = []
        thread = threading.Thread(target=lambda: received.append(group.recv_obj(0)))
        thread.start()
        time.sleep(0.4)
        start = time.monotonic()
        group.close(timeout=0.1)
        assert time.monotonic() - start < 0.5
        assert not received
        thread.join()
        assert received[0].seconds == 1.0

    run_own(2, program)


def test_a_signal_handler_may_close_the_group_below_a_call():
    with rank_processes(2, close_in_a_handler) as ranks:
        ranks[1].expect("calling")
        ranks[1].signal(signal.SIGUSR1)
        kind, text, _peers, seconds = ranks[1].outcome(10)
        assert kind == "ClosedError", text
        assert seconds < 5
        kind, text, peers, _seconds = ranks[0].outcome(10)
        assert (kind, peers) == ("PeerLostError", (1,))
        assert "rank(s) [1] left the group" in text


@pytest.mark.parametrize("closing", [0, 1])
@pytest.mark.parametrize("transfer", ["send", "recv"])
def test_a_close_below_a_transfer_says_goodbye_when_the_call_ends(closing, transfer):
    """As a signal handler does whose signal comes while the socket is read or written."""
    inside = threading.local()

    class Socket:
        def __init__(self, sock, group):
            self.sock, self.group = sock, group

        def __getattr__(self, name):
            method = getattr(self.sock, name)
            if name != transfer or getattr(inside, "closes", True):
                return method

            def closes_below(*arguments):
                inside.closes = True
                self.group.close(timeout=10)
                return method(*arguments)

            return closes_below

    def program(group):
        group.barrier()
        start = time.monotonic()
        if group.rank == closing:
            (link, _lifeline) = group.store.client._pair._links
            link.sock = Socket(link.sock, group)
            inside.closes = False
            with pytest.raises(ClosedError, match="the group is closed"):
                group.send_obj("on its way", 1 - closing)
            assert inside.closes
            assert not group.store.client._pair.is_open, "it has left"
        else:
            with pytest.raises(PeerLostError, match=rf"rank\(s\) \[{closing}\] left the group"):
                [group.recv_obj(closing, timeout=10) for _ in range(2)]  # one may have arrived
        assert time.monotonic() - start < 3

    run_own(2, program, secret=SECRET)


def close_in_a_handler(group, pipe):
    if group.rank == 1:
        signal.signal(signal.SIGUSR1, lambda *_: group.close())
        pipe.send("calling")
    group.recv_obj(1 - group.rank, timeout=15)


def test_a_message_that_close_cut_short_is_the_one_that_was_given():
    """The sender's memory changes after its ClosedError, while the rest of it still leaves."""
    with forming_group(timeout=20.0) as forming:
        with Proxy(forming.port) as proxy:
            group = StatelessProcessGroup.create("127.0.0.1", proxy.port, 1, 2, timeout=20)
            forming.finish()
            proxy.swallow = True
            data = bytearray(b"a" * 30_000_000)
            ended = threading.Event()

            def send():
                with pytest.raises(ClosedError):
                    group.send_obj(data, 0)
                data[:] = b"b" * len(data)
                ended.set()

            thread = threading.Thread(target=send)
            thread.start()
            time.sleep(0.3)
            closing = threading.Thread(target=group.close)
            closing.start()
            assert ended.wait(5)
            proxy.swallow = False
            closing.join()
            thread.join()
            assert forming.groups[0].recv_obj(1) == b"a" * len(data)


EXIT_IN_A_CALL = """
import socket, sys, threading, time
import torch
from fastvideo_comm.stateless import StatelessProcessGroup as Group
server = socket.create_server(("127.0.0.1", 0))
port = server.getsockname()[1]
groups = {}
def join(rank):
    groups[rank] = Group.create("127.0.0.1", port, rank, 2, timeout=60,
                                listen_socket=server if rank == 0 else None)
threads = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1)]
[t.start() for t in threads]; [t.join() for t in threads]
threading.excepthook = lambda args: print(args.exc_type.__name__, flush=True)
receiver = threading.Thread(target=groups[0].recv_obj, args=(0,), daemon=True)
receiver.start()
time.sleep(0.3)
from multiprocessing import util
groups[1].close()
start = time.monotonic()
util._exit_function()  # what an interpreter calls at its end, registered by multiprocessing
print(time.monotonic() - start < 2, flush=True)
receiver.join(10)  # its error is printed
import os
os._exit(0)
"""


def test_rank_0_with_a_daemon_thread_in_a_call_ends_at_once():
    result = subprocess.run(
        [sys.executable, "-c", EXIT_IN_A_CALL], capture_output=True, text=True, timeout=120
    )
    assert result.stderr == ""
    assert sorted(result.stdout.split()) == ["ClosedError", "True"]


def test_rank_0_closes_at_once_after_a_loss_though_others_have_not_left():
    with forming_group(3, timeout=20.0) as forming:
        links = joined_link(forming.port, None, 2, 3)
        groups = forming.finish(1)
        for link in links:
            link.sock.close()
        with pytest.raises(PeerLostError, match=r"rank\(s\) \[2\] died"):
            groups[0].recv_obj(2)
        start = time.monotonic()
        groups[0].close(timeout=15)
        assert time.monotonic() - start < 2
