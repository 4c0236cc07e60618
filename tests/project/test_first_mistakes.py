"""What a new user gets wrong first: the error names the argument, its rule and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Ranks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from fastvideo_comm import DeviceCommunicatorBase, ulysses_attention

X = torch.zeros(1, 2, 4, 2)
Call = Callable[[DeviceCommunicatorBase, Any], Any]
OPS: dict[str, Call] = {
    "all_to_all_4D": lambda c, x: c.all_to_all_4D(x),
    "all_gather": lambda c, x: c.all_gather(x, 1),
    "all_reduce": lambda c, x: c.all_reduce(x),
    "reduce_scatter": lambda c, x: c.reduce_scatter(x, 1),
    "broadcast": lambda c, x: c.broadcast(x),
    "slice": lambda c, x: c.slice(x, 1),
    "gather": lambda c, x: c.gather(x, 0, 1),
    "send": lambda c, x: c.send(x, 1 - c.rank),
}


def refused(communicator: DeviceCommunicatorBase, op: str, call: Call, x: Any, text: str) -> None:
    where = f"{op} on rank {communicator.rank} of 2 in group 'test': "
    with pytest.raises(TypeError, match=f"^{re.escape(where)}.*{text}"):
        call(communicator, x)


def dtensors(communicator: DeviceCommunicatorBase) -> None:
    sharded = DTensor.from_local(X, DeviceMesh.from_group(communicator.cpu_group, "cpu"))
    for op, call in OPS.items():
        refused(communicator, op, call, sharded, r" own tensor, got a DTensor: .*to_local\(\)$")


def test_every_op_refuses_a_dtensor_and_says_to_local(ranks: Ranks):
    ranks.run(2, dtensors)


def no_gradient(communicator: DeviceCommunicatorBase) -> None:
    unused = torch.nn.Parameter(torch.ones(2))
    refused(
        communicator,
        "all_reduce",
        lambda c, x: c.all_reduce(x),
        unused.grad,
        "got None; a parameter that the loss does not depend on has no gradient: give zeros",
    )


def test_the_gradient_of_an_unused_parameter_is_named_as_such(ranks: Ranks):
    ranks.run(2, no_gradient)


# sizes, and what the error says of them
NO_SIZES = [
    (torch.tensor([2, 2]), r"{name} must be .*, got Tensor: give its \.tolist\(\)$"),
    (np.array([2, 2]), r"{name} must be .*, got ndarray: give its \.tolist\(\)$"),
    (4, "{name} must be None, 'auto' or a list of ints, got int$"),
    (list(torch.tensor([2, 2])), "every entry of {name} must be an int, got Tensor$"),
    ([2.0, 2.0], "every entry of {name} must be an int, got float$"),
]
TAKE_SIZES: dict[str, tuple[str, Call]] = {
    "all_to_all_4D, scatter": (
        "scatter_sizes",
        lambda c, sizes: c.all_to_all_4D(X, scatter_sizes=sizes),
    ),
    "all_to_all_4D, gather": (
        "gather_sizes",
        lambda c, sizes: c.all_to_all_4D(X, gather_sizes=sizes),
    ),
    "all_gather": ("gather_sizes", lambda c, sizes: c.all_gather(X, 1, gather_sizes=sizes)),
    "slice": ("scatter_sizes", lambda c, sizes: c.slice(X, 2, scatter_sizes=sizes)),
    "reduce_scatter": (
        "scatter_sizes",
        lambda c, sizes: c.reduce_scatter(X, 2, scatter_sizes=sizes),
    ),
}


def no_sizes(communicator: DeviceCommunicatorBase) -> None:
    for key, (name, call) in TAKE_SIZES.items():
        for sizes, text in NO_SIZES:
            op = key.partition(",")[0]
            refused(communicator, op, call, sizes, text.format(name=name))


def test_sizes_that_are_no_list_of_ints_are_named(ranks: Ranks):
    ranks.run(2, no_sizes)


def of_attention(communicator: DeviceCommunicatorBase) -> None:
    place = rf"^ulysses_attention on rank {communicator.rank} of 2 in group 'test': "
    for returned, kind in ((None, "NoneType"), ((X, None), "tuple")):
        with pytest.raises(TypeError, match=f"{place}attention must return a tensor, got {kind}$"):
            ulysses_attention(communicator, X, X, X, lambda q, k, v, r=returned: r)
    group = communicator.device_group
    with pytest.raises(TypeError, match=r"^communicator must be a DeviceCommunicatorBase, got P"):
        ulysses_attention(group, X, X, X)


def test_what_attention_is_given_and_returns_is_named(ranks: Ranks):
    ranks.run(2, of_attention)


def a_model(communicator: DeviceCommunicatorBase) -> None:
    model = torch.nn.Linear(2, 2)
    text = r"parameters must be tensors, such as model.parameters\(\), got Linear$"
    refused(communicator, "reduce_gradients", lambda c, m: c.reduce_gradients(m), model, text)


def test_a_model_in_the_place_of_its_parameters_is_named(ranks: Ranks):
    ranks.run(2, a_model)


def test_a_communicator_without_a_group_names_the_public_class():
    with pytest.raises(
        TypeError, match=r"^DeviceCommunicatorBase\.__init__\(\) missing .*cpu_grou"
    ):
        DeviceCommunicatorBase()
