"""The secret: how long it is, who is told what of it, which run it is for, and what it hides."""

import contextlib
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from stateless_proxy import Proxy
from stateless_ranks import SECRET, listener, own_groups, run_own, torch_groups
from stateless_strangers import forming_group

from fastvideo_comm.errors import JoinError, JoinTimeoutError
from fastvideo_comm.object_channel import message_seal
from fastvideo_comm.object_channel.settings import RUN_VARIABLE, SECRET_VARIABLE
from fastvideo_comm.object_channel.store_handshake import (
    ANSWER_BYTES,
    PROOF_BYTES,
    SESSION_BYTES,
    ServerHandshake,
    make_hello,
    make_proof,
    shake_hands,
)
from fastvideo_comm.stateless import StatelessProcessGroup


@contextlib.contextmanager
def two_ranks(near=None, **options):
    """Yield both groups; rank 1 joins through a proxy if `near` (to_store, data) listens in."""
    with own_groups(2, secret=SECRET, **options) as open_group, Proxy(open_group.port) as proxy:
        proxy.alter = near
        opened = {}
        thread = threading.Thread(target=lambda: opened.update({0: open_group(0)}))
        thread.start()
        opened[1] = StatelessProcessGroup.create(
            "127.0.0.1", proxy.port, 1, 2, timeout=20, secret=SECRET, **options
        )
        thread.join()
        yield opened
        for group in opened.values():
            group.close(timeout=1)


# Its length


@pytest.mark.parametrize("length", [1, 15])
def test_a_short_secret_is_an_error_that_says_how_to_make_one(length, monkeypatch):
    with pytest.raises(
        ValueError,
        match=f"secret must have at least 16 bytes, got {length}: make one by .*token_hex",
    ):
        StatelessProcessGroup.create("127.0.0.1", 0, 0, 1, secret=b"x" * length)
    monkeypatch.setenv(SECRET_VARIABLE, "x" * length)
    with pytest.raises(ValueError, match=f"{SECRET_VARIABLE} must have at least 16 bytes"):
        StatelessProcessGroup.create("127.0.0.1", 0, 0, 1)


def test_a_secret_of_16_bytes_is_accepted():
    assert run_own(1, lambda group: len(group.secret), secret=b"x" * 16) == [16]


# Who is told what of it


def heard_from_store(port, proof):
    """Return the store's first answer, and what it says after this proof."""
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.settimeout(5)
        stranger.sendall(make_hello(SECRET))
        answer = b""
        while len(answer) < ANSWER_BYTES:
            answer += stranger.recv(1000)
        stranger.settimeout(0.3)
        with contextlib.suppress(TimeoutError):
            answer += stranger.recv(1000)
        stranger.settimeout(5)
        stranger.sendall(proof)
        rest = b""
        while part := stranger.recv(1000):
            rest += part
        return answer, rest


def test_a_stranger_gets_nothing_that_depends_on_the_secret():
    with forming_group(secret=SECRET) as forming:
        for proof in (bytes(PROOF_BYTES), make_proof(b"a guess of 16 bytes", b"rank", b"x")):
            answer, rest = heard_from_store(forming.port, proof)
            assert len(answer) == ANSWER_BYTES  # magic, version, flag, nonce, session
            assert rest == bytes(PROOF_BYTES)
        forming.finish(1)


def test_the_key_of_a_connection_is_nothing_that_travelled():
    store, travelled = ServerHandshake(SECRET, bytes(SESSION_BYTES)), b""
    ours, theirs = socket.socketpair()
    with ours, theirs, ThreadPoolExecutor(1) as threads:
        rank = threads.submit(shake_hands, ours, SECRET, time.monotonic() + 10)
        while not store.is_done:
            data = theirs.recv(store.num_missing)
            answer = store.feed(data)
            theirs.sendall(answer)
            travelled += data + answer
        assert rank.result()[0] == store.key
    assert len(store.key) == PROOF_BYTES
    assert store.key not in travelled


# Which run it is for


def test_a_rank_of_another_run_is_refused(monkeypatch):
    outcomes = join_as([{"run_id": "monday"}, {"run_id": "tuesday"}])
    for outcome in outcomes:
        assert isinstance(outcome, JoinError)
        assert "rank 1 joined with run_id=tuesday (rank 0 has run_id=monday)" in str(outcome)
    monkeypatch.setenv(RUN_VARIABLE, "of torchrun")
    outcomes = join_as([{}, {"run_id": "other"}])
    assert "run_id=other (rank 0 has run_id=of%20torchrun)" in str(outcomes[0])
    assert join_as([{}, {"run_id": "of torchrun"}]) == ["joined", "joined"]


def test_a_run_id_has_a_limit():
    with pytest.raises(ValueError, match="run_id must have at most 200 characters, got 201"):
        StatelessProcessGroup.create("127.0.0.1", 0, 0, 1, run_id="x" * 201)


