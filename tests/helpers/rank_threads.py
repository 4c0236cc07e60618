"""Ranks as threads of one process, on the CPU or on one GPU: a process group of a few lines.

torch has such a group too, without send and recv and under names that change between releases;
only its thread-local world is taken from there.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from recorded_graph import run_and_record
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.multi_threaded_pg import ThreadLocalWorld

BACKEND = "rank_threads"
SECONDS = 60
_REDUCTIONS: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    dist.ReduceOp.SUM: torch.add,
    dist.ReduceOp.PRODUCT: torch.mul,
    dist.ReduceOp.MIN: torch.minimum,
    dist.ReduceOp.MAX: torch.maximum,
}


class Meeting:
    """Where the threads of one group meet."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=SECONDS)
        self.brought: list[Any] = [None] * size
        self.mail: dict[tuple[int, int], queue.Queue[Tensor]] = defaultdict(queue.Queue)


class ThreadGroup(dist.ProcessGroup):
    """The methods of a process group that `fastvideo_comm.channel` calls.

    All threads enqueue on the device's default stream, so that what was enqueued before the
    barrier is complete for what is enqueued after it.
    """

    def __init__(self, rank: int, size: int, meeting: Meeting) -> None:
        super().__init__(rank, size)
        self._rank_, self._size_, self.meeting = rank, size, meeting

    def rank(self) -> int:
        return self._rank_

    def size(self) -> int:
        return self._size_

    def getBackendName(self) -> str:
        return BACKEND

    def _get_backend(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(supports_coalescing=False, name=lambda: BACKEND)

    def alltoall_base(
        self, output: Tensor, input_: Tensor, _: list[int], sizes: list[int], options: Any
    ) -> None:
        def receive(inputs: list[list[Tensor]]) -> None:
            output.copy_(torch.cat([messages[self._rank_] for messages in inputs]))

        each = input_.shape[0] // self._size_
        self._exchange(list(input_.split(sizes or [each] * self._size_)), receive)

    def _allgather_base(self, output: Tensor, input_: Tensor, options: Any) -> None:
        self._exchange(input_, lambda inputs: output.copy_(torch.cat(inputs)))

    def _reduce_scatter_base(self, output: Tensor, input_: Tensor, options: Any) -> None:
        def receive(inputs: list[Tensor]) -> None:
            parts = [sent.chunk(self._size_)[self._rank_] for sent in inputs]
            output.copy_(functools.reduce(torch.add, parts))

        self._exchange(input_, receive)

    def allreduce(self, tensors: Sequence[Tensor], options: Any) -> None:
        (tensor,) = tensors
        reduction = next(f for op, f in _REDUCTIONS.items() if options.reduceOp == op)
        brings = tensor.clone()
        self._exchange(brings, lambda inputs: tensor.copy_(functools.reduce(reduction, inputs)))

    def broadcast(self, tensors: Sequence[Tensor], options: Any) -> None:
        (tensor,) = tensors
        brings = tensor.clone()
        self._exchange(brings, lambda inputs: tensor.copy_(inputs[options.rootRank]))

    def reduce(self, tensors: Sequence[Tensor], options: Any) -> None:
        (tensor,) = tensors
        brings = tensor.clone()

        def receive(inputs: list[Tensor]) -> None:
            if self._rank_ == options.rootRank:
                tensor.copy_(functools.reduce(torch.add, inputs))
            else:  # as gloo does, which adds up on the way
                tensor.fill_(7)

        self._exchange(brings, receive)

    def barrier(self, options: Any) -> None:
        self._exchange(None, lambda _: None)

    def gather(
        self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], options: Any
    ) -> None:
        def receive(sent: list[Tensor]) -> None:
            if self._rank_ == options.rootRank:
                for output, message in zip(outputs[0], sent, strict=True):
                    output.copy_(message)

        self._exchange(inputs[0], receive)

    def send(self, tensors: Sequence[Tensor], dst: int, tag: int) -> None:
        run_and_record(lambda: self.meeting.mail[self._rank_, dst].put(tensors[0].clone()))

    def recv(self, tensors: Sequence[Tensor], src: int, tag: int) -> None:
        mail = self.meeting.mail[src, self._rank_]
        run_and_record(lambda: tensors[0].copy_(mail.get(timeout=SECONDS)))

    def _exchange(self, brings: Any, receive: Callable[[list[Any]], Any]) -> None:
        def meet() -> None:
            self.meeting.brought[self._rank_] = brings
            self.meeting.barrier.wait()
            with torch.no_grad():
                receive(list(self.meeting.brought))
            self.meeting.barrier.wait()

        run_and_record(meet)


_here = threading.local()


def _create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> ThreadGroup:
    return ThreadGroup(rank, size, _here.meeting)


dist.Backend.register_backend(BACKEND, _create, devices=["cpu", "cuda"])


class World(ThreadLocalWorld):
    """Each thread's groups; torch 2.11 asks for `comms`, and its ThreadLocalWorld has none."""

    comms: ClassVar[list[Any]] = []


def run_ranks(size: int, job: Callable[[dist.ProcessGroup], Any]) -> list[Any]:
    """`job(group)` on every rank; its results in rank order. The first error is raised here."""
    meeting = Meeting(size)
    store = dist.HashStore()
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def rank_thread(rank: int) -> None:
        _here.meeting = meeting
        try:
            dist.init_process_group(BACKEND, rank=rank, world_size=size, store=store)
            # Else the nodes of all ranks' graphs would share one thread per GPU, and the first to
            # wait for the others would keep them from running.
            with torch.autograd.set_multithreading_enabled(False):
                results[rank] = job(dist.group.WORLD)
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    world = distributed_c10d._world
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    distributed_c10d._world = World()
    try:
        threads = [threading.Thread(target=rank_thread, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * SECONDS)
    finally:
        distributed_c10d._world = world
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
    if errors:  # the one that broke the barrier stands before those of the ranks that waited there
        raise errors[0]
    return results
