"""KeyboardInterrupt inside a call: no message is lost, and no number is used twice."""

import pytest
from interruption import Interruption
from stateless_ranks import SECRET, own_groups, run_threads, torch_groups

from fastvideo_comm import stateless
from fastvideo_comm.object_channel import (
    aes_gcm,
    codec,
    message_seal,
    messenger,
    outbox,
    store_client,
    store_link,
    store_link_pair,
    torch_transport,
    transport,
)

MODULES = (
    stateless,
    messenger,
    outbox,
    transport,
    torch_transport,
    message_seal,
    store_client,
    store_link_pair,
    store_link,
)
FILES = {module.__file__ for module in MODULES}
# From the count of the number to the frame in the queue of the connection.
SENDING = ("_send", "send", "note", "seal", "ask", "_ask_now", "queue")
# From the answer to the object.
RECEIVING_FILES = {
    module.__file__ for module in (transport, torch_transport, message_seal, aes_gcm, codec)
}
RECEIVING = ("receive", "ask_once", "_open", "open", "_opened", "decrypt", "_fetch", "decode")


# Larger than what is joined before it is sent, and than what is decrypted into new memory.
BODY = bytes(range(256)) * 400


def interrupted(at, call, *arguments, files=FILES, functions=SENDING):
    """Makes a call that is interrupted at a point: its result, and whether there is the point."""
    result = None
    with Interruption(at, files, functions) as interruption:
        try:
            result = call(*arguments)
        except KeyboardInterrupt:
            assert interruption.fired
    return result, interruption.fired


def sends(group):
    """Rank 1 is interrupted in one send after the other, and goes on after each."""
    if group.rank == 1:
        at, fired = 0, True
        while fired:
            body = bytearray(BODY)
            _, fired = interrupted(at, group.send_obj, ["interrupted", at, body], 0)
            body[:] = bytes(len(body))  # what the call was given is the caller's again
            group.send_obj(["whole", at, b""], 0)
            at += 1
        group.send_obj(["end", at, b""], 0)
        return at
    received = []
    while not received or received[-1][0] != "end":
        received.append(group.recv_obj(1))
    end = received[-1][1]
    assert [number for word, number, _ in received if word == "whole"] == list(range(end))
    # One that was interrupted came whole or not at all, once and in its place.
    order = [(number, word) for word, number, _ in received]
    assert order == sorted(set(order))
    assert all(body == BODY for word, _, body in received if word == "interrupted")
    return end


def broadcasts(group):
    if group.rank == 1:
        at = 0
        while interrupted(at, group.broadcast_obj, ["interrupted", at], 1)[1]:
            group.broadcast_obj(["whole", at], 1)
            at += 1
        group.broadcast_obj(["end", at], 1)
        return at
    received = []
    while not received or received[-1][0] != "end":
        received.append(group.broadcast_obj(None, 1))
    end = received[-1][1]
    assert [number for word, number in received if word == "whole"] == list(range(end))
    return end


def gathers(group):
    """A round that was interrupted is finished by the same call made again."""
    at, fired = 0, True
    while fired:
        wanted = [["of", rank, at] for rank in range(2)]
        if group.rank == 1:
            result, fired = interrupted(at, group.all_gather_obj, wanted[1])
            assert (result or group.all_gather_obj(wanted[1])) == wanted
        else:
            assert group.all_gather_obj(wanted[0]) == wanted
        fired = group.broadcast_obj(fired if group.rank == 1 else None, 1)
        at += 1
    return at


def receives(group):
    """Rank 1 is interrupted in one receive after the other, of messages small and large."""
    at, fired = 0, True
    while fired:
        for size in (1, len(BODY)):
            if group.rank == 0:
                group.send_obj([at, BODY[:size]], 1)
                continue
            call = (at, group.recv_obj, 0)
            result, fired = interrupted(*call, files=RECEIVING_FILES, functions=RECEIVING)
            assert (result or group.recv_obj(0)) == [at, BODY[:size]]
        fired = group.broadcast_obj(fired if group.rank == 1 else None, 1)
        at += 1
    return at


@pytest.mark.parametrize("secret", [None, SECRET])
def test_an_interrupt_while_an_object_is_received_loses_nothing(secret):
    with own_groups(2, secret=secret, timeout=10.0) as open_group:
        ranks = run_threads(2, receives, open_group)
    assert ranks[0] == ranks[1] > 10


@pytest.mark.parametrize("program", [sends, broadcasts, gathers])
@pytest.mark.parametrize("secret", [None, SECRET])
def test_an_interrupt_while_an_object_is_sent_leaves_no_hole(program, secret):
    with own_groups(2, secret=secret, timeout=10.0) as open_group:
        ranks = run_threads(2, program, open_group)
    assert ranks[0] == ranks[1] > 10


@pytest.mark.parametrize("program", [sends, broadcasts, gathers, receives])
def test_the_same_on_a_store_of_torch(program, tmp_path):
    with torch_groups("hash", 2, tmp_path, timeout=10.0) as open_group:
        ranks = run_threads(2, program, open_group)
    assert ranks[0] == ranks[1] > 10
