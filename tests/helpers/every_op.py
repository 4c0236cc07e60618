"""Every differentiable op of a communicator in every variant, of one `[2, 12, 12, 4]` a rank."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch.distributed as dist
from torch import Tensor

from fastvideo_comm import DeviceCommunicatorBase

SHAPE = (2, 12, 12, 4)
Op = Callable[[DeviceCommunicatorBase, Tensor], Tensor]


def _heads(communicator: DeviceCommunicatorBase) -> list[int]:
    """Parts of 12, one of them of size 0 where there are three and more."""
    return {1: [12], 2: [3, 9], 3: [3, 0, 9], 4: [3, 0, 4, 5]}[communicator.world_size]


def _rows(communicator: DeviceCommunicatorBase) -> list[int]:
    """What each rank has of a dim."""
    return [5, 8, 0, 2][: communicator.world_size]


def _mine(communicator: DeviceCommunicatorBase, x: Tensor, dim: int = 1) -> Tensor:
    """As much of `x` as `_rows` gives this rank."""
    return x.narrow(dim, 0, _rows(communicator)[communicator.rank])


def _part(communicator: DeviceCommunicatorBase, x: Tensor) -> Tensor:
    """This rank's of `_heads`, from where it begins."""
    sizes = _heads(communicator)
    begin = [0, *accumulate(sizes)][communicator.rank]
    return x.narrow(2, begin, sizes[communicator.rank])


OPS: dict[str, Op] = {
    "all_to_all_4D heads": lambda c, x: c.all_to_all_4D(x),
    "all_to_all_4D sequence": lambda c, x: c.all_to_all_4D(x, 1, 2),
    "all_to_all_4D strided": lambda c, x: c.all_to_all_4D(x.transpose(1, 2), 1, 2),
    "all_to_all_4D batch of one": lambda c, x: c.all_to_all_4D(x[:1].mT.contiguous().mT),
    "all_to_all_4D back, one": lambda c, x: c.all_to_all_4D(x[:1], 1, 2),
    "all_to_all_4D packed": lambda c, x: c.all_to_all_4D((x, x.half()))[1],
    "all_to_all_4D grouped": lambda c, x: c.all_to_all_4D((x, x[:, :, :1]))[1],
    "all_to_all_4D asynchronous": lambda c, x: c.all_to_all_4D(x, async_op=True).wait(),
    "all_to_all_4D uneven": lambda c, x: c.all_to_all_4D(
        _mine(c, x), scatter_sizes=_heads(c), gather_sizes=_rows(c)
    ),
    "all_to_all_4D uneven back": lambda c, x: c.all_to_all_4D(
        _part(c, x), 1, 2, gather_sizes=_heads(c)
    ),
    "all_gather": lambda c, x: c.all_gather(x),
    "all_gather first": lambda c, x: c.all_gather(x, 0),
    "all_gather uneven": lambda c, x: c.all_gather(_mine(c, x, 2), 2, gather_sizes=_rows(c)),
    "all_gather slice": lambda c, x: c.all_gather(x, 1, grad="slice"),
    "slice": lambda c, x: c.slice(x, 1, scale_grad=True),
    "slice uneven": lambda c, x: c.slice(x, 2, scatter_sizes=_heads(c)),
    "all_reduce sum": lambda c, x: c.all_reduce(x),
    "all_reduce avg": lambda c, x: c.all_reduce(x, dist.ReduceOp.AVG),
    "all_reduce max": lambda c, x: c.all_reduce(x, dist.ReduceOp.MAX),
    "all_reduce product": lambda c, x: c.all_reduce(x, dist.ReduceOp.PRODUCT),
    "all_reduce identity": lambda c, x: c.all_reduce(x, grad="identity"),
}
