"""Which calls `warmup` makes: those that a training step makes with the same shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import Ranks

from fastvideo_comm import DeviceCommunicatorBase


class Recording(DeviceCommunicatorBase):
    """Keeps the sizes that every exchange is given, and the heads that come back."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.calls: set[tuple[Any, Any]] = set()
        self.heads: set[int] = set()

    def all_to_all_4D(self, input_: Any, *arguments: Any, **named: Any) -> Any:
        sizes = named.get("scatter_sizes"), named.get("gather_sizes")
        self.calls.add(tuple(map(str, sizes)))
        return super().all_to_all_4D(input_, *arguments, **named)


def calls_for(communicator: DeviceCommunicatorBase, heads: tuple[int, ...] | int) -> list[Any]:
    recording = Recording(communicator.cpu_group, unique_name="warm")
    packed = isinstance(heads, tuple)
    shapes = [(1, 3, each, 4) for each in (heads if packed else [heads])]
    recording.warmup([shapes if packed else shapes[0]], [torch.float32])
    recording.destroy()
    return sorted(recording.calls)


EVEN = [("None", "None")]
AUTO = [("None", "auto"), ("auto", "None")]


@pytest.mark.parametrize(
    ("heads", "calls"),
    [
        (4, EVEN),
        ((4, 4, 4), EVEN),
        ((8, 2, 2), EVEN),  # scarce key heads, which the ranks divide: no sizes are given
        ((4, 1), EVEN),
        (2, AUTO),  # alone, scarce heads are shared unevenly
        (6, AUTO),
        ((6, 2), AUTO),
        ((12, 3, 3), AUTO),
        ((5, 3), [("None", "auto"), ("[[2, 1, 1, 1], [1, 1, 1, 0]]", "None")]),
    ],
)
def test_it_gives_sizes_only_where_a_step_needs_them(ranks: Ranks, heads, calls):
    assert ranks.run(4, calls_for, heads) == [calls] * 4
