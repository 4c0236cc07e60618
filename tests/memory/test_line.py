"""The lines between ranks: who may connect, what arrives, and that no descriptor is left."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import memory_worlds as worlds
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from line_ends import heard, linked
from memory_worlds import ask_all, exchange, in_processes, in_threads, num_descriptors

from fastvideo_comm.errors import CollectiveError
from fastvideo_comm.memory import introduction, line, memfd
from fastvideo_comm.memory.host import HostMemory
from fastvideo_comm.memory.line import Line, Record


@pytest.fixture
def pair() -> Iterator[tuple[Line, Line]]:
    with linked() as lines:
        yield lines


RECORDS = st.builds(
    Record,
    kind=st.sampled_from([line.POST, line.DONE, line.FAIL, line.DETAIL]),
    is_pair=st.integers(0, 1),
    failure=st.integers(0, 255),
    origin=st.integers(0, 2**16 - 1),
    flag=st.just(0),
    segment=st.integers(0, 2**16 - 1),
    piece=st.just(0),
    number=st.integers(0, 2**64 - 1),
    offset=st.integers(0, 2**64 - 1),
    digest=st.binary(min_size=16, max_size=16),
)


@given(st.lists(st.tuples(RECORDS, st.integers(0, 20_000)), max_size=12))
def test_records_and_texts_arrive_whole_and_in_order(messages):
    texts = [bytes([index]) * length for index, (_, length) in enumerate(messages)]
    with linked() as (here, there):
        for (record, _), text in zip(messages, texts, strict=True):
            here.send_all(line.with_text(record, text)) if text else here.send(record.pack())
        got = heard(there)
    assert [text for _, text, _ in got] == texts
    for (record, _), (same, _, _) in zip(messages, got, strict=True):
        assert same._replace(flag=0, piece=0) == record


def test_the_short_records_are_those_of_the_long_form():
    place = Record(line.POST, 1, flag=1, segment=3, number=9, offset=640, digest=b"d" * 16)
    assert line.pack_post(1, 9, b"d" * 16, (3, 640)) == place.pack()
    assert (
        line.pack_post(0, 9, b"d" * 16, None)
        == Record(line.POST, number=9, digest=b"d" * 16).pack()
    )
    assert line.pack_done(1, 7) == Record(line.DONE, 1, number=7).pack()


def test_what_the_socket_does_not_take_waits_in_a_queue(pair):
    here, there = pair
    for number in range(3000):
        here.send(line.pack_done(0, number))
    assert here.is_blocked
    numbers = []
    while len(numbers) < 3000:
        there.receive()
        while (message := there.first()) is not None:
            numbers.append(message.record.number)
            there.handled(message)
        here.flush()
    assert numbers == list(range(3000))
    assert not here.is_blocked


def test_a_record_does_not_overtake_those_in_the_queue(pair):
    here, there = pair
    sent = 0
    while not here.is_blocked:
        here.send(line.pack_done(0, sent))
        sent += 1
    numbers = [record.number for record, _, _ in heard(there)]  # the socket has room again
    here.send(line.pack_done(0, sent))
    numbers += [record.number for record, _, _ in heard(there)]
    assert numbers == list(range(sent + 1))


def test_a_message_that_was_not_handled_is_there_again(pair):
    here, there = pair
    here.send(line.pack_done(0, 1))
    here.send(line.pack_done(0, 2))
    there.receive()
    assert there.first() == there.first()
    there.handled(there.first())
    there.receive()
    assert there.first().record.number == 2


def test_what_was_sent_is_read_though_the_other_closed_with_messages_unread(pair):
    here, there = pair
    there.send(line.pack_done(0, 1))
    here.send(line.pack_done(0, 2))
    here.close()
    there.receive()
    assert not there.is_lost
    assert [record.number for record, _, _ in heard(there)] == [2]
    assert there.is_lost
    there.send(line.pack_done(0, 3))
    assert not there.is_blocked


def test_descriptors_travel_and_those_that_nobody_took_are_closed(pair):
    before = num_descriptors()
    here, there = pair
    descriptor = memfd.create(memfd.GRANULE)
    for number in range(40):
        here.send_all([Record(line.SEGMENT, segment=number).pack()], descriptor)
    os.close(descriptor)
    for number in range(40):
        there.receive()
        if number < 20:
            message = there.first()
            assert message.record.segment == number
            assert os.fstat(message.descriptor).st_size == memfd.GRANULE
            there.handled(message)
            os.close(message.descriptor)
    there.close()
    here.close()
    assert num_descriptors() == before - 2


def test_a_mapped_segment_of_another_rank_has_the_descriptor_of_its_map_alone():
    def job(memory: HostMemory) -> None:
        memory.pool._segment_bytes = 1 << 16
        exchange(memory)
        before, segments = num_descriptors(), len(memory.pool.segments)
        held = [exchange(memory, size=20_000 << call) for call in range(3)]
        new = len(memory.pool.segments) - segments
        assert new >= 2
        # Python's map keeps one. A rank needs another to give back pages of its own segments.
        assert num_descriptors() - before == (2 + 1) * new
        held.clear()

    in_processes(2, job)


class FullSocket:
    """A socket that takes nothing for a while."""

    def __init__(self, link: Any, seconds: float) -> None:
        self._link, self._until = link, time.monotonic() + seconds

    def send(self, *arguments: Any) -> int:
        if time.monotonic() < self._until:
            raise BlockingIOError
        return self._link.send(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)


def test_what_a_full_socket_did_not_take_is_sent_though_nobody_waits_any_more():
    is_done = threading.Event()

    def job(memory: HostMemory) -> None:
        def copy(part: torch.Tensor, number: int, target: int) -> None:
            part.fill_(number)
            if memory.rank == 1 and target == 0:  # DONE comes next
                to = memory._engine._lines[0]
                to._link = FullSocket(to._link, 0.2)

        exchange(memory)
        ask = ask_all(memory, 1, copy=copy)
        memory.start(ask).wait()
        if memory.rank == 0:
            is_done.set()
        else:  # this rank makes no other call
            assert is_done.wait(20)

    in_threads(2, job)


# Who may connect


def refusals(world_size: int, disturb: Callable[[int], Any], **options: Any) -> list[str]:
    """What each rank hears after `disturb(rank)`; nothing may be left open."""

    def connect(rank: int, *arguments: Any, **keywords: Any) -> tuple[HostMemory | None, str]:
        before = num_descriptors()
        disturb(rank)
        memory, refusal = HostMemory.connect(rank, *arguments, **keywords, **options)
        if memory is not None:
            exchange(memory)
            memory.close()
        del memory
        assert num_descriptors() == before
        return None, refusal

    answers = in_processes(world_size, lambda answer: answer[1], connect=connect)
    assert len(set(answers)) == 1  # all ranks say the same
    return answers


def refuse(*_: object, **__: object) -> Any:
    raise OSError("refused")


DISTURBANCES: dict[str, tuple[Callable[[], Any], str]] = {
    "no memfd": (
        lambda: delattr(os, "memfd_create"),
        "rank 1: it cannot share memory: this system has no memfd",
    ),
    "no room": (
        lambda: setattr(os, "ftruncate", refuse),
        "rank 1: it cannot share memory: refused",
    ),
    "no eventfd": (
        lambda: delattr(os, "eventfd"),
        "rank 1: it cannot share memory: this system has no eventfd",
    ),
    "no sockets": (
        lambda: setattr(socket.socket, "bind", refuse),
        "rank 1: it cannot share memory: refused",
    ),
    "another network namespace": (
        lambda: setattr(introduction, "_address", lambda name: b"\0elsewhere" + name),
        "cannot reach rank",
    ),
    "another user": (
        lambda: setattr(os, "geteuid", lambda: 12345),
        "the process there is of uid",
    ),
    "another token": (
        lambda: setattr(introduction, "_HELLO", WrongHello()),
        "nobody who is rank",
    ),
}


class WrongHello:
    size = introduction._HELLO.size

    def pack(self, rank: int, token: bytes) -> bytes:
        return struct.pack("<I16s", rank, bytes(16))

    def unpack(self, data: bytes) -> tuple[int, bytes]:
        return struct.unpack("<I16s", data)


@pytest.mark.parametrize("how", DISTURBANCES)
def test_where_one_rank_cannot_all_refuse_and_say_who_and_why(how):
    disturb, reason = DISTURBANCES[how]
    answers = refusals(3, lambda rank: disturb() if rank == 1 else None)
    assert reason in answers[0]


def test_a_rank_that_does_not_want_to_is_named():
    def connect(rank: int, *arguments: Any, **options: Any) -> Any:
        return HostMemory.connect(rank, *arguments, enabled=rank != 2, **options)

    answers = in_processes(3, lambda answer: answer, connect=connect)
    assert answers == [(None, "rank 2: it is switched off there")] * 3


def test_a_stranger_who_connects_first_is_turned_away(monkeypatch):
    """Strangers know the name, which every process sees; they do not know the secret."""
    real = introduction._listen
    strangers = []

    def listen(name: bytes, world_size: int) -> socket.socket:
        listener = real(name, world_size)
        for hello in (b"", b"x" * 20, introduction._HELLO.pack(1, bytes(16)), b"y" * 500):
            stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stranger.connect(introduction._address(name))
            if hello:
                stranger.send(hello)
            strangers.append(stranger)
        return listener

    monkeypatch.setattr(introduction, "_listen", listen)

    def job(memory: HostMemory) -> None:
        for call in range(5):
            exchange(memory, call)

    in_processes(3, job)
    in_threads(2, job)
    assert len(strangers) == 8  # of the two threads; the processes have had their own
    for stranger in strangers:
        stranger.settimeout(5)
        with contextlib.suppress(ConnectionResetError):  # its hello was not even read
            assert stranger.recv(100) == b""
        stranger.close()


def test_the_size_of_a_segment_cannot_be_changed_by_another():
    descriptor = memfd.create(memfd.GRANULE)
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 0)
    os.close(descriptor)
    with pytest.raises(OSError, match="the memfd is closed"):
        memfd.Segment(-1, memfd.GRANULE)


# Descriptors


@pytest.mark.parametrize("run", [in_processes, in_threads])
def test_growth_and_close_leave_no_descriptor_open(run):
    before = num_descriptors()

    def job(memory: HostMemory) -> None:
        # More than one segment: the second holds what the first has no room for.
        memory.pool._segment_bytes = 1 << 20
        held = [memory.allocate([((1 << 20,), torch.uint8)]) for _ in range(3)]
        assert len(memory.pool.segments) > 1
        for call in range(4):
            held.append(exchange(memory, call, size=1 << 16))

    run(3, job)
    assert num_descriptors() == before


def test_a_process_that_has_closed_its_memory_has_the_descriptors_of_before():
    def connect(*arguments: Any, **options: Any) -> None:
        before = num_descriptors()
        for _ in range(3):
            memory, _ = HostMemory.connect(*arguments, **options)
            assert memory is not None
            memory.pool._segment_bytes = 1 << 20
            held = [memory.allocate([((1 << 20,), torch.uint8)]) for _ in range(3)]
            exchange(memory, 1, size=1 << 16)
            memory.start(worlds.ask_all(memory), background=True).wait()
            memory.close()
            del held, memory
            assert num_descriptors() == before
            assert threading.active_count() == 1

    in_processes(2, lambda nothing: None, connect=connect)


def test_a_descriptor_that_did_not_fit_is_named():
    def job(memory: HostMemory) -> None:
        old = resource.getrlimit(resource.RLIMIT_NOFILE)
        if memory.rank == 1:
            ask = worlds.ask_all(memory)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, old[1]))  # no number below is free
        else:
            ask = worlds.ask_all(memory)
        text = r"rank 1 cannot map segment 0 of rank 0: .* too many open files \(RLIMIT_NOFILE\)"
        with pytest.raises(CollectiveError, match=text):
            memory.start(ask).wait()

    in_processes(2, job)
