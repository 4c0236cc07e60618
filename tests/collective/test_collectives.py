"""Values: every collective against slicing the global tensor, bit for bit."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from large_tensors import entry_by_entry
from ranks import Ranks
from torch.utils._python_dispatch import TorchDispatchMode

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.collective import messages
from fastvideo_comm.collective.layout import Split

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.complex128,
)
# A number is the first so many ranks; the tuples are groups that are not WORLD.
GROUPS = st.sampled_from((1, 2, 3, 4, (1, 3), (1, 2, 3), (2,)))
STRIDES = st.sampled_from(("contiguous", "chunk", "transposed", "stepped", "expanded", "offset"))


def values(shape: list[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random bits that are a valid value of `dtype`, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_complex:
        parts = torch.randint(-99, 99, (2, *shape), generator=generator)
        return torch.complex(parts[0].double(), parts[1].double()).to(dtype)
    numbers = torch.randint(-99, 99, shape, generator=generator)
    return numbers % 2 == 0 if dtype == torch.bool else numbers.to(torch.float32).to(dtype)


def restride(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """The same values with other strides."""
    if kind == "chunk":  # of a fused projection
        return torch.cat((tensor, tensor, tensor), -1).chunk(3, -1)[1]
    if kind == "transposed":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "stepped":
        return torch.stack((tensor, tensor), -1)[..., 0]
    if kind == "expanded":  # the values of the first entry of dim 0 throughout
        return tensor[:1].expand(tensor.shape)
    if kind == "offset":
        return torch.cat((tensor.flatten()[:1], tensor.flatten()))[1:].view(tensor.shape)
    return tensor.contiguous()


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, with shape and dtype."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert torch.equal(as_bytes(actual), as_bytes(expected))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def both_directions(
    communicator: DeviceCommunicatorBase,
    shape: list[int],
    dtype: torch.dtype,
    kind: str,
    seed: int,
) -> None:
    batch, sequence, heads, width = shape
    ranks, rank = communicator.world_size, communicator.rank
    whole = values([batch, sequence * ranks, heads * ranks, width], dtype, seed)
    if kind == "expanded" and batch:
        whole = whole[:1].expand(whole.shape).clone()
    by_sequence, by_heads = whole.chunk(ranks, 1)[rank], whole.chunk(ranks, 2)[rank]
    there = communicator.all_to_all_4D(restride(by_sequence, kind))
    same(there, by_heads)
    back = communicator.all_to_all_4D(restride(by_heads, kind), 1, 2)
    same(back, by_sequence)
    # At world size 1 it is the input itself, with the input's strides.
    assert ranks == 1 or (there.is_contiguous() and back.is_contiguous())


@given(
    group=GROUPS,
    shape=st.tuples(*[st.integers(0, 3), *[st.integers(1, 5)] * 3]),
    dtype=st.sampled_from(DTYPES),
    kind=STRIDES,
    seed=st.integers(0, 99),
)
def test_all_to_all_4D_is_the_global_tensor_sliced_the_other_way(
    ranks: Ranks, group, shape, dtype, kind, seed
):
    ranks.run(group, both_directions, list(shape), dtype, kind, seed)


@pytest.mark.parametrize("size", [2, 3])
def test_all_to_all_4D_of_a_production_size(ranks: Ranks, size):
    """4 MiB a rank: past every threshold."""
    ranks.run(size, both_directions, [2, 341, 8, 128], torch.float32, "transposed", 1)


def joined_and_parted(
    communicator: DeviceCommunicatorBase,
    shape: list[int],
    dim: int,
    dtype: torch.dtype,
    kind: str,
    seed: int,
) -> None:
    ranks, rank = communicator.world_size, communicator.rank
    shape[dim] *= ranks
    whole = values(shape, dtype, seed)
    if kind == "expanded":
        whole = whole[:1].expand(whole.shape).clone()
    mine = restride(whole.chunk(ranks, dim)[rank].clone(), kind)
    if kind == "expanded" and dim == 0:  # every rank's entries are copies of its first
        whole = torch.cat([part[:1].expand(part.shape) for part in whole.chunk(ranks, 0)])
    same(communicator.all_gather(mine, dim), whole)
    same(communicator.all_gather(mine, dim - len(shape)), whole)
    for dst in range(ranks):
        gathered = communicator.gather(mine, dst, dim)
        if rank == dst:
            same(gathered, whole)
        else:
            assert gathered is None
    if ranks > 1:
        same(communicator.slice(restride(whole, "stepped"), dim), mine)


@given(
    group=GROUPS,
    shape=st.lists(st.integers(1, 4), min_size=3, max_size=5),
    dim=st.integers(0, 4),
    dtype=st.sampled_from(DTYPES),
    kind=STRIDES,
    seed=st.integers(0, 99),
)
def test_all_gather_gather_and_slice_agree_with_the_global_tensor(
    ranks: Ranks, group, shape, dim, dtype, kind, seed
):
    ranks.run(group, joined_and_parted, shape, dim % len(shape), dtype, kind, seed)


REDUCTIONS = {
    dist.ReduceOp.SUM: lambda stacked: stacked.sum(0),
    dist.ReduceOp.AVG: lambda stacked: stacked.sum(0) / len(stacked),
    dist.ReduceOp.PRODUCT: lambda stacked: stacked.prod(0),
    dist.ReduceOp.MIN: lambda stacked: stacked.amin(0),
    dist.ReduceOp.MAX: lambda stacked: stacked.amax(0),
}


def reduced(communicator: DeviceCommunicatorBase, shape: list[int], kind: str, seed: int) -> None:
    # Small integers in fp64: no reduction rounds, whatever its order.
    stacked = (values([communicator.world_size, *shape], torch.int64, seed) % 7).double()
    if kind == "expanded":
        stacked = stacked[:, :1].expand(stacked.shape).clone()
    mine = restride(stacked[communicator.rank], kind)
    before = mine.clone()
    for op, reference in REDUCTIONS.items():
        same(communicator.all_reduce(mine, op), reference(stacked))
    same(communicator.all_reduce(mine, None), stacked.sum(0))
    same(communicator.all_reduce(mine), stacked.sum(0))
    assert torch.equal(mine, before)
    bits = stacked.to(torch.int64)
    for op, function in (
        (dist.ReduceOp.BAND, torch.bitwise_and),
        (dist.ReduceOp.BOR, torch.bitwise_or),
        (dist.ReduceOp.BXOR, torch.bitwise_xor),
    ):
        expected = bits[0]
        for other in bits[1:]:
            expected = function(expected, other)
        same(communicator.all_reduce(mine.to(torch.int64), op), expected)


@given(
    group=GROUPS,
    shape=st.lists(st.integers(1, 4), min_size=3, max_size=4),
    kind=STRIDES,
    seed=st.integers(0, 99),
)
def test_all_reduce_reduces_every_op_without_touching_its_input(
    ranks: Ranks, group, shape, kind, seed
):
    ranks.run(group, reduced, shape, kind, seed)


def summed_parts(communicator: DeviceCommunicatorBase, dtype: torch.dtype) -> None:
    ranks, rank = communicator.world_size, communicator.rank
    stacked = values([ranks, 2, 3 * ranks, 5], torch.float32, 1).to(dtype) % 7
    if dtype.is_complex:
        stacked = stacked.real + 1j * stacked.real.flip(0)
    group = communicator._runner.group
    same(
        messages.reduce_scatter(group, restride(stacked[rank], "stepped"), Split(1)),
        stacked.sum(0).to(dtype).chunk(ranks, 1)[rank],
    )
    same(communicator.all_reduce(stacked[rank]), stacked.sum(0).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int32])
def test_reduce_scatter_is_a_slice_of_the_sum(ranks: Ranks, dtype):
    for size in (2, 3, (1, 3)):
        ranks.run(size, summed_parts, dtype)


def sent_around(communicator: DeviceCommunicatorBase, dtype: torch.dtype, kind: str) -> None:
    ranks, rank = communicator.world_size, communicator.rank
    stacked = values([ranks, 2, 3, 5], dtype, 3)
    if kind == "expanded":
        stacked = stacked[:, :1].expand(stacked.shape).clone()
    tensor = restride(stacked[rank], kind)
    # Without dst and src: to the next rank, from the previous one.
    if rank % 2 == 0:
        communicator.send(tensor)
        if ranks % 2 == 0 or rank:
            received = communicator.recv(tensor.shape, dtype)
            same(received, stacked[rank - 1])
    else:
        same(communicator.recv(tensor.shape, dtype), stacked[rank - 1])
        if ranks % 2 == 0 or rank < ranks - 1:
            communicator.send(tensor)
    if rank == 0:
        communicator.send(tensor[0], dst=ranks - 1)
        communicator.send(torch.tensor(7, dtype=torch.int16), ranks - 1)
    elif rank == ranks - 1:
        same(communicator.recv(tensor[0].shape, dtype, src=0), stacked[0, 0])
        assert communicator.recv(torch.Size(()), torch.int16, 0).item() == 7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["contiguous", "transposed", "expanded"])
def test_send_and_recv_move_every_dtype_to_a_rank_of_the_group(ranks: Ranks, dtype, kind):
    ranks.run((1, 3), sent_around, dtype, kind)
    ranks.run(4, sent_around, dtype, kind)


class WrittenBytes(TorchDispatchMode):
    """Counts the bytes that anything but an exchange writes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.name()
        allocates = any(word in name for word in ("empty", "set_", "detach", "resize_"))
        if not (function.is_view or allocates or name.startswith("c10d::")):
            for tensor in result if isinstance(result, list | tuple) else (result,):
                self.count += tensor.numel() * tensor.element_size()
            self.names.append(name)
        return result


