"""FastVideo's own GroupCoordinator, ops and attention through this library, on gloo ranks.

The reference is FastVideo itself: its `DeviceCommunicatorBase`, which is what runs on GPUs. (Its
CPU communicator gives the same values, but no gradients of all_gather and all_reduce.)
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import types
from collections.abc import Callable
from typing import Any

import peer_wheels
import pytest
import torch
import torch.distributed as dist
from fastvideo_package import make_groups
from ranks import Ranks

from fastvideo_comm import DeviceCommunicatorBase, DistributedAutograd
from fastvideo_comm.integrations import fastvideo as integration
from fastvideo_comm.integrations.installation import IntegrationError

needs_fastvideo = pytest.mark.skipif(
    not peer_wheels.is_there("fastvideo"), reason=peer_wheels.how_to_install("fastvideo")
)
Results = dict[str, list[torch.Tensor | None]]
BASE = "fastvideo.distributed.device_communicators.base_device_communicator"


def with_gradients(
    call: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]], *shapes: tuple[int, ...]
) -> list[torch.Tensor | None]:
    """Outputs and gradients of a call, from inputs that depend on the rank."""
    generator = torch.Generator().manual_seed(17 + dist.get_rank())
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    # Not leaves: what an op does to its input in place is seen here and not refused.
    output = call(*[x * 1.0 for x in inputs])
    outputs = [y for y in (output if isinstance(output, tuple) else (output,)) if y is not None]
    weights = [torch.randn(y.shape, generator=generator) for y in outputs]
    sum((y * w).sum() for y, w in zip(outputs, weights, strict=True)).backward()
    return [*[y.detach() for y in outputs], *[x.grad for x in inputs]]


def ops(state: Any) -> Results:
    """Every differentiable op of `communication_op` and of the coordinator."""
    op = importlib.import_module("fastvideo.distributed.communication_op")
    group = state.get_sp_group()
    size = group.world_size
    x, y = (2, 3, 2 * size, 5), (2, 3 * size, 2, 5)
    return {
        "all_to_all_4D to heads": with_gradients(op.sequence_model_parallel_all_to_all_4D, x),
        "all_to_all_4D to sequence": with_gradients(
            lambda t: op.sequence_model_parallel_all_to_all_4D(t, 1, 2), y
        ),
        **{
            f"all_gather {dim}": with_gradients(
                lambda t, dim=dim: op.sequence_model_parallel_all_gather(t, dim), x
            )
            for dim in (-1, 0, 1, 2)
        },
        "all_gather_with_unpad": with_gradients(
            lambda t: op.sequence_model_parallel_all_gather_with_unpad(t, 3 * size - 1, 1), x
        ),
        "shard": with_gradients(
            lambda t: op.sequence_model_parallel_shard(t, 1)[0], (2, 3 * size - 1, 4)
        ),
        "shard, not scaled": with_gradients(lambda t: group.shard(t, 0, scale_grad=False), (8, 3)),
        "tensor all_reduce": with_gradients(op.tensor_model_parallel_all_reduce, (3, 5)),
        "tensor all_gather": with_gradients(op.tensor_model_parallel_all_gather, (3, 5)),
    }


def attention(state: Any) -> Results:
    """DistributedAttention, plain, with padding and rotary embedding, and with replicated text."""
    layer = importlib.import_module("fastvideo.attention.layer")
    context = importlib.import_module("fastvideo.forward_context")
    sdpa = importlib.import_module("fastvideo.attention.backends.sdpa")
    layer.get_attn_backend = lambda *_, **__: sdpa.SDPABackend  # the CPU platform names none
    size = state.get_sp_world_size()
    heads, head_size, part = 2 * size, 8, 3
    module = layer.DistributedAttention(heads, head_size)
    qkv, text = [(1, part, heads, head_size)] * 3, [(1, 2, heads, head_size)] * 3
    length = part * size - 1
    angles = torch.arange(length)[:, None] * torch.arange(1, head_size // 2 + 1)
    rotary = (angles.cos(), angles.sin())
    with context.set_forward_context(current_timestep=0, attn_metadata=None):
        return {
            "attention": with_gradients(module, *qkv),
            "attention, padded": with_gradients(
                lambda q, k, v: module(q, k, v, original_seq_len=length, freqs_cis=rotary), *qkv
            ),
            "attention with text": with_gradients(
                lambda q, k, v, *t: module(q, k, v, None, *t), *qkv, *text
            ),
        }


def use_base_communicator(state: Any) -> None:
    """FastVideo's differentiable communicator, the one of its GPU classes, on gloo."""
    base = importlib.import_module(BASE)
    for group in (state.get_sp_group(), state.get_tp_group()):
        group.device_communicator = base.DeviceCommunicatorBase(
            group.cpu_group, group.device, group.device_group, group.unique_name
        )


_reduce_scatter = dist.reduce_scatter_tensor


def flat_reduce_scatter(output: torch.Tensor, input_: torch.Tensor, **options: Any) -> None:
    """NCCL takes the shapes that FastVideo's backward of all_gather passes, gloo only flat ones."""
    _reduce_scatter(output.view(-1), input_.view(-1), **options)


