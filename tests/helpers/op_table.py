"""The public ops of a communicator: what each is called, how tests call it, what its gradient is.

The one table of ops for tests, docs and warm-up. An op is a method of `DeviceCommunicatorBase` that
the ranks call together; a new one is a line of `OPS` and at least a line of `CALLS`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastvideo_comm import DeviceCommunicatorBase, functions
from fastvideo_comm.recording import run

# Every op and its page in docs/ops.
OPS: dict[str, str] = {
    "all_to_all_4D": "all_to_all_4d.md",
    "all_gather": "all_gather.md",
    "all_reduce": "all_reduce.md",
    "reduce_scatter": "reduce_scatter.md",
    "broadcast": "broadcast.md",
    "slice": "slice.md",
    "gather": "gather.md",
    "send": "send_recv.md",
    "recv": "send_recv.md",
    "barrier": "broadcast.md",
    "reduce_gradients": "reduce_gradients.md",
}
WITHOUT_GRADIENT = {"gather", "send", "recv", "barrier", "reduce_gradients"}
# The other public methods, which are about the communicator itself.
NOT_OPS = {"from_group", "from_mesh", "warmup", "stats", "memory_stats", "record_stream", "destroy"}

Call = Callable[[DeviceCommunicatorBase, Tensor], Tensor]


class OpCall(NamedTuple):
    """One way to call an op.

    Attributes:
        call: takes a communicator and this rank's tensor.
        tensor: "any": `[B, n*P, m*P, D]` of any sizes from 1 on; "large": `SHAPE`, for up to 4
            ranks; "uneven": `[b, 3, c]`, for 3 ranks.
        gradient: "sum": that of the sum over ranks of each rank's loss; "whole": all ranks hold one
            tensor, and each gets the whole gradient or its part.
    """

    call: Call
    tensor: Literal["any", "large", "uneven"]
    gradient: Literal["sum", "whole"]


SHAPE = (2, 12, 12, 4)
SIZES = (2, 0, 3)  # of the "uneven" ones


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


def _padded(part: Tensor) -> Tensor:
    """One shape on every rank, of parts of `SIZES`."""
    return torch.nn.functional.pad(part, (0, 0, 0, max(SIZES) - part.shape[1]))


def _last(communicator: DeviceCommunicatorBase) -> int:
    return communicator.world_size - 1


def _reduced(communicator: DeviceCommunicatorBase, x: Tensor) -> Tensor:
    """The gradient of `broadcast`, which is no op itself."""
    group = communicator._runner.group
    taken = group.process_group if torch.compiler.is_compiling() else group
    reduced: Tensor = run(functions.Reduce, taken, x, _last(communicator))
    return reduced


# By a name that begins with the op's.
CALLS: dict[str, OpCall] = {
    "all_to_all_4D heads": OpCall(lambda c, x: c.all_to_all_4D(x), "any", "sum"),
    "all_to_all_4D sequence": OpCall(lambda c, x: c.all_to_all_4D(x, 1, 2), "any", "sum"),
    "all_to_all_4D strided": OpCall(
        lambda c, x: c.all_to_all_4D(x.transpose(1, 2), 1, 2), "large", "sum"
    ),
    "all_to_all_4D batch of one": OpCall(
        lambda c, x: c.all_to_all_4D(x[:1].mT.contiguous().mT), "large", "sum"
    ),
    "all_to_all_4D back, one": OpCall(lambda c, x: c.all_to_all_4D(x[:1], 1, 2), "large", "sum"),
    "all_to_all_4D packed": OpCall(lambda c, x: c.all_to_all_4D((x, x.half()))[1], "large", "sum"),
    "all_to_all_4D grouped": OpCall(
        lambda c, x: c.all_to_all_4D((x, x[:, :, :1]))[1], "large", "sum"
    ),
    "all_to_all_4D asynchronous": OpCall(
        lambda c, x: c.all_to_all_4D(x, async_op=True).wait(), "large", "sum"
    ),
    "all_to_all_4D uneven": OpCall(
        lambda c, x: c.all_to_all_4D(_mine(c, x), scatter_sizes=_heads(c), gather_sizes=_rows(c)),
        "large",
        "sum",
    ),
    "all_to_all_4D uneven back": OpCall(
        lambda c, x: c.all_to_all_4D(_part(c, x), 1, 2, gather_sizes=_heads(c)), "large", "sum"
    ),
    "all_gather": OpCall(lambda c, x: c.all_gather(x), "any", "sum"),
    "all_gather first": OpCall(lambda c, x: c.all_gather(x, 0), "any", "sum"),
    "all_gather middle": OpCall(lambda c, x: c.all_gather(x, 2), "any", "sum"),
    "all_gather uneven": OpCall(
        lambda c, x: c.all_gather(_mine(c, x, 2), 2, gather_sizes=_rows(c)), "large", "sum"
    ),
    "all_gather of sizes": OpCall(
        lambda c, x: c.all_gather(x[:, : SIZES[c.rank]] ** 2, 1, gather_sizes=SIZES),
        "uneven",
        "sum",
    ),
    "all_gather first, auto": OpCall(
        lambda c, x: c.all_gather(x[0, : SIZES[c.rank]], 0, gather_sizes="auto"), "uneven", "sum"
    ),
    "all_gather slice": OpCall(lambda c, x: c.all_gather(x, 1, grad="slice"), "any", "whole"),
    "all_reduce sum": OpCall(lambda c, x: c.all_reduce(x), "any", "sum"),
    "all_reduce avg": OpCall(lambda c, x: c.all_reduce(x, dist.ReduceOp.AVG), "any", "sum"),
    "all_reduce product": OpCall(lambda c, x: c.all_reduce(x, dist.ReduceOp.PRODUCT), "any", "sum"),
    "all_reduce max": OpCall(lambda c, x: c.all_reduce(x, dist.ReduceOp.MAX), "any", "sum"),
    "all_reduce min": OpCall(lambda c, x: c.all_reduce(x, dist.ReduceOp.MIN), "any", "sum"),
    "all_reduce identity": OpCall(lambda c, x: c.all_reduce(x, grad="identity"), "any", "whole"),
    "reduce_scatter": OpCall(lambda c, x: c.reduce_scatter(x, 1), "any", "sum"),
    "reduce_scatter of sizes": OpCall(
        lambda c, x: _padded(
            c.reduce_scatter(torch.cat((x, x.sin()), 1)[:, :5], 1, scatter_sizes=SIZES)
        ),
        "uneven",
        "sum",
    ),
    "reduce_scatter uneven": OpCall(
        lambda c, x: c.reduce_scatter(x, 2, scatter_sizes=_heads(c)), "large", "sum"
    ),
    "broadcast": OpCall(lambda c, x: c.broadcast(x, _last(c)), "any", "sum"),
    "broadcast's gradient": OpCall(_reduced, "any", "sum"),
    "slice": OpCall(lambda c, x: c.slice(x, 1, scale_grad=True), "any", "whole"),
    "slice uneven": OpCall(lambda c, x: c.slice(x, 2, scatter_sizes=_heads(c)), "large", "whole"),
}


def calls_of(*tensors: str, gradient: str = "") -> dict[str, Call]:
    """The calls that take one of such tensors, and have such a gradient if one is given."""
    return {
        name: each.call
        for name, each in CALLS.items()
        if each.tensor in tensors and gradient in ("", each.gradient)
    }


# What takes a tensor of `SHAPE`.
OF_SHAPE = calls_of("any", "large")
