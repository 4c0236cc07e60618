"""What the errors of calls by memory say where ranks are silent, gone or short of memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fastvideo_comm.collective import memory_call
from fastvideo_comm.diagnosis.record import Record
from fastvideo_comm.errors import ClosedError, MismatchError, where
from fastvideo_comm.memory.host import Mismatch


class Memory:
    """A memory that the system refuses; writes down what the others are told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def allocate(self, specs: object) -> None:
        raise MemoryError("the system refuses 64 bytes")

    def fail_next(self, text: bytes, ranks: object, *, failure: str) -> None:
        self.told.append((text, ranks, failure))


def group_of(memory: Memory | None = None) -> Any:
    """Rank 1 of 4."""
    return SimpleNamespace(
        memory=memory,
        is_strict=False,
        rank=lambda: 1,
        where=lambda op: where(op, 1, 4, "sp"),
    )


def error_of(details: dict[int, Record]) -> str:
    """What rank 1 raises where so many ranks have said what they asked for."""

    def wait() -> None:
        raise Mismatch({rank: record.encode() for rank, record in details.items()})

    flight: Any = SimpleNamespace(wait=wait, others=[2, 3, 0], key=(-1, 57))
    with pytest.raises(MismatchError) as error:
        memory_call.wait_for(group_of(), "all_gather", flight)
    return str(error.value)


ONE = Record("all_gather", "[2]", "float32", arguments="dim=0")
OTHER = Record("all_gather", "[3]", "float32", arguments="dim=0")
START = (
    "all_gather on rank 1 of 4 in group 'sp': the ranks must ask for the same thing in call 57, got"
)


def test_ranks_that_say_nothing_in_time_are_named_under_the_table():
    text = error_of({1: ONE, 2: OTHER})
    assert text.startswith(START + "\n")
    assert [line.split()[0] for line in text.splitlines()[2:4]] == ["1", "2"]
    assert text.splitlines()[4:] == ["and no word in time from rank 0, 3"]


def test_where_all_have_spoken_nobody_is_said_to_be_silent():
    text = error_of({3: ONE, 1: ONE, 2: OTHER, 0: ONE})
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["0", "1", "2", "3"]
    assert text.splitlines()[4].endswith("<- shape")


def test_where_all_that_was_heard_agrees_the_own_call_is_shown():
    """The rank that asks for something else has left without a word."""
    text = error_of({1: ONE, 0: ONE, 2: ONE})
    assert text == f"{START}\n{ONE}\nand no word in time from rank 3"


@pytest.mark.parametrize("ranks", [None, (1, 3)])
def test_where_a_rank_has_no_memory_the_others_of_the_call_are_told(ranks):
    memory = Memory()
    with pytest.raises(
        MemoryError, match=r"^recv on rank 1 of 4 in group 'sp': the system refuses 64 bytes$"
    ):
        memory_call.allocate(group_of(memory), "recv", [], ranks)
    assert memory.told == [(b"the system refuses 64 bytes", ranks, "memory")]


def test_a_call_of_a_communicator_that_was_destroyed_meanwhile_says_so():
    text = "a call on rank 1 of 4 in group 'sp': the communicator was destroyed during it"
    with pytest.raises(ClosedError, match=text):
        memory_call.memory_of(group_of())
