"""A process group, its exchanges of contiguous messages, and the buffers that they reuse.

This module calls c10d's process group directly. The wrappers in `torch.distributed` and the
functional collectives cost more host time per call. As every backend, it assumes that all ranks of
the group make the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

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

from ..diagnosis import Diagnosis, Validate
from ..diagnosis.board import group_timeout
from ..diagnosis.record import Facts, Record, facts_of
from ..errors import ClosedError, CollectiveError, place, where
from ..memory.host import HostMemory
from ..profiling import MemoryStats
from ..reduce_ops import ReduceOp
from .buffers import WireBuffers
from .wire import moved, moved_counts, reduced

T = TypeVar("T")
MemoryMode: TypeAlias = Literal["auto", "on", "off"]
MEMORY_MODES: tuple[MemoryMode, ...] = ("auto", "on", "off")
Works: TypeAlias = "list[dist.Work | None]"


class Transfer(NamedTuple):
    """Messages to exchange. Both tensors are contiguous and in rank order.

    The counts are the elements of each rank's message. They are empty if all are equal.
    """

    output: Tensor
    input: Tensor
    output_counts: list[int]
    input_counts: list[int]


class Group:
    """A process group with its name, its buffers and its shared memory."""

    def __init__(
        self,
        process_group: dist.ProcessGroup,
        name: str = "",
        diagnosis: Diagnosis | None = None,
        *,
        memory: MemoryMode | None = None,
    ) -> None:
        """Wraps a process group.

        Args:
            process_group: what exchanges.
            name: what errors call it.
            diagnosis: compares what the ranks are about to do; None: nobody does.
            memory: whether ranks of one host write into each other's memory: "auto" where all can,
                "on" is an error on all ranks where one cannot, "off" not at all. The ranks may
                differ in it. None: not at all, and the same on all ranks.
        """
        self.name = name
        self.buffers = WireBuffers()
        self.diagnosis = diagnosis
        self.memory: HostMemory | None = None
        self.refusal = "it is for communicators on the CPU" if memory is None else ""
        self._memory_mode = memory
        self.operator_name = ""  # by which compiled code finds this, once memory is connected
        self._insists_on_memory = False  # some rank does
        self.last_call: int | None = None  # the number of the last call by memory
        self._asked: Facts | None = None
        self._asked_of: int | None = None
        self._process_group: dist.ProcessGroup | None = process_group
        self._rank = process_group.rank()
        self._size = process_group.size()
        self._backends: dict[str, str] = {}
        self._waiting = AllToAllOptions()
        self._waiting.asyncOp = False

    @staticmethod
    def of(group: dist.ProcessGroup | Group) -> Group:
        """Returns `group` itself, or wraps a process group for one call."""
        return group if isinstance(group, Group) else Group(group)

    def close(self) -> None:
        """Lets go of the process group, the buffers and the memory.

        A graph that still holds this object then keeps none of them alive. If a gloo group lives
        until the interpreter ends, torch 2.13 may abort.
        """
        self.buffers.clear()
        if self.diagnosis is not None:
            self.diagnosis.close()
        if self.memory is not None:
            self.memory.close()
            self.memory = None
            self.refusal = "the communicator was destroyed"
        self._process_group = None

    def rank(self) -> int:
        """This process's rank in the group."""
        return self._rank

    def size(self) -> int:
        """P, the number of ranks in the group."""
        return self._size

    @property
    def place(self) -> str:
        """This rank in its group, for errors."""
        return place(self._rank, self._size, self.name)

    def validate(self, validate: Validate) -> None:
        """Sets which calls the ranks compare."""
        if self.diagnosis is not None:
            self.diagnosis.set_validate(validate)

    def where(self, op: str) -> str:
        """Names the call, the rank and the group, for errors."""
        return where(op, self._rank, self._size, self.name)

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The process group.

        Raises:
            ClosedError: this object was closed.
        """
        if self._process_group is None:
            raise ClosedError("the communicator was destroyed before a backward that needs it")
        return self._process_group

    @property
    def is_strict(self) -> bool:
        """Whether strides are compared too."""
        return self.diagnosis is not None and self.diagnosis.validate == "always"

    def connects_memory(self) -> bool:
        """Whether the ranks write into each other's memory; their first call connects it."""
        if self.memory is not None:
            return True
        if self._memory_mode is None or self._size == 1:
            return False
        if self._may_connect():
            # A rank that does not want memory must say so: it is not known to the others.
            own = MEMORY_MODES.index(self._memory_mode)
            modes = [MEMORY_MODES[index] for (index,) in self._everyone(bytes([own]))]
            self._insists_on_memory = "on" in modes
            self.memory, self.refusal = HostMemory.connect(
                self._rank,
                self._size,
                self._everyone,
                timeout=group_timeout(self.process_group),
                name=self.name,
                enabled=self._memory_mode != "off",
            )
        if self.refusal and self._insists_on_memory:
            raise CollectiveError(f"{self.where('connecting memory')} failed: {self.refusal}")
        return self.memory is not None

    def _may_connect(self) -> bool:
        """Whether the ranks have not decided yet."""
        return self._memory_mode is not None and self._size > 1 and not self.refusal

    def memory_stats(self) -> MemoryStats:
        """What this rank's outputs take, or why memory is not used."""
        memory = self.memory
        if memory is None:
            return MemoryStats(0, 0, 0, self.refusal)
        return MemoryStats(memory.bytes_in_use, memory.high_water_bytes, memory.num_segments, "")

    def _everyone(self, payload: bytes) -> list[bytes]:
        """Gathers the payloads of all ranks; all have the same length."""
        own = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        output = own.new_empty((self._size, len(payload)))
        self.all_gather(output, own)
        return [bytes(row.tolist()) for row in output]

    def before(
        self,
        op: str,
        tensors: Tensor | Sequence[Tensor],
        arguments: Sequence[Any],
        *,
        sends: bool = True,
        **named: Any,
    ) -> Facts | None:
        """Lets the ranks compare what they are about to do; by memory, the next call compares it.

        Returns:
            By memory, an op that `sends` nothing is compared in a call of its own: the facts for
            that call. Otherwise None.
        """
        if self.memory is None and self.diagnosis is not None:
            self.diagnosis.before(op, tensors, arguments, **named)
        if self.memory is None and not self._may_connect():
            return None
        asked = facts_of(op, tensors, arguments, has_strides=True, **named)
        if sends:
            self._asked = asked  # in the first call too, which connects memory
            return None
        if self.memory is None:
            return None
        return asked if self._compares_what_sends_nothing() else None

    def before_backward(
        self,
        op: str,
        gradients: Tensor | Sequence[Tensor],
        arguments: Sequence[Any],
        *,
        of_call: int | None,
        **named: Any,
    ) -> None:
        """As `before`, for the collective by which the backward of `op` begins.

        `of_call` is the number of the forward's call: of two backwards that ask for the same, the
        ranks might begin with different ones, and their gradients would be exchanged for each
        other.
        """
        if self.memory is not None:
            self._asked_of = of_call
            self._asked = facts_of(f"{op} backward", gradients, arguments, **named)
        elif self.diagnosis is not None:
            self.diagnosis.before_backward(op, gradients, arguments, **named)

    def before_pair(
        self, op: Literal["send", "recv"], shape: Sequence[int], dtype: torch.dtype, peer: int
    ) -> None:
        """Lets two ranks compare a send with its recv. See `Diagnosis.before_pair`."""
        if self.memory is None and self.diagnosis is not None:
            self.diagnosis.before_pair(op, shape, dtype, peer)

    def failed(self, op: str, error: Exception) -> None:
        """Tells the others that this rank's arguments were bad. See `Diagnosis.failed`."""
        if self.memory is not None:
            # The others make no call for it, so that this rank must not count one.
            is_alone = op == "slice" and not self._compares_what_sends_nothing()
            if op not in ("send", "recv") and not is_alone:
                record = Record(op, error=f"{type(error).__name__}: {error}")
                self.memory.fail_next(record.encode())
        elif self.diagnosis is not None:
            self.diagnosis.failed(op, error)

    def _compares_what_sends_nothing(self) -> bool:
        """Whether the op that begins now and sends nothing is compared; counts it."""
        diagnosis = self.diagnosis
        return diagnosis is not None and diagnosis.validate != "off" and diagnosis.counted()

    def take_asked(self) -> Facts | None:
        """Returns what `before` was told about the call that begins now, and forgets it."""
        asked, self._asked = self._asked, None
        return asked

    def take_asked_of(self) -> int | None:
        """The number of the call whose backward begins now."""
        call, self._asked_of = self._asked_of, None
        return call

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
        """Makes one even transfer and waits for it."""
        output, input_ = moved(output), moved(input_)
        try:
            work = self.process_group.alltoall_base(output, input_, [], [], self._waiting)
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
        options = ReduceScatterOptions()
        options.asyncOp = False
        self._finish(
            "reduce_scatter",
            lambda group: [group._reduce_scatter_base(reduced(output), reduced(input_), options)],
        )

    def all_reduce(self, tensor: Tensor, op: ReduceOp) -> None:
        """Reduces `tensor` in place."""
        options = AllreduceOptions()
        options.asyncOp = False
        average_here = bool(op == dist.ReduceOp.AVG) and not self._averages(tensor.device)
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
        """Rank `src`'s `tensor` into that of every rank."""
        options = BroadcastOptions()
        options.rootRank = src
        self._finish("broadcast", lambda group: [group.broadcast([moved(tensor)], options)])

    def reduce(self, tensor: Tensor, dst: int) -> None:
        """The sum over ranks into `tensor` on rank `dst`; elsewhere it is undefined afterwards."""
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

    def _averages(self, device: torch.device) -> bool:
        return self._named("all_reduce", lambda group: self._backend(group, device)) == "nccl"

    def _backend(self, group: dist.ProcessGroup, device: torch.device) -> str:
        if device.type not in self._backends:
            self._backends[device.type] = group._get_backend(device).name()
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
            return ClosedError(f"{self.where(op)}: {error}")
        return CollectiveError(f"{self.where(op)} failed: {error}")


class OperatorGroup(NamedTuple):
    """The form of a group with connected memory that compiled code holds."""

    process_group: dist.ProcessGroup
    name: str

    def rank(self) -> int:
        """This process's rank in the group."""
        return self.process_group.rank()

    def size(self) -> int:
        """P, the number of ranks in the group."""
        return self.process_group.size()


AnyGroup: TypeAlias = "dist.ProcessGroup | OperatorGroup | Group"
