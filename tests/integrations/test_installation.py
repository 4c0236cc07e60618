"""What an installation replaces and puts back, and what the integrations hand on, without ranks."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.integrations import fastvideo
from fastvideo_comm.integrations.diffusers import (
    SeqAllToAllDim,
    TemplatedUlyssesAnythingAttention,
    TemplatedUlyssesAttention,
)
from fastvideo_comm.integrations.installation import Installation, installed_on
from fastvideo_comm.integrations.sequence_exchange import Communicators
from fastvideo_comm.integrations.yunchang import SeqAllToAll4D


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """A group of one rank, this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def module(monkeypatch: pytest.MonkeyPatch, name: str, **names: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    vars(made).update(names)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def test_a_name_is_replaced_in_the_modules_of_its_package_alone(monkeypatch):
    original, replacement = object(), object()
    names = ("pack", "pack.inner", "pack.inner.most", "packer", "pack_comm.inner", "a.pack")
    modules = [module(monkeypatch, name, kind=original, other=5) for name in names]
    installation = Installation("pack", "1", ())
    installation.replace(original, replacement)
    assert [each.kind is replacement for each in modules] == [True] * 3 + [False] * 3
    assert sorted(installation.replaced) == ["pack.inner.kind", "pack.inner.most.kind", "pack.kind"]
    installation.uninstall()
    assert all(each.kind is original for each in modules)


def test_what_was_done_last_is_undone_first():
    owner, order = types.SimpleNamespace(name="theirs"), []
    installation = Installation("pack", "1", ())
    installation.set(owner, "name", "first")
    installation.on_uninstall(lambda: order.append(owner.name))
    installation.set(owner, "name", "second")
    assert installation.replaced == ["SimpleNamespace.name"] * 2
    installation.uninstall()
    assert order == ["first"]
    assert owner.name == "theirs"
    installation.uninstall()
    assert order == ["first"]


DEVICES = "fastvideo.distributed.device_communicators"


def test_communicators_of_fastvideos_own_classes_are_replaced_and_no_others(group, monkeypatch):
    """Those of a subclass, such as an NPU's, stay; so does a group that has none, or is gone."""
    monkeypatch.setenv("FASTVIDEO_ULYSSES_A2A", "off")
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.2.1")
    kinds = {name: type(name, (), {}) for name in ("Base", "Cpu", "Cuda", "Ids", "Stateless")}
    npu = type("Npu", (kinds["Base"],), {})

    def coordinator(communicator: Any) -> Any:
        return types.SimpleNamespace(
            cpu_group=group,
            device=torch.device("mps"),
            device_group=group,
            unique_name="sp:0",
            device_communicator=communicator,
        )

    coordinators = [coordinator(kinds[name]()) for name in ("Base", "Cpu", "Cuda")]
    others = [coordinator(npu()), coordinator(None)]
    before = [each.device_communicator for each in (*coordinators, *others)]
    groups = {str(i): lambda each=each: each for i, each in enumerate([*coordinators, *others])}
    groups["gone"] = lambda: None
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    parts = {
        f"{DEVICES}.cpu_communicator": {"CpuCommunicator": kinds["Cpu"]},
        f"{DEVICES}.cuda_communicator": {"CudaCommunicator": kinds["Cuda"]},
        f"{DEVICES}.npu_communicator": {"NpuCommunicator": npu},
        f"{DEVICES}.base_device_communicator": {
            "DeviceCommunicatorBase": kinds["Base"],
            "DistributedAutograd": kinds["Ids"],
        },
        f"{DEVICES}.pynccl_wrapper": {"ncclUniqueId": kinds["Ids"]},
        f"{DEVICES}.pyhccl_wrapper": {"hcclUniqueId": kinds["Ids"]},
        "fastvideo.distributed.parallel_state": {"_groups": groups},
        "fastvideo.distributed.utils": {"StatelessProcessGroup": kinds["Stateless"]},
    }
    modules = {name: module(monkeypatch, name, **names) for name, names in parts.items()}
    for name in ("fastvideo", "fastvideo.distributed", DEVICES):
        module(monkeypatch, name)
    with fastvideo.install():
        for each in coordinators:
            ours = each.device_communicator
            assert type(ours) is fastvideo.FastVideoCommunicator
            assert (ours.unique_name, ours.device) == ("sp:0", torch.device("cpu"))
        assert [each.device_communicator for each in others] == before[3:]
        assert installed_on(modules[fastvideo._BASE]) is fastvideo.install()
    assert [each.device_communicator for each in (*coordinators, *others)] == before
    assert installed_on(modules[fastvideo._BASE]) is None


def test_mps_is_the_cpu_only_where_torch_has_no_such_device(group, monkeypatch):
    for is_available, device in ((False, "cpu"), (True, "mps")):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda found=is_available: found)
        made = fastvideo.FastVideoCommunicator(group, torch.device("mps"), group, "sp")
        assert made.device.type == device
        assert fastvideo.FastVideoCommunicator(group, None, group).device.type == "cpu"