def passes(communicator: DeviceCommunicatorBase, batch: int) -> None:
    """The table of local passes: bytes written around an exchange, in units of the tensor."""
    with entry_by_entry():
        count_passes(communicator, batch)


def count_passes(communicator: DeviceCommunicatorBase, batch: int) -> None:
    ranks = communicator.world_size
    x = torch.rand(batch, 6, 2 * ranks, 8, requires_grad=True)
    y = torch.rand(batch, 6 * ranks, 2, 8, requires_grad=True)
    unit = x.numel() * x.element_size()
    fused = torch.rand(batch, 6, 3 * 2 * ranks * 8).chunk(3, -1)[1].unflatten(-1, (-1, 8))
    by_head = torch.rand(batch, 2 * ranks, 6, 8).transpose(1, 2)
    by_rank = torch.rand(ranks, batch, 6, 16).permute(1, 2, 0, 3)  # the messages, side by side
    gathers = batch == 1  # dims before dim 1 have size 1
    for count, call in (
        (1, lambda: communicator.all_to_all_4D(x)),
        (1, lambda: communicator.all_to_all_4D(fused)),  # read in place
        (1, lambda: communicator.all_to_all_4D(by_head)),
        (0 if gathers else 1, lambda: communicator.all_to_all_4D(by_rank)),
        (1, lambda: communicator.all_to_all_4D(y, 1, 2)),
        (1, lambda: communicator.all_to_all_4D(y.detach(), 1, 2)),
        (0, lambda: communicator.all_gather(x, 0)),
        (0 if gathers else ranks, lambda: communicator.all_gather(x, 1)),
        (ranks, lambda: communicator.all_gather(x, -1)),
        (1, lambda: communicator.all_gather(by_head, 0)),
        (1, lambda: communicator.all_reduce(x)),
        (1 / ranks, lambda: communicator.slice(x, 2)),
    ):
        with WrittenBytes() as written:
            call()
        assert written.count == count * unit, (count, written.names)
    sums = ranks - 1  # of a reduce_scatter, each written once
    backwards = (
        (1, lambda: communicator.all_to_all_4D(x), x),
        (1, lambda: communicator.all_to_all_4D(y, 1, 2), y),
        (sums, lambda: communicator.all_gather(x, 0), x),
        (sums + (0 if gathers else ranks), lambda: communicator.all_gather(x, 1), x),
    )
    for count, call, leaf in backwards:
        output = call()
        grad_output = torch.rand_like(output)
        with WrittenBytes() as written:
            torch.autograd.grad(output, leaf, grad_output)
        assert written.count == count * unit, (count, written.names)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_no_local_pass_but_those_of_the_table(ranks: Ranks, size, batch):
    ranks.run(size, passes, batch, ways=["messages"])


