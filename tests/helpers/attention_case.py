"""Attention of one process beside `ulysses_attention` of ranks: inputs, losses and gradients.

Numbers are float64, so that a tolerance of 1e-10 separates sums in another order from a mistake.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from test_exchange import sizes_of
from torch import Tensor

# float64 attention over at most a few dozen tokens: sums in another order differ by 1e-15.
TOLERANCE = {"rtol": 1e-10, "atol": 1e-11}


class Case(NamedTuple):
    """One call; the same on every rank."""

    heads: int = 6
    key_heads: int = 6
    batch: int = 1
    sequence: int = 7  # tokens of all ranks, or of each where they are even
    uneven: str = ""  # "list" or "auto"
    joint: int = 0  # text tokens; -1: no joint at all
    pipeline: int = 1
    seed: int = 0
    strides: str = "stepped"

    def rows(self, ranks: int) -> list[int]:
        if not self.uneven:
            return [self.sequence] * ranks
        return sizes_of(self.sequence, ranks, torch.Generator().manual_seed(self.seed))

    def gather_sizes(self, ranks: int) -> list[int] | str | None:
        return self.rows(ranks) if self.uneven == "list" else self.uneven or None

    def tensors(self, ranks: int) -> list[Tensor]:
        """query, key and value of the whole sequence, and of the text."""
        generator = torch.Generator().manual_seed(self.seed)
        lengths = [sum(self.rows(ranks)), *([self.joint] if self.joint >= 0 else [])]
        shapes = [
            (self.batch, length, heads, width)
            for length in lengths
            # The width of value is its own.
            for heads, width in ((self.heads, 4), (self.key_heads, 4), (self.key_heads, 3))
        ]
        return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]

    def weights(self, ranks: int) -> tuple[Tensor, Tensor]:
        """Of the whole output; and of the text's, for the loss of every rank another."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        width = (self.heads, 3)
        shapes = (
            (self.batch, sum(self.rows(ranks)), *width),
            (ranks, self.batch, max(self.joint, 0), *width),
        )
        of_video, of_text = (
            torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes
        )
        return of_video, of_text


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Written apart from the library's: every query head with its key head."""
    key, value = (t.repeat_interleave(query.shape[2] // t.shape[2], 2) for t in (key, value))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[3] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)


def in_one_process(case: Case, ranks: int) -> list[Tensor]:
    """out, joint_out if there is one, and the gradients of the sum over ranks of their losses."""
    leaves = [tensor.requires_grad_() for tensor in case.tensors(ranks)]
    if case.joint < 0:
        outputs = [attend(*leaves)]
    else:
        pairs = zip(leaves[:3], leaves[3:], strict=True)
        both = attend(*(torch.cat(pair, 1) for pair in pairs))
        outputs = list(both.split([both.shape[1] - case.joint, case.joint], 1))
    of_video, of_text = case.weights(ranks)
    loss = (outputs[0] * of_video).sum()
    if case.joint >= 0:
        loss = loss + (outputs[1] * of_text).sum()
    loss.backward()
    return [*[output.detach() for output in outputs], *[leaf.grad for leaf in leaves]]
