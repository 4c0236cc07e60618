"""The plan of heads: every head once, key heads beside the query heads that use them."""

from __future__ import annotations

import math

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastvideo_comm.head_plan import plan_heads

NUMBERS = {
    "key_heads": st.integers(1, 12),
    "per_key": st.integers(1, 6),
    "ranks": st.integers(1, 9),
    "stages": st.integers(1, 5),
}


def numbered(heads: int) -> torch.Tensor:
    return torch.arange(heads).view(1, 1, heads, 1)


@settings(max_examples=300)
@given(**NUMBERS)
@example(key_heads=3, per_key=4, ranks=4, stages=1)  # query heads 3, 4, 5: key heads 0, 1, 1
@example(key_heads=3, per_key=4, ranks=4, stages=2)
@example(key_heads=2, per_key=1, ranks=3, stages=1)  # a rank without heads
def test_every_query_head_is_computed_once_beside_its_key_head(key_heads, per_key, ranks, stages):
    heads = key_heads * per_key
    plan = plan_heads(heads, key_heads, ranks, stages)
    query, key = numbered(heads), numbered(key_heads)
    sent = plan.sent(query, key, key, replicate=True)
    assert len(sent) == len(plan.query)
    computed = []
    for rank in range(ranks):
        keys = None
        for stage, tensors in enumerate(sent):
            own = plan.own(tensors, stage, rank)
            keys = own[1] if len(own) == 3 else keys
            used = plan.keys_used(keys, stage, rank).flatten()
            queries = own[0].flatten()
            computed += queries.tolist()
            if len(queries):
                group = len(queries) // len(used)
                assert torch.equal(used.repeat_interleave(group), queries // per_key)
    assert sorted(computed) == list(range(heads))
    outputs = [
        torch.cat([plan.own(t, i, r)[0] for r in range(ranks)], 2) for i, t in enumerate(sent)
    ]
    assert torch.equal(plan.joined(outputs), query)


@given(**NUMBERS)
def test_no_rank_has_more_heads_than_the_unit_of_sharing_makes_necessary(
    key_heads, per_key, ranks, stages
):
    heads = key_heads * per_key
    plan = plan_heads(heads, key_heads, ranks, stages)
    unit = per_key if key_heads >= ranks else 1
    most = max(sum(counts) for counts in zip(*plan.query, strict=True))
    assert most == unit * math.ceil(heads // unit / ranks)
    # The stages of a rank differ by one unit at most.
    for counts in zip(*plan.query, strict=True):
        assert max(counts) - min(counts) <= unit


@given(**NUMBERS)
def test_heads_that_the_ranks_share_evenly_need_no_sizes_and_stages_no_copy(
    key_heads, per_key, ranks, stages
):
    heads = key_heads * ranks * per_key
    plan = plan_heads(heads, key_heads * ranks, ranks, stages)
    query, key = numbered(heads), numbered(key_heads * ranks)
    for stage, tensors in enumerate(plan.sent(query, key, key)):
        assert plan.scatter_sizes(stage) is None
        assert tensors[0].untyped_storage().data_ptr() == query.untyped_storage().data_ptr()


@given(**NUMBERS)
def test_scarce_key_heads_travel_once(key_heads, per_key, ranks, stages):
    plan = plan_heads(key_heads * per_key, key_heads, key_heads + ranks, stages)
    query, key = numbered(key_heads * per_key), numbered(key_heads)
    numbers = [len(tensors) for tensors in plan.sent(query, key, key)]
    assert numbers == [3, *[1] * (len(plan.query) - 1)]
