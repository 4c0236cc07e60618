"""Ranks that leave, in whatever way their process or their group ends."""

import gc
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from stateless_programs import wait_in
from stateless_ranks import own_groups, run_own

from fastvideo_comm.errors import ClosedError, PeerLostError


def test_rank_0_leaves_last():
    left = []

    def program(group):
        group.barrier()
        if group.rank:
            time.sleep(0.2 * group.rank)
            group.send_obj("late", 2)
            left.append(group.rank)
        else:
            group.close()
            left.append(0)

    run_own(3, program)
    assert left == [1, 2, 0]


def test_close_is_idempotent_and_ends_use():
    def program(group):
        group.close()
        group.close()
        with pytest.raises(ClosedError, match="barrier in group 'default' on rank 0 of 1"):
            group.barrier()

    run_own(1, program)


def test_a_call_that_needs_a_rank_which_left_fails_at_once_and_the_group_goes_on():
    def program(group):
        if group.rank == 2:
            group.send_obj("parting words", 1)
            return
        if group.rank == 1:
            assert group.recv_obj(2) == "parting words"
            with pytest.raises(PeerLostError, match=r"rank\(s\) \[2\] left the group"):
                group.recv_obj(2)
            with pytest.raises(PeerLostError, match=r"rank\(s\) \[2\] left the group"):
                group.send_obj("too late", 2)
            with pytest.raises(PeerLostError, match=r"rank\(s\) \[2\] left the group"):
                group.barrier()
        group.send_obj(group.rank, 1 - group.rank)
        assert group.recv_obj(1 - group.rank) == 1 - group.rank

    run_own(3, program)


@pytest.mark.parametrize("op", ["recv_obj", "broadcast_obj", "all_gather_obj", "barrier"])
def test_a_waiting_call_is_told_when_the_rank_it_needs_leaves(op):
    def program(group):
        group.barrier()
        if group.rank == 1:
            time.sleep(0.2)
            return
        start = time.monotonic()
        with pytest.raises(PeerLostError, match=r"rank\(s\) \[1\] left the group"):
            wait_in(group, op, 1, 10.0)
        assert time.monotonic() - start < 2

    run_own(2, program)


def test_a_group_that_is_dropped_says_goodbye():
    with own_groups(2) as open_group:

        def program(group):
            if group.rank == 1:
                with pytest.raises(PeerLostError, match="left the group"):
                    group.recv_obj(0, timeout=5)

        thread = threading.Thread(target=lambda: open_group(0).__class__)
        thread.start()
        with open_group(1) as group:
            thread.join()
            gc.collect()
            program(group)


def test_normal_exit_without_close_is_clean():
    run_exits(world_size=3, rounds=3)  # another rank is the last in each round


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_a_hundred_normal_exits_without_close_are_clean(world_size):
    run_exits(world_size, 100)


def run_exits(world_size, rounds):
    script = Path(__file__).parents[1] / "helpers" / "stateless_exit.py"
    result = subprocess.run(
        [sys.executable, str(script), str(world_size), str(rounds)],
        capture_output=True,
        text=True,
        timeout=rounds * 8 + 30,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{rounds} clean\n", "")
