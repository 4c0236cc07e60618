"""A process group's calls on contiguous messages; an error names the call, the rank and the group.

This module calls c10d's process group directly. The wrappers in `torch.distributed` and the
functional collectives cost more host time per call. As every backend, it assumes that all ranks of
the group make the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import (
    AllgatherOptions,
    AllreduceOptions,
    AllToAllOptions,
    BarrierOptions,
    BroadcastOptions,
    GatherOptions,
    ReduceOptions,
    ReduceScatterOptions,
)

from ..errors import ClosedError, CollectiveError, where
from ..reduce_ops import ReduceOp
from .wire import MOVED, moved, moved_counts, reduced

T = TypeVar("T")
Works: TypeAlias = "list[dist.Work | None]"


class Transfer(NamedTuple):
    """Messages to exchange. Both tensors are contiguous and in rank order.

    The counts are the elements of each rank's message. They are empty if all are equal.
    """

    output: Tensor
    input: Tensor
    output_counts: list[int]
    input_counts: list[int]


class C10d:
    """A process group until it is closed, and its calls."""

    def __init__(self, process_group: dist.ProcessGroup, name: str) -> None:
        """Wraps a process group; `name` is its name in errors."""
        self._process_group: dist.ProcessGroup | None = process_group
        self._rank = process_group.rank()
        self._size = process_group.size()
        self._name = name
        self._backends: dict[str, str] = {}
        self._waiting = AllToAllOptions()
        self._waiting.asyncOp = False

    def close(self) -> None:
        """Lets go of the process group: torch 2.13 may abort if a gloo group lives to the end."""
        self._process_group = None

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The process group.

        Raises:
            ClosedError: this object was closed.
        """
        if self._process_group is None:
            raise ClosedError("the communicator was destroyed before a backward that needs it")
        return self._process_group

    def all_to_all(self, transfers: Sequence[Transfer], *, async_op: bool) -> Works:
        """Starts the transfers: as one grouped call on NCCL, at the same time on gloo."""
        options = AllToAllOptions()
        options.asyncOp = async_op or len(transfers) > 1

        def start(group: dist.ProcessGroup) -> Works:
            return [
                group.alltoall_base(
                    moved(to),
                    moved(from_),
                    moved_counts(to.dtype, to_counts),
                    moved_counts(to.dtype, counts),
                    options,
                )
                for to, from_, to_counts, counts in transfers
            ]

        device = transfers[0].output.device
        if len(transfers) == 1 or not self._coalesces(device):
            return self._named("all_to_all", start)

        def start_grouped(group: dist.ProcessGroup) -> Works:
            group._start_coalescing(device)
            start(group)
            return [group._end_coalescing(device)]

        return self._named("all_to_all", start_grouped)

    def all_to_all_one(self, output: Tensor, input_: Tensor) -> None:
        """Makes one even transfer of contiguous `[P, ..]` and waits for it."""
        if output.dtype not in MOVED:
            output, input_ = moved(output), moved(input_)
        try:
            group = self._process_group or self.process_group  # which raises; saves a call
            work = group.alltoall_base(output, input_, [], [], self._waiting)
            if work is not None:
                work.wait()
        except RuntimeError as error:
            raise self._failure("all_to_all", error) from error

    def wait(self, op: str, works: Works) -> None:
        """Waits for the works that a method of this class started."""

        def wait(_: dist.ProcessGroup) -> None:
            for work in works:
                if work is not None:  # None: the backend works on the current stream, in order
                    work.wait()

        self._named(op, wait)

    def all_gather(self, output: Tensor, input_: Tensor) -> None:
        """Gathers every rank's `input_` into `output [P, *input_.shape]`."""
        options = AllgatherOptions()
        options.asyncOp = False
        self._finish(
            "all_gather",
            lambda group: [group._allgather_base(moved(output), moved(input_), options)],
        )

    def reduce_scatter(self, output: Tensor, input_: Tensor) -> None:
        """Writes the sum of all ranks' `input_[rank]` into `output`; `input_` is `[P, *shape]`."""
        if self._size > 1 and self._backend("reduce_scatter", input_.device) == "gloo":
            self._add_here(output, input_)
            return
        options = ReduceScatterOptions()
        options.asyncOp = False
        self._finish(
            "reduce_scatter",
            lambda group: [group._reduce_scatter_base(reduced(output), reduced(input_), options)],
        )

    def _add_here(self, output: Tensor, input_: Tensor) -> None:
        """As `reduce_scatter`; gloo's own is an all_reduce, which sends twice the bytes.

        Sums are made in rank order, as by memory.
        """
        parts = torch.empty_like(input_)
        self._finish(
            "reduce_scatter",
            lambda group: [
                group.alltoall_base(reduced(parts), reduced(input_), [], [], self._waiting)
            ],
        )
        total, *others = parts.view(self._size, -1)
        for part in others:
            total = torch.add(total, part, out=output.view(-1))

    def all_reduce(self, tensor: Tensor, op: ReduceOp) -> None:
        """Reduces `tensor` in place."""
        options = AllreduceOptions()
        options.asyncOp = False
        average_here = bool(
            op == dist.ReduceOp.AVG and self._backend("all_reduce", tensor.device) != "nccl"
        )
        reduce_op: Any = dist.ReduceOp.SUM if average_here else op  # either type is taken
        options.reduceOp = reduce_op
        self._finish("all_reduce", lambda group: [group.allreduce([reduced(tensor)], options)])
        if average_here:
            tensor.div_(self._size)

    def start_sum(self, tensor: Tensor) -> Works:
        """Starts to add `tensor` up over ranks, in place."""
        options = AllreduceOptions()
        options.asyncOp = True
        return self._named(
            "all_reduce", lambda group: [group.allreduce([reduced(tensor)], options)]
        )

    def broadcast(self, tensor: Tensor, src: int) -> None:
        """Copies rank `src`'s `tensor` into the `tensor` of every rank."""
        options = BroadcastOptions()
        options.rootRank = src
        self._finish("broadcast", lambda group: [group.broadcast([moved(tensor)], options)])

    def reduce(self, tensor: Tensor, dst: int) -> None:
        """Writes the sum over ranks into `tensor` on rank `dst`; elsewhere it is then undefined."""
        options = ReduceOptions()
        options.rootRank = dst
        self._finish("reduce", lambda group: [group.reduce([reduced(tensor)], options)])

    def barrier(self, device: torch.device) -> None:
        """Returns when every rank has come here; the host waits."""
        options = BarrierOptions()
        if device.type != "cpu":  # or NCCL guesses a device from the rank
            options.device = device
        self._finish("barrier", lambda group: [group.barrier(options)])

    def gather(self, outputs: Sequence[Tensor], input_: Tensor, dst: int) -> None:
        """Gathers every rank's `input_` into `outputs` on rank `dst`; others give no outputs."""
        options = GatherOptions()
        options.rootRank = dst
        targets = [[moved(output) for output in outputs]] if outputs else []
        self._finish("gather", lambda group: [group.gather(targets, [moved(input_)], options)])

    def send(self, tensor: Tensor, dst: int) -> None:
        """Sends a contiguous tensor to rank `dst`; returns when its memory may be reused."""
        self._finish("send", lambda group: [group.send([moved(tensor)], dst, 0)])

    def recv(self, tensor: Tensor, src: int) -> None:
        """Receives into a contiguous tensor from rank `src`."""
        self._finish("recv", lambda group: [group.recv([moved(tensor)], src, 0)])

    def _coalesces(self, device: torch.device) -> bool:
        group = self._process_group
        return group is not None and group._get_backend(device).supports_coalescing

    def _backend(self, op: str, device: torch.device) -> str:
        if device.type not in self._backends:
            self._backends[device.type] = self._named(
                op, lambda group: group._get_backend(device).name()
            )
        return self._backends[device.type]

    def _finish(self, op: str, start: Callable[[dist.ProcessGroup], Works]) -> None:
        self.wait(op, self._named(op, start))

    def _named(self, op: str, call: Callable[[dist.ProcessGroup], T]) -> T:
        """Calls, and names op and rank if the call fails."""
        try:
            return call(self.process_group)
        except RuntimeError as error:
            raise self._failure(op, error) from error

    def _failure(self, op: str, error: RuntimeError) -> Exception:
        if isinstance(error, ClosedError):
            return ClosedError(f"{where(op, self._rank, self._size, self._name)}: {error}")
        return CollectiveError(f"{where(op, self._rank, self._size, self._name)} failed: {error}")
