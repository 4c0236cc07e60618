"""The systems of a whole-call benchmark on one process group: this library, the peers, the bounds.

`bare exchange` is `all_to_all_single` of a contiguous tensor into a fresh one, `contiguous copy`
one copy of the same bytes into memory that was touched before, and `copy and exchange` both: none
gives the right layout. `floor` is what nobody can go below: between ranks of one host on the CPU,
which can write into each other's memory, one copy of the bytes; elsewhere copy and exchange.
`fastvideo_comm, sockets` is this library by messages, as between hosts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from harness import num_input_sets
from local_group import LocalGroup
from peers import Bound, FirstOfThree, one_call_each
from torch import Tensor

from fastvideo_comm import DeviceCommunicatorBase

SOCKETS = "fastvideo_comm, sockets"
OURS, FLOOR, EXCHANGE, COPY = "fastvideo_comm", "floor", "bare exchange", "contiguous copy"
BOTH = "copy and exchange"
BOUNDS = (FLOOR, BOTH, EXCHANGE, COPY)


def ours(group: dist.ProcessGroup, device: torch.device) -> dict[str, Bound]:
    """This library, on the CPU by memory and by messages."""
    if isinstance(group, LocalGroup):  # one process, which plays all ranks
        return {OURS: _bound(sockets_only(group, device))}
    bound = {OURS: _bound(DeviceCommunicatorBase(group, device, group, "bench"))}
    return bound | ({SOCKETS: _bound(sockets_only(group, device))} if device.type == "cpu" else {})


def sockets_only(group: dist.ProcessGroup, device: torch.device) -> DeviceCommunicatorBase:
    """A communicator whose ranks send messages, as between hosts."""
    return DeviceCommunicatorBase(group, device, group, "bench", memory="off")


def _bound(communicator: DeviceCommunicatorBase) -> Bound:
    """Around an attention, q, k and v are one exchange, without a `cat` before it."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = FirstOfThree.apply(*communicator.all_to_all_4D((q, k, v), 2, 1))
        return communicator.all_to_all_4D(output, 1, 2)

    return Bound(communicator.all_to_all_4D, attention)


def bounds(group: dist.ProcessGroup, device: torch.device) -> dict[str, Bound]:
    """The bounds; their backward is the same once more."""
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
        # Flat: from torch 2.15 on P must divide the first dim.
        dist.all_to_all_single(output.view(-1), x.view(-1), group=group)
        return output

    def copy_and_exchange(x: Tensor) -> Tensor:
        return exchange(copy(x))

    by_memory = device.type == "cpu" and not isinstance(group, LocalGroup)
    return {
        FLOOR: _moving(copy_to_memory if by_memory else copy_and_exchange, group.size()),
        BOTH: _moving(copy_and_exchange, group.size()),
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
