"""reduce_gradients: the sum of every rank's gradients, in place, and errors that no rank misses."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import Ranks
from test_collectives import restride
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from fastvideo_comm import DeviceCommunicatorBase, gradient_buckets
from fastvideo_comm.diagnosis import MismatchError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)
GROUPS = st.sampled_from((1, 2, 3, 4, (1, 3)))
KINDS = ("contiguous", "chunk", "transposed", "stepped")


def summed(
    communicator: DeviceCommunicatorBase,
    specs: list[tuple[tuple[int, ...], torch.dtype, str, list[bool]]],
    bucket_bytes: int,
    average: bool,
) -> None:
    """Integers from 0 to 11, in multiples of 12 for an average: exact in every dtype."""
    ranks, rank = communicator.world_size, communicator.rank
    factor = 12 if average else 1
    parameters, before, expected = [], [], []
    for index, (shape, dtype, kind, has) in enumerate(specs):
        generator = torch.Generator().manual_seed(index)
        numbers = torch.randint(0, 12, (ranks, *shape), generator=generator) * factor
        numbers = torch.where(torch.tensor(has[:ranks]).view(-1, 1, 1, 1), numbers, 0)
        parameter = torch.zeros(shape, dtype=dtype, requires_grad=True)
        if has[rank]:
            parameter.grad = restride(numbers[rank].to(dtype), kind)
        parameters.append(parameter)
        before.append(parameter.grad)
        total = numbers.sum(0) // (ranks if average else 1)
        expected.append(total.to(dtype) if any(has[:ranks]) else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient_buckets, "BUCKET_BYTES", bucket_bytes)
        communicator.reduce_gradients([*parameters, parameters[0]], average=average)
    for parameter, old, each in zip(parameters, before, expected, strict=True):
        if each is None:
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, each)
            assert old is None or parameter.grad is old


@given(
    group=GROUPS,
    specs=st.lists(
        st.tuples(
            st.tuples(*[st.integers(1, 4)] * 3),
            st.sampled_from(DTYPES),
            st.sampled_from(KINDS),
            st.lists(st.booleans(), min_size=4, max_size=4),
        ),
        min_size=1,
        max_size=6,
    ),
    bucket_bytes=st.sampled_from((1, 100, 1000)),
    average=st.booleans(),
)
def test_every_gradient_is_the_sum_over_ranks_in_its_own_memory(
    ranks: Ranks, group, specs, bucket_bytes, average
):
    size = group if isinstance(group, int) else len(group)
    if size == 1:  # nobody else has a gradient
        specs = [(shape, dtype, kind, [True] * 4) for shape, dtype, kind, _ in specs]
    ranks.run(group, summed, specs, bucket_bytes, average)


def wide(communicator: DeviceCommunicatorBase) -> None:
    """Gradients of float32 of a parameter of bfloat16, which one rank does not have."""
    parameter = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    parameter.grad_dtype = torch.float32
    if communicator.rank != 1:
        parameter.grad = torch.full((3,), 1.0 + 2.0**-20)
    communicator.reduce_gradients([parameter])
    assert torch.equal(parameter.grad, torch.full((3,), 2.0 + 2.0**-19))


def test_a_rank_without_a_gradient_takes_part_in_the_dtype_of_the_others(ranks: Ranks):
    ranks.run(3, wide)


def negated(communicator: DeviceCommunicatorBase) -> None:
    """A single number is contiguous with any stride; its memory has the other sign."""
    number = torch.complex(torch.zeros(1), torch.full((1,), 1.0 + communicator.rank))
    parameter = torch.zeros(1, requires_grad=True)
    parameter.grad = number.conj().imag
    assert parameter.grad.is_neg()
    assert parameter.grad.is_contiguous()
    communicator.reduce_gradients([parameter])
    assert parameter.grad.item() == -3


def test_a_gradient_that_is_negated_lazily_is_summed_with_its_sign(ranks: Ranks):
    ranks.run(2, negated)


def unusual(communicator: DeviceCommunicatorBase) -> None:
    """A gradient that one rank differentiates further, and one element with the stride of many."""
    watched, single = (torch.zeros(1, requires_grad=True) for _ in range(2))
    watched.grad = torch.ones(1, requires_grad=communicator.rank == 0)
    single.grad = torch.ones(()).expand(1)
    assert single.grad.stride() == (0,)
    communicator.reduce_gradients([watched, single], average=True)
    assert watched.grad.is_leaf
    assert [watched.grad.item(), single.grad.item()] == [1, 1]
    communicator.reduce_gradients([watched, single])
    assert [watched.grad.item(), single.grad.item()] == [2, 2]
    communicator.reduce_gradients([watched])
    assert watched.grad.item() == 4


def test_autograd_does_not_record_the_sum_and_one_element_may_have_any_stride(ranks: Ranks):
    ranks.run(2, unusual)


def bad(communicator: DeviceCommunicatorBase) -> None:
    good = torch.zeros(2, requires_grad=True)
    good.grad = torch.ones(2)
    sparse = torch.nn.Embedding(5, 3, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    mesh = init_device_mesh("cpu", (2,))
    sharded = torch.nn.Parameter(DTensor.from_local(torch.ones(3), mesh))
    shared = torch.zeros(2, 3, requires_grad=True)
    shared.grad = torch.ones(1, 3).expand(2, 3)
    twin = torch.zeros(2, requires_grad=True)
    twin.grad = good.grad
    view = torch.zeros(1, 2, requires_grad=True)
    view.grad = good.grad.view(1, 2)
    whole_numbers = torch.ones(1, dtype=torch.int8)
    whole_numbers.grad = torch.ones(1, dtype=torch.int8)
    for parameters, error, words in (
        ([good, sparse.weight], TypeError, r"dense .*sparse_coo for parameter 1 of shape \[5, 3\]"),
        ([good, good, sharded], TypeError, r"own .*DTensor for parameter 2 of shape \[3\]"),
        ([shared], ValueError, r"strides \[0, 1\] for parameter 0 of shape \[2, 3\]"),
        ([good, twin], ValueError, r"tensor each, got one tensor for two .* shape \[2\]"),
        ([good, view], ValueError, r"tensor each, got one tensor for two .* shape \[1, 2\]"),
        ([whole_numbers], TypeError, r"got torch.int8 for parameter 0"),
        ([good, "weight"], TypeError, "parameters must be tensors, got str at index 1"),
        (iter(()), ValueError, "parameters must hold at least one tensor, got none"),
        ([torch.ones(2, device="meta")], ValueError, "communicator's cpu, got meta"),
    ):
        where = rf"^reduce_gradients on rank {communicator.rank} of 2 in group 'test': .*"
        with pytest.raises(error, match=where + words):
            communicator.reduce_gradients(parameters)
    assert torch.equal(good.grad, torch.ones(2)), "nothing was sent"
    communicator.reduce_gradients(good)
    assert torch.equal(good.grad, torch.full((2,), 2.0)), "still usable"
    empty = [torch.zeros(0, 3, requires_grad=True) for _ in range(2)]
    for each in empty:
        each.grad = torch.zeros(0, 3)
    assert empty[0].grad.data_ptr() == empty[1].grad.data_ptr(), "but they share no element"
    communicator.reduce_gradients([*empty, good])
    assert torch.equal(good.grad, torch.full((2,), 4.0))


def test_what_cannot_be_reduced_is_named_before_anything_is_sent(ranks: Ranks):
    ranks.run(2, bad)


def bad_on_one_rank(communicator: DeviceCommunicatorBase, validate: str) -> None:
    own = DeviceCommunicatorBase(communicator.cpu_group, memory="off", validate=validate)
    good = torch.zeros(2, requires_grad=True)
    for call in range(40):  # "auto" compares some of them before they begin
        good.grad = torch.ones(2)
        if call % 2 == 0:
            own.reduce_gradients(good)
            assert good.grad.tolist() == [3, 3]
        elif own.rank == call % 3:
            with pytest.raises(TypeError, match="parameters must be tensors, got int at index 1"):
                own.reduce_gradients([good, 5])
        else:
            words = rf"(good on every rank, got bad ones on rank {call % 3}|got int at index 1)"
            with pytest.raises(MismatchError, match=words):
                own.reduce_gradients(good)
            assert good.grad.tolist() == [1, 1]
    own.destroy()


@pytest.mark.parametrize("validate", ["auto", "always", "off"])
def test_bad_parameters_of_one_rank_are_told_in_every_call(ranks: Ranks, validate: str):
    ranks.run(3, bad_on_one_rank, validate, ways=("messages",))


def frozen(communicator: DeviceCommunicatorBase) -> None:
    trained = torch.zeros(2, requires_grad=True)
    trained.grad = torch.ones(2)
    quantised = [torch.ones(3, dtype=dtype) for dtype in (torch.int8, torch.float8_e4m3fn)]
    communicator.reduce_gradients([quantised[0], trained, quantised[1]])
    assert trained.grad.tolist() == [2, 2]
    assert [each.grad for each in quantised] == [None, None]
    other = quantised[communicator.rank]
    with pytest.raises(MismatchError, match="same shapes, dtypes and requires_grad on every rank"):
        communicator.reduce_gradients([trained, other])


def test_frozen_parameters_may_have_any_dtype(ranks: Ranks):
    ranks.run(2, frozen)


def different(communicator: DeviceCommunicatorBase) -> None:
    first = communicator.rank == 0

    def parameter(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        made = torch.zeros(size, requires_grad=True, dtype=dtype)
        made.grad = torch.ones_like(made)
        return made

    for mine, words in (
        ([parameter(2)] if first else [parameter(2), parameter(2)], r"got \[1, 2, 2\] of them"),
        ([parameter(2), parameter(3 if first else 4)], r"same shapes.* for parameter 1 on some"),
        ([parameter(2, torch.float64 if first else torch.float32)], r"dtypes.* for parameter 0"),
        ([parameter(2).requires_grad_(not first)], r"requires_grad.* for parameter 0"),
    ):
        with pytest.raises(MismatchError, match=r"^reduce_gradients on rank \d of 3 .*" + words):
            communicator.reduce_gradients(mine)
        assert all(torch.equal(each.grad, torch.ones_like(each)) for each in mine)
    communicator.reduce_gradients(parameter(2))


def test_different_parameters_are_the_same_error_on_every_rank(ranks: Ranks):
    ranks.run(3, different)


def counted(communicator: DeviceCommunicatorBase) -> None:
    own = DeviceCommunicatorBase(communicator.cpu_group, unique_name="counted")
    layer = torch.nn.Linear(3, 2)
    layer(torch.ones(1, 3)).sum().backward()
    own.reduce_gradients(layer.parameters())
    stats = own.stats()["reduce_gradients"]
    assert (stats.calls, stats.bytes) == (1, 4 * (6 + 2))
    own.destroy()


def test_calls_and_bytes_are_counted(ranks: Ranks):
    ranks.run(2, counted)


def test_buckets_hold_one_dtype_and_no_more_than_their_bytes():
    gradients = [torch.zeros(n, dtype=d) for n in (3, 1, 9, 2) for d in (torch.half, torch.double)]
    made = gradient_buckets.buckets(gradients, 40)
    assert sorted(id(g) for bucket in made for g in bucket) == sorted(map(id, gradients))
    for bucket in made:
        assert len({gradient.dtype for gradient in bucket}) == 1
        assert len(bucket) == 1 or sum(gradient.nbytes for gradient in bucket) <= 40
    assert len(made) == 1 + 3


@given(st.lists(st.integers(0, 12), max_size=30))
def test_no_two_buckets_after_each_other_would_fit_into_one(sizes):
    made = gradient_buckets.buckets([torch.zeros(size) for size in sizes], 40)
    assert [each.numel() for bucket in made for each in bucket] == sizes
    for bucket, (first, *_) in itertools.pairwise(made):
        assert sum(each.nbytes for each in bucket) + first.nbytes > 40
