"""Exchange by memory for ranks of one host, on the CPU.

The interface:

- `HostMemory.connect(rank, world_size, everyone, timeout=, name=, enabled=)`: collective. Gives
  `(memory, "")` on all ranks, or `(None, refusal)` on all ranks; the refusal names a rank and why.
- `memory.allocate(specs)`: outputs that the others can write to, `Posted(tensors, place)`.
- `memory.tensors_at(rank, place, specs)`: the outputs of a rank as this rank sees them.
- `memory.plan(asked, inputs, specs_of, copies_of, targets)`: what a call, and later ones like it,
  copy; `memory.pairs(plan, inputs, rank, place)`: those copies into the outputs of a rank.
- `memory.start(ask, background=False)`: posts a call (`Ask`, in `flight.py`) and returns its
  `Flight`. It raises nothing but ClosedError and interrupts; `flight.wait()` raises the rest. With
  `background=True` a thread moves the flight on, so it need not be waited for.
- `memory.fail_next(text, ranks=None, failure="arguments")`: this rank cannot make its next call.
- `memory.close()`: fails the calls in the air, and tells the other ranks.
- `memory.pool`: the memory of this rank, and how much of it is in use.

`Flight.wait` raises `Mismatch` (with the details of all ranks), `PeerLostError`,
`CommunicationTimeoutError`, `CollectiveError`, `ClosedError`, or what `deliver` raised on this
rank. After each of these errors the memory can be used again by calls whose ranks are all alive.

This module assumes what every group assumes: all ranks make the same calls in the same order. The
calls of each pair of ranks (`Ask.ranks`) are counted apart.
"""

from __future__ import annotations

import atexit
import math
import os
import threading
import weakref
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CollectiveError
from . import line, memfd
from .deliveries import CopiesOf, Part, Spec, SpecsOf, keep, layout_of, parts_of
from .engine import Engine
from .flight import Ask, Flight, Mismatch, Place, Posted
from .introduction import Everyone, introduce
from .line import Line, Record
from .memfd import Segment, aligned
from .segment import RESERVE_BYTES, Pool

__all__ = ["Ask", "Flight", "HostMemory", "Mismatch", "Place", "Posted", "Spec"]

# What `fail_next` may give as the reason.
_FAILURES = {
    "arguments": line.ARGUMENTS,
    "interrupted": line.INTERRUPTED,
    "memory": line.MEMORY,
}


class Plan(NamedTuple):
    """What all calls have in common that ask for the same with inputs of the same layout.

    Attributes:
        specs: shape and dtype of this rank's outputs.
        parts: for each target the bytes of its outputs, and the parts that are not empty, each with
            the number of its input.
    """

    specs: list[Spec]
    parts: dict[int, tuple[int, list[tuple[int, Part]]]]


