"""The errors about arguments, word by word, and calls of the checks without a group."""

from __future__ import annotations

import functools
import re
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist

from fastvideo_comm.collective import validation
from fastvideo_comm.collective.layout import Split
from fastvideo_comm.collective.wire import WireFormat

X = torch.zeros(2, 3, 4, 5)
FP8 = torch.zeros(1, 2, 3, 32)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
UNEVENLY = "; scatter_sizes= shares it unevenly"


class Sharded(torch.Tensor):
    """As a DTensor: a tensor that can say what of it is on this rank."""

    def to_local(self) -> torch.Tensor:
        return torch.zeros(2)


def nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nested tensors may change
        return torch.nested.nested_tensor([torch.zeros(2)])


def group_of(size: int) -> Any:
    return types.SimpleNamespace(size=lambda: size)


def on_device(device: str) -> Any:
    """What a check of devices reads of a tensor: a GPU's tensor is made on a GPU only."""
    return types.SimpleNamespace(device=torch.device(device))


def heads(*counts: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros(1, 2, count, 3) for count in counts)


def wire(inputs: Any, **given: Any) -> WireFormat | None:
    arguments: dict[str, Any] = {
        "wire_dtype": None,
        "grad_wire_dtype": None,
        "rounding": "nearest",
        "generator": None,
    }
    return validation.wire_format(inputs, **(arguments | given))


def scatter(inputs: Any, dim: int, sizes: Any, world_size: int) -> tuple[Split, ...]:
    return validation.scatter_splits(inputs, dim, sizes, world_size, packed=len(inputs) > 1)


def rank(value: Any, others_only: bool = False) -> None:
    validation.peer("dst", value, 1, 4, others_only=others_only)


check_tensor = functools.partial(validation.check_tensor, "k")
check_int = functools.partial(validation.check_int, "k")
sizes_of_each = functools.partial(validation.sizes_of_each, "k_sizes")

TYPE_ERRORS: list[tuple[Callable[..., Any], tuple[Any, ...], str]] = [
    (
        check_tensor,
        (None,),
        "k must be a tensor, got None; a parameter that the loss does not depend on has no "
        "gradient: give zeros on every rank, or skip it on every rank",
    ),
    (check_tensor, ([1],), "k must be a tensor, got list"),
    (
        check_tensor,
        (torch.eye(2).to_sparse(),),
        "k must be a dense tensor, got layout torch.sparse_coo",
    ),
    (
        check_tensor,
        (nested(),),
        "k must be a dense tensor, got a nested one",
    ),
    (
        check_tensor,
        (torch.zeros(2).as_subclass(Sharded),),
        "k must be this rank's own tensor, got a Sharded: give its to_local()",
    ),
    (check_int, (1.0,), "k must be an int, got float"),
    (check_int, (True,), "k must be an int, got bool"),
    (validation.normal_dim, (X, "0"), "dim must be an int, got str"),
    (validation.all_to_all_4D_dims, (X, 2.0, 1), "scatter_dim must be an int, got float"),
    (validation.all_to_all_4D_dims, (X, 2, 1.0), "gather_dim must be an int, got float"),
    (validation.tensors, ({},), "input_ must be a tensor or several, got dict"),
    (sizes_of_each, (7, 2), "k_sizes must be None, 'auto' or a list of ints, got int"),
    (
        sizes_of_each,
        (numpy.array([1, 2]), 2),
        "k_sizes must be None, 'auto' or a list of ints, got ndarray: give its .tolist()",
    ),
    (
        scatter,
        (heads(4), 2, 7, 2),
        "scatter_sizes must be None, 'auto' or a list of ints, got int",
    ),
    (
        functools.partial(wire, wire_dtype="fp8"),
        ((FP8,),),
        "wire_dtype must be a dtype, several or None, got str",
    ),
    (
        functools.partial(wire, grad_wire_dtype=[3]),
        ((FP8,),),
        "grad_wire_dtype must be a dtype, several or None, got int",
    ),
    (
        functools.partial(wire, wire_dtype=E5M2),
        ((FP8.double(),),),
        "input_ must be float16, bfloat16 or float32 for wire_dtype, got torch.float64",
    ),
    (
        functools.partial(wire, generator=3),
        ((FP8,),),
        "generator must be a torch.Generator, got int",
    ),
    (
        validation.uneven_split,
        ("k_sizes", 0, [1, 2.0], 2),
        "every entry of k_sizes must be an int, got float",
    ),
    (validation.all_gather, ([1], 0), "input_ must be a tensor, got list"),
    (
        validation.reduce_scatter,
        (X.to(torch.int16), 0, None, 2),
        "input_ must have a dtype that backends reduce, got torch.int16; "
        "convert it before and after",
    ),
    (validation.all_reduce, (3, None), "input_ must be a tensor, got int"),
    (
        validation.all_reduce,
        (X.bool(), None),
        "input_ must have a dtype that backends reduce, got torch.bool; "
        "convert it before and after",
    ),
    (
        validation.all_reduce,
        (X.cfloat(), dist.ReduceOp.MAX),
        "op must be SUM or AVG for torch.complex64, got MAX",
    ),
    (
        validation.all_reduce,
        (X.int(), dist.ReduceOp.AVG),
        "op must not be AVG for torch.int32, got AVG",
    ),
    *(
        (
            validation.all_reduce,
            (X, op),
            f"op must not be bitwise for torch.float32, got {name}",
        )
        for op, name in [
            (dist.ReduceOp.BAND, "BAND"),
            (dist.ReduceOp.BOR, "BOR"),
            (dist.ReduceOp.BXOR, "BXOR"),
        ]
    ),
    (validation.memory_bytes, (2.0**20,), "memory_bytes must be an int, got float"),
    (rank, ("1",), "dst must be an int, got str"),
]

