"""`strided_copy_` is `copy_` for every layout and dtype, with the kernel run by the interpreter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strided_layouts import (
    DTYPES,
    NAMED_PAIRS,
    StridedLayout,
    assert_copies_like_torch,
    pairs_of_layouts,
)
from tile_copy_module import Launch, imported_tile_copy, recorded_launches
from torch import Tensor

from fastvideo_comm.kernels import strided_copy_
from fastvideo_comm.kernels.strided_copy import IMPLEMENTATION_VARIABLE, SMALL_COPY_BYTES

triton = pytest.importorskip("triton", reason="the kernel needs triton")


@pytest.fixture(scope="module", autouse=True)
def interpreted() -> Iterator[ModuleType]:
    with imported_tile_copy(interpret=True) as module:
        yield module


@pytest.fixture(autouse=True)
def _no_implementation_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(IMPLEMENTATION_VARIABLE, raising=False)


@pytest.fixture
def launches(interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Every launch of the kernel."""
    return recorded_launches(interpreted, monkeypatch)


def _triton_copy(dst: Tensor, src: Tensor) -> Tensor:
    return strided_copy_(dst, src, impl="triton")


@settings(max_examples=settings().max_examples // 2)  # the compiled kernel copies as many
@given(pairs_of_layouts(), st.sampled_from(DTYPES), st.integers(0, 2**32))
def test_the_kernel_copies_every_layout_and_dtype_and_nothing_else(layouts, dtype, seed):
    assert_copies_like_torch(_triton_copy, *layouts, dtype, seed)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, torch.complex128])
@pytest.mark.parametrize("layouts", NAMED_PAIRS.values(), ids=NAMED_PAIRS)
def test_the_kernel_copies_every_kind_of_layout(layouts, dtype):
    assert_copies_like_torch(_triton_copy, *layouts, dtype, seed=0)


@given(pairs_of_layouts(), st.sampled_from(DTYPES), st.integers(0, 2**32))
def test_the_torch_implementation_copies_every_layout_and_dtype(layouts, dtype, seed):
    def torch_copy(dst: Tensor, src: Tensor) -> Tensor:
        return strided_copy_(dst, src, impl="torch")

    assert_copies_like_torch(torch_copy, *layouts, dtype, seed)


@pytest.mark.parametrize(
    ("dst_offset", "src_offset", "access_bytes"),
    [(0, 0, 16), (16, 48, 16), (8, 0, 8), (0, 8, 8), (4, 8, 4), (16, 2, 2), (1, 16, 1), (3, 5, 1)],
)
def test_no_access_is_wider_than_both_addresses_allow(
    dst_offset, src_offset, access_bytes, launches
):
    """Of one shape and strides each time: what is remembered of a layout includes the address."""
    dst, src = (torch.zeros(512, dtype=torch.int8) for _ in range(2))
    assert dst.data_ptr() % 16 == src.data_ptr() % 16 == 0
    _triton_copy(dst[dst_offset:][:256], src[src_offset:][:256])
    assert launches == [Launch(1, (access_bytes,))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(67, 130), (64, 128)], ids=["odd", "even"])
def test_a_true_transpose_is_exact_in_every_dtype(shape, dtype):
    rows, columns = shape
    assert_copies_like_torch(
        _triton_copy,
        StridedLayout(shape, (columns, 1), 0),
        StridedLayout(shape, (1, rows), 0),
        dtype,
        seed=rows,
    )


def test_a_run_longer_than_a_tile_takes_several_programs(launches):
    src = torch.arange(5000, dtype=torch.int64)
    assert torch.equal(_triton_copy(torch.empty_like(src), src), src)
    assert launches == [Launch(math.ceil(5000 * 8 / 8192), (16,))]


def test_offsets_over_2_31_are_found_where_no_stride_is(tmp_path):
    """In 32 bits the third row would stand at -2; the file is a hole but for a few pages."""
    stride = 2**31 - 1  # odd: elements are single bytes
    size = 64 + 2 * stride + 64
    buffer = torch.from_file(str(tmp_path / "hole"), shared=True, size=size, dtype=torch.int8)
    src = buffer.as_strided((3, 64), (stride, 1), 64)
    src.copy_(torch.arange(1, 193).view(3, 64))
    assert torch.equal(_triton_copy(torch.zeros(3, 64, dtype=torch.int8), src), src)


