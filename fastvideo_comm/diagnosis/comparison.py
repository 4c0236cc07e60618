"""Ranks compare their calls before they send by messages: a mistake is an error and not a hang.

Before a collective each rank writes a record of its call (`record.py`) into the group's store, and
reads the records of the others (`board.py`). If the records differ, every rank raises the same
table. The ranks use the store because a collective would hang if the ranks disagree. Ranks that
exchange by memory do not need this module: there every call compares itself.

Under "auto", the number of a call decides whether it is compared: 0 to 8, then 16, 32, 64, .. All
ranks have the same numbers. They do not remember what they have compared: such a memory could
differ between ranks, and one of them would wait forever. A call that is not compared costs an
increment and a test of its number. The collectives of a backward are numbered together with those
of the forward. Nothing is compared at world size 1 or in compiled code.

This module assumes one call at a time per communicator, as every backend does. It assumes that the
ranks of a group make their communicators in the same order. A comparison makes the host wait for
the other ranks, as gloo does anyway.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import (
    ClosedError,
    CommunicationError,
    CommunicationTimeoutError,
    MismatchError,
    PeerLostError,
    where,
)
from .board import AbsentError, Board, group_timeout
from .record import Record, describe, dtype_text, shape_text, table

Validate: TypeAlias = Literal["auto", "always", "off"]
_MODES = ("auto", "always", "off")
# All calls up to this number are compared, and later those whose number is a power of two.
_FIRST_CALLS = 8
# The store counts as unreachable if it takes so much longer than the timeout.
_STORE_GRACE_SECONDS = 1.0


def is_due(number: int) -> bool:
    """Whether "auto" compares the call with this number; numbers start at 0.

    Example:
        >>> [number for number in range(100) if is_due(number)]
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64]
    """
    return number < _FIRST_CALLS or number & (number - 1) == 0


class Diagnosis:
    """The comparisons of one communicator: `before` each call, or `failed` for bad arguments.

    Example (inside a rank):
        >>> diagnosis = Diagnosis(group, "sp")  # doctest: +SKIP
        >>> diagnosis.before("all_gather", x, (-1,))  # doctest: +SKIP
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        name: str = "",
        *,
        validate: Validate = "auto",
        timeout: float | None = None,
    ) -> None:
        """Joins the other ranks' diagnoses through the group's store; waits for nobody.

        Args:
            group: the group whose ranks are compared; `cpu_group` of the communicator.
            name: the name of the communicator in errors.
            validate: "auto", "always" or "off", the same on all ranks. "always" compares every
                call. It also compares whether tensors are contiguous: no result depends on this,
                but a difference is often a mistake.
            timeout: seconds that a compared call waits for the other ranks. None means the group's
                timeout.

        Raises:
            ValueError: another `validate`, a timeout that is not positive, or "always" for a group
                that has no store.
        """
        if timeout is not None and not 0 < timeout < math.inf:
            raise ValueError(f"timeout must be a positive number of seconds, got {timeout}")
        self.timeout = group_timeout(group) if timeout is None else timeout
        self._group: dist.ProcessGroup | None = group
        self._rank, self._size = group.rank(), group.size()
        self._name = name
        self._number = 0
        self._pair_numbers: dict[int, int] = {}
        self._board: Board | None = None
        self.set_validate(validate)

    def set_validate(self, validate: Validate) -> None:
        """Sets which calls are compared. All ranks set the same value, before the first call.

        Raises:
            ValueError: As for the constructor.
        """
        if validate not in _MODES:
            raise ValueError(f"validate must be one of {', '.join(_MODES)}, got {validate!r}")
        self.validate = validate
        if validate == "off" or self._size == 1 or self._group is None:
            self._leave()
            self._board = None
        elif self._board is None:
            self._board = Board.of(self._group)
            if self._board is None and validate == "always":
                raise ValueError("validate must not be 'always' for a group without a store")

    def before(
        self,
        op: str,
        tensors: Tensor | Sequence[Tensor],
        arguments: Sequence[Any] = (),
        *,
        uneven_dim: int | None = None,
        **named: Any,
    ) -> int:
        """Compares a collective of the whole group, if its number is one that is compared.

        Args:
            op: the op's name.
            tensors: this rank's input, or inputs.
            arguments: dims, reduce op and other arguments that must be the same on all ranks.
            uneven_dim: a dim whose size may differ between the ranks.
            named: more such arguments. The table shows their names, and leaves out None.

        Returns:
            The number of the collective.

        Raises:
            MismatchError: the ranks asked for different things, or one had bad arguments.
            PeerLostError: a rank that has not arrived is dead.
            CommunicationTimeoutError: a rank did not arrive in time; `peers` says which.
        """
        if self._board is not None and self.counted():
            record = describe(op, tensors, arguments, uneven_dim=uneven_dim, **named)
            self._compare(self._board, record, str(self._number - 1), range(self._size))
        return self._number - 1

    def before_backward(
        self,
        op: str,
        gradients: Tensor | Sequence[Tensor],
        arguments: Sequence[Any] = (),
        *,
        of_call: int | None = None,
        uneven_dim: int | None = None,
        **named: Any,
    ) -> int:
        """As `before`, for the first collective of the backward of `op`.

        The strides of gradients are not compared, because they depend on each rank's own loss. The
        number of the forward's call, `of_call`, is compared: two backwards may ask for the same.

        Raises:
            ClosedError: the communicator was destroyed; the other ranks are told.
        """
        if self._group is None:
            error = ClosedError(
                f"{self._where(f'{op} backward')}: the communicator was destroyed before a "
                "backward that needs it"
            )
            self.failed(f"{op} backward", error)
            raise error
        if self._board is not None and self.counted():
            record = describe(
                f"{op} backward", gradients, arguments, uneven_dim=uneven_dim, **named
            )
            record = dataclasses.replace(record, strides="").of_call(of_call)
            self._compare(self._board, record, str(self._number - 1), range(self._size))
        return self._number - 1

    def close(self) -> None:
        """Closes: a later backward is an error. The last rank that closes clears the store."""
        self._group = None
        self._leave()

    def _leave(self) -> None:
        """Leaves the board. It waits for no rank, and 1 s for a store that does not answer.

        It does nothing at the end of the process: the process that serves the store may have ended
        before, and torch would print a warning.
        """
        if self._board is not None and threading.main_thread().is_alive():
            with contextlib.suppress(CommunicationError):
                self._guarded("destroy", self._board.leave, 0.0)

    def before_pair(
        self,
        op: Literal["send", "recv"],
        shape: Sequence[int],
        dtype: torch.dtype,
        peer: int,
    ) -> None:
        """Compares a send with its recv, if its number for this pair is one that is compared.

        Args:
            op: "send" or "recv".
            shape: the shape of the tensor.
            dtype: the dtype of the tensor.
            peer: the other rank.

        Raises:
            MismatchError: the send and the recv do not fit.
            PeerLostError: the other rank is dead.
            CommunicationTimeoutError: the other rank did not arrive in time.
        """
        if self._board is None:
            return
        number = self._pair_numbers.get(peer, 0)
        self._pair_numbers[peer] = number + 1
        if not (self.validate == "always" or is_due(number)):
            return
        pair = sorted((self._rank, peer))
        src, dst = (self._rank, peer) if op == "send" else (peer, self._rank)
        record = Record(op, shape_text(shape), dtype_text(dtype), arguments=f"{src} -> {dst}")
        self._compare(self._board, record, f"{pair[0]}-{pair[1]}/{number}", pair)

    def compares_next(self) -> bool:
        """Whether the ranks compare the next collective."""
        if self._board is None:
            return False
        return self.validate == "always" or is_due(self._number)

    def failed(self, op: str, error: Exception) -> None:
        """Tells the others, if they are about to compare, that this rank's arguments were bad.

        Call this for a collective that raised before it called `before`: the others would wait for
        it. `failed` waits for nobody. It does not tell of a bad `send` or `recv`, because no
        collective of another rank waits for those.
        """
        board, number = self._board, self._number
        if board is None or op in ("send", "recv"):
            return
        compares = self.compares_next()
        self._number = number + 1
        if not compares:
            return
        record = Record(op, error=f"{type(error).__name__}: {error}")
        self._guarded(op, lambda: board.put(str(number), record.encode()), self.timeout)

    def counted(self) -> bool:
        """Takes the next number; returns whether the call with this number is compared."""
        if self._board is None:
            return False
        compared = self.compares_next()
        self._number += 1
        return compared

    def _compare(self, board: Board, record: Record, call: str, ranks: Sequence[int]) -> None:
        """Exchanges records with `ranks` and raises unless they fit."""

        def exchange() -> dict[int, bytes]:
            board.put(call, record.encode())
            return board.collect(call, ranks, self.timeout)

        try:
            encoded = self._guarded(record.op, exchange, self.timeout)
        except AbsentError as absence:
            raise self._absent(record, call, absence) from None
        records = {rank: Record.decode(text) for rank, text in encoded.items()}
        strict = self.validate == "always"
        text = table(records, strict=strict)
        if text is not None:
            raise MismatchError(
                f"{self._where(record.op)}: the ranks must ask for the same thing in call {call}, "
                f"got\n{text}"
            )

    def _absent(self, record: Record, call: str, absence: AbsentError) -> Exception:
        words = "; ".join(f"rank {rank} {state}" for rank, state in absence.states.items())
        kind = PeerLostError if absence.lost else CommunicationTimeoutError
        waited = "" if absence.lost else f" within {self.timeout:g} s"
        return kind(
            f"{self._where(record.op)}: every rank must arrive at call {call}{waited}, got {words}."
            f" This rank asks for: {record}",
            peers=tuple(absence.states),
        )

    def _guarded(self, op: str, action: Callable[[], Any], seconds: float) -> Any:
        """Runs `action` in a thread: torch's store client can hang if its server is stopped."""
        outcome: list[Any] = []

        def run() -> None:
            try:
                outcome.append((action(), None))
            except BaseException as error:
                outcome.append((None, error))

        thread = threading.Thread(target=run, name="fastvideo_comm.diagnosis", daemon=True)
        thread.start()
        thread.join(seconds + _STORE_GRACE_SECONDS)
        if not outcome:
            raise CommunicationTimeoutError(
                f"{self._where(op)}: the store must answer within {seconds:g} s, got nothing: the "
                "process that serves it is stopped or its host unreachable"
            )
        result, error = outcome[0]
        if isinstance(error, RuntimeError):  # what torch's stores raise
            raise PeerLostError(
                f"{self._where(op)}: the store must be reachable, got {error}"
            ) from error
        if error is not None:
            raise error
        return result

    def _where(self, op: str) -> str:
        return where(op, self._rank, self._size, self._name)
