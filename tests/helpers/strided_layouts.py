"""Random strided layouts, and the comparison of a copy with `copy_`, byte for byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from hypothesis import strategies as st
from torch import Tensor

from fastvideo_comm.kernels import copy_all_valid_

DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
)
_MARGIN = 16


class StridedLayout(NamedTuple):
    """A tensor's place in a buffer, in elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def num_elements(self) -> int:
        """Elements of the buffer, with a margin behind the last that is used."""
        reach = sum(
            (size - 1) * stride
            for size, stride in zip(self.shape, self.strides, strict=True)
            if size
        )
        return self.offset + reach + 1 + _MARGIN

    def of(self, buffer: Tensor) -> Tensor:
        """The view of `buffer`."""
        return buffer.as_strided(self.shape, self.strides, self.offset)


# Layouts of dst and src, and their dtype.
Copy: TypeAlias = tuple[tuple[StridedLayout, StridedLayout], torch.dtype]


def _pair(
    shape: tuple[int, ...],
    dst_strides: tuple[int, ...],
    src_strides: tuple[int, ...],
    dst_offset: int = 0,
    src_offset: int = 0,
) -> tuple[StridedLayout, StridedLayout]:
    return (
        StridedLayout(shape, dst_strides, dst_offset),
        StridedLayout(shape, src_strides, src_offset),
    )


# (dst, src): where one thing decides how wide an access may be, each of them once.
NAMED_PAIRS = {
    "0-d": _pair((), (), ()),
    "pack b s (P h) d -> b P s h d": _pair(
        (2, 3, 5, 2, 8), (240, 80, 16, 8, 1), (240, 16, 48, 8, 1)
    ),
    "unpack b P s h d -> b s (P h) d": _pair(
        (2, 3, 5, 2, 8), (240, 16, 48, 8, 1), (240, 80, 16, 8, 1)
    ),
    "even runs in odd rows of src": _pair((6, 16), (16, 1), (19, 1)),
    "even runs in odd rows of dst": _pair((6, 16), (19, 1), (16, 1)),
    "even runs in odd planes": _pair((2, 6, 16), (193, 32, 1), (192, 16, 1)),
    "odd runs in even rows": _pair((6, 13), (16, 1), (32, 1)),
    "odd address of dst": _pair((64,), (1,), (1,), 1, 16),
    "odd address of src": _pair((64,), (1,), (1,), 16, 1),
    "steps": _pair((5, 20), (80, 2), (160, 4)),
    "transpose": _pair((32, 48), (48, 1), (1, 32)),
    "transpose of odd columns": _pair((32, 47), (48, 1), (1, 32)),
    "transpose of odd rows": _pair((31, 48), (48, 1), (1, 32)),
    "transpose into odd rows": _pair((32, 48), (49, 1), (1, 32)),
    "transpose out of odd rows": _pair((32, 48), (48, 1), (1, 33)),
    "transpose in odd planes": _pair((3, 32, 48), (1537, 48, 1), (1536, 1, 32)),
    "transpose at an odd address": _pair((32, 48), (48, 1), (1, 32), 1),
    "transpose of expanded planes": _pair((3, 32, 48), (1536, 48, 1), (0, 1, 32)),
    "expanded rows": _pair((7, 32), (32, 1), (0, 1)),
    "expanded columns": _pair((7, 32), (32, 1), (1, 0)),
    "one element everywhere": _pair((7, 32), (32, 1), (0, 0)),
    "three outer dims": _pair((2, 3, 4, 5, 8), (1024, 320, 72, 9, 1), (2000, 16, 400, 80, 1)),
}


