"""How a public op runs: its errors, its profile, the comparison between ranks, its counters.

A communicator holds one `OpRunner`, and opens an `OpCall` for each call of an op. What a tiny call
does not need is left out: between real ranks, every line here takes ten times as long as in a loop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from time import perf_counter
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.distributed import ProcessGroup

from . import functions, gradient_buckets
from .collective import memory, validation
from .collective.group import Group
from .collective.layout import Split, Splits
from .collective.route import is_recording, route, route_of_pair, traced_form
from .errors import ClosedError, CommunicationError
from .forward_mode import EagerDuals, check_tangents
from .handle import AsyncHandle
from .profiling import Stats, span
from .recording import AsyncExchange, run


class OpRunner:
    """What all calls of one communicator share.

    Attributes:
        group: the group whose ranks call.
        is_alone: whether the group has one rank.
        device: where tensors must be.
        stats: the counters.
        is_open: whether the communicator was not destroyed.
    """

    def __init__(self, group: Group, device: torch.device, cpu_group: ProcessGroup) -> None:
        """Starts open. `cpu_group` has the same ranks and moves tensors of the CPU."""
        self.group = group
        self.is_alone = group.size() == 1
        self.device = device
        self._cpu_group: ProcessGroup | None = cpu_group
        self.stats = Stats()
        self.is_open = True

    def close(self) -> None:
        """Closes: every later call is an error."""
        self.is_open = False
        self._cpu_group = None
        self.group.close()

    def numbers_of_all_ranks(self, numbers: list[int]) -> list[list[int]]:
        """For each of this rank's numbers, what it is on every rank: one small all_gather.

        The answer is never kept for the next call: a rank whose own size did not change cannot know
        whether the size of another rank changed.
        """
        if self._cpu_group is None:
            raise ClosedError("the communicator was destroyed")
        same = self._cpu_group is self.group.process_group
        own = torch.tensor([numbers], device=self.device if same else "cpu")
        way, group = route(self.group if same else self._cpu_group)
        every: list[list[int]] = way.all_gather(group, own, Split(0)).T.tolist()
        return every

    def tell_others(self, op: str, error: Exception) -> None:
        """Tells the other ranks, if they can be reached: they would wait for this rank's call."""
        if not (torch.compiler.is_compiling() or is_recording()):
            with contextlib.suppress(CommunicationError):
                self.group.failed(op, error)


