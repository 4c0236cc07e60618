"""Ranks that ask for different things on GPUs: nothing is written, and all hear of it."""

from __future__ import annotations

import time

import device_ranks
import pytest
import torch
from device_ranks import twin_kernels
from test_device import integers

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.errors import CollectiveError, MismatchError


@pytest.mark.parametrize(
    "other",
    [
        lambda c, x: c.all_to_all_4D(x[:, :2]),
        lambda c, x: c.all_to_all_4D(x.float()),
        lambda c, x: c.all_to_all_4D(x, 1, 2),
        lambda c, x: c.all_to_all_4D(x, scatter_sizes=[1, 3]),
        lambda c, x: c.all_gather(x, 1),
    ],
    ids=["length", "dtype", "dims", "sizes", "op"],
)
@pytest.mark.parametrize("number", [1, 40])
def test_ranks_that_ask_for_different_things_are_told_in_any_call(other, number):
    """No output that anyone holds is touched, though nothing is compared before the call."""

    def job(communicator: DeviceCommunicatorBase) -> None:
        communicator._runner.group.validate("off")
        x = integers(communicator, 0, 1, 4, 4, 8)
        held = [communicator.all_to_all_4D(x) for _ in range(number)]
        values = [each.clone() for each in held]
        (other if communicator.rank else DeviceCommunicatorBase.all_to_all_4D)(communicator, x)
        time.sleep(1.5)  # the watch looks once a second
        rank = communicator.rank
        text = f"on rank {rank} of 2 .*same thing in call {number + 1} of .* rank {1 - rank};"
        with pytest.raises(MismatchError, match=text):
            communicator._runner.group._check_waits("barrier")
        for each, before in zip(held, values, strict=True):
            assert torch.equal(each, before)
        with pytest.raises(MismatchError, match="same thing"):
            communicator.all_to_all_4D(x)

    with twin_kernels():
        device_ranks.run(2, job)


def wait_for_the_watch(communicator: DeviceCommunicatorBase) -> None:
    """It looks once a second, and later on a busy machine."""
    for _ in range(100):
        time.sleep(0.1)
        try:
            communicator._runner.group._check_waits("barrier")
        except MismatchError:
            return


@pytest.mark.parametrize(
    "call",
    [
        lambda c, x: c.all_to_all_4D(x),
        lambda c, x: c.all_gather(x, 1),
        lambda c, x: c.reduce_scatter(x, 2),
        lambda c, x: c.gather(x, 1, 2),
    ],
    ids=["all_to_all_4D", "all_gather", "reduce_scatter", "gather"],
)
@pytest.mark.parametrize("number", [0, 5])
def test_a_rank_with_bad_arguments_tells_the_others_though_nothing_is_compared(call, number):
    def job(communicator: DeviceCommunicatorBase) -> None:
        communicator._runner.group.validate("off")
        x = integers(communicator, 0, 1, 4, 4, 8)
        held = [communicator.all_to_all_4D(x) for _ in range(number + 1)]
        values = [each.clone() for each in held]
        if communicator.rank:
            with pytest.raises(TypeError, match=r"must be .*, got list"):
                call(communicator, [x.tolist()])
            again = pytest.raises(CollectiveError, match="gave an earlier call up: TypeError: ")
        else:
            call(communicator, x)
            wait_for_the_watch(communicator)
            text = f"call {number + 2} of .*something else, or bad arguments, from rank 1;"
            again = pytest.raises(MismatchError, match=text)
        with again:
            communicator.all_to_all_4D(x)
        for each, before in zip(held, values, strict=True):
            assert torch.equal(each, before)

    with twin_kernels():
        device_ranks.run(2, job)
