"""The copies that the collectives make at the shapes of video diffusion models.

Wan 2.1 1.3B and 14B and HunyuanVideo: bf16, D = 128, H = 12, 40, 24.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastvideo_comm.collective.layout import message_view

HEAD_DIM = 128
HEADS = (12, 24, 40)
SEQUENCES = (32_760, 75_600, 118_800)
WORLD_SIZES = (2, 4, 8)


class ProductionCopy(NamedTuple):
    """Two views without memory (device meta) that one collective copies between."""

    name: str
    dst: Tensor
    src: Tensor


def production_copies(sequences: Sequence[int] = SEQUENCES) -> Iterator[ProductionCopy]:
    """Every copy of every model, sequence, world size and batch."""
    for heads in HEADS:
        for world_size in WORLD_SIZES:
            if heads % world_size == 0:
                for length in sequences:
                    for batch in (1, 2, 3):
                        yield from _copies(batch, -(-length // world_size), heads, world_size)


def _copies(batch: int, length: int, heads: int, world_size: int) -> Iterator[ProductionCopy]:
    where = f"B={batch} s={length} H={heads} P={world_size}"

    def messages(name: str, view: Tensor, *, sent: bool) -> ProductionCopy:
        wire = torch.empty(view.shape, dtype=view.dtype, device="meta")
        return ProductionCopy(f"{name}: {where}", *((wire, view) if sent else (view, wire)))

    whole, part = length * world_size, heads // world_size
    for layout, x in inputs(batch, length, heads):
        yield messages(f"scatter heads, {layout}", message_view(x, 2, world_size, 1), sent=True)
        yield messages(
            f"reduce_scatter dim -1, {layout}", message_view(x, -1, world_size, 0), sent=True
        )
    for layout, x in inputs(batch, whole, part):
        if layout != "contiguous":
            yield messages(
                f"scatter sequence, {layout}", message_view(x, 1, world_size, 1), sent=True
            )
    out = _empty(batch, length, heads, HEAD_DIM)
    yield messages("gather heads", message_view(out, 2, world_size, 1), sent=False)
    out = _empty(batch, length, heads, HEAD_DIM * world_size)
    yield messages("all_gather dim -1", message_view(out, -1, world_size, 0), sent=False)
    out = _empty(batch, whole, heads, HEAD_DIM)
    yield messages("all_gather sequence", message_view(out, 1, world_size, 0), sent=False)
    qkv = _empty(batch, length, 3 * heads * HEAD_DIM)
    yield messages("split qkv", message_view(qkv, -1, 3, 0), sent=True)


def inputs(batch: int, length: int, heads: int) -> Iterator[tuple[str, Tensor]]:
    """`[B, s, H, D]` in the strides in which models have it."""
    yield "contiguous", _empty(batch, length, heads, HEAD_DIM)
    chunk = _empty(batch, length, 3 * heads * HEAD_DIM).chunk(3, dim=-1)[1]
    yield "chunk of qkv", chunk.unflatten(-1, (heads, HEAD_DIM))
    yield "transposed", _empty(batch, heads, length, HEAD_DIM).transpose(1, 2)


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")
