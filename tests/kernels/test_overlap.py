"""The overlap checks against enumerating every element."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastvideo_comm.kernels.overlap import overlap, overlaps_itself


def _layouts(max_stride: int = 7) -> st.SearchStrategy[list[tuple[int, int]]]:
    """(size, stride) of few elements on little memory: about half of them overlap."""
    return st.lists(st.tuples(st.integers(1, 4), st.integers(0, max_stride)), max_size=4)


def _view(buffer: Tensor, layout: list[tuple[int, int]], offset: int) -> Tensor:
    return buffer.as_strided([size for size, _ in layout], [stride for _, stride in layout], offset)


def _offsets(tensor: Tensor) -> list[int]:
    return [
        tensor.storage_offset() + sum(i * s for i, s in zip(index, tensor.stride(), strict=True))
        for index in itertools.product(*map(range, tensor.shape))
    ]


@given(_layouts(40))
def test_a_tensor_overlaps_itself_where_two_indices_have_one_address(layout):
    tensor = _view(torch.empty(1000), layout, 0)
    addresses = _offsets(tensor)
    assert overlaps_itself(tensor) == (len(set(addresses)) < len(addresses))


@given(st.data())
def test_two_views_overlap_where_they_have_an_element_in_common(data):
    layout = data.draw(_layouts())
    strides = st.lists(st.integers(0, 9), min_size=len(layout), max_size=len(layout))
    other = [(size, stride) for (size, _), stride in zip(layout, data.draw(strides), strict=True)]
    buffer = torch.empty(200, dtype=torch.int16)
    dst = _view(buffer, layout, data.draw(st.integers(0, 30)))
    src = _view(buffer, other, data.draw(st.integers(0, 30)))
    same = dst.data_ptr() == src.data_ptr() and dst.stride() == src.stride()
    assert overlap(dst, src) == (not same and not set(_offsets(dst)).isdisjoint(_offsets(src)))


def test_tensors_of_different_storages_do_not_overlap():
    assert not overlap(torch.empty(4), torch.empty(4))


def test_tensors_without_memory_do_not_overlap():
    x = torch.empty(4, 4, device="meta")
    assert not overlap(x, x.T)


def test_empty_tensors_do_not_overlap():
    x = torch.empty(4, 4)
    assert not overlap(x[:0], x.T[:0])
    assert not overlaps_itself(torch.empty(0, 1).expand(0, 3))


def test_checks_of_large_tensors_take_no_time_and_no_memory():
    """Neither enumerates: 2**40 elements that are not there."""
    x = torch.empty(1, device="meta").as_strided((2**20, 2**20), (2**21, 1))
    assert not overlaps_itself(x)
    assert overlaps_itself(x.as_strided((2**20, 2**20), (2**20 - 1, 1)))
