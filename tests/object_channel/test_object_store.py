"""The own store: its verbs, and what strangers, liars and meddlers on the way can do to it."""

import contextlib
import os
import random
import socket
import threading
import time
from datetime import timedelta

import pytest
from stateless_proxy import Proxy
from stateless_ranks import SECRET, own_groups, run_own
from stateless_strangers import connect, forming_group, joined_link, proven_link

from fastvideo_comm.errors import (
    AuthenticationError,
    ClosedError,
    CommunicationTimeoutError,
    PeerLostError,
)
from fastvideo_comm.object_channel.message_seal import Address, Op
from fastvideo_comm.object_channel.store_handshake import HELLO_BYTES
from fastvideo_comm.object_channel.store_link import FrameError, Kind, Link
from fastvideo_comm.object_channel.store_messages import (
    pack_address,
    pack_number,
)
from fastvideo_comm.stateless import StatelessProcessGroup


@pytest.mark.parametrize("secret", [None, SECRET])
def test_the_verbs_of_a_torch_store(secret):
    def program(group):
        store = group.store
        if group.rank == 0:
            store.set("text", "value")
            store.set("bytes", b"\0\xff")
            assert store.add("number", 5) == 5
            assert store.num_keys() == 3
        store.wait(["text", "bytes", "number"], timedelta(seconds=5))
        assert store.get("text") == b"value"
        assert store.get("bytes") == b"\0\xff"
        assert store.check(["text", "bytes"])
        assert not store.check(["text", "nothing"])
        group.barrier()
        if group.rank == 1:
            assert store.add("number", -2) == 3
            assert store.delete_key("text")
            assert not store.delete_key("text")
            store.set_timeout(timedelta(seconds=0.2))
            assert store.timeout == timedelta(seconds=0.2)
            with pytest.raises(
                CommunicationTimeoutError, match=r"store\.get timed out after 0.2 s"
            ):
                store.get("text")
            store.set_timeout(timedelta(seconds=20))
            start = time.monotonic()
            with pytest.raises(CommunicationTimeoutError):
                store.wait(["number", "text"], timedelta(seconds=0.1))
            assert time.monotonic() - start < 5
            with pytest.raises(ValueError, match="key must have at most 8192 bytes, got 9000"):
                store.set("k" * 9000, b"")
            with pytest.raises(ValueError, match="value must have at most 67108864 bytes"):
                store.set("k", bytes((64 << 20) + 1))
        group.barrier()
        if group.rank == 0:
            store.set("text", b"late")
        group.barrier()
        store.set_timeout(timedelta(seconds=5))
        assert store.get("text") == b"late"
        store.wait(["text"])

    run_own(2, program, secret=secret)


def test_a_wait_for_keys_that_come_one_after_the_other_has_one_timeout():
    keys = [f"key {number}" for number in range(50)]
    has_ended = threading.Event()

    def program(group):
        group.barrier()
        if group.rank == 0:
            for key in keys:  # 5 s in all
                if has_ended.wait(0.1):
                    break
                group.store.set(key, "value")
        else:
            timeout = timedelta(seconds=0.3)
            with pytest.raises(
                CommunicationTimeoutError, match=r"store\.wait timed out after 0\.3 s"
            ):
                group.store.wait(keys, timeout)
            has_ended.set()

    run_own(2, program)


def test_a_get_is_answered_when_the_value_comes():
    def program(group):
        group.barrier()
        if group.rank == 0:
            time.sleep(0.2)
            group.store.set("key", "value")
            group.barrier()
            return 0.0
        group.store.get("key")
        arrived = time.monotonic()
        group.barrier()
        return time.monotonic() - arrived

    assert run_own(2, program)[1] < 1


def test_a_closed_store_refuses_use():
    def program(group):
        group.store.close()
        with pytest.raises(ClosedError, match="the group is closed"):
            group.store.get("key")

    run_own(1, program)


