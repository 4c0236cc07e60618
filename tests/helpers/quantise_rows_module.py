"""The module of the kernels of fp8 rows, interpreted or compiled, and tensors for them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from tile_copy_module import imported_anew, imported_tile_copy
from torch import Tensor

from fastvideo_comm.collective.layout import message_view
from fastvideo_comm.collective.quantised import _planes

NAME = "fastvideo_comm.kernels.quantise_rows"


@contextlib.contextmanager
def imported_quantise_rows(*, interpret: bool) -> Iterator[ModuleType]:
    """The module while `quantise_` uses it, imported anew and forgotten afterwards."""
    with imported_tile_copy(interpret=interpret), imported_anew(NAME) as module:
        yield module


class Rows(NamedTuple):
    """Tensors of one launch."""

    payload: Tensor
    scales: Tensor
    wide: Tensor  # what is quantised, or written by `dequantise_`
    seeds: Tensor


def packed(
    batch: int, sequence: int, heads: int, width: int, dtype: torch.dtype, format_: torch.dtype
) -> Rows:
    """The rows of an exchange of heads between two ranks, and the messages that hold them."""
    wide = message_view(torch.zeros(batch, sequence, heads, width, dtype=dtype), 2, 2, 0)
    num_rows = batch * sequence * heads // 2
    stride = -(-num_rows * (width + 4) // 16) * 16
    messages = torch.zeros(1, 2, 1, stride, dtype=torch.uint8)
    seeds = torch.arange(2 * num_rows, dtype=torch.int32).view(batch, sequence, heads, 1)
    return Rows(*_planes(messages, wide.shape, format_), wide, message_view(seeds, 2, 2, 0))
