"""The handshake, without a network: what each side says, and whom it refuses with which words."""

import hashlib
import hmac
import time

import pytest

from fastvideo_comm.errors import AuthenticationError, JoinError
from fastvideo_comm.object_channel import store_handshake
from fastvideo_comm.object_channel.store_handshake import (
    ANSWER_BYTES,
    HELLO_BYTES,
    MAGIC,
    PROOF_BYTES,
    PROTOCOL_VERSION,
    SESSION_BYTES,
    HandshakeError,
    ServerHandshake,
    make_hello,
    make_proof,
    shake_hands,
)

SECRET = b"a secret of some length"
SESSION = bytes(range(SESSION_BYTES))


class SocketOf:
    """A connected socket whose other end is a function: bytes in, what it answers out."""

    def __init__(self, answer):
        self.answer = answer
        self.said = b""
        self.waiting = b""

    def sendall(self, data):
        self.said += data
        self.waiting += self.answer(data)

    def settimeout(self, seconds):
        assert 0 < seconds <= 10

    def recv(self, size):
        part, self.waiting = self.waiting[:size], self.waiting[size:]
        return part


def shake(sock, secret):
    return shake_hands(sock, secret, time.monotonic() + 10)


def a_store(secret=SECRET):
    return ServerHandshake(secret, SESSION)


def of_version(version, greeting):
    return MAGIC + version.to_bytes(2, "little") + greeting[len(MAGIC) + 2 :]


@pytest.mark.parametrize("secret", [SECRET, None])
def test_both_sides_agree_on_key_and_session(secret):
    store = a_store(secret)
    key, session = shake(SocketOf(store.feed), secret)
    assert store.is_done
    assert session == SESSION
    assert key == store.key
    assert (key is None) == (secret is None)


def test_every_connection_has_a_key_of_its_own():
    keys = {shake(SocketOf(a_store().feed), SECRET)[0] for _ in range(10)}
    assert len(keys) == 10


def test_bytes_may_come_one_by_one():
    store, sizes = a_store(), []

    def answer(data):
        said = b""
        for byte in data:
            sizes.append(store.num_missing)
            said += store.feed(bytes([byte]))
        return said

    shake(SocketOf(answer), SECRET)
    assert store.is_done
    assert sizes == [*range(HELLO_BYTES, 0, -1), *range(PROOF_BYTES, 0, -1)]


def test_a_store_has_neither_key_nor_trust_before_the_proof():
    store = a_store()
    assert (store.key, store.is_done) == (None, False)
    assert len(store.feed(make_hello(SECRET))) == ANSWER_BYTES
    assert (store.key, store.is_done) == (None, False)
    with pytest.raises(HandshakeError, match="it has another secret"):
        store.feed(bytes(PROOF_BYTES))
    assert (store.key, store.is_done) == (None, False)


# Another build that speaks the same version must understand these bytes.


@pytest.mark.parametrize("secret", [SECRET, None])
def test_the_bytes_of_version_2_are_those_of_every_build(monkeypatch, secret):
    nonces = iter([b"r" * 32, b"s" * 32])
    monkeypatch.setattr(store_handshake.os, "urandom", lambda size: next(nonces))
    heard = []

    def answer(data):
        heard.append(store.feed(data))
        return heard[-1]

    def expected_hmac(label):
        text = b"fastvideo_comm " + label + b"\0" + hello + heard[0]
        return hmac.new(secret, text, hashlib.sha256).digest() if secret else bytes(32)

    store = a_store(secret)
    sock = SocketOf(answer)
    key, _session = shake(sock, secret)
    hello = b"FVCOMM\r\n\x02\x00" + bytes([secret is not None]) + b"r" * 32
    assert heard[0] == hello[:-32] + b"s" * 32 + SESSION
    assert sock.said == hello + expected_hmac(b"rank")
    assert heard[1] == expected_hmac(b"store")
    assert key == (expected_hmac(b"link") if secret else None)


