"""What a group tells its ranks about a call that fails, and what it lets go of at its end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastvideo_comm.collective.group import Group
from fastvideo_comm.diagnosis.record import Record
from fastvideo_comm.errors import ClosedError
from fastvideo_comm.profiling import MemoryStats


class Comparison:
    """Comparisons of calls, of which the next one is due or not."""

    def __init__(self, validate: str = "auto", *, is_due: bool = False) -> None:
        self.validate, self.is_due = validate, is_due
        self.is_closed = False
        self.num_counted = 0

    def counted(self) -> bool:
        self.num_counted += 1
        return self.is_due

    def close(self) -> None:
        self.is_closed = True


class Memory:
    """Memory that is connected; writes down what the others are told."""

    def __init__(self) -> None:
        self.told: list[bytes] = []
        self.is_closed = False
        self.pool = SimpleNamespace(bytes_in_use=64, high_water_bytes=640, segments=[1, 2])

    def fail_next(self, text: bytes) -> None:
        self.told.append(text)

    def close(self) -> None:
        self.is_closed = True


def group_of(comparison: Any = None) -> Group:
    process_group: Any = SimpleNamespace(rank=lambda: 1, size=lambda: 3)
    return Group(process_group, "sp", comparison)


@pytest.mark.parametrize(
    ("op", "comparison", "tells"),
    [
        *[("all_to_all_4D", each, True) for each in (None, Comparison(), Comparison("off"))],
        ("barrier", Comparison("off"), True),
        ("slice", Comparison(is_due=True), True),
        ("slice", Comparison("always", is_due=True), True),
        # It sends nothing, so no other rank makes a call.
        ("slice", Comparison(is_due=False), False),
        ("slice", Comparison("off", is_due=True), False),
        ("slice", None, False),
        # It concerns one rank, which compares it with its own.
        ("send", Comparison(is_due=True), False),
        ("recv", Comparison("always", is_due=True), False),
    ],
)
def test_by_memory_bad_arguments_are_told_to_those_who_make_the_call(op, comparison, tells):
    group: Any = group_of(comparison)
    group.memory = Memory()
    group.failed(op, TypeError("x must be a tensor"))
    expected = [Record(op, error="TypeError: x must be a tensor")] * tells
    assert [Record.decode(text) for text in group.memory.told] == expected


@pytest.mark.parametrize(
    ("validate", "is_due", "is_compared"),
    [("auto", True, True), ("auto", False, False), ("always", True, True), ("off", True, False)],
)
def test_by_memory_an_op_that_sends_nothing_is_compared_in_a_call_of_its_own(
    validate, is_due, is_compared
):
    comparison = Comparison(validate, is_due=is_due)
    group: Any = group_of(comparison)
    group.memory = Memory()
    facts = group.before("slice", torch.ones(3), (0,), sends=False)
    assert (facts is not None) == is_compared
    assert comparison.num_counted == (validate != "off"), "once, as on the other ranks"
    assert group.take_asked() is None, "the next call compares what it asks for itself"


def test_by_memory_the_next_call_compares_what_was_asked_for_and_that_once():
    group: Any = group_of(Comparison())
    group.memory = Memory()
    assert group.before("all_gather", torch.ones(3), (0,)) is None
    facts = group.take_asked()
    assert facts is not None
    assert facts[0] == "all_gather"
    assert group.take_asked() is None
    group.before_backward("all_gather", torch.ones(9), (0,), of_call=7)
    assert group.take_asked()[0] == "all_gather backward"
    assert [group.take_asked_of(), group.take_asked_of()] == [7, None]


@pytest.mark.parametrize("kind", ["memory", "device_memory"])
def test_the_end_of_a_group_lets_go_of_all_that_it_holds(kind):
    comparison, memory = Comparison(), Memory()
    group = group_of(comparison)
    setattr(group, kind, memory)
    group.buffers.give_back(torch.empty(1 << 20))
    assert group.memory_stats() == MemoryStats(64, 640, 2, "")
    group.close()
    assert comparison.is_closed
    assert memory.is_closed
    assert group.buffers._free == []
    assert (group.memory, group.device_memory) == (None, None)
    assert group.memory_stats() == MemoryStats(0, 0, 0, "the communicator was destroyed")
    with pytest.raises(ClosedError, match="was destroyed before a backward"):
        assert group.process_group


def test_a_group_that_has_not_asked_for_memory_says_so():
    group = group_of()
    assert not group.connects_memory()
    assert group.memory_stats() == MemoryStats(0, 0, 0, "nobody has asked for it")
    group.close()
    assert group.refusal == "nobody has asked for it"
