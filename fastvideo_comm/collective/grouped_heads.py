"""How the heads of grouped attention are divided: each rank has the key heads of its query heads.

In grouped attention H query heads use K key heads, and H is a multiple of K. Query head i uses key
head `i // (H // K)`. If both counts were divided evenly, each on its own, a rank could get query
heads whose key heads are on another rank, and its attention would be wrong without an error. So the
heads are divided in units of a group: a key head with its H // K query heads.

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
    """Whether these head counts can belong to one attention: all are multiples of the smallest.

    Example:
        >>> form_groups([12, 4, 4]), form_groups([12, 5]), form_groups([12, 0])
        (True, False, True)
    """
    key_heads = _key_heads(heads)
    return not any(each % key_heads for each in heads)


def grouped_splits(heads: Sequence[int], world_size: int) -> list[Split]:
    """Returns how each tensor of one attention is divided; `form_groups` is True for the heads.

    The smallest count is K, the number of groups. If there are more ranks than groups and K divides
    the number of ranks, several ranks share a group: they divide its query heads, and each holds
    its key head. Otherwise each group is on one rank, and ranks without a group have no heads.

    Example:
        >>> [split.sizes for split in grouped_splits([12, 4, 4], 3)]
        [(6, 3, 3), (2, 1, 1), (2, 1, 1)]
        >>> grouped_splits([6, 2], 4)
        [Split(dim=2, sizes=(2, 1, 2, 1), replicas=1), Split(dim=2, sizes=None, replicas=2)]

    Args:
        heads: the number of heads of each tensor, which may be 0.
        world_size: P, the number of ranks.
    """
    key_heads = _key_heads(heads)
    replicas = 1
    # If all counts are equal, no head is needed on several ranks.
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
        # Not a set: a hashed size would become a constant of a compiled graph.
        uneven = any(size != sizes[0] for size in sizes)
        shares.append(Split(HEADS_DIM, tuple(sizes) if uneven else None))
    return shares


def _key_heads(heads: Sequence[int]) -> int:
    return min([each for each in heads if each] or [1])
