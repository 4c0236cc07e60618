"""Ranks compare what they are about to do, so that a mistake is an error and not a hang.

Before a collective each rank writes a record of its call (`diagnosis_record`) into the group's
store and reads those of the others (`diagnosis_board`). If they differ, every rank raises the same
table. The store is used and not a collective: a collective of ranks that disagree is what hangs.

Which calls are compared under "auto" follows from the call's number alone, which all ranks share:
numbers 0 to 8, then 16, 32, 64, .. A memory of what was compared already would differ between
ranks and leave one of them waiting. Calls between those cost an increment and a comparison. The
collectives of a backward are calls like those of a forward, in the same line of numbers. Nothing is
compared at world size 1, nor in compiled code.

Assumes what every backend assumes, one call at a time per communicator, and that the ranks of a
group make their communicators on it in the same order. A comparison makes the host wait for the
other ranks, as gloo does anyway.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ClosedError, CommunicationTimeoutError, MismatchError, PeerLostError, where
from .board import AbsentError, Board, group_timeout
from .record import Record, describe, dtype_text, shape_text, table

Validate: TypeAlias = Literal["auto", "always", "off"]
_MODES = ("auto", "always", "off")
# Every one of the first calls is compared, later those with a power of two as their number.
_FIRST_CALLS = 8
# What the store may take beyond the timeout before it counts as unreachable.
_STORE_GRACE_SECONDS = 1.0


def is_due(number: int) -> bool:
    """Whether "auto" compares the call with this number, counted from 0.

    Example:
        >>> [number for number in range(100) if is_due(number)]
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64]
    """
    return number < _FIRST_CALLS or number & (number - 1) == 0


class Diagnosis:
    """The comparisons of one communicator; `before` each call, `failed` where arguments are bad.

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
            name: what errors call the communicator.
            validate: "auto", "always" or "off", the same on all ranks. "always" compares every
                call, and also whether tensors are contiguous on all ranks or on none, which
                nothing depends on but which should rarely differ.
            timeout: seconds that a compared call waits for the other ranks; the group's if None.

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
        """Says which calls are compared, before the first call; the same on all ranks.

        Raises:
            ValueError: As for the constructor.
        """
        if validate not in _MODES:
            raise ValueError(f"validate must be one of {', '.join(_MODES)}, got {validate!r}")
        self.validate = validate
        if validate == "off" or self._size == 1 or self._group is None:
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
    ) -> None:
        """Compares a collective of the whole group, if its turn has come.

        Args:
            op: the op's name.
            tensors: this rank's input, or inputs.
            arguments: dims, reduce op and whatever else must be the same on all ranks.
            uneven_dim: a dim whose size may differ between the ranks.
            named: more such arguments, which the table shows with their names; None is not shown.

        Raises:
            MismatchError: the ranks asked for different things, or one had bad arguments.
            PeerLostError: a rank that has not arrived is dead.
            CommunicationTimeoutError: a rank did not arrive in time; `peers` says which.
        """
        if self._board is None or not self.counted():
            return
        record = describe(op, tensors, arguments, uneven_dim=uneven_dim, **named)
        self._compare(self._board, record, str(self._number - 1), range(self._size))

    def before_backward(
        self,
        op: str,
        gradients: Tensor | Sequence[Tensor],
        arguments: Sequence[Any] = (),
        *,
        uneven_dim: int | None = None,
        **named: Any,
    ) -> None:
        """As `before`, for the collective by which the backward of `op` begins.

        The strides of gradients are left out: they follow from each rank's own loss.

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
        if self._board is None or not self.counted():
            return
        record = describe(f"{op} backward", gradients, arguments, uneven_dim=uneven_dim, **named)
        record = dataclasses.replace(record, strides="")
        self._compare(self._board, record, str(self._number - 1), range(self._size))

    def close(self) -> None:
        """The communicator was destroyed: a backward that still comes is an error."""
        self._group = None

    def before_pair(
        self,
        op: Literal["send", "recv"],
        shape: Sequence[int],
        dtype: torch.dtype,
        peer: int,
    ) -> None:
        """Compares a send with its recv, if the turn of this pair of ranks has come.

        Args:
            op: "send" or "recv".
            shape: the tensor's.
            dtype: the tensor's.
            peer: the other rank.

        Raises:
            MismatchError: the two do not fit.
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

    @property
    def number(self) -> int:
        """The number of the next collective."""
        return self._number

    def compares_next(self) -> bool:
        """Whether the ranks compare the next collective; its arguments must be known good then."""
        if self._board is None:
            return False
        return self.validate == "always" or is_due(self._number)

    def failed(self, op: str, error: Exception) -> None:
        """Tells the others, if they are about to compare, that this rank's arguments were bad.

        For a collective that raised before it came to `before`: the others would wait for it. Waits
        for nobody. A bad `send` or `recv` is not told: no other rank's collective waits for it.
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
        """Takes the next number; whether the call with it is compared."""
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
        """`action()` in a thread: torch's store client can hang where its server is stopped."""
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
