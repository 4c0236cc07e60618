"""The helpers of upstream's utils, and where they are stricter."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastvideo_comm import utils
from fastvideo_comm.utils import (
    compute_padding_for_sp,
    divide,
    ensure_divisibility,
    pad_sequence_tensor,
    split_tensor_along_last_dim,
    unpad_sequence_tensor,
)


@given(st.integers(-1000, 1000), st.integers(1, 50))
def test_divide_is_exact_or_an_error(quotient, denominator):
    assert divide(quotient * denominator, denominator) == quotient
    if denominator > 1:
        with pytest.raises(ValueError, match=f"is not divisible by {denominator}"):
            divide(quotient * denominator + 1, denominator)


@pytest.mark.parametrize("kind", [ValueError, AssertionError])
def test_the_error_of_ensure_divisibility_is_what_callers_catch(kind):
    with pytest.raises(kind, match="7 is not divisible by 2"):
        ensure_divisibility(7, 2)
    with pytest.raises(kind, match="7 is not divisible by 0"):
        ensure_divisibility(7, 0)
    assert ensure_divisibility(8, 2) is None


@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    partitions=st.integers(1, 5),
    width=st.integers(0, 4),
    strided=st.booleans(),
)
def test_chunks_are_those_of_torch_split(lead, partitions, width, strided):
    tensor = torch.rand(*lead, partitions * width, requires_grad=True)
    if strided and len(lead) > 1:
        tensor = tensor.detach().transpose(0, 1).requires_grad_()
    # The definition; torch.split cannot split 0 into more than one.
    expected = [tensor[..., i * width : (i + 1) * width] for i in range(partitions)]
    views = split_tensor_along_last_dim(tensor, partitions)
    copies = split_tensor_along_last_dim(tensor, partitions, contiguous_split_chunks=True)
    assert isinstance(views, tuple)
    assert isinstance(copies, tuple)
    assert len(views) == len(copies) == partitions
    for chunk, view, copy in zip(expected, views, copies, strict=True):
        assert torch.equal(view, chunk)
        assert torch.equal(copy, chunk)
        assert view.stride() == chunk.stride() or not chunk.numel()
        assert copy.is_contiguous()
        assert copy.numel() == 0 or copy.data_ptr() != chunk.data_ptr()
    weights = torch.rand(tensor.shape)
    for chunks in (views, copies):
        (grad,) = torch.autograd.grad((torch.cat(chunks, -1) * weights).sum(), tensor)
        assert torch.equal(grad, weights)


def test_split_is_twice_differentiable():
    tensor = torch.rand(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda x: split_tensor_along_last_dim(x * x, 3, contiguous_split_chunks=True), tensor
    )


def test_contiguous_chunks_do_not_change_with_the_tensor():
    tensor = torch.arange(6.0)
    chunk = split_tensor_along_last_dim(tensor, 2, contiguous_split_chunks=True)[0]
    tensor.zero_()
    assert chunk.tolist() == [0.0, 1.0, 2.0]
    chunk.add_(1)
    assert chunk.tolist() == [1.0, 2.0, 3.0]


def test_split_names_what_is_wrong():
    with pytest.raises(ValueError, match="7 is not divisible by 2"):
        split_tensor_along_last_dim(torch.rand(3, 7), 2)
    with pytest.raises(ValueError, match="num_partitions must be at least 1, got 0"):
        split_tensor_along_last_dim(torch.rand(3, 7), 0)
    with pytest.raises(ValueError, match="tensor must have at least 1 dim"):
        split_tensor_along_last_dim(torch.tensor(1.0), 1)


@given(st.integers(0, 200_000), st.integers(1, 64))
def test_padding_is_the_least_that_the_ranks_can_share(seq_len, world_size):
    padded, padding = compute_padding_for_sp(seq_len, world_size)
    assert padded == seq_len + padding
    assert padded % world_size == 0
    assert 0 <= padding < world_size


def test_padding_names_what_is_wrong():
    with pytest.raises(ValueError, match="sp_world_size must be at least 1, got 0"):
        compute_padding_for_sp(5, 0)
    with pytest.raises(ValueError, match="seq_len must not be negative, got -1"):
        compute_padding_for_sp(-1, 2)


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    dim=st.integers(0, 3),
    extra=st.integers(-2, 5),
    value=st.sampled_from((0.0, -1.5)),
)
def test_unpad_undoes_pad(shape, dim, extra, value):
    dim %= len(shape)
    tensor = torch.rand(shape, requires_grad=True)
    padded = pad_sequence_tensor(tensor, shape[dim] + extra, dim, value)
    if extra <= 0:
        assert padded is tensor
    else:
        assert padded.shape[dim] == shape[dim] + extra
        assert bool((padded.narrow(dim, shape[dim], extra) == value).all())
    restored = unpad_sequence_tensor(padded, shape[dim], dim)
    assert torch.equal(restored, tensor)
    (grad,) = torch.autograd.grad(restored.sum(), tensor)
    assert torch.equal(grad, torch.ones_like(tensor))


def test_pad_keeps_dtype_and_unpad_refuses_more_than_there_is():
    padded = pad_sequence_tensor(torch.ones(1, 2, dtype=torch.bfloat16), 3)
    assert padded.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"original_seq_len must be in \[0, 3\] .*, got 4"):
        unpad_sequence_tensor(padded, 4)


def test_padding_is_zeros_at_the_end_of_dim_1_unless_told_otherwise():
    tensor = torch.ones(2, 1, 3)
    padded = pad_sequence_tensor(tensor, 2)
    assert padded.tolist() == [[[1.0] * 3, [0.0] * 3]] * 2
    assert pad_sequence_tensor(tensor, 4, -1).tolist() == [[[1.0, 1.0, 1.0, 0.0]]] * 2
    restored = unpad_sequence_tensor(padded, 1)
    assert restored.shape == tensor.shape
    assert restored.data_ptr() == padded.data_ptr()
    assert unpad_sequence_tensor(padded, 0, 2).shape == (2, 2, 0)
    with pytest.raises(ValueError, match=r"original_seq_len must be in \[0, 2\] .*, got -1"):
        unpad_sequence_tensor(padded, -1)


def test_logger_is_this_packages_and_quiet_by_default():
    assert utils.logger.name == "fastvideo_comm"
    assert utils.logger.level == logging.NOTSET
    assert utils.logger.handlers == []
