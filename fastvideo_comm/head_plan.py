"""Which rank computes which heads of an attention, and in which stage of a pipeline they travel.

With H query heads, K key heads, n = H/K query heads for each key head, and P ranks:

    K >= P              key heads are shared near evenly, each with its n query heads
    K < P, P % K == 0   P/K ranks hold each key head, and share its n query heads near evenly
    K < P otherwise     query heads are shared near evenly; a rank gets the key heads that they use

All ranks compute the same plan from the same numbers, so nothing is sent to agree on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .collective.layout import near_even_sizes


class HeadPlan(NamedTuple):
    """The heads of every rank in every stage.

    Where K >= P, the heads of a stage are neighbours, and so what travels in a stage is a view.
    Where K < P, the heads of a rank are neighbours; its key heads travel in the first stage, and
    the later stages use them again.

    Attributes:
        queries_per_key: n.
        query: `query[stage][rank]` is the number of query heads.
        key: `key[stage][rank]` is the number of key heads; where K < P, of the first stage alone.
        copies: where K < P, the key heads of all ranks, rank by rank; else None.
        is_replicated: whether P/K ranks hold each key head, as `all_to_all_4D` hands them out.
    """

    queries_per_key: int
    query: list[list[int]]
    key: list[list[int]]
    copies: list[int] | None = None
    is_replicated: bool = False

    def counts(self, stage: int) -> list[list[int]]:
        """Every rank's heads, for each tensor that travels in a stage: three, or query alone."""
        return [self.query[stage], *2 * self.key[stage : stage + 1]]

    def scatter_sizes(self, stage: int) -> list[list[int] | None] | None:
        """`counts` as `all_to_all_4D` takes them: None for what it shares out by itself."""
        sizes = [uneven(counts) for counts in self.counts(stage)]
        if self.is_replicated:
            sizes[1:] = [None] * len(sizes[1:])
        return sizes if any(each is not None for each in sizes) else None

    def sent(
        self, query: Tensor, key: Tensor, value: Tensor, *, replicate: bool = False
    ) -> list[list[Tensor]]:
        """The tensors that travel in each stage, the heads of all ranks in rank order.

        With `replicate` key heads that several ranks hold stand there once for each of them.
        """
        stages = len(self.query)
        if self.copies is None:
            whole = ((query, self.query), (key, self.key), (value, self.key))
            parts = [_split(tensor, [sum(each) for each in counts]) for tensor, counts in whole]
            return [list(tensors) for tensors in zip(*parts, strict=True)]
        queries = [query]
        if stages > 1:
            pieces = query.split(
                [count for each in zip(*self.query, strict=True) for count in each], 2
            )
            queries = [torch.cat(pieces[stage::stages], 2) for stage in range(stages)]
        if replicate or not self.is_replicated:
            key, value = _pick(key, self.copies), _pick(value, self.copies)
        return [[queries[0], key, value], *[[each] for each in queries[1:]]]

    def own(self, sent: Sequence[Tensor], stage: int, rank: int) -> list[Tensor]:
        """What a rank would get of a stage, taken from `sent(.., replicate=True)` itself."""
        counts = self.counts(stage)
        return [tensor.split(each, 2)[rank] for tensor, each in zip(sent, counts, strict=True)]

    def keys_used(self, key: Tensor, stage: int, rank: int) -> Tensor:
        """Of a rank's key heads `[B, S, k, D]` those that its query heads of a stage use.

        One for each query head where a grouped attention could not tell which belongs to which.
        """
        if self.copies is None or self.is_replicated:
            return key
        begin = sum(sum(each[:rank]) for each in self.query)
        begin += sum(each[rank] for each in self.query[:stage])
        count = self.query[stage][rank]
        start = sum(self.key[0][:rank])
        first = self.copies[start] if self.key[0][rank] else 0
        heads = [head // self.queries_per_key - first for head in range(begin, begin + count)]
        if not heads:
            return key[:, :, :0]
        distinct = heads[-1] - heads[0] + 1
        if count % distinct or any(
            head != heads[0] + index // (count // distinct) for index, head in enumerate(heads)
        ):
            return _pick(key, heads)
        return key if distinct == key.shape[2] else key.narrow(2, heads[0], distinct)

    def joined(self, outputs: Sequence[Tensor]) -> Tensor:
        """The query heads of all stages in their own order; the inverse of `sent`."""
        if len(outputs) == 1:
            return outputs[0]
        if self.copies is None:
            return torch.cat(list(outputs), 2)
        pieces = [output.split(each, 2) for output, each in zip(outputs, self.query, strict=True)]
        return torch.cat([piece for each in zip(*pieces, strict=True) for piece in each], 2)


def plan_heads(
    num_heads: int, num_key_heads: int, world_size: int, num_stages: int = 1
) -> HeadPlan:
    """The plan for H query heads and K key heads; K divides H.

    There are at most as many stages as the rank with the most heads has key heads or, where K < P,
    query heads.

    Example:
        >>> plan_heads(12, 6, 2, 2).query  # 3 key heads a rank, in stages of 2 and 1
        [[4, 4], [2, 2]]
        >>> plan_heads(10, 5, 4).query  # in units of 2, which share a key head
        [[4, 2, 2, 2]]
        >>> plan_heads(12, 2, 4).copies  # each key head goes to 2 ranks
        [0, 0, 1, 1]
        >>> plan_heads(12, 2, 3).copies  # the rank in the middle uses both
        [0, 0, 1, 1]
        >>> plan_heads(12, 2, 3).key
        [[1, 2, 1]]
    """
    queries_per_key = num_heads // num_key_heads
    if num_key_heads >= world_size:
        key = _in_stages(near_even_sizes(num_key_heads, world_size), num_stages)
        query = [[queries_per_key * count for count in counts] for counts in key]
        return HeadPlan(queries_per_key, query, key)
    if world_size % num_key_heads == 0:
        holders = world_size // num_key_heads
        shares = near_even_sizes(queries_per_key, holders) * num_key_heads
        copies = [rank // holders for rank in range(world_size)]
        query = _in_stages(shares, num_stages)
        return HeadPlan(queries_per_key, query, [[1] * world_size], copies, is_replicated=True)
    shares = near_even_sizes(num_heads, world_size)
    ends = list(accumulate(shares))
    keys = [
        list(range((end - share) // queries_per_key, (end - 1) // queries_per_key + 1))
        if share
        else []
        for share, end in zip(shares, ends, strict=True)
    ]
    copies = [head for heads in keys for head in heads]
    return HeadPlan(
        queries_per_key, _in_stages(shares, num_stages), [[len(heads) for heads in keys]], copies
    )


def uneven(counts: list[int]) -> list[int] | None:
    """None where all ranks have equally many: then nobody needs to be told."""
    return counts if any(count != counts[0] for count in counts) else None


def _in_stages(shares: list[int], num_stages: int) -> list[list[int]]:
    """`[stage][rank]`, from what every rank has in all."""
    per_rank = [near_even_sizes(share, min(num_stages, max(shares))) for share in shares]
    return [list(counts) for counts in zip(*per_rank, strict=True)]


def _split(tensor: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    """Not `narrow`, whose gradient would be a whole tensor of zeros for each part."""
    return [tensor] if len(sizes) == 1 else tensor.split(sizes, 2)


def _pick(tensor: Tensor, heads: list[int]) -> Tensor:
    """`tensor[:, :, heads]`, with a gradient whose sums have one order."""
    each = tensor.split(1, 2)
    return torch.cat([each[head] for head in heads], 2)