def join_as(options):
    """Join as ranks 0 and 1 with these options; return what came of each."""
    outcomes = [None, None]
    server = listener()

    def run(rank):
        try:
            with StatelessProcessGroup.create(
                "127.0.0.1",
                server.getsockname()[1],
                rank,
                2,
                timeout=5,
                secret=SECRET,
                listen_socket=server if rank == 0 else None,
                **options[rank],
            ):
                outcomes[rank] = "joined"
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


# What it hides


def traffic(groups):
    """Send a text by every operation of both ranks."""
    text = "confidential " * 20

    def run(group):
        group.send_obj(text, 1 - group.rank)
        assert group.recv_obj(1 - group.rank) == text
        assert group.broadcast_obj(text if group.rank == 0 else None, 0) == text
        assert group.all_gather_obj(text) == [text] * 2
        group.store.set(f"key {group.rank}", text)
        assert group.store.get(f"key {1 - group.rank}").decode() == text
        large = text * 1000
        group.send_obj(large, 1 - group.rank)
        assert group.recv_obj(1 - group.rank) == large

    threads = [threading.Thread(target=run, args=(group,)) for group in groups.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(
    ("encryption", "is_read"), [("auto", False), ("required", False), ("off", True)]
)
def test_somebody_on_the_way_reads_bodies_only_where_encryption_is_off(encryption, is_read):
    heard = bytearray()

    def near(_to_store, data):
        heard.extend(data)
        return data

    with two_ranks(near, encryption=encryption) as groups:
        traffic(groups)
    assert (b"confidential" in heard) == is_read
    assert len(heard) > 500_000


def test_a_group_without_cryptography_works_and_is_authenticated(monkeypatch):
    monkeypatch.setattr(message_seal, "has_cryptography", lambda: False)
    with two_ranks(encryption="auto") as groups:
        assert "seal=hmac-sha256" in groups[0]._messenger._settings.words
        traffic(groups)
    with pytest.raises(ValueError, match="'required' without the package cryptography"):
        StatelessProcessGroup.create("127.0.0.1", 0, 0, 1, secret=SECRET, encryption="required")


WITHOUT = """
import sys
sys.modules["cryptography"] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "cryptography" else found(name)
from fastvideo_comm.stateless import StatelessProcessGroup
with StatelessProcessGroup.create("127.0.0.1", 0, 0, 1, secret=b"x" * 32) as group:
    group.send_obj([1], 0)
    assert group.recv_obj(0) == [1]
"""


def test_the_package_is_not_needed():
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=90
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_ranks_that_seal_differently_are_told_so():
    for outcome in join_as([{"encryption": "auto"}, {"encryption": "off"}]):
        assert isinstance(outcome, JoinError)
        assert "seal=aes-256-gmac (rank 0 has seal=aes-256-gcm)" in str(outcome)


def test_encryption_that_is_required_needs_a_secret():
    with pytest.raises(ValueError, match="encryption must not be 'required' without a secret"):
        StatelessProcessGroup.create("127.0.0.1", 0, 0, 1, encryption="required")
    with pytest.raises(ValueError, match="encryption must be 'auto', 'required' or 'off', got 'x'"):
        StatelessProcessGroup.create("127.0.0.1", 0, 0, 1, encryption="x")


def test_another_group_on_the_store_is_encrypted_too():
    heard = bytearray()

    def near(_to_store, data):
        heard.extend(data)
        return data

    with two_ranks(near) as groups:
        second = {
            rank: StatelessProcessGroup(rank, 2, group.store, secret=SECRET, group="second")
            for rank, group in groups.items()
        }
        second[1].send_obj("confidential", 0)
        assert second[0].recv_obj(1) == "confidential"
    assert b"confidential" not in heard


def test_what_a_store_of_torch_holds_is_encrypted(tmp_path):
    with torch_groups("hash", 2, tmp_path, secret=SECRET) as open_group:
        sender, receiver = open_group(0), open_group(1)
        sender.send_obj("confidential", 1)
        assert b"confidential" not in sender.store.get("fastvideo_comm/default/send/0/1/0")
        assert receiver.recv_obj(0) == "confidential"


# Time to join


def test_the_time_to_join_is_that_of_the_store():
    server = listener()
    start = time.monotonic()
    with pytest.raises(JoinTimeoutError, match=r"waited \d\.\d of 0.5 s"):
        # As vLLM calls it: the sixth argument.
        StatelessProcessGroup.create(
            "127.0.0.1", server.getsockname()[1], 0, 2, 3600, 0.5, listen_socket=server
        )
    assert time.monotonic() - start < 3
    with pytest.raises(ValueError, match="store_timeout must be a positive number of seconds"):
        StatelessProcessGroup.create("127.0.0.1", 0, 0, 1, store_timeout=0)
    with StatelessProcessGroup.create("127.0.0.1", 0, 0, 1, store_timeout=7, timeout=9) as group:
        assert group.store.timeout.total_seconds() == 7
        with pytest.raises(TimeoutError, match=r"of 0\.1 s"):
            group.recv_obj(0, timeout=0.1)
