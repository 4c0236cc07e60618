"""The conformance suite on every store, and what callers of upstream's class and of vLLM's do."""

import ctypes
import dataclasses
import doctest
import inspect
import threading
from datetime import timedelta

import pytest
import stateless_conformance
from stateless_conformance import CHECKS, all_checks
from stateless_ranks import (
    SECRET,
    own_groups,
    rank_processes,
    run_own,
    run_threads,
    torch_groups,
)

import fastvideo_comm.stateless
from fastvideo_comm.errors import AuthenticationError, JoinError
from fastvideo_comm.object_channel.pickle_codec import PickleCodec
from fastvideo_comm.object_channel.settings import SECRET_VARIABLE
from fastvideo_comm.stateless import StatelessProcessGroup

STORES = ["own", "own-secret", "tcp-secret", "file", "hash"]


@pytest.fixture(params=STORES)
def groups(request, tmp_path):
    kind, _, protected = request.param.partition("-")
    options = {"secret": SECRET if protected else None}
    if kind == "own":
        context = own_groups(3, **options)
    else:
        context = torch_groups(kind, 3, tmp_path, **options)
    with context as open_group:
        yield open_group


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_in_threads(groups, check):
    run_threads(3, check, groups)


@pytest.mark.parametrize("kind", ["own-secret", "tcp", "file"])
def test_in_processes(kind, tmp_path):
    kind, _, protected = kind.partition("-")
    store = {"own": None, "tcp": "tcp", "file": str(tmp_path / "store")}[kind]
    options = {"secret": SECRET if protected else None}
    with rank_processes(3, all_checks, store=store, **options) as ranks:
        assert [rank.outcome(60) for rank in ranks] == [("done", None)] * 3
        if store == "tcp":
            for rank in ranks:
                rank.pipe.send("bye")


def test_upstream_signatures_stay():
    create = inspect.signature(StatelessProcessGroup.create)
    assert list(create.parameters)[:5] == [
        "host", "port", "rank", "world_size", "data_expiration_seconds",
    ]  # fmt: skip
    assert create.parameters["data_expiration_seconds"].default == 3600
    positional = {
        name: [
            parameter.name
            for parameter in inspect.signature(
                getattr(StatelessProcessGroup, name)
            ).parameters.values()
            if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
        ]
        for name in ("send_obj", "recv_obj", "broadcast_obj", "all_gather_obj", "barrier")
    }
    assert positional == {
        "send_obj": ["self", "obj", "dst"],
        "recv_obj": ["self", "src"],
        "broadcast_obj": ["self", "obj", "src"],
        "all_gather_obj": ["self", "obj"],
        "barrier": ["self"],
    }
    names = [field.name for field in dataclasses.fields(StatelessProcessGroup) if not field.kw_only]
    assert names == [
        "rank", "world_size", "store", "data_expiration_seconds", "send_dst_counter",
        "recv_src_counter", "broadcast_send_counter", "broadcast_recv_src_counter", "entries",
    ]  # fmt: skip


def test_counters_and_entries_are_readable():
    def program(group):
        group.send_obj("a", 1 - group.rank)
        group.send_obj("b", 1 - group.rank)
        group.recv_obj(1 - group.rank)
        group.broadcast_obj("c", 0)
        group.barrier()
        return (
            group.send_dst_counter[1 - group.rank],
            group.recv_src_counter[1 - group.rank],
            group.broadcast_send_counter,
            group.broadcast_recv_src_counter[0],
            [key for key, _time in group.entries],
        )

    assert run_own(2, program) == [
        (2, 1, 1, 0, ["send/0/1/0", "send/0/1/1", "broadcast/0/-1/0"]),
        (2, 1, 0, 1, ["send/1/0/0", "send/1/0/1"]),
    ]


def test_entries_of_read_messages_do_not_pile_up():
    def program(group):
        for number in range(2500):
            group.send_obj(number, group.rank)
            group.recv_obj(group.rank)
        return len(group.entries)

    assert run_own(1, program)[0] < 1100


