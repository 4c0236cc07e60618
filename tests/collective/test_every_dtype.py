"""Every dtype on every way, eager and compiled: slices of the global tensor, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import Ranks
from test_collectives import DTYPES, as_bytes

from fastvideo_comm import DeviceCommunicatorBase


def random_bits(shape: list[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bits, NaN and infinity among them; the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    size = [*shape[:-1], shape[-1] * dtype.itemsize]
    return torch.randint(256, size, generator=generator, dtype=torch.uint8).view(dtype)


def there(c: DeviceCommunicatorBase, whole: torch.Tensor) -> Any:
    return [whole.chunk(c.world_size, 1)[c.rank]], [whole.chunk(c.world_size, 2)[c.rank]]


def back(c: DeviceCommunicatorBase, whole: torch.Tensor) -> Any:
    return [whole.chunk(c.world_size, 2)[c.rank]], [whole.chunk(c.world_size, 1)[c.rank]]


def packed(c: DeviceCommunicatorBase, whole: torch.Tensor) -> Any:
    """With a key head that several ranks hold, and a tensor of another dtype."""
    ranks, rank = c.world_size, c.rank
    key, other = whole[:, :, :1], random_bits(list(whole.shape), torch.float32, 2)
    wholes = (whole, key, other)
    by_heads = [whole.chunk(ranks, 2)[rank], key, other.chunk(ranks, 2)[rank]]
    return [each.chunk(ranks, 1)[rank] for each in wholes], by_heads


def gathered(c: DeviceCommunicatorBase, whole: torch.Tensor) -> Any:
    return [whole.chunk(c.world_size, 1)[c.rank]], [whole]


# What each rank brings and gets of a whole tensor, and the call.
WAYS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "there": (there, lambda c, x: [c.all_to_all_4D(x)]),
    "back": (back, lambda c, x: [c.all_to_all_4D(x, 1, 2)]),
    "packed": (packed, lambda c, *xs: list(c.all_to_all_4D(xs))),
    "gather": (gathered, lambda c, x: [c.all_gather(x, 1)]),
}


# One of each kind: a dtype travels as it is, as pairs of numbers, or as so many bytes.
KINDS = [torch.float32, torch.complex64, torch.int16, torch.float8_e4m3fn]


def moved(
    communicator: DeviceCommunicatorBase, way: str, dtypes: list[torch.dtype], compiled: bool
) -> None:
    """All dtypes in one function, so that they are compiled at once."""
    size = [2, 3 * communicator.world_size, 2 * communicator.world_size, 4]
    share, call = WAYS[way]
    inputs, expected = zip(
        *[share(communicator, random_bits(size, dtype, 1)) for dtype in dtypes], strict=True
    )

    def function(inputs: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
        return [call(communicator, *each) for each in inputs]

    if compiled:
        communicator.all_to_all_4D(torch.zeros(size))  # connects memory
        torch._dynamo.reset()
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    wrong = []
    for dtype, *of_dtype in zip(dtypes, function(list(inputs)), expected, strict=True):
        for actual, each in zip(*of_dtype, strict=True):
            assert (actual.shape, actual.dtype) == (each.shape, each.dtype)
            if not torch.equal(as_bytes(actual), as_bytes(each)):
                wrong.append(dtype)
    assert wrong == []


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("way", WAYS)
def test_every_dtype_goes_every_way_bit_for_bit(ranks: Ranks, way, compiled):
    ways = ["messages"] if compiled else ["messages", "memory"]
    ranks.run(2, moved, way, DTYPES, compiled, ways=ways)


# By memory an operator takes tensors of any dtype, and a gather is the one by messages.
@pytest.mark.parametrize("way", ["there", "back", "packed"])
def test_compiled_they_go_by_memory_bit_for_bit(ranks: Ranks, way):
    ranks.run(2, moved, way, KINDS, True, ways=["memory"])


def test_the_table_is_complete():
    assert len(DTYPES) * len(WAYS) * 2 == 112
