"""What a group takes, and what it does with each of its arguments."""

import os
import time
from datetime import timedelta

import pytest
from stateless_ranks import SECRET, listener, own_groups, run_own
from stateless_strangers import forming_group
from torch.distributed import HashStore

from fastvideo_comm.errors import CommunicationTimeoutError, JoinError
from fastvideo_comm.object_channel.settings import (
    RUN_VARIABLE,
    SECRET_VARIABLE,
    GroupSettings,
    check_rank,
    to_seconds,
)
from fastvideo_comm.object_channel.store_sockets import Heartbeat
from fastvideo_comm.stateless import StatelessProcessGroup

CREATE = ("127.0.0.1", 0, 0, 1)


@pytest.fixture(params=["own", "torch"])
def alone(request):
    """A function that makes a group of one rank, on either kind of store."""

    def make(**options):
        if request.param == "own":
            return StatelessProcessGroup.create(*CREATE, **options)
        return StatelessProcessGroup(0, 1, HashStore(), **options)

    return make


@pytest.mark.parametrize("rank", [1, -1, True, 0.0, "0", None])
def test_a_rank_that_is_none_is_named_by_every_op(alone, rank):
    with alone() as group:
        for name, call in (
            ("dst", lambda: group.send_obj("x", rank)),
            ("src", lambda: group.recv_obj(rank)),
            ("src", lambda: group.broadcast_obj("x", rank)),
        ):
            with pytest.raises(
                ValueError, match=f"^{name} must be a rank from 0 to 0, got {rank!r}"
            ):
                call()
        group.send_obj("x", 0)
        assert group.recv_obj(0) == "x"
    with pytest.raises(ValueError, match="dst must be a rank from 0 to 1, got True"):
        check_rank("dst", True, 2)


def test_a_call_without_a_timeout_has_that_of_the_group(alone):
    with alone(timeout=timedelta(seconds=0.1)) as group:
        start = time.monotonic()
        with pytest.raises(CommunicationTimeoutError, match=r"waited 0\.\d of 0\.1 s"):
            group.recv_obj(0)
        assert time.monotonic() - start < 1


def test_the_timeout_of_a_broadcast_holds_for_its_receivers():
    groups = [StatelessProcessGroup(rank, 3, store, timeout=20) for store in [HashStore()]
              for rank in range(3)]  # fmt: skip
    groups[0].broadcast_obj("first", 0)
    assert groups[2].broadcast_obj(None, 0) == "first"
    with pytest.raises(CommunicationTimeoutError, match=r"of 0\.05 s in message 1 ") as caught:
        groups[2].broadcast_obj(None, 0, timeout=0.05)
    assert caught.value.peers == (0,)


def test_how_long_messages_are_kept_is_an_argument_of_create():
    def program(group):
        group.send_obj("old", 0)
        group.send_obj("new", 0)  # which lets the other expire
        with pytest.raises(CommunicationTimeoutError, match="expired unread"):
            group.recv_obj(0)

    assert run_own(1, program, data_expiration_seconds=0) == [None]


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e10, timedelta(0)])
def test_a_timeout_is_a_positive_number_of_seconds(timeout):
    with pytest.raises(ValueError, match="timeout must be a positive number of seconds, got"):
        to_seconds("timeout", timeout)


@pytest.mark.parametrize("interval", [0, 0.5, 1.5, 3601, float("nan")])
def test_a_heartbeat_is_whole_seconds_up_to_an_hour(interval):
    with pytest.raises(ValueError, match="heartbeat_interval must be whole seconds from 1 to 3600"):
        Heartbeat.checked(interval, 3)
    assert Heartbeat.checked(3600.0, 100) == (3600, 100)


@pytest.mark.parametrize("limit", [0, 1.5, 101])
def test_a_heartbeat_has_a_limit_up_to_100(limit):
    with pytest.raises(ValueError, match="heartbeat_limit must be a number from 1 to 100, got"):
        Heartbeat.checked(1, limit)
    assert Heartbeat.checked(1, 1) == (1, 1)


