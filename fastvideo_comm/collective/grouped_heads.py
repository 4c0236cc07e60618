"""How the ranks share the heads of grouped attention: each has the key heads of its query heads.

In grouped attention H query heads use K key heads, H a multiple of K: query head i uses key head
`i // (H // K)`. A rank that shares both counts on its own, as evenly as can be, gets query heads
whose key heads are on another rank, and its attention is silently wrong. So the heads are shared in
units of the group, a key head with its H // K query heads:

    H, K, P     numbers of query heads     key heads
    12, 4, 2    6, 6                       0 1 | 2 3
    12, 4, 3    6, 3, 3                    0 1 | 2 | 3
    12, 2, 3    6, 6, 0                    0 | 1 | none
    12, 2, 4    3, 3, 3, 3                 0 | 0 | 1 | 1
"""

from __future__ import annotations

from collections.abc import Sequence

from .layout import Split, near_even_sizes

HEADS_DIM = 2


def form_groups(heads: Sequence[int]) -> bool:
    """Whether these counts of heads are those of one attention: multiples of the smallest.

    Example:
        >>> form_groups([12, 4, 4]), form_groups([12, 5]), form_groups([12, 0])
        (True, False, True)
    """
    key_heads = _key_heads(heads)
    return not any(each % key_heads for each in heads)


def grouped_splits(heads: Sequence[int], world_size: int) -> list[Split]:
    """How each of several tensors of one attention is shared; `form_groups` holds for their heads.

    The smallest count is K, the number of groups. Where there are more ranks than groups, and their
    number is a multiple of K, the ranks of a group divide its query heads among them and all hold
    its key head. Else each group is on one rank, and the ranks without a group have no heads.

    Example:
        >>> [share.sizes for share in grouped_splits([12, 4, 4], 3)]
        [(6, 3, 3), (2, 1, 1), (2, 1, 1)]
        >>> grouped_splits([6, 2], 4)
        [Split(dim=2, sizes=(2, 1, 2, 1), replicas=1), Split(dim=2, sizes=None, replicas=2)]

    Args:
        heads: the number of heads of each tensor; 0 for a tensor without any.
        world_size: P, the number of ranks.
    """
    key_heads = _key_heads(heads)
    replicas = 1
    # Tensors of one count have no head that several ranks need.
    grouped = any(each > key_heads for each in heads)
    if grouped and key_heads < world_size and not world_size % key_heads:
        replicas = world_size // key_heads
    shares = []
    for each in heads:
        group = each // key_heads
        if replicas > 1 and group == 1:
            shares.append(Split(HEADS_DIM, None, replicas))
            continue
        if replicas > 1:
            sizes = near_even_sizes(group, replicas) * key_heads
        else:
            sizes = [groups * group for groups in near_even_sizes(key_heads, world_size)]
        # Not `set`: what is hashed becomes a constant of a compiled graph.
        uneven = any(size != sizes[0] for size in sizes)
        shares.append(Split(HEADS_DIM, tuple(sizes) if uneven else None))
    return shares


def _key_heads(heads: Sequence[int]) -> int:
    return min([each for each in heads if each] or [1])
