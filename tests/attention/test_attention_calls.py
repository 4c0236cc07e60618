"""What `ulysses_attention` sends and when, what it hands to `attention`, and its errors."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_case import attend
from ranks import Ranks
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch.nn.functional import scaled_dot_product_attention

from fastvideo_comm import DeviceCommunicatorBase, ulysses_attention

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
    "shape of the result": (
        ValueError,
        "attention must return [B, S, h, E] for query of shape [1, 4, 2, 3], "
        "got shape [1, 2, 4, 3]",
        (*X, lambda q, k, v: q.transpose(1, 2)),
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


def mistaken_sizes(communicator: DeviceCommunicatorBase) -> None:
    with pytest.raises(ValueError, match=r"gather_sizes must hold the 2 at gather_dim=1"):
        ulysses_attention(communicator, *X, gather_sizes=[1, 3])
    torch._dynamo.reset()
    call = torch.compile(ulysses_attention, backend="eager", fullgraph=True)
    with pytest.raises(Unsupported, match="gather_sizes must be given where a call is compiled"):
        call(communicator, *X, gather_sizes="auto")


def test_sizes_that_do_not_fit_or_cannot_be_asked_for_are_named(ranks: Ranks):
    ranks.run(2, mistaken_sizes)


def order_of_tokens(communicator: DeviceCommunicatorBase, pipeline: int) -> None:
    """`attention` sees which token stands where, and how the heads are grouped."""
    rows, rank = [2, 0, 3], communicator.rank
    start = sum(rows[:rank])
    heads, key_heads = 12, 3
    tokens = torch.arange(start, start + rows[rank]).double()
    seen: list[tuple[list[int], list[int]]] = []

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        for tensor in (query, key, value):
            assert tensor[0, :, 0, 0].tolist() == [0, 1, 2, 3, 4, 100, 101]
        groups = query[0, 0, :, 1] // (heads // key_heads)
        of_keys = key[0, 0, :, 1].repeat_interleave(query.shape[2] // key.shape[2])
        assert torch.equal(groups, of_keys)
        seen.append((query[0, 0, :, 1].tolist(), key[0, 0, :, 1].tolist()))
        return query

    def numbered(tokens: Tensor, number: int) -> Tensor:
        heads = torch.arange(number).double()
        grid = torch.meshgrid(tokens, heads, indexing="ij")
        return torch.stack(grid, -1)[None]

    q, k = numbered(tokens, heads), numbered(tokens, key_heads)
    text = torch.tensor([100.0, 101.0], dtype=torch.float64)
    joint = (numbered(text, heads), numbered(text, key_heads), numbered(text, key_heads))
    out, text_out = ulysses_attention(
        communicator, q, k, k, attention, joint=joint, pipeline=pipeline, gather_sizes=rows
    )
    assert torch.equal(out, q)
    assert torch.equal(text_out, joint[0])
    assert len(seen) == min(pipeline, 1 if key_heads >= 3 else 4)


@pytest.mark.parametrize("pipeline", [1, 2])
def test_tokens_come_in_the_order_of_ranks_and_joint_ones_last(ranks: Ranks, pipeline: int):
    ranks.run(3, order_of_tokens, pipeline)


def calls_counted(communicator: DeviceCommunicatorBase, pipeline: int) -> None:
    """One exchange there and one back for each stage; nothing of the joint tokens goes there."""
    calls = record(communicator, [])
    try:
        x = torch.rand(1, 2, 8, 3)
        ulysses_attention(communicator, x, x, x, joint=(x, x, x), pipeline=pipeline)
    finally:
        del communicator.all_to_all_4D
    there, back = (1, 2, 8 // pipeline, 3), (1, 4, 4 // pipeline, 3)
    assert sorted(calls) == sorted([[there] * 3] * pipeline + [[back, back]] * pipeline)


def record(communicator: DeviceCommunicatorBase, events: list[str]) -> list[list[tuple[int, ...]]]:
    """Shapes of every exchange; sends and waits, forward and backward, go into `events`."""
    exchange = communicator.all_to_all_4D
    shapes: list[list[tuple[int, ...]]] = []
    numbers = {"there": 0, "back": 0}

    def recorded(tensors: Any, *dims: int, **options: Any) -> Any:
        shapes.append([tuple(tensor.shape) for tensor in tensors])
        way = "back" if dims == (1, 2) else "there"
        name = f"{way} {numbers[way]}"
        numbers[way] += 1
        events.append(f"send {name}")
        handle = exchange(tensors, *dims, **options)
        if not options.get("async_op"):
            return handle
        finish = handle.wait

        def wait() -> Any:
            events.append(f"wait {name}")
            outputs = finish()
            sends = outputs[0].grad_fn
            if sends is not None:
                waits = sends.next_functions[0][0]
                sends.register_prehook(lambda _: events.append(f"send {name}"))
                waits.register_hook(lambda *_: events.append(f"wait {name}"))
            return outputs

        handle.wait = wait
        return handle

    communicator.all_to_all_4D = recorded
    return shapes


@pytest.mark.parametrize("pipeline", [1, 2, 4])
def test_each_stage_is_one_exchange_there_and_one_back(ranks: Ranks, pipeline: int):
    ranks.run(2, calls_counted, pipeline)


def order_of_stages(communicator: DeviceCommunicatorBase) -> None:
    events: list[str] = []

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        number = sum(event.startswith("compute") for event in events)
        events.append(f"compute {number}")
        attended = attend(query, key, value)
        attended.register_hook(lambda _: events.append(f"compute {number}"))
        return attended

    record(communicator, events)
    try:
        q, k, v = (torch.rand(1, 2, 6, 3, requires_grad=True) for _ in range(3))
        out = ulysses_attention(communicator, q, k, v, attention, pipeline=3)
        forward, events[:] = list(events), []
        out.sum().backward()
    finally:
        del communicator.all_to_all_4D
    for way in (forward, events):
        assert len(way) == 15
    for number in range(3):
        at = forward.index(f"compute {number}")
        if number < 2:  # the next heads travel
            assert forward.index(f"send there {number + 1}") < at
            assert forward.index(f"wait there {number + 1}") > at
        if number > 0:  # the last result travels
            assert forward.index(f"send back {number - 1}") < at
            assert forward.index(f"wait back {number - 1}") > at
        at = events.index(f"compute {number}")
        if number > 0:  # the gradient of the stage before travels
            assert events.index(f"send back {number - 1}") < at
            assert events.index(f"wait back {number - 1}") > at
        if number < 2:  # and that of the heads of the stage behind
            assert events.index(f"send there {number + 1}") < at
            assert events.index(f"wait there {number + 1}") > at


def test_stages_travel_while_others_are_computed_in_the_backward_too(ranks: Ranks):
    ranks.run(2, order_of_stages)


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


def alone(communicator: DeviceCommunicatorBase) -> None:
    q, k = torch.rand(1, 3, 4, 2), torch.rand(1, 3, 2, 2)
    called: list[int] = []

    def attention(*tensors: Tensor) -> Tensor:
        called.append(1)
        assert tensors[0] is q
        return attend(*tensors)

    out = ulysses_attention(communicator, q, k, k, attention, pipeline=4)
    assert torch.equal(out, attend(q, k, k))
    assert len(called) == 1


def test_one_rank_computes_its_own_tensors_at_once(ranks: Ranks):
    ranks.run(1, alone)


def autocast(communicator: DeviceCommunicatorBase) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.rand(3, 1, 8, 2, 4, generator=generator, requires_grad=True)
    q, k, v = whole.chunk(4, 2)[communicator.rank]
    with torch.autocast("cpu", torch.bfloat16):
        out = ulysses_attention(communicator, q, k, v)
        expected = scaled_dot_product_attention(*whole.transpose(2, 3)).transpose(1, 2)
    assert out.dtype == expected.dtype == torch.bfloat16
    mine = expected.chunk(4, 1)[communicator.rank]
    # The same numbers in bfloat16; a kernel may add over fewer heads in another order.
    torch.testing.assert_close(out, mine, rtol=2**-7, atol=2**-7)
    out.sum().backward()


def test_ranks_without_heads_send_what_autocast_makes_on_the_others(ranks: Ranks):
    ranks.run(4, autocast)
