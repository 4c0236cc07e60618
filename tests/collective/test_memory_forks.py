"""Forked children of ranks that exchange by memory."""

from __future__ import annotations

import atexit
import os
import signal
import time
import warnings

import mortal_ranks
import pytest
import torch
from memory_ranks import exchange, exchanged, numbered

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.errors import ClosedError, PeerLostError

CULPRIT = 1


def forked(communicator: DeviceCommunicatorBase) -> str:
    """A child neither calls nor closes for its parent, however it ends."""
    held = exchange(communicator, 0)
    handle = communicator.all_to_all_4D(numbered(communicator, 1), async_op=True)
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks where threads run
        child = os.fork()
    if not child:
        try:
            text = "no error"
            assert torch.equal(held, exchanged(communicator, 0)), "a child sees the tensor"
            try:
                communicator.all_to_all_4D(numbered(communicator, 2))
            except ClosedError as error:
                text = str(error)
            os.write(writing, text.encode())
            communicator.destroy()
            atexit._run_exitfuncs()
        except BaseException as error:
            os.write(writing, repr(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    assert torch.equal(handle.wait(), exchanged(communicator, 1))
    for call in range(2, 5):
        exchange(communicator, call)
    return os.read(reading, 1000).decode()


def test_a_forked_child_may_read_and_neither_calls_nor_closes_for_its_parent():
    for rank, text in enumerate(mortal_ranks.run(2, forked)):
        assert f"all_to_all_4D on rank {rank} of 2 in group 'mortal'" in text
        assert "was forked from it and must make its own" in text


def leaves_a_child(communicator: DeviceCommunicatorBase) -> float:
    exchange(communicator, 0)
    if communicator.rank == CULPRIT:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            if not os.fork():
                time.sleep(5)
                os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(PeerLostError, match="rank 1 has died"):
        exchange(communicator, 1)
    return time.monotonic() - begin


def test_a_rank_that_dies_is_seen_though_its_child_lives():
    assert mortal_ranks.run(2, leaves_a_child, gone=(CULPRIT,))[0] < 1
