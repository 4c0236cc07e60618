"""Exchanges that travel as fp8: what arrives, which gradients, the same bits on every way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import Ranks
from test_quantise import there_and_back
from torch import Tensor
from torch.autograd import forward_ad

from fastvideo_comm import DeviceCommunicatorBase, ulysses_attention
from fastvideo_comm.collective import messages, quantised
from fastvideo_comm.collective.layout import Split
from fastvideo_comm.collective.quantised import _as_messages

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2
# How the exchange is called, and how tensors that it can take are made of [2, 12, 12, 32].
Exchange = Callable[..., Any]
CALLS: dict[str, tuple[Callable[[int, Tensor], Any], dict[str, Any]]] = {
    "heads": (lambda rank, x: x, {}),
    "sequence": (lambda rank, x: x, {"scatter_dim": 1, "gather_dim": 2}),
    "strided": (lambda rank, x: x.mT.contiguous().mT.transpose(1, 2), {}),
    "batch of one": (lambda rank, x: x[:1], {}),
    "nothing": (lambda rank, x: x[:, :0], {}),
    "asynchronous": (lambda rank, x: x, {"async_op": True}),
    "several": (lambda rank, x: (x, x[:1, :, :6].half(), x[..., :16].bfloat16()), {}),
    "several, asynchronous": (lambda rank, x: (x, x.bfloat16()), {"async_op": True}),
    "replicated": (lambda rank, x: (x, x[:, :, :1]), {}),
    "uneven": (
        lambda rank, x: x[:, : [5, 8, 0][rank]],
        {"scatter_sizes": "auto", "gather_sizes": "auto"},
    ),
}


def values(communicator: DeviceCommunicatorBase, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(communicator.rank)
    return torch.randn(2, 12, 12, 32, generator=generator).to(dtype)


def mapped(function: Callable[[Tensor], Tensor], tensors: Any) -> Any:
    if isinstance(tensors, Tensor):
        return function(tensors)
    return tuple(function(tensor) for tensor in tensors)


def waited(result: Any) -> Any:
    return result if isinstance(result, Tensor | tuple) else result.wait()


def assert_same(results: Any, expected: Any) -> None:
    pairs = [(results, expected)]
    if not isinstance(results, Tensor):
        pairs = list(zip(results, expected, strict=True))
    for result, each in pairs:
        assert result.dtype == each.dtype
        assert result.is_contiguous()
        assert torch.equal(result, each)


def forward(communicator: DeviceCommunicatorBase, name: str) -> None:
    make, arguments = CALLS[name]
    input_ = make(communicator.rank, values(communicator))
    for dtype, rounding in ((E4, "nearest"), (E5, "nearest"), (E4, "stochastic")):
        wire = {"wire_dtype": dtype, "grad_wire_dtype": E4, "rounding": rounding}
        result = waited(communicator.all_to_all_4D(input_, **wire, **arguments))
        rounded = mapped(lambda x, dtype=dtype: there_and_back(x, dtype), input_)
        assert_same(result, waited(communicator.all_to_all_4D(rounded, **arguments)))


@pytest.mark.parametrize("name", CALLS)
def test_every_exchange_is_that_of_the_rounded_tensors(ranks: Ranks, name):
    """On every way the same bits: those of one rounding in this process."""
    ranks.run(3, forward, name)


def one_stays_exact(communicator: DeviceCommunicatorBase) -> None:
    query, key, value = (values(communicator) + i for i in range(3))
    results = communicator.all_to_all_4D((query, key, value), wire_dtype=(E4, None, E5))
    rounded = (there_and_back(query, E4), key, there_and_back(value, E5))
    assert_same(results, communicator.all_to_all_4D(rounded))
    assert not torch.equal(rounded[0], query)


def test_each_tensor_has_its_own_dtype(ranks: Ranks):
    ranks.run(2, one_stays_exact)


def gradients(communicator: DeviceCommunicatorBase, name: str) -> None:
    make, arguments = CALLS[name]
    leaf = values(communicator).requires_grad_()
    input_ = make(communicator.rank, leaf)
    inputs = (input_,) if isinstance(input_, Tensor) else input_

    def gradient_of(round_: Callable[[Tensor], Tensor], **wire: Any) -> tuple[Tensor, ...]:
        output = waited(communicator.all_to_all_4D(input_, **arguments, **wire))
        outputs = (output,) if isinstance(output, Tensor) else output
        generator = torch.Generator().manual_seed(7 + communicator.rank)
        weights = [round_(torch.randn(y.shape, generator=generator).to(y.dtype)) for y in outputs]
        return torch.autograd.grad(outputs, inputs, weights)

    exact = gradient_of(lambda g: g)
    assert_same(gradient_of(lambda g: g, wire_dtype=E4), exact)
    for dtype in (E4, E5):
        rounded = gradient_of(lambda g, dtype=dtype: there_and_back(g, dtype))
        results = gradient_of(lambda g: g, wire_dtype=E4, grad_wire_dtype=dtype)
        assert_same(results, rounded)
        assert_same(gradient_of(lambda g: g, grad_wire_dtype=dtype), rounded)
        if leaf.numel() and name != "nothing":
            assert not torch.equal(results[0], exact[0])


@pytest.mark.parametrize("name", CALLS)
def test_gradients_travel_exactly_unless_they_have_a_dtype_of_their_own(ranks: Ranks, name):
    # At most two ranks share a head: a sum of two is the same in any order.
    ranks.run(2, gradients, name)


def shared_heads(communicator: DeviceCommunicatorBase, num_heads: int) -> None:
    size, rank = communicator.world_size, communicator.rank
    x = values(communicator)[:, :, :num_heads].requires_grad_()
    whole = values(communicator)
    _, y = communicator.all_to_all_4D((whole, x), grad_wire_dtype=(None, E5))
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(rank))
    (gradient,) = torch.autograd.grad(y, x, weight)
    everyone = communicator.all_gather(there_and_back(weight, E5)[None], 0)
    # [P, 2, this rank's tokens, 1, 32]: the ranks that share a head stand side by side.
    part = everyone.unflatten(2, (size, -1))[:, :, rank]
    expected = part.unflatten(0, (num_heads, -1)).sum(1).squeeze(3).permute(1, 2, 0, 3)
    # Up to three float32 numbers are added in any order.
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("size", "num_heads"), [(3, 1), (4, 2)])
def test_gradients_of_a_shared_head_are_rounded_each_by_itself_and_added(
    ranks: Ranks, size, num_heads
):
    ranks.run(size, shared_heads, num_heads)


def higher(communicator: DeviceCommunicatorBase, async_op: bool) -> None:
    """The gradient is linear in what comes back; its derivative is the exchange itself."""
    x = values(communicator).requires_grad_()
    wire = {"wire_dtype": E4, "grad_wire_dtype": E5, "rounding": "stochastic"}
    y = waited(communicator.all_to_all_4D(x, async_op=async_op, **wire))
    back = torch.randn_like(y).requires_grad_()
    (gradient,) = torch.autograd.grad(y, x, back, create_graph=True)
    direction = torch.randn_like(x).requires_grad_()
    (twice,) = torch.autograd.grad(gradient, back, direction, create_graph=True)
    assert torch.equal(twice, communicator.all_to_all_4D(direction.detach()))
    third = torch.randn_like(twice)
    (thrice,) = torch.autograd.grad(twice, direction, third)
    assert torch.equal(thrice, communicator.all_to_all_4D(third, 1, 2))


@pytest.mark.parametrize("async_op", [False, True])
def test_derivatives_of_higher_order_are_those_of_the_exact_exchange(ranks: Ranks, async_op):
    ranks.run(2, higher, async_op)


def tangents(communicator: DeviceCommunicatorBase, async_op: bool) -> None:
    """There and, of their gradient, back."""
    x, tangent = values(communicator), values(communicator).flip(-1).requires_grad_()
    wire = {"wire_dtype": E4, "grad_wire_dtype": E4, "async_op": async_op}
    with forward_ad.dual_level():
        y = waited(communicator.all_to_all_4D(forward_ad.make_dual(x, tangent), **wire))
        primal, result = forward_ad.unpack_dual(y)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(communicator.rank))
        (gradient,) = torch.autograd.grad(result, tangent, weight)
    assert torch.equal(primal, communicator.all_to_all_4D(there_and_back(x, E4)))
    assert torch.equal(result, communicator.all_to_all_4D(tangent))
    assert torch.equal(gradient, communicator.all_to_all_4D(weight, 1, 2))


@pytest.mark.parametrize("async_op", [False, True])
def test_tangents_travel_exactly(ranks: Ranks, async_op):
    ranks.run(2, tangents, async_op)


def stochastic(communicator: DeviceCommunicatorBase, name: str) -> None:
    make, arguments = CALLS[name]
    input_ = make(communicator.rank, values(communicator)).detach().requires_grad_()
    generator = torch.Generator()

    def gradient(seed: int) -> tuple[Tensor, Tensor]:
        generator.manual_seed(seed)
        y = waited(
            communicator.all_to_all_4D(
                input_, grad_wire_dtype=E4, rounding="stochastic", generator=generator, **arguments
            )
        )
        assert torch.equal(y, waited(communicator.all_to_all_4D(input_, **arguments)))
        weight = torch.linspace(0, 1, y.numel()).view(y.shape)
        return torch.autograd.grad(y, input_, weight)[0], weight

    first, weight = gradient(1)
    assert torch.equal(first, gradient(1)[0])
    assert not torch.equal(first, gradient(2)[0])
    seeds = torch.randint(
        *(-(2**31), 2**31, (*weight.shape[:-1], 1)),
        generator=generator.manual_seed(1),
        dtype=torch.int32,
    )
    dims = (arguments.get("gather_dim", 1), arguments.get("scatter_dim", 2))
    rounded = there_and_back(weight, E4, seeds)
    assert torch.equal(first, communicator.all_to_all_4D(rounded, *dims))


@pytest.mark.parametrize("name", ["heads", "sequence", "asynchronous"])
def test_a_generator_decides_how_gradients_are_rounded(ranks: Ranks, name):
    ranks.run(2, stochastic, name)


def in_pieces(communicator: DeviceCommunicatorBase, job: Callable[..., None], *names: str) -> None:
    starts = mock.patch.object(messages, "start_all_to_all", wraps=messages.start_all_to_all)
    # Pieces of 5, 5 and 2 of the 12 tokens.
    with mock.patch.object(quantised, "PIECE_BYTES", 2 * 12 * 12 * 32 // 3), starts as start:
        job(communicator, *names)
    assert start.call_count >= 6, "two tensors of three pieces each"


@pytest.mark.parametrize(
    "job",
    [
        (forward, "heads"),
        (forward, "several"),
        (forward, "several, asynchronous"),
        (gradients, "sequence"),
        (stochastic, "heads"),
        (one_stays_exact,),
    ],
    ids=lambda job: " ".join([job[0].__name__, *job[1:]]),
)
def test_a_large_tensor_in_pieces_is_the_same_as_in_one(ranks: Ranks, job):
    ranks.run(2, in_pieces, *job, ways=["messages"])


def compiled(communicator: DeviceCommunicatorBase, backend: str) -> None:
    torch._dynamo.reset()
    x = values(communicator).requires_grad_()
    weight = torch.randn(2, 24, 6, 32)
    communicator.all_to_all_4D(x)  # connects memory

    def loss(x: Tensor) -> Tensor:
        y = communicator.all_to_all_4D(x, wire_dtype=E4, grad_wire_dtype=E5)
        pair = communicator.all_to_all_4D((x, x[:, :, :1]), wire_dtype=(None, E4))
        return (y * weight).sum() + pair[1].sum(), y, pair[1]

    results = torch.compile(loss, backend=backend, fullgraph=True)(x)
    expected = loss(x)
    assert_same(results[1:], expected[1:])
    (gradient,) = torch.autograd.grad(results[0], x)
    assert torch.equal(gradient, torch.autograd.grad(expected[0], x)[0])


def test_compiled_code_gives_the_same_bits(ranks: Ranks):
    ranks.run(2, compiled, "aot_eager")


def compiled_at_random(communicator: DeviceCommunicatorBase) -> None:
    torch._dynamo.reset()
    x = values(communicator).requires_grad_()
    wire = {"grad_wire_dtype": E4, "rounding": "stochastic"}
    exchange = torch.compile(
        lambda x: communicator.all_to_all_4D(x, **wire), backend="aot_eager", fullgraph=True
    )
    weight = torch.randn(2, 24, 6, 32)
    exact = communicator.all_to_all_4D(weight, 1, 2)
    first, second = (torch.autograd.grad(exchange(x), x, weight)[0] for _ in range(2))
    assert not torch.equal(first, second)
    for gradient in (first, second):
        bound = exact.abs() / 8 + exact.abs().amax(-1, keepdim=True) * 8e-6
        assert ((gradient - exact).abs() <= bound).all()
    with pytest.raises(Exception, match="generator must be None where a call is compiled"):
        torch.compile(
            lambda x: communicator.all_to_all_4D(x, **wire, generator=torch.default_generator),
            backend="aot_eager",
            fullgraph=True,
        )(x)


def test_compiled_code_rounds_at_random_too(ranks: Ranks):
    ranks.run(2, compiled_at_random, ways=["messages"])


def in_attention(communicator: DeviceCommunicatorBase, pipeline: int) -> None:
    query, key, value = (values(communicator) * (i + 1) for i in range(3))
    joint = tuple(
        torch.randn(2, 5, 12, 32, generator=torch.Generator().manual_seed(9)) + i for i in range(3)
    )
    arguments = {"joint": joint, "pipeline": pipeline}
    for dtypes in ((E4, E4, E4, E4), (E4, None, E5, None), (None, None, None, E5)):
        given = dtypes if len(set(dtypes)) > 1 else dtypes[0]
        results = ulysses_attention(communicator, query, key, value, wire_dtype=given, **arguments)
        sent = [
            x if dtype is None else there_and_back(x, dtype)
            for x, dtype in zip((query, key, value), dtypes[:3], strict=True)
        ]
        expected = ulysses_attention(communicator, *sent, **arguments)
        if dtypes[3] is not None:
            expected = mapped(lambda x, dtype=dtypes[3]: there_and_back(x, dtype), expected)
        assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("pipeline", [1, 2])
def test_attention_rounds_query_key_value_and_result(ranks: Ranks, pipeline):
    ranks.run(2, in_attention, pipeline)


def gradients_in_attention(communicator: DeviceCommunicatorBase) -> None:
    tensors = [(values(communicator) * (i + 1)).requires_grad_() for i in range(3)]
    weight = torch.randn(2, 12, 12, 32, generator=torch.Generator().manual_seed(communicator.rank))

    def gradients_of(**wire: Any) -> tuple[Tensor, ...]:
        out = ulysses_attention(communicator, *tensors, **wire)
        return torch.autograd.grad(out, tensors, weight)

    exact = gradients_of()
    assert_same(gradients_of(grad_wire_dtype=(E4, None, E5, None))[1], exact[1])
    for results in (
        gradients_of(grad_wire_dtype=E4),
        gradients_of(grad_wire_dtype=E4, rounding="stochastic"),
    ):
        for result, each in zip(results, exact, strict=True):
            assert not torch.equal(result, each)
            # Errors of a sixteenth, or of an eighth, that partly cancel.
            assert (result - each).norm() < each.norm() / 8


def test_attention_rounds_the_gradients_that_it_is_told_to(ranks: Ranks):
    ranks.run(2, gradients_in_attention)


def alone(communicator: DeviceCommunicatorBase) -> None:
    x = torch.randn(1, 4, 6, 16)
    assert communicator.all_to_all_4D(x, wire_dtype=E4) is x


def test_one_rank_sends_nothing_and_rounds_nothing(ranks: Ranks):
    ranks.run(1, alone)


def test_a_message_is_little_more_than_half_of_bfloat16():
    x = torch.randn(2, 30, 8, 128).bfloat16()
    (part,) = _as_messages(0, x, E4, None, 2, 1, 4, 1)
    (sent,) = part.encode()
    assert sent.nbytes / x.nbytes <= 0.52
    assert (part.scatter, part.gather) == (Split(1), Split(2))
    payload_bytes = x.numel() // 4
    assert sent.shape[-1] % 16 == payload_bytes % 16 == 0, "rows are aligned in every message"