def test_yunchang_waits_for_the_device_only_where_it_was_asked_to(group, monkeypatch):
    waits: list[None] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waits.append(None))
    x = torch.zeros(1, 2, 4, 2)
    SeqAllToAll4D(Communicators("yunchang")).apply(group, x, 2, 1, True)
    exchange = SeqAllToAll4D(Communicators("yunchang"))
    exchange.apply(group, x.to("meta"), 2, 1)
    assert waits == []
    exchange.apply(None, x.to("meta"), 2, 1, True)
    assert waits == [None]


@pytest.mark.parametrize("function", [SeqAllToAll4D, SeqAllToAllDim])
def test_a_tensor_of_other_dims_is_named_as_such(group, function):
    with pytest.raises(ValueError, match=r"4 dims \[B, S, H, D\], got shape \[2, 3\]"):
        function(Communicators("test")).apply(group, torch.zeros(2, 3), 2, 1)


class Asked:
    """diffusers' `forward_op`: keeps what it is asked for."""

    def __init__(self, lse_dims: int) -> None:
        self.lse_dims = lse_dims
        self.arguments: tuple[Any, ...] = ()
        self.named: dict[str, Any] = {}

    def __call__(self, ctx: Any, query: Tensor, *arguments: Any, **named: Any) -> Any:
        self.arguments, self.named = arguments[2:], named
        lse = query.sum(-1, keepdim=self.lse_dims == 4)
        return (query * 2, lse) if arguments[-1] else query * 2


@pytest.mark.parametrize("kind", [TemplatedUlyssesAttention, TemplatedUlyssesAnythingAttention])
@pytest.mark.parametrize("lse_dims", [3, 4])
def test_diffusers_attention_is_asked_for_what_its_caller_asked_for(group, kind, lse_dims):
    mesh = types.SimpleNamespace(get_group=lambda: group)
    config = types.SimpleNamespace(
        context_parallel_config=types.SimpleNamespace(_ulysses_mesh=mesh)
    )
    attention, asked = kind(Communicators("diffusers")), Asked(lse_dims)
    x = torch.rand(1, 3, 4, 2)
    mask = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    settings = (0.25, True, 0.5, False)
    output, lse = attention.apply(x, x, x, mask, *settings, True, asked, None, config)
    assert torch.equal(output, x * 2)
    assert torch.equal(lse, x.sum(-1))
    assert asked.arguments == (mask, *settings, True)
    assert asked.named == {"_save_ctx": True, "_parallel_config": config}
    alone = attention.apply(x, x, x, None, *settings, False, asked, None, config)
    assert torch.equal(alone, x * 2)
    assert asked.arguments == (None, *settings, False)


def test_the_communicators_of_a_package_have_its_name_and_the_device_of_the_tensors(group):
    communicators = Communicators("pack")
    made = communicators.of(group, torch.zeros(1, device="meta"))
    assert type(made) is DeviceCommunicatorBase
    assert (made.unique_name, made.device.type) == ("pack", "meta")
    assert made.device_group is made.cpu_group is group
    communicators.clear()
