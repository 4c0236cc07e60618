"""Ranks in processes of their own, for jobs in which a rank dies, stops, forks or is interrupted.

The processes are forked from a server that has imported torch, so that a rank starts in a fraction
of a second. A rank whose process was killed or stopped has the answer GONE.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from fastvideo_comm import DeviceCommunicatorBase

GONE = "gone"


class RankError(Exception):
    """A job failed; the message is the traceback of its rank."""


def run(
    world_size: int,
    job: Callable[..., Any],
    *arguments: Any,
    timeout: float = 30.0,
    seconds: float = 60.0,
    gone: tuple[int, ...] = (),
    memory: str | None = "on",
) -> list[Any]:
    """`job(communicator, *arguments)` on every rank of a group of its own.

    Args:
        world_size: how many ranks.
        job: a function of a test module.
        arguments: what it takes behind the communicator.
        timeout: the group's, in seconds.
        seconds: after which a rank that has not answered fails the test.
        gone: ranks that do not answer.
        memory: the communicator's.

    Returns:
        What the job returned on each rank; GONE for those that do not answer.
    """
    context = multiprocessing.get_context("forkserver")
    processes, connections = [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                place = (rank, world_size, folder, timeout, memory, theirs)
                process = context.Process(target=_work, args=(place, job, arguments))
                process.start()
                theirs.close()
                processes.append(process)
                connections.append(ours)
            deadline = time.monotonic() + seconds
            answers: list[Any] = []
            failures: list[str] = []
            for rank, connection in enumerate(connections):
                answers.append(GONE)
                if rank in gone:
                    continue
                # After a failure the others may wait for the rank that failed, though not for long.
                left = 5.0 if failures else max(0.0, deadline - time.monotonic())
                if not connection.poll(left):
                    failures.append(f"rank {rank} has not answered")
                    continue
                try:
                    failed, answers[rank] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    failures.append(f"the process of rank {rank} died")
                    continue
                if failed:
                    failures.append(f"rank {rank}: {answers[rank]}")
            if failures:
                raise RankError("\n".join(failures))
            return answers
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
            for connection in connections:
                connection.close()


def _work(place: tuple[Any, ...], job: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    rank, world_size, folder, timeout, memory, connection = place
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    gc.freeze()  # a job that collects garbage does not look at all of torch
    try:
        store = dist.FileStore(os.path.join(folder, "store"), world_size)
        dist.init_process_group(
            "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        communicator = DeviceCommunicatorBase(
            dist.group.WORLD, unique_name="mortal", memory=memory, validate="off"
        )
        answer = (False, job(communicator, *arguments))
    except BaseException:
        answer = (True, traceback.format_exc())
    with contextlib.suppress(BrokenPipeError):
        connection.send_bytes(pickle.dumps(answer))
    # The others may still be in the middle of a call with this rank.
    time.sleep(60)
