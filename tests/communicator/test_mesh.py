"""Communicators made from meshes and groups, beside DDP and FSDP2: training steps on gloo ranks.

Each test compares with one process that holds the whole batch and the whole sequence.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, device_mesh
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from fastvideo_comm import DeviceCommunicatorBase

BATCH, SEQUENCE, HEADS, HEAD_DIM = 4, 12, 4, 3
WIDTH = HEADS * HEAD_DIM


class Attention(nn.Module):
    """One attention block; `ulysses` trades sequence for heads, `ring` gathers keys and values."""

    def __init__(
        self,
        ulysses: DeviceCommunicatorBase | None = None,
        ring: DeviceCommunicatorBase | None = None,
    ) -> None:
        super().__init__()
        self.ulysses, self.ring = ulysses, ring
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3 * HEADS, HEAD_DIM)).chunk(3, 2)
        if self.ulysses is not None:
            q, k, v = (self.ulysses.all_to_all_4D(t, 2, 1) for t in (q, k, v))
        if self.ring is not None:
            k, v = (self.ring.all_gather(t, 1) for t in (k, v))
        y = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
        if self.ulysses is not None:
            y = self.ulysses.all_to_all_4D(y, 1, 2)
        return x + self.out(y.flatten(2))


def make(*communicators: DeviceCommunicatorBase | None) -> nn.Sequential:
    """Two blocks with the same parameters on every rank."""
    torch.manual_seed(7)
    return nn.Sequential(Attention(*communicators), Attention(*communicators)).double()


def data() -> tuple[Tensor, Tensor]:
    """The whole batch and its targets, the same on every rank."""
    generator = torch.Generator().manual_seed(3)
    shape = (BATCH, SEQUENCE, WIDTH)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))


def step(model: nn.Module, x: Tensor, target: Tensor) -> None:
    """One SGD step. The mean over all tokens is the mean over ranks of each rank's mean."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ((model(x) - target) ** 2).mean().backward()
    optimizer.step()


def alone() -> dict[str, tuple[Tensor, Tensor]]:
    """Gradient and value of every parameter after the same step in one process."""
    model = make()
    step(model, *data())
    return trained(model)


def trained(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    def whole(tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    return {
        name.removeprefix("module."): (whole(p.grad), whole(p.detach()))
        for name, p in model.named_parameters()
    }


def assert_same(got: dict[str, tuple[Tensor, Tensor]]) -> None:
    expected = alone()
    assert got.keys() == expected.keys()
    for name, pair in expected.items():
        for ours, reference in zip(got[name], pair, strict=True):
            # float64 sums in another order
            torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12, msg=name)


def shares(dp: int, dp_size: int, sp: int, sp_size: int) -> tuple[Tensor, Tensor]:
    """This rank's part of the batch and of the sequence."""
    return tuple(t.chunk(dp_size, 0)[dp].chunk(sp_size, 1)[sp] for t in data())


def data_by_sequence(communicator: DeviceCommunicatorBase, wrapper: str) -> None:
    mesh = device_mesh((2, 2), ("dp", "sp"))
    sp = DeviceCommunicatorBase.from_mesh(mesh, "sp")
    assert (sp.world_size, sp.rank, sp.unique_name) == (2, mesh.get_local_rank("sp"), "sp")
    assert sp.ranks == [2 * mesh.get_local_rank("dp") + r for r in range(2)]
    model: nn.Module = make(sp)
    if wrapper == "ddp":
        model = DistributedDataParallel(model)
    else:
        whole = mesh._flatten("dp_sp") if wrapper == "fsdp2" else mesh
        for block in model:
            fully_shard(block, mesh=whole)
        fully_shard(model, mesh=whole)
    step(model, *shares(mesh.get_local_rank("dp"), 2, sp.rank, 2))
    assert_same(trained(model))


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "fsdp2 over two dims"])
def test_a_step_of_data_by_sequence_parallel_is_that_of_one_process(ranks: Ranks, wrapper: str):
    ranks.run(4, data_by_sequence, wrapper)


class Checkpointed(nn.Module):
    """Keeps no activations of `block`: its exchanges run once more in the backward."""

    def __init__(self, block: nn.Module, **options: Any) -> None:
        super().__init__()
        self.block, self.options = block, options

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, **self.options)


def checkpointed(communicator: DeviceCommunicatorBase, use_reentrant: bool) -> None:
    mesh = device_mesh((1, 4), ("dp", "sp"))
    sp = DeviceCommunicatorBase.from_mesh(mesh, "sp")
    model = DistributedDataParallel(make(sp))
    blocks = model.module
    for index, block in enumerate(blocks):
        blocks[index] = Checkpointed(block, use_reentrant=use_reentrant)
    step(model, shares(0, 1, sp.rank, 4)[0].requires_grad_(), shares(0, 1, sp.rank, 4)[1])
    assert_same({name.replace(".block", ""): pair for name, pair in trained(model).items()})


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_step_of_checkpointed_blocks_is_that_of_one_process(ranks: Ranks, use_reentrant: bool):
    ranks.run(4, checkpointed, use_reentrant)


