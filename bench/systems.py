"""The systems of a whole-call benchmark on one process group: this library, the peers, the bounds.

`bare exchange` is `all_to_all_single` of a contiguous tensor into a fresh one, `contiguous copy`
one copy of the same bytes into memory that was touched before, and `floor` both. None gives the
right layout. They bound what goes through the group; ranks of one host that share memory, as this
library's do on the CPU, go beneath. `fastvideo_comm, sockets` is this library without that, as
between hosts.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from harness import num_input_sets
from local_group import LocalGroup
from peers import Bound, FirstOfThree, one_call_each
from torch import Tensor

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.collective.route import MEMORY_VARIABLE

SOCKETS = "fastvideo_comm, sockets"
OURS, FLOOR, EXCHANGE, COPY = "fastvideo_comm", "floor", "bare exchange", "contiguous copy"
BOUNDS = (FLOOR, EXCHANGE, COPY)


def ours(group: dist.ProcessGroup, device: torch.device) -> dict[str, Bound]:
    """This library, on the CPU with shared memory and without."""
    if isinstance(group, LocalGroup):  # one process, which plays all ranks
        return {OURS: _bound(sockets_only(group, device))}
    bound = {OURS: _bound(DeviceCommunicatorBase(group, device, group, "bench"))}
    return bound | ({SOCKETS: _bound(sockets_only(group, device))} if device.type == "cpu" else {})


def sockets_only(group: dist.ProcessGroup, device: torch.device) -> DeviceCommunicatorBase:
    """A communicator whose ranks share no memory, as between hosts."""
    os.environ[MEMORY_VARIABLE] = "off"
    try:
        return DeviceCommunicatorBase(group, device, group, "bench")
    finally:
        del os.environ[MEMORY_VARIABLE]


def _bound(communicator: DeviceCommunicatorBase) -> Bound:
    """Around an attention, q, k and v are one exchange, without a `cat` before it."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = FirstOfThree.apply(*communicator.all_to_all_4D((q, k, v), 2, 1))
        return communicator.all_to_all_4D(output, 1, 2)

    return Bound(communicator.all_to_all_4D, attention)


def bounds(group: dist.ProcessGroup) -> dict[str, Bound]:
    """The three bounds; their backward is the same once more."""
    wires: dict[tuple[torch.Size, torch.dtype, int], Tensor] = {}
    num_copies = 0

    def copy(x: Tensor, wire: int = 0) -> Tensor:
        key = (x.shape, x.dtype, wire)
        if key not in wires:
            wires[key] = torch.empty_like(x, memory_format=torch.contiguous_format)
        return wires[key].copy_(x).detach()  # each call's result has its own history

    def copy_to_memory(x: Tensor) -> Tensor:
        """Not into a GPU's cache, where one wire that nobody reads would stay."""
        nonlocal num_copies
        num_copies += 1
        on_gpu = x.device.type == "cuda"
        return copy(x, num_copies % num_input_sets(x.nbytes, x.device) if on_gpu else 0)

    def exchange(x: Tensor) -> Tensor:
        output = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(output, x, group=group)
        return output

    return {
        FLOOR: _moving(lambda x: exchange(copy(x)), group.size()),
        EXCHANGE: _moving(exchange, group.size()),
        COPY: _moving(copy_to_memory, group.size()),
    }


def _moving(move: Callable[[Tensor], Tensor], size: int) -> Bound:
    """`move` with the shapes and the gradient of an exchange."""

    class Move(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            del ctx
            return move(x)

        @staticmethod
        def backward(ctx: object, *grads: Tensor) -> Tensor:
            del ctx
            return move(grads[0])

    def all_to_all(x: Tensor, scatter_dim: int, gather_dim: int) -> Tensor:
        shape = list(x.shape)
        shape[scatter_dim] //= size
        shape[gather_dim] *= size
        return Move.apply(x).view(shape)

    return Bound(all_to_all, one_call_each(all_to_all))


def reference(x: Tensor, scatter_dim: int, gather_dim: int, group: dist.ProcessGroup) -> Tensor:
    """What an exchange must return: every rank's messages for this rank along `gather_dim`."""
    size = group.size()
    if isinstance(group, LocalGroup):
        messages = x.chunk(size, scatter_dim)
    else:
        everything = [torch.empty_like(x) for _ in range(size)]
        dist.all_gather(everything, x.contiguous(), group=group)
        messages = [y.chunk(size, scatter_dim)[group.rank()] for y in everything]
    return torch.cat(messages, gather_dim)
