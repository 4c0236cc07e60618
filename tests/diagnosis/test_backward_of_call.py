"""Two calls of one op that ask for the same: their gradients are never traded for each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import Tensor
from torch.func import jvp

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.errors import MismatchError

MAX = dist.ReduceOp.MAX
Call = Callable[[DeviceCommunicatorBase, Tensor], Tensor]
CALLS: dict[str, Call] = {
    "all_to_all_4D": lambda c, x: c.all_to_all_4D(x),
    "all_to_all_4D packed": lambda c, x: c.all_to_all_4D((x, x))[1],
    "all_to_all_4D asynchronous": lambda c, x: c.all_to_all_4D(x, async_op=True).wait(),
    "all_to_all_4D of values": lambda c, x: jvp(c.all_to_all_4D, (x,), (x.detach(),))[0],
    "all_to_all_4D of tangents": lambda c, x: jvp(c.all_to_all_4D, (x.detach(),), (x,))[1],
    "all_to_all_4D asynchronous values": lambda c, x: jvp(
        lambda x: c.all_to_all_4D(x, async_op=True).wait(), (x,), (x.detach(),)
    )[0],
    "all_gather": lambda c, x: c.all_gather(x),
    "all_reduce": lambda c, x: c.all_reduce(x),
    "all_reduce of one loss": lambda c, x: c.all_reduce(x, MAX, grad="identity"),
    "reduce_scatter": lambda c, x: c.reduce_scatter(x, 2),
    "broadcast": lambda c, x: c.broadcast(x),
    "slice": lambda c, x: c.slice(x, 2),
}


def traded(communicator: DeviceCommunicatorBase, name: str) -> None:
    x = torch.rand(1, 2, 4, 3, requires_grad=True)
    for memory in ("off", "on"):
        own = DeviceCommunicatorBase(communicator.cpu_group, validate="always", memory=memory)
        outputs = [CALLS[name](own, x) for _ in range(2)]
        with pytest.raises(MismatchError, match=rf"{name.split()[0]} backward(.|\n)*of call"):
            outputs[own.rank].sum().backward()
        assert own.all_reduce(torch.ones(1)).item() == 2, "still usable"
        own.destroy()


@pytest.mark.parametrize("name", CALLS)
def test_a_backward_says_of_which_call_it_is(ranks: Ranks, name: str):
    ranks.run(2, traded, name, ways=("messages",))
