"""What `ulysses_attention` sends and when, and what it hands to `attention`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_case import attend
from ranks import Ranks
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastvideo_comm import DeviceCommunicatorBase, ulysses_attention


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


def autocast(communicator: DeviceCommunicatorBase, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.rand(3, 1, 8, 2, 4, generator=generator).to(dtype).requires_grad_()
    q, k, v = whole.chunk(4, 2)[communicator.rank]
    with torch.autocast("cpu", torch.bfloat16):
        out = ulysses_attention(communicator, q, k, v)
        expected = scaled_dot_product_attention(*whole.transpose(2, 3)).transpose(1, 2)
    assert out.dtype == expected.dtype
    assert out.dtype == (torch.bfloat16 if dtype == torch.float32 else dtype)
    mine = expected.chunk(4, 1)[communicator.rank]
    # The same numbers in bfloat16; a kernel may add over fewer heads in another order.
    torch.testing.assert_close(out, mine, rtol=2**-7, atol=2**-7)
    out.sum().backward()


# Autocast makes bfloat16 of the first, and leaves the second as it is.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ranks_without_heads_send_what_autocast_makes_on_the_others(ranks: Ranks, dtype):
    ranks.run(4, autocast, dtype)


def at_random(communicator: DeviceCommunicatorBase) -> None:
    x = torch.rand(1, 8, 4, 16, requires_grad=True)
    weight = torch.rand(1, 8, 4, 16)

    def gradient(seed: int) -> Tensor:
        out = ulysses_attention(
            *(communicator, x, x.sin(), x.cos()),
            grad_wire_dtype=torch.float8_e5m2,
            rounding="stochastic",
            generator=torch.Generator().manual_seed(seed),
        )
        return torch.autograd.grad((out * weight).sum(), x)[0]

    assert torch.equal(gradient(1), gradient(1))
    assert not torch.equal(gradient(1), gradient(2))


def test_gradients_are_rounded_with_the_random_numbers_of_the_generator(ranks: Ranks):
    ranks.run(2, at_random)
