"""Gradients of tangents: of losses that all ranks share, told apart from those of values, freed."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from test_forward_mode import of_rank
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jacfwd, jvp

from fastvideo_comm import DeviceCommunicatorBase, forward_mode
from fastvideo_comm.errors import MismatchError
from fastvideo_comm.forward_mode import check_tangents

AVG = dist.ReduceOp.AVG
Op = Callable[[DeviceCommunicatorBase, Tensor], Tensor]
# Each op, and what its adjoint makes of the gradient of a result that all ranks hold.
WHOLE: dict[str, tuple[Op, Op]] = {
    "sum": (lambda c, x: c.all_reduce(x, grad="identity"), lambda c, g: g),
    "average": (lambda c, x: c.all_reduce(x, AVG, grad="identity"), lambda c, g: g / c.world_size),
    "join": (
        lambda c, x: c.all_gather(x, 1, grad="slice"),
        lambda c, g: g.chunk(c.world_size, 1)[c.rank],
    ),
    "part": (lambda c, x: c.slice(x, 1), lambda c, g: c.all_gather(g, 1)),
    "scaled part": (
        lambda c, x: c.slice(x, 1, scale_grad=True),
        lambda c, g: c.all_gather(g, 1) / c.world_size,
    ),
}


def of_one_loss(communicator: DeviceCommunicatorBase, name: str) -> None:
    op, adjoint = WHOLE[name]
    value, tangent = of_rank(communicator, 2)
    leaf = value.clone().requires_grad_()
    along = jvp(lambda x: op(communicator, x.sin()), (leaf,), (tangent,))[1]
    weight = torch.arange(along.numel(), dtype=along.dtype).view_as(along)
    (grad,) = torch.autograd.grad((weight * along).sum(), leaf)
    expected = -adjoint(communicator, weight) * tangent * value.sin()
    torch.testing.assert_close(grad, expected, rtol=1e-13, atol=1e-13)  # fp64


@pytest.mark.parametrize("name", WHOLE)
def test_the_gradient_of_a_tangent_is_counted_once_where_that_of_the_value_is(ranks: Ranks, name):
    ranks.run(2, of_one_loss, name)


def beside_a_constant(communicator: DeviceCommunicatorBase) -> None:
    value, constant = of_rank(communicator, 2)

    def exchange(scales: Tensor) -> tuple[Tensor, ...]:
        return communicator.all_to_all_4D((value * scales.sum(), constant))

    moved, of_constant = jacfwd(exchange)(torch.ones(3, dtype=torch.float64))
    expected = communicator.all_to_all_4D(value)
    assert all(torch.equal(column, expected) for column in moved.unbind(-1))
    assert torch.equal(of_constant, torch.zeros_like(moved))


def test_many_tangents_travel_beside_a_tensor_without_any(ranks: Ranks):
    ranks.run(2, beside_a_constant)


def one_half_each(communicator: DeviceCommunicatorBase, memory: str) -> None:
    """Rank 0 goes back through the values, rank 1 through the tangents: shapes are the same."""
    own = DeviceCommunicatorBase(communicator.cpu_group, validate="always", memory=memory)
    leaf, along = (x.clone().requires_grad_() for x in of_rank(communicator, 2))
    halves = jvp(own.all_to_all_4D, (leaf,), (along,))
    with pytest.raises(MismatchError, match=r"of=values(.|\n)*of=tangents"):
        halves[own.rank].sum().backward()
    assert own.all_reduce(torch.ones(1)).item() == 2, "still usable"
    own.destroy()


@pytest.mark.parametrize("memory", ["off", "on"])
def test_gradients_of_values_and_of_tangents_are_not_traded(ranks: Ranks, memory: str):
    ranks.run(2, one_half_each, memory, ways=("messages",))


def let_go(communicator: DeviceCommunicatorBase) -> None:
    leaf, along = (torch.rand(1, 64, 4, 64, requires_grad=True) for _ in range(2))
    communicator.all_to_all_4D(leaf.detach())
    gc.collect()
    gc.disable()
    try:
        before = communicator.memory_stats().bytes_in_use
        halves = jvp(communicator.all_to_all_4D, (leaf,), (along,))
        assert communicator.memory_stats().bytes_in_use > before
        del halves
        assert communicator.memory_stats().bytes_in_use == before
    finally:
        gc.enable()


def test_what_a_jvp_gave_is_freed_as_soon_as_nobody_holds_it(ranks: Ranks):
    ranks.run(2, let_go, ways=("memory",))


def left_out(_: DeviceCommunicatorBase) -> None:
    x = torch.ones(2)
    words = "must get a tensor with a tangent in compiled code inside forward_ad.dual_level"
    with forward_ad.dual_level(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward_mode, "_LEAVES_OUT_TANGENTS", False)
        check_tangents((x,))
        patch.setattr(forward_mode, "_LEAVES_OUT_TANGENTS", True)
        check_tangents((3, x, forward_ad.make_dual(x, x)))
        with pytest.raises(RuntimeError, match=words):
            check_tangents((3, x))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward_mode, "_LEAVES_OUT_TANGENTS", True)
        check_tangents((3, x))
        jvp(lambda y: (check_tangents((x,)), y)[1], (x,), (x,))


def test_where_torch_leaves_tangents_out_a_call_without_any_is_refused(ranks: Ranks):
    """torch before 2.15 does so in compiled code inside forward_ad.dual_level."""
    ranks.run(1, left_out, ways=("messages",))
