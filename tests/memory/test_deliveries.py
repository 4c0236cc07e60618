"""The copies of a call as they are planned for the kernel that makes them."""

from __future__ import annotations

import torch

from fastvideo_comm.memory import deliveries


def test_parts_of_one_size_that_go_to_different_offsets_are_apart():
    """Behind an output that has another size on each rank."""
    x = torch.arange(6.0)
    plan = deliveries.plan_of(
        [x],
        lambda owner: [((16 * owner,), x.dtype), ((2,), x.dtype)],
        lambda target, outputs: [(outputs[1], x[2 * target : 2 * target + 2])],
        range(3),
        rank=2,
        world=3,
    )
    made = deliveries.deliveries_of(plan, [x], rank=2, world=3)
    assert [(each.first, each.offset) for each in made] == [(0, 0), (1, 64), (2, 128)]
    assert [each.src.tolist() for each in made] == [[[0, 1]], [[2, 3]], [[4, 5]]]


def test_parts_that_differ_are_sent_in_the_order_of_the_ranks():
    x = torch.arange(12.0)
    parts = {0: x[:3], 1: x[3:7], 2: x[7:]}
    plan = deliveries.plan_of(
        [x],
        lambda owner: [((2,), x.dtype), (parts[owner].shape, x.dtype)],
        lambda target, outputs: [(outputs[1], parts[target])],
        range(3),
        rank=1,
        world=3,
    )
    made = deliveries.deliveries_of(plan, [x], rank=1, world=3)
    assert [each.first for each in made] == [2, 0, 1]
    assert [each.src.tolist() for each in made] == [[parts[r].tolist()] for r in (2, 0, 1)]
    assert {each.offset for each in made} == {64}, "an output begins at a multiple of 64"
