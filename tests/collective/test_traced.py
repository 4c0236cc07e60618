"""Under torch.compile: one graph, forward and backward, equal to eager."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist
from op_table import calls_of
from ranks import Ranks
from torch._dynamo.testing import CompileCounterWithBackend

from fastvideo_comm import DeviceCommunicatorBase, split_tensor_along_last_dim

# The calls of the table, and some in a row.
OPS: dict[str, Callable[[DeviceCommunicatorBase, torch.Tensor], torch.Tensor]] = {
    **calls_of("any"),
    "all_to_all_4D": lambda c, x: c.all_to_all_4D(torch.relu(c.all_to_all_4D(x)), 1, 2),
    "all_gathers": lambda c, x: c.all_gather(x, 1).square().sum() + c.all_gather(x).sin().sum(),
    "all_reduces": lambda c, x: c.all_reduce(x) + c.all_reduce(x, dist.ReduceOp.AVG),
    "extremes": lambda c, x: (
        c.all_reduce(x, dist.ReduceOp.MAX) * c.all_reduce(x, dist.ReduceOp.MIN)
    ),
    "slices": lambda c, x: c.slice(x, 2) * c.slice(x, 1, scale_grad=True).mean(),
    "split": lambda c, x: torch.stack(split_tensor_along_last_dim(x, 2, True)),
}


# By memory only the exchange is compiled to something else.
MESSAGES = ["messages"]
# Several in a graph: most of the time is for each graph.
NUM_GRAPHS = 4


def compiled(
    communicator: DeviceCommunicatorBase, names: Sequence[str], backend: str = "aot_eager"
) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)

    def function(x: torch.Tensor) -> list[torch.Tensor]:
        return [
            OPS[name](communicator, x * (1 + index) if index else x)
            for index, name in enumerate(names)
        ]

    traced = torch.compile(function, backend=counter, fullgraph=True)
    torch.manual_seed(communicator.rank)
    size = communicator.world_size
    for _ in range(2):
        x = torch.rand(2, 3 * size, 2 * size, 4, dtype=torch.float64, requires_grad=True)
        right, outputs = function(x), traced(x)
        for name, *pair in zip(names, right, outputs, strict=True):
            # A graph runs once backward with all its outputs, of which one has a gradient.
            grads = [
                torch.autograd.grad(output.square().sum(), x, retain_graph=True)[0]
                for output in pair
            ]
            # The compiler fuses and reorders arithmetic in fp64.
            for got, expected in (pair[::-1], grads[::-1]):
                torch.testing.assert_close(
                    *(got, expected),
                    rtol=1e-12,
                    atol=1e-12,
                    msg=lambda text, name=name: f"{name}: {text}",
                )
    assert counter.frame_count == 1


@pytest.mark.parametrize("first", range(NUM_GRAPHS))
def test_every_op_traces_whole_and_its_gradient_is_that_of_eager(ranks: Ranks, first):
    ranks.run(2, compiled, list(OPS)[first::NUM_GRAPHS], ways=MESSAGES)


def test_by_memory_every_collective_traces_whole_and_its_gradient_is_that_of_eager(ranks: Ranks):
    names = ("all_to_all_4D", "all_gather", "all_reduce sum", "reduce_scatter", "broadcast")
    ranks.run(2, compiled, names, ways=["memory"])


def returned_beside(communicator: DeviceCommunicatorBase) -> None:
    """Two equal collectives of one tensor, which differ in their gradients alone."""

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            communicator.all_reduce(x),
            communicator.all_reduce(x, grad="identity"),
            communicator.all_gather(x, 0),
            communicator.all_gather(x, 0, grad="slice"),
        )

    x = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    torch._dynamo.reset()
    grads = []
    for call in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        losses = [(output * factor).sum() for factor, output in enumerate(call(x), 1)]
        grads.append(torch.autograd.grad(sum(losses), x)[0])
    torch.testing.assert_close(*grads)  # the sums of four terms, in another order


def test_two_collectives_of_one_tensor_keep_their_own_gradients(ranks: Ranks):
    ranks.run(2, returned_beside, ways=MESSAGES)


def test_exchange_compiles_to_code_that_agrees(ranks: Ranks):
    ranks.run((1, 3), compiled, ["all_to_all_4D"], "inductor")


def growing(communicator: DeviceCommunicatorBase) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    size = communicator.world_size

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def function(x: torch.Tensor) -> torch.Tensor:
        y = communicator.all_to_all_4D(x)
        return communicator.all_gather(communicator.all_to_all_4D(y, 1, 2), 1)

    for sequence in (4, 6, 10, 7):
        x = torch.rand(2, sequence * size, 2 * size, 3, requires_grad=True)
        output = function(x)
        assert torch.equal(output, communicator.all_gather(x, 1))
        (grad,) = torch.autograd.grad(output.sum(), x)
        assert torch.equal(grad, torch.full_like(x, size))
    assert counter.frame_count == 1


def test_a_sequence_of_another_length_does_not_recompile(ranks: Ranks):
    ranks.run(2, growing)


def second_communicator(communicator: DeviceCommunicatorBase) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def function(x: torch.Tensor) -> torch.Tensor:
        return communicator.all_reduce(x)

    x = torch.ones(3)
    assert torch.equal(function(x), x * communicator.world_size)
    other = DeviceCommunicatorBase(communicator.cpu_group, unique_name="other")
    assert torch.equal(other.all_reduce(x), x * communicator.world_size)
    assert torch.equal(function(x), x * communicator.world_size)
    assert counter.frame_count == 1


def test_a_second_communicator_leaves_the_firsts_graph_alone(ranks: Ranks):
    ranks.run(2, second_communicator)


def mistaken(communicator: DeviceCommunicatorBase) -> None:
    torch._dynamo.reset()
    x = torch.rand(1, 3, 5, 2)
    function = torch.compile(communicator.all_to_all_4D, backend="aot_eager")
    with pytest.raises(ValueError, match="scatter_dim=2 that world_size=2 divides, got 5"):
        function(x)


def test_a_mistake_has_the_same_error_when_compiled(ranks: Ranks):
    ranks.run(2, mistaken)


def without_a_gradient(communicator: DeviceCommunicatorBase) -> None:
    x = torch.ones(2)
    for op, call in (
        ("gather", lambda: communicator.gather(x, 1)),
        ("send", lambda: communicator.send(x, 1 - communicator.rank)),
        ("recv", lambda: communicator.recv((2,), x.dtype)),
        ("barrier", communicator.barrier),
        ("reduce_gradients", lambda: communicator.reduce_gradients([x])),
    ):
        torch._dynamo.reset()
        text = f"^{op} on rank {communicator.rank} of 2 .* {op} must be called outside compiled"
        with pytest.raises(ValueError, match=text):
            torch.compile(call, backend="eager")()
    communicator.barrier()


def test_an_op_without_a_gradient_says_that_it_is_not_compiled(ranks: Ranks):
    ranks.run(2, without_a_gradient, ways=MESSAGES)
