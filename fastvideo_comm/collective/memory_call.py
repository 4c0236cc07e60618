"""A call by memory: how it is started, what its ranks compare, and what its errors say."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..diagnosis.record import (
    Facts,
    Record,
    dtype_text,
    question_of,
    record_of,
    shape_text,
    table,
)
from ..errors import ClosedError, CommunicationError, MismatchError
from ..kernels import copy_all_valid_, copy_valid_
from ..memory.device import DeviceFlight
from ..memory.host import Ask, Flight, HostMemory, Mismatch, Place, Posted, Spec
from ..profiling import span
from .group import Group

AnyFlight: TypeAlias = "Flight | DeviceFlight"
# Pairs of tensors of one shape: to, from.
Copies: TypeAlias = "list[tuple[Tensor, Tensor]]"


class Work:
    """A call in flight: its outputs, and what is left to do when the outputs are complete."""

    __slots__ = ("_complete", "_flight", "_group", "_op", "_outputs")

    def __init__(
        self,
        group: Group,
        op: str,
        flight: AnyFlight,
        outputs: list[Tensor],
        complete: Callable[[], None] | None = None,
    ) -> None:
        """Takes a call that has started; `complete` is called when the outputs have arrived."""
        self._group = group
        self._op = op
        self._flight = flight
        self._outputs = outputs
        self._complete = complete

    def wait(self) -> list[Tensor]:
        """Waits for the outputs and returns them; called once."""
        with span("exchange", self._group.name):
            wait_for(self._group, self._op, self._flight)
        if self._complete is not None:
            with span("unpack", self._group.name):
                self._complete()
        return self._outputs

    def is_completed(self) -> bool:
        """Whether `wait` would return at once."""
        return self._flight.is_completed()


def nothing(*_: object) -> list[Any]:
    """No outputs, and nothing to copy."""
    return []


def run_call(
    group: Group,
    facts: Facts,
    inputs: Sequence[Tensor],
    specs_of: Callable[[int], list[Spec]],
    copies: Callable[[int, Sequence[Tensor]], Copies],
    targets: Sequence[int] | None = None,
    sources: Sequence[int] | None = None,
) -> list[Tensor]:
    """Starts a call as `start_call` does, waits for it, and returns this rank's outputs."""
    outputs, flight = start_call(group, facts, inputs, specs_of, copies, targets, sources)
    with span("exchange", group.name):
        wait_for(group, facts[0], flight)
    return outputs


def start_call(
    group: Group,
    facts: Facts,
    inputs: Sequence[Tensor],
    specs_of: Callable[[int], list[Spec]],
    copies: Callable[[int, Sequence[Tensor]], Copies],
    targets: Sequence[int] | None = None,
    sources: Sequence[int] | None = None,
    *,
    layout: Hashable = None,
    async_op: bool = False,
) -> tuple[list[Tensor], AnyFlight]:
    """A call of all ranks. What the op's caller asked for is compared, where it is known.

    Args:
        group: the group.
        facts: what the ranks compare.
        inputs: what this rank sends. Calls with the same `facts`, `layout` and strides of the
            inputs copy the same parts.
        specs_of: `specs_of(rank)` gives shape and dtype of the outputs of a rank.
        copies: `copies(target, outputs)` gives what this rank copies into the outputs of a target:
            a part of the first input, and so on.
        targets: the ranks that this rank writes to; None: all.
        sources: the ranks that write to this rank; None: all.
        layout: what decides on the copies and is not among the facts.
        async_op: a thread copies, whether or not somebody waits.

    Returns:
        This rank's outputs, which are complete after the flight.
    """
    everyone = range(group.size())
    if targets is None:
        targets = everyone
    on_gpu, op, key = group.device_memory, facts[0], (facts, layout)
    if on_gpu is not None:
        try:
            agreed = functools.partial(question_of, facts, strict=False)
            launched = on_gpu.start(
                key, inputs, agreed, specs_of, copies, targets, async_op=async_op
            )
        except CommunicationError as error:
            raise group.named(op, error) from None
        return launched.outputs, launched
    memory = memory_of(group)
    plan = memory.plan(key, inputs, specs_of, copies, targets)
    posted = allocate(group, op, plan.specs)

    impl = group.copies_on_cpu

    def deliver(target: int, place: Place) -> None:
        copy_all_valid_(memory.pairs(plan, inputs, target, place), impl=impl)

    asked, asked_of = group.take_asked() or facts, group.take_asked_of()
    question = question_of(asked, strict=group.is_strict)
    if asked_of is not None:
        question += b" of call %d" % asked_of
    if sources is None:
        sources = everyone if posted.tensors else ()

    def detail() -> bytes:
        return record_of(asked).of_call(asked_of).encode()

    ask = Ask(
        asked[0],
        question,
        question,
        deliver,
        detail,
        posted=posted,
        sources=sources,
        targets=targets,
    )
    flight = memory.start(ask, background=async_op)
    group.last_call = flight.key[1]
    return posted.tensors, flight


