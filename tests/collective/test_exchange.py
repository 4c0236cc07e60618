"""Several tensors, uneven shares, grouped heads, handles: bit-exact against the global tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from large_tensors import entry_by_entry
from ranks import Ranks
from test_autograd import one_function
from test_collectives import (
    DTYPES,
    GROUPS,
    STRIDES,
    WrittenBytes,
    restride,
    same,
    values,
)

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.handle import AsyncHandle
from fastvideo_comm.utils import near_even_sizes


def sizes_of(total: int, parts: int, generator: torch.Generator) -> list[int]:
    """Any sizes, zeros among them, the same on every rank."""
    cuts = torch.randint(0, total + 1, (parts - 1,), generator=generator).sort().values.tolist()
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


def finish(result: Any) -> Any:
    return result.wait() if isinstance(result, AsyncHandle) else result


def uneven(
    communicator: DeviceCommunicatorBase,
    shape: list[int],
    heads: list[int],
    dtype: torch.dtype,
    kind: str,
    seed: int,
    async_op: bool,
) -> None:
    ranks, rank = communicator.world_size, communicator.rank
    generator = torch.Generator().manual_seed(seed)
    batch, sequence, width = shape
    rows = sizes_of(sequence, ranks, generator)
    wholes = [
        values([batch, sequence, number, width], dtype, seed + i) for i, number in enumerate(heads)
    ]
    if kind == "expanded":
        wholes = [whole[:1].expand(whole.shape).clone() for whole in wholes]
    columns = [sizes_of(number, ranks, generator) for number in heads]
    by_sequence = [restride(whole.split(rows, 1)[rank], kind) for whole in wholes]
    by_heads = [
        restride(whole.split(sizes, 2)[rank], kind)
        for whole, sizes in zip(wholes, columns, strict=True)
    ]
    there = communicator.all_to_all_4D(
        by_sequence, scatter_sizes=columns, gather_sizes=rows, async_op=async_op
    )
    back = communicator.all_to_all_4D(
        by_heads, 1, 2, scatter_sizes=rows, gather_sizes=columns, async_op=async_op
    )
    # One tensor alone, its sizes asked of the ranks; in flight together with the others.
    alone = communicator.all_to_all_4D(
        by_sequence[0], scatter_sizes=columns[0], gather_sizes="auto", async_op=async_op
    )
    for actual, expected in zip(finish(there), by_heads, strict=True):
        same(actual, expected)
    for actual, expected in zip(finish(back), by_sequence, strict=True):
        same(actual, expected)
    same(finish(alone), by_heads[0])


@given(
    group=GROUPS,
    shape=st.tuples(st.integers(0, 3), st.integers(0, 7), st.integers(1, 3)),
    heads=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    kind=STRIDES,
    seed=st.integers(0, 99),
    async_op=st.booleans(),
)
def test_any_sizes_of_any_tensors_are_the_global_tensor_sliced_the_other_way(
    ranks: Ranks, group, shape, heads, dtype, kind, seed, async_op
):
    ranks.run(group, uneven, list(shape), heads, dtype, kind, seed, async_op)


def packed(communicator: DeviceCommunicatorBase, batch: int) -> None:
    with entry_by_entry():
        exchange_packed(communicator, batch)


def exchange_packed(communicator: DeviceCommunicatorBase, batch: int) -> None:
    ranks, rank = communicator.world_size, communicator.rank
    whole = values([batch, 5 * ranks, 3 * 2 * ranks * 4], torch.bfloat16, 1)
    mine = whole.chunk(ranks, 1)[rank]
    # The three chunks of one fused projection, read in place: one pass over them, and nothing else.
    fused = [chunk.unflatten(-1, (-1, 4)) for chunk in mine.chunk(3, -1)]
    with WrittenBytes() as written:
        q, k, v = communicator.all_to_all_4D(fused)
    assert written.count == mine.numel() * 2, written.names
    for actual, chunk in zip((q, k, v), whole.chunk(3, -1), strict=True):
        same(actual, chunk.unflatten(-1, (-1, 4)).chunk(ranks, 2)[rank])
        assert actual.is_contiguous()
    with WrittenBytes() as written:
        back = communicator.all_to_all_4D([q, k, v], 1, 2)
    assert written.count == mine.numel() * 2, written.names
    for actual, expected in zip(back, fused, strict=True):
        same(actual, expected)
    # Uneven sequences are received in place too.
    rows = [3 + rank for rank in range(ranks)]
    own = torch.rand(batch, rows[rank], ranks, 4)
    with WrittenBytes() as written:
        gathered = communicator.all_to_all_4D(own, gather_sizes=rows)
    assert written.count == own.numel() * 4, written.names
    with WrittenBytes() as written:
        returned = communicator.all_to_all_4D(gathered, 1, 2, scatter_sizes=rows)
    same(returned, own)
    assert written.count == own.numel() * 4, written.names


@pytest.mark.parametrize("batch", [1, 2])
def test_packed_chunks_of_a_projection_take_one_pass_and_no_cat(ranks: Ranks, batch):
    ranks.run(3, packed, batch, ways=["messages"])


def mixed(communicator: DeviceCommunicatorBase) -> None:
    ranks, rank = communicator.world_size, communicator.rank
    a = values([1, 2 * ranks, ranks, 3], torch.float32, 1)
    b = values([2, 4 * ranks, 2 * ranks, 5], torch.int16, 2)
    x, y = communicator.all_to_all_4D((a.chunk(ranks, 1)[rank], b.chunk(ranks, 1)[rank]))
    same(x, a.chunk(ranks, 2)[rank])
    same(y, b.chunk(ranks, 2)[rank])


def test_packed_tensors_may_differ_in_everything(ranks: Ranks):
    ranks.run(2, mixed)


def grouped(communicator: DeviceCommunicatorBase, num_heads: int, async_op: bool) -> None:
    ranks, rank = communicator.world_size, communicator.rank
    replicas = ranks // num_heads
    rows = [rank % 3 for rank in range(ranks)]  # some ranks have no sequence at all
    q_whole = values([2, sum(rows), 2 * ranks, 3], torch.float64, 1)
    k_whole = values([2, sum(rows), num_heads, 3], torch.float64, 2)
    q = q_whole.split(rows, 1)[rank].clone().requires_grad_()
    k = k_whole.split(rows, 1)[rank].clone().requires_grad_()
    heads, key = finish(communicator.all_to_all_4D((q, k), gather_sizes=rows, async_op=async_op))
    same(heads, q_whole.chunk(ranks, 2)[rank])
    mine = rank // replicas
    same(key, k_whole[:, :, mine : mine + 1])
    (key * (rank + 1)).sum().backward()
    # The gradient of a head is the sum over the ranks that hold it.
    expected = torch.tensor(
        [
            float(sum(range(head * replicas + 1, (head + 1) * replicas + 1)))
            for head in range(num_heads)
        ],
        dtype=torch.float64,
    )
    assert torch.equal(k.grad, expected[:, None].expand_as(k))


@pytest.mark.parametrize(("size", "num_heads"), [(2, 1), (4, 2), (4, 1), ((0, 2, 3), 1)])
@pytest.mark.parametrize("async_op", [False, True])
def test_scarce_key_heads_go_to_the_ranks_that_use_them_and_gradients_add(
    ranks: Ranks, size, num_heads, async_op
):
    ranks.run(size, grouped, num_heads, async_op)


ROWS = (2, 0, 1, 2)
VARIANTS: dict[str, Callable[[DeviceCommunicatorBase, torch.Tensor, bool], Any]] = {
    "packed": lambda c, x, a: c.all_to_all_4D((x, x.sin()), async_op=a),
    "grouped": lambda c, x, a: c.all_to_all_4D((x, x[:, :, :1]), async_op=a),
    "scatter_sizes": lambda c, x, a: c.all_to_all_4D(
        x, scatter_sizes=[c.world_size, *[0] * (c.world_size - 1)], async_op=a
    ),
    "way back": lambda c, x, a: c.all_to_all_4D((x, x * x), 1, 2, async_op=a),
    "one": lambda c, x, a: c.all_to_all_4D(x, async_op=a),
}


def checked(communicator: DeviceCommunicatorBase, name: str, async_op: bool) -> None:
    torch.manual_seed(0)
    ranks = communicator.world_size
    inputs = torch.rand(ranks, 1, ranks, ranks, 1, dtype=torch.float64, requires_grad=True)

    def call(x: torch.Tensor) -> torch.Tensor:
        result = finish(VARIANTS[name](communicator, x, async_op))
        outputs = result if isinstance(result, tuple) else (result,)
        # Ranks may have outputs of different sizes; gradcheck wants one shape.
        total = torch.stack([(output**2).sum() + output.sum() for output in outputs])
        return total * (communicator.rank + 1)

    function = one_function(communicator, call)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("async_op", [False, True])
def test_first_and_second_derivative_of_every_variant(ranks: Ranks, name, async_op):
    ranks.run(3, checked, name, async_op)


def alone(communicator: DeviceCommunicatorBase) -> None:
    x = torch.rand(1, 3, 5, 2)
    assert communicator.all_to_all_4D((x, x))[1] is x
    assert communicator.all_to_all_4D(x, scatter_sizes=[5], gather_sizes="auto") is x
    handle = communicator.all_to_all_4D([x], async_op=True)
    assert handle.is_completed()
    assert handle.wait()[0] is x


def test_world_size_1_returns_the_inputs_themselves(ranks: Ranks):
    ranks.run(1, alone)


X = torch.zeros(1, 4, 6, 2)
MISTAKES = [
    (X[:, :, :5], {}, r"divides, got 5 .*; scatter_sizes= shares it unevenly"),
    (X, {"scatter_sizes": [1, 2]}, r"scatter_sizes must add up to the 6 .*, got \[1, 2\]"),
    (X, {"scatter_sizes": []}, r"scatter_sizes must add up to the 6 .*, got \[\]"),
    (X, {"scatter_sizes": [1, 2, 3]}, r"scatter_sizes must hold world_size=2 sizes .*\[1, 2, 3\]"),
    (X, {"scatter_sizes": [7, -1]}, r"sizes of at least 0, got \[7, -1\]"),
    (X, {"scatter_sizes": "even"}, "scatter_sizes must be None, 'auto' or sizes, got 'even'"),
    (X, {"gather_sizes": [4]}, r"gather_sizes must hold world_size=2 sizes"),
    (X, {"gather_sizes": [5, 5]}, r"gather_sizes must hold the 4 at gather_dim=1 .* for rank \d"),
    ([X, X], {"scatter_sizes": [[3, 3]]}, "scatter_sizes must hold sizes for 2 tensors, got 1"),
    ([], {}, "input_ must hold at least one tensor, got an empty sequence"),
    ([X, X[0]], {}, r"must have 4 dims \[B, S, H, D\], got shape \[4, 6, 2\]"),
    ([X, X.to("meta")], {}, "must be on the communicator's cpu, got meta"),
    ([X, X[:, :, :3]], {}, r"world_size=2 divides, got 3"),
]


def mistaken(communicator: DeviceCommunicatorBase, index: int) -> None:
    input_, arguments, message = MISTAKES[index]
    where = rf"^all_to_all_4D on rank {communicator.rank} of 2 in group 'test': .*"
    with pytest.raises(ValueError, match=where + message):
        communicator.all_to_all_4D(input_, **arguments)


@pytest.mark.parametrize("index", range(len(MISTAKES)))
def test_sizes_that_do_not_fit_are_named_before_anything_is_sent(ranks: Ranks, index):
    ranks.run(2, mistaken, index)


def conventions(communicator: DeviceCommunicatorBase) -> None:
    """One loss that all ranks compute: its gradient is that of one process."""
    ranks, rank = communicator.world_size, communicator.rank
    whole = values([ranks, 2, 3], torch.float64, 1)
    weights = values([2, 3], torch.float64, 2)
    for op, reference in (
        (torch.distributed.ReduceOp.SUM, lambda all_: all_.sum(0)),
        (torch.distributed.ReduceOp.AVG, lambda all_: all_.mean(0)),
        (torch.distributed.ReduceOp.PRODUCT, lambda all_: all_.prod(0)),
        (torch.distributed.ReduceOp.MAX, lambda all_: all_.amax(0)),
    ):
        x, leaf = whole[rank].clone().requires_grad_(), whole.clone().requires_grad_()
        (communicator.all_reduce(x, op, grad="identity") * weights).sum().backward()
        (reference(leaf) * weights).sum().backward()
        # A product of three and the division by P may round differently.
        torch.testing.assert_close(x.grad, leaf.grad[rank], rtol=1e-15, atol=0)
        x.grad = None
        (communicator.all_reduce(x, op) * weights).sum().backward()
        torch.testing.assert_close(x.grad, ranks * leaf.grad[rank], rtol=1e-15, atol=0)
    for dim in (0, -1):
        x, leaf = whole[rank].clone().requires_grad_(), whole.clone().requires_grad_()
        joined = torch.cat(leaf.unbind(0), dim)
        factors = values(list(joined.shape), torch.float64, 3)
        (communicator.all_gather(x, dim, grad="slice") * factors).sum().backward()
        (joined * factors).sum().backward()
        assert torch.equal(x.grad, leaf.grad[rank])
    with pytest.raises(
        ValueError, match="grad must be one of 'reduce_scatter', 'slice', got 'sum'"
    ):
        communicator.all_gather(x, grad="sum")
    with pytest.raises(ValueError, match="grad must be one of 'all_reduce', 'identity', got 'x'"):
        communicator.all_reduce(x, grad="x")


def test_a_loss_that_all_ranks_share_is_counted_once(ranks: Ranks):
    ranks.run(3, conventions)


def twice(communicator: DeviceCommunicatorBase) -> None:
    group = communicator.cpu_group
    x = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)

    def replicated(x: torch.Tensor) -> torch.Tensor:
        mine = communicator.slice(x * x, 1)
        return communicator.all_gather(mine.sin(), 1, grad="slice")

    torch.manual_seed(0)
    x.data.copy_(torch.rand(2, 3))
    assert group.size() == 3
    assert torch.autograd.gradcheck(replicated, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(replicated, x, fast_mode=True)


def test_slice_and_its_gather_are_twice_differentiable_as_one_tensor(ranks: Ranks):
    ranks.run(3, twice)


def warm(communicator: DeviceCommunicatorBase) -> None:
    with entry_by_entry():
        _warm(communicator)


def _warm(communicator: DeviceCommunicatorBase) -> None:
    fresh = DeviceCommunicatorBase(communicator.cpu_group, unique_name="fresh", memory="off")
    ranks = fresh.world_size
    shape = (2, 70, 2 * ranks, 128)  # past the size that is allocated afresh
    fresh.warmup([shape, (1, 3, ranks, 4)], [torch.float32, torch.bfloat16, torch.int32])
    before = {wire.data_ptr() for wire in fresh._runner.group.buffers._free}
    assert before
    x = torch.rand(shape, requires_grad=True)
    fresh.all_to_all_4D(fresh.all_to_all_4D(x), 1, 2).sum().backward()
    assert {wire.data_ptr() for wire in fresh._runner.group.buffers._free} == before
    fresh.warmup(
        [(1, 2, 3, 4), (1, 2, 1, 4), [(2, 3, 5, 8), (1, 4, 0, 2)], [(1, 2, 4, 3), (1, 2, 1, 3)]]
    )
    fresh.warmup([[(1, 2, 9, 4), (1, 2, 3, 4)], [(1, 2, 5, 4), (1, 2, 3, 4)]])  # grouped, and not
    bad: list[tuple[Any, Any, type[Exception], str]] = [
        ([[(2, 3, 4)]], [torch.half], ValueError, r"must be 4 sizes .* each, got \(2, 3, 4\)$"),
        ([(1, 2, 4, -8)], [torch.half], ValueError, r"each, got \(1, 2, 4, -8\)$"),
        ((1, 2, 4, 8), [torch.half], TypeError, r"several \[B, s, H, D\], got 1 for one of them$"),
        ([(1, 2, 4, 8)], torch.half, TypeError, r"^warmup on rank .* such as \[torch.float16\]"),
    ]
    for shapes, dtypes, error, words in bad:
        with pytest.raises(error, match=words):
            fresh.warmup(shapes, dtypes)
    fresh.warmup([[(1, 5, 6, 2), (1, 5, 1, 2)]], [torch.float8_e4m3fn, torch.complex64])


def test_after_warmup_a_step_allocates_no_wire_buffer(ranks: Ranks):
    ranks.run(2, warm, ways=["messages"])


def traced(communicator: DeviceCommunicatorBase, name: str, grad: bool) -> None:
    torch._dynamo.reset()
    ranks, rank = communicator.world_size, communicator.rank
    rows = [3, 1, 0, 2][:ranks]
    calls: dict[str, Callable[..., Any]] = {
        "packed": lambda q, k: communicator.all_to_all_4D((q * 2, k, q)),
        "grouped": lambda q, k: communicator.all_to_all_4D((q, k[:, :, :1] * 2)),
        "uneven": lambda q, k: communicator.all_to_all_4D(
            [q[:, : rows[rank]] * 2, k[:, : rows[rank]]], gather_sizes=rows
        ),
        "async": lambda q, k: (communicator.all_to_all_4D(q, async_op=True).wait(), k * 2),
    }
    call = calls[name]
    q, k = torch.rand(2, 3, 2 * ranks, 4), torch.rand(2, 3, ranks, 4)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    leaves = [x.requires_grad_(grad) for x in (q, k)]
    expected, actual = call(*leaves), compiled(*leaves)
    for one, other in zip(expected, actual, strict=True):
        assert torch.equal(one, other)
    if not grad:
        return
    grads = [
        torch.autograd.grad(sum((output**2).sum() for output in outputs), (q, k))
        for outputs in (expected, actual)
    ]
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


# A gradient is the same exchange on either way.
@pytest.mark.parametrize(("way", "grad"), [("messages", True), ("memory", False)])
@pytest.mark.parametrize("name", ["packed", "grouped", "uneven", "async"])
def test_every_variant_traces_whole(ranks: Ranks, name, way, grad):
    ranks.run(2, traced, name, grad, ways=(way,))


def test_near_even_sizes_are_those_of_tensor_split():
    for size in range(12):
        for parts in range(1, 6):
            expected = [part.numel() for part in torch.empty(size).tensor_split(parts)]
            assert near_even_sizes(size, parts) == expected
    with pytest.raises(ValueError, match="num_parts must be at least 1, got 0"):
        near_even_sizes(3, 0)
    with pytest.raises(ValueError, match="size must not be negative, got -3"):
        near_even_sizes(-3, 1)