def test_channels_last_is_copied_both_ways():
    x = torch.randn(2, 5, 3, 4)
    y = torch.empty(2, 5, 3, 4, memory_format=torch.channels_last)
    assert torch.equal(_triton_copy(y, x), x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(_triton_copy(torch.empty(2, 5, 3, 4), y), x)


def test_more_outer_dims_than_the_kernel_takes_are_copied_in_several_launches(launches):
    # Padded in every dim on both sides, differently: nothing merges.
    x = torch.arange(3 * 4**7).reshape(3, 4, 4, 4, 4, 4, 4, 4)[..., :2, :2, :2, :2, :2, :2, :3]
    y = torch.empty(3, 4, 4, 4, 4, 4, 4, 4, dtype=x.dtype).permute(0, 7, 6, 5, 4, 3, 2, 1)
    y = y[..., :2, :2, :2, :2, :2, :2, :3]
    x, y = x[:, 0], y[:, 0]
    assert torch.equal(_triton_copy(y, x), x)
    assert len(launches) > 1


def test_one_launch_for_every_layout_of_the_collectives(launches):
    x = torch.randn(2, 6, 4, 8)
    _triton_copy(torch.empty(2, 2, 6, 2, 8), x.unflatten(2, (2, 2)).movedim(2, 1))
    _triton_copy(x.unflatten(2, (2, 2)).movedim(2, 1), torch.randn(2, 2, 6, 2, 8))
    _triton_copy(torch.empty(2, 2, 6, 4, 4), x.unflatten(-1, (2, 4)).movedim(-2, 0))
    assert len(launches) == 3


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), (0, 5)])
def test_an_empty_tensor_launches_nothing(shape, launches):
    dst = torch.empty(shape)
    assert _triton_copy(dst, torch.empty(shape)) is dst
    assert launches == []


def test_a_0d_tensor_is_one_element(launches):
    assert _triton_copy(torch.tensor(1.5), torch.tensor(2.5)) == 2.5
    assert launches == [Launch(1, (4,))]


@pytest.mark.parametrize("impl", ["triton", "torch"])
class TestEitherImplementation:
    def test_returns_dst_itself(self, impl):
        dst = torch.zeros(3)
        assert strided_copy_(dst, torch.ones(3), impl=impl) is dst

    def test_counts_as_a_write_to_dst(self, impl):
        x = torch.ones(3, requires_grad=True)
        y = x * 2
        product = y * y
        strided_copy_(y, torch.zeros(3), impl=impl)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()

    def test_leaves_strides_and_storage_alone(self, impl):
        dst = torch.zeros(4, 3).T
        before = (dst.data_ptr(), dst.stride(), dst.storage_offset())
        strided_copy_(dst, torch.ones(3, 4), impl=impl)
        assert (dst.data_ptr(), dst.stride(), dst.storage_offset()) == before

    def test_is_not_seen_by_autograd(self, impl):
        leaf = torch.zeros(3, requires_grad=True)
        strided_copy_(leaf, torch.ones(3, requires_grad=True) * 2, impl=impl)
        assert leaf.is_leaf
        assert leaf.requires_grad
        assert leaf.tolist() == [2, 2, 2]

    def test_takes_inference_tensors(self, impl):
        with torch.inference_mode():
            assert strided_copy_(torch.zeros(3), torch.ones(3), impl=impl).tolist() == [1, 1, 1]

    def test_resolves_conjugated_and_negated_sources(self, impl):
        x = torch.tensor([1 + 2j, 3 - 4j])
        assert torch.equal(strided_copy_(torch.empty_like(x), x.conj(), impl=impl), x.conj())
        negated = x.conj().imag
        assert negated.is_neg()
        copied = strided_copy_(torch.empty(2), negated, impl=impl)
        assert copied.tolist() == [-2, 4]

    def test_copies_a_view_onto_itself(self, impl):
        x = torch.arange(6).reshape(2, 3)
        assert strided_copy_(x, x.view(2, 3), impl=impl).tolist() == [[0, 1, 2], [3, 4, 5]]

    def test_copies_between_disjoint_parts_of_one_tensor(self, impl):
        x = torch.arange(12).reshape(3, 4)
        strided_copy_(x[:, :2], x[:, 2:], impl=impl)
        assert x.tolist() == [[2, 3, 2, 3], [6, 7, 6, 7], [10, 11, 10, 11]]


