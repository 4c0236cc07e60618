"""Values in the own store, somebody on the way who keeps earlier ones, and the largest object."""

import pytest
from stateless_proxy import Proxy
from stateless_ranks import SECRET, run_own
from stateless_strangers import forming_group

from fastvideo_comm.errors import AuthenticationError, PeerLostError
from fastvideo_comm.object_channel.codec import ObjectCodec
from fastvideo_comm.object_channel.settings import DESCRIPTION_BYTES
from fastvideo_comm.object_channel.store_messages import pack_origin
from fastvideo_comm.stateless import StatelessProcessGroup


class Recorder:
    """Keeps the sealed value of a frame to the store; puts it in the place of a later one."""

    def __init__(self, size):
        self.size = size
        self.kept = None
        self.replaces_to_store = self.replaces_from_store = False

    def alter(self, to_store, data):
        if self.kept is None:
            self.kept = data[-self.size :]  # of the first frame after the join
        elif self.replaces_to_store if to_store else self.replaces_from_store:
            return data[: -self.size] + self.kept
        return data


def through_a_recorder(program, encryption):
    with forming_group(secret=SECRET, encryption=encryption) as forming:
        with Proxy(forming.port) as proxy:
            group = StatelessProcessGroup.create(
                "127.0.0.1", proxy.port, 1, 2, timeout=20, secret=SECRET, encryption=encryption
            )
            forming.finish()
            recorder = Recorder(group.store.seal("any", encryption).overhead + len(b"pay 100"))
            proxy.alter = recorder.alter
            program(recorder, group.store, forming.groups[0].store)
            group.close()


@pytest.mark.parametrize("encryption", ["auto", "off"])
def test_an_earlier_value_in_the_place_of_a_later_one_is_an_authentication_error(encryption):
    def program(recorder, store, _other):
        store.set("order", b"pay 100")
        store.set("order", b"pay 999")
        assert store.get("order") == b"pay 999"
        recorder.replaces_from_store = True
        with pytest.raises(AuthenticationError, match=r"must carry the seal of value/1/-1/1"):
            store.get("order")
        recorder.replaces_from_store = False
        assert store.get("order") == b"pay 999"
        store.set("another order", b"pay 100")
        recorder.replaces_from_store = True
        with pytest.raises(AuthenticationError, match=r"must carry the seal of value/1/-1/2"):
            store.get("another order")

    through_a_recorder(program, encryption)


@pytest.mark.parametrize("encryption", ["auto", "off"])
def test_an_earlier_value_that_is_put_in_on_the_way_to_the_store_is_found_by_its_readers(
    encryption,
):
    def program(recorder, store, other):
        store.set("order", b"pay 100")
        recorder.replaces_to_store = True
        store.set("order", b"pay 999")
        recorder.replaces_to_store = False
        with pytest.raises(AuthenticationError, match=r"must carry the seal of value/1/-1/1"):
            other.get("order")

    through_a_recorder(program, encryption)


@pytest.mark.parametrize("secret", [None, SECRET])
def test_values_of_several_ranks_under_one_key_replace_each_other(secret):
    def program(group):
        store = group.store
        for number in range(6):
            group.barrier()
            if number % 3 == group.rank:
                store.set("key", f"{group.rank} set {number}")
            group.barrier()
            assert store.get("key") == f"{number % 3} set {number}".encode()

    run_own(3, program, secret=secret)


@pytest.mark.parametrize("secret", [None, SECRET])
def test_a_sum_can_be_read_as_a_value(secret):
    def program(group):
        assert group.store.add("sum", 2**62) == 2**62
        assert group.store.add("sum", 2**62) == 2**63
        assert group.store.get("sum") == b"9223372036854775808"

    run_own(1, program, secret=secret)


@pytest.mark.parametrize("origin", [b"", b"short", pack_origin(-2, 0), pack_origin(0, -1)])
def test_a_store_that_answers_nonsense_is_not_believed(origin):
    def program(group):
        group.store.set("key", "value")
        group.store._server._mailbox._values[b"key"] = (origin, b"body")
        with pytest.raises(PeerLostError, match="it broke the protocol: the origin of a value"):
            group.store.get("key")

    run_own(1, program, secret=SECRET)


def test_a_value_under_the_key_of_another_is_an_authentication_error():
    def program(group):
        group.store.set("key", "value")
        values = group.store._server._mailbox._values
        values[b"another key"] = values[b"key"]
        with pytest.raises(AuthenticationError, match=r"must carry the seal of value/0/-1/0"):
            group.store.get("another key")
        assert group.store.get("key") == b"value"

    run_own(1, program, secret=SECRET)


def test_values_of_two_ranks_and_numbers_of_add_are_told_apart():
    def program(group):
        other = 1 - group.rank
        for number in range(3):
            group.store.set(f"{group.rank}/{number}", f"{group.rank} {number}")
        group.store.add("sum", group.rank + 1)
        group.barrier()
        assert group.store.get("sum") == b"3"
        assert [group.store.get(f"{other}/{n}") for n in range(3)] == [
            f"{other} {n}".encode() for n in range(3)
        ]
        group.barrier()
        group.store.set("shared", f"of {group.rank}")
        group.barrier()
        return group.store.get("shared")

    values = run_own(2, program, secret=SECRET)
    assert values[0] == values[1]
    assert values[0] in (b"of 0", b"of 1")


@pytest.mark.parametrize(
    "options", [{}, {"secret": SECRET}, {"secret": SECRET, "encryption": "off"}]
)
def test_an_object_of_the_largest_size_arrives_and_a_larger_one_is_refused(options):
    limit = 200_000
    codec = ObjectCodec()

    def encoded(num_bytes):
        return sum(map(len, codec.encode_parts(bytes(num_bytes))))

    # What a message says of itself beside the object is not counted.
    largest = limit + DESCRIPTION_BYTES
    (num_bytes,) = [n for n in range(limit, largest) if encoded(n) == largest][-1:]

    def program(group):
        if group.rank == 0:
            group.send_obj(bytes(num_bytes), 1)
            with pytest.raises(ValueError, match=f"max_message_bytes={limit} bytes, got"):
                group.send_obj(bytes(num_bytes + 1), 1)
            group.send_obj("next", 1)
        else:
            assert group.recv_obj(0) == bytes(num_bytes)
            assert group.recv_obj(0) == "next"

    run_own(2, program, max_message_bytes=limit, **options)
