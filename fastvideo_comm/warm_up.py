"""What a communicator runs before the first step: every kind of call once, on zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .collective.grouped_heads import form_groups
from .collective.layout import near_even_sizes
from .collective.validation import Sizes

# So many elements of float32 count as a large tensor on two ranks and more. One length is enough:
# copies of long runs use the same kernel at every length.
NUM_ELEMENTS = 2**17


class Call(NamedTuple):
    """One exchange: shapes and dtype of its tensors; `packed` if they are given as a sequence."""

    shapes: Sequence[Sequence[int]]
    dtype: torch.dtype
    packed: bool


def checked_calls(
    shapes: Iterable[Sequence[int] | Sequence[Sequence[int]]], dtypes: Iterable[torch.dtype]
) -> list[Call]:
    """Returns a call for each entry of `shapes` and each dtype.

    Raises:
        ValueError: a shape that is not 4 sizes.
        TypeError: one shape instead of several of them, or one dtype.
    """
    if isinstance(dtypes, torch.dtype):
        raise TypeError(f"dtypes must be several torch.dtype, such as [{dtypes}], got {dtypes}")
    dtypes = list(dtypes)
    calls = []
    for entry in shapes:
        if not isinstance(entry, Sequence):
            raise TypeError(f"shapes must be several [B, s, H, D], got {entry!r} for one of them")
        packed = bool(entry) and isinstance(entry[0], Sequence)
        of_call = cast("Sequence[Sequence[int]]", entry if packed else [entry])
        for shape in of_call:
            if len(shape) != 4 or not all(isinstance(n, int) and n >= 0 for n in shape):
                raise ValueError(f"shapes must be 4 sizes [B, s, H, D] each, got {tuple(shape)}")
        calls += [Call(of_call, dtype, packed) for dtype in dtypes]
    return calls


def there_and_back(
    exchange: Callable[..., Any],
    call: Call,
    device: torch.device,
    world_size: int,
    *,
    heads_first: bool,
) -> None:
    """Exchanges tensors before and after attention, forward and backward."""

    def zeros(shape: Sequence[int]) -> Tensor:
        batch, sequence, heads, head_dim = shape
        stored = (batch, heads, sequence, head_dim) if heads_first else tuple(shape)
        x = torch.zeros(stored, dtype=call.dtype, device=device)
        x = x.transpose(1, 2) if heads_first else x
        # The gradients of shared heads are added, and torch cannot add fp8.
        return x.requires_grad_(call.dtype.is_floating_point and call.dtype.itemsize > 1)

    def backward(outputs: Sequence[Tensor]) -> None:
        if outputs[0].requires_grad:
            torch.autograd.backward(outputs, [zeros(output.shape).detach() for output in outputs])

    xs = [zeros(shape) for shape in call.shapes]
    # In a sequence of tensors, each of fewer heads than ranks goes to several ranks.
    heads = [x.shape[2] for x in xs]
    uneven = any(each % world_size and (not call.packed or world_size % each) for each in heads)
    sizes: Sizes = None
    if uneven:
        sizes = "auto"
        if not form_groups(heads):
            sizes = [near_even_sizes(each, world_size) for each in heads]
    if call.packed:
        outputs = exchange(xs, scatter_sizes=sizes)
    else:
        outputs = (exchange(xs[0], scatter_sizes=sizes),)
    backward(outputs)
    attended = zeros(outputs[0].shape)
    gathered: Sizes = "auto" if uneven else None
    backward([exchange(attended, 1, 2, gather_sizes=gathered)])


def other_collectives(
    all_gather: Callable[..., Tensor],
    slice_: Callable[..., Tensor],
    all_reduce: Callable[..., Tensor],
    reduce_scatter: Callable[..., Tensor],
    broadcast: Callable[..., Tensor],
    device: torch.device,
) -> None:
    """`all_gather`, `slice` and `reduce_scatter` of a dim with others before it; the two others."""
    x = torch.zeros(2, NUM_ELEMENTS, device=device, requires_grad=True)
    y = slice_(all_gather(x), -1)
    z = reduce_scatter(all_gather(x), -1)
    one = x.narrow(-1, 0, 1)
    (y.sum() + z.sum() + all_reduce(one).sum() + broadcast(one).sum()).backward()
