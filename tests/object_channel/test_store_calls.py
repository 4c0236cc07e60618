"""Calls on the own store that run out of time, and what of them is left; ranks that only wait."""

import contextlib
import socket
import time
from datetime import timedelta

import pytest
from stateless_proxy import Proxy
from stateless_ranks import SECRET, run_own
from stateless_strangers import forming_group

from fastvideo_comm.errors import CommunicationTimeoutError, MessageExpiredError
from fastvideo_comm.object_channel.message_seal import EVERYONE, Address, Op
from fastvideo_comm.stateless import StatelessProcessGroup


@contextlib.contextmanager
def behind_a_proxy():
    """Yield rank 1, which is connected through a proxy, and the proxy."""
    with forming_group() as forming:
        with Proxy(forming.port) as proxy:
            group = StatelessProcessGroup.create("127.0.0.1", proxy.port, 1, 2, timeout=20)
            forming.finish()
            yield group, proxy
            group.close(timeout=1)


def kept(group):
    return len(group.store.client._answers)


def test_a_call_that_the_store_does_not_answer_names_rank_0_and_leaves_nothing_behind():
    with behind_a_proxy() as (group, proxy):
        group.data_expiration_seconds = 0
        proxy.swallow = True
        group.entries.append(("send/1/1/0", 0.0))
        for call in (
            lambda: group.expire_data(timeout=0.02),
            lambda: group.store.set("key", "value"),
            lambda: group.store.add("sum", 1),
        ):
            group.store.set_timeout(timedelta(seconds=0.02))
            start = time.monotonic()
            with pytest.raises(CommunicationTimeoutError, match=r"timed out .*0\.02 s"):
                call()
            assert time.monotonic() - start < 1
        group.entries.clear()
        group.data_expiration_seconds = 3600
        with pytest.raises(
            CommunicationTimeoutError, match=r"timed out before the store had it; .* in message 0"
        ) as caught:
            group.send_obj("late", 1, timeout=0.02)
        assert caught.value.peers == (0,)
        assert len(group.entries) == 1
        proxy.swallow = False
        group.store.set_timeout(timedelta(seconds=20))
        assert group.store.get("key") == b"value"
        assert group.store.get("sum") == b"1"
        assert group.recv_obj(1) == "late"
        assert kept(group) == 0


def test_a_call_that_waits_for_its_turn_raises_in_time():
    def program(group):
        with group.store.client.turn(time.monotonic() + 5):  # as a thread inside another call
            for call in (
                lambda: group.barrier(timeout=0.05),
                lambda: group.store.wait(["key"], timedelta(seconds=0.05)),
            ):
                start = time.monotonic()
                with pytest.raises(CommunicationTimeoutError, match="another thread is using this"):
                    call()
                assert time.monotonic() - start < 1
        group.barrier()

    run_own(1, program)


# Values


def test_a_get_that_timed_out_does_not_return_an_earlier_value_later():
    def program(group):
        store = group.store
        for call in (lambda: store.get("key"), lambda: store.wait(["key"])):
            store.set_timeout(timedelta(seconds=0.02))
            with pytest.raises(CommunicationTimeoutError):
                call()
        store.set_timeout(timedelta(seconds=20))
        store.set("key", "first")
        store.set("key", "second")
        assert store.get("key") == b"second"
        assert store.delete_key("key")
        store.set_timeout(timedelta(seconds=0.02))
        for call in (lambda: store.wait(["key"]), lambda: store.get("key")):
            with pytest.raises(CommunicationTimeoutError):
                call()
        store.set_timeout(timedelta(seconds=20))
        store.set("key", "third")
        store.wait(["key"])
        assert store.get("key") == b"third"
        assert kept(group) == 0

    run_own(1, program)


def test_gets_that_time_out_do_not_pile_up_in_the_store():
    def program(group):
        group.store.set_timeout(timedelta(milliseconds=1))
        for _ in range(20):
            with pytest.raises(CommunicationTimeoutError):
                group.store.get("key")
        assert len(group.store._server._mailbox._value_waiters[b"key"]) == 1

    run_own(1, program)


@pytest.mark.parametrize("secret", [None, SECRET])
def test_keys_and_values_of_the_largest_size_are_taken(secret):
    def program(group):
        store = group.store
        store.set("k" * 8192, bytes(100))
        assert store.get("k" * 8192) == bytes(100)
        with pytest.raises(ValueError, match="value must have at most 100 bytes, got 101"):
            store.set("key", bytes(101))
        with pytest.raises(ValueError, match="value must have at most 100 bytes, got 102"):
            store.set("key", "\u00e4" * 51)
        with pytest.raises(ValueError, match="key must have at most 8192 bytes, got 8194"):
            store.get("\u00e4" * 4097)

    run_own(1, program, secret=secret, max_message_bytes=100)


# What was read


def test_a_message_is_known_to_be_read_in_its_own_channel_only():
    def program(group):
        if group.rank == 0:
            for number in range(3):
                group.broadcast_obj(number, 0)
                group.send_obj(number, 0)
                assert group.recv_obj(0) == number
            group.send_obj("to 1", 1)
            with pytest.raises(CommunicationTimeoutError):
                group.all_gather_obj("mine", timeout=0.02)
        else:
            assert [group.broadcast_obj(None, 0) for _ in range(3)] == [0, 1, 2]
        group.barrier()
        if group.rank == 0:
            group.broadcast_obj("last", 0)
            group.send_obj("last", 0)
            is_read = group._messenger.transport.is_read
            assert is_read(Address(Op.BROADCAST, 0, EVERYONE, 2))
            assert not is_read(Address(Op.BROADCAST, 0, EVERYONE, 3))
            assert is_read(Address(Op.SEND, 0, 0, 2))
            assert not is_read(Address(Op.SEND, 0, 1, 0))
            assert not is_read(Address(Op.GATHER, 0, EVERYONE, 0))
        group.barrier()

    run_own(2, program)


def test_all_old_messages_of_a_channel_expire_and_those_that_were_read_do_not():
    def program(group):
        for number in range(4):
            group.send_obj(number, 0)
        assert group.recv_obj(0) == 0
        group.data_expiration_seconds = 0
        group.expire_data()
        assert group.store.num_keys() == 0
        assert not group.entries
        for _ in range(3):
            with pytest.raises(MessageExpiredError):
                group.recv_obj(0)

    run_own(1, program)


# Time


def test_no_answer_of_the_store_waits_for_an_earlier_one_to_arrive():
    """A rank in an all_gather has asked for several messages, and gets several short answers."""

    def program(group):
        group.barrier()
        connections = group.store._server._connections if group.rank == 0 else ()
        return [
            connection.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            for connection in connections
        ]

    assert run_own(3, program)[0] == [1] * 6


# Waiting costs no processor time


def test_a_rank_that_waits_and_rank_0_s_server_sleep_after_a_large_message():
    """More is sent than the sockets take at once, so both ends have waited for them."""

    def program(group):
        group.send_obj(bytes(20_000_000), 0)
        assert len(group.recv_obj(0)) == 20_000_000
        start = time.process_time()
        with pytest.raises(CommunicationTimeoutError):
            group.recv_obj(0, timeout=0.2)
        assert time.process_time() - start < 0.1

    run_own(1, program)