@st.composite
def pairs_of_layouts(draw: st.DrawFn) -> tuple[StridedLayout, StridedLayout]:
    """A dst that does not overlap itself and a src, one shape of 0 to 6 dims, any strides."""
    num_dims = draw(st.integers(0, 6))
    # A long dim or two among short ones: many tiles in some examples, many outer dims in others.
    sizes = st.one_of(st.integers(1, 4), st.sampled_from((8, 16, 32)), st.integers(0, 40))
    shape: list[int] = []
    for _ in range(num_dims):
        shape.append(min(draw(sizes), max(1, 3000 // max(1, math.prod(shape)))))
    dst = _layout(draw, tuple(shape))
    # Often the order of dst, so that dims merge and runs are long.
    src = _layout(draw, tuple(shape), like=dst if draw(st.booleans()) else None)
    expanded = [draw(st.integers(0, 5)) == 0 for _ in shape]
    strides = tuple(
        0 if is_expanded else stride
        for is_expanded, stride in zip(expanded, src.strides, strict=True)
    )
    return dst, src._replace(strides=strides)


def copies() -> st.SearchStrategy[Copy]:
    """Any two layouts and any dtype."""
    return st.tuples(pairs_of_layouts(), st.sampled_from(DTYPES))


def _layout(
    draw: st.DrawFn, shape: tuple[int, ...], like: StridedLayout | None = None
) -> StridedLayout:
    """Dims nested in a random order, each with a step and a gap behind it, as views have them."""
    if like is None:
        order = draw(st.permutations(range(len(shape))))
    else:
        order = sorted(range(len(shape)), key=lambda dim: like.strides[dim])
    aligned = draw(st.booleans())  # else vectors of 16 bytes would be rare
    gaps = st.sampled_from((0, 0, 16) if aligned else (0, 0, 0, 1, 3, 8))
    stride = 1 if aligned else draw(st.sampled_from((1, 1, 2, 3, 8)))
    offsets = st.sampled_from((0, 16) if aligned else (0, 1, 2, 5, 8))
    strides = [1] * len(shape)
    for dim in order:
        strides[dim] = stride
        stride = stride * max(1, shape[dim]) + draw(gaps)
    return StridedLayout(shape, tuple(strides), draw(offsets))


def random_buffer(num_elements: int, dtype: torch.dtype, seed: int, device: str) -> Tensor:
    """A 1-d tensor of random bytes: NaNs, infinities and denormals with all their payloads."""
    generator = torch.Generator().manual_seed(seed)
    highest = 2 if dtype == torch.bool else 256
    size = (num_elements * dtype.itemsize,)
    data = torch.randint(0, highest, size, dtype=torch.uint8, generator=generator)
    return data.to(device).view(dtype)


def assert_copies_like_torch(
    copy: Callable[[Tensor, Tensor], Tensor],
    dst_layout: StridedLayout,
    src_layout: StridedLayout,
    dtype: torch.dtype,
    seed: int,
    device: str = "cpu",
) -> None:
    """`copy(dst, src)` leaves dst's whole buffer, with all around dst, as `copy_` would."""
    src = src_layout.of(random_buffer(src_layout.num_elements(), dtype, seed, device))
    buffer = random_buffer(dst_layout.num_elements(), dtype, seed + 1, device)
    expected = buffer.clone()
    dst_layout.of(expected).copy_(src)
    dst = dst_layout.of(buffer)
    assert copy(dst, src) is dst
    same = torch.equal(buffer.view(torch.uint8), expected.view(torch.uint8))
    assert same, f"{dst_layout} from {src_layout}, {dtype}"


def assert_all_copied_like_torch(
    copies: Sequence[Copy], seed: int, impl: str = "triton", device: str = "cpu"
) -> None:
    """`copy_all_valid_` leaves every dst's whole buffer, with all around dst, as `copy_` would."""
    pairs, buffers, expected = [], [], []
    for index, ((dst_layout, src_layout), dtype) in enumerate(copies):
        src, buffer = (
            random_buffer(layout.num_elements(), dtype, seed + 2 * index + side, device)
            for side, layout in enumerate((src_layout, dst_layout))
        )
        expected.append(buffer.clone())
        dst_layout.of(expected[-1]).copy_(src_layout.of(src))
        buffers.append(buffer)
        pairs.append((dst_layout.of(buffer), src_layout.of(src)))
    copy_all_valid_(pairs, impl=impl)
    for buffer, right in zip(buffers, expected, strict=True):
        assert torch.equal(buffer.view(torch.uint8), right.view(torch.uint8))
