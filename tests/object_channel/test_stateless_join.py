"""Joining: who may not, who did not come, and where rank 0 listens."""

import contextlib
import gc
import os
import socket
import threading
import time
from pathlib import Path

import pytest
from reserved_port import reserved_port
from stateless_ranks import SECRET, listener, own_groups
from stateless_strangers import connect, forming_group

from fastvideo_comm.errors import JoinError, JoinTimeoutError
from fastvideo_comm.object_channel import store
from fastvideo_comm.object_channel.store_handshake import (
    MAGIC,
    PROOF_BYTES,
    PROTOCOL_VERSION,
    SESSION_BYTES,
    make_hello,
)
from fastvideo_comm.stateless import StatelessProcessGroup


def join_outcomes(joins, timeout=3.0, within=1.0):
    """Join in threads as each of `joins` says; return what came of each."""
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


@pytest.mark.parametrize("world_size", [20_000, 100_000])
def test_more_missing_ranks_than_an_answer_can_name_are_a_join_timeout_all_the_same(world_size):
    (outcome,) = join_outcomes([{"rank": 0, "world_size": world_size}], timeout=0.5, within=3.0)
    assert isinstance(outcome, JoinTimeoutError)
    assert outcome.peers == tuple(range(1, 8193))


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


def test_a_rank_claimed_twice_is_refused_and_the_group_forms_without_it():
    with forming_group(3) as forming:
        for _ in range(2):
            forming.join_in_thread(1)
        while not forming.failures:
            time.sleep(0.01)
        groups = forming.finish(2)
        assert isinstance(forming.failures[1], JoinError)
        assert "rank 1 is already taken" in str(forming.failures[1])
        groups[1].send_obj("joined", 2)
        assert groups[2].recv_obj(1) == "joined"


def test_nobody_listens_once_all_have_joined():
    with forming_group() as forming:
        stranger = connect(forming.port)
        groups = forming.finish(1)
        assert not listening_addresses(forming.port)
        assert stranger.recv(1) == b""  # and who was there is sent away
        stranger.close()
        with pytest.raises(JoinTimeoutError, match="a store listens until all have joined"):
            StatelessProcessGroup.create("127.0.0.1", forming.port, 1, 2, timeout=0.5)
        groups[0].send_obj("as before", 1)
        assert groups[1].recv_obj(0) == "as before"


def test_another_secret_is_an_authentication_error_and_named_to_those_who_wait():
    outcomes = join_outcomes(
        [
            {"rank": 0, "secret": b"one secret of 16 bytes"},
            {"rank": 1, "secret": b"two secret of 16 bytes"},
        ],
        1.0,
    )
    assert isinstance(outcomes[0], TimeoutError)
    assert "another secret" in str(outcomes[0])
    assert type(outcomes[1]).__name__ == "AuthenticationError"
    outcomes = join_outcomes([{"rank": 0, "secret": b"one secret of 16 bytes"}, {"rank": 1}], 1.0)
    assert "it has no secret" in str(outcomes[0])
    assert "given no secret, the store a secret" in str(outcomes[1])
    outcomes = join_outcomes([{"rank": 0}, {"rank": 1, "secret": b"one secret of 16 bytes"}], 1.0)
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
            with pytest.raises(
                JoinError, match=f"it speaks protocol version {PROTOCOL_VERSION + 1}"
            ):
                open_group(0)
            # It is told the store's version, then the connection ends.
            assert stranger.recv(1000).startswith(MAGIC)
            assert stranger.recv(1000) == b""


def test_a_store_of_another_protocol_version_is_a_join_error():
    answer = of_another_version(make_hello(None)) + bytes(SESSION_BYTES + PROOF_BYTES)
    with answering(answer) as port:
        versions = f"{PROTOCOL_VERSION + 1}, this rank {PROTOCOL_VERSION}"
        with pytest.raises(JoinError, match=f"the store speaks protocol version {versions}"):
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
        with pytest.raises(JoinError) as caught:
            StatelessProcessGroup.create("127.0.0.1", port, 0, 2, timeout=5)
    assert str(caught.value) == (
        "create in group 'default' on rank 0 of 2: cannot listen on 127.0.0.1 port "
        f"{port}: [Errno 98] Address already in use; choose another port, or give rank 0 a "
        "listen_socket; waited 0.0 of 5 s"
    )


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_a_port_of_something_else_is_a_join_error_in_time(says):
    with answering(says) as port:
        start = time.monotonic()
        with pytest.raises(JoinError, match="what listens"):
            StatelessProcessGroup.create("127.0.0.1", port, 1, 2, timeout=0.5)
        assert time.monotonic() - start < 1.5


