"""yunchang's own attention through this library's exchange; what its and diffusers' seams share."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
import types
import warnings
from collections.abc import Callable

import peer_wheels
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch.nn.functional import scaled_dot_product_attention

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.errors import ClosedError
from fastvideo_comm.integrations import diffusers, fastvideo, yunchang
from fastvideo_comm.integrations.installation import Installation, IntegrationError
from fastvideo_comm.integrations.sequence_exchange import Communicators, check_shared

needs_yunchang = pytest.mark.skipif(
    not peer_wheels.is_there("yunchang"), reason=peer_wheels.how_to_install("yunchang")
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
        of = Communicators.of
        patch.setattr(Communicators, "of", lambda *a: calls.append(a[0]) or of(*a))
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


def too_few_heads(communicator: DeviceCommunicatorBase) -> None:
    assert peer_wheels.is_there("yunchang")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module("yunchang.comm.all_to_all")
    x = torch.zeros(1, 2, 3, 2)
    with yunchang.install(), pytest.raises(ValueError, match=r"divides, got 3 .*: pad them$"):
        module.SeqAllToAll4D.apply(communicator.device_group, x, 2, 1)


@needs_yunchang
def test_the_error_names_what_a_caller_of_yunchang_can_do(ranks: Ranks):
    ranks.run(2, too_few_heads)


def one_for_each_group(communicator: DeviceCommunicatorBase) -> None:
    communicators = Communicators("test")
    x = torch.zeros(1, 2, 4, 2)
    kept = communicators.of(communicator.device_group, x)
    assert communicators.of(communicator.device_group, x) is kept
    assert kept.device_group is communicator.device_group
    with pytest.raises(ValueError, match=r"in group .test.: .* divides, got 3 .*; buy a head"):
        check_shared(kept, x[:, :, :3], 2, "buy a head")
    check_shared(kept, x, 2, "buy a head")
    if communicator.world_size == 4:
        assert communicators.of(None, x).all_to_all_4D(x).shape == (1, 8, 1, 2)
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
    world = dist.distributed_c10d._world
    count = world.group_count
    for _ in range(2):
        # torch names it after its ranks and, from 2.15 on, after the number of groups so far, in
        # which the ranks have to agree again afterwards.
        # One rank: two would find each other's old addresses in the store.
        group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        names.append(group.group_name)
        communicators.of(group, torch.zeros(1)).all_to_all_4D(torch.zeros(1, 2, 4, 1), 2, 1)
        assert communicators._by_name[group.group_name].device_group is group
        dist.destroy_process_group(group)
        world.group_count = count
    assert names[0] == names[1]
    communicators.clear()


def test_a_group_that_was_made_anew_under_its_name_is_another_group(ranks: Ranks):
    ranks.run(1, made_anew)


NAMES = {
    yunchang: ["SeqAllToAll4D"],
    diffusers: ["SeqAllToAllDim", "TemplatedUlyssesAnythingAttention", "TemplatedUlyssesAttention"],
}


def uninstalled(communicator: DeviceCommunicatorBase, name: str) -> None:
    integration = {"yunchang": yunchang, "diffusers": diffusers}[name]
    function = {"yunchang": "SeqAllToAll4D", "diffusers": "SeqAllToAllDim"}[name]
    module = types.ModuleType(integration._MODULE)
    for each in NAMES[integration]:
        setattr(module, each, "theirs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, integration._MODULE, module)
        patch.setattr(importlib.metadata, "version", lambda _: integration.KNOWN_VERSIONS[0])
        with integration.install():
            communicators = getattr(module, function)._communicators
            x = torch.zeros(1, 2, communicator.world_size, 2)
            communicators.of(communicator.device_group, x).all_to_all_4D(x)
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
    installation = Installation("fastvideo", "0.2.1", ())
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


@pytest.fixture(params=NAMES, ids=["yunchang", "diffusers"])
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module like the one of the package that an integration replaces names of."""
    integration = request.param
    module = types.ModuleType(integration._MODULE)
    for name in NAMES[integration]:
        setattr(module, name, f"their {name}")
    monkeypatch.setitem(sys.modules, integration._MODULE, module)
    monkeypatch.setattr(importlib, "import_module", lambda _: module)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: integration.KNOWN_VERSIONS[0])
    module.integration = integration
    return module


def test_a_second_install_is_the_first_and_uninstall_may_be_repeated(package):
    integration = package.integration
    first = integration.install()
    assert integration.install() is first
    for name in NAMES[integration]:
        assert type(getattr(package, name)) is getattr(integration, name)
    integration.uninstall()
    integration.uninstall()
    for name in NAMES[integration]:
        assert getattr(package, name) == f"their {name}"


def test_an_installation_says_what_it_serves_and_what_it_replaced(package):
    integration = package.integration
    with integration.install() as installation:
        text = repr(installation)
    name, version = integration._MODULE.split(".")[0], integration.KNOWN_VERSIONS[0]
    assert text.splitlines()[0] == f"fastvideo_comm in {name} {version}:"
    assert re.findall("serves    (.*)", text) == list(integration.SERVED)
    replaced = [f"{integration._MODULE}.{each}" for each in NAMES[integration]]
    assert sorted(re.findall("replaces  (.*)", text)) == replaced
    assert repr(installation).endswith("nothing, it was uninstalled")


def test_a_package_that_lacks_a_name_is_left_as_it_was(package):
    last = NAMES[package.integration][-1]
    delattr(package, last)
    before = dict(vars(package))
    with pytest.raises(IntegrationError, match=rf"must have {last}, got version .* without it"):
        package.integration.install()
    assert vars(package) == before
