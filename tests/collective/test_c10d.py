"""What c10d is asked for, on backends that this machine lacks too."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastvideo_comm.collective.c10d import C10d, Transfer


class Backend:
    """The process group of rank 1 of 4 of some backend; writes down what it is asked for."""

    def __init__(self, name: str = "gloo", *, coalesces: bool = False) -> None:
        self.log: list[Any] = []
        self._backend = SimpleNamespace(supports_coalescing=coalesces, name=lambda: name)

    def rank(self) -> int:
        return 1

    def size(self) -> int:
        return 4

    def _get_backend(self, device: torch.device) -> SimpleNamespace:
        return self._backend

    def _start_coalescing(self, device: torch.device) -> None:
        self.log.append("start")

    def _end_coalescing(self, device: torch.device) -> SimpleNamespace:
        self.log.append("end")
        return self._work("group")

    def _work(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(wait=lambda: self.log.append(f"wait {name}"))

    def alltoall_base(self, output: Tensor, input_: Tensor, *rest: Any) -> SimpleNamespace:
        *counts, options = rest
        self.log.append(("alltoall", options.asyncOp, *counts))
        return self._work("exchange")

    def allreduce(self, tensors: list[Tensor], options: Any) -> SimpleNamespace:
        is_average = options.reduceOp == dist.ReduceOp.AVG
        self.log.append("average" if is_average else str(options.reduceOp))
        tensors[0].fill_(12)
        return self._work("sum")

    def barrier(self, options: Any) -> SimpleNamespace:
        self.log.append(options.device)
        return self._work("barrier")


def c10d_of(backend: Any) -> C10d:
    return C10d(backend, "sp")


@pytest.mark.parametrize(("name", "result"), [("nccl", 12.0), ("gloo", 3.0), ("ucc", 3.0)])
def test_an_average_is_a_sum_and_a_division_where_the_backend_has_none(name, result):
    backend = Backend(name)
    x = torch.ones(2)
    c10d_of(backend).all_reduce(x, dist.ReduceOp.AVG)
    assert x.tolist() == [result] * 2
    assert ("average" in backend.log) == (name == "nccl")
    c10d_of(backend).all_reduce(x, dist.ReduceOp.SUM)
    assert x.tolist() == [12.0] * 2
    assert backend.log[-1] == "wait sum"


@pytest.mark.parametrize("device", ["cpu", "cuda:3"])
def test_a_barrier_of_gpus_is_on_the_device_of_this_rank(device):
    """NCCL guesses one from the rank otherwise, which may be another rank's."""
    backend = Backend()
    c10d_of(backend).barrier(torch.device(device))
    expected = None if device == "cpu" else torch.device(device)
    assert backend.log == [expected, "wait barrier"]


def transfers(count: int) -> list[Transfer]:
    return [Transfer(torch.empty(8), torch.empty(8), [], []) for _ in range(count)]


EXCHANGE = ("alltoall", True, [], [])


@pytest.mark.parametrize(
    ("coalesces", "count", "async_op", "started"),
    [
        (False, 1, False, [("alltoall", False, [], [])]),
        (False, 1, True, [EXCHANGE]),
        (False, 3, False, [EXCHANGE] * 3),  # at the same time
        (True, 1, False, [("alltoall", False, [], [])]),
        (True, 3, False, ["start", *[EXCHANGE] * 3, "end"]),  # as one call
        (True, 3, True, ["start", *[EXCHANGE] * 3, "end"]),
    ],
)
def test_several_transfers_travel_at_the_same_time(coalesces, count, async_op, started):
    backend = Backend(coalesces=coalesces)
    c10d = c10d_of(backend)
    works = c10d.all_to_all(transfers(count), async_op=async_op)
    assert backend.log == started
    c10d.wait("all_to_all", works)
    waits = ["wait group"] if "start" in started else ["wait exchange"] * count
    assert backend.log == [*started, *waits]


@pytest.mark.parametrize(
    ("dtype", "each"), [(torch.float32, 1), (torch.complex64, 2), (torch.int16, 2)]
)
def test_the_counts_are_of_the_elements_that_travel(dtype, each):
    backend = Backend()
    x = torch.zeros(10, dtype=dtype)
    transfer = Transfer(torch.zeros(6, dtype=dtype), x, [1, 2, 3, 0], [4, 3, 2, 1])
    c10d_of(backend).all_to_all([transfer], async_op=True)
    counts = [[count * each for count in counts] for counts in transfer[2:]]
    assert backend.log == [("alltoall", True, *counts)]


@pytest.mark.parametrize(
    ("op", "call"),
    [
        ("all_reduce", lambda c, x: c.all_reduce(x, dist.ReduceOp.SUM)),
        ("all_reduce", lambda c, x: c.wait("all_reduce", c.start_sum(x))),
        ("barrier", lambda c, x: c.barrier(x.device)),
        ("all_to_all", lambda c, x: c.all_to_all_one(x, x)),
    ],
)
def test_a_work_that_fails_when_it_is_waited_for_names_the_op(
    op: str, call: Callable[[C10d, Tensor], None], monkeypatch
):
    def broken() -> None:
        raise RuntimeError("connection closed by peer")

    backend = Backend()
    monkeypatch.setattr(backend, "_work", lambda name: SimpleNamespace(wait=broken))
    text = rf"{op} on rank 1 of 4 in group 'sp' failed: connection closed by peer"
    with pytest.raises(RuntimeError, match=text):
        call(c10d_of(backend), torch.empty(4))
