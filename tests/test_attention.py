"""`ulysses_attention` against the attention of one process: outputs, gradients, errors."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from attention_case import TOLERANCE, Case, attend, in_one_process, restrided
from hypothesis import example, given
from hypothesis import strategies as st
from ranks import Ranks
from test_collectives import GROUPS
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fastvideo_comm import DeviceCommunicatorBase, ulysses_attention

Wrapped = Callable[[Callable[..., Any]], Callable[..., Any]]


def on_ranks(
    communicator: DeviceCommunicatorBase,
    case: Case,
    attention: Callable[..., Tensor] | None = None,
    wrap: Wrapped = lambda call: call,
) -> list[Tensor]:
    """What `in_one_process` returns, of this rank."""
    ranks, rank = communicator.world_size, communicator.rank
    rows = case.rows(ranks)
    tensors = case.tensors(ranks)
    mine = [restrided(t.split(rows, 1)[rank]).requires_grad_() for t in tensors[:3]]
    text = [tensor.requires_grad_() for tensor in tensors[3:]]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        result = ulysses_attention(
            communicator,
            *tensors[:3],
            attention,
            joint=tuple(tensors[3:]) or None,
            pipeline=case.pipeline,
            gather_sizes=case.gather_sizes(ranks),
        )
        return result if isinstance(result, tuple) else (result,)

    outputs = wrap(call)(*mine, *text)
    of_video, of_text = case.weights(ranks)
    weights = [of_video.split(rows, 1)[rank], of_text[rank]]
    sum((y * w).sum() for y, w in zip(outputs, weights, strict=False)).backward()
    return [*[y.detach() for y in outputs], *[x.grad for x in (*mine, *text)]]


def against_one_process(
    communicator: DeviceCommunicatorBase,
    case: Case,
    explicit: bool,
    wrap: Wrapped = lambda call: call,
) -> None:
    ranks, rank = communicator.world_size, communicator.rank
    got = on_ranks(communicator, case, attend if explicit else None, wrap)
    expected = in_one_process(case, ranks)
    assert len(got) == len(expected) == (4 if case.joint < 0 else 8)

    def mine(whole: Tensor) -> Tensor:
        return whole.split(case.rows(ranks), 1)[rank]

    of_text = () if case.joint < 0 else (1, 5, 6, 7)
    for index, (ours, whole) in enumerate(zip(got, expected, strict=True)):
        if index > 1 and index in of_text:  # a share of the gradient on every rank
            dist.all_reduce(ours, group=communicator.cpu_group)
        torch.testing.assert_close(ours, whole if index in of_text else mine(whole), **TOLERANCE)


CASES = st.builds(
    lambda key_heads, per_key, **fields: Case(key_heads * per_key, key_heads, **fields),
    key_heads=st.integers(1, 6),
    per_key=st.integers(1, 4),
    batch=st.integers(1, 2),
    sequence=st.integers(1, 7),
    uneven=st.sampled_from(("", "list", "auto")),
    joint=st.integers(-1, 3),
    pipeline=st.integers(1, 4),
    seed=st.integers(0, 99),
)


@given(group=GROUPS, case=CASES, explicit=st.booleans())
@example(group=4, case=Case(12, 3, joint=2, pipeline=2), explicit=True)  # some use two key heads
@example(group=4, case=Case(2, 1, joint=2, pipeline=3), explicit=False)  # two ranks have no head
@example(group=4, case=Case(5, 5, joint=2, uneven="list", pipeline=2), explicit=False)
def test_outputs_and_gradients_are_those_of_one_process(ranks: Ranks, group, case, explicit):
    ranks.run(group, against_one_process, case, explicit)