@pytest.mark.parametrize("impl", ["auto", "triton", "torch"])
class TestErrors:
    @pytest.mark.parametrize(
        ("dst", "src", "error", "message"),
        [
            ([1.0], torch.ones(1), TypeError, "^dst must be a dense tensor, got list$"),
            (torch.ones(1), None, TypeError, "^src must be a dense tensor, got NoneType$"),
            (
                torch.ones(1),
                torch.ones(1).to_sparse(),
                TypeError,
                r"^src must be a dense tensor, got torch\.sparse_coo$",
            ),
            (
                torch.ones(2),
                torch.ones(2, dtype=torch.float64),
                TypeError,
                r"^src must have dst's dtype torch\.float32, got torch\.float64$",
            ),
            (
                torch.ones(2, 3),
                torch.ones(3),
                ValueError,
                r"^src must have dst's shape \[2, 3\], got \[3\]$",
            ),
            (
                torch.ones(2),
                torch.ones(2, device="meta"),
                ValueError,
                "^src must be on dst's device cpu, got meta$",
            ),
            (
                torch.ones(2, dtype=torch.complex64).conj(),
                torch.ones(2, dtype=torch.complex64),
                ValueError,
                "^dst must not be a conjugated or negated view, got one$",
            ),
            (
                torch.ones(2, dtype=torch.complex64).conj().imag,
                torch.ones(2),
                ValueError,
                "^dst must not be a conjugated or negated view, got one$",
            ),
            (
                torch.ones(2, 1).expand(2, 3),
                torch.ones(2, 3),
                ValueError,
                r"^dst must not overlap itself, got shape \[2, 3\] with strides \[1, 0\]$",
            ),
            (
                torch.ones(6).as_strided((2, 3), (2, 1)),
                torch.ones(2, 3),
                ValueError,
                r"^dst must not overlap itself, got shape \[2, 3\] with strides \[2, 1\]$",
            ),
        ],
    )
    def test_a_pair_that_cannot_be_copied_is_refused(self, impl, dst, src, error, message):
        with pytest.raises(error, match=message):
            strided_copy_(dst, src, impl=impl)

    @pytest.mark.parametrize(
        "views",
        [
            lambda x: (x, x.T),
            lambda x: (x[:, 1:], x[:, :-1]),
            lambda x: (x[1:], x[:-1]),
            lambda x: (x[0].expand(1, 4), x[:1, :1].expand(1, 4)),
        ],
        ids=["transpose", "columns", "rows", "expanded"],
    )
    def test_a_source_that_shares_memory_with_dst_is_refused(self, impl, views):
        dst, src = views(torch.zeros(4, 4))
        with pytest.raises(
            ValueError, match=r"^src must not share memory with dst, got views of the"
        ):
            strided_copy_(dst, src, impl=impl)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(
        ValueError,
        match=r"^impl \(or FASTVIDEO_COMM_IMPL\) must be one of "
        r"\('auto', 'triton', 'torch'\), got 'cuda'$",
    ):
        strided_copy_(torch.zeros(1), torch.zeros(1), impl="cuda")


def test_the_environment_decides_for_auto(monkeypatch, launches):
    monkeypatch.setenv(IMPLEMENTATION_VARIABLE, "triton")
    strided_copy_(torch.zeros(2), torch.ones(2))
    assert len(launches) == 1
    monkeypatch.setenv(IMPLEMENTATION_VARIABLE, "torch")
    strided_copy_(torch.zeros(2), torch.ones(2))
    assert len(launches) == 1
    monkeypatch.setenv(IMPLEMENTATION_VARIABLE, "fast")
    with pytest.raises(ValueError, match=r"FASTVIDEO_COMM_IMPL\) must be one of .*, got 'fast'$"):
        strided_copy_(torch.zeros(2), torch.ones(2))


def test_an_explicit_implementation_ignores_the_environment(monkeypatch, launches):
    monkeypatch.setenv(IMPLEMENTATION_VARIABLE, "triton")
    strided_copy_(torch.zeros(2), torch.ones(2), impl="torch")
    assert launches == []


def test_auto_is_torch_on_the_cpu_at_every_size(launches):
    src = torch.ones(SMALL_COPY_BYTES, dtype=torch.uint8)
    strided_copy_(torch.empty_like(src), src)
    assert launches == []


def test_triton_refuses_cpu_tensors_without_the_interpreter():
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = False
        with pytest.raises(
            ValueError,
            match=r"^impl='triton' must be given accelerator tensors \(or CPU tensors with "
            r"TRITON_INTERPRET=1 set before triton is imported\), got cpu$",
        ):
            strided_copy_(torch.zeros(2), torch.ones(2), impl="triton")


def test_triton_refuses_other_devices():
    with pytest.raises(ValueError, match=r"^impl='triton' must be given accelerator .*, got meta$"):
        strided_copy_(torch.zeros(2, device="meta"), torch.ones(2, device="meta"), impl="triton")
