"""Parts of different sizes: all_gather and slice against cat and split of the global tensor."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from op_table import SIZES, calls_of
from ranks import Ranks
from test_autograd import one_function
from test_collectives import DTYPES, GROUPS, STRIDES, WrittenBytes, restride, same, values
from test_exchange import sizes_of
from torch._dynamo.testing import CompileCounterWithBackend

from fastvideo_comm import DeviceCommunicatorBase, functions
from fastvideo_comm.collective import messages
from fastvideo_comm.collective.layout import Split
from fastvideo_comm.diagnosis import MismatchError
from fastvideo_comm.utils import near_even_sizes


def dealt_and_gathered(
    communicator: DeviceCommunicatorBase,
    shape: list[int],
    dim: int,
    dtype: torch.dtype,
    kind: str,
    seed: int,
) -> None:
    ranks, rank = communicator.world_size, communicator.rank
    sizes = sizes_of(shape[dim], ranks, torch.Generator().manual_seed(seed))
    whole = values(shape, dtype, seed)
    if kind == "expanded" and shape[0]:
        whole = whole[:1].expand(shape).clone()
    mine = whole.split(sizes, dim)[rank]
    part = communicator.slice(restride(whole, kind), dim - len(shape), scatter_sizes=sizes)
    same(part, mine)
    joined = communicator.all_gather(restride(mine, kind), dim, gather_sizes=tuple(sizes))
    same(joined, whole)
    same(communicator.all_gather(mine, dim - len(shape), gather_sizes="auto"), whole)
    even = communicator.slice(whole, dim, scatter_sizes="auto")
    same(even, whole.split(near_even_sizes(shape[dim], ranks), dim)[rank])
    # At world size 1 it is the input itself, with the input's strides.
    assert ranks == 1 or (part.is_contiguous() and joined.is_contiguous() and even.is_contiguous())


def unlike_parts(communicator: DeviceCommunicatorBase, limit: int) -> None:
    """The batch is small by one rank's length and large by another's."""
    ranks, rank = communicator.world_size, communicator.rank
    sizes = [1, 9, 2][:ranks]
    whole = values([3, sum(sizes), ranks, 2], torch.float32, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(messages, "TOGETHER_BYTES", limit)
        mine = whole.split(sizes, 1)[rank]
        there = communicator.all_to_all_4D(mine, gather_sizes=sizes)
        same(there, whole.chunk(ranks, 2)[rank])
        same(communicator.all_to_all_4D(there, 1, 2, scatter_sizes=sizes), mine)


@pytest.mark.parametrize("limit", [0, 100, 200, 300, 10_000])
def test_ranks_with_parts_of_other_sizes_agree_whether_a_batch_travels_together(ranks, limit):
    ranks.run(3, unlike_parts, limit, ways=["messages"])


@given(
    group=GROUPS,
    shape=st.tuples(st.integers(0, 3), st.integers(0, 7), st.integers(0, 5), st.integers(1, 3)),
    dim=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    kind=STRIDES,
    seed=st.integers(0, 99),
)
def test_any_parts_are_the_global_tensor_split_and_joined(
    ranks: Ranks, group, shape, dim, dtype, kind, seed
):
    ranks.run(group, dealt_and_gathered, list(shape), dim, dtype, kind, seed)


def against_cat(
    communicator: DeviceCommunicatorBase, shape: list[int], dim: int, strided: bool, seed: int
) -> None:
    ranks, rank = communicator.world_size, communicator.rank
    generator = torch.Generator().manual_seed(seed)
    sizes = sizes_of(shape[dim], ranks, generator)

    def draw(*size: int) -> torch.Tensor:  # small integers: sums do not round
        return torch.randint(-9, 9, size, generator=generator).double()

    whole, weights = draw(*shape), draw(ranks, *shape)  # another loss on every rank
    leaves = [part.clone().requires_grad_() for part in whole.split(sizes, dim)]
    mine = leaves[rank].detach()
    if strided:
        mine = torch.stack((mine, mine), -1)[..., 0]
    for grad in ("reduce_scatter", "slice"):
        x = mine.clone(memory_format=torch.preserve_format).requires_grad_()
        joined = communicator.all_gather(x, dim, gather_sizes=sizes, grad=grad)
        same(joined.detach(), whole)
        # "slice" is one loss that all ranks hold.
        losses = weights if grad == "reduce_scatter" else weights[:1]
        (joined**2 * losses[rank % len(losses)]).sum().backward()
        expected = torch.autograd.grad((torch.cat(leaves, dim) ** 2 * losses).sum(), leaves[rank])
        assert torch.equal(x.grad, expected[0])

    leaf = whole.clone().requires_grad_()
    for scale_grad in (False, True):
        x = whole.clone().requires_grad_()
        part = communicator.slice(x, dim, scatter_sizes=sizes, scale_grad=scale_grad)
        (part**2 * weights[0].split(sizes, dim)[rank]).sum().backward()
        (expected,) = torch.autograd.grad((leaf**2 * weights[0]).sum(), leaf)
        assert torch.equal(x.grad, expected / ranks if scale_grad else expected)


@given(
    group=GROUPS,
    shape=st.tuples(st.integers(1, 3), st.integers(0, 7), st.integers(1, 3)),
    dim=st.integers(0, 2),
    strided=st.booleans(),
    seed=st.integers(0, 99),
)
def test_gradients_are_those_of_splitting_and_joining_in_one_process(
    ranks: Ranks, group, shape, dim, strided, seed
):
    ranks.run(group, against_cat, list(shape), dim, strided, seed)


# gradcheck wants one shape on every rank: each takes its part of a tensor of the largest.
OPS = calls_of("uneven")


def checked(communicator: DeviceCommunicatorBase, name: str) -> None:
    torch.manual_seed(0)  # every rank checks the same inputs in the same order
    inputs = torch.rand(3, 2, max(SIZES), 2, dtype=torch.float64, requires_grad=True)
    function = one_function(communicator, lambda x: OPS[name](communicator, x) * (x.sum() + 1))
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("name", OPS)
def test_first_and_second_derivative_are_those_of_the_sum_of_losses(ranks: Ranks, name):
    ranks.run(3, checked, name)


def replicated(communicator: DeviceCommunicatorBase) -> None:
    torch.manual_seed(0)
    x = torch.rand(2, sum(SIZES), dtype=torch.float64, requires_grad=True)

    def function(x: torch.Tensor) -> torch.Tensor:
        mine = communicator.slice(x * x, 1, scatter_sizes=SIZES)
        return communicator.all_gather(mine.sin(), 1, grad="slice", gather_sizes=SIZES)

    assert torch.equal(function(x), (x * x).sin())
    assert torch.autograd.gradcheck(function, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, x, fast_mode=True)


def test_slice_and_its_gather_are_twice_differentiable_as_one_tensor(ranks: Ranks):
    ranks.run(3, replicated)


def passes(communicator: DeviceCommunicatorBase) -> None:
    """Bytes written around an exchange, in rows of the tensor; the padding is not written."""
    ranks, rank = communicator.world_size, communicator.rank
    sizes = [4] * (ranks - 1) + [3]
    row = 2 * 8 * 4
    whole = torch.rand(2, sum(sizes), 8)

    def gathered(part: torch.Tensor) -> torch.Tensor:
        return communicator.all_gather(part, 1, gather_sizes=sizes)

    mine = torch.rand(2, sizes[rank], 8)
    spread = torch.rand(2, 8, sizes[rank]).mT
    for count, call in (
        # The largest parts are sent as they stand.
        ((rank == ranks - 1) * sizes[rank] + sum(sizes), lambda: gathered(mine)),
        (sizes[rank] + sum(sizes), lambda: gathered(spread)),
        (sizes[rank], lambda: communicator.slice(whole, 1, scatter_sizes=sizes)),
        # Equal parts are gathered in place, whether or not they are said to be equal.
        (0, lambda: communicator.all_gather(whole, 0, gather_sizes=[2] * ranks)),
    ):
        with WrittenBytes() as written:
            call()
        assert written.count == count * row, (count, written.names)
    x = mine.clone().requires_grad_()
    output = gathered(x)
    gradient = torch.rand_like(output)
    with WrittenBytes() as written:
        torch.autograd.grad(output, x, gradient)
    sums = (ranks - 1) * max(sizes)
    count = sum(sizes) + sums + (rank == ranks - 1) * sizes[rank]
    assert written.count == count * row, (count, written.names)


def test_no_local_pass_but_one_into_and_one_out_of_the_messages(ranks: Ranks):
    ranks.run(3, passes, ways=["messages"])


def alone(communicator: DeviceCommunicatorBase) -> None:
    x = torch.rand(2, 5, requires_grad=True)
    assert communicator.all_gather(x, 1, gather_sizes=[5]) is x
    assert communicator.all_gather(x, 1, gather_sizes="auto") is x
    assert communicator.slice(x, 1, scatter_sizes=[5]) is x
    assert communicator.slice(x, 1, scatter_sizes="auto") is x
    with pytest.raises(ValueError, match=r"gather_sizes must hold the 5 at dim=1 .*, got \[4\]"):
        communicator.all_gather(x, 1, gather_sizes=[4])


def test_world_size_1_validates_and_then_returns_the_input_itself(ranks: Ranks):
    ranks.run((2,), alone)


X = torch.zeros(2, 5)
# op, arguments, error, message; on 2 ranks.
MISTAKES: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    (
        *("slice", {}, ValueError),
        r"a size at dim=1 that world_size=2 divides, got 5 of shape \[2, 5\]; "
        "scatter_sizes= shares it unevenly",
    ),
    (
        *("slice", {"scatter_sizes": [2, 2]}, ValueError),
        r"scatter_sizes must add up to the 5 at dim=1 of shape \[2, 5\], got \[2, 2\]",
    ),
    (
        *("slice", {"scatter_sizes": [1, 1, 3]}, ValueError),
        r"scatter_sizes must hold world_size=2 sizes of at least 0, got \[1, 1, 3\]",
    ),
    ("slice", {"scatter_sizes": [6, -1]}, ValueError, r"sizes of at least 0, got \[6, -1\]"),
    (
        *("slice", {"scatter_sizes": "even"}, ValueError),
        "scatter_sizes must be None, 'auto' or sizes, got 'even'",
    ),
    ("slice", {"scatter_sizes": "auto", "dim": 2}, ValueError, r"dim must be in \[-2, 1\].*got 2"),
    (
        *("all_gather", {"gather_sizes": [4, 4]}, ValueError),
        r"gather_sizes must hold the 5 at dim=1 of shape \[2, 5\] for rank \d, got \[4, 4\]",
    ),
    (
        *("all_gather", {"gather_sizes": [5]}, ValueError),
        r"gather_sizes must hold world_size=2 sizes of at least 0, got \[5\]",
    ),
    (
        *("all_gather", {"gather_sizes": [True, 5]}, TypeError),
        "every entry of gather_sizes must be an int, got bool",
    ),
    (
        *("all_gather", {"gather_sizes": "all"}, ValueError),
        "gather_sizes must be None, 'auto' or sizes, got 'all'",
    ),
    (
        *("all_gather", {"gather_sizes": [[5, 5], [5, 5]]}, ValueError),
        "gather_sizes must hold sizes for 1 tensors, got 2",
    ),
    ("all_gather", {"gather_sizes": "auto", "dim": -3}, ValueError, r"dim must be in .*, got -3"),
]


def mistake(communicator: DeviceCommunicatorBase, index: int) -> None:
    op, arguments, error, message = MISTAKES[index]
    where = rf"^{op} on rank {communicator.rank} of 2 in group 'test': .*"
    with pytest.raises(error, match=where + message):
        getattr(communicator, op)(X, **arguments)
    with pytest.raises(TypeError, match="input_ must be a tensor, got list"):
        getattr(communicator, op)([1], **arguments)


@pytest.mark.parametrize("index", range(len(MISTAKES)), ids=lambda i: f"{MISTAKES[i][0]}-{i}")
def test_sizes_that_do_not_fit_are_named_before_anything_is_sent(ranks: Ranks, index):
    ranks.run(2, mistake, index)


def compared(communicator: DeviceCommunicatorBase) -> list[str]:
    rank = communicator.rank
    sp = DeviceCommunicatorBase(
        communicator.cpu_group, unique_name="sp", validate="always", memory="off"
    )
    mine = torch.zeros(2, 3 + rank)
    calls: list[Callable[[], Any]] = [
        lambda: sp.all_gather(mine, 1),  # different shapes, and no sizes
        lambda: sp.all_gather(mine, 1, gather_sizes=[3, 4] if rank else [3, 5]),
        lambda: sp.all_gather(mine, 1, gather_sizes="auto" if rank else [3, 4]),
        lambda: sp.all_gather(mine, 1, gather_sizes=[3, 9]),  # rank 1's own mistake
        lambda: sp.all_gather(mine[: 1 + rank], 1, gather_sizes=[3, 4]),
        lambda: sp.slice(X, 1, scatter_sizes=[2 + rank, 3 - rank]),
        lambda: sp.all_gather(X, grad="slice" if rank else "reduce_scatter"),
    ]
    said = []
    for call in calls:
        with pytest.raises((MismatchError, ValueError)) as error:
            call()
        said.append(str(error.value))
        # As a tuple or a list: the same sizes. The next call is compared as before.
        sizes = (3, 4) if rank else [3, 4]
        for either in (sizes, "auto"):
            assert sp.all_gather(mine, 1, gather_sizes=either).shape == (2, 7)
    return said


def test_ranks_that_disagree_about_sizes_are_told(ranks: Ranks):
    words = [
        (r"\[2, 4\] .*<- shape", r"\[2, 4\] .*<- shape"),
        (r"1, gather_sizes=\[3, 5\] .*<- arg", r"1, gather_sizes=\[3, 4\] .*<- arg"),
        ("gather_sizes=auto .*<- arg", "gather_sizes=auto .*<- arg"),
        ("1 .*ValueError: gather_sizes must hold the 4.*<- bad", "^all_gather.* must hold the 4"),
        (r"\[1, \*\]", r"\[2, \*\]"),
        (r"scatter_sizes=\[2, 3\]", r"scatter_sizes=\[3, 2\]"),
        ("grad=slice .*<- arg", "grad=slice .*<- arg"),
    ]
    for rank, said in enumerate(ranks.run(2, compared)):
        for text, expected in zip(said, words, strict=True):
            assert re.search(expected[rank], text), text


def compiled(communicator: DeviceCommunicatorBase, grad: str) -> None:
    torch._dynamo.reset()
    ranks, rank = communicator.world_size, communicator.rank
    sizes = [3, 0]

    def function(x: torch.Tensor) -> torch.Tensor:
        part = communicator.slice(x.sin(), 1, scatter_sizes=sizes)
        first = communicator.all_gather(part * (rank + 2), 1, gather_sizes=sizes, grad=grad)
        part = communicator.slice(x, 2, scatter_sizes="auto", scale_grad=True)
        other = communicator.all_gather(
            part, -1, gather_sizes=near_even_sizes(x.shape[2], ranks), grad=grad
        )
        return first * other

    traced = torch.compile(function, backend="aot_eager", fullgraph=True)
    x = torch.rand(2, sum(sizes), 5, dtype=torch.float64, requires_grad=True)
    expected, actual = function(x), traced(x)
    assert torch.equal(expected, actual)
    grads = [torch.autograd.grad((y**2).sum(), x)[0] for y in (expected, actual)]
    torch.testing.assert_close(*grads, rtol=1e-14, atol=0)  # the order of factors
    with pytest.raises(Exception, match="gather_sizes must be given where a call is compiled"):
        torch.compile(
            lambda x: communicator.all_gather(x, 1, gather_sizes="auto"),
            backend="aot_eager",
            fullgraph=True,
        )(x)


# Compiled code of these is the same by memory.
MESSAGES = ["messages"]


@pytest.mark.parametrize("grad", ["reduce_scatter", "slice"])
def test_uneven_parts_trace_whole_and_their_gradients_are_those_of_eager(ranks: Ranks, grad):
    ranks.run(2, compiled, grad, ways=MESSAGES)


def growing(communicator: DeviceCommunicatorBase) -> int:
    torch._dynamo.reset()
    torch.manual_seed(0)  # the same on every rank
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def function(x: torch.Tensor) -> torch.Tensor:
        part = communicator.slice(x.sin(), 1, scatter_sizes="auto")
        sizes = near_even_sizes(x.shape[1], communicator.world_size)
        return communicator.all_gather(part, 1, gather_sizes=sizes, grad="slice")

    for sequence in (7, 9, 8, 11, 13, 10):
        x = torch.rand(2, sequence, 3, requires_grad=True)
        output = function(x)
        assert torch.equal(output, x.sin())
        (grad,) = torch.autograd.grad(output.sum(), x)
        assert torch.equal(grad, x.cos())
    return counter.frame_count


def test_near_even_parts_of_a_growing_sequence_are_one_graph_for_each_remainder(ranks: Ranks):
    assert ranks.run(2, growing, ways=MESSAGES) == [2, 2]


def applied_directly(communicator: DeviceCommunicatorBase) -> None:
    group, size, rank = communicator.cpu_group, communicator.world_size, communicator.rank
    share = Split(1, (1, 4))
    x = torch.rand(2, 5, dtype=torch.float64)
    mine = functions.Slice.apply(group, x, share, False)
    same(mine, x.split(share.sizes, 1)[rank])
    total = functions.ReduceScatter.apply(group, x, share)
    everyones = torch.empty(size * 2, 5, dtype=torch.float64)
    dist.all_gather_into_tensor(everyones, x, group=group)
    same(total, everyones.view(size, 2, 5).sum(0).split(share.sizes, 1)[rank].contiguous())


def test_functions_take_a_split_of_a_bare_process_group(ranks: Ranks):
    ranks.run(2, applied_directly)
