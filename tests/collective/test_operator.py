"""Compiled exchanges by memory: one operator, with its fake, its gradient and its end."""

from __future__ import annotations

import pytest
import torch
from ranks import Ranks
from test_collectives import same

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.collective import operator
from fastvideo_comm.collective.layout import Split, Splits


def calls_of(graph: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def compiled(communicator: DeviceCommunicatorBase) -> list[str]:
    torch._dynamo.reset()
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        seen.extend(calls_of(graph))
        return graph

    x = torch.rand(2, 3, 2 * communicator.world_size, 4)
    expected = communicator.all_to_all_4D(x)  # connects memory
    traced = torch.compile(communicator.all_to_all_4D, backend=backend, fullgraph=True)
    same(traced(x), expected)
    return seen


def test_compiled_code_exchanges_by_the_operator_where_memory_is_connected(ranks: Ranks):
    for calls in ranks.run(2, compiled, ways=["memory"]):
        assert any("fastvideo_comm.all_to_all" in call for call in calls), calls
        assert not any("_c10d_functional" in call for call in calls), calls
    for calls in ranks.run(2, compiled, ways=["messages"]):
        assert any("_c10d_functional.all_to_all" in call for call in calls), calls


def by_hand(communicator: DeviceCommunicatorBase) -> None:
    fresh = DeviceCommunicatorBase(communicator.cpu_group, memory="on", unique_name="fresh")
    ranks = fresh.world_size
    x = torch.rand(2, 3, ranks, 2, dtype=torch.float64, requires_grad=True)
    y = fresh.all_to_all_4D(x)
    splits = operator._encoded(Splits((Split(2),), (Split(1),)))
    name = fresh._runner.group.operator_name
    (output,) = torch.ops.fastvideo_comm.all_to_all([x], name, splits)
    same(output, y)
    weight = torch.rand_like(y)
    (grad,) = torch.autograd.grad((output**3 * weight).sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad((y**3 * weight).sum(), x, create_graph=True)
    same(grad, expected)
    (twice,) = torch.autograd.grad(grad.sin().sum(), x)
    (expected_twice,) = torch.autograd.grad(expected.sin().sum(), x)
    same(twice, expected_twice)
    torch.library.opcheck(
        torch.ops.fastvideo_comm.all_to_all.default,
        ([x.detach()], name, splits),
        test_utils=("test_schema", "test_faketensor"),
    )
    fresh.destroy()
    with pytest.raises(RuntimeError, match="must be open; it was destroyed"):
        torch.ops.fastvideo_comm.all_to_all([x], name, splits)


def test_the_operator_has_a_fake_a_gradient_of_every_order_and_an_end(ranks: Ranks):
    ranks.run((1, 3), by_hand, ways=["messages"])


def test_splits_survive_being_given_as_integers():
    splits = Splits(
        (Split(2, (1, 0, 5)), Split(2, None, 3), Split(1)),
        (Split(1), Split(1, (2, 2, 3)), Split(2, None, 1)),
    )
    assert operator._decoded(operator._encoded(splits), 3, 3) == splits
