"""Ranks that are killed, stopped, interrupted or cut off; every wait ends, every death is known."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stateless_programs import (
    block_in,
    call,
    call_and_let_out,
    call_when_told,
    fork_and_wait,
    join_alone,
    traffic,
    wait_in,
)
from stateless_proxy import Proxy
from stateless_ranks import CONTEXT, SECRET, own_groups, rank_processes, run_own

from fastvideo_comm.errors import ClosedError, CommunicationTimeoutError, MessageExpiredError
from fastvideo_comm.stateless import StatelessProcessGroup

OPS = ["send_obj", "broadcast_obj", "all_gather_obj", "barrier", "large"]


KNOWN_WITHIN = 5.0


def tell(rank, op):
    """Let a `call_when_told` rank call, and return its outcome."""
    rank.pipe.send(op)
    return rank.outcome()


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("op", OPS)
def test_a_rank_killed_during_a_call_is_reported_to_all(op, victim):
    with rank_processes(3, traffic, op, secret=SECRET) as ranks:
        time.sleep(0.2)
        ranks[victim].signal(signal.SIGKILL)
        start = time.monotonic()
        for rank in ranks:
            if rank.rank != victim:
                kind, text, peers, _seconds = rank.outcome(KNOWN_WITHIN)
                assert (kind, peers) == ("PeerLostError", (victim,)), text
                assert f"rank(s) [{victim}] died" in text
        assert time.monotonic() - start < KNOWN_WITHIN


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize(
    "op", ["send_obj", "recv_obj", "broadcast_obj", "all_gather_obj", "barrier"]
)
def test_a_rank_killed_between_calls_is_reported_by_the_next_call_and_by_all_later_ones(op, victim):
    with rank_processes(3, call_when_told, op, 10.0, secret=SECRET) as ranks:
        ranks[victim].signal(signal.SIGKILL)
        ranks[victim].process.join()
        survivors = [rank for rank in ranks if rank.rank != victim]
        for rank in survivors:
            for _ in range(2):
                start = time.monotonic()
                kind, text, peers, _seconds = tell(rank, "call")
                assert (kind, peers) == ("PeerLostError", (victim,)), text
                assert time.monotonic() - start < KNOWN_WITHIN


def test_the_first_send_after_the_server_died_fails():
    with rank_processes(2, call_when_told, "send_obj", 5.0) as ranks:
        assert tell(ranks[1], "call")[0] == "returned"
        ranks[0].signal(signal.SIGKILL)
        ranks[0].process.join()
        assert tell(ranks[1], "call")[0] == "PeerLostError"


@pytest.mark.parametrize(
    "op",
    ["send_obj", "recv_obj", "broadcast_obj", "all_gather_obj", "barrier", "expire_data", "close"],
)
def test_calls_end_in_time_while_the_server_is_stopped_and_go_on_after_it(op):
    with rank_processes(2, call_when_told, op, 0.7, secret=SECRET) as ranks:
        if op == "expire_data":
            ranks[1].pipe.send("call")  # nothing to expire yet
            assert ranks[1].outcome()[0] == "returned"
        ranks[0].signal(signal.SIGSTOP)
        kind, text, _peers, seconds = tell(ranks[1], "call")
        ranks[0].signal(signal.SIGCONT)
        assert seconds < 1.7
        if op in ("expire_data", "close"):
            assert kind == "returned", text
            return
        assert kind == "CommunicationTimeoutError", text
        if op == "recv_obj":
            return  # nobody sends here; the conformance suite receives what came late
        ranks[0].pipe.send("call")
        # The other one is there now: what timed out is completed, nobody was declared dead.
        assert tell(ranks[1], "call")[0] == "returned"
        assert ranks[0].outcome()[0] == "returned"


def test_a_rank_that_is_stopped_for_long_is_not_dead():
    with rank_processes(3, call_when_told, "barrier", 10.0) as ranks:
        ranks[1].signal(signal.SIGSTOP)
        for rank in (ranks[0], ranks[2]):
            rank.pipe.send("call")
        time.sleep(6)  # longer than the heartbeat's limit
        ranks[1].signal(signal.SIGCONT)
        ranks[1].pipe.send("call")
        assert [rank.outcome()[0] for rank in ranks] == ["returned"] * 3


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("op", ["recv_obj", "broadcast_obj", "all_gather_obj", "barrier"])
def test_ctrl_c_ends_a_call_within_a_second(op, rank):
    with rank_processes(2, block_in, op, [rank], 60.0) as ranks:
        ranks[rank].expect("calling")
        time.sleep(0.2)
        ranks[rank].signal(signal.SIGINT)
        start = time.monotonic()
        assert ranks[rank].outcome(5)[0] == "KeyboardInterrupt"
        assert time.monotonic() - start < 1


def test_ctrl_c_ends_a_send_and_a_close_while_the_server_is_stopped():
    with rank_processes(2, block_in, "send_obj", [1], 60.0) as ranks:
        ranks[1].expect("calling")
        ranks[0].signal(signal.SIGSTOP)
        time.sleep(0.3)
        ranks[1].signal(signal.SIGINT)
        start = time.monotonic()
        assert ranks[1].outcome(5)[0] == "KeyboardInterrupt"
        assert time.monotonic() - start < 1


def test_ctrl_c_ends_a_close_that_waits_for_the_others():
    with rank_processes(2, call_and_let_out, "close", 60.0) as ranks:
        ranks[0].pipe.send("call")
        time.sleep(0.3)
        ranks[0].signal(signal.SIGINT)
        start = time.monotonic()
        assert ranks[0].outcome(5)[0] == "KeyboardInterrupt"
        assert time.monotonic() - start < 1


@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_ends_a_join_within_a_second(rank):
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=join_alone, args=(theirs, rank))
    process.start()
    assert ours.poll(30)
    ours.recv()
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGINT)
    start = time.monotonic()
    assert ours.poll(5)
    assert ours.recv() == "KeyboardInterrupt"
    assert time.monotonic() - start < 1
    process.join()
    ours.close()


@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_rank_is_known_while_its_forked_child_lives(dead):
    with rank_processes(2, fork_and_wait) as ranks:
        ranks[1].expect("forked")
        ranks[0].expect("forked")
        ranks[dead].signal(signal.SIGKILL)
        assert ranks[1 - dead].outcome(KNOWN_WITHIN)[0] == "PeerLostError"


# From Python 3.12 on, every fork of a process with threads warns; that is the case meant here.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_cannot_use_the_group_and_does_not_harm_it():
    def program(group):
        child = os.fork()
        if not child:
            try:
                group.send_obj(1, 0)
            except ClosedError:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        group.send_obj("still here", 0)
        return group.recv_obj(0)

    assert run_own(1, program) == ["still here"]


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    delays=st.lists(
        st.tuples(st.floats(0, 0.02), st.floats(0, 0.02), st.floats(0, 0.02)),
        min_size=5,
        max_size=5,
    )
)
def test_slow_ranks_change_nothing(delays):
    def program(group):
        results = []
        for step, delay in enumerate(delays):
            time.sleep(delay[group.rank])
            if step % 5 == 0:
                results.append(group.all_gather_obj((group.rank, step)))
            elif step % 5 == 1:
                group.send_obj((group.rank, step), (group.rank + 1) % 3)
            elif step % 5 == 2:
                results.append(group.recv_obj((group.rank - 1) % 3))
            elif step % 5 == 3:
                results.append(group.broadcast_obj(step if group.rank == 1 else None, 1))
            else:
                group.barrier()
        return results

    expected = [[[(r, 0) for r in range(3)], ((rank - 1) % 3, 1), 3] for rank in range(3)]
    assert run_own(3, program, secret=SECRET) == expected


@contextlib.contextmanager
def behind_a_proxy(**closing):
    """Rank 0, rank 1 whose connections go through a proxy, and the proxy."""
    with own_groups(2) as open_group:
        opened = {}
        thread = threading.Thread(target=lambda: opened.update({0: open_group(0)}))
        thread.start()
        with Proxy(open_group.port) as proxy:
            group = StatelessProcessGroup.create("127.0.0.1", proxy.port, 1, 2, timeout=20)
            thread.join()
            yield opened[0], group, proxy
            group.close(**closing)
            opened[0].close(**closing)


def test_a_link_that_swallows_everything_ends_calls_in_time():
    with behind_a_proxy(timeout=0.3) as (first, group, proxy):
        group.send_obj("through", 0)
        assert first.recv_obj(1) == "through"
        proxy.swallow = True
        for op in ("send_obj", "recv_obj", "barrier"):
            start = time.monotonic()
            with pytest.raises(CommunicationTimeoutError, match=f"{op} in group"):
                call(group, op, 0.3)
            assert time.monotonic() - start < 1.3


def test_a_message_that_could_not_be_sent_in_time_is_the_one_that_was_given():
    """The caller may change its object after a timeout, while the rest of it still leaves."""
    with behind_a_proxy() as (first, group, proxy):
        proxy.swallow = True
        data = bytearray(b"a" * 30_000_000)
        with pytest.raises(CommunicationTimeoutError):
            group.send_obj(data, 0, timeout=0.5)
        data[:] = b"b" * len(data)
        proxy.swallow = False
        group.send_obj("next", 0)
        assert first.recv_obj(1) == b"a" * len(data)
        assert first.recv_obj(1) == "next"


def test_a_message_whose_send_timed_out_and_that_arrived_expires_like_others():
    with behind_a_proxy() as (first, group, proxy):
        proxy.swallow = True
        with pytest.raises(CommunicationTimeoutError):
            group.send_obj("late", 0, timeout=0.3)
        proxy.swallow = False
        assert group.store.num_keys() == 1
        group.data_expiration_seconds = 0
        group.expire_data()
        assert group.store.num_keys() == 0
        with pytest.raises(MessageExpiredError):
            first.recv_obj(1)


HALF_OPEN = """
import subprocess, threading, time, socket
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
from fastvideo_comm.stateless import StatelessProcessGroup as Group
server = socket.create_server(("127.0.0.1", 0))
port = server.getsockname()[1]
groups = {}
def join(rank):
    groups[rank] = Group.create("127.0.0.1", port, rank, 2, timeout=20,
                                listen_socket=server if rank == 0 else None)
