"""`strided_copy_`: copies a tensor into another of the same shape, with any strides on both sides.

It uses Triton on an accelerator and torch's `copy_` on the CPU. Both give the same bits.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .overlap import overlap, overlaps_itself

Implementation: TypeAlias = Literal["auto", "triton", "torch"]

IMPLEMENTATION_VARIABLE = "FASTVIDEO_COMM_IMPL"
# Below this many bytes "auto" calls torch: the host time of Triton's launch is longer than the time
# that the kernel saves. The number is a guess and is not measured on a GPU yet; see bench/NOTES.md.
SMALL_COPY_BYTES = 1 << 20
_IMPLEMENTATIONS = get_args(Implementation)
_TRITON_DEVICES = ("cuda", "xpu")
_PROXIES = torch._C._TorchDispatchModeKey.PROXY  # of make_fx
_functorch_is_active = torch._C._are_functorch_transforms_active
# Only looks for triton: an import takes long, and copies on the CPU do not need it.
_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None


def strided_copy_(dst: Tensor, src: Tensor, *, impl: Implementation = "auto") -> Tensor:
    """Copies `src` into `dst`, with any strides on both sides, and returns `dst`.

    The copy is one pass. Dims are coalesced. Bytes move in the widest unit that strides, sizes and
    addresses allow, up to 16 bytes per thread. A transpose goes through shared memory, so that both
    sides stay coalesced. The copy allocates nothing and does not synchronise with the host, so a
    CUDA graph can capture it. Autograd does not record the copy; it counts as an in-place write to
    `dst`.

    Example:
        >>> import torch
        >>> x = torch.arange(6).reshape(2, 3)
        >>> strided_copy_(torch.empty(3, 2, dtype=torch.int64), x.T)
        tensor([[0, 3],
                [1, 4],
                [2, 5]])

    Args:
        dst: any shape, dtype and strides in which no two elements share memory.
        src: same shape, dtype and device as `dst`. Expanded dims (stride 0) are allowed. `src` must
            not share memory with `dst`, unless `src` is `dst`.
        impl: "auto" takes what the environment variable FASTVIDEO_COMM_IMPL says. If it is not set,
            "auto" takes Triton for accelerator tensors of at least `SMALL_COPY_BYTES`, and torch
            for all others. "triton" and "torch" never fall back. "triton" takes CPU tensors only
            under TRITON_INTERPRET=1.

    Raises:
        ValueError: shapes differ, memory overlaps, or `impl` is unknown or cannot run here.
        TypeError: not a dense tensor, or dtypes differ.
    """
    _validate(dst, src)
    return copy_valid_(dst, src, impl=impl)


def copy_valid_(dst: Tensor, src: Tensor, *, impl: Implementation = "auto") -> Tensor:
    """`strided_copy_` without checks, for a caller who knows that `dst` and `src` are valid.

    On the CPU the checks cost more than a copy of a small tensor.
    """
    if impl != "torch" and triton_runs(impl, (dst,)):
        _launch([(dst, src)])
        return dst
    is_watched = dst.requires_grad or src.requires_grad or forward_ad._current_level >= 0
    if is_watched or _functorch_is_active():  # autograd must not record the copy
        dst.detach().copy_(src.detach())
    else:
        dst.copy_(src)
    return dst


def contiguous_copy(src: Tensor) -> Tensor:
    """Copies the elements of a view into new contiguous memory; a compiler or make_fx can trace it.

    Example:
        >>> import torch
        >>> contiguous_copy(torch.arange(4).view(2, 2).T)
        tensor([[0, 2],
                [1, 3]])
    """
    if torch.compiler.is_compiling() or torch._C._get_dispatch_mode(_PROXIES) is not None:
        return src.clone(memory_format=torch.contiguous_format)
    return copy_valid_(src.new_empty(src.shape), src)


def copy_all_valid_(
    pairs: Sequence[tuple[Tensor, Tensor]], *, impl: Implementation = "auto"
) -> None:
    """`copy_valid_` for several pairs (dst, src): one Triton launch for up to eight pairs.

    Pairs may differ in shape, strides and dtype. All pairs must be on one device, and no dst may
    share memory with another pair, because pairs are copied in any order or at the same time.
    "auto" counts the bytes of all pairs together.

    Example:
        >>> import torch
        >>> q, k = torch.arange(4).view(2, 2), torch.ones(3)
        >>> pairs = [(torch.empty_like(q), q.T), (torch.empty_like(k), k)]
        >>> copy_all_valid_(pairs)
        >>> pairs[0][0]
        tensor([[0, 2],
                [1, 3]])
    """
    if impl != "torch" and triton_runs(impl, [dst for dst, _ in pairs]):
        _launch(pairs)
    else:
        for dst, src in pairs:
            copy_valid_(dst, src, impl="torch")


def implementation_on_cpu() -> Implementation:
    """What "auto" means for the CPU now: for a caller of many copies, who then gives it as `impl`.

    Between ranks, reading the environment took 10 to 20 us of a tiny call of 350 us.

    Example:
        >>> implementation_on_cpu()
        'torch'
    """
    return "torch" if os.environ.get(IMPLEMENTATION_VARIABLE, "auto") == "auto" else "auto"


def triton_runs(impl: str, dsts: Sequence[Tensor]) -> bool:
    """Whether Triton makes these copies; otherwise torch makes them."""
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
        require_triton(dst)
    from .tile_copy import launch_tile_copies

    # The bytes of a lazily conjugated or negated source are not its values.
    launch_tile_copies([(dst, src.resolve_conj().resolve_neg()) for dst, src in pairs])
    torch.autograd.graph.increment_version([dst for dst, _ in pairs])


def require_triton(dst: Tensor) -> None:
    """Raises where Triton cannot run on the device of a tensor."""
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
