"""What one rank asks for in one call, and the table of what all of them asked for."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..reduce_ops import reduce_op_name

_COLUMNS = ("op", "shape", "dtype", "strides", "arguments", "requires_grad")


# The parts of a `Record`, before they are text: see `facts_of`.
Facts: TypeAlias = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Record:
    """One rank's call.

    Attributes:
        op: the op's name.
        shape: the shape of each tensor; `*` stands for a size that may differ between ranks.
        dtype: the dtype of the tensors; that of each if they differ.
        strides: "contiguous" or "strided"; compared only if the caller asks for it.
        arguments: dims, reduce op and the like.
        requires_grad: whether there will be a backward.
        error: the error of this rank's arguments; empty if they are good.
    """

    op: str
    shape: str = ""
    dtype: str = ""
    strides: str = ""
    arguments: str = ""
    requires_grad: bool = False
    error: str = ""

    def encode(self) -> bytes:
        """Returns the record as bytes."""
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def decode(cls, data: bytes) -> Record:
        """Makes a record from the bytes of another rank."""
        return cls(**json.loads(data))

    def cells(self) -> list[str]:
        """The columns of the table."""
        if self.error:
            return [self.op, self.error, "", "", "", ""]
        gradient = str(self.requires_grad)
        return [self.op, self.shape, self.dtype, self.strides, self.arguments, gradient]

    def of_call(self, number: int | None) -> Record:
        """The record of a backward, with the number of the call that it belongs to."""
        if number is None:
            return self
        words = [self.arguments] if self.arguments else []
        return dataclasses.replace(self, arguments=", ".join([*words, f"of call {number}"]))

    def __str__(self) -> str:
        """The columns in a row."""
        return " ".join(cell for cell in self.cells()[:-1] if cell)


def describe(
    op: str,
    tensors: Tensor | Sequence[Tensor],
    arguments: Sequence[Any],
    *,
    uneven_dim: int | None = None,
    **named: Any,
) -> Record:
    """Makes the record of a collective.

    Example:
        >>> import torch
        >>> print(describe("all_gather", torch.zeros(2, 3), (-1,), gather_sizes=(3, 4)))
        all_gather [2, 3] float32 contiguous 1, gather_sizes=[3, 4]
    """
    return record_of(
        facts_of(op, tensors, arguments, uneven_dim=uneven_dim, has_strides=True, **named)
    )


def facts_of(
    op: str,
    tensors: Tensor | Sequence[Tensor],
    arguments: Sequence[Any],
    *,
    uneven_dim: int | None = None,
    has_strides: bool = False,
    **named: Any,
) -> Facts:
    """Collects the parts of a collective's record. Every call does this, so it is fast.

    `has_strides`: the caller chose the strides, so they may be compared.
    """
    tensors = (tensors,) if isinstance(tensors, Tensor) else tensors
    return (
        op,
        tuple([tensor.shape for tensor in tensors]),
        tuple([tensor.dtype for tensor in tensors]),
        uneven_dim,
        not has_strides or all(tensor.is_contiguous() for tensor in tensors),
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors),
        tuple([_fixed(argument) for argument in arguments]),
        tuple([(name, _fixed(value)) for name, value in named.items() if value is not None]),
    )


def record_of(facts: Facts) -> Record:
    """Makes the record of some facts."""
    op, shapes, dtypes, uneven_dim, is_contiguous, requires_grad, arguments, named = facts
    num_dims = len(shapes[0]) if shapes else 0
    return Record(
        op,
        " ".join(shape_text(shape, uneven_dim) for shape in shapes),
        " ".join(dtype_text(dtype) for dtype in (dtypes if len(set(dtypes)) > 1 else dtypes[:1])),
        "contiguous" if is_contiguous else "strided",
        ", ".join(
            [_word(argument, num_dims) for argument in arguments]
            + [f"{name}={_listed(value)}" for name, value in named]
        ),
        requires_grad,
    )


# A model makes the same few calls again and again, and the result depends on the arguments only.
@functools.lru_cache(maxsize=1024)
def question_of(facts: Facts, *, strict: bool) -> bytes:
    """Returns what must be the same on all ranks, as bytes; with the strides if `strict`.

    Example:
        >>> import torch
        >>> x = torch.zeros(2, 2)
        >>> plain, strided = facts_of("op", x, ()), facts_of("op", x.T, (), has_strides=True)
        >>> [question_of(plain, strict=s) == question_of(strided, strict=s) for s in (False, True)]
        [True, False]
    """
    record = record_of(facts)
    return (record if strict else dataclasses.replace(record, strides="")).encode()


def shape_text(shape: Sequence[int], uneven_dim: int | None = None) -> str:
    """A shape as the table shows it.

    Example:
        >>> shape_text((2, 3, 4), 1)
        '[2, *, 4]'
    """
    sizes = [str(size) for size in shape]
    if uneven_dim is not None:
        sizes[uneven_dim] = "*"
    return f"[{', '.join(sizes)}]"


def dtype_text(dtype: torch.dtype) -> str:
    """A dtype as the table shows it: `float32`."""
    return str(dtype).removeprefix("torch.")


def table(records: Mapping[int, Record], *, strict: bool) -> str | None:
    """Returns a table with a line for each rank if the records differ, else None.

    Example:
        >>> records = {0: Record("all_gather", "[2]"), 1: Record("all_gather", "[3]")}
        >>> print(table(records, strict=False))
        rank  op          shape  dtype  strides  arguments  requires_grad
        0     all_gather  [2]                               False          <- shape
        1     all_gather  [3]                               False          <- shape

    Args:
        records: by rank; a send and a recv are compared with each other.
        strict: whether strides must be the same too.
    """
    rows = {rank: _comparable(record, strict=strict) for rank, record in records.items()}
    counts = collections.Counter(rows.values()).most_common(2)
    # If two records are equally common, nobody knows which is right: then every line is marked.
    usual = (
        set(rows.values()) if len(counts) == 2 and counts[0][1] == counts[1][1] else {counts[0][0]}
    )
    pair = sorted(record.op for record in records.values()) == ["recv", "send"]
    marks = {}
    for rank, row in rows.items():
        wrong = [
            name
            for place, name in enumerate((*_COLUMNS, "error"))
            if any(row[place] != other[place] for other in usual) and not (pair and name == "op")
        ]
        if records[rank].error:
            wrong = ["bad arguments"]
        elif "error" in wrong:
            wrong = []
        marks[rank] = f"<- {', '.join(wrong)}" if wrong else ""
    alone = len(records) == 2 and not pair and {r.op for r in records.values()} <= {"send", "recv"}
    if alone:  # two sends, or two recvs
        marks = dict.fromkeys(records, "<- needs the other of send and recv")
    if not any(marks.values()):
        return None
    lines = [["rank", *_COLUMNS, ""]]
    lines += [[str(rank), *record.cells(), marks[rank]] for rank, record in records.items()]
    # A rank's error may be long, so it does not count for the widths of the columns.
    sized = [line for line in lines[1:] if not records[int(line[0])].error]
    widths = [max(len(line[i]) for line in [lines[0], *sized]) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _comparable(record: Record, *, strict: bool) -> tuple[Any, ...]:
    strides = record.strides if strict else ""
    fields = (record.op, record.shape, record.dtype, strides, record.arguments)
    return (*fields, record.requires_grad, record.error)


def _fixed(value: Any) -> Any:
    """Turns sequences into tuples, which can be hashed."""
    return tuple([_fixed(each) for each in value]) if isinstance(value, list | tuple) else value


def _listed(value: Any) -> Any:
    """Turns sequences into lists, so that lists and tuples look the same."""
    return [_listed(each) for each in value] if isinstance(value, list | tuple) else value


def _word(argument: Any, num_dims: int) -> str:
    """Writes negative dims counted from the front, and reduce ops by their names."""
    if isinstance(argument, int) and not isinstance(argument, bool):
        return str(argument + num_dims if -num_dims <= argument < 0 else argument)
    return reduce_op_name(argument) or str(argument)
