"""Gloo ranks in processes that live as long as the test session.

Starting a process and importing torch takes seconds; a job for a living one takes a millisecond,
which is what makes property-based tests of collectives possible. A job is a function of a test
module, called on every rank of a group with that group's communicator; a rank that fails or hangs
fails the test with its own traceback, and the next job gets new processes.
"""

from __future__ import annotations

import datetime
import functools
import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fastvideo_comm import DeviceCommunicatorBase

WORLD_SIZE = 4
# Longer than any job takes on a busy machine, shorter than pytest's limit for a test.
JOB_TIMEOUT_SECONDS = 100.0
GROUP_TIMEOUT = datetime.timedelta(seconds=60)


class RankError(Exception):
    """A job failed; the message is the traceback of the rank where it did."""


# How a communicator moves tensors: `memory=` of each.
WAYS = {"messages": "off", "memory": "on"}


@functools.cache
def device_mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """The mesh of the CPU ranks; made once, because a gloo group wakes up 100 times a second."""
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


class Ranks:
    """Runs jobs on groups of up to `WORLD_SIZE` ranks, by messages and by memory."""

    def __init__(self) -> None:
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._connections: list[multiprocessing.connection.Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._num_messages = 0
        self._groups: set[tuple[int, ...]] = set()

    def run(
        self,
        ranks: int | Sequence[int],
        job: Callable[..., Any],
        *arguments: Any,
        ways: Sequence[str] = tuple(WAYS),
    ) -> list[Any]:
        """`job(communicator, *arguments)` on `ranks` (a number means the first so many).

        Args:
            ranks: how many, or which.
            job: a function of a test module.
            arguments: what it takes behind the communicator.
            ways: the ways on which it runs, one after the other.

        Returns:
            What the job returned on each of them, on the last way.
        """
        for way in ways:
            answers = self._run(ranks, way, job, *arguments)
        return answers

    def _run(
        self, ranks: int | Sequence[int], way: str, job: Callable[..., Any], *arguments: Any
    ) -> list[Any]:
        members = tuple(range(ranks)) if isinstance(ranks, int) else tuple(ranks)
        if not self._processes:
            self._start()
        if members not in self._groups:
            self._send(range(WORLD_SIZE), members)
            self._groups.add(members)
        self._send(members, members, way, job, arguments)
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        dead = False
        deadline = time.monotonic() + JOB_TIMEOUT_SECONDS
        waiting = {self._connections[member]: member for member in members}
        while waiting:
            # After a failure the others may wait for the rank that failed, though not for long.
            remaining = 2.0 if failures else max(0.0, deadline - time.monotonic())
            ready = multiprocessing.connection.wait(list(waiting), remaining)
            if not ready:
                break
            for connection in ready:
                member = waiting.pop(connection)
                try:
                    failed, answer = pickle.loads(connection.recv_bytes())
                except EOFError:
                    failed, answer = True, "the process died"
                    dead = True
                (failures if failed else answers)[members.index(member)] = answer
        if waiting or dead:
            self.stop()
        if failures:
            # The first that failed comes first; the others may have failed because of it.
            texts = [
                f"by {way}: rank {rank} of {members}: {text}" for rank, text in failures.items()
            ]
            raise RankError("\n".join(texts))
        if waiting:
            raise RankError(f"no answer from ranks {sorted(waiting.values())} of {members}")
        return [answers[rank] for rank in range(len(members))]

    def _send(self, to: Sequence[int], *message: Any) -> None:
        self._num_messages += 1
        packed = pickle.dumps((self._num_messages, *message))
        for rank in to:
            self._connections[rank].send_bytes(packed)

    def stop(self) -> None:
        """Ends the processes; the next job starts new ones."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
        self._groups.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        self._folder = tempfile.TemporaryDirectory()
        for rank in range(WORLD_SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(rank, self._folder.name, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)


def _work(rank: int, folder: str, connection: multiprocessing.connection.Connection) -> None:
    warnings.simplefilter("error")
    # torch's own, in its tracer and compiler
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    gc.freeze()  # jobs that collect garbage look at what they made, and not at all of torch
    store = dist.FileStore(os.path.join(folder, "store"), WORLD_SIZE)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=GROUP_TIMEOUT
    )
    communicators: dict[tuple[tuple[int, ...], str], DeviceCommunicatorBase] = {}
    while True:
        try:
            number, members, *job_of_members = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        # torch names a new group after the number of groups so far, which the ranks of an earlier
        # job have made without the others.
        dist.distributed_c10d._world.group_count = 1000 * number
        if not job_of_members:
            # All ranks make a group together, before its first job: each of its threads wakes up
            # 100 times a second.
            group = dist.new_group(list(members))
            if rank in members:
                for way, memory in WAYS.items():
                    communicators[members, way] = DeviceCommunicatorBase(
                        group, unique_name="test", memory=memory
                    )
            continue
        way, job, arguments = job_of_members
        try:
            answer = (False, job(communicators[members, way], *arguments))
        except BaseException:
            answer = (True, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))
