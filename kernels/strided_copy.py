"""`strided_copy_`: one tensor into another of the same shape, any strides on both sides.

Triton on an accelerator, torch's `copy_` on the CPU: the same function twice, bit for bit.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from .plan import MAX_OUTER, coalesce, plan_copy

Implementation: TypeAlias = Literal["auto", "triton", "torch"]

IMPLEMENTATION_VARIABLE = "FASTVIDEO_COMM_IMPL"
# Below this many bytes the host time of Triton's launch is longer than what the kernel saves, and
# "auto" calls torch. A guess until a GPU has measured it; see bench/NOTES.md.
SMALL_COPY_BYTES = 1 << 20
_TRITON_DEVICES = ("cuda", "xpu")
_ELEMENT_DTYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def strided_copy_(dst: Tensor, src: Tensor, *, impl: Implementation = "auto") -> Tensor:
    """Copies `src` into `dst`, whatever strides the two have, and returns `dst`.

    One pass at the speed of a plain copy: dims are coalesced, bytes move in the widest unit that
    strides, sizes and addresses allow (16 bytes per thread), true transposes are staged so that
    both sides stay coalesced. It allocates nothing, does not synchronise with the host and can be
    captured in a CUDA graph. Autograd does not see it; it counts as an in-place write to `dst`.

    Example:
        >>> import torch
        >>> x = torch.arange(6).reshape(2, 3)
        >>> strided_copy_(torch.empty(3, 2, dtype=torch.int64), x.T)
        tensor([[0, 3],
                [1, 4],
                [2, 5]])

    Args:
        dst: any shape, dtype and strides in which no two elements share memory.
        src: same shape, dtype and device as `dst`; expanded (stride 0) dims are fine. Must not
            share memory with `dst`, unless it is `dst`.
        impl: "auto" takes Triton for accelerator tensors of at least `SMALL_COPY_BYTES` and torch
            for the rest, or what the environment variable FASTVIDEO_COMM_IMPL says. "triton" and
            "torch" never fall back; "triton" takes CPU tensors only under TRITON_INTERPRET=1.

    Raises:
        ValueError: shapes differ, memory overlaps, or `impl` is unknown or cannot run here.
        TypeError: not a dense tensor, or dtypes differ.
    """
    _validate(dst, src)
    if impl == "auto":
        impl = os.environ.get(IMPLEMENTATION_VARIABLE, "auto")  # type: ignore[assignment]
    if impl not in get_args(Implementation):
        raise ValueError(
            f"impl (or {IMPLEMENTATION_VARIABLE}) must be one of {get_args(Implementation)}, "
            f"got {impl!r}"
        )
    # A lazily conjugated or negated source is not the bytes that it shows.
    src = src.resolve_conj().resolve_neg()
    if impl == "triton" or (impl == "auto" and _triton_pays(dst)):
        _require_triton(dst)
        _copy_triton(dst, src)
        torch.autograd.graph.increment_version(dst)
    else:
        with torch.no_grad():
            dst.copy_(src)
    return dst


def _triton_pays(dst: Tensor) -> bool:
    return (
        dst.device.type in _TRITON_DEVICES
        and dst.numel() * dst.element_size() >= SMALL_COPY_BYTES
        and importlib.util.find_spec("triton") is not None
    )


def _require_triton(dst: Tensor) -> None:
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            "impl must be 'torch' or 'auto' where triton is not installed, got 'triton'"
        )
    if dst.device.type in _TRITON_DEVICES:
        return
    from triton import knobs

    if not (dst.device.type == "cpu" and knobs.runtime.interpret):
        raise ValueError(
            "impl='triton' must be given accelerator tensors (or CPU tensors with "
            f"TRITON_INTERPRET=1 set before triton is imported), got {dst.device}"
        )


def _copy_triton(dst: Tensor, src: Tensor) -> None:
    """One launch; more only for tensors with more than `MAX_OUTER + 2` dims that do not merge."""
    if dst.numel() == 0:
        return
    dims, run = coalesce(tuple(dst.shape), dst.stride(), src.stride(), dst.element_size())
    if len(dims) > MAX_OUTER + 1:
        # The outermost dim that is not merged away: its slices are copied one by one.
        dim = min(
            (dim for dim, size in enumerate(dst.shape) if size > 1), key=lambda dim: dst.shape[dim]
        )
        for dst_slice, src_slice in zip(dst.unbind(dim), src.unbind(dim), strict=True):
            _copy_triton(dst_slice, src_slice)
        return
    plan = plan_copy(dims, run, dst.data_ptr(), src.data_ptr())
    import triton

    from .tile_copy import tile_copy

    dtype = _ELEMENT_DTYPES[plan.element_bytes]
    outer = [*plan.outer, *[(1, 0, 0)] * (MAX_OUTER - len(plan.outer))]
    with torch.accelerator.device_index(dst.device.index):  # None, on the CPU, changes nothing
        tile_copy[(plan.num_programs,)](
            triton.reinterpret(dst, dtype),
            triton.reinterpret(src, dtype),
            plan.rows[0],
            plan.columns[0],
            plan.rows[1],
            plan.columns[1],
            plan.rows[2],
            plan.columns[2],
            *[number for dim in outer for number in dim],
            NUM_OUTER=len(plan.outer),
            VECTOR=plan.vector,
            TRANSPOSED=plan.transposed,
            BLOCK_ROWS=plan.block_rows,
            BLOCK_COLUMNS=plan.block_columns,
        )


def _validate(dst: Tensor, src: Tensor) -> None:
    for name, tensor in (("dst", dst), ("src", src)):
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got {_kind(tensor)}")
    if src.dtype != dst.dtype:
        raise TypeError(f"src must have dst's dtype {dst.dtype}, got {src.dtype}")
    if src.shape != dst.shape:
        raise ValueError(f"src must have dst's shape {list(dst.shape)}, got {list(src.shape)}")
    if src.device != dst.device:
        raise ValueError(f"src must be on dst's device {dst.device}, got {src.device}")
    if dst.is_conj() or dst.is_neg():
        raise ValueError("dst must not be a conjugated or negated view, got one")
    if _overlaps_itself(dst):
        raise ValueError(
            "dst must not overlap itself, got "
            f"shape {list(dst.shape)} with strides {list(dst.stride())}"
        )
    if _overlap(dst, src):
        raise ValueError("src must not share memory with dst, got views of the same elements")


def _kind(value: object) -> str:
    return str(value.layout) if isinstance(value, Tensor) else type(value).__name__


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements share memory. Exact: strides that interleave are enumerated."""
    if tensor.is_contiguous() or tensor.numel() < 2:
        return False
    extent = 0
    dims = [
        (stride, size)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        if size > 1
    ]
    for stride, size in sorted(dims):
        if stride == 0:
            return True
        if stride <= extent:
            offsets = _offsets(tensor)
            return offsets.unique().numel() != offsets.numel()
        extent += stride * (size - 1)
    return False


def _overlap(dst: Tensor, src: Tensor) -> bool:
    """Whether dst and src share an element without being the same view."""
    if dst.untyped_storage().data_ptr() != src.untyped_storage().data_ptr() or not dst.numel():
        return False
    if dst.data_ptr() == src.data_ptr() and dst.stride() == src.stride():
        return False
    spans = [
        (tensor.data_ptr(), tensor.data_ptr() + tensor.element_size() * _span(tensor))
        for tensor in (dst, src)
    ]
    if spans[0][1] <= spans[1][0] or spans[1][1] <= spans[0][0]:
        return False
    first = min(spans)[0]
    bytes_of = [
        (_offsets(tensor) * tensor.element_size() + (tensor.data_ptr() - first)).unique()
        for tensor in (dst, src)
    ]
    return bool(torch.isin(*bytes_of).any())


def _span(tensor: Tensor) -> int:
    """Elements from the first to the last, both counted."""
    return 1 + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _offsets(tensor: Tensor) -> Tensor:
    """The offset of every element from the first, in elements, on the CPU."""
    offsets = torch.zeros(1, dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = (offsets[:, None] + torch.arange(size)[None, :] * stride).flatten()
    return offsets