threads = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1)]
[t.start() for t in threads]; [t.join() for t in threads]
subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
start = time.monotonic()
try:
    groups[1].recv_obj(0)
except ConnectionError as error:
    print(type(error).__name__, time.monotonic() - start < 6, flush=True)
import os
os._exit(0)
"""


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or shutil.which("ip") is None
    or subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode != 0,
    reason="needs the right to make a network namespace",
)
def test_a_link_that_is_cut_is_a_lost_peer_after_the_heartbeat_limit():
    result = subprocess.run(
        ["unshare", "-n", sys.executable, "-c", HALF_OPEN],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.stdout, result.stderr) == ("PeerLostError True\n", "")


@pytest.mark.parametrize("op", ["all_gather_obj", "barrier"])
def test_a_rank_that_ran_out_of_time_and_left_is_not_named_missing(op):
    def program(group):
        if group.rank in (1, 3):
            over.wait(20)
            return
        with pytest.raises(CommunicationTimeoutError) as raised:
            wait_in(group, op, 1, 0.3 if group.rank else 1.0)
        assert raised.value.peers == (1, 3)
        if group.rank == 0:
            over.set()

    over = threading.Event()
    run_own(4, program)


def test_long_use_leaves_memory_files_threads_and_keys_flat():
    def program(group):
        def state():
            return (
                len(os.listdir("/proc/self/fd")),
                threading.active_count(),
                group.store.num_keys(),
                len(group.entries) < 3000,
            )

        def messages(count):
            for _ in range(count):
                group.send_obj(b"x" * 1024, group.rank)
                group.recv_obj(group.rank)

        messages(1500)
        before, memory = state(), resident_bytes()
        messages(6000)
        assert state() == before
        assert resident_bytes() - memory < 4_000_000

    run_own(1, program, secret=SECRET)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("megabytes", [64, 256])
def test_very_large_messages_arrive_whole(megabytes):
    import torch

    def program(group):
        if group.rank == 0:
            group.send_obj(torch.arange(megabytes << 18, dtype=torch.int32), 1)
        else:
            received = group.recv_obj(0)
            assert torch.equal(received, torch.arange(megabytes << 18, dtype=torch.int32))

    run_own(2, program, secret=SECRET, max_message_bytes=megabytes << 20, timeout=120)