VALUE_ERRORS: list[tuple[Callable[..., Any], tuple[Any, ...], str]] = [
    (
        validation.check_device,
        ("k", on_device("meta"), torch.device("cpu")),
        "k must be on the communicator's cpu, got meta",
    ),
    (
        validation.check_device,
        ("k", on_device("cuda:0"), torch.device("cuda:1")),
        "k must be on the communicator's cuda:1, got cuda:0",
    ),
    (validation.check_world_size, (group_of(3), 4), "world_size must be the group's 3, got 4"),
    (
        validation.normal_dim,
        (torch.zeros(()), 0),
        "input_ must have at least 1 dim, got a 0-d tensor",
    ),
    (
        validation.normal_dim,
        (X, 4),
        "dim must be in [-4, 3] for input_ of shape [2, 3, 4, 5], got 4",
    ),
    (
        validation.normal_dim,
        (X, -5),
        "dim must be in [-4, 3] for input_ of shape [2, 3, 4, 5], got -5",
    ),
    (
        validation.check_divisible,
        (X, "k_dim", 1, 2),
        "input_ must have a size at k_dim=1 that world_size=2 divides, got 3 of shape [2, 3, 4, 5]",
    ),
    (
        validation.all_to_all_4D_dims,
        (X[0], 2, 1),
        "input_ must have 4 dims [B, S, H, D], got shape [3, 4, 5]",
    ),
    *(
        (
            validation.all_to_all_4D_dims,
            (X, *dims),
            f"(scatter_dim, gather_dim) must be (2, 1) or (1, 2), got {dims}",
        )
        for dims in [(2, 2), (0, 1), (-5, 2), (2, 5), (-1, 1)]
    ),
    (
        validation.all_to_all_4D,
        (X, 3, -2, 1),
        "input_ must have a size at scatter_dim=2 that world_size=3 divides, "
        "got 4 of shape [2, 3, 4, 5]" + UNEVENLY,
    ),
    (
        validation.tensors,
        ([],),
        "input_ must hold at least one tensor, got an empty sequence",
    ),
    (
        scatter,
        (heads(6, 4), 2, "auto", 2),
        "input_ must have head counts that are multiples of the smallest for "
        "scatter_sizes='auto', got [6, 4]; scatter_sizes= takes sizes for each tensor",
    ),
    (
        scatter,
        (heads(3, 5), 2, None, 2),
        "input_ must have a size at scatter_dim=2 that world_size=2 divides, "
        "got 3 of shape [1, 2, 3, 3]" + UNEVENLY,
    ),
    (
        scatter,
        (heads(9, 3), 2, None, 2),
        "input_ must have a size at scatter_dim=2 that world_size=2 divides, "
        "got 9 of shape [1, 2, 9, 3]; scatter_sizes='auto' gives every rank the key heads of its "
        "query heads",
    ),
    (
        scatter,
        (heads(3), 2, None, 2),
        "input_ must have a size at scatter_dim=2 that world_size=2 divides, "
        "got 3 of shape [1, 2, 3, 3]" + UNEVENLY,
    ),
    (
        scatter,
        (heads(9, 3), 1, None, 3),
        "input_ must have a size at scatter_dim=1 that world_size=3 divides, "
        "got 2 of shape [1, 2, 9, 3]" + UNEVENLY,
    ),
    (
        scatter,
        (heads(4, 5), 2, [[3, 1], [3, 3]], 2),
        "scatter_sizes must add up to the 5 at scatter_dim=2 of shape [1, 2, 5, 3], got [3, 3]",
    ),
    (
        scatter,
        (heads(4), 2, [3, 1, 0], 2),
        "scatter_sizes must hold world_size=2 sizes of at least 0, got [3, 1, 0]",
    ),
    (
        scatter,
        (heads(4), 2, [5, -1], 2),
        "scatter_sizes must hold world_size=2 sizes of at least 0, got [5, -1]",
    ),
    (sizes_of_each, ("even", 2), "k_sizes must be None, 'auto' or sizes, got 'even'"),
    (sizes_of_each, ([[1, 1]], 2), "k_sizes must hold sizes for 2 tensors, got 1"),
    (
        functools.partial(wire, rounding="up"),
        ((FP8,),),
        "rounding must be one of 'nearest', 'stochastic', got 'up'",
    ),
    (
        functools.partial(wire, wire_dtype=[E4M3]),
        ((FP8, FP8),),
        "wire_dtype must hold dtypes for 2 tensors, got 1",
    ),
    (
        functools.partial(wire, grad_wire_dtype=(None, E4M3)),
        ((FP8,),),
        "grad_wire_dtype must hold dtypes for 1 tensors, got 2",
    ),
    (
        functools.partial(wire, grad_wire_dtype=torch.int8),
        ((FP8,),),
        "grad_wire_dtype must be one of torch.float8_e4m3fn, torch.float8_e5m2, got torch.int8",
    ),
    (
        functools.partial(wire, wire_dtype=[None, E4M3]),
        ((X, X),),
        "input_ must have a last size that is a multiple of 16 for wire_dtype, "
        "got shape [2, 3, 4, 5]",
    ),
    (
        functools.partial(wire, wire_dtype=E4M3),
        ((X[..., :0],),),
        "input_ must have a last size that is a multiple of 16 for wire_dtype, "
        "got shape [2, 3, 4, 0]",
    ),
    (
        functools.partial(wire, generator=torch.Generator()),
        ((on_device("meta"),),),
        "generator must be on meta, got one on cpu",
    ),
    (
        validation.gather_split,
        (X, 1, [1, 2], 0, 2),
        "gather_sizes must hold the 3 at gather_dim=1 of shape [2, 3, 4, 5] for rank 0, got [1, 2]",
    ),
    (
        validation.gather_splits,
        ((X[:, :1], X), 1, ([1, 2], [1, 2]), 0, 2),
        "gather_sizes must hold the 3 at gather_dim=1 of shape [2, 3, 4, 5] for rank 0, got [1, 2]",
    ),
    (
        validation.gather_split,
        (X, 1, [3], 0, 2),
        "gather_sizes must hold world_size=2 sizes of at least 0, got [3]",
    ),
    (
        validation.all_gather_sizes,
        (X, -1, [5, 1], 1, 2),
        "gather_sizes must hold the 5 at dim=3 of shape [2, 3, 4, 5] for rank 1, got [5, 1]",
    ),
    (
        validation.parts,
        (X, 2, -1),
        "input_ must have a size at dim=3 that world_size=2 divides, got 5 of shape [2, 3, 4, 5]",
    ),
    (
        validation.slice_,
        (X, 2, 1),
        "input_ must have a size at dim=1 that world_size=2 divides, got 3 of shape [2, 3, 4, 5]"
        + UNEVENLY,
    ),
    (
        validation.slice_sizes,
        (X, -3, None, 2),
        "input_ must have a size at dim=1 that world_size=2 divides, got 3 of shape [2, 3, 4, 5]"
        + UNEVENLY,
    ),
    (
        validation.slice_sizes,
        (X, -3, [1, 1], 2),
        "scatter_sizes must add up to the 3 at dim=1 of shape [2, 3, 4, 5], got [1, 1]",
    ),
    (
        validation.slice_sizes,
        (X, 1, [[1, 2], [1, 2]], 2),
        "scatter_sizes must hold sizes for 1 tensors, got 2",
    ),
    (
        validation.all_reduce,
        (X, "sum"),
        "op must be one of ReduceOp.SUM, AVG, PRODUCT, MIN, MAX, BAND, BOR, BXOR, got sum",
    ),
    (
        validation.memory_bytes,
        ((1 << 20) - 4096,),
        "memory_bytes must be a multiple of 4096 from 1 MiB on, got 1044480",
    ),
    (
        validation.memory_bytes,
        ((1 << 20) + 1,),
        "memory_bytes must be a multiple of 4096 from 1 MiB on, got 1048577",
    ),
    (rank, (4,), "dst must be a rank of the group in [0, 3], got 4"),
    (rank, (-1,), "dst must be a rank of the group in [0, 3], got -1"),
    (rank, (1, True), "dst must be another rank than this one, got 1"),
]


@pytest.mark.parametrize(
    ("error", "check", "arguments", "message"),
    [(TypeError, *row) for row in TYPE_ERRORS] + [(ValueError, *row) for row in VALUE_ERRORS],
)
def test_an_error_says_which_argument_which_rule_and_what_was_given(
    error, check, arguments, message
):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        check(*arguments)