def interleaved(communicator: DeviceCommunicatorBase) -> None:
    world = DeviceCommunicatorBase(dist.group.WORLD)
    for step in range(5):
        a = values([2, 4, 6, 4], torch.float32, step)
        x = communicator.all_to_all_4D(a.chunk(2, 1)[communicator.rank])
        b = values([1, 8, 4, 2], torch.bfloat16, step)
        y = world.all_to_all_4D(b.chunk(4, 2)[world.rank], 1, 2)
        same(communicator.all_to_all_4D(x, 1, 2), a.chunk(2, 1)[communicator.rank])
        same(y, b.chunk(4, 1)[world.rank])


def pairs_and_world(communicator: DeviceCommunicatorBase) -> None:
    mine = (0, 1) if communicator.rank < 2 else (2, 3)
    groups = {pair: dist.new_group(list(pair)) for pair in ((0, 1), (2, 3))}
    interleaved(DeviceCommunicatorBase(groups[mine]))


def test_two_communicators_interleave(ranks: Ranks):
    ranks.run(4, pairs_and_world)


def single_elements(communicator: DeviceCommunicatorBase, dtype: torch.dtype) -> None:
    """One element is contiguous whatever its stride."""
    ranks, rank = communicator.world_size, communicator.rank
    x = values([6], dtype, 1)[::2][rank : rank + 1]
    assert x.stride() == (2,)
    whole = values([6], dtype, 1)[::2][:ranks].contiguous()
    same(communicator.all_gather(x, 0), whole)
    gathered = communicator.gather(x, 0, 0)
    if rank == 0:
        same(gathered, whole)
        communicator.send(x, 1)
    if rank == 1:
        same(communicator.recv((1,), dtype, 0), whole[:1])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int16, torch.float8_e4m3fn])
def test_a_single_element_of_any_stride(ranks: Ranks, dtype):
    ranks.run(3, single_elements, dtype)


def in_memory_of_its_own(communicator: DeviceCommunicatorBase) -> None:
    ranks = communicator.world_size
    for dim in (0, 1, -1):
        for sizes in (None, "auto", [2 * ranks, *[0] * (ranks - 1)]):
            x = torch.zeros([2 * ranks] * 3)
            part = communicator.slice(x, dim, scatter_sizes=sizes)
            part.fill_(1.0)
            assert not x.any(), (dim, sizes)
    torch._dynamo.reset()
    traced = torch.compile(lambda x: communicator.slice(x, 0), backend="aot_eager", fullgraph=True)
    traced(x).fill_(1.0)
    assert not x.any()


def test_a_slice_is_no_alias_of_what_it_was_cut_from(ranks: Ranks):
    ranks.run(2, in_memory_of_its_own)
