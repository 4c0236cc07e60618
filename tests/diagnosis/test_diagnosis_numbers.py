"""The number of a call that "auto" does not compare, where its arguments are bad on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.diagnosis import Diagnosis, MismatchError, is_due
from fastvideo_comm.errors import PeerLostError

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


def pairs_by_number(communicator: DeviceCommunicatorBase, validate: Any) -> list[int]:
    """Numbers of the pairs where a difference was seen."""
    diagnosis = Diagnosis(communicator.cpu_group, validate=validate, timeout=20)
    op, peer = (("send", 1), ("recv", 0))[communicator.rank]
    seen = []
    for number in range(18):
        try:
            diagnosis.before_pair(op, (2 + communicator.rank,), torch.int8, peer)
        except MismatchError:
            seen.append(number)
    return seen


@pytest.mark.parametrize(
    ("validate", "expected"), [("auto", [*range(9), 16]), ("always", [*range(18)])]
)
def test_which_sends_are_compared_follows_from_their_number(ranks: Ranks, validate, expected):
    assert ranks.run(2, pairs_by_number, validate, ways=("messages",)) == [expected] * 2


def of_two_peers(communicator: DeviceCommunicatorBase) -> None:
    diagnosis = Diagnosis(communicator.cpu_group, timeout=5)
    rank = communicator.rank
    for _ in range(9):
        if rank < 2:
            diagnosis.before_pair("recv" if rank else "send", (1,), torch.int8, 1 - rank)
    if rank != 1:
        with pytest.raises(MismatchError, match="0 -> 2"):
            diagnosis.before_pair("recv" if rank else "send", (1 + rank,), torch.int8, 2 - rank)


def test_the_pairs_of_each_peer_have_numbers_of_their_own(ranks: Ranks):
    """The tenth of two ranks is not compared; the first of two others is."""
    ranks.run(3, of_two_peers, ways=("messages",))


def unreachable(communicator: DeviceCommunicatorBase) -> None:
    """The others cannot be told, and the error of this rank is what its caller hears."""

    def lost(*_: Any) -> None:
        raise PeerLostError("the store is gone")

    own = DeviceCommunicatorBase(communicator.cpu_group, memory="off", validate="off")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own._runner.group, "failed", lost)
        patch.setattr(own._runner, "numbers_of_all_ranks", lost)
        with pytest.raises(ValueError, match="dim must be in"):
            own.all_gather(torch.zeros(2), 7)
        with pytest.raises(TypeError, match="parameters must be tensors, got int at index 0"):
            own.reduce_gradients([5])
    own.destroy()


def test_an_error_is_not_hidden_where_the_others_cannot_be_told(ranks: Ranks):
    ranks.run(2, unreachable, ways=("messages",))