def averaged(communicator: DeviceCommunicatorBase) -> None:
    model = make(communicator)
    average = AveragedModel(model)
    assert average.module[0].ulysses is communicator
    x, target = shares(0, 1, communicator.rank, 4)
    step(model, x, target)
    average.update_parameters(model)  # the first takes the model's parameters
    assert torch.equal(average(x), model(x))


def test_a_moving_average_of_a_model_exchanges_with_the_same_ranks(ranks: Ranks):
    ranks.run(4, averaged)


def ulysses_by_ring(communicator: DeviceCommunicatorBase) -> None:
    mesh = device_mesh((2, 2), ("ring", "ulysses"))
    ring, ulysses = (DeviceCommunicatorBase.from_mesh(mesh, name) for name in mesh.mesh_dim_names)
    model = DistributedDataParallel(make(ulysses, ring))
    # The ulysses ranks of one ring rank hold neighbouring parts of the sequence.
    step(model, *shares(0, 1, communicator.rank, 4))
    assert_same(trained(model))


def test_a_step_of_ulysses_by_ring_is_that_of_one_process(ranks: Ranks):
    ranks.run(4, ulysses_by_ring)


def passed_round(communicator: DeviceCommunicatorBase) -> None:
    """Ring attention proper: keys and values go round with send and recv, softmax is merged."""
    mesh = device_mesh((2, 2), ("ring", "ulysses"))
    ring, ulysses = (DeviceCommunicatorBase.from_mesh(mesh, name) for name in mesh.mesh_dim_names)
    generator = torch.Generator().manual_seed(5)
    shape = (3, BATCH, SEQUENCE, HEADS, HEAD_DIM)
    whole = torch.randn(shape, generator=generator, dtype=torch.float64)
    expected = scaled_dot_product_attention(*whole.transpose(2, 3)).transpose(1, 2)
    q, k, v = (ulysses.all_to_all_4D(t) for t in whole.chunk(4, 2)[communicator.rank])
    parts = []
    for turn in range(ring.world_size):
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * HEAD_DIM**-0.5
        parts.append((scores.logsumexp(-1), torch.einsum("bhqk,bkhd->bhqd", scores.softmax(-1), v)))
        if turn < ring.world_size - 1:
            pair = torch.stack((k, v))
            if ring.rank % 2 == 0:  # half of the ring sends first: send waits for its recv on gloo
                ring.send(pair)
                pair = ring.recv(pair.shape, pair.dtype)
            else:
                arrived = ring.recv(pair.shape, pair.dtype)
                ring.send(pair)
                pair = arrived
            k, v = pair
    weights = torch.stack([weight for weight, _ in parts]).softmax(0)
    merged = sum(w[..., None] * y for w, (_, y) in zip(weights, parts, strict=True))
    output = ulysses.all_to_all_4D(merged.transpose(1, 2), 1, 2)
    torch.testing.assert_close(output, expected.chunk(4, 1)[communicator.rank])


def test_ring_attention_over_send_and_recv_beside_ulysses(ranks: Ranks):
    ranks.run(4, passed_round)


def groups_and_meshes(communicator: DeviceCommunicatorBase) -> None:
    line = init_device_mesh("cpu", (4,))
    whole = DeviceCommunicatorBase.from_mesh(line)
    assert (whole.world_size, whole.unique_name, whole.device.type) == (4, "", "cpu")
    mesh = device_mesh((2, 2), ("dp", "sp"))
    by_number = DeviceCommunicatorBase.from_mesh(mesh, 1, unique_name="mine")
    assert by_number.device_group is mesh.get_group("sp")
    assert by_number.unique_name == "mine"
    names = [(mesh, 0), (mesh, -1), (mesh["sp"], None), (line, 0)]
    assert [DeviceCommunicatorBase.from_mesh(*each).unique_name for each in names] == [
        *("dp", "sp", "sp", "0")
    ]
    assert DeviceCommunicatorBase.from_mesh(mesh["dp"]).ranks == [
        communicator.rank % 2,
        communicator.rank % 2 + 2,
    ]
    with pytest.raises(ValueError, match=r"mesh_dim must be one of \('dp', 'sp'\) .* got None"):
        DeviceCommunicatorBase.from_mesh(mesh)
    group = mesh.get_group("sp")
    from_group = DeviceCommunicatorBase.from_group(group, unique_name="pair")
    assert from_group.device_group is from_group.cpu_group is group
    total = from_group.all_reduce(torch.tensor([float(communicator.rank)]))
    assert total.item() == (1.0 if communicator.rank < 2 else 5.0)
    with pytest.raises(TypeError, match="cpu_group must be a ProcessGroup"):
        DeviceCommunicatorBase.from_group(dist.GroupMember.NON_GROUP_MEMBER)


def test_from_mesh_and_from_group_are_on_the_ranks_that_were_asked_for(ranks: Ranks):
    ranks.run(4, groups_and_meshes)
