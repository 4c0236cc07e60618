"""Exchanges of tensors that are special: lazy values, no elements, heads that ranks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_threads import ThreadGroup, run_ranks
from torch import Tensor

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.collective.group import MemoryMode

Call = Callable[[DeviceCommunicatorBase, Tensor], Any]


def received_by_the_next(c: DeviceCommunicatorBase, x: Tensor) -> Tensor:
    if c.rank:
        return c.recv(x.shape, x.dtype, 0)
    c.send(x, 1)
    return x


CALLS: dict[str, Call] = {
    "heads": lambda c, x: c.all_to_all_4D(x),
    "sequence": lambda c, x: c.all_to_all_4D(x, 1, 2),
    "two tensors": lambda c, x: c.all_to_all_4D((x, x), 1, 2)[1],
    "asynchronous": lambda c, x: c.all_to_all_4D(x, 1, 2, async_op=True).wait(),
    "all_gather": lambda c, x: c.all_gather(x, 0),
    "reduce_scatter": lambda c, x: c.reduce_scatter(x, 1),
    "all_reduce": lambda c, x: c.all_reduce(x),
    "broadcast": lambda c, x: c.broadcast(x, 1),
    "gather": lambda c, x: c.gather(x, 0, 0),
    "send": received_by_the_next,
}


def send_memory(patch: pytest.MonkeyPatch) -> None:
    """A backend sends the memory of a tensor; the threads copy its values, which are the same."""

    def checked(brings: Tensor) -> Tensor:
        is_lazy = brings.is_neg() or brings.is_conj()
        assert not is_lazy, "its memory does not hold its values"
        return brings

    exchange = ThreadGroup._exchange

    def sent(group: ThreadGroup, brings: Any, receive: Any) -> None:
        for each in [brings] if isinstance(brings, Tensor) else brings or ():
            checked(each)
        exchange(group, brings, receive)

    send = ThreadGroup.send
    patch.setattr(ThreadGroup, "_exchange", sent)
    patch.setattr(
        *(ThreadGroup, "send"),
        lambda group, tensors, *rest: send(group, [checked(each) for each in tensors], *rest),
    )


@pytest.mark.parametrize("memory", ["off", "on"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("lazily", ["conjugated", "negated"])
def test_what_travels_are_the_values(monkeypatch, memory: MemoryMode, batch: int, lazily: str):
    """Contiguous ones, which may travel as they are."""

    def job(group: dist.ProcessGroup) -> None:
        communicator = DeviceCommunicatorBase(group, unique_name="lazy", memory=memory)
        generator = torch.Generator().manual_seed(group.rank())
        x = torch.randint(1, 9, (batch, 4, 2, 3, 2), generator=generator).double()
        number = torch.view_as_complex(x)
        lazy = number.conj() if lazily == "conjugated" else torch._neg_view(x[..., 0].contiguous())
        resolved = lazy.resolve_conj().resolve_neg()
        assert lazy.is_contiguous()
        for name, call in CALLS.items():
            got, expected = call(communicator, lazy), call(communicator, resolved)
            assert (got is None) == (expected is None), name
            assert got is None or torch.equal(got, expected), name
        communicator.destroy()

    send_memory(monkeypatch)
    run_ranks(2, job)


@pytest.mark.parametrize("memory", ["off", "on"])
def test_gradients_of_one_shape_go_to_as_many_ranks_as_hold_the_head(memory: MemoryMode):
    """2 heads that two ranks each hold, and 4 that one holds: the gradients have one shape."""

    def job(group: dist.ProcessGroup) -> None:
        communicator = DeviceCommunicatorBase(group, unique_name="heads", memory=memory)
        query = torch.zeros(1, 2, 4, 1).double()
        for heads in (2, 4, 2):
            key = torch.zeros(1, 2, heads, 1).double().requires_grad_()
            _, there = communicator.all_to_all_4D((query, key))
            there.backward(torch.full_like(there, 10.0 ** group.rank()))
            expected = [11.0, 1100.0] if heads == 2 else [1.0, 10.0, 100.0, 1000.0]
            assert key.grad is not None
            assert key.grad[0, 0, :, 0].tolist() == expected
        communicator.destroy()

    run_ranks(4, job)


@pytest.mark.parametrize("memory", ["off", "on"])
@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.parametrize("shape", [(0, 4, 2, 16), (2, 0, 2, 16), (1, 4, 0, 16)])
def test_what_has_no_elements_travels_rounded_too(memory: MemoryMode, async_op: bool, shape):
    """A rank may have no sequence, and nobody waits for its scales."""

    def job(group: dist.ProcessGroup) -> None:
        communicator = DeviceCommunicatorBase(group, unique_name="nothing", memory=memory)
        x = torch.zeros(shape, requires_grad=True)
        y = communicator.all_to_all_4D(
            (x, torch.ones(1, 4, 2, 16)), 1, 2, wire_dtype=torch.float8_e4m3fn, async_op=async_op
        )
        y, ones = y.wait() if async_op else y
        batch, sequence, heads, _ = shape
        assert y.shape == (batch, sequence // 2, heads * 2, 16)
        assert torch.equal(ones, torch.ones(1, 2, 4, 16))
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == shape
        communicator.destroy()

    run_ranks(2, job)
