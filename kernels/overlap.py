"""Whether elements of strided tensors share memory: exact, without a loop over all elements.

An address in a strided tensor is a sum of `stride * index`. Two elements share memory if such a sum
has a given value. A bounded search over the few dims answers this.
"""

from __future__ import annotations

from torch import Tensor


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two indices of `tensor` are the same element in memory.

    Example:
        >>> import torch
        >>> overlaps_itself(torch.empty(3, 1).expand(3, 2)), overlaps_itself(torch.empty(3, 2).T)
        (True, False)
    """
    if tensor.is_contiguous():
        return False
    dims = sorted(
        (stride, size)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        if size > 1
    )
    reach = 0
    for stride, size in dims:
        if not stride:
            return True
        if stride <= reach:
            break
        reach += stride * (size - 1)
    else:
        return False  # every stride is larger than the extent of the inner dims: the usual case
    # Differences of two indices, shifted to start at 0. Every index gives difference 0 with itself.
    differences = [(stride, 2 * size - 1) for stride, size in dims]
    zero = sum(stride * (size - 1) for stride, size in dims)
    return _count_ways(zero, differences[::-1], 2) > 1


def overlap(dst: Tensor, src: Tensor) -> bool:
    """Whether `dst` and `src` have memory in common without being the same view.

    Example:
        >>> import torch
        >>> x = torch.empty(4, 6)
        >>> overlap(x[:, :3], x[:, 3:]), overlap(x[:, :3], x[:, 2:5]), overlap(x, x)
        (False, True, False)
    """
    memory = dst.untyped_storage().data_ptr()  # 0 where there is none
    if not memory or memory != src.untyped_storage().data_ptr() or not dst.numel():
        return False
    if dst.data_ptr() == src.data_ptr() and dst.stride() == src.stride():
        return False
    # In elements, dst + i == src + j. With j counted down from src's last element, i and j are
    # added. Dims with the same stride count as one dim.
    sizes: dict[int, int] = {}
    target = (src.data_ptr() - dst.data_ptr()) // dst.element_size()
    for size, *strides in zip(dst.shape, dst.stride(), src.stride(), strict=True):
        target += strides[1] * (size - 1)
        for stride in strides:
            if stride:  # an expanded dim adds nothing to an address
                sizes[stride] = sizes.get(stride, 1) + size - 1
    return _count_ways(target, sorted(sizes.items(), reverse=True), 1) > 0


def _count_ways(target: int, dims: list[tuple[int, int]], limit: int) -> int:
    """Counts, up to `limit`, how `target` is a sum of `stride * index`, `0 <= index < size`.

    The dims are (stride, size), with the largest stride first and no stride 0.
    """
    if not dims:
        return int(target == 0)
    (stride, size), *inner = dims
    reach = sum(inner_stride * (inner_size - 1) for inner_stride, inner_size in inner)
    ways = 0
    for index in range(max(0, -((reach - target) // stride)), min(size - 1, target // stride) + 1):
        ways += _count_ways(target - stride * index, inner, limit - ways)
        if ways >= limit:
            break
    return ways
