"""`ulysses_attention` with joint tokens against FastVideo's `DistributedAttention`."""

from __future__ import annotations

import importlib

import peer_wheels
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from test_integration_fastvideo import flat_reduce_scatter, make_groups, use_base_communicator
from torch import Tensor

from fastvideo_comm import DeviceCommunicatorBase, ulysses_attention

needs_fastvideo = pytest.mark.skipif(
    not peer_wheels.is_there("fastvideo"), reason=peer_wheels.how_to_install("fastvideo")
)


def tensors(heads: int, rank: int, joint: int) -> list[Tensor]:
    """query, key, value of this rank, and those of text tokens that are the same on all ranks."""
    generator = torch.Generator().manual_seed(3)
    everyones = torch.randn(4, 3, 2, 5, heads, 8, generator=generator)
    text = torch.randn(3, 2, joint, heads, 8, generator=generator)
    leaves = [*everyones[rank], *(text if joint else ())]
    return [leaf.clone().requires_grad_() for leaf in leaves]


def results(outputs: tuple[Tensor | None, ...], leaves: list[Tensor], rank: int) -> list[Tensor]:
    """Outputs and gradients, for another loss on every rank."""
    there = [output for output in outputs if output is not None]
    sum((y * y).sum() * (rank + 1) for y in there).backward()
    return [*[y.detach() for y in there], *[leaf.grad for leaf in leaves]]


def side_by_side(communicator: DeviceCommunicatorBase, joint: int, pipeline: int) -> None:
    state = make_groups(4)
    use_base_communicator(state)
    layer = importlib.import_module("fastvideo.attention.layer")
    context = importlib.import_module("fastvideo.forward_context")
    sdpa = importlib.import_module("fastvideo.attention.backends.sdpa")
    heads, rank = 8, communicator.rank
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "get_attn_backend", lambda *_, **__: sdpa.SDPABackend)
        patch.setattr(dist, "reduce_scatter_tensor", flat_reduce_scatter)
        module = layer.DistributedAttention(heads, 8)
        leaves = tensors(heads, rank, joint)
        with context.set_forward_context(current_timestep=0, attn_metadata=None):
            theirs = results(module(*leaves[:3], None, *leaves[3:]), leaves, rank)
    state.destroy_model_parallel()
    leaves = tensors(heads, rank, joint)
    text = tuple(leaves[3:]) or None
    ours = ulysses_attention(communicator, *leaves[:3], joint=text, pipeline=pipeline)
    ours = results(ours if joint else (ours,), leaves, rank)
    assert len(ours) == len(theirs) == (8 if joint else 4)
    if pipeline > 1:  # in stages a rank computes other heads, and has another share of the text's
        for gradient in (*ours[-joint:], *theirs[-joint:]):
            dist.all_reduce(gradient, group=communicator.cpu_group)
    for mine, expected in zip(ours, theirs, strict=True):
        # fp32: the same sums, over ranks perhaps in another order.
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@needs_fastvideo
@pytest.mark.parametrize(("joint", "pipeline"), [(0, 1), (3, 1), (3, 2)])
def test_outputs_and_gradients_are_those_of_fastvideo(ranks: Ranks, joint: int, pipeline: int):
    ranks.run(4, side_by_side, joint, pipeline)
