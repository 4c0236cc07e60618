"""What an exchange as fp8 does not take, and ranks that do not ask for the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from memory_ranks import fresh
from ranks import Ranks

from fastvideo_comm import DeviceCommunicatorBase, ulysses_attention
from fastvideo_comm.errors import MismatchError

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2
X = torch.zeros(1, 4, 6, 16)
MISTAKES: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (X, {"wire_dtype": torch.float16}, ValueError,
     "wire_dtype must be one of torch.float8_e4m3fn, torch.float8_e5m2, got torch.float16"),
    (X, {"wire_dtype": torch.float8_e4m3fnuz}, ValueError, "got torch.float8_e4m3fnuz"),
    (X, {"grad_wire_dtype": torch.int8}, ValueError, "grad_wire_dtype must be one of"),
    (X, {"wire_dtype": "fp8"}, TypeError,
     "wire_dtype must be a dtype, several or None, got str"),
    (X[..., :8], {"wire_dtype": E4}, ValueError,
     r"input_ must have a last size that is a multiple of 16 for wire_dtype, got shape "
     r"\[1, 4, 6, 8\]"),
    (X[..., :0], {"grad_wire_dtype": E4}, ValueError,
     "multiple of 16 for grad_wire_dtype, got shape"),
    (X.long(), {"wire_dtype": E4}, TypeError,
     "input_ must be float16, bfloat16 or float32 for wire_dtype, got torch.int64"),
    (X.double(), {"wire_dtype": E4}, TypeError, "for wire_dtype, got torch.float64"),
    ([X, X], {"wire_dtype": [E4]}, ValueError, "wire_dtype must hold dtypes for 2 tensors, got 1"),
    (X, {"rounding": "up"}, ValueError, "rounding must be one of .* got 'up'"),
    (X, {"generator": 7}, TypeError, "generator must be a torch.Generator, got int"),
]  # fmt: skip


def mistaken(communicator: DeviceCommunicatorBase, index: int) -> None:
    input_, arguments, kind, message = MISTAKES[index]
    where = rf"^all_to_all_4D on rank {communicator.rank} of \d in group 'test': .*"
    with pytest.raises(kind, match=where + message):
        communicator.all_to_all_4D(input_, **arguments)


@pytest.mark.parametrize("index", range(len(MISTAKES)))
@pytest.mark.parametrize("size", [1, 2])
def test_what_does_not_travel_as_fp8_is_named(ranks: Ranks, size, index):
    ranks.run(size, mistaken, index)


def mistaken_attention(communicator: DeviceCommunicatorBase) -> None:
    for wire, message in (
        ({"wire_dtype": (E4, None, E4)}, "wire_dtype must be one dtype, or four for .*, got 3"),
        ({"grad_wire_dtype": torch.int8}, "grad_wire_dtype must be one of .*, got torch.int8"),
    ):
        with pytest.raises(ValueError, match=f"^ulysses_attention on rank .*{message}"):
            ulysses_attention(communicator, X, X, X, **wire)


def test_mistakes_of_attention_name_attention(ranks: Ranks):
    ranks.run(2, mistaken_attention)


def differing(communicator: DeviceCommunicatorBase, name: str, memory: str) -> None:
    with fresh(communicator, memory=memory, validate="always") as other:
        x = torch.randn(1, 4, 6, 16, requires_grad=True)
        dtype = (E4, E5, None)[other.rank]
        with pytest.raises(MismatchError, match=rf"{name}=\[torch.float8_e5m2\]"):
            other.all_to_all_4D(x, **{name: dtype})


@pytest.mark.parametrize("memory", ["on", "off"])
@pytest.mark.parametrize("name", ["wire_dtype", "grad_wire_dtype"])
def test_ranks_that_give_different_dtypes_hear_of_it(ranks: Ranks, name, memory):
    ranks.run(3, differing, name, memory, ways=["memory"])
