"""yunchang's and diffusers' own attention through this library's exchange, on gloo ranks."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import diffusers_package
import peer_wheels
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch.nn.functional import scaled_dot_product_attention

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.errors import ClosedError
from fastvideo_comm.integrations import diffusers, fastvideo, yunchang
from fastvideo_comm.integrations.installation import Installation
from fastvideo_comm.integrations.sequence_exchange import Communicators

needs_yunchang = pytest.mark.skipif(
    not peer_wheels.is_there("yunchang"), reason=peer_wheels.how_to_install("yunchang")
)
needs_diffusers = pytest.mark.skipif(
    not peer_wheels.is_there("diffusers"), reason=peer_wheels.how_to_install("diffusers")
)
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def results(attention: Attention, size: int) -> list[torch.Tensor]:
    """Output and gradients for q, k and v that depend on the rank."""
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    qkv = [
        torch.randn(2, 3, 2 * size, 8, generator=generator, requires_grad=True) for _ in range(3)
    ]
    output = attention(*qkv)
    weight = torch.randn(output.shape, generator=generator)
    (output * weight).sum().backward()
    return [output.detach(), *(x.grad for x in qkv)]


def compare(
    attention: Attention, install: Callable[[], Installation], communicator: DeviceCommunicatorBase
) -> list[int]:
    """Which of output and gradients differ, with the integration and after it."""
    expected = results(attention, communicator.world_size)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        exchange = Communicators.exchange
        patch.setattr(Communicators, "exchange", lambda *a: calls.append(a[0]) or exchange(*a))
        with install():
            got = results(attention, communicator.world_size)
            assert len(calls) == 4, "q, k, v and the output go through this library"
        buffers = communicator.device_group.group_name
        assert buffers not in calls[0]._by_name, "and its buffers are freed"
        results(attention, communicator.world_size)
        assert len(calls) == 4, "and after uninstall nothing does"
    return [i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if not a.equal(b)]


def with_yunchang(communicator: DeviceCommunicatorBase) -> list[int]:
    assert peer_wheels.is_there("yunchang")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it says of the kernels that are not installed
        layers = importlib.import_module("yunchang.ulysses.attn_layer")
        attention = layers.UlyssesAttention(
            communicator.device_group, attn_type=layers.AttnType.TORCH_EFFICIENT
        )
    # Its torch attention is for GPUs; the exchanges around it are what is tested.
    attention.attn_fn = lambda q, k, v, **_: local(q, k, v)
    return compare(attention, yunchang.install, communicator)


def local(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2)


@needs_yunchang
@pytest.mark.parametrize("size", [2, 4])
def test_yunchangs_ulysses_attention_gives_the_same_bits(ranks: Ranks, size: int):
    assert ranks.run(size, with_yunchang) == [[]] * size


def with_diffusers(communicator: DeviceCommunicatorBase) -> list[int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dispatch = diffusers_package.attention_dispatch()
    mesh = types.SimpleNamespace(get_group=lambda: communicator.device_group)
    config = types.SimpleNamespace(
        context_parallel_config=types.SimpleNamespace(_ulysses_mesh=mesh)
    )
    # A ring of one rank; ring attention itself needs a GPU's flash attention.
    dispatch.TemplatedRingAttention = types.SimpleNamespace(
        apply=lambda q, k, v, *_: local(q, k, v)
    )

    def attention(*qkv: torch.Tensor) -> Any:
        return dispatch._templated_unified_attention(
            *qkv, None, 0.0, False, None, False, False, None, None, _parallel_config=config
        )

    return compare(attention, diffusers.install, communicator)


@needs_diffusers
@pytest.mark.parametrize("size", [2, 4])
def test_diffusers_unified_attention_gives_the_same_bits(ranks: Ranks, size: int):
    assert ranks.run(size, with_diffusers) == [[]] * size


def one_for_each_group(communicator: DeviceCommunicatorBase) -> None:
    communicators = Communicators("test")
    x = torch.zeros(1, 2, 4, 2)
    for _ in range(2):
        communicators.exchange(communicator.device_group, x, 2, 1)
    (kept,) = communicators._by_name.values()
    assert kept.device_group is communicator.device_group
    with pytest.raises(ValueError, match=r"in group .test.: .* divides, got 3"):
        communicators.exchange(communicator.device_group, x[:, :, :3], 2, 1)
    if communicator.world_size == 4:
        assert communicators.exchange(None, x, 2, 1).shape == (1, 8, 1, 2)
    communicators.clear()
    assert not communicators._by_name
    with pytest.raises(ConnectionError, match="was destroyed"):
        kept.all_gather(x)


@pytest.mark.parametrize("size", [2, 4])
def test_a_group_keeps_its_communicator_from_call_to_call(ranks: Ranks, size: int):
    ranks.run(size, one_for_each_group)


def made_anew(communicator: DeviceCommunicatorBase) -> None:
    communicators = Communicators("test")
    names = []
    for _ in range(2):
        # Named after its ranks. One rank: two would find each other's old addresses in the store.
        group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        names.append(group.group_name)
        communicators.exchange(group, torch.zeros(1, 2, 4, 1), 2, 1)
        assert communicators._by_name[group.group_name].device_group is group
        dist.destroy_process_group(group)
    assert names[0] == names[1]
    communicators.clear()


def test_a_group_that_was_made_anew_under_its_name_is_another_group(ranks: Ranks):
    ranks.run(1, made_anew)


def uninstalled(communicator: DeviceCommunicatorBase, name: str) -> None:
    integration = {"yunchang": yunchang, "diffusers": diffusers}[name]
    function = {"yunchang": "SeqAllToAll4D", "diffusers": "SeqAllToAllDim"}[name]
    module = types.ModuleType(integration._MODULE)
    setattr(module, function, "theirs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, integration._MODULE, module)
        patch.setattr(importlib.metadata, "version", lambda _: integration.KNOWN_VERSIONS[0])
        with integration.install():
            communicators = getattr(module, function)._communicators
            x = torch.zeros(1, 2, communicator.world_size, 2)
            communicators.exchange(communicator.device_group, x, 2, 1)
            (kept,) = communicators._by_name.values()
            kept.all_gather(x)
        with pytest.raises(ClosedError, match="was destroyed"):
            kept.all_gather(x)


@pytest.mark.parametrize("name", ["yunchang", "diffusers"])
def test_uninstall_destroys_the_communicators_that_were_made(ranks: Ranks, name):
    ranks.run(2, uninstalled, name)


def replaced_and_undone(communicator: DeviceCommunicatorBase) -> None:
    """What FastVideo's integration does with a group that was made before."""
    coordinator = types.SimpleNamespace(
        cpu_group=communicator.cpu_group,
        device=torch.device("cpu"),
        device_group=communicator.device_group,
        unique_name="sp:0",
        device_communicator="theirs",
    )
    installation = Installation("fastvideo", "0.2.1")
    fastvideo._replace_communicator(installation, coordinator)
    ours = coordinator.device_communicator
    x = torch.zeros(2)
    ours.all_gather(x)
    installation.uninstall()
    assert coordinator.device_communicator == "theirs"
    with pytest.raises(ClosedError, match="was destroyed"):
        ours.all_gather(x)


def test_uninstall_destroys_the_communicator_of_a_group_that_existed(ranks: Ranks):
    ranks.run(2, replaced_and_undone)


@pytest.mark.parametrize("integration", [yunchang, diffusers])
def test_a_second_install_is_the_first_and_uninstall_may_be_repeated(monkeypatch, integration):
    module = types.ModuleType(integration._MODULE)
    name = {yunchang: "SeqAllToAll4D", diffusers: "SeqAllToAllDim"}[integration]
    setattr(module, name, "theirs")
    monkeypatch.setitem(sys.modules, integration._MODULE, module)
    monkeypatch.setattr(importlib, "import_module", lambda _: module)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: integration.KNOWN_VERSIONS[0])
    first = integration.install()
    assert integration.install() is first
    assert isinstance(getattr(module, name), getattr(integration, name))
    integration.uninstall()
    integration.uninstall()
    assert getattr(module, name) == "theirs"
