"""Ranks that share memory, as forked processes or as threads, for the tests of this folder.

A job is any function of a `HostMemory`, closures too. What it returns travels back; an exception of
a job fails the test with the traceback of its rank.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvideo_comm.memory.host import Ask, Flight, HostMemory, Place, Posted
from fastvideo_comm.memory.waiter import Waiter

# Longer than any job takes on a busy machine, shorter than pytest's limit for a test.
LIMIT_SECONDS = 100.0
Job = Callable[[HostMemory], Any]


class Killed:
    """What a rank returns that was killed by a signal."""

    def __repr__(self) -> str:
        return "killed"


KILLED = Killed()


class RankError(Exception):
    """A job failed; the message is the traceback of its rank."""


def in_processes(
    world_size: int,
    job: Job,
    *,
    timeout: float = 60.0,
    connect: Callable[..., Any] | None = None,
    meanwhile: Callable[[list[int]], None] | None = None,
    **options: Any,
) -> list[Any]:
    """Runs a job on forked ranks.

    Args:
        world_size: How many.
        job: Called with the memory of each rank, or with what `connect` returned there.
        timeout: The group's.
        connect: Called instead of `HostMemory.connect`, with the same arguments.
        meanwhile: Called with the numbers of the processes, after they were started.
        options: For `connect`.

    Returns:
        What the job returned on each rank; `KILLED` for one that a signal has killed.
    """
    pairs = {
        (low, high): socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for high in range(world_size)
        for low in range(high)
    }
    answers = [multiprocessing.Pipe(duplex=False) for _ in range(world_size)]
    processes: list[int] = []
    try:
        for rank in range(world_size):
            process = _fork()
            if not process:
                _work(rank, world_size, pairs, answers[rank][1], job, timeout, connect, options)
            processes.append(process)
        for _, theirs in answers:
            theirs.close()
        for link in (link for pair in pairs.values() for link in pair):
            link.close()
        if meanwhile is not None:
            meanwhile(processes)
        deadline = time.monotonic() + LIMIT_SECONDS
        results: list[Any] = []
        failures: list[str] = []
        for rank, (ours, _) in enumerate(answers):
            # After a failure the others may wait for the rank that failed, though not for long.
            seconds = 5.0 if failures else max(0.0, deadline - time.monotonic())
            try:
                if not ours.poll(seconds):
                    failures.append(f"rank {rank} has not answered")
                    continue
                failed, answer = pickle.loads(ours.recv_bytes())
            except EOFError:
                results.append(KILLED)
                continue
            if failed:
                failures.append(f"rank {rank}: {answer}")
            results.append(answer)
        if failures:
            raise RankError("\n".join(failures))
        return results
    finally:
        for process in processes:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        for ours, _ in answers:
            ours.close()


def _fork() -> int:
    with warnings.catch_warnings():
        # Python 3.12 warns of forks where threads run, such as those of torch.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _work(
    rank: int,
    world_size: int,
    pairs: dict[tuple[int, int], tuple[socket.socket, socket.socket]],
    answer: Any,
    job: Job,
    timeout: float,
    connect: Callable[..., Any] | None,
    options: dict[str, Any],
) -> None:
    status = 1
    try:
        # A rank does not outlive a test session that was killed.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        # pytest's hook keeps the error, whose frames keep the tensors that a rank should let go.
        sys.unraisablehook = sys.__unraisablehook__
        torch.set_num_threads(1)
        links = {}
        for (low, high), (first, second) in pairs.items():
            if rank in (low, high):
                links[low + high - rank] = first if rank == low else second
            for link in (first, second):
                if links.get(low + high - rank) is not link:
                    link.close()

        def everyone(payload: bytes) -> list[bytes]:
            for link in links.values():
                link.send(payload)
            return [
                payload if other == rank else links[other].recv(1 << 16)
                for other in range(world_size)
            ]

        try:
            memory = (connect or _connect)(
                rank, world_size, everyone, timeout=timeout, name="test", **options
            )
            result = (False, job(memory))
        except BaseException:
            result = (True, traceback.format_exc())
        answer.send_bytes(pickle.dumps(result))
        if isinstance(memory, HostMemory):
            memory.close()
        status = 0
    finally:
        os._exit(status)


def _connect(*arguments: Any, **options: Any) -> HostMemory:
    memory, refusal = HostMemory.connect(*arguments, **options)
    assert memory is not None, refusal
    return memory


def in_threads(world_size: int, job: Job, *, timeout: float = 60.0) -> list[Any]:
    """Runs a job on ranks that are threads of this process."""
    barrier = threading.Barrier(world_size, timeout=60)
    brought: list[bytes] = [b""] * world_size
    results: list[Any] = [None] * world_size
    failures: list[str] = []

    def work(rank: int) -> None:
        def everyone(payload: bytes) -> list[bytes]:
            brought[rank] = payload
            barrier.wait()
            answers = list(brought)
            barrier.wait()
            return answers

        try:
            memory = _connect(rank, world_size, everyone, timeout=timeout, name="test")
            try:
                results[rank] = job(memory)
                barrier.wait()
            finally:
                memory.close()
        except BaseException:
            failures.append(f"rank {rank}: {traceback.format_exc()}")
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise RankError("\n".join(failures))
    return results


def value(call: int, source: int, target: int) -> int:
    """What `source` writes for `target` in a call."""
    return call * 10_000 + source * 100 + target


def ask_all(
    memory: HostMemory,
    call: int = 0,
    *,
    size: int = 5,
    strided: bool = False,
    question: bytes | None = None,
    copy: Callable[[Tensor, int, int], None] | None = None,
) -> Ask:
    """A call in which every rank writes to every rank: row or column r is from rank r.

    Args:
        memory: This rank's.
        call: Decides the values.
        size: The length of a part.
        strided: Parts are columns, not rows.
        question: What this rank asks for.
        copy: Called with a part, its value and its target in the place of the copy.
    """
    ranks = memory.world_size
    specs = [((size, ranks) if strided else (ranks, size), torch.int64)]

    def deliver(target: int, place: Place) -> None:
        (outputs,) = memory.tensors_at(target, place, specs)
        part = outputs.select(1 if strided else 0, memory.rank)
        number = value(call, memory.rank, target)
        if copy is not None:
            copy(part, number, target)
        else:
            part.copy_(torch.full((size,), number))

    question = b"all %d %d" % (size, strided) if question is None else question
    return Ask(
        "all",
        question,
        question,
        deliver,
        lambda: b"rank %d asked %b" % (memory.rank, question),
        posted=memory.allocate(specs),
        sources=range(ranks),
        targets=range(ranks),
    )


def outputs(ask: Ask) -> Tensor:
    """The output of a call."""
    assert isinstance(ask.posted, Posted)
    return ask.posted.tensors[0]


def expected_all(memory: HostMemory, call: int, size: int = 5, strided: bool = False) -> Tensor:
    """What `ask_all` must give on this rank."""
    ranks = range(memory.world_size)
    rows = torch.tensor([[value(call, source, memory.rank)] * size for source in ranks])
    rows = rows.view(memory.world_size, size)
    return rows.t() if strided else rows


def exchange(memory: HostMemory, call: int = 0, **options: Any) -> Tensor:
    """A call of all ranks, waited for and compared."""
    ask = ask_all(memory, call, **options)
    memory.start(ask).wait()
    out = outputs(ask)
    size, strided = options.get("size", 5), options.get("strided", False)
    assert torch.equal(out, expected_all(memory, call, size, strided))
    return out


def ask_pair(
    memory: HostMemory, source: int, target: int, call: int = 0, size: int = 3, as_: bytes = b"send"
) -> Ask:
    """A call of two ranks in which one writes to the other."""
    specs = [((size,), torch.int64)]
    sends = memory.rank == source

    def deliver(rank: int, place: Place) -> None:
        memory.tensors_at(rank, place, specs)[0].fill_(value(call, source, target))

    question = b"%b %d" % (as_, size)
    return Ask(
        "send" if sends else "recv",
        question,
        question,
        deliver,
        lambda: b"pair",
        ranks=(source, target),
        posted=None if sends else memory.allocate(specs),
        sources=() if sends else (source,),
        targets=(target,) if sends else (),
    )


def num_descriptors() -> int:
    """The open descriptors of this process."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def settled(memory: HostMemory) -> int:
    """The bytes in use, once garbage is collected and what the others say has been read."""
    engine, waiter = memory._engine, Waiter()
    deadline = time.monotonic() + 20
    while memory.pool.bytes_in_use and time.monotonic() < deadline:
        gc.collect()
        engine._turn(waiter.ready(engine._lines, engine._ledger.lost, 0.001))
    return memory.pool.bytes_in_use


def wait_all(flights: Sequence[Flight]) -> None:
    """Waits for flights in the given order."""
    for flight in flights:
        flight.wait()
