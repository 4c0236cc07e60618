"""What a communicator runs before the first step: every kind of call once, on zeros."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from .utils import near_even_sizes

if TYPE_CHECKING:
    from .communicator import DeviceCommunicatorBase
    from .validation import Sizes

# As many elements of float32 as take the way of large tensors on two ranks and more: the copies of
# long runs are one kernel, whatever their length.
NUM_ELEMENTS = 2**17


def there_and_back(
    communicator: DeviceCommunicatorBase,
    shape: Sequence[int] | Sequence[Sequence[int]],
    dtype: torch.dtype,
    *,
    heads_first: bool,
) -> None:
    """Heads for sequence, of one tensor or several; the first of them back; and both backward."""

    def zeros(shape: Sequence[int]) -> Tensor:
        if heads_first and len(shape) == 4:
            batch, sequence, heads, head_dim = shape
            x = torch.zeros(
                (batch, heads, sequence, head_dim), dtype=dtype, device=communicator.device
            ).transpose(1, 2)
        else:
            x = torch.zeros(tuple(shape), dtype=dtype, device=communicator.device)
        return x.requires_grad_(dtype.is_floating_point)

    def backward(outputs: Sequence[Tensor]) -> None:
        if outputs[0].requires_grad:
            torch.autograd.backward(outputs, [zeros(output.shape).detach() for output in outputs])

    packed = bool(shape) and isinstance(shape[0], Sequence)
    shapes = cast(Sequence[Sequence[int]], shape if packed else [shape])
    xs = [zeros(each) for each in shapes]
    ranks, heads = communicator.world_size, [x.shape[2] for x in xs if x.dim() == 4]
    # Fewer heads than ranks go to several of them where others are there to use them.
    uneven = any(each % ranks and (not packed or not each or ranks % each) for each in heads)
    sizes: Sizes = "auto" if uneven else None
    if packed:
        outputs = communicator.all_to_all_4D(xs, scatter_sizes=sizes)
    else:
        outputs = (communicator.all_to_all_4D(xs[0], scatter_sizes=sizes),)
    backward(outputs)
    attended = zeros(outputs[0].shape)
    gather_sizes = near_even_sizes(heads[0], ranks) if uneven else None
    backward([communicator.all_to_all_4D(attended, 1, 2, gather_sizes=gather_sizes)])


def other_collectives(communicator: DeviceCommunicatorBase) -> None:
    """`all_gather` and `slice` of a dim with others before it, and `all_reduce`."""
    device = communicator.device
    x = torch.zeros(2, NUM_ELEMENTS, device=device, requires_grad=True)
    y = communicator.slice(communicator.all_gather(x), -1)
    (y.sum() + communicator.all_reduce(x.narrow(-1, 0, 1)).sum()).backward()