# Members that lie


NONSENSE = [
    (99, b"", ()),
    (Kind.SEND, b"short", ()),
    (Kind.SEND, pack_address(Address(Op.SEND, 0, 1, 0), b"default"), (b"as rank 0",)),
    (Kind.SEND, pack_address(Address(Op.SEND, 1, 0, 5), b"default"), (b"out of order",)),
    (Kind.SEND, pack_address(Address(Op.VALUE, 1, 0, 0), b"default"), ()),
    (Kind.RECV, pack_address(Address(Op.SEND, 1, 0, 0), b"default"), ()),
    (Kind.EXPIRE, pack_address(Address(Op.SEND, 0, 1, 0), b"default"), ()),
    (Kind.BARRIER, pack_number(5, b"default"), ()),
    (Kind.BARRIER, b"x", ()),
    (Kind.JOIN, b"again", ()),
    (Kind.OK, b"", ()),
    (Kind.SET, pack_number(-1, b"key"), (b"no such number",)),
    (Kind.SET, b"x", ()),
]


@pytest.mark.parametrize("frame", NONSENSE, ids=range(len(NONSENSE)))
def test_a_rank_that_breaks_the_protocol_is_lost_and_the_server_goes_on(frame):
    kind, meta, parts = frame
    with forming_group() as forming:
        links = joined_link(forming.port, None)
        group = forming.finish()[0]
        links[0].queue(kind, 2, meta, parts)
        links[0].flush()
        with pytest.raises(PeerLostError, match=r"rank\(s\) \[1\] died"):
            group.recv_obj(1, timeout=5)
        with pytest.raises(PeerLostError, match=r"rank\(s\) \[1\] died"):
            group.barrier()
        for link in links:
            link.sock.close()


def test_a_size_that_lies_reserves_no_memory():
    with forming_group() as forming:
        before = resident_bytes()
        links = []
        for _ in range(20):
            link = proven_link(forming.port, None)
            link.queue(Kind.JOIN, 1, b"x", [b"y" * 70_000])
            # A frame that announces 64 MiB and brings 70 KB.
            head = bytes(link._out[0])
            link._out[0] = head[:7] + (64 << 20).to_bytes(8, "little") + head[15:]
            link.flush()
            links.append(link)
        time.sleep(0.3)
        groups = forming.finish(1)
        groups[1].send_obj("alive", 0)
        assert groups[0].recv_obj(1) == "alive"
        assert resident_bytes() - before < 30_000_000
        for link in links:
            link.sock.close()


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_size_above_the_limit_is_refused_before_anything_is_read():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        reader = Link(ours, 1000, None, of_store=True)
        writer = Link(theirs, 1000, None, of_store=False)
        writer.queue(Kind.SET, 1, b"k", [bytes(1001)])
        writer.flush()
        with pytest.raises(FrameError, match="a body must have at most 1000 bytes"):
            reader.read()


# Somebody on the way


def frames_sent(count):
    """Return the bytes of some frames under a key, and a reader for them."""
    ours, theirs = socket.socketpair()
    with theirs:
        writer = Link(theirs, 1000, b"key", of_store=False)
        for number in range(count):
            writer.queue(Kind.SET, number, b"meta", [b"body"])
        writer.flush()
        data = ours.recv(10_000)
    ours.close()
    return data


def read_all(data):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        return Link(ours, 1000, b"key", of_store=True).read()


def test_no_bit_of_a_request_can_be_flipped_on_the_way():
    data = frames_sent(1)
    assert len(read_all(data)) == 1
    for bit in range(8 * (len(data) - len(b"body"))):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(FrameError):
            assert read_all(flipped) == []  # a longer frame is announced: it waits for the rest