# Whom the store refuses


@pytest.mark.parametrize(
    "data", [b"G", b"FVCOMM\r\r", b"FVCOMM\r\n".lower(), bytes(HELLO_BYTES)], ids=range(4)
)
def test_a_stranger_is_refused_at_its_first_wrong_byte_and_told_nothing(data):
    with pytest.raises(HandshakeError) as caught:
        a_store().feed(data)
    assert str(caught.value) == "it does not speak this protocol"
    assert caught.value.last_words == b""


@pytest.mark.parametrize(
    ("store_secret", "hello", "text"),
    [
        (SECRET, make_hello(None), "it has no secret"),
        (None, make_hello(SECRET), "it has a secret"),
        (SECRET, of_version(1, make_hello(SECRET)), "it speaks protocol version 1"),
        (None, of_version(770, make_hello(SECRET)), "it speaks protocol version 770"),
    ],
    ids=range(4),  # no id holds the random bytes of a greeting
)
def test_a_rank_of_another_kind_is_refused_and_told_what_the_store_is(store_secret, hello, text):
    with pytest.raises(HandshakeError) as caught:
        a_store(store_secret).feed(hello)
    assert str(caught.value) == text
    answer = caught.value.last_words
    expected = make_hello(store_secret)[:-32]
    assert (answer[: len(expected)], len(answer)) == (expected, ANSWER_BYTES)
    assert answer.endswith(SESSION)


def test_a_rank_with_another_secret_is_told_by_zeros():
    store = a_store()
    answer = store.feed(make_hello(SECRET))
    assert len(answer) == ANSWER_BYTES
    with pytest.raises(HandshakeError) as caught:
        store.feed(make_proof(SECRET, b"rank", answer))  # over something else
    assert str(caught.value) == "it has another secret"
    assert caught.value.last_words == bytes(PROOF_BYTES)


# What the rank refuses


def answers(greeting):
    """Return the answer of something that greets so, and says zeros later."""
    return lambda data: greeting if data.startswith(MAGIC) else bytes(PROOF_BYTES)


OF_NO_SECRET = make_hello(None) + SESSION
OF_SECRET = make_hello(SECRET) + SESSION


@pytest.mark.parametrize(
    ("secret", "greeting", "kind", "text"),
    [
        (None, b"SSH-2.0-", JoinError, "what listens there is not a fastvideo_comm store"),
        (
            None,
            of_version(PROTOCOL_VERSION + 1, OF_NO_SECRET),
            JoinError,
            f"the store speaks protocol version {PROTOCOL_VERSION + 1}, "
            f"this rank {PROTOCOL_VERSION}",
        ),
        (
            SECRET,
            OF_NO_SECRET,
            AuthenticationError,
            "this rank was given a secret, the store no secret",
        ),
        (
            None,
            OF_SECRET,
            AuthenticationError,
            "this rank was given no secret, the store a secret",
        ),
        (
            SECRET,
            OF_SECRET,
            AuthenticationError,
            "the store must hold the same secret as this rank",
        ),
        (None, b"", EOFError, "the connection was closed"),
    ],
    ids=range(6),
)
def test_a_rank_says_why_it_does_not_join(secret, greeting, kind, text):
    with pytest.raises(kind) as caught:
        shake(SocketOf(answers(greeting)), secret)
    assert type(caught.value) is kind
    assert str(caught.value) == text


def test_a_rank_proves_nothing_to_a_store_of_another_kind():
    sock = SocketOf(answers(OF_NO_SECRET))
    with pytest.raises(AuthenticationError, match="the store no secret"):
        shake(sock, SECRET)
    assert len(sock.said) == HELLO_BYTES


def test_a_rank_reads_no_byte_that_belongs_to_what_follows():
    store = a_store()
    sock = SocketOf(lambda data: store.feed(data) + (b"next" if store.is_done else b""))
    shake(sock, SECRET)
    assert sock.waiting == b"next"