def test_no_store_is_a_join_error_in_time():
    with reserved_port() as port:
        start = time.monotonic()
        with pytest.raises(JoinError, match=f"no store answers on 127.0.0.1 port {port}"):
            StatelessProcessGroup.create("127.0.0.1", port, 1, 2, timeout=0.5)
        assert time.monotonic() - start < 1.5


def test_a_store_that_hangs_up_is_asked_again():
    """A store that strangers besiege hangs up on ranks too, before it has answered."""
    with listener() as server:
        joined = []
        rank_1 = threading.Thread(
            target=lambda: joined.append(
                StatelessProcessGroup.create(*server.getsockname(), 1, 2, timeout=15)
            )
        )
        rank_1.start()
        for _ in range(3):
            stranger, _ = server.accept()
            stranger.recv(1)  # its greeting has come
            stranger.close()
        group = StatelessProcessGroup.create(
            *server.getsockname(), 0, 2, timeout=15, listen_socket=server
        )
        rank_1.join()
        group.send_obj("there", 1)
        assert joined[0].recv_obj(0) == "there"
        joined[0].close()
        group.close()


def test_a_failed_join_leaves_nothing_behind():
    gc.collect()  # what earlier tests have left would go meanwhile
    threads, files = set(threading.enumerate()), _descriptors()
    for _ in range(3):
        join_outcomes([{"rank": 0}, {"rank": 1, "group": "elsewhere"}])
    gc.collect()
    assert set(threading.enumerate()) <= threads
    assert _descriptors() <= files


def _descriptors() -> set[str]:
    """The open descriptors of this process, and what each of them is."""
    links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    return {f"{link} {os.readlink(link)}" for link in links if os.path.lexists(link)}


# The listening address


def listening_addresses(port):
    """Return the addresses on which this process listens at this port, as the kernel lists them.

    Another process may have the same port of another address: ranks of other tests have many.
    """
    own = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            own.add(os.readlink(f"/proc/self/fd/{number}"))
    found = set()
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            address, number = fields[1].split(":")
            is_own = f"socket:[{fields[9]}]" in own
            if is_own and int(number, 16) == port and fields[3] == "0A":
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                found.add(socket.inet_ntop(family, b"".join(words)))
    return found


def check_addresses_while_forming(host, connect_to, **options):
    """Form a group of two on a port of its own; check where rank 0 listens before rank 1 comes."""
    opened = {}

    def join(rank):
        opened[rank] = StatelessProcessGroup.create(
            (host, connect_to)[rank], port, rank, 2, timeout=20, **options
        )

    with reserved_port(host) as port:
        first = threading.Thread(target=join, args=(0,))
        first.start()
        while not listening_addresses(port):
            time.sleep(0.01)
        assert listening_addresses(port) == {host}
        join(1)
        first.join()
    opened[0].send_obj("hello", 1)
    assert opened[1].recv_obj(0) == "hello"
    for rank in (1, 0):
        opened[rank].close()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1"])
def test_rank_0_listens_on_the_hosts_address_only(host):
    check_addresses_while_forming(host, host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "::ffff:0.0.0.0", "0"])
def test_a_wildcard_address_needs_a_secret(host):
    message = "host must be one address while there is no secret"
    with reserved_port() as port, pytest.raises(ValueError, match=message):
        StatelessProcessGroup.create(host, port, 0, 1, timeout=5)
    assert not listening_addresses(port)


def test_a_wildcard_address_works_with_a_secret():
    check_addresses_while_forming("0.0.0.0", "127.0.0.1", secret=SECRET)


def test_an_interrupted_join_leaves_the_port_free(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "StoreClient", interrupt)
    with reserved_port() as port:
        address = ("127.0.0.1", port)
        server = socket.create_server(address)
        with pytest.raises(KeyboardInterrupt):
            StatelessProcessGroup.create(*address, 0, 2, listen_socket=server, timeout=5)
        assert server.fileno() == -1
        socket.create_server(address).close()
