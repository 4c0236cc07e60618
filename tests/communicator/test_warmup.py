"""Which calls `warmup` makes: those that a training step makes with the same shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_table import CALLS, OPS, WITHOUT_GRADIENT
from ranks import Ranks

from fastvideo_comm import DeviceCommunicatorBase


def calls_for(communicator: DeviceCommunicatorBase, heads: tuple[int, ...] | int) -> list[Any]:
    calls: set[tuple[str, ...]] = set()
    exchange = DeviceCommunicatorBase.all_to_all_4D

    def recorded(self: DeviceCommunicatorBase, input_: Any, *arguments: Any, **named: Any) -> Any:
        calls.add((str(named.get("scatter_sizes")), str(named.get("gather_sizes"))))
        return exchange(self, input_, *arguments, **named)

    packed = isinstance(heads, tuple)
    shapes = [(1, 3, each, 4) for each in (heads if packed else [heads])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceCommunicatorBase, "all_to_all_4D", recorded)
        communicator.warmup([shapes if packed else shapes[0]], [torch.float32])
    return sorted(calls)


class OfUpstream(DeviceCommunicatorBase):
    """A subclass with the arguments of upstream, and no others."""

    def __init__(
        self, cpu_group: Any, device: Any = None, device_group: Any = None, unique_name: str = ""
    ) -> None:
        super().__init__(cpu_group, device, device_group, unique_name)

    def all_to_all_4D(self, input_: Any, scatter_dim: int = 2, gather_dim: int = 1) -> Any:
        return super().all_to_all_4D(input_, scatter_dim, gather_dim) * 1


def made_and_warmed(communicator: DeviceCommunicatorBase) -> None:
    made = OfUpstream.from_group(communicator.cpu_group, unique_name="up", validate="always")
    made.warmup([(1, 2, 4, 3), [(1, 2, 4, 3), (1, 2, 1, 3)]], [torch.float32])
    assert type(made) is OfUpstream
    x = torch.rand(1, 2, 4, 3)
    assert torch.equal(made.all_to_all_4D(made.all_to_all_4D(x), 1, 2), x)
    made.destroy()


def test_a_subclass_with_the_arguments_of_upstream_is_made_and_warmed_up(ranks: Ranks):
    ranks.run(2, made_and_warmed)


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


def ops_of_warmup(communicator: DeviceCommunicatorBase) -> set[str]:
    own = DeviceCommunicatorBase(communicator.cpu_group)
    own.warmup([(1, 2, 4, 3)], [torch.float32])
    called = {op for op, each in own.stats().items() if each.calls}
    own.destroy()
    return called


def test_it_runs_every_op_that_has_a_gradient(ranks: Ranks):
    with_gradient = {name.split()[0] for name in CALLS} & set(OPS)
    assert with_gradient == set(OPS) - WITHOUT_GRADIENT
    for called in ranks.run(2, ops_of_warmup):
        assert called >= with_gradient


def of_dtypes(communicator: DeviceCommunicatorBase) -> dict[str, int]:
    own = DeviceCommunicatorBase(communicator.cpu_group)
    own.warmup([(1, 2, 4, 16), [(1, 2, 4, 16), (1, 2, 1, 16)]], [torch.float8_e4m3fn, torch.int32])
    own.warmup(iter([(1, 2, 4, 16), (1, 2, 2, 16)]), iter([torch.float32, torch.bfloat16]))
    calls = own.stats()["all_to_all_4D"].calls
    own.destroy()
    return calls


def test_every_shape_is_exchanged_in_every_dtype_also_in_those_without_a_gradient(ranks: Ranks):
    # There and back, in two layouts, of two shapes in two dtypes, twice.
    assert ranks.run(2, of_dtypes) == [2 * 2 * (2 * 2) * 2] * 2


ONE = (1, 2, 4, 3)
MISTAKES: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "one shape": (ONE, [torch.half], TypeError, r"shapes must be several .*, got 1 for one of"),
    "one dtype": ([ONE], torch.half, TypeError, r"dtypes must be several .*, such as .torch.float"),
    "dims": ([ONE[1:]], [torch.half], ValueError, r"must be 4 sizes .* each, got \(2, 4, 3\)"),
    "negative": ([(1, -2, 4, 3)], [torch.half], ValueError, r"each, got \(1, -2, 4, 3\)"),
    "fraction": ([(1, 2.0, 4, 3)], [torch.half], ValueError, r"each, got \(1, 2.0, 4, 3\)"),
    "second": ([ONE, [ONE, ONE[:3]]], [torch.half], ValueError, r"each, got \(1, 2, 4\)"),
}


def mistaken(communicator: DeviceCommunicatorBase, name: str) -> None:
    shapes, dtypes, kind, words = MISTAKES[name]
    where = f"^warmup on rank {communicator.rank} of 2 in group 'test': "
    with pytest.raises(kind, match=where + f".*{words}"):
        communicator.warmup(shapes, dtypes)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_before_anything_is_sent(ranks: Ranks, name: str):
    ranks.run(2, mistaken, name)
