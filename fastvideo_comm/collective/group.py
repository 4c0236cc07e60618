"""A group of ranks: its calls, its buffers and its memory, and what its ranks compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from ..diagnosis import Diagnosis, Validate
from ..diagnosis.board import group_timeout
from ..diagnosis.record import Facts, Record, facts_of
from ..errors import CollectiveError, CommunicationError, place, where
from ..kernels import implementation_on_cpu
from ..memory.device import DeviceMemory, is_capturing
from ..memory.host import HostMemory
from ..profiling import MemoryStats
from .buffers import WireBuffers
from .c10d import C10d
from .device_connection import SEGMENT_BYTES, connect_device

MemoryMode: TypeAlias = Literal["auto", "on", "off"]
_VMAP = torch._C._functorch.TransformType.Vmap
# What ranks on GPUs do by memory.
_BY_DEVICE = ("all_to_all_4D", "all_gather", "reduce_scatter", "gather")
MEMORY_MODES: tuple[MemoryMode, ...] = ("auto", "on", "off")


class Group:
    """A process group with its name, its buffers and its shared memory."""

    def __init__(
        self,
        process_group: dist.ProcessGroup,
        name: str = "",
        diagnosis: Diagnosis | None = None,
        *,
        memory: MemoryMode | None = None,
        device: torch.device | None = None,
        memory_bytes: int = SEGMENT_BYTES,
    ) -> None:
        """Wraps a process group.

        Args:
            process_group: the process group that moves the messages.
            name: the name of the group in errors.
            diagnosis: compares the calls of the ranks; None: they are not compared.
            memory: whether ranks of one host write into each other's memory. "auto": if all ranks
                can. "on": the same, and an error on all ranks if one cannot. "off": never. The
                ranks may give different modes. None: never; all ranks must give None. On GPUs it
                is "on" or None.
            device: the GPU whose memory the others write to; None: ranks on the CPU.
            memory_bytes: how much of the GPU's memory.
        """
        self.name = name
        self.c10d = C10d(process_group, name)
        self.buffers = WireBuffers()
        self.copies_on_cpu = implementation_on_cpu()  # how tensors on the CPU are copied
        self.diagnosis = diagnosis
        self.memory: HostMemory | None = None
        self.device_memory: DeviceMemory | None = None
        self.refusal = "nobody has asked for it" if memory is None else ""
        self._memory_mode = memory
        self._may_connect = memory is not None and process_group.size() > 1  # not decided yet
        self._device = device
        self._memory_bytes = memory_bytes
        self.operator_name = ""  # compiled code finds this group by it, once memory is connected
        self._insists_on_memory = False  # whether the mode of some rank is "on"
        self.last_call: int | None = None  # the number of the last call, which its backward names
        self._asked: Facts | None = None
        self._asked_of: int | None = None
        self._rank = process_group.rank()
        self._size = process_group.size()

    def close(self) -> None:
        """Lets go of the process group, the buffers and the memory.

        A graph that still holds this object then keeps none of them alive.
        """
        self.buffers.clear()
        if self.diagnosis is not None:
            self.diagnosis.close()
        if self.memory is not None:
            self.memory.close()
            self.memory = None
            self.refusal = "the communicator was destroyed"
        if self.device_memory is not None:
            self.device_memory.close()
            self.device_memory = None
            self.refusal = "the communicator was destroyed"
        self.c10d.close()

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

    def named(self, op: str, error: CommunicationError) -> CommunicationError:
        """The same error with the call, the rank and the group in front."""
        return type(error)(f"{self.where(op)}: {error}", peers=error.peers)

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The process group.

        Raises:
            ClosedError: this object was closed.
        """
        return self.c10d.process_group

    @property
    def is_strict(self) -> bool:
        """Whether strides are compared too."""
        return self.diagnosis is not None and self.diagnosis.validate == "always"

    def connects_memory(self) -> bool:
        """Whether the ranks write into each other's memory; their first call connects it."""
        if self.memory is not None or self.device_memory is not None:
            return True
        if self._may_connect and self._device is not None:
            self._insists_on_memory = True
            self._connect_device(self._device)
        elif self._may_connect:
            # A rank that does not want memory must say so: it is not known to the others.
            own = MEMORY_MODES.index(self._memory_mode or "off")
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
            self._may_connect = False
        if self.refusal and self._insists_on_memory:
            raise CollectiveError(f"{self.where('connecting memory')} failed: {self.refusal}")
        return self.memory is not None or self.device_memory is not None

    def _connect_device(self, device: torch.device) -> None:
        if is_capturing(device):
            raise CollectiveError(
                f"{self.where('connecting memory')} must come before a capture: call `warmup`, or "
                "make one call of any op"
            )
        if device.index is None:
            device = torch.device(device.type, torch.cuda.current_device())
        self.device_memory, self.refusal = connect_device(
            self.process_group, self._everyone, device, self._memory_bytes, self.name
        )
        self._may_connect = False

    def memory_stats(self) -> MemoryStats:
        """What this rank's outputs take, or why memory is not used."""
        memory = self.memory or self.device_memory
        if memory is None:
            return MemoryStats(0, 0, 0, self.refusal)
        pool = memory.pool
        return MemoryStats(pool.bytes_in_use, pool.high_water_bytes, len(pool.segments), "")

    def _everyone(self, payload: bytes) -> list[bytes]:
        """Gathers the payloads of all ranks; all have the same length."""
        own = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        devices = self.process_group._device_types
        if self._device is not None and devices and torch.device("cpu") not in devices:
            own = own.to(self._device)
        output = own.new_empty((self._size, len(payload)))
        self.c10d.all_gather(output, own)
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
        """Lets the ranks compare what they ask for; by memory, the next call compares it.

        Returns:
            By memory, the facts of an op that does not send (`sends` is False) and that is compared
            in a call of its own. Otherwise None.
        """
        if self.device_memory is not None:  # saves a call elsewhere
            self._check_waits(op)
        if forward_ad._current_level >= 0:
            named["tangents"] = _has_tangents(tensors)
        if self.memory is None:
            if self.diagnosis is not None:
                if self._device is not None and self.device_memory is None:
                    named["memory"] = self._memory_mode  # ranks that differ in it must not go on
                self.last_call = self.diagnosis.before(op, tensors, arguments, **named)
            is_on_gpu = self._device is not None or self.device_memory is not None
            if is_on_gpu or not self._may_connect:
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

        `of_call` is the number of the forward's call. If two backwards ask for the same, the ranks
        might begin with different ones: without the number, their gradients would be mixed up.
        """
        self._check_waits(f"{op} backward")
        if forward_ad._current_level >= 0:
            named["tangents"] = _has_tangents(gradients)
        if self.memory is not None:
            self._asked_of = of_call
            self._asked = facts_of(f"{op} backward", gradients, arguments, **named)
        elif self.diagnosis is not None:
            self.last_call = self.diagnosis.before_backward(
                op, gradients, arguments, of_call=of_call, **named
            )

    def before_pair(
        self, op: Literal["send", "recv"], shape: Sequence[int], dtype: torch.dtype, peer: int
    ) -> None:
        """Lets two ranks compare a send with its recv. See `Diagnosis.before_pair`."""
        self._check_waits(op)
        if self.memory is None and self.diagnosis is not None:
            self.diagnosis.before_pair(op, shape, dtype, peer)

    def failed(self, op: str, error: Exception) -> None:
        """Tells the others that this rank's arguments were bad. See `Diagnosis.failed`."""
        if self.memory is not None:
            # The other ranks make no call for a `slice` that is not compared, so it is not counted.
            is_alone = op == "slice" and not self._compares_what_sends_nothing()
            if op not in ("send", "recv") and not is_alone:
                record = Record(op, error=f"{type(error).__name__}: {error}")
                self.memory.fail_next(record.encode())
            return
        is_compared = self.compares_next()
        if self.diagnosis is not None:
            self.diagnosis.failed(op, error)
        memory = self.device_memory
        if memory is not None and op in _BY_DEVICE and not is_compared:
            memory.give_up(f"{type(error).__name__}: {error}")

    def compares_next(self) -> bool:
        """Whether the ranks compare the next call before they send anything of it."""
        diagnosis = self.diagnosis
        return self.memory is not None or (diagnosis is not None and diagnosis.compares_next())

    def _compares_what_sends_nothing(self) -> bool:
        """Whether the op that begins now and sends nothing is compared; counts it."""
        diagnosis = self.diagnosis
        return diagnosis is not None and diagnosis.validate != "off" and diagnosis.counted()

    def _check_waits(self, op: str) -> None:
        """Raises if a rank did not come to an earlier call on the GPUs, whose result is wrong."""
        if self.device_memory is not None:
            try:
                self.device_memory.check_waits()
            except CommunicationError as error:
                raise self.named(op, error) from None

    def take_asked(self) -> Facts | None:
        """Returns what `before` was told about the call that begins now, and forgets it."""
        asked, self._asked = self._asked, None
        return asked

    def take_asked_of(self) -> int | None:
        """The number of the call whose backward begins now."""
        call, self._asked_of = self._asked_of, None
        return call


def _has_tangents(tensors: Tensor | Sequence[Tensor]) -> bool | None:
    """Whether a call takes tangents too, which the ranks compare; None: it does not."""
    if _VMAP in [each.key() for each in torch._C._functorch.get_interpreter_stack() or ()][:-2]:
        return None  # torch has no rule for `unpack_dual` there
    given = (tensors,) if isinstance(tensors, Tensor) else tensors
    return any(forward_ad.unpack_dual(each).tangent is not None for each in given) or None


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


class RecordedGroup(NamedTuple):
    """The two forms of a group that a call has which make_fx records."""

    group: Group
    traced: dist.ProcessGroup | OperatorGroup

    def rank(self) -> int:
        """This process's rank in the group."""
        return self.group.rank()

    def size(self) -> int:
        """P, the number of ranks in the group."""
        return self.group.size()


AnyGroup: TypeAlias = "dist.ProcessGroup | OperatorGroup | Group"