@pytest.mark.parametrize("num_senders", [2, 8])
def test_many_senders_to_one_receiver_lose_and_double_nothing(num_senders):
    count = 1000

    def program(group):
        if group.rank:
            for number in range(count):
                group.send_obj((group.rank, number), 0)
            return None
        received = {src: [] for src in range(1, group.world_size)}
        for _ in range(count):
            for src in received:
                received[src].append(group.recv_obj(src))
        return received

    received = run_own(num_senders + 1, program)[0]
    assert received == {
        src: [(src, number) for number in range(count)] for src in range(1, num_senders + 1)
    }


@pytest.mark.slow
@pytest.mark.parametrize("num_senders", range(2, 9))
def test_two_to_eight_senders_of_a_thousand_messages(num_senders):
    def program(group):
        if group.rank:
            for number in range(1000):
                group.send_obj((group.rank, number), 0)
        else:
            for number in range(1000):
                for src in range(1, group.world_size):
                    assert group.recv_obj(src) == (src, number)

    run_own(num_senders + 1, program, timeout=120)


def test_eight_groups_at_once_in_one_process():
    def program(group):
        for number in range(20):
            assert group.all_gather_obj((group.group, number)) == [(group.group, number)] * 2
        return group.group

    results = {}

    def run(name):
        results[name] = run_own(2, program, group=name)

    threads = [threading.Thread(target=run, args=(f"group-{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {f"group-{i}": [f"group-{i}"] * 2 for i in range(8)}


def test_two_threads_may_use_one_group():
    def program(group):
        failures = []

        def run(kind):
            try:
                for number in range(100):
                    if kind == "broadcast":
                        group.broadcast_obj(number, group.rank)
                    else:
                        group.send_obj(number, group.rank)
                        assert group.recv_obj(group.rank) == number
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=run, args=(kind,)) for kind in ("broadcast", "send")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return failures

    assert run_own(1, program) == [[]]


class NcclUniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_byte * 128)]


def test_a_unique_id_is_broadcast_in_two_groups_over_the_same_ranks_in_threads():
    def program(group):
        other = StatelessProcessGroup(
            group.rank, group.world_size, group.store, secret=SECRET, group="second"
        )
        for member in (group, other):
            member.register_type(
                NcclUniqueId, to_fields=bytes, from_fields=NcclUniqueId.from_buffer_copy
            )
        mine = NcclUniqueId()
        mine.internal[:] = [7] * 128
        obj = mine if group.rank == 0 else None
        assert bytes(group.broadcast_obj(obj, 0)) == bytes([7] * 128)
        as_bytes = bytes(mine.internal) if group.rank == 0 else None
        return other.broadcast_obj(as_bytes, 0)

    assert run_own(4, program, secret=SECRET) == [bytes([7] * 128)] * 4


def test_the_secret_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv(SECRET_VARIABLE, "from the environment")
    with own_groups(2) as open_group:
        opened = {}

        def join():
            opened[0] = open_group(0)

        thread = threading.Thread(target=join)
        thread.start()
        group = open_group(1)
        thread.join()
    assert group.secret == b"from the environment"
    assert b"environment" not in repr(group).encode()
    assert "environment" not in repr(group)
    group.close()
    opened[0].close()


class CountingCodec(PickleCodec):
    """Pickle, of a class of the user's own."""

    num_decoded = 0

    def decode(self, data):
        self.num_decoded += 1
        return super().decode(data)


