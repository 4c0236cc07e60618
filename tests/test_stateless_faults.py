"""Ranks that are killed, stopped, interrupted or cut off; every wait ends, every death is known."""

import contextlib
import gc
import os
import shutil
import signal
import socket
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
from stateless_ranks import CONTEXT, SECRET, listener, own_groups, rank_processes, run_own

from fastvideo_comm.errors import (
    ClosedError,
    CommunicationTimeoutError,
    JoinError,
    JoinTimeoutError,
    PeerLostError,
)
from fastvideo_comm.object_channel.store_handshake import (
    MAGIC,
    PROOF_BYTES,
    SESSION_BYTES,
    make_hello,
)
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


def test_a_dead_rank_is_known_while_its_forked_child_lives():
    with rank_processes(2, fork_and_wait) as ranks:
        ranks[1].expect("forked")
        ranks[0].expect("forked")
        ranks[1].signal(signal.SIGKILL)
        assert ranks[0].outcome(KNOWN_WITHIN)[0] == "PeerLostError"


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


def test_rank_0_leaves_last():
    left = []

    def program(group):
        group.barrier()
        if group.rank:
            time.sleep(0.2 * group.rank)
            group.send_obj("late", 2)
            left.append(group.rank)
        else:
            group.close()
            left.append(0)

    run_own(3, program)
    assert left == [1, 2, 0]


def test_close_is_idempotent_and_ends_use():
    def program(group):
        group.close()
        group.close()
        with pytest.raises(ClosedError, match="barrier in group 'default' on rank 0 of 1"):
            group.barrier()

    run_own(1, program)


def test_a_call_that_needs_a_rank_which_left_fails_at_once_and_the_group_goes_on():
    def program(group):
        if group.rank == 2:
            group.send_obj("parting words", 1)
            return
        if group.rank == 1:
            assert group.recv_obj(2) == "parting words"
            with pytest.raises(PeerLostError, match=r"rank\(s\) \[2\] left the group"):
                group.recv_obj(2)
            with pytest.raises(PeerLostError, match=r"rank\(s\) \[2\] left the group"):
                group.send_obj("too late", 2)
            with pytest.raises(PeerLostError, match=r"rank\(s\) \[2\] left the group"):
                group.barrier()
        group.send_obj(group.rank, 1 - group.rank)
        assert group.recv_obj(1 - group.rank) == 1 - group.rank

    run_own(3, program)


@pytest.mark.parametrize("op", ["recv_obj", "broadcast_obj", "all_gather_obj", "barrier"])
def test_a_waiting_call_is_told_when_the_rank_it_needs_leaves(op):
    def program(group):
        group.barrier()
        if group.rank == 1:
            time.sleep(0.2)
            return
        start = time.monotonic()
        with pytest.raises(PeerLostError, match=r"rank\(s\) \[1\] left the group"):
            wait_in(group, op, 1, 10.0)
        assert time.monotonic() - start < 2

    run_own(2, program)


def test_a_group_that_is_dropped_says_goodbye():
    with own_groups(2) as open_group:

        def program(group):
            if group.rank == 1:
                with pytest.raises(PeerLostError, match="left the group"):
                    group.recv_obj(0, timeout=5)

        thread = threading.Thread(target=lambda: open_group(0).__class__)
        thread.start()
        with open_group(1) as group:
            thread.join()
            gc.collect()
            program(group)


@pytest.mark.parametrize(("world_size", "rounds"), [(2, 4), (4, 2)])
def test_normal_exit_without_close_is_clean(world_size, rounds):
    run_exits(world_size, rounds)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_a_hundred_normal_exits_without_close_are_clean(world_size):
    run_exits(world_size, 100)