def test_requests_can_be_neither_replayed_nor_reordered_nor_dropped_nor_reflected():
    data = frames_sent(3)
    one = len(data) // 3
    first, second, third = data[:one], data[one : 2 * one], data[2 * one :]
    assert len(read_all(first + second + third)) == 3
    for altered in (second, first + first, first + third, first + second + second, second + first):
        with pytest.raises(FrameError, match="a frame must carry the tag of its place"):
            read_all(altered)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(first)
        with pytest.raises(FrameError, match="a frame must carry the tag of its place"):
            Link(ours, 1000, b"key", of_store=False).read()


def run_through_a_proxy(alter, **options):
    """A group whose rank 1 joins through a proxy that alters what passes once it is told to."""
    with own_groups(2, secret=SECRET, **options) as open_group:
        opened = {}
        thread = threading.Thread(target=lambda: opened.update({0: open_group(0)}))
        thread.start()
        with Proxy(open_group.port) as proxy:
            opened[1] = StatelessProcessGroup.create(
                "127.0.0.1", proxy.port, 1, 2, timeout=5, secret=SECRET, **options
            )
            thread.join()
            opened[1].send_obj("untouched", 0)
            assert opened[0].recv_obj(1) == "untouched"
            proxy.alter = alter
            yield opened
            for group in opened.values():
                group.close(timeout=1)


@pytest.mark.parametrize("encryption", ["auto", "off"])
def test_a_body_altered_on_the_way_is_an_authentication_error_now_and_later(encryption):
    def alter(to_store, data):
        if encryption == "off":
            return data.replace(b"pay 100", b"pay 999")
        # Nobody can read it, but the body ends the frame.
        return data[:-1] + bytes([data[-1] ^ 1]) if to_store else data

    for opened in run_through_a_proxy(alter, encryption=encryption):
        opened[1].send_obj("pay 100", 0)
        for _ in range(2):
            with pytest.raises(AuthenticationError, match="must carry the seal of send/1/0/1"):
                opened[0].recv_obj(1, timeout=2)


@pytest.mark.parametrize("seed", range(6))
def test_random_damage_on_the_way_is_never_a_wrong_object(seed):
    random_ = random.Random(seed)

    def alter(_to_store, data):
        damaged = bytearray(data)
        damaged[random_.randrange(len(damaged))] ^= 1 << random_.randrange(8)
        return bytes(damaged)

    for opened in run_through_a_proxy(alter):
        received = []

        def exchange(opened=opened, received=received):
            for number in range(20):
                opened[1].send_obj(number, 0, timeout=1)
                received.append(opened[0].recv_obj(1, timeout=1))

        with pytest.raises((AuthenticationError, PeerLostError, CommunicationTimeoutError)):
            exchange()
        assert received == list(range(len(received)))


def test_a_proof_of_an_earlier_connection_is_no_use():
    """Everything a rank ever said, said again by somebody without the secret."""
    with forming_group(3, secret=SECRET) as forming:
        heard = bytearray()

        def listen_in(to_store, data):
            if to_store:
                heard.extend(data)
            return data

        with Proxy(forming.port) as proxy:
            proxy.alter = listen_in
            through = threading.Thread(
                target=lambda: forming.groups.update(
                    {
                        1: StatelessProcessGroup.create(
                            "127.0.0.1", proxy.port, 1, 3, timeout=20, secret=SECRET
                        )
                    }
                )
            )
            through.start()
            while len(heard) < 2 * (HELLO_BYTES + 32) + 100:
                time.sleep(0.01)
            with connect(forming.port) as replayer:
                replayer.sendall(heard)
                answer = b""
                with contextlib.suppress(ConnectionResetError):
                    while part := replayer.recv(10_000):
                        answer += part
            assert len(answer) <= HELLO_BYTES + 16 + 32
            groups = forming.finish(2)
            through.join()
            groups[1].send_obj("once", 0)
            assert groups[0].recv_obj(1) == "once"
            with pytest.raises(CommunicationTimeoutError):
                groups[0].recv_obj(1, timeout=0.2)
            for rank in (2, 1):
                groups[rank].close()
