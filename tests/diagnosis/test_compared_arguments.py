"""Every argument that the ranks must have in common: where one rank differs, all ranks hear it."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.distributed as dist
from op_table import OPS
from ranks import Ranks

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.diagnosis import MismatchError

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# What rank 0 gives and what rank 1 gives. An argument that cannot differ alone brings others along.
DIFFERENT: dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]] = {
    ("all_to_all_4D", "scatter_dim"): ({}, {"scatter_dim": 1, "gather_dim": 2}),
    ("all_to_all_4D", "gather_dim"): ({"gather_dim": 2, "scatter_dim": 1}, {}),
    ("all_to_all_4D", "scatter_sizes"): ({"scatter_sizes": [2, 4]}, {"scatter_sizes": [4, 2]}),
    ("all_to_all_4D", "gather_sizes"): ({"gather_sizes": [6, 3]}, {"gather_sizes": [3, 6]}),
    ("all_to_all_4D", "wire_dtype"): ({"wire_dtype": E4M3}, {"wire_dtype": E5M2}),
    ("all_to_all_4D", "grad_wire_dtype"): ({"grad_wire_dtype": E4M3}, {"grad_wire_dtype": E5M2}),
    ("all_to_all_4D", "async_op"): ({"async_op": True}, {}),
    ("all_gather", "dim"): ({"dim": 1}, {"dim": 2}),
    ("all_gather", "grad"): ({"grad": "slice"}, {}),
    ("all_gather", "gather_sizes"): ({"gather_sizes": [16, 3]}, {"gather_sizes": [3, 16]}),
    ("all_reduce", "op"): ({"op": dist.ReduceOp.MAX}, {"op": dist.ReduceOp.MIN}),
    ("all_reduce", "grad"): ({"grad": "identity"}, {}),
    ("reduce_scatter", "dim"): ({"dim": 1}, {"dim": 2}),
    ("reduce_scatter", "scatter_sizes"): ({"scatter_sizes": [4, 12]}, {"scatter_sizes": [12, 4]}),
    ("broadcast", "src"): ({"src": 0}, {"src": 1}),
    ("reduce_gradients", "average"): ({"average": True}, {}),
    ("slice", "dim"): ({"dim": 1}, {"dim": 2}),
    ("slice", "scale_grad"): ({"scale_grad": True}, {}),
    ("slice", "scatter_sizes"): ({"scatter_sizes": [4, 12]}, {"scatter_sizes": [12, 4]}),
    ("gather", "dst"): ({"dst": 0}, {"dst": 1}),
    ("gather", "dim"): ({"dim": 1}, {"dim": 2}),
}
# How a rank rounds, and with which generator, is its own affair.
OWN = {("all_to_all_4D", "rounding"), ("all_to_all_4D", "generator")}


def differing(communicator: DeviceCommunicatorBase, op: str, argument: str) -> None:
    x = torch.zeros(2, 6, 6, 16, requires_grad=True)
    for memory in ("on", "off"):
        checked = DeviceCommunicatorBase(communicator.cpu_group, validate="always", memory=memory)
        with pytest.raises(MismatchError, match=f"{op} on rank {communicator.rank} of 2"):
            getattr(checked, op)(x, **DIFFERENT[op, argument][communicator.rank])
        assert checked.all_reduce(torch.ones(1)).item() == 2, "still usable"
        checked.destroy()


@pytest.mark.parametrize(("op", "argument"), DIFFERENT)
def test_an_argument_that_differs_is_an_error_on_all_ranks(ranks: Ranks, op: str, argument: str):
    ranks.run(2, differing, op, argument, ways=["messages"])


def test_every_argument_of_every_op_is_in_the_table():
    arguments = {
        (op, argument)
        for op in OPS
        if op not in ("send", "recv")  # what makes them a pair
        for argument in list(inspect.signature(getattr(DeviceCommunicatorBase, op)).parameters)[2:]
    }
    assert arguments == {*DIFFERENT} | OWN