class HostMemory:
    """The memory of the ranks of one host, and their calls.

    Example:
        >>> import torch
        >>> everyone = lambda payload: [payload]
        >>> memory, _ = HostMemory.connect(0, 1, everyone, timeout=10, name="alone")
        >>> specs = [((2, 3), torch.float32)]
        >>> posted = memory.allocate(specs)
        >>> def deliver(rank, place):
        ...     memory.tensors_at(rank, place, specs)[0].fill_(7)
        >>> ask = Ask("fill", b"fill", b"fill", deliver, lambda: b"", posted=posted, targets=[0])
        >>> memory.start(ask).wait()
        >>> posted.tensors[0].sum().item()
        42.0
        >>> memory.close()
    """

    @classmethod
    def connect(
        cls,
        rank: int,
        world_size: int,
        everyone: Everyone,
        *,
        timeout: float,
        name: str,
        enabled: bool = True,
        reserve_bytes: int = RESERVE_BYTES,
    ) -> tuple[HostMemory | None, str]:
        """Connects the ranks of a group, all or none.

        Args:
            rank: This rank.
            world_size: How many ranks the group has.
            everyone: `everyone(payload)` gives what every rank gave, in rank order; all payloads
                of a call have one length.
            timeout: Seconds that a call may take, from its start to its end on this rank.
            name: The name of the group in errors.
            enabled: False where this rank does not want to share memory.
            reserve_bytes: Free memory that is kept; more than that is given back to the system.

        Returns:
            The memory and an empty string; or None and the reason, the same on all ranks.
        """
        lines, refusal = introduce(rank, world_size, everyone, timeout=timeout, enabled=enabled)
        if refusal:
            return None, refusal
        memory = cls(
            rank, world_size, lines, timeout=timeout, name=name, reserve_bytes=reserve_bytes
        )
        return memory, ""

    def __init__(
        self,
        rank: int,
        world_size: int,
        lines: dict[int, Line],
        *,
        timeout: float,
        name: str,
        reserve_bytes: int,
    ) -> None:
        """Takes over the lines; `connect` makes them."""
        self.rank, self.world_size = rank, world_size
        self._engine = Engine(
            rank, lines, timeout=timeout, name=name, add_segment=self._add_segment
        )
        self.pool = Pool(self._new_segment, reserve_bytes=reserve_bytes)
        self._segments: dict[tuple[int, int], _PeerSegment] = {}
        self._plans: dict[Hashable, Plan] = {}
        reference = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _forked(reference))
        self._at_exit = lambda: _close(reference)
        atexit.register(self._at_exit)

    def allocate(self, specs: Sequence[Spec]) -> Posted:
        """Contiguous tensors of this rank that the other ranks can write to.

        Their values are undefined. The memory of a tensor is not used again while anyone holds the
        storage of the tensor.

        Args:
            specs: Shape and dtype of each tensor.

        Raises:
            MemoryError: The system has no more memory; the message names bytes and limits.
        """
        self._engine.check()
        run = self.pool.allocate([math.prod(shape) * dtype.itemsize for shape, dtype in specs])
        return Posted(_tensors(run.views, specs), Place(run.segment, run.offset))

    def tensors_at(self, rank: int, place: Place, specs: Sequence[Spec]) -> list[Tensor]:
        """The outputs that a rank has posted, as this rank sees them.

        Args:
            rank: The rank that posted them.
            place: The place in the post of that rank.
            specs: The specs with which that rank allocated them.

        Raises:
            CollectiveError: This process could not map that memory; the message says why.
        """
        sizes = _sizes(specs)
        if not sum(sizes):
            return [_empty(shape, dtype) for shape, dtype in specs]
        segment, start = self._segment_at(rank, place, sum(sizes)), place.offset
        tensors = []
        for (shape, dtype), num_bytes in zip(specs, sizes, strict=True):
            if num_bytes:
                tensors.append(segment.tensor(start, shape, dtype))
                start += num_bytes
            else:
                tensors.append(_empty(shape, dtype))
        return tensors

    def plan(
        self,
        asked: Hashable,
        inputs: Sequence[Tensor],
        specs_of: SpecsOf,
        copies_of: CopiesOf,
        targets: Sequence[int],
    ) -> Plan:
        """Plans a call: what its copies have in common with those of later calls.

        Args:
            asked: What is asked for. The three arguments behind `inputs` are looked at once for
                each `asked` and layout of the inputs.
            inputs: What this rank sends.
            specs_of: `specs_of(rank)` gives shape and dtype of the outputs of a rank.
            copies_of: `copies_of(target, outputs)` gives pairs (to, from): what this rank copies
                into the outputs of a target. `outputs` have no memory, only layouts. The first pair
                is for a part of the first input, and so on.
            targets: The ranks that this rank writes to.
        """
        key = asked, layout_of(inputs)
        plan = self._plans.get(key)
        if plan is None:
            parts = {
                target: (
                    sum(_sizes(specs_of(target))),
                    [each for each in parts if math.prod(each[1].shape)],
                )
                for target, parts in parts_of(inputs, specs_of, copies_of, targets).items()
            }
            plan = keep(self._plans, key, Plan(specs_of(self.rank), parts))
        return plan

    def pairs(
        self, plan: Plan, inputs: Sequence[Tensor], rank: int, place: Place
    ) -> list[tuple[Tensor, Tensor]]:
        """What this rank copies into the outputs that a rank has posted: pairs (to, from).

        Raises:
            CollectiveError: This process could not map that memory; the message says why.
        """
        num_bytes, parts = plan.parts[rank]
        if not parts:
            return []
        segment, pairs = self._segment_at(rank, place, num_bytes), []
        for index, (shape, strides, begin, _, offset, target_strides) in parts:
            input_ = inputs[index]
            to = segment.strided(place.offset + offset, shape, target_strides, input_.dtype)
            pairs.append((to, input_.as_strided(shape, strides, input_.storage_offset() + begin)))
        return pairs

    def start(self, ask: Ask, *, background: bool = False) -> Flight:
        """Posts a call, and returns without waiting.

        Args:
            ask: What this rank asks for.
            background: A thread moves the call on, whether or not it is waited for. Otherwise
                somebody must wait for it.

        Raises:
            ClosedError: The memory was closed, or belongs to the process that this one was forked
                from.
        """
        return self._engine.start(ask, background=background)

    def fail_next(
        self, text: bytes, ranks: tuple[int, int] | None = None, *, failure: str = "arguments"
    ) -> None:
        """Gives this rank's next call up before it has started, and tells the others.

        Args:
            text: What the others are told: in a CollectiveError, or as this rank's detail of a
                mismatch if `failure` is "arguments".
            ranks: As `Ask.ranks`.
            failure: "arguments", "interrupted" or "memory".

        Raises:
            ClosedError: As `start`.
        """
        if failure not in _FAILURES:
            raise ValueError(f"failure must be one of {sorted(_FAILURES)}, got {failure!r}")
        self._engine.fail_next(_FAILURES[failure], text, ranks)

    def close(self) -> None:
        """Fails the calls in the air, tells the others, and closes sockets and segments.

        Tensors that are still held stay as they are.
        """
        atexit.unregister(self._at_exit)
        self._engine.close()
        self._close_segments()

    def _forget(self) -> None:
        """Closes everything in a forked child, except for the memory of its tensors."""
        self._engine.forget()
        self._close_segments()

    def _close_segments(self) -> None:
        self.pool.close()
        for segment in self._segments.values():
            segment.close()
        self._segments = {}

    def _new_segment(self, num_bytes: int) -> Segment:
        descriptor = memfd.create(num_bytes)
        try:
            segment = Segment(descriptor, num_bytes)
        except BaseException:
            os.close(descriptor)
            raise
        record = Record(line.SEGMENT, segment=len(self.pool.segments), number=num_bytes)
        self._engine.announce([record.pack()], descriptor)
        return segment

    def _add_segment(self, rank: int, record: Record, descriptor: int) -> None:
        key = (rank, record.segment)
        known = self._segments.get(key)
        if known is not None:
            # After an interrupt on that rank the record comes twice, or its segment was made anew.
            if descriptor in (-1, known.descriptor):
                return
            known.close()
        self._segments[key] = _PeerSegment(descriptor, record.number)

    def _segment_at(self, rank: int, place: Place, num_bytes: int) -> Segment:
        """The segment of a place; the bytes there are mapped in this process."""
        number, start = place
        if rank == self.rank:
            return self.pool.segments[number]
        try:
            segment = self._segments[rank, number].mapped()
        except (OSError, KeyError) as error:
            raise CollectiveError(
                f"rank {self.rank} cannot map segment {number} of rank {rank}: {error}",
                peers=(rank,),
            ) from None
        segment.populate(start, start + num_bytes)
        return segment


