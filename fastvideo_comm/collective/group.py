"""A process group, its exchanges of contiguous messages, and the buffers that they reuse.

Calls c10d's process group itself: the wrappers in `torch.distributed` and the functional
collectives cost several times more per call. Assumes what every backend assumes: all ranks of the
group make the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import (
    AllgatherOptions,
    AllreduceOptions,
    AllToAllOptions,
    GatherOptions,
    ReduceScatterOptions,
)

from ..errors import ClosedError, CollectiveError
from . import shared_memory
from .buffers import WireBuffers
from .shared_memory import SharedMemory, Window, aligned_bytes
from .validation import ReduceOp

if TYPE_CHECKING:
    from ..diagnosis import Diagnosis

# What gloo and NCCL both move; the rest (fp8, int16, complex, ..) travels as bytes.
_MOVABLE = frozenset(
    {
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    }
)


T = TypeVar("T")
Works: TypeAlias = "list[dist.Work | None]"


class Transfer(NamedTuple):
    """Message buffers to exchange: both contiguous, their messages in rank order.

    The counts are the elements of each rank's message; empty where all are equal.
    """

    output: Tensor
    input: Tensor
    output_counts: list[int]
    input_counts: list[int]


class _Closed:
    """In the place of the group of a closed channel."""

    def __getattr__(self, name: str) -> Any:
        raise ClosedError("the communicator was destroyed before a backward that needs it")


class Channel:
    """One group with its buffers, in the place of a `ProcessGroup` throughout this package."""

    def __init__(
        self, group: dist.ProcessGroup, name: str = "", *, shares_memory: bool = True
    ) -> None:
        """Wraps `group`; `name` is what errors call it.

        Ranks that share memory keep it until the channel is closed.
        """
        self.group = group
        self.name = name or group.group_desc
        self.buffers = WireBuffers()
        self.diagnosis: Diagnosis | None = None  # compares what a backward does; None: nobody
        self._shared_memory = SharedMemory() if shares_memory else None
        self._rank = group.rank()
        self._size = group.size()
        self._backends: dict[str, str] = {}
        self._waiting = AllToAllOptions()
        self._waiting.asyncOp = False

    @staticmethod
    def of(group: Group) -> Channel:
        """`group` itself where it is a channel, else a channel for this one call."""
        return group if isinstance(group, Channel) else Channel(group, shares_memory=False)

    def close(self) -> None:
        """Lets go of the group and the buffers; graphs that hold this channel keep neither alive.

        A gloo group that lives until the interpreter ends makes torch 2.13 abort there.
        """
        self.buffers.clear()
        self._shared_memory = None
        self.group = _Closed()  # type: ignore[assignment] # answers every use with an error

    def rank(self) -> int:
        """This process's rank in the group."""
        return self._rank

    def size(self) -> int:
        """P, the number of ranks in the group."""
        return self._size

    @property
    def shares_memory(self) -> bool:
        """Whether large exchanges have gone through memory that the ranks share."""
        return self._shared_memory is not None and self._shared_memory.is_mapped

    def all_to_all(self, transfers: Sequence[Transfer], *, async_op: bool) -> Works:
        """Starts the transfers: one grouped call on NCCL, side by side on gloo."""
        options = AllToAllOptions()
        options.asyncOp = async_op or len(transfers) > 1

        def start() -> Works:
            return [
                self.group.alltoall_base(
                    _wire(to), _wire(from_), _units(to, to_counts), _units(to, counts), options
                )
                for to, from_, to_counts, counts in transfers
            ]

        device = transfers[0].output.device if transfers else None
        if device is None or len(transfers) == 1 or not self._coalesces(device):
            return self._named("all_to_all", start)

        def start_grouped() -> Works:
            self.group._start_coalescing(device)
            start()
            return [self.group._end_coalescing(device)]

        return self._named("all_to_all", start_grouped)

    def all_to_all_one(self, output: Tensor, input_: Tensor) -> None:
        """One even transfer, waited for."""
        try:
            work = self.group.alltoall_base(_wire(output), _wire(input_), [], [], self._waiting)
            if work is not None:
                work.wait()
        except ClosedError:
            raise
        except RuntimeError as error:
            raise self._failure("all_to_all", error) from error

    def may_share(self, *tensors: Tensor) -> bool:
        """Whether the ranks may trade such tensors through memory; the same on all of them."""
        num_bytes = 0
        for tensor in tensors:
            num_bytes += tensor.nbytes
        return (
            num_bytes >= shared_memory.MIN_SHARED_BYTES
            and tensors[0].is_cpu
            and self._shared_memory is not None
            and not self._shared_memory.is_refused
        )

    def window(self, *tensors: Tensor) -> Window | None:
        """Memory for such tensors in the part of each rank; None where it is not shared.

        All ranks ask together, for tensors of the same sizes. The first time, and when more is
        needed than before, that takes three small collectives.
        """
        memory = self._shared_memory
        if memory is None or not self.may_share(*tensors):
            return None
        num_bytes = sum(aligned_bytes(tensor) for tensor in tensors)

        def everyone(numbers: list[int]) -> list[list[int]]:
            own = torch.tensor(numbers, device="cpu")
            output = own.new_zeros((self._size, len(numbers)))
            self.all_gather(output, own)
            return output.tolist()

        if num_bytes > memory.capacity:
            # A rank that asks for less may have room, and hears this where it fills its part.
            self._agree(memory, num_bytes, lambda: None)
            memory.grow(num_bytes, everyone)
        return memory.window(num_bytes)

    def meet(self, window: Window, meanwhile: Callable[[], object]) -> None:
        """Waits until every rank has filled its part of the window."""
        if self._shared_memory is None:
            raise ClosedError("the communicator was destroyed during a call")
        self._agree(self._shared_memory, window.num_bytes, meanwhile)

    def _agree(self, memory: SharedMemory, num_bytes: int, meanwhile: Callable[[], object]) -> None:
        """Tells all ranks how much this one sends; waits to hear the same of each."""
        said = torch.full((self._size,), num_bytes, device="cpu")
        heard = said.clone()
        memory.turn()
        works = self.all_to_all([Transfer(heard, said, [], [])], async_op=True)
        meanwhile()
        self.wait("sharing memory", works)
        sizes = heard.tolist()
        if any(size != num_bytes for size in sizes):
            text = ", ".join(map(str, sizes))
            raise self._failure("sharing memory", f"all ranks must send as much, got {text} bytes")

    def wait(self, op: str, works: Works) -> None:
        """Waits for what a method of this class started."""

        def wait() -> None:
            for work in works:
                if work is not None:  # None: the backend is in order with the current stream
                    work.wait()

        self._named(op, wait)

    def all_gather(self, output: Tensor, input_: Tensor) -> None:
        """Every rank's `input_` into `output [P, *input_.shape]`."""
        options = AllgatherOptions()
        options.asyncOp = False
        self._finish(
            "all_gather",
            lambda: [self.group._allgather_base(_wire(output), _wire(input_), options)],
        )

    def reduce_scatter(self, output: Tensor, input_: Tensor) -> None:
        """The sum over ranks of `input_[this rank]` into `output`; `input_` is `[P, *shape]`."""
        options = ReduceScatterOptions()
        options.asyncOp = False
        output, input_ = _real(output), _real(input_)
        self._finish(
            "reduce_scatter",
            lambda: [self.group._reduce_scatter_base(output, input_, options)],
        )

    def all_reduce(self, tensor: Tensor, op: ReduceOp) -> None:
        """Reduces `tensor` in place."""
        options = AllreduceOptions()
        options.asyncOp = False
        average_here = bool(op == dist.ReduceOp.AVG) and not self._averages(tensor.device)
        reduce_op: Any = dist.ReduceOp.SUM if average_here else op  # either type is taken
        options.reduceOp = reduce_op
        self._finish("all_reduce", lambda: [self.group.allreduce([_real(tensor)], options)])
        if average_here:
            tensor.div_(self._size)

    def gather(self, outputs: Sequence[Tensor], input_: Tensor, dst: int) -> None:
        """Every rank's `input_` into `outputs` on rank `dst`; elsewhere `outputs` is empty."""
        options = GatherOptions()
        options.rootRank = dst
        targets = [[_wire(output) for output in outputs]] if outputs else []
        self._finish("gather", lambda: [self.group.gather(targets, [_wire(input_)], options)])

    def send(self, tensor: Tensor, dst: int) -> None:
        """Sends a contiguous tensor to rank `dst`; returns when its memory may be reused."""
        self._finish("send", lambda: [self.group.send([_wire(tensor)], dst, 0)])

    def recv(self, tensor: Tensor, src: int) -> None:
        """Receives into a contiguous tensor from rank `src`."""
        self._finish("recv", lambda: [self.group.recv([_wire(tensor)], src, 0)])

    def _coalesces(self, device: torch.device) -> bool:
        return self.group._get_backend(device).supports_coalescing

    def _averages(self, device: torch.device) -> bool:
        return self._backend(device) == "nccl"

    def _backend(self, device: torch.device) -> str:
        if device.type not in self._backends:
            self._backends[device.type] = self.group._get_backend(device).name()
        return self._backends[device.type]

    def _finish(self, op: str, start: Callable[[], Works]) -> None:
        self.wait(op, self._named(op, start))

    def _named(self, op: str, call: Callable[[], T]) -> T:
        """Says which op on which rank it was that failed."""
        try:
            return call()
        except ClosedError:
            raise
        except RuntimeError as error:
            raise self._failure(op, error) from error

    def _failure(self, op: str, error: Exception | str) -> CollectiveError:
        where = f"rank {self._rank} of {self._size} in group {self.name!r}"
        return CollectiveError(f"{op} on {where} failed: {error}")


Group: TypeAlias = "dist.ProcessGroup | Channel"


def plain(tensor: Tensor) -> Tensor:
    """`tensor` whose memory is its values: not lazily conjugated or negated."""
    if torch.compiler.is_compiling() or tensor.is_conj() or tensor.is_neg():
        return tensor.resolve_conj().resolve_neg()
    return tensor


def _wire(tensor: Tensor) -> Tensor:
    """The elements of a contiguous tensor in a row, in a dtype that every backend moves."""
    flat = tensor.view(-1)
    if tensor.dtype in _MOVABLE:
        return flat
    # A single element is contiguous with any stride, and cannot be viewed as bytes with it.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)


def _units(tensor: Tensor, counts: list[int]) -> list[int]:
    """Counts of elements as counts of what `_wire` sends."""
    if tensor.dtype in _MOVABLE:
        return counts
    return [count * tensor.element_size() for count in counts]


def _real(tensor: Tensor) -> Tensor:
    """The elements of a contiguous tensor in a row, in a dtype that every backend adds."""
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).view(-1)
