"""The overlap checks against enumerating every element."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastvideo_comm.kernels import overlap as module
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


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((2, 3), (0, 1)),
        ((3, 2, 2), (1, 3, 4)),  # 4 = 1 + 3: no stride alone is too small
        ((3, 2), (1, 2)),
    ],
)
def test_two_indices_at_one_address_are_found(shape, strides):
    assert overlaps_itself(torch.empty(100).as_strided(shape, strides))


def test_an_expanded_dim_of_size_1_repeats_nothing():
    assert not overlaps_itself(torch.empty(100).as_strided((1, 4, 3), (0, 1, 5)))


def test_two_elements_expanded_to_one_shape_overlap_where_they_are_one():
    x = torch.empty(4)
    assert not overlap(x[:1].expand(3), x[1:2].expand(3))
    assert overlap(x[3:].expand(3, 4), x.expand(3, 4))


def test_empty_tensors_do_not_overlap_whatever_their_other_sizes_are():
    x = torch.empty(100)
    assert not overlap(x.as_strided((0, 4), (1, 1)), x.as_strided((0, 4), (1, 2)))


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((3, 4), (1, 3)),
        ((4, 3, 2), (3, 1, 100)),
        ((1, 3, 4), (0, 2, 6)),
    ],
)
def test_nothing_is_searched_where_every_stride_is_beyond_the_inner_dims(
    monkeypatch, shape, strides
):
    monkeypatch.setattr(module, "_count_ways", lambda *arguments: pytest.fail("searched"))
    assert not overlaps_itself(torch.empty(1000).as_strided(shape, strides))


def _one_and_its_transpose_moved(rows: int, offset: int) -> tuple[Tensor, Tensor]:
    x = torch.empty(rows + 1, rows)
    return x[:-1], x.as_strided((rows, rows), (1, rows), offset)


@pytest.mark.parametrize(
    ("check", "views", "ways", "dims"),
    [
        (overlaps_itself, [torch.empty(50).as_strided((7, 7, 7), (1, 2, 3))], 2, 3),
        (
            overlaps_itself,
            [torch.empty(1, device="meta").as_strided((2**20, 2**20), (2**20 - 1, 1))],
            2,
            2,
        ),
        (overlap, _one_and_its_transpose_moved(100, 0), 1, 2),
        (overlap, _one_and_its_transpose_moved(100, 5), 1, 2),
    ],
)
def test_a_search_goes_straight_to_what_it_finds_and_no_further(
    monkeypatch, check, views, ways, dims
):
    """One sum is looked at for each dim and one behind the last, once for each way to be found."""
    count_ways = module._count_ways
    looked_at = []

    def counted(*arguments):
        looked_at.append(arguments)
        assert len(looked_at) <= ways * (dims + 1)
        return count_ways(*arguments)

    monkeypatch.setattr(module, "_count_ways", counted)
    assert check(*views)
    assert looked_at
