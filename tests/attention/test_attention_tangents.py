"""Forward mode through `ulysses_attention`, eager and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor
from torch.func import jacfwd, jvp

from fastvideo_comm import DeviceCommunicatorBase, ulysses_attention


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    weights = torch.einsum("bshd,bthd->bhst", query, key).softmax(-1)
    return torch.einsum("bhst,bthd->bshd", weights, value)


def attended(
    communicator: DeviceCommunicatorBase, pipeline: int, is_joint: bool, is_compiled: bool
) -> None:
    size, rank = communicator.world_size, communicator.rank
    generator = torch.Generator().manual_seed(0)
    # Three heads, which two ranks share unevenly.
    whole, along = torch.rand(2, 3, 1, 2 * size, 3, 3, dtype=torch.float64, generator=generator)
    text = torch.rand(3, 1, 2, 3, 3, dtype=torch.float64, generator=generator)

    def mine(time: Tensor) -> Tensor:
        part = (whole + time * along).chunk(size, 2)[rank]
        joint = tuple(text * time) if is_joint else None
        out = ulysses_attention(communicator, *part, attention, pipeline=pipeline, joint=joint)
        return torch.cat(out, 1) if is_joint else out

    def of_one_process(time: Tensor) -> Tensor:
        tokens = whole + time * along
        tokens = torch.cat((tokens, text * time), 2) if is_joint else tokens
        out = attention(*tokens)
        return torch.cat((out[:, 2 * rank : 2 * rank + 2], out[:, 2 * size :]), 1)

    time = torch.tensor(0.7, dtype=torch.float64)
    expected = jvp(of_one_process, (time,), (torch.ones_like(time),))
    # In fp64; a rank adds in another order over fewer heads.
    torch.testing.assert_close(jacfwd(mine)(time), expected[1], rtol=1e-12, atol=1e-12)

    def derivative(time: Tensor) -> Any:
        return jvp(mine, (time,), (torch.ones_like(time),))

    torch._dynamo.reset()
    traced = torch.compile(derivative, backend="aot_eager", fullgraph=True)
    given = (traced if is_compiled else derivative)(time)
    torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("pipeline", "is_joint"), [(1, False), (2, True)])
@pytest.mark.parametrize("size", [1, 2, (0, 1, 3)])
def test_tangents_of_attention_are_those_of_one_process(ranks: Ranks, size, pipeline, is_joint):
    ranks.run(size, attended, pipeline, is_joint, False)


@pytest.mark.parametrize(
    ("pipeline", "is_joint", "way"), [(2, False, "messages"), (1, True, "memory")]
)
def test_compiled_tangents_of_attention_are_those_of_one_process(
    ranks: Ranks, pipeline, is_joint, way
):
    ranks.run(2, attended, pipeline, is_joint, True, ways=(way,))