@pytest.mark.parametrize("codec", ["pickle", PickleCodec(), CountingCodec()])
def test_pickle_needs_a_secret_and_works_with_one(codec):
    with pytest.raises(ValueError, match="codec must not be 'pickle' without a secret"):
        StatelessProcessGroup.create("127.0.0.1", 0, 0, 1, codec=codec)
    program = lambda group: group.all_gather_obj(range(group.rank))  # noqa: E731
    assert run_own(2, program, codec=codec, secret=SECRET) == [[range(0), range(1)]] * 2
    assert getattr(codec, "num_decoded", 2) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 2}, r"rank must be a rank from 0 to 1, got 2"),
        ({"rank": -1}, r"rank must be a rank from 0 to 1, got -1"),
        ({"world_size": 0}, r"world_size must be at least 1, got 0"),
        ({"port": 70000}, r"port must be from 1 to 65535, got 70000"),
        ({"port": 0}, r"port must be from 1 to 65535, got 0"),
        ({"world_size": 1 << 20}, r"world_size must be at most 1048575, got 1048576"),
        ({"timeout": 0}, r"timeout must be a positive number of seconds, got 0"),
        ({"timeout": float("inf")}, r"timeout must be a positive number of seconds, got inf"),
        ({"secret": b""}, r"secret must not be empty"),
        ({"group": "a/b"}, r"group must be 1 to 100 of"),
        ({"max_message_bytes": 0}, r"max_message_bytes must be at least 1, got 0"),
        ({"heartbeat_interval": 0.5}, r"heartbeat_interval must be whole seconds"),
        ({"heartbeat_limit": 0}, r"heartbeat_limit must be a number from 1 to 100, got 0"),
        ({"codec": "json"}, r"codec must be 'msgpack', 'pickle' or an object, got 'json'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    given = {"host": "127.0.0.1", "port": 1, "rank": 0, "world_size": 2, **arguments}
    with pytest.raises(ValueError, match=message):
        StatelessProcessGroup.create(**given)


def test_timeouts_may_be_timedeltas_and_are_in_the_error():
    def program(group):
        with pytest.raises(TimeoutError) as caught:
            group.recv_obj(0, timeout=timedelta(milliseconds=100))
        return str(caught.value), caught.value.peers

    assert run_own(1, program, group="here") == [
        (
            "recv_obj in group 'here' on rank 0 of 1: timed out; "
            "waited 0.1 of 0.1 s in message 0 for rank(s) [0]",
            (0,),
        )
    ]


def test_a_barrier_error_names_the_ranks_that_did_not_come():
    def program(group):
        group.barrier()
        if group.rank in (0, 2):
            with pytest.raises(TimeoutError, match=r"barrier .* for rank\(s\) \[1, 3\]"):
                group.barrier(timeout=0.3)
        else:
            threading.Event().wait(0.8)
        group.barrier()

    run_own(4, program)


def test_a_rank_taken_or_other_settings_in_a_torch_store_are_join_errors(tmp_path):
    with torch_groups("hash", 2, tmp_path) as open_group:
        group = open_group(0)
        with pytest.raises(JoinError, match="group 'default' on rank 0 of 2 is already taken"):
            open_group(0)
        with pytest.raises(JoinError, match=r"rank 1 has world_size=3 .* had world_size=2"):
            StatelessProcessGroup(1, 3, group.store)


def test_a_third_party_that_writes_into_a_torch_store_is_not_believed(tmp_path):
    with torch_groups("hash", 2, tmp_path, secret=SECRET) as open_group:
        sender, receiver = open_group(0), open_group(1)
        store = sender.store
        sender.send_obj("true", 1)
        sealed = store.get("fastvideo_comm/default/send/0/1/0")
        assert receiver.recv_obj(0) == "true"
        forged = [
            sealed,  # a replay: the right bytes, one number later
            b"\0" + bytes(40),
            b"\1" + (1 << 60).to_bytes(8, "little"),
            b"\2",
            b"",
        ]
        for value in forged:
            store.set("fastvideo_comm/default/send/0/1/1", value)
            with pytest.raises(AuthenticationError, match="recv_obj in group"):
                receiver.recv_obj(0, timeout=1)
        store.set("fastvideo_comm/default/expiry/0/1/1", bytes(40))
        store.delete_key("fastvideo_comm/default/send/0/1/1")
        with pytest.raises(AuthenticationError, match="the seal of expiry/0/1/1"):
            receiver.recv_obj(0, timeout=1)
        store.delete_key("fastvideo_comm/default/expiry/0/1/1")
        sender.send_obj("true again", 1)
        assert receiver.recv_obj(0) == "true again"


def test_docstring_examples_run():
    failed, attempted = doctest.testmod(fastvideo_comm.stateless)
    assert attempted
    assert not failed


def test_every_check_is_in_the_list():
    functions = [
        value
        for name, value in vars(stateless_conformance).items()
        if inspect.isfunction(value) and value.__module__ == stateless_conformance.__name__
    ]
    assert set(functions) - {all_checks} == set(CHECKS)
