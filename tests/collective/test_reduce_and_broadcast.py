"""reduce_scatter, broadcast and barrier against one process: values, passes, time."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import Ranks
from test_collectives import DTYPES, GROUPS, STRIDES, WrittenBytes, restride, same, values
from test_exchange import sizes_of
from torch.autograd import forward_ad

from fastvideo_comm import DeviceCommunicatorBase, near_even_sizes
from fastvideo_comm.collective.wire import REDUCED
from fastvideo_comm.diagnosis import MismatchError

ADDED = [dtype for dtype in DTYPES if dtype in REDUCED]


def small(shape: list[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Integers from 0 to 6, whose sums over 4 ranks are exact in every dtype."""
    numbers = values(shape, torch.int64, seed) % 7
    return (
        torch.complex(numbers.double(), 6 - numbers.double()).to(dtype)
        if dtype.is_complex
        else (numbers.to(dtype))
    )


def expanded(stacked: torch.Tensor, kind: str) -> torch.Tensor:
    """The values that `restride` leaves of each rank's tensor."""
    return stacked[:, :1].expand(stacked.shape).clone() if kind == "expanded" else stacked


def added_and_dealt(
    communicator: DeviceCommunicatorBase,
    shape: list[int],
    dim: int,
    dtype: torch.dtype,
    kind: str,
    seed: int,
) -> None:
    ranks, rank = communicator.world_size, communicator.rank
    uneven = sizes_of(shape[dim], ranks, torch.Generator().manual_seed(seed))
    stacked = expanded(small([ranks, *shape], dtype, seed), kind)
    mine = restride(stacked[rank], kind)
    before = mine.clone()
    total = stacked.sum(0).to(dtype)
    parts = [(uneven, uneven), ("auto", near_even_sizes(shape[dim], ranks))]
    if shape[dim] % ranks == 0:
        parts.append((None, [shape[dim] // ranks] * ranks))
    for given_sizes, sizes in parts:
        for counted in (dim, dim - len(shape)):
            part = communicator.reduce_scatter(mine, counted, scatter_sizes=given_sizes)
            same(part, total.split(list(sizes), dim)[rank])
            assert ranks == 1 or part.is_contiguous()
    assert torch.equal(mine, before)


@given(
    group=GROUPS,
    shape=st.tuples(st.integers(1, 3), st.integers(0, 7), st.integers(0, 8), st.integers(1, 3)),
    dim=st.integers(0, 3),
    dtype=st.sampled_from(ADDED),
    kind=STRIDES,
    seed=st.integers(0, 99),
)
def test_reduce_scatter_is_a_part_of_the_sum(ranks: Ranks, group, shape, dim, dtype, kind, seed):
    ranks.run(group, added_and_dealt, list(shape), dim, dtype, kind, seed)


def copied_from_one(
    communicator: DeviceCommunicatorBase,
    shape: list[int],
    src: int,
    dtype: torch.dtype,
    kinds: tuple[str, str],
    seed: int,
) -> None:
    ranks, rank = communicator.world_size, communicator.rank
    src %= ranks
    kind = kinds[rank % 2]  # strides are every rank's own
    stacked = values([ranks, *shape], dtype, seed)
    mine = restride(stacked[rank], kind)
    before = mine.clone()
    expected = stacked[src]
    if kinds[src % 2] == "expanded":
        expected = expected[:1].expand(expected.shape)
    output = communicator.broadcast(mine, src)
    same(output, expected)
    if ranks > 1:
        assert output.is_contiguous()
        output.zero_()  # memory of its own
        same(mine, before)


@given(
    group=GROUPS,
    shape=st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(1, 4)),
    src=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    kinds=st.tuples(STRIDES, STRIDES),
    seed=st.integers(0, 99),
)
def test_broadcast_is_the_tensor_of_src_on_every_rank(
    ranks: Ranks, group, shape, src, dtype, kinds, seed
):
    if shape[0] == 0:
        kinds = ("contiguous", "contiguous")
    ranks.run(group, copied_from_one, list(shape), src, dtype, kinds, seed)


def large(communicator: DeviceCommunicatorBase) -> None:
    ranks, rank = communicator.world_size, communicator.rank
    stacked = small([ranks, 341, ranks, 1024], torch.float32, 1)
    same(communicator.broadcast(stacked[rank].mT, 1), stacked[1].mT.contiguous())
    part = communicator.reduce_scatter(stacked[rank], 1)
    same(part, stacked.sum(0).chunk(ranks, 1)[rank])
    scalar = communicator.broadcast(torch.tensor(float(rank)), 1)
    assert scalar.shape == ()
    assert scalar.item() == 1


def test_a_production_size_and_a_tensor_without_dims(ranks: Ranks):
    """2.8 MB a rank: past every threshold."""
    ranks.run(2, large)
    ranks.run((0, 2, 3), large)


def gradients(communicator: DeviceCommunicatorBase, seed: int, src: int, strided: bool) -> None:
    """Another loss on every rank; small integers, so that sums do not round.

    Not bit for bit: a sum of 0 and -0 is either.
    """
    ranks, rank = communicator.world_size, communicator.rank
    src %= ranks
    sizes = sizes_of(5, ranks, torch.Generator().manual_seed(seed))
    everyones = (values([ranks, 2, 5, 3], torch.int64, seed) % 9 - 4).double()
    weights = (values([ranks, 2, 5, 3], torch.int64, seed + 1) % 9 - 4).double()
    leaves = everyones.clone().requires_grad_()
    mine = everyones[rank].clone()
    mine = (torch.stack((mine, mine), -1)[..., 0] if strided else mine).requires_grad_()

    output = communicator.broadcast(mine, src)
    (grad,) = torch.autograd.grad((output**3 * weights[rank]).sum(), mine)
    (expected,) = torch.autograd.grad((leaves[src] ** 3 * weights).sum(), leaves)
    assert torch.equal(grad, expected[rank])

    part = communicator.reduce_scatter(mine, 1, scatter_sizes=sizes)
    weight = weights[0].split(sizes, 1)[rank]
    (grad,) = torch.autograd.grad((part**3 * weight).sum(), mine)
    (expected,) = torch.autograd.grad((leaves.sum(0) ** 3 * weights[0]).sum(), leaves)
    assert torch.equal(grad, expected[rank])

    tangents = weights
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(mine.detach(), tangents[rank])
        along = forward_ad.unpack_dual(communicator.broadcast(dual, src)).tangent
        assert torch.equal(along, tangents[src])
        part = communicator.reduce_scatter(dual, 1, scatter_sizes=sizes)
        along = forward_ad.unpack_dual(part).tangent
        assert torch.equal(along, tangents.sum(0).split(sizes, 1)[rank])


@given(group=GROUPS, seed=st.integers(0, 99), src=st.integers(0, 3), strided=st.booleans())
def test_gradients_and_tangents_are_those_of_one_process(ranks: Ranks, group, seed, src, strided):
    ranks.run(group, gradients, seed, src, strided)


def compiled(communicator: DeviceCommunicatorBase) -> None:
    """Values of every dtype, and gradients to first order where there are any, in one graph.

    By memory the code is the same.
    """
    torch._dynamo.reset()
    ranks, rank = communicator.world_size, communicator.rank
    sizes = near_even_sizes(5, ranks)

    def function(xs: list[torch.Tensor]) -> list[torch.Tensor]:
        outputs = []
        for x in xs:
            outputs.append(communicator.broadcast(x, 1))
            if x.dtype in REDUCED:
                outputs.append(communicator.reduce_scatter(x.mT, 2, scatter_sizes=sizes))
                outputs.append(communicator.reduce_scatter(torch.cat([x] * ranks, 2)))
        return outputs

    xs = [
        small([2, 5, 3], dtype, rank).requires_grad_(dtype in (torch.float32, torch.complex64))
        for dtype in DTYPES
    ]
    traced = torch.compile(function, backend="aot_eager", fullgraph=True)
    for one, other in zip(function(xs), traced(xs), strict=True):
        same(other, one)
        assert other.requires_grad == one.requires_grad
        if one.requires_grad:
            (x,) = (x for x in xs if x.dtype == one.dtype)
            weight = small(list(one.shape), x.dtype, 9 + rank)
            grads = [
                torch.autograd.grad((y * weight).sum().real, x, retain_graph=True)[0]
                for y in (one, other)
            ]
            same(grads[1].resolve_conj(), grads[0].resolve_conj())


def test_compiled_code_gives_what_eager_code_gives_in_every_dtype(ranks: Ranks):
    ranks.run(2, compiled, ways=["messages"])


def passes(communicator: DeviceCommunicatorBase) -> None:
    ranks = communicator.world_size
    x = torch.rand(2, 3, 4 * ranks)
    sums = (ranks - 1) * x.nbytes // ranks
    passes_of_broadcast = 1 if communicator.rank == 1 else 0
    for num_bytes, call in (
        (passes_of_broadcast * x.nbytes, lambda: communicator.broadcast(x, 1)),
        (x.nbytes + sums, lambda: communicator.reduce_scatter(x)),
        (sums, lambda: communicator.reduce_scatter(x.view(ranks, -1), 0)),
    ):
        with WrittenBytes() as written:
            call()
        assert written.count == num_bytes, written.names


def test_no_local_pass_but_one(ranks: Ranks):
    """Of broadcast on its source alone, of reduce_scatter where the parts do not lie in a row."""
    ranks.run((0, 2, 3), passes, ways=["messages"])


def late(communicator: DeviceCommunicatorBase, memory: str) -> tuple[float, float]:
    """Nothing but the barrier itself makes ranks wait: calls are not compared."""
    own = DeviceCommunicatorBase(communicator.cpu_group, validate="off", memory=memory)
    own.barrier()
    if own.rank == 1:
        time.sleep(0.3)
    came = time.monotonic()
    own.barrier()
    left = time.monotonic()
    own.destroy()
    return came, left


@pytest.mark.parametrize("memory", ["off", "on"])
def test_nobody_leaves_a_barrier_before_everybody_has_come(ranks: Ranks, memory):
    answers = ranks.run(
        3, late, memory, ways=["messages"]
    )  # monotonic is one clock for all processes of a host
    assert max(came for came, _ in answers) <= min(left for _, left in answers)


def alone(communicator: DeviceCommunicatorBase) -> None:
    x = torch.rand(2, 3, requires_grad=True)
    assert communicator.reduce_scatter(x, 0) is x
    assert communicator.broadcast(x) is x
    communicator.barrier()
    with pytest.raises(ValueError, match="src must be a rank of the group"):
        communicator.broadcast(x, 1)


def test_world_size_1_validates_and_then_returns_the_input_itself(ranks: Ranks):
    ranks.run((2,), alone)


def counted(communicator: DeviceCommunicatorBase) -> None:
    own = DeviceCommunicatorBase(communicator.cpu_group, unique_name="counted")
    x = torch.zeros(2, 4)
    own.broadcast(x)
    own.reduce_scatter(x)
    own.barrier()
    stats = own.stats()
    assert {op: (each.calls, each.bytes) for op, each in stats.items()} == {
        "broadcast": (1, x.nbytes),
        "reduce_scatter": (1, x.nbytes),
        "barrier": (1, 0),
    }
    own.destroy()


def test_their_calls_and_bytes_are_counted(ranks: Ranks):
    ranks.run(2, counted)


def compiled_barrier(communicator: DeviceCommunicatorBase) -> None:
    torch._dynamo.reset()

    def function(x: torch.Tensor) -> torch.Tensor:
        communicator.barrier()
        return x * 2

    with pytest.raises(ValueError, match="barrier must be called outside compiled code"):
        torch.compile(function, backend="aot_eager")(torch.ones(2))
    communicator.barrier()


def test_a_compiled_barrier_is_refused(ranks: Ranks):
    ranks.run(2, compiled_barrier)


X = torch.zeros(2, 3, 6, 4)
# What rank 0 calls, what the others call, what the table says of rank 0.
DIFFERENCES = {
    "source": (lambda c: c.broadcast(X, 1), lambda c: c.broadcast(X, 0), "arguments"),
    "shape": (lambda c: c.broadcast(X[0]), lambda c: c.broadcast(X), "shape"),
    "dim": (lambda c: c.reduce_scatter(X, 2), lambda c: c.reduce_scatter(X, 1), "arguments"),
    "sizes": (
        lambda c: c.reduce_scatter(X, 2, scatter_sizes=[1, 2, 3]),
        lambda c: c.reduce_scatter(X, 2, scatter_sizes=[3, 2, 1]),
        "arguments",
    ),
    "no barrier": (lambda c: c.broadcast(X), lambda c: c.barrier(), "op, shape"),
}


def different(communicator: DeviceCommunicatorBase, name: str, memory: str) -> None:
    own = DeviceCommunicatorBase(communicator.cpu_group, validate="always", memory=memory)
    own.all_reduce(torch.ones(1))
    first, others, column = DIFFERENCES[name]
    with pytest.raises(MismatchError, match=rf"\n0 .*<- {column}"):
        (first if own.rank == 0 else others)(own)
    assert own.all_reduce(torch.ones(1)).item() == own.world_size, "still usable"
    own.destroy()


@pytest.mark.parametrize("memory", ["off", "on"])
@pytest.mark.parametrize("name", DIFFERENCES)
def test_ranks_that_ask_for_different_things_hear_it_before_anything_is_sent(
    ranks: Ranks, name, memory
):
    ranks.run(3, different, name, memory, ways=["messages"])


def bad_sizes(communicator: DeviceCommunicatorBase) -> None:
    for sizes, words in (
        ([1, 2], r"scatter_sizes must add up to the 6 at dim=2 .*, got \[1, 2\]"),
        ([7, -1], "sizes of at least 0, got"),
        ("even", "scatter_sizes must be None, 'auto' or sizes, got 'even'"),
    ):
        with pytest.raises(ValueError, match=rf"^reduce_scatter on rank \d of 2 .*{words}"):
            communicator.reduce_scatter(X, 2, scatter_sizes=sizes)
    communicator.barrier()


def test_sizes_that_do_not_fit_are_named(ranks: Ranks):
    ranks.run(2, bad_sizes)
