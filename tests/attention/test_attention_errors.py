"""The errors of `ulysses_attention`: whose they are, what they say, and what the others hear."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor
from torch._dynamo.exc import Unsupported

from fastvideo_comm import DeviceCommunicatorBase, ulysses_attention
from fastvideo_comm.errors import MismatchError, PeerLostError
from fastvideo_comm.handle import AsyncHandle

ONE = torch.zeros(1, 2, 4, 3)
X = (ONE, ONE, ONE)
MISTAKES: dict[str, tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = {
    "no tensor": (TypeError, "key must be a tensor, got str", (ONE, "x", ONE), {}),
    "dims": (
        ValueError,
        "query must have 4 dims [B, s, heads, D], got shape [2, 4, 3]",
        (ONE[0], ONE, ONE),
        {},
    ),
    "batch": (
        ValueError,
        "key must have shape [1, 2, K, 3] for query of shape [1, 2, 4, 3], got [2, 2, 4, 3]",
        (ONE, torch.zeros(2, 2, 4, 3), ONE),
        {},
    ),
    "width": (
        ValueError,
        "key must have shape [1, 2, K, 3] for query of shape [1, 2, 4, 3], got [1, 2, 4, 2]",
        (ONE, ONE[..., :2], ONE),
        {},
    ),
    "value": (
        ValueError,
        "value must have shape [1, 2, 4, E] for key of shape [1, 2, 4, 3], got [1, 2, 2, 3]",
        (ONE, ONE, ONE[:, :, :2]),
        {},
    ),
    "length of the key": (
        ValueError,
        "key must have shape [1, 2, K, 3] for query of shape [1, 2, 4, 3], got [1, 1, 4, 3]",
        (ONE, ONE[:, :1], ONE[:, :1]),
        {},
    ),
    "length of the value": (
        ValueError,
        "value must have shape [1, 2, 4, E] for key of shape [1, 2, 4, 3], got [1, 1, 4, 3]",
        (ONE, ONE, ONE[:, :1]),
        {},
    ),
    "batch of the value": (
        ValueError,
        "value must have shape [1, 2, 4, E] for key of shape [1, 2, 4, 3], got [2, 2, 4, 3]",
        (ONE, ONE, torch.zeros(2, 2, 4, 3)),
        {},
    ),
    "joint batch": (
        ValueError,
        "joint[0] must have shape [1, 2, 4, 3] beside [1, 2, 4, 3] of the sequence, "
        "got [2, 2, 4, 3]",
        X,
        {"joint": (torch.zeros(2, 2, 4, 3), ONE, ONE)},
    ),
    "joint heads": (
        ValueError,
        "joint[1] must have shape [1, 2, 4, 3] beside [1, 2, 4, 3] of the sequence, "
        "got [1, 2, 2, 3]",
        X,
        {"joint": (ONE, ONE[:, :, :2], ONE)},
    ),
    "joint width": (
        ValueError,
        "joint[2] must have shape [1, 2, 4, 3] beside [1, 2, 4, 3] of the sequence, "
        "got [1, 2, 4, 2]",
        X,
        {"joint": (ONE, ONE, ONE[..., :2])},
    ),
    "no head": (
        ValueError,
        "query must have at least 1 head, got shape [1, 2, 0, 3]",
        (ONE[:, :, :0],) * 3,
        {},
    ),
    "heads": (
        ValueError,
        "key must have a number of heads that divides the 4 of query, got 3 of shape [1, 2, 3, 3]",
        (ONE, ONE[:, :, :3], ONE[:, :, :3]),
        {},
    ),
    "joint": (
        TypeError,
        "joint must be a tuple of query, key and value, got Tensor",
        X,
        {"joint": ONE},
    ),
    "two joint": (
        TypeError,
        "joint must be a tuple of query, key and value, got 2 of them",
        X,
        {"joint": (ONE, ONE)},
    ),
    "joint length": (
        ValueError,
        "joint[2] must have shape [1, 2, 4, 3] beside [1, 2, 4, 3] of the sequence, "
        "got [1, 1, 4, 3]",
        X,
        {"joint": (ONE, ONE, ONE[:, :1])},
    ),
    "joint dims": (
        ValueError,
        "joint[0] must have 4 dims [B, T, heads, D], got shape [2, 4, 3]",
        X,
        {"joint": (ONE[0], ONE, ONE)},
    ),
    "attention": (TypeError, "attention must be callable or None, got int", (*X, 3), {}),
    "stages": (ValueError, "pipeline must be at least 1, got 0", X, {"pipeline": 0}),
    "bool": (TypeError, "pipeline must be an int, got bool", X, {"pipeline": True}),
    "word": (
        ValueError,
        "gather_sizes must be None, 'auto' or sizes, got 'even'",
        X,
        {"gather_sizes": "even"},
    ),
    "device": (
        ValueError,
        "key must be on the communicator's cpu, got meta",
        (ONE, ONE.to("meta"), ONE),
        {},
    ),
    "layout": (
        TypeError,
        "query must be a dense tensor, got layout torch.sparse_coo",
        (ONE.to_sparse(), ONE, ONE),
        {},
    ),
    "joint device": (
        ValueError,
        "joint[1] must be on the communicator's cpu, got meta",
        X,
        {"joint": (ONE, ONE.to("meta"), ONE)},
    ),
    "sizes": (
        ValueError,
        "gather_sizes must hold world_size=2 sizes of at least 0, got [2]",
        X,
        {"gather_sizes": [2]},
    ),
    "fractions": (
        TypeError,
        "every entry of gather_sizes must be an int, got float",
        X,
        {"gather_sizes": [2.0, 2.0]},
    ),
    "sizes of each": (
        ValueError,
        "gather_sizes must hold sizes for 1 tensors, got 3",
        X,
        {"gather_sizes": [[2, 2], [2, 2], [2, 2]]},
    ),
    "shape of the result": (
        ValueError,
        "attention must return [B, S, h, E] for query of shape [1, 4, 2, 3], "
        "got shape [1, 2, 4, 3]",
        (*X, lambda q, k, v: q.transpose(1, 2)),
        {},
    ),
    "kind of the result": (
        TypeError,
        "attention must return a tensor, got tuple",
        (*X, lambda q, k, v: (q, None)),
        {},
    ),
    "dims of the result": (
        ValueError,
        "attention must return [B, S, h, E] for query of shape [1, 4, 2, 3], got shape [1, 4, 2]",
        (*X, lambda q, k, v: q[..., 0]),
        {},
    ),
}


def mistaken(communicator: DeviceCommunicatorBase, name: str, compiled: bool) -> None:
    kind, text, tensors, options = MISTAKES[name]
    call: Callable[..., Any] = ulysses_attention
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(call, backend="eager")
    place = f"ulysses_attention on rank {communicator.rank} of 2 in group 'test': "
    with pytest.raises(kind, match=f"^{re.escape(place + text)}$"):
        call(communicator, *tensors, **options)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_on_its_rank_before_anything_is_sent(ranks: Ranks, name: str):
    ranks.run(2, mistaken, name, False)


def test_a_mistake_has_the_same_error_when_compiled(ranks: Ranks):
    ranks.run(2, mistaken, "heads", True)


def one_fails(
    communicator: DeviceCommunicatorBase, pipeline: int, mistake: str, memory: str
) -> None:
    """Rank 1 cannot send back what the others wait for."""
    own = DeviceCommunicatorBase(communicator.cpu_group, validate="always", memory=memory)
    own.barrier()

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if own.rank != 1:
            return query
        if mistake == "raises":
            raise ArithmeticError("on purpose")
        return query[:, 1:]

    x = torch.rand(1, 2, 6, 3)
    kind, text = MismatchError, r"\n1 +ulysses_attention.*(on purpose|must return)"
    if own.rank == 1:
        kind = ArithmeticError if mistake == "raises" else ValueError
        text = r"^on purpose$|attention must return \[B, S, h, E\]"
    with pytest.raises(kind, match=text):
        ulysses_attention(own, x, x, x, attention, pipeline=pipeline)
    if pipeline == 1:
        assert own.all_reduce(torch.ones(1)).item() == own.world_size, "still usable"
    own.destroy()


@pytest.mark.parametrize("mistake", ["raises", "shape"])
# By memory the calls of later stages have begun, and wait until the rank that failed has left.
@pytest.mark.parametrize(("pipeline", "memory"), [(1, "off"), (2, "off"), (1, "on")])
def test_ranks_hear_of_an_attention_that_fails_on_one_of_them(
    ranks: Ranks, pipeline: int, memory: str, mistake: str
):
    ranks.run(3, one_fails, pipeline, mistake, memory, ways=["messages"])


def mistaken_sizes(communicator: DeviceCommunicatorBase) -> None:
    with pytest.raises(ValueError, match=r"gather_sizes must hold the 2 at gather_dim=1"):
        ulysses_attention(communicator, *X, gather_sizes=[1, 3])
    torch._dynamo.reset()
    call = torch.compile(ulysses_attention, backend="eager", fullgraph=True)
    with pytest.raises(Unsupported, match="gather_sizes must be given where a call is compiled"):
        call(communicator, *X, gather_sizes="auto")


def test_sizes_that_do_not_fit_or_cannot_be_asked_for_are_named(ranks: Ranks):
    ranks.run(2, mistaken_sizes)


def interrupted(communicator: DeviceCommunicatorBase) -> None:
    """An attention that fails in the second stage leaves nothing in flight."""
    stages: list[int] = []

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        stages.append(1)
        if len(stages) == 2:
            raise ArithmeticError("on purpose")
        return query

    handles = []
    exchange = communicator.all_to_all_4D

    def kept(*arguments: Any, **options: Any) -> Any:
        handles.append(exchange(*arguments, **options))
        return handles[-1]

    communicator.all_to_all_4D = kept
    x = torch.rand(1, 2, 6, 3)
    try:
        with pytest.raises(ArithmeticError, match="on purpose"):
            ulysses_attention(communicator, x, x, x, attention, pipeline=3)
    finally:
        del communicator.all_to_all_4D
    assert len(handles) == 4
    assert all(handle._finish is None for handle in handles)
    assert torch.equal(communicator.all_gather(x, 0)[communicator.rank], x[0])


def test_an_attention_that_fails_leaves_nothing_in_flight(ranks: Ranks):
    ranks.run(2, interrupted)


def interrupted_by_two(communicator: DeviceCommunicatorBase) -> None:
    """The attention fails, and what is in flight then fails too."""
    waited: list[int] = []
    exchange = communicator.all_to_all_4D

    def lost(number: int) -> Any:
        def finish() -> Any:
            waited.append(number)
            raise PeerLostError("rank 1 is dead", peers=(1,))

        return AsyncHandle("all_to_all_4D", "", finish, lambda: False)

    def kept(*arguments: Any, **options: Any) -> Any:
        handle = exchange(*arguments, **options)
        if len(handles) == 0:
            handles.append(handle)
            return handle
        handle.wait()
        handles.append(lost(len(handles)))
        return handles[-1]

    def attention(*_: Tensor) -> Tensor:
        raise ArithmeticError("on purpose")

    handles: list[Any] = []
    x = torch.rand(1, 2, 6, 3)
    communicator.all_to_all_4D = kept
    try:
        with pytest.raises(ArithmeticError, match="on purpose"):
            ulysses_attention(communicator, x, x, x, attention, pipeline=3)
    finally:
        del communicator.all_to_all_4D
    assert waited == [1]


def test_the_error_of_an_attention_is_not_hidden_by_what_is_in_flight(ranks: Ranks):
    ranks.run(2, interrupted_by_two)