def test_a_secret_is_bytes(monkeypatch):
    with pytest.raises(TypeError, match="secret must be bytes, got str"):
        StatelessProcessGroup.create(*CREATE, secret="a secret of 16 characters")
    monkeypatch.setenv(SECRET_VARIABLE, "")
    with StatelessProcessGroup.create(*CREATE) as group:
        assert group.secret is None
    monkeypatch.setenv(SECRET_VARIABLE, "from the environment")
    with StatelessProcessGroup.create(*CREATE, secret=SECRET) as group:
        assert group.secret == SECRET


def test_the_longest_names_are_taken(monkeypatch):
    monkeypatch.setenv(RUN_VARIABLE, "of torchrun")
    assert check_rank("rank", 2, 3) is None
    for run_id, known in (("r" * 200, "r" * 200), ("", ""), (None, "of torchrun")):
        settings = GroupSettings.checked(0, 1, 1.0, None, "msgpack", 1, "g" * 100, "auto", run_id)
        assert settings.run_id == known
    with pytest.raises(ValueError, match="group must be 1 to 100 of"):
        GroupSettings.checked(0, 1, 1.0, None, "msgpack", 1, "g" * 101, "auto", None)


def test_only_msgpack_registers_types():
    with StatelessProcessGroup.create(*CREATE, secret=SECRET, codec="pickle") as group:
        with pytest.raises(
            TypeError, match="codec must be msgpack to register types, got 'pickle'"
        ):
            group.register_type(os.PathLike)


# The store


def test_a_second_group_has_the_rank_that_its_store_has():
    def program(group):
        with pytest.raises(ValueError, match="rank and world_size must be those of the store"):
            StatelessProcessGroup(1 - group.rank, 2, group.store, group="other")

    run_own(2, program)


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none_is_an_error(port):
    with pytest.raises(ValueError, match=f"port must be from 1 to 65535, got {port}"):
        StatelessProcessGroup.create("127.0.0.1", port, 0, 1)


def test_a_socket_that_listens_already_is_for_rank_0_and_knows_the_port():
    with listener() as sock:
        with pytest.raises(
            ValueError, match="listen_socket must be given to rank 0 only, got rank 1"
        ):
            StatelessProcessGroup.create("127.0.0.1", 1, 1, 2, listen_socket=sock)
        with pytest.raises(JoinError, match=r"rank\(s\) \[1\] did not join"):
            StatelessProcessGroup.create("127.0.0.1", 0, 0, 2, timeout=0.1, listen_socket=sock)


def test_ranks_of_different_codecs_are_told_so():
    with forming_group(secret=SECRET) as forming:
        with pytest.raises(JoinError, match=r"with codec=pickle \(rank 0 has codec=msgpack\)"):
            StatelessProcessGroup.create(
                "127.0.0.1", forming.port, 1, 2, secret=SECRET, codec="pickle", timeout=5
            )
    with own_groups(1) as open_group, open_group(0) as group:
        assert "codec=msgpack" in group._messenger._settings.words


def test_a_second_group_has_the_ranks_of_its_store_and_no_larger_messages():
    with StatelessProcessGroup.create(*CREATE, max_message_bytes=100) as group:
        for rank, world_size in ((0, 2), (1, 2)):
            with pytest.raises(
                ValueError,
                match=r"must be those of the store, \(0, 1\), got " rf"\({rank}, {world_size}\)",
            ):
                StatelessProcessGroup(rank, world_size, group.store, group="other")
        with pytest.raises(ValueError, match="must be at most the store's 100, got 101"):
            StatelessProcessGroup(0, 1, group.store, group="other", max_message_bytes=101)
        # The name was not used up.
        other = StatelessProcessGroup(0, 1, group.store, group="other", max_message_bytes=100)
        other.send_obj("x", 0)
        assert other.recv_obj(0) == "x"
