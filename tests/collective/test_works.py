"""Exchanges in flight: when they are completed, and what is given back when they are waited for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastvideo_comm.collective import memory_call, messages, quantised
from fastvideo_comm.collective.buffers import WireBuffers
from fastvideo_comm.collective.message import Message

NOT_YET = SimpleNamespace(is_completed=lambda: False)
DONE = SimpleNamespace(is_completed=lambda: True)


@pytest.mark.parametrize(
    ("works", "is_completed"),
    [
        ([DONE, DONE], True),
        ([DONE, NOT_YET], False),
        ([NOT_YET, DONE], False),
        ([NOT_YET, NOT_YET], False),
    ],
)
def test_several_exchanges_are_completed_when_all_are(works, is_completed):
    group: Any = SimpleNamespace(name="sp")
    assert messages.Work(group, works, [], [], []).is_completed() is is_completed
    assert messages.Work(group, [None, *works], [], [], []).is_completed() is is_completed
    assert quantised._Exchanges(works, []).is_completed() is is_completed
    by_memory: Any = works[0]
    work = memory_call.Work(group, "all_to_all_4D", by_memory, [])
    assert work.is_completed() is by_memory.is_completed()


def test_the_buffers_of_an_exchange_come_back_when_it_was_waited_for():
    """Those of what was sent too, and not before."""
    log: list[str] = []
    buffers = WireBuffers()
    output = torch.zeros(100_000)
    sent, received = (Message.of(buffers, torch.empty(2, 50_000).mT) for _ in range(2))
    arrived = Message(received.wire, [(output.view(50_000, 2), received.wire)], buffers)

    def wait(op: str, works: object) -> None:
        log.append(op)
        assert buffers._free == []
        received.wire.fill_(5)

    group: Any = SimpleNamespace(name="sp", c10d=SimpleNamespace(wait=wait))
    work = messages.Work(group, [], [output], [sent], [arrived])
    assert buffers._free == []
    (result,) = work.wait()
    assert result is output
    assert (output == 5).all()
    assert log == ["all_to_all"]
    assert {wire.data_ptr() for wire in buffers._free} == {
        sent.wire.data_ptr(),
        received.wire.data_ptr(),
    }


def test_what_is_left_to_do_is_done_after_the_outputs_have_arrived():
    log: list[str] = []
    group: Any = SimpleNamespace(name="sp")
    flight: Any = SimpleNamespace(wait=lambda: log.append("arrived"))
    outputs = [torch.empty(1)]
    work = memory_call.Work(group, "op", flight, outputs, lambda: log.append("added up"))
    assert work.wait() is outputs
    assert log == ["arrived", "added up"]
