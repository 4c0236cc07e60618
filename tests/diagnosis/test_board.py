"""What ranks write down of their calls, how it is compared, and who is dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist

from fastvideo_comm.diagnosis.board import Board, _start, own_process, process_state
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
    assert str(record) == "op [2, *, 6, 4] float32 contiguous 1"
    assert table({0: record, 1: record}, strict=True) is None
    leaf = X.clone().requires_grad_()
    assert describe("op", leaf, ()).requires_grad
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
