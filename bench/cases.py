"""The shapes that are measured: video models, sequence lengths, ranks (DESIGN, section 6)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

HEAD_DIM = 128
# Wan 2.1 1.3B, HunyuanVideo, Wan 2.1 14B.
MODELS = {"wan-1.3b": 12, "hunyuan": 24, "wan-14b": 40}
SEQUENCES = (32_760, 75_600, 118_800)
WORLD_SIZES = (2, 4, 8)


@dataclass(frozen=True)
class Shape:
    """One rank's tensor `[B, s, H, D]` before attention, in a group of P ranks."""

    batch: int
    sequence: int
    heads: int
    world_size: int
    head_dim: int = HEAD_DIM

    @property
    def local(self) -> tuple[int, int, int, int]:
        """`[B, s, H, D]`."""
        return self.batch, self.sequence // self.world_size, self.heads, self.head_dim

    @property
    def exchanged(self) -> tuple[int, int, int, int]:
        """`[B, S, h, D]`."""
        return self.batch, self.sequence, self.heads // self.world_size, self.head_dim

    @property
    def numel(self) -> int:
        """Elements of the tensor, the same before and after."""
        return self.batch * self.sequence // self.world_size * self.heads * self.head_dim

    @property
    def name(self) -> str:
        """For a row's `case`."""
        return "{}x{}x{}x{}".format(*self.local) + f" P={self.world_size}"


def production(*, scale: int = 1, batches: tuple[int, ...] = (1,)) -> Iterator[Shape]:
    """Every model, sequence and group size; S is rounded up to a multiple of P, after `1/scale`."""
    for heads in MODELS.values():
        for sequence in SEQUENCES:
            for world_size in WORLD_SIZES:
                if heads % world_size:
                    continue  # 12 heads do not go into 8 ranks: Wan 1.3B runs on 2 and 4
                rounded = -(-sequence // (scale * world_size)) * world_size
                for batch in batches:
                    yield Shape(batch, rounded, heads, world_size)
