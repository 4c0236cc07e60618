"""A group on a store of torch: what it keeps, what it removes, and what a failing store does."""

import time

import pytest
from stateless_ranks import SECRET
from torch.distributed import HashStore

from fastvideo_comm.errors import (
    CommunicationTimeoutError,
    DecodeError,
    MessageExpiredError,
    PeerLostError,
)
from fastvideo_comm.object_channel import torch_transport
from fastvideo_comm.object_channel.codec import ObjectCodec
from fastvideo_comm.object_channel.settings import DESCRIPTION_BYTES
from fastvideo_comm.stateless import StatelessProcessGroup


class WatchedStore:
    """A HashStore that can be slow, or fail as the store of a dead server does."""

    def __init__(self):
        self.store = HashStore()
        self.seconds_of_set = 0.0
        self.fails = False

    def __getattr__(self, name):
        if self.fails:
            raise RuntimeError("Broken pipe\nand where that was")
        return getattr(self.store, name)

    def set(self, key, value):
        time.sleep(self.seconds_of_set)
        self.__getattr__("set")(key, value)


def ranks_on(store, world_size=2, **options):
    """Return the groups of all ranks on one store; this thread is each rank in turn."""
    options = {"timeout": 5.0, **options}
    return [StatelessProcessGroup(rank, world_size, store, **options) for rank in range(world_size)]


def inboxes(groups):
    return [group._messenger.transport._inbox for group in groups]


# What is kept, and what is removed


def test_what_was_received_is_let_go():
    store = HashStore()
    groups = ranks_on(store, 3)
    before = store.num_keys()
    groups[0].send_obj("to one", 1)
    assert groups[1].recv_obj(0) == "to one"
    groups[0].broadcast_obj("to all", 0)
    assert [group.broadcast_obj(None, 0) for group in groups[1:]] == ["to all"] * 2
    for op, sends in (("all_gather_obj", ["mine"]), ("barrier", [])):
        for group in groups[:2]:
            with pytest.raises(CommunicationTimeoutError):
                getattr(group, op)(*sends, timeout=0.01)
        for group in groups[::-1]:
            getattr(group, op)(*sends)
    assert inboxes(groups) == [{}, {}, {}]
    assert store.num_keys() == before


def test_the_ranks_whose_objects_are_missing_are_named():
    groups = ranks_on(HashStore(), 4)
    with pytest.raises(CommunicationTimeoutError) as caught:
        groups[0].all_gather_obj("mine", timeout=0.01)
    assert caught.value.peers == (1, 2, 3)
    with pytest.raises(CommunicationTimeoutError) as caught:
        groups[2].all_gather_obj("mine", timeout=0.01)
    assert caught.value.peers == (1, 3)
    # Rank 2 has come, though the rank that is waited for first has not.
    with pytest.raises(CommunicationTimeoutError) as caught:
        groups[3].all_gather_obj("mine", timeout=0.01)
    assert caught.value.peers == (1,)
    with pytest.raises(CommunicationTimeoutError) as caught:
        groups[3].barrier(timeout=0.01)
    assert caught.value.peers == (0, 1, 2)
    with pytest.raises(CommunicationTimeoutError) as caught:
        groups[0].barrier(timeout=0.01)
    assert caught.value.peers == (1, 2)


def test_an_expired_round_leaves_nothing_behind():
    store = HashStore()
    groups = ranks_on(store, 3)
    before = store.num_keys()
    for group in groups[:2]:
        with pytest.raises(CommunicationTimeoutError):
            group.all_gather_obj("mine", timeout=0.01)
    groups[1].data_expiration_seconds = 0
    groups[1].expire_data()
    with pytest.raises(MessageExpiredError):
        groups[2].all_gather_obj("mine", timeout=1)
    assert inboxes(groups[2:]) == [{}]
    assert store.num_keys() > before  # of rank 0's object, that rank 1 has not read


def test_all_old_messages_of_a_channel_expire_and_those_that_were_read_do_not():
    store = HashStore()
    sender, receiver = ranks_on(store)
    before = store.num_keys()
    for number in range(4):
        sender.send_obj(number, 1)
    assert receiver.recv_obj(0) == 0
    sender.data_expiration_seconds = 0
    sender.expire_data()
    assert store.num_keys() == before + 1  # the note of what has expired
    for _ in range(3):
        with pytest.raises(MessageExpiredError):
            receiver.recv_obj(0, timeout=1)
    sender.data_expiration_seconds = 3600
    sender.send_obj("new", 1)
    assert receiver.recv_obj(0) == "new"


def test_what_a_rank_alone_sends_to_all_is_not_kept():
    store = HashStore()
    (group,) = ranks_on(store, 1)
    before = store.num_keys()
    for _ in range(2):
        assert group.broadcast_obj("mine", 0) == "mine"
        assert group.all_gather_obj("mine") == ["mine"]
        group.barrier()
    assert store.num_keys() == before
    assert group.broadcast_send_counter == 2


# Sizes


@pytest.mark.parametrize("secret", [None, SECRET])
@pytest.mark.parametrize("chunk_bytes", [1000, 1 << 22])
def test_an_object_of_the_largest_size_arrives(monkeypatch, secret, chunk_bytes):
    monkeypatch.setattr(torch_transport, "_CHUNK_BYTES", chunk_bytes)
    limit = 300
    sender, receiver = ranks_on(HashStore(), secret=secret, max_message_bytes=limit)
    parts = [bytes(limit + DESCRIPTION_BYTES)]
    monkeypatch.setattr(ObjectCodec, "encode_parts", lambda self, obj: parts)
    monkeypatch.setattr(ObjectCodec, "decode", lambda self, data: bytes(data))
    sender.send_obj(None, 1)
    assert receiver.recv_obj(0) == parts[0]


