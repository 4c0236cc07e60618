"""The number of a call that "auto" does not compare, where its arguments are bad on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.diagnosis import MismatchError, is_due

BAD_CALLS: dict[str, Callable[[DeviceCommunicatorBase], Any]] = {
    "all_gather": lambda c: c.all_gather(torch.zeros(2), 5),
    "all_reduce": lambda c: c.all_reduce(torch.zeros(2, dtype=torch.int16)),
    "slice": lambda c: c.slice(torch.zeros(3)),
    "all_to_all_4D": lambda c: c.all_to_all_4D(torch.zeros(1, 2, 3, 4)),
}


def one_bad_call(communicator: DeviceCommunicatorBase, name: str) -> str:
    watched = DeviceCommunicatorBase(communicator.cpu_group, unique_name="watched", memory="off")
    x = torch.ones(2)
    assert is_due(16)
    assert not is_due(15)
    for _ in range(15):
        watched.all_reduce(x)
    with pytest.raises((ValueError, TypeError), match=rf"^{name} on rank \d of 2"):
        BAD_CALLS[name](watched)
    # The next call has the number 16, which is compared. What differs here would not hang.
    op = dist.ReduceOp.MAX if communicator.rank else dist.ReduceOp.SUM
    with pytest.raises(MismatchError) as error:
        watched.all_reduce(x, op)
    return str(error.value)


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_call_that_is_not_compared_has_one_number(ranks: Ranks, name):
    for text in ranks.run(2, one_bad_call, name):
        assert "must ask for the same thing in call 16, got" in text