def run_pair(
    group: Group,
    op: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    peer: int,
    sent: Tensor | None,
) -> list[Tensor]:
    """Makes a send of a tensor, or a recv; returns what was received.

    The peer must make the opposite one, with this shape and dtype.
    """
    memory, rank = memory_of(group), group.rank()
    src, dst = (rank, peer) if op == "send" else (peer, rank)
    other = "recv" if op == "send" else "send"
    specs: list[Spec] = [(shape, dtype)]
    posted = allocate(group, op, specs, (rank, peer)) if sent is None else None
    records = {
        each: Record(each, shape_text(shape), dtype_text(dtype), arguments=f"{src} -> {dst}")
        for each in (op, other)
    }

    def deliver(target: int, place: Place) -> None:
        if sent is not None:
            copy_valid_(memory.tensors_at(target, place, specs)[0], sent)

    ask = Ask(
        op,
        records[op].encode(),
        records[other].encode(),
        deliver,
        records[op].encode,
        ranks=(rank, peer),
        posted=posted,
        sources=(peer,) if sent is None else (),
        targets=() if sent is None else (peer,),
    )
    with span("exchange", group.name):
        wait_for(group, op, memory.start(ask))
    return [] if posted is None else posted.tensors


def memory_of(group: Group) -> HostMemory:
    """The connected memory; a ClosedError where the communicator was destroyed meanwhile."""
    if group.memory is None:
        raise ClosedError(f"{group.where('a call')}: the communicator was destroyed during it")
    return group.memory


def allocate(
    group: Group, op: str, specs: list[Spec], ranks: tuple[int, int] | None = None
) -> Posted:
    """Outputs; where there is no memory for them the others hear it, or the other of a pair."""
    memory = memory_of(group)
    try:
        return memory.allocate(specs)
    except MemoryError as error:
        memory.fail_next(str(error).encode(), ranks, failure="memory")
        raise MemoryError(f"{group.where(op)}: {error}") from None


def wait_for(group: Group, op: str, flight: AnyFlight) -> None:
    """Waits; adds op and rank to an error."""
    if isinstance(flight, DeviceFlight):  # the stream waits, and not the host
        try:
            flight.wait()
        except CommunicationError as error:
            raise group.named(op, error) from None
        return
    try:
        flight.wait()
    except Mismatch as mismatch:
        records = {rank: Record.decode(text) for rank, text in sorted(mismatch.details.items())}
        # None where all that was heard agrees: the rank that does not has left without a word.
        lines = table(records, strict=group.is_strict) or str(records[group.rank()])
        silent = [str(rank) for rank in sorted(flight.others) if rank not in records]
        if silent:
            lines += f"\nand no word in time from rank {', '.join(silent)}"
        raise MismatchError(
            f"{group.where(op)}: the ranks must ask for the same thing in call "
            f"{flight.key[1]}, got\n{lines}"
        ) from None
    except CommunicationError as error:
        raise group.named(op, error) from None
