"""Two gloo ranks in processes of their own, for the doctor and the quick benchmark."""

from __future__ import annotations

import datetime
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import traceback
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from ..communicator import DeviceCommunicatorBase

_TIMEOUT_SECONDS = 120.0
_REPEATS = 7


def run_pair(job: str, *arguments: Any, seconds: float = _TIMEOUT_SECONDS) -> Any:
    """Runs a job of this module on two ranks.

    Example:
        >>> run_pair("check")  # doctest: +SKIP

    Returns:
        What rank 0's job returned.

    Raises:
        RuntimeError: a rank failed; the message ends with its error.
        TimeoutError: a rank did not answer in time.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes, answers = [], []
        for rank in range(2):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_work, args=(rank, folder, theirs, job, arguments), daemon=True
            )
            process.start()
            theirs.close()
            processes.append(process)
            answers.append(ours)
        try:
            return _first_answer(answers, seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _first_answer(answers: list[Any], seconds: float) -> Any:
    """Returns rank 0's answer when both have answered; raises the first failure before that."""
    waiting, result = dict(enumerate(answers)), None
    deadline = perf_counter() + seconds
    while waiting:
        ready = multiprocessing.connection.wait(
            list(waiting.values()), max(0.0, deadline - perf_counter())
        )
        if not ready:
            raise TimeoutError(f"ranks {sorted(waiting)} must answer within {seconds:g} s")
        for rank, connection in list(waiting.items()):
            if connection in ready:
                del waiting[rank]
                try:
                    error, answer = connection.recv()
                except EOFError:
                    raise RuntimeError(f"rank {rank} died") from None
                if error:
                    raise RuntimeError(f"rank {rank} failed: {error}")
                result = answer if rank == 0 else result
    return result


def _work(rank: int, folder: str, answer: Any, job: str, arguments: tuple[Any, ...]) -> None:
    try:
        torch.set_num_threads(1)
        store = FileStore(os.path.join(folder, "store"), 2)
        timeout = datetime.timedelta(seconds=_TIMEOUT_SECONDS)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)
        communicator = DeviceCommunicatorBase.from_group(dist.distributed_c10d._get_default_group())
        answer.send(("", _JOBS[job](communicator, *arguments)))
    except Exception:
        answer.send((traceback.format_exc(), None))
    answer.close()


def _check(communicator: DeviceCommunicatorBase) -> str:
    """Checks a small and a large exchange, there and back; returns why they used no memory."""
    rank = communicator.rank
    for sequence in (6, 6 << 10):
        whole = torch.arange(sequence * 4 * 64, dtype=torch.float32).reshape(1, sequence, 4, 64)
        mine = whole.chunk(2, 1)[rank]
        heads = communicator.all_to_all_4D(mine)
        back = communicator.all_to_all_4D(heads, 1, 2)
        if not (torch.equal(heads, whole.chunk(2, 2)[rank]) and torch.equal(back, mine)):
            raise RuntimeError("all_to_all_4D must be exact, got other values")
    return communicator.memory_stats().refusal


def _measure(communicator: DeviceCommunicatorBase, sequence: int) -> dict[str, float]:
    """Measures the op in both directions, and the bare exchange of the same bytes, in seconds."""
    x = torch.randn(1, sequence, 12, 128).bfloat16()
    y = communicator.all_to_all_4D(x)
    bare = torch.empty_like(x).view(-1)
    calls: dict[str, Callable[[], Any]] = {
        "heads": lambda: communicator.all_to_all_4D(x),
        "sequence": lambda: communicator.all_to_all_4D(y, 1, 2),
        "bare exchange": lambda: dist.all_to_all_single(bare, x.view(-1)),
    }
    result = {"bytes": float(x.nbytes)}
    for name, call in calls.items():
        times = []
        for _ in range(_REPEATS):
            dist.barrier()
            begin = perf_counter()
            call()
            times.append(perf_counter() - begin)
        result[name] = sorted(times)[_REPEATS // 2]
    return result


_JOBS: dict[str, Callable[..., Any]] = {"check": _check, "measure": _measure}