def run_exits(world_size, rounds):
    script = Path(__file__).with_name("stateless_exit.py")
    result = subprocess.run(
        [sys.executable, str(script), str(world_size), str(rounds)],
        capture_output=True,
        text=True,
        timeout=rounds * 8 + 30,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{rounds} clean\n", "")


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


def test_a_link_that_swallows_everything_ends_calls_in_time():
    with own_groups(2) as open_group:
        opened = {}
        thread = threading.Thread(target=lambda: opened.update({0: open_group(0)}))
        thread.start()
        with Proxy(open_group.port) as proxy:
            group = StatelessProcessGroup.create("127.0.0.1", proxy.port, 1, 2, timeout=20)
            thread.join()
            group.send_obj("through", 0)
            assert opened[0].recv_obj(1) == "through"
            proxy.swallow = True
            for op in ("send_obj", "recv_obj", "barrier"):
                start = time.monotonic()
                with pytest.raises(CommunicationTimeoutError, match=f"{op} in group"):
                    call(group, op, 0.3)
                assert time.monotonic() - start < 1.3
            group.close(timeout=0.3)
            opened[0].close(timeout=0.3)


def test_a_message_that_could_not_be_sent_in_time_is_the_one_that_was_given():
    """The caller may change its object after a timeout, while the rest of it still leaves."""
    with own_groups(2) as open_group:
        opened = {}
        thread = threading.Thread(target=lambda: opened.update({0: open_group(0)}))
        thread.start()
        with Proxy(open_group.port) as proxy:
            group = StatelessProcessGroup.create("127.0.0.1", proxy.port, 1, 2, timeout=20)
            thread.join()
            proxy.swallow = True
            data = bytearray(b"a" * 30_000_000)
            with pytest.raises(CommunicationTimeoutError):
                group.send_obj(data, 0, timeout=0.5)
            data[:] = b"b" * len(data)
            proxy.swallow = False
            group.send_obj("next", 0)
            assert opened[0].recv_obj(1) == b"a" * len(data)
            assert opened[0].recv_obj(1) == "next"
            group.close()
            opened[0].close()


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


# Joining


def join_outcomes(joins, timeout=3.0, within=1.0):
    """Join in threads as each of `joins` says; return what came of each, and the seconds."""
    server = listener()
    port = server.getsockname()[1]
    outcomes = [None] * len(joins)

    def run(index, options):
        options = {"world_size": 2, "timeout": timeout, **options}
        time.sleep(options.pop("after", 0))
        start = time.monotonic()
        try:
            with StatelessProcessGroup.create(
                "127.0.0.1", port, listen_socket=server if index == 0 else None, **options
            ):
                outcomes[index] = "joined"
        except Exception as error:
            outcomes[index] = error
        assert time.monotonic() - start < timeout + within

    threads = [threading.Thread(target=run, args=(i, options)) for i, options in enumerate(joins)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_different_world_sizes_are_an_error_on_every_rank():
    start = time.monotonic()
    outcomes = join_outcomes(
        [
            {"rank": 0, "world_size": 3},
            {"rank": 1, "world_size": 3},
            {"rank": 2, "world_size": 4, "after": 1},
        ],
        timeout=20,
    )
    assert time.monotonic() - start < 5
    for outcome in outcomes:
        assert isinstance(outcome, JoinError)
        assert "rank 2 joined with world_size=4 (rank 0 has world_size=3)" in str(outcome)


def test_different_limits_and_groups_are_errors():
    for option in ({"max_message_bytes": 5}, {"group": "elsewhere"}):
        for outcome in join_outcomes([{"rank": 0}, {"rank": 1, **option}]):
            assert isinstance(outcome, JoinError)
            assert "rank 1 joined with " in str(outcome)


def test_missing_ranks_are_named_on_every_rank_that_waits():
    check_missing_ranks_are_named({}, {})


@pytest.mark.parametrize("first", [0, 2])
def test_the_first_rank_whose_time_to_join_is_up_ends_the_join_on_every_rank(first):
    late = {"timeout": 20.0}
    start = time.monotonic()
    outcomes = check_missing_ranks_are_named(late if first else {}, {} if first else late)
    assert time.monotonic() - start < 5
    for outcome in outcomes:
        assert f"did not join before the time of rank {first} was up" in str(outcome)


def check_missing_ranks_are_named(options, other_options):
    outcomes = join_outcomes(
        [{"rank": 0, "world_size": 4, **options}, {"rank": 2, "world_size": 4, **other_options}],
        1.5,
        within=4.0,  # other tests of joins look at the second; this one must hold under any load
    )
    for outcome in outcomes:
        assert isinstance(outcome, JoinTimeoutError)
        assert outcome.peers == (1, 3)
        assert "rank(s) [1, 3] did not join" in str(outcome)
    return outcomes


def test_a_rank_that_comes_after_the_join_has_failed_is_told_who_was_missing():
    outcomes = join_outcomes(
        [
            {"rank": 0, "world_size": 4},
            {"rank": 1, "world_size": 4, "after": 0.9, "timeout": 20.0},
        ],
        0.7,
    )
    for outcome in outcomes:
        assert isinstance(outcome, JoinTimeoutError)
        assert outcome.peers == (1, 2, 3)


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


def test_a_rank_claimed_twice_is_refused_and_the_group_forms_without_it():
    def program(group):
        if group.rank == 1:
            with pytest.raises(JoinError, match="rank 1 is already taken"):
                StatelessProcessGroup.create(group.store.host, group.store.port, 1, 2, timeout=5)
        group.barrier()

    run_own(2, program)


def test_another_secret_is_an_authentication_error_and_named_to_those_who_wait():
    outcomes = join_outcomes([{"rank": 0, "secret": b"one"}, {"rank": 1, "secret": b"two"}], 1.0)
    assert isinstance(outcomes[0], TimeoutError)
    assert "another secret" in str(outcomes[0])
    assert type(outcomes[1]).__name__ == "AuthenticationError"
    outcomes = join_outcomes([{"rank": 0, "secret": b"one"}, {"rank": 1}], 1.0)
    assert "it has no secret" in str(outcomes[0])
    assert "given no secret, the store a secret" in str(outcomes[1])
    outcomes = join_outcomes([{"rank": 0}, {"rank": 1, "secret": b"one"}], 1.0)
    assert "it has a secret" in str(outcomes[0])
    assert "given a secret, the store no secret" in str(outcomes[1])


def of_another_version(greeting):
    altered = bytearray(greeting)
    altered[len(MAGIC)] += 1
    return bytes(altered)


def test_a_rank_of_another_protocol_version_is_named_to_those_who_wait():
    with own_groups(2, timeout=1.0) as open_group:
        with socket.create_connection(("127.0.0.1", open_group.port)) as stranger:
            stranger.sendall(of_another_version(make_hello(None)))
            with pytest.raises(JoinError, match="it speaks protocol version 2"):
                open_group(0)
            # It is told the store's version, then the connection ends.
            assert stranger.recv(1000).startswith(MAGIC)
            assert stranger.recv(1000) == b""


def test_a_store_of_another_protocol_version_is_a_join_error():
    answer = of_another_version(make_hello(None)) + bytes(SESSION_BYTES + PROOF_BYTES)
    with answering(answer) as port:
        with pytest.raises(JoinError, match="the store speaks protocol version 2, this rank 1"):
            StatelessProcessGroup.create("127.0.0.1", port, 1, 2, timeout=2)


@contextlib.contextmanager
def answering(says):
    """Listen, and say the same to whoever comes."""

    def answer():
        with contextlib.suppress(OSError):
            sock, _address = other.accept()
            with sock:
                sock.sendall(says)
                while sock.recv(1000):
                    pass

    with listener() as other:
        thread = threading.Thread(target=answer)
        thread.start()
        yield other.getsockname()[1]
        thread.join()


def test_a_port_in_use_is_a_join_error_on_rank_0():
    with listener() as other:
        port = other.getsockname()[1]
        with pytest.raises(JoinError, match=f"cannot listen on 127.0.0.1 port {port}"):
            StatelessProcessGroup.create("127.0.0.1", port, 0, 2, timeout=5)


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_a_port_of_something_else_is_a_join_error_in_time(says):
    with answering(says) as port:
        start = time.monotonic()
        with pytest.raises(JoinError, match="what listens"):
            StatelessProcessGroup.create("127.0.0.1", port, 1, 2, timeout=0.5)
        assert time.monotonic() - start < 1.5


def test_no_store_is_a_join_error_in_time():
    with listener() as unused:
        port = unused.getsockname()[1]
    start = time.monotonic()
    with pytest.raises(JoinError, match=f"no store answers on 127.0.0.1 port {port}"):
        StatelessProcessGroup.create("127.0.0.1", port, 1, 2, timeout=0.5)
    assert time.monotonic() - start < 1.5


def test_a_failed_join_leaves_nothing_behind():
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        join_outcomes([{"rank": 0}, {"rank": 1, "group": "elsewhere"}])
    gc.collect()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == files


# The listening address


def listening_addresses(port):
    """Return the addresses on which anybody listens at this port, as the kernel lists them."""
    found = set()
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            address, number = line.split()[1].split(":")
            if int(number, 16) == port and line.split()[3] == "0A":
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                found.add(socket.inet_ntop(family, b"".join(words)))
    return found


def free_port(host):
    with listener(host) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1"])
def test_rank_0_listens_on_the_hosts_address_only(host):
    port = free_port(host)
    opened = {}
    thread = threading.Thread(
        target=lambda: opened.update({1: StatelessProcessGroup.create(host, port, 1, 2, timeout=9)})
    )
    thread.start()
    with StatelessProcessGroup.create(host, port, 0, 2, timeout=9) as group:
        thread.join()
        assert listening_addresses(port) == {host}
        group.send_obj("hello", 1)
        assert opened[1].recv_obj(0) == "hello"
        opened[1].close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "::ffff:0.0.0.0", "0"])
def test_a_wildcard_address_needs_a_secret(host):
    port = free_port("127.0.0.1")
    with pytest.raises(ValueError, match="host must be one address while there is no secret"):
        StatelessProcessGroup.create(host, port, 0, 1, timeout=5)
    assert not listening_addresses(port)


def test_a_wildcard_address_works_with_a_secret():
    port = free_port("127.0.0.1")
    with StatelessProcessGroup.create("0.0.0.0", port, 0, 1, timeout=5, secret=SECRET) as group:
        assert listening_addresses(port) == {"0.0.0.0"}
        group.barrier()


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
