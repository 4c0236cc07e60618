"""`strided_copy_`: one tensor into another of the same shape, any strides on both sides.

Triton on an accelerator, torch's `copy_` on the CPU: the same function twice, bit for bit.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from .overlap import overlap, overlaps_itself

Implementation: TypeAlias = Literal["auto", "triton", "torch"]

IMPLEMENTATION_VARIABLE = "FASTVIDEO_COMM_IMPL"
# Below this many bytes the host time of Triton's launch is longer than what the kernel saves, and
# "auto" calls torch. A guess until a GPU has measured it; see bench/NOTES.md.
SMALL_COPY_BYTES = 1 << 20
_IMPLEMENTATIONS = get_args(Implementation)
_TRITON_DEVICES = ("cuda", "xpu")
# Found, not imported: importing it takes a second that the CPU path need not pay.
_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None


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
    return copy_valid_(dst, src, impl=impl)


def copy_valid_(dst: Tensor, src: Tensor, *, impl: Implementation = "auto") -> Tensor:
    """`strided_copy_` for a caller who knows that `dst` and `src` are valid: looks at neither.

    On the CPU looking costs more than copying a small tensor.
    """
    if _triton_runs(impl, (dst,)):
        _launch([(dst, src)])
    else:
        _copy(dst, src)
    return dst


def contiguous_copy(src: Tensor) -> Tensor:
    """The elements of a view in new contiguous memory; traced, where torch.compile is looking.

    Example:
        >>> import torch
        >>> contiguous_copy(torch.arange(4).view(2, 2).T)
        tensor([[0, 2],
                [1, 3]])
    """
    if torch.compiler.is_compiling():
        return src.clone(memory_format=torch.contiguous_format)
    return copy_valid_(src.new_empty(src.shape), src)


def copy_all_valid_(
    pairs: Sequence[tuple[Tensor, Tensor]], *, impl: Implementation = "auto"
) -> None:
    """`copy_valid_` for several pairs (dst, src) at once: one launch of Triton's for up to eight.

    Pairs may differ in shape, strides and dtype. They are copied in any order or at the same time:
    all are on one device, and no dst shares memory with another pair. "auto" goes by the bytes of
    all pairs together.

    Example:
        >>> import torch
        >>> q, k = torch.arange(4).view(2, 2), torch.ones(3)
        >>> pairs = [(torch.empty_like(q), q.T), (torch.empty_like(k), k)]
        >>> copy_all_valid_(pairs)
        >>> pairs[0][0]
        tensor([[0, 2],
                [1, 3]])
    """
    if len(pairs) == 1:
        copy_valid_(*pairs[0], impl=impl)
    elif _triton_runs(impl, [dst for dst, _ in pairs]):
        _launch(pairs)
    else:
        for dst, src in pairs:
            _copy(dst, src)


def _copy(dst: Tensor, src: Tensor) -> None:
    if torch.is_grad_enabled():  # autograd must not see the copy
        dst, src = dst.detach(), src.detach()
    dst.copy_(src)


def _triton_runs(impl: str, dsts: Sequence[Tensor]) -> bool:
    """Whether Triton's kernel makes these copies, or torch's."""
    if impl == "auto":
        impl = os.environ.get(IMPLEMENTATION_VARIABLE, "auto")
    if impl == "auto":
        if not dsts or dsts[0].is_cpu:
            return False
        return (
            dsts[0].device.type in _TRITON_DEVICES
            and _TRITON_IS_INSTALLED
            and sum(dst.nbytes for dst in dsts) >= SMALL_COPY_BYTES
        )
    if impl not in _IMPLEMENTATIONS:
        raise ValueError(
            f"impl (or {IMPLEMENTATION_VARIABLE}) must be one of {_IMPLEMENTATIONS}, got {impl!r}"
        )
    return impl == "triton"


def _launch(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for dst, _ in pairs:
        _require_triton(dst)
    from .tile_copy import launch_tile_copies

    # A lazily conjugated or negated source is not the bytes that it shows.
    launch_tile_copies([(dst, src.resolve_conj().resolve_neg()) for dst, src in pairs])
    torch.autograd.graph.increment_version([dst for dst, _ in pairs])


def _require_triton(dst: Tensor) -> None:
    if not _TRITON_IS_INSTALLED:
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


def _validate(dst: Tensor, src: Tensor) -> None:
    for name, tensor in (("dst", dst), ("src", src)):
        if not _is_dense(tensor):
            raise TypeError(f"{name} must be a dense tensor, got {_kind(tensor)}")
    if src.dtype is not dst.dtype:
        raise TypeError(f"src must have dst's dtype {dst.dtype}, got {src.dtype}")
    if src.shape != dst.shape:
        raise ValueError(f"src must have dst's shape {list(dst.shape)}, got {list(src.shape)}")
    if src.device != dst.device:
        raise ValueError(f"src must be on dst's device {dst.device}, got {src.device}")
    if dst.is_conj() or dst.is_neg():
        raise ValueError("dst must not be a conjugated or negated view, got one")
    if overlaps_itself(dst):
        raise ValueError(
            "dst must not overlap itself, got "
            f"shape {list(dst.shape)} with strides {list(dst.stride())}"
        )
    if overlap(dst, src):
        raise ValueError("src must not share memory with dst, got views of the same elements")


def _is_dense(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested


def _kind(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return "a nested one" if value.is_nested else str(value.layout)