@pytest.mark.parametrize("size", [99, 100, 101, 199, 200, 201, 300])
def test_a_message_of_any_number_of_chunks_arrives_and_is_removed(monkeypatch, size):
    monkeypatch.setattr(torch_transport, "_CHUNK_BYTES", 100)
    store = HashStore()
    sender, receiver = ranks_on(store)
    before = store.num_keys()
    monkeypatch.setattr(ObjectCodec, "encode_parts", lambda self, obj: [bytes(obj)])
    monkeypatch.setattr(ObjectCodec, "decode", lambda self, data: len(data))
    sender.send_obj(size, 1)
    assert receiver.recv_obj(0) == size
    assert store.num_keys() == before


@pytest.mark.parametrize(
    "value", [b"", b"\2", b"\0" * 5000, b"\1" + bytes(8), b"\1" + (1 << 60).to_bytes(8, "little")]
)
def test_what_is_no_message_is_skipped(value):
    """Without a secret the store takes whatever anybody writes."""
    sender, receiver = ranks_on(HashStore(), max_message_bytes=100)
    sender.send_obj("true", 1)
    sender.store.set("fastvideo_comm/default/send/0/1/0", value)
    with pytest.raises(DecodeError, match="send/0/1/0 must be a message of this group"):
        receiver.recv_obj(0, timeout=1)
    sender.send_obj("true again", 1)
    assert receiver.recv_obj(0) == "true again"


def test_a_length_that_somebody_else_wrote_does_not_keep_the_sender_busy():
    sender, receiver = ranks_on(HashStore(), max_message_bytes=100)
    sender.send_obj("true", 1)
    sender.store.set("fastvideo_comm/default/send/0/1/0", b"\1" + (1 << 60).to_bytes(8, "little"))
    sender.data_expiration_seconds = 0
    sender.expire_data(timeout=1)
    with pytest.raises(MessageExpiredError):
        receiver.recv_obj(0, timeout=1)


# Time


def test_a_message_that_is_in_the_store_in_part_when_the_time_is_up_is_no_message(monkeypatch):
    monkeypatch.setattr(torch_transport, "_CHUNK_BYTES", 10)
    store = WatchedStore()
    sender, receiver = ranks_on(store)
    before = store.store.num_keys()
    store.seconds_of_set = 0.01
    start = time.monotonic()
    with pytest.raises(CommunicationTimeoutError, match="timed out before the store had it"):
        sender.send_obj("long" * 1000, 1, timeout=0.05)
    assert time.monotonic() - start < 1
    store.seconds_of_set = 0.0
    with pytest.raises(CommunicationTimeoutError):
        receiver.recv_obj(0, timeout=0.01)
    sender.send_obj("another" * 10, 1)
    assert receiver.recv_obj(0) == "another" * 10
    sender.send_obj("and another", 1)
    assert receiver.recv_obj(0) == "and another"
    assert store.store.num_keys() < before + 20


def test_a_wait_polls_ever_more_rarely_up_to_a_hundred_times_a_second(monkeypatch):
    (group,) = ranks_on(HashStore(), 1)
    pauses = []
    now = time.monotonic()

    def sleep(seconds):
        nonlocal now
        pauses.append(seconds)
        now += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with pytest.raises(CommunicationTimeoutError):
        group.recv_obj(0, timeout=0.1)
    assert pauses[0] < 0.001
    assert sorted(pauses[:-1]) == pauses[:-1]
    assert max(pauses) == 0.01
    assert sum(pauses) == pytest.approx(0.1)


def test_a_thread_that_does_not_get_its_turn_raises_in_time():
    (group,) = ranks_on(HashStore(), 1)
    with group._messenger.transport.turn(time.monotonic() + 1):  # as a thread inside another call
        with pytest.raises(
            CommunicationTimeoutError,
            match=r"send_obj in .*: another thread is using this group; waited 0\.\d of 0\.1 s",
        ):
            group.send_obj("mine", 0, timeout=0.1)
    group.send_obj("mine", 0)
    assert group.recv_obj(0) == "mine"


# A store that fails


@pytest.mark.parametrize("op", ["send_obj", "recv_obj", "broadcast_obj", "barrier", "expire_data"])
def test_a_store_that_failed_once_is_lost_in_every_later_call(op):
    store = WatchedStore()
    group, _ = ranks_on(store)
    group.send_obj("unread", 1)
    arguments = {"send_obj": ("x", 1), "recv_obj": (1,), "broadcast_obj": ("x", 0)}.get(op, ())
    group.data_expiration_seconds = 0
    store.fails = True
    if op == "send_obj":
        group.entries.clear()
    for _ in range(2):
        with pytest.raises(PeerLostError, match=f"{op} in .*: the store failed: Broken pipe; wait"):
            getattr(group, op)(*arguments)
        store.fails = False


# Interrupts


def test_a_barrier_that_was_interrupted_before_it_told_anybody_can_be_called_again(monkeypatch):
    first, second = ranks_on(HashStore())
    seal = first._messenger.transport._seal

    def interrupt(*_arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(seal, "seal", interrupt)
        with pytest.raises(KeyboardInterrupt):
            first.barrier()
    with pytest.raises(CommunicationTimeoutError):
        first.barrier(timeout=0.01)
    second.barrier()
    first.barrier()