class _PeerSegment:
    """A segment of another rank, which is mapped when it is first needed."""

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        self.descriptor = descriptor
        self._num_bytes = num_bytes
        self._segment: Segment | None = None
        self._lock = threading.Lock()  # two threads may be the first to copy into it

    def mapped(self) -> Segment:
        segment = self._segment
        if segment is not None:
            return segment
        with self._lock:
            if self._segment is None:
                if self.descriptor < 0:
                    raise OSError("its descriptor was lost: too many open files (RLIMIT_NOFILE)")
                self._segment = Segment(self.descriptor, self._num_bytes)
                self.close()
            return self._segment

    def close(self) -> None:
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _tensors(views: Sequence[memoryview | None], specs: Sequence[Spec]) -> list[Tensor]:
    return [
        # Not a view: a view that an autograd Function returns cannot be written in place.
        torch.frombuffer(view, dtype=dtype).resize_(shape)
        if view is not None
        else _empty(shape, dtype)
        for view, (shape, dtype) in zip(views, specs, strict=True)
    ]


def _sizes(specs: Sequence[Spec]) -> list[int]:
    """The bytes from each output to the next."""
    return [aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in specs]


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")


def _forked(reference: weakref.ref[HostMemory]) -> None:
    memory = reference()
    if memory is not None:
        memory._forget()


def _close(reference: weakref.ref[HostMemory]) -> None:
    memory = reference()
    if memory is not None:
        memory.close()
