"""Sequences at the limit: shorter than the ranks are many, and empty."""

from __future__ import annotations

import pytest
import torch
from ranks import Ranks

from fastvideo_comm import DeviceCommunicatorBase


def short(communicator: DeviceCommunicatorBase, num_tensors: int) -> None:
    """Heads are replicated where they are scarce; a sequence is not."""
    inputs = [torch.rand(1, 1, 2, 3) for _ in range(num_tensors)]
    with pytest.raises(ValueError, match="size at scatter_dim=1 that world_size=2 divides, got 1"):
        communicator.all_to_all_4D(inputs, 1, 2)
    outputs = communicator.all_to_all_4D(inputs, 1, 2, scatter_sizes="auto")
    assert all(output.shape == (1, 1 - communicator.rank, 4, 3) for output in outputs)


@pytest.mark.parametrize("num_tensors", [1, 2])
def test_a_sequence_shorter_than_the_ranks_are_many_is_refused(ranks: Ranks, num_tensors):
    ranks.run(2, short, num_tensors)


def empty(communicator: DeviceCommunicatorBase, async_op: bool) -> None:
    x = torch.zeros(1, 0, 3, 2, requires_grad=True)
    sizes = [1, 2]
    y = communicator.all_to_all_4D(x, scatter_sizes=sizes, async_op=async_op)
    y = y.wait() if async_op else y
    assert y.shape == (1, 0, sizes[communicator.rank], 2)
    back = communicator.all_to_all_4D(y, 1, 2, gather_sizes=sizes, async_op=async_op)
    back = back.wait() if async_op else back
    assert back.shape == x.shape
    back.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("async_op", [False, True])
def test_a_sequence_without_an_entry_is_exchanged_unevenly(ranks: Ranks, async_op):
    ranks.run(2, empty, async_op)