class OpCall:
    """One call of an op: a context that counts the call and names the op in its errors."""

    __slots__ = ("_begin", "_is_compared", "_is_traced", "_num_bytes", "_runner", "_span", "op")

    def __init__(self, runner: OpRunner, op: str) -> None:
        """Counts nothing yet."""
        self._runner = runner
        self.op = op
        self._span: AbstractContextManager[Any] | None = None
        self._is_compared = False
        self._is_traced = False
        self._num_bytes = 0

    def __enter__(self) -> OpCall:
        """Starts to count, unless the call is traced: a graph must not depend on counters."""
        if torch.compiler.is_compiling() or is_recording():
            self._is_traced = True
        else:
            if profiler._is_profiler_enabled:
                self._span = span(self.op, self._runner.group.name)
                self._span.__enter__()
            self._begin = perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Counts a call that succeeded; adds op, rank and group to an error of the caller."""
        if not self._is_traced:
            seconds = perf_counter() - self._begin
            if self._span is not None:
                self._span.__exit__(kind, error, traceback)
            if error is None:
                self._runner.stats.add_call(self.op, seconds, self._num_bytes)
        if error is None:
            return
        self._runner.group.take_asked()
        # Raises the class itself: a subclass may have a constructor that takes no text.
        for known in (ClosedError, TypeError, ValueError):
            if isinstance(error, known):
                if not self._is_compared:
                    self._runner.tell_others(self.op, error)
                # torch 2.11 cannot trace str(error).
                text = error.args[0] if error.args else ""
                raise known(f"{self._runner.group.where(self.op)}: {text}") from None

    def check(self, name: str, tensor: Tensor) -> None:
        """Checks for a dense tensor on the communicator's device; counts its bytes."""
        if not self._runner.is_open:
            self.check_open()
        validation.check_tensor(name, tensor)
        if tensor.device != self._runner.device:
            validation.check_device(name, tensor, self._runner.device)
        if not self._is_traced:
            self._num_bytes += tensor.nbytes

    def check_not_compiled(self) -> None:
        """For ops that a compiler would move, or leave out: they have no result in the graph."""
        if self._is_traced:
            raise ValueError(
                f"{self.op} must be called outside compiled code and make_fx, got a call inside"
            )

    def check_open(self) -> None:
        """Raises if the communicator was destroyed."""
        if not self._runner.is_open:
            raise ClosedError("the communicator was destroyed")

    def compare(
        self, tensors: Tensor | Sequence[Tensor], arguments: Sequence[Any], **named: Any
    ) -> None:
        """Lets the ranks compare their calls; this rank's arguments must be checked before."""
        self._is_compared = True
        if not self._is_traced:
            group = self._runner.group
            asked = group.before(self.op, tensors, arguments, **named)
            if asked is not None:
                memory.check(group, asked)

    def compare_pair(
        self, op: Literal["send", "recv"], shape: Sequence[int], dtype: torch.dtype, peer: int
    ) -> None:
        """Lets two ranks compare a send with its recv."""
        self._is_compared = True
        if not self._is_traced:
            self._runner.group.before_pair(op, shape, dtype, peer)

    def sizes_of_all_ranks(self, sizes: list[int]) -> list[list[int]]:
        """Returns, for each of this rank's sizes, the size on every rank; not in compiled code."""
        if self._is_traced:
            raise ValueError(
                "gather_sizes must be given where a call is compiled or recorded, got 'auto'"
            )
        return self._runner.numbers_of_all_ranks(sizes)

    def gradients_of(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """This rank's gradients of the parameters that have one on some rank."""
        runner = self._runner
        where = runner.group.where(self.op)
        everyone = runner.numbers_of_all_ranks
        return gradient_buckets.agreed_gradients(parameters, everyone, where)

    def bring_no_gradients(self) -> None:
        """Tells the others that this rank's parameters are bad, where no comparison tells them."""
        group = self._runner.group
        if not (self._runner.is_alone or group.compares_next()):
            with contextlib.suppress(CommunicationError):
                self._runner.numbers_of_all_ranks(gradient_buckets.NO_GRADIENTS)

    def count(self, tensor: Tensor) -> None:
        """Adds to the bytes of this call."""
        if not self._is_traced:
            self._num_bytes += tensor.nbytes

    def run(self, function: Any, *arguments: Any, alone: Any) -> Any:
        """Calls an autograd Function with the group and `arguments`; returns its output.

        Args:
            function: one of `functions`.
            arguments: the arguments of the Function after the group.
            alone: the output at world size 1.
        """
        if self._runner.is_alone:
            return alone
        group = self._runner.group
        if self._is_traced:
            if torch.compiler.is_compiling():
                check_tangents(arguments)
            return run(function, traced_form(group), *arguments)
        return run(function, group, *arguments)

    def start(self, splits: Splits, inputs: Sequence[Tensor], *, packed: bool) -> AsyncHandle[Any]:
        """Starts an exchange; the handle gives its outputs, as a tuple if `packed`."""

        def result(outputs: Sequence[Tensor]) -> Any:
            return tuple(outputs) if packed else outputs[0]

        group = self._runner.group
        if self._is_traced or self._runner.is_alone:
            outputs = self.run(functions.AllToAll, splits, *inputs, alone=inputs)
            return AsyncHandle.done(result(outputs))
        duals = EagerDuals.of((splits, *inputs))
        if duals is None:
            exchange = AsyncExchange(splits)
            token = run(functions.StartAllToAll, group, exchange, *inputs)
        else:
            exchange = AsyncExchange(splits.with_tangents())
            duals.start(functions.StartAllToAll, group, exchange)

        def finish() -> Any:
            if duals is None:
                return result(run(functions.FinishAllToAll, group, exchange, token))
            return result(duals.finish(functions.AllToAll, group, exchange))

        return AsyncHandle(self.op, group.place, finish, exchange.is_completed)

    def run_unrecorded(self, name: str, *arguments: Any) -> Any:
        """Calls a collective without a gradient with the group and `arguments`."""
        if self._is_traced and not is_recording():
            raise ValueError(
                f"{self.op} must be called outside compiled code, got a call inside: call it in a "
                "function under torch.compiler.disable"
            )
        group = self._runner.group
        way = route_of_pair(group) if name in ("send", "recv") else route(group)[0]
        with torch.no_grad():
            return getattr(way, name)(group, *arguments)
