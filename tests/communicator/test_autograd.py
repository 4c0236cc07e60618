"""Gradients: against autograd through the same computation without ranks, to second order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from op_table import calls_of
from ranks import Ranks
from torch.autograd import forward_ad

from fastvideo_comm import DeviceCommunicatorBase, DistributedAutograd
from fastvideo_comm.collective.group import Group

GROUPS = st.sampled_from((2, 3, 4, (1, 3), (0, 2, 3)))


class Everyone(torch.autograd.Function):
    """Each rank's tensor -> all of them stacked, `[P, ..]`, as one tensor that all ranks hold."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, mine: torch.Tensor) -> torch.Tensor:
        ctx.group = group
        stacked = [torch.empty_like(mine.contiguous()) for _ in range(group.size())]
        dist.all_gather(stacked, mine.contiguous(), group=group)
        return torch.stack(stacked)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, Mine.apply(ctx.group, grad_output)


class Mine(torch.autograd.Function):
    """The adjoint: of a tensor `[P, ..]` that all ranks hold, this rank's entry."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, everyones: torch.Tensor) -> torch.Tensor:
        ctx.group = group
        return everyones[group.rank()].clone()

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, Everyone.apply(ctx.group, grad_output)


def one_function(
    communicator: DeviceCommunicatorBase, op: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """All ranks' inputs -> all ranks' outputs: the collective as gradcheck can see it.

    Its derivative is that of the sum over ranks of the local losses, which is our convention.
    """
    group = communicator.cpu_group
    return lambda inputs: Everyone.apply(group, op(Mine.apply(group, inputs)))


OPS = calls_of("any", gradient="sum")


def checked(communicator: DeviceCommunicatorBase, name: str) -> None:
    torch.manual_seed(0)  # every rank checks the same inputs in the same order
    ranks = communicator.world_size
    # Distinct values, far further apart than gradcheck's step: no ties for MIN and MAX.
    numbers = torch.randperm(ranks**3, dtype=torch.float64) / 7 - 1
    inputs = numbers.view(ranks, 1, ranks, ranks, 1).requires_grad_()
    function = one_function(communicator, lambda x: OPS[name](communicator, x))
    # Along random directions, to which every entry of the Jacobian adds.
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("size", [2, (0, 2, 3)])
def test_first_and_second_derivative_are_those_of_the_sum_of_losses(ranks: Ranks, name, size):
    ranks.run(size, checked, name)


def checked_slice(communicator: DeviceCommunicatorBase, scale_grad: bool) -> None:
    torch.manual_seed(0)
    group, size = communicator.cpu_group, communicator.world_size
    x = torch.rand(2, 3 * size, dtype=torch.float64, requires_grad=True)
    scale = size if scale_grad else 1  # what the gradient is divided by, by definition

    def function(x: torch.Tensor) -> torch.Tensor:
        mine = communicator.slice(x, 1, scale_grad=scale_grad)
        return Everyone.apply(group, mine * mine) * scale

    # With scale_grad the forward is times P, so that gradcheck's numbers are what is reported.
    expected = 2 * x.detach()
    (grad,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    assert torch.allclose(grad, expected, rtol=1e-12)  # one multiplication and one division
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert torch.allclose(second, torch.full_like(x, 2.0 / scale), rtol=1e-12)
    if not scale_grad:
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x, fast_mode=True)


@pytest.mark.parametrize("scale_grad", [False, True])
def test_slice_gives_every_rank_the_whole_gradient(ranks: Ranks, scale_grad):
    ranks.run(3, checked_slice, scale_grad)


def against_slicing(
    communicator: DeviceCommunicatorBase, shape: list[int], strided: bool, seed: int
) -> None:
    ranks, rank = communicator.world_size, communicator.rank
    generator = torch.Generator().manual_seed(seed)
    batch, sequence, heads, width = shape

    def draw(*sizes: int) -> torch.Tensor:  # small integers: sums do not round
        return torch.randint(-9, 9, sizes, generator=generator).double()

    whole = draw(batch, sequence * ranks, heads * ranks, width).requires_grad_()
    for scatter_dim, gather_dim in ((2, 1), (1, 2)):
        part = whole.detach().chunk(ranks, gather_dim)[rank]
        if strided:
            part = torch.stack((part, part), -1)[..., 0]
        mine = part.clone(memory_format=torch.preserve_format).requires_grad_()
        weights = draw(*whole.shape)
        output = communicator.all_to_all_4D(mine, scatter_dim, gather_dim)
        (output**3 * weights.chunk(ranks, scatter_dim)[rank]).sum().backward()
        (expected,) = torch.autograd.grad((whole**3 * weights).sum(), whole)
        assert torch.equal(mine.grad, expected.chunk(ranks, gather_dim)[rank])

    for dim in range(4):
        mine = whole.detach().chunk(ranks, 1)[rank].clone().requires_grad_()
        leaves = [part.clone().requires_grad_() for part in whole.detach().chunk(ranks, 1)]
        weights = draw(ranks, *torch.cat(leaves, dim).shape)  # another loss on every rank
        (communicator.all_gather(mine, dim) ** 2 * weights[rank]).sum().backward()
        (torch.cat(leaves, dim) ** 2 * weights).sum().backward()
        assert torch.equal(mine.grad, leaves[rank].grad)


@given(
    group=GROUPS,
    shape=st.tuples(*[st.integers(1, 3)] * 4),
    strided=st.booleans(),
    seed=st.integers(0, 99),
)
def test_gradients_are_those_of_slicing_the_global_tensor(
    ranks: Ranks, group, shape, strided, seed
):
    ranks.run(group, against_slicing, list(shape), strided, seed)


def ties(communicator: DeviceCommunicatorBase) -> None:
    rank = communicator.rank
    nan = float("nan")
    # Columns: one holder, two, all, nan on one rank.
    everyones = torch.tensor([[1.0, 5, 2, nan], [7.0, 5, 2, 0], [3.0, 4, 2, 0]])
    weights = torch.tensor([[1.0, 2, 3, 4], [10, 20, 30, 40], [100, 200, 300, 400]])
    replicas = torch.tensor([[0.0, 0.5, 1 / 3, 1], [1, 0.5, 1 / 3, 0], [0, 0, 1 / 3, 0]])
    for op, sign in ((dist.ReduceOp.MAX, 1.0), (dist.ReduceOp.MIN, -1.0)):
        x = (sign * everyones[rank]).requires_grad_()
        (communicator.all_reduce(x, op) * weights[rank]).sum().backward()
        expected = weights.sum(0) * replicas[rank]
        # gloo's extreme of a nan and a number is either; its column is checked where it is nan.
        known = communicator.all_reduce(x.detach(), op).isnan() | (torch.arange(4) < 3)
        assert torch.equal(x.grad[known], expected[known])


def test_gradient_of_max_and_min_goes_to_the_holders_and_ties_share_it(ranks: Ranks):
    ranks.run(3, ties)


def product_with_zeros(communicator: DeviceCommunicatorBase) -> None:
    rank, size = communicator.rank, communicator.world_size
    # Columns: no zero, one zero, two zeros.
    everyones = torch.tensor([[2.0, 0, 0], [3, 5, 0], [7, 11, 13]], dtype=torch.float64)
    x = everyones[rank].clone().requires_grad_()
    leaf = everyones.clone().requires_grad_()
    (communicator.all_reduce(x, dist.ReduceOp.PRODUCT) * (rank + 1)).sum().backward()
    (leaf.prod(0) * sum(range(1, size + 1))).sum().backward()
    assert torch.equal(x.grad, leaf.grad[rank])
    assert torch.autograd.gradgradcheck(
        one_function(communicator, lambda x: communicator.all_reduce(x, dist.ReduceOp.PRODUCT)),
        everyones.requires_grad_(),
    )


def test_gradient_of_product_is_exact_with_zeros(ranks: Ranks):
    ranks.run(3, product_with_zeros)


def applied_directly(communicator: DeviceCommunicatorBase) -> None:
    """The argument lists of upstream, with a bare process group."""
    group, size = communicator.cpu_group, communicator.world_size
    x = torch.rand(1, 2, 2 * size, 3, requires_grad=True)
    y = DistributedAutograd.AllToAll4D.apply(group, x, size, 2, 1)
    assert torch.equal(y, communicator.all_to_all_4D(x))
    assert torch.equal(DistributedAutograd.AllToAll4D.apply(group, y, size, 1, 2), x)
    assert torch.equal(
        DistributedAutograd.AllGather.apply(group, x, size, 1), communicator.all_gather(x, 1)
    )
    total = DistributedAutograd.AllReduce.apply(group, x, dist.ReduceOp.SUM)
    assert torch.equal(total, DistributedAutograd.AllReduce.apply(group, x))
    assert torch.equal(total, DistributedAutograd.AllReduce.apply(group, x, None))
    part = DistributedAutograd.Slice.apply(group, x, size, 2, True)
    assert torch.equal(part, communicator.slice(x, 2, scale_grad=True))
    reduced = DistributedAutograd.ReduceScatter.apply(group, x, size, 2)
    assert torch.equal(reduced, total.chunk(size, 2)[communicator.rank])
    (y.sum() + total.sum() + part.sum()).backward()
    # 1 from the exchange, P from the sum, 1/P from the scaled slice
    assert torch.allclose(x.grad, torch.full_like(x, 1 + size + 1 / size), rtol=1e-6)
    for function, arguments in (
        (DistributedAutograd.AllToAll4D, (2, 1)),
        (DistributedAutograd.AllGather, (1,)),
        (DistributedAutograd.ReduceScatter, (2,)),
        (DistributedAutograd.Slice, (2, True)),
    ):
        for wrong in (1, size + 1):
            error = rf"world_size must be the group's {size}, got {wrong}"
            with pytest.raises(ValueError, match=error):
                function.apply(group, x, wrong, *arguments)
    wrapped = Group(group)
    assert torch.equal(DistributedAutograd.AllToAll4D.apply(wrapped, x, size, 2, 1), y)


def test_functions_can_be_applied_with_the_argument_lists_of_upstream(ranks: Ranks):
    ranks.run(2, applied_directly)


def unusual_gradients(communicator: DeviceCommunicatorBase) -> None:
    size = communicator.world_size
    x = torch.rand(2, 3, 2 * size, 4, requires_grad=True)
    # sum() gives an expanded gradient, a transpose a strided one; both are read in place.
    communicator.all_to_all_4D(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    x.grad = None
    (communicator.all_to_all_4D(x).transpose(1, 3) * 2).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))
    with torch.no_grad():
        assert not communicator.all_to_all_4D(x).requires_grad
    with torch.inference_mode():
        assert communicator.all_gather(x).is_inference()
    z = torch.rand(2, 2 * size, dtype=torch.complex64, requires_grad=True)
    w = communicator.all_gather(z.conj(), 0)  # lazily conjugated: resolved before it is sent
    assert torch.equal(w.chunk(size)[communicator.rank], z.conj().resolve_conj())
    w.real.sum().backward()
    assert torch.equal(z.grad, torch.full_like(z, size))


def test_gradients_may_be_strided_expanded_or_absent(ranks: Ranks):
    ranks.run(3, unusual_gradients)


def watched_by_others(communicator: DeviceCommunicatorBase, op: str) -> None:
    x = torch.rand(2, 4, 4, 3)

    def apply(x: torch.Tensor) -> torch.Tensor:
        return OPS[op](communicator, x)

    with pytest.raises(RuntimeError, match="must not be called under torch"):
        torch.vmap(apply)(x[None])
    with torch.no_grad():
        plain = apply(x)
    recorded = apply(x.requires_grad_())
    assert recorded.requires_grad
    assert not plain.requires_grad
    assert torch.equal(plain, recorded)


@pytest.mark.parametrize("op", OPS)
def test_vmap_is_refused_and_what_nobody_differentiates_is_not_recorded(ranks: Ranks, op):
    ranks.run(2, watched_by_others, op)


def written_in_place(communicator: DeviceCommunicatorBase, op: str) -> None:
    x = torch.rand(2, 4, 4, 3, requires_grad=True)
    output = OPS[op](communicator, x)
    assert not output._is_view()
    output.mul_(2)
    output.sum().backward()
    assert x.grad is not None
    large = torch.rand(2, 32, 128, 4, requires_grad=True)
    assert not OPS[op](communicator, large)._is_view()


# MAX and MIN keep their output for the backward, as torch's own exp does.
@pytest.mark.parametrize("op", [op for op in OPS if "max" not in op and "min" not in op])
def test_an_output_may_be_written_in_place_before_its_backward(ranks: Ranks, op):
    ranks.run(2, written_in_place, op)


def forward_mode(communicator: DeviceCommunicatorBase, op: str) -> None:
    torch.manual_seed(communicator.rank)
    x, tangent = torch.rand(2, 2, 4, 4, 3, dtype=torch.float64).unbind(0)

    def apply(x: torch.Tensor) -> torch.Tensor:
        return OPS[op](communicator, x.sin())

    value, derivative = torch.func.jvp(apply, (x,), (tangent,))
    assert torch.equal(value, apply(x))
    step = 1e-6
    difference = (apply(x + step * tangent) - apply(x - step * tangent)) / (2 * step)
    # The difference's own error: step**2, and rounding of values up to 20 by 2e-16 / step.
    torch.testing.assert_close(derivative, difference, rtol=1e-7, atol=1e-8)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(apply(forward_ad.make_dual(x, tangent)))
    assert torch.equal(dual.primal, value)
    assert torch.equal(dual.tangent, derivative)
    # The gradient of what a jvp gives: backward through forward.
    leaf = x.clone().requires_grad_()
    weight = torch.rand_like(derivative)
    along = torch.func.jvp(apply, (leaf,), (tangent,))[1]
    (grad,) = torch.autograd.grad((weight * along).sum(), leaf)
    (twice,) = torch.autograd.grad((weight * apply(leaf)).sum(), leaf, create_graph=True)
    (expected,) = torch.autograd.grad((twice * tangent).sum(), leaf)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)
    (by_func,) = torch.func.vjp(apply, x)[1](weight)
    torch.testing.assert_close(by_func, twice.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", OPS)
def test_forward_mode_derivatives_are_those_of_a_difference(ranks: Ranks, op):
    ranks.run(2, forward_mode, op)


def conjugated(communicator: DeviceCommunicatorBase, async_op: bool) -> None:
    """A loss of the conjugate gives a gradient that is conjugated lazily."""
    ranks, rank = communicator.world_size, communicator.rank
    torch.manual_seed(0)
    weight = torch.randn(1, 2 * ranks, 3 * ranks, 4, dtype=torch.complex64)
    x = torch.randn(1, 2, 3 * ranks, 4, dtype=torch.complex64, requires_grad=True)
    y = communicator.all_to_all_4D(x, async_op=async_op)
    y = y.wait() if async_op else y
    (y.conj() * weight.chunk(ranks, 2)[rank]).sum().real.backward()
    assert torch.equal(x.grad, weight.chunk(ranks, 1)[rank])  # the same values, moved
    x.grad = None
    (communicator.all_gather(x, 1).conj() * weight).sum().real.backward()
    # P equal terms: exact for 2, and for 3 within the rounding of two additions.
    torch.testing.assert_close(x.grad, ranks * weight.chunk(ranks, 1)[rank])


@pytest.mark.parametrize("async_op", [False, True])
def test_gradients_may_be_lazily_conjugated(ranks: Ranks, async_op):
    ranks.run(2, conjugated, async_op)


def all_nan(communicator: DeviceCommunicatorBase, op: str) -> None:
    ranks, rank = communicator.world_size, communicator.rank
    nan = float("nan")
    x = torch.tensor([nan, 1.0 + rank, 5.0], dtype=torch.float64, requires_grad=True)
    output = communicator.all_reduce(x, getattr(dist.ReduceOp, op))
    assert output[0].isnan()
    output.sum().backward()
    holds = rank == (ranks - 1 if op == "MAX" else 0)
    # Every rank's loss has the output: G = P, shared among the ranks that hold the extreme.
    assert x.grad.tolist() == [1.0, float(ranks * holds), 1.0]


@pytest.mark.parametrize("op", ["MAX", "MIN"])
def test_where_all_ranks_hold_nan_they_share_the_gradient(ranks: Ranks, op):
    ranks.run(3, all_nan, op)


def second_derivatives(communicator: DeviceCommunicatorBase) -> None:
    def loss(x: torch.Tensor) -> torch.Tensor:
        return communicator.all_reduce(x**3).sum()

    x = torch.ones(3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"must not be called under torch\.vmap"):
        torch.func.hessian(loss)(x)
    both = torch.func.jacfwd(torch.func.grad(loss))(x)  # two ranks hold the loss of two
    assert torch.equal(both, 2 * 6 * torch.eye(3, dtype=torch.float64))


def test_the_hessian_by_vmap_is_refused_and_the_jacobian_of_a_gradient_is_right(ranks: Ranks):
    ranks.run(2, second_derivatives)
