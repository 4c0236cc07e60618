"""What ranks write down of their calls, how it is compared, and who is dead."""

from __future__ import annotations

import datetime
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastvideo_comm.diagnosis import board
from fastvideo_comm.diagnosis.board import (
    AbsentError,
    Board,
    _start,
    group_timeout,
    own_process,
    process_state,
)
from fastvideo_comm.diagnosis.record import Record, describe, table

X = torch.zeros(2, 3, 6, 4)


def test_records_are_removed_from_the_store():
    store = dist.HashStore()
    boards = [Board(store, rank, 2, 1) for rank in range(2)]

    def calls(rank: int) -> None:
        for number in range(50):
            boards[rank].put(str(number), b"{}")
            boards[rank].collect(str(number), range(2), 10)

    threads = [threading.Thread(target=calls, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.num_keys() <= 2 * (1 + 2)  # process, the last records


def test_the_number_of_dims_from_the_end_is_the_one_from_the_front():
    assert describe("op", X, (-1, None)) == describe("op", X, (3, dist.ReduceOp.SUM))
    assert describe("op", X, (dist.ReduceOp.MAX,)).arguments == "max"
    record = describe("op", X, (1,), uneven_dim=1)
    assert Record.decode(record.encode()) == record
    several = describe("op", (X, X[0].double()), ())
    assert (several.shape, several.dtype) == ("[2, 3, 6, 4] [3, 6, 4]", "float32 float64")
    one, other = (describe("op", [X, y, X.double()], ()) for y in (X, X.double()))
    assert one.dtype == "float32 float32 float64"
    assert other.dtype == "float32 float64 float64"
    assert describe("op", [X, X], ()).dtype == "float32"
    assert str(record) == "op [2, *, 6, 4] float32 contiguous 1"
    assert table({0: record, 1: record}, strict=True) is None
    leaf = X.clone().requires_grad_()
    assert describe("op", leaf, ()).requires_grad
    assert describe("op", (X, leaf), ()).requires_grad  # the backward is one for all tensors
    assert not describe("op", (X, X), ()).requires_grad
    with torch.no_grad():  # there will be no backward
        assert not describe("op", leaf, ()).requires_grad
    sizes = describe("op", X, (1,), gather_sizes=((1, 2), None), grad=None)
    assert sizes.arguments == "1, gather_sizes=[[1, 2], None]"


def test_half_against_half_marks_everyone_and_a_majority_marks_the_others():
    a, b = Record("all_gather", "[2]"), Record("all_gather", "[3]")
    assert [
        line.endswith("<- shape") for line in table({0: a, 1: b}, strict=False).splitlines()
    ] == [*(False, True, True)]
    lines = table({0: a, 1: b, 2: b}, strict=False).splitlines()
    assert [line.endswith("<- shape") for line in lines] == [False, True, False, False]


def test_who_had_bad_arguments_is_marked_though_most_had_them():
    bad, good = Record("all_gather", error="ValueError: dim"), Record("all_gather", "[2]")
    lines = table({0: bad, 1: good, 2: bad}, strict=False).splitlines()[1:]
    assert [line.partition("<- ")[2] for line in lines] == ["bad arguments", "", "bad arguments"]


def test_a_send_and_its_recv_differ_in_what_they_are_called_alone():
    send, recv = (Record(op, "[2]", "int8", arguments="0 -> 1") for op in ("send", "recv"))
    assert table({0: send, 1: recv}, strict=False) is None
    other = Record("recv", "[3]", "int8", arguments="0 -> 1")
    assert table({0: send, 1: other}, strict=False).count("<- shape\n") == 1
    assert table({0: recv, 1: recv}, strict=False).count("needs the other of send and recv") == 2
    assert table({0: Record("barrier"), 1: recv}, strict=False).count("<- op, shape") == 2


def test_processes_elsewhere_are_not_said_to_be_dead():
    here = own_process()
    assert process_state(here) == ""
    assert process_state({**here, "start": 1}) == "is dead"
    assert process_state({**here, "start": 1, "space": "another host"}) == ""
    assert process_state({**here, "pid": 2**22 + 1}) == "is dead"


@pytest.mark.parametrize(
    ("signal_number", "state"), [(signal.SIGKILL, "is dead"), (signal.SIGSTOP, "is stopped")]
)
def test_a_child_that_was_not_waited_for_is_dead_and_a_stopped_one_is_not(signal_number, state):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    try:
        process = {**own_process(), "pid": child.pid, "start": _start(child.pid)}
        assert process_state(process) == ""
        os.kill(child.pid, signal_number)
        # WNOWAIT: a killed child stays a zombie.
        options = os.WSTOPPED | os.WEXITED | os.WNOWAIT
        os.waitid(os.P_PID, child.pid, options)
        assert process_state(process) == state
    finally:
        child.kill()
        child.wait()


def test_where_there_is_no_proc_nobody_is_said_to_be_dead(monkeypatch):
    monkeypatch.setattr(board, "_space", lambda: "")
    assert process_state({**own_process(), "start": 1}) == ""


def test_a_process_is_known_by_its_start_whatever_it_is_called():
    name = Path("/proc/self/comm")
    before, start = name.read_text(), _start(os.getpid())
    try:
        name.write_text("a) Z (b")
        assert _start(os.getpid()) == start
        assert process_state({**own_process(), "start": start}) == ""
    finally:
        name.write_text(before)


class Late:
    """A store in which something happens once, behind the first request of a kind."""

    def __init__(self, store: dist.Store, kind: str, action: Callable[[], None]) -> None:
        self.store, self.kind, self.actions = store, kind, [action]

    def __getattr__(self, name: str) -> Any:
        request = getattr(self.store, name)

        def requested(*arguments: Any) -> Any:
            answer = request(*arguments)
            if name == self.kind and self.actions:
                self.actions.pop()()
            return answer

        return requested


@pytest.mark.parametrize(("kind", "is_dead"), [("get", True), ("check", False)])
def test_a_record_that_came_just_before_its_rank_was_given_up_is_valid(kind, is_dead):
    """The rank has died since, or the time is over: both are looked at after the records."""
    store = dist.HashStore()
    waiting, late = (Board(store, rank, 2, 1) for rank in range(2))
    process = {**own_process(), "start": 1} if is_dead else own_process()
    store.set("fastvideo_comm/1/process/1", json.dumps(process))
    waiting.put("0", b"here")
    waiting._store = Late(store, kind, lambda: late.put("0", b"late"))  # type: ignore[assignment]
    got = waiting.collect("0", range(2), 10.0 if is_dead else 0.0)
    assert got == {0: b"here", 1: b"late"}


def test_a_rank_that_has_made_no_communicator_is_said_to_have_none():
    store = dist.HashStore()
    alone = Board(store, 0, 3, 1)
    dead = {**own_process(), "start": 1}
    store.set("fastvideo_comm/1/process/2", json.dumps(dead))
    assert alone.state_of(1) == "has not made this communicator"
    assert alone.state_of(2) == f"(process {dead['pid']} on {dead['host']}) is dead"
    with pytest.raises(AbsentError) as error:
        alone.collect("0", range(3), 10)
    assert error.value.lost
    assert list(error.value.states) == [2], "the dead one alone, at once"


def test_a_long_wait_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(board, "_LOOK_FOR_DEAD_EVERY", 0.0)
    monkeypatch.setattr(board, "_SAY_WAITING_AFTER", 0.0)
    alone = Board(dist.HashStore(), 0, 3, 1)
    with caplog.at_level(logging.WARNING, "fastvideo_comm"), pytest.raises(AbsentError):
        alone.collect("7", range(3), 0.05)
    assert [each.getMessage() for each in caplog.records] == [
        "call 7 waits for ranks [0, 1, 2]",
    ]


def test_the_timeout_is_that_of_the_backend_that_the_group_has():
    def group(kind: str) -> Any:
        options = SimpleNamespace(_timeout=datetime.timedelta(minutes=2, milliseconds=500))

        def backend(device: torch.device) -> Any:
            if device.type != kind:
                raise RuntimeError(f"no backend for {device}")
            return SimpleNamespace(options=options)

        return SimpleNamespace(_get_backend=backend)

    assert [group_timeout(group(kind)) for kind in ("cpu", "cuda")] == [120.5, 120.5]
    assert group_timeout(group("nothing")) == 1800


def test_a_group_without_a_store_has_no_board(monkeypatch):
    monkeypatch.setattr(dist, "get_backend", lambda _: "gloo")

    def refuse() -> None:
        raise RuntimeError("no store")

    for get_store in (refuse, lambda: None):
        group: Any = SimpleNamespace(get_group_store=get_store)
        assert Board.of(group) is None


def test_the_boards_of_a_group_use_connections_of_their_own(monkeypatch):
    monkeypatch.setattr(dist, "get_backend", lambda _: "gloo")

    class Group:
        def get_group_store(self) -> Any:
            return SimpleNamespace(clone=dist.HashStore, set=None)

        def rank(self) -> int:
            return 1

        def size(self) -> int:
            return 4

    group: Any = Group()
    first, second = Board.of(group), Board.of(group)
    assert first is not None
    assert second is not None
    assert first._store is not second._store
    assert first._store.check(["fastvideo_comm/1/process/1"])
    assert second._store.check(["fastvideo_comm/2/process/1"])