def compare(communicator: DeviceCommunicatorBase, size: int, which: str) -> list[str]:
    """Names of the results that are not FastVideo's."""
    results = {"ops": ops, "attention": attention}[which]
    state = make_groups(size)
    use_base_communicator(state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "reduce_scatter_tensor", flat_reduce_scatter)
        expected = results(state)
    state.destroy_model_parallel()
    with integration.install():
        make_groups(size)
        assert type(state.get_sp_group().device_communicator) is integration.FastVideoCommunicator
        got = results(state)
        state.destroy_model_parallel()
    differ = []
    for name, tensors in expected.items():
        assert len(tensors) == len(got[name])
        for index, (theirs, ours) in enumerate(zip(tensors, got[name], strict=True)):
            # Exchanges move bits; sums over ranks may be taken in another order.
            if ours is None or theirs is None or not torch.allclose(ours, theirs, 1e-5, 1e-6):
                differ.append(f"{name} {index}")
    return differ


@needs_fastvideo
@pytest.mark.parametrize("which", ["ops", "attention"])
@pytest.mark.parametrize("size", [2, 4])
def test_values_and_gradients_are_those_of_fastvideo(ranks: Ranks, size: int, which: str):
    assert ranks.run(4, compare, size, which) == [[]] * 4


def coordinator_calls(communicator: DeviceCommunicatorBase) -> None:
    with integration.install():
        state = make_groups(2)
        group = state.get_sp_group()
        rank = group.rank_in_group
        x = torch.full((2, 3), float(rank))
        assert group.all_reduce(x).tolist() == [[1.0] * 3] * 2
        assert x[0, 0] == rank, "all_reduce must leave its input as it was"
        assert group.all_reduce(x, dist.ReduceOp.MAX)[0, 0] == 1
        gathered = group.gather(x, dst=1, dim=0)
        assert (gathered is not None) == (rank == 1)
        if rank == 0:
            group.send(x + 7)
        else:
            assert group.recv(x.size(), x.dtype)[0, 0] == 7
        with pytest.raises(
            ValueError, match=r"all_to_all_4D on rank .* in group 'sp:\d+': .*P|div"
        ):
            group.all_to_all_4D(torch.zeros(1, 2, 3, 4))
        state.destroy_model_parallel()


@needs_fastvideo
def test_the_other_calls_of_a_group_coordinator(ranks: Ranks):
    ranks.run(4, coordinator_calls)


def installed_and_undone(communicator: DeviceCommunicatorBase) -> None:
    state = make_groups(2)
    base = importlib.import_module(BASE)
    names = {
        (module.__name__, name): value
        for module in list(sys.modules.values())
        if getattr(module, "__name__", "").startswith("fastvideo.")
        for name, value in vars(module).items()
        if isinstance(value, type)
    }
    coordinator = state.get_sp_group()
    old = coordinator.device_communicator
    installation = integration.install()
    assert integration.install() is installation, "a second install must change nothing"
    assert base.DistributedAutograd is DistributedAutograd
    assert state.StatelessProcessGroup is integration.FastVideoStatelessProcessGroup
    assert f"{BASE}.DeviceCommunicatorBase" in installation.replaced
    assert type(coordinator.device_communicator) is integration.FastVideoCommunicator
    npu = sys.modules["fastvideo.distributed.device_communicators.npu_communicator"]
    assert not issubclass(npu.NpuCommunicator, DeviceCommunicatorBase)
    integration.uninstall()
    integration.uninstall()
    assert coordinator.device_communicator is old
    assert coordinator.all_to_all_4D(torch.zeros(1, 2, 4, 2)).shape == (1, 4, 2, 2)
    changed = {k for k, v in names.items() if getattr(sys.modules[k[0]], k[1]) is not v}
    assert not changed
    state.destroy_model_parallel()


@needs_fastvideo
def test_groups_that_exist_are_replaced_and_everything_can_be_put_back(ranks: Ranks):
    ranks.run(4, installed_and_undone)


def without_install(communicator: DeviceCommunicatorBase) -> None:
    state = make_groups(2)
    base = importlib.import_module(BASE)
    assert base.DeviceCommunicatorBase.__module__ == BASE
    communicator_of_group = state.get_sp_group().device_communicator
    assert not isinstance(communicator_of_group, DeviceCommunicatorBase)
    state.destroy_model_parallel()


@needs_fastvideo
def test_importing_the_integration_changes_nothing(ranks: Ranks):
    ranks.run(4, without_install)


def test_without_fastvideo_the_error_names_the_package_and_the_version(monkeypatch):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(IntegrationError, match=r"fastvideo must be installed .* fastvideo 0\.2\.1"):
        integration.install()
    integration.uninstall()


def test_an_unknown_version_is_refused_before_anything_is_imported(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9.9")
    with pytest.raises(IntegrationError, match=r"known version \(0\.2\.1\), got 0\.9\.9; .*allow"):
        integration.install()


def test_a_version_that_lacks_a_name_is_refused_and_left_as_it_was(monkeypatch):
    names = (
        BASE,
        "fastvideo.distributed.parallel_state",
        "fastvideo.distributed.utils",
        "fastvideo.distributed.device_communicators.cpu_communicator",
        "fastvideo.distributed.device_communicators.cuda_communicator",
    )
    modules = {name: types.ModuleType(name) for name in names}
    original = type("DeviceCommunicatorBase", (), {})
    modules[BASE].DeviceCommunicatorBase = original
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        for parent in (name.rsplit(".", i)[0] for i in range(1, name.count(".") + 1)):
            monkeypatch.setitem(sys.modules, parent, modules.get(parent, types.ModuleType(parent)))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9.9")
    with pytest.raises(IntegrationError, match=r"cpu_communicator must have CpuCommunicator, got"):
        integration.install(allow_unknown_version=True)
    assert modules[BASE].DeviceCommunicatorBase is original
