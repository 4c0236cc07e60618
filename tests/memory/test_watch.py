"""Waits of kernels end after the timeout, and the error says which rank did not come."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from emulated_gpu import emulated_gpu
from posted_ranks import FIRST_BLOCK, Exchange, PostedRank, PostedRanks, imported_kernels
from torch import Tensor

from fastvideo_comm.errors import CommunicationTimeoutError, MismatchError
from fastvideo_comm.memory.watch import Watch

TIMEOUT = 0.2


@pytest.fixture
def host() -> Tensor:
    """The words of rank 0 of 4."""
    return torch.zeros(5, dtype=torch.int64)


@pytest.fixture
def watch(host: Tensor) -> Iterator[Watch]:
    watch = Watch(host, timeout=TIMEOUT, name="sp")
    yield watch
    watch.close()


def until_stopped(host: Tensor) -> float:
    """Seconds until the waits are ended; fails after a minute."""
    begin = time.monotonic()
    while not host[0]:
        assert time.monotonic() - begin < 60, "the waits were not ended"
        time.sleep(0.005)
    return time.monotonic() - begin


def test_a_rank_that_asks_for_something_else_is_named_at_once(host):
    watch = Watch(host, timeout=1000, name="sp")
    host[1:] = torch.tensor([0, 40, -11, -11])
    assert until_stopped(host) < 30
    text = "thing in call 11 of group 'sp', got something else, or bad arguments, from ranks 2, 3;"
    for _ in range(2):
        with pytest.raises(MismatchError, match=text) as caught:
            watch.check()
        assert caught.value.peers == (2, 3)
    watch.close()


@pytest.mark.parametrize(
    ("steps", "message", "peers"),
    [
        ([0, 41, 42, 41], "call 10 of group 'sp' waited 0.2 s: ranks 1, 3 did not come", (1, 3)),
        ([0, 44, 43, 44], "call 10 of group 'sp' waited 0.2 s: rank 2 came and did not f", (2,)),
        ([0, 45, 43, 44], "call 11 .*: rank 1 did not come and rank 2 came and did not", (1, 2)),
    ],
)
def test_the_error_names_those_that_a_kernel_waits_for(host, watch, steps, message, peers):
    watch.check()
    host[1:] = torch.tensor(steps)
    assert until_stopped(host) > 0.9 * TIMEOUT
    for _ in range(2):  # every use of the memory from here on
        with pytest.raises(CommunicationTimeoutError, match=message) as caught:
            watch.check()
        assert caught.value.peers == peers


@pytest.mark.parametrize("steps", [[0, 41, -12, -11], [0, -11, 43, -12]])
def test_a_mismatch_is_of_the_first_call_that_differs_and_goes_before_a_wait(host, watch, steps):
    """The rank that is waited for may wait for one that asks for something else."""
    host[1:] = torch.tensor(steps)
    until_stopped(host)
    with pytest.raises(MismatchError, match="thing in call 11 of group 'sp'") as caught:
        watch.check()
    assert caught.value.peers == tuple(rank for rank, step in enumerate(steps) if step < 0)


def test_a_device_that_waits_for_nothing_may_take_any_time(host, watch):
    host[1:] = torch.tensor([0, 42, 44, 2])
    time.sleep(4 * TIMEOUT)
    watch.check()
    assert not host[0]


def test_it_may_be_closed_in_its_own_thread():
    """Garbage is collected in any thread, and with it memory that nobody has closed."""
    made = threading.Event()

    class Host:
        def __getitem__(self, _: slice) -> Tensor:
            assert made.wait(10)
            watch.close()
            closed.append(threading.current_thread())
            return torch.zeros(2)

    closed: list[threading.Thread] = []
    watch = Watch(Host(), timeout=TIMEOUT, name="sp")
    made.set()
    watch._thread.join(10)
    assert closed == [watch._thread]


def test_each_wait_has_the_whole_timeout(host):
    """Waits that follow each other closely, as in replays of a graph, take longer in all."""
    watch = Watch(host, timeout=1.0, name="sp")
    for call in range(100):
        host[2] = 4 * call + 1
        time.sleep(0.025)
    watch.check()
    assert not host[0]
    watch.close()


def test_kernels_end_when_a_rank_does_not_come(emulated_gpu_directory: Path):
    exchange = Exchange(2, [2], torch.bfloat16, seed=0)
    with emulated_gpu(emulated_gpu_directory) as gpu, imported_kernels() as kernels:
        ranks = PostedRanks(gpu, kernels, 2)

        def job(rank: PostedRank) -> None:
            exchange.run(rank, FIRST_BLOCK)
            if rank.rank == 1:
                return
            watch = Watch(rank.words.host, timeout=TIMEOUT, name="sp")
            rank.post(rank.block(FIRST_BLOCK, exchange.num_bytes))
            with pytest.raises(CommunicationTimeoutError, match=r"call 2 .* rank 1 did not come"):
                watch.check()
            watch.close()

        ranks.run(job)
