"""FastVideo's NCCL and HCCL bindings, its node finder and its fused exchange after `install`."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import types
import warnings
from typing import Any

import fastvideo_package
import peer_wheels
import pytest
import torch
from fastvideo_package import make_groups
from ranks import Ranks
from reserved_port import reserved_port

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.integrations import fastvideo as integration
from fastvideo_comm.object_channel import ObjectCodec

pytestmark = pytest.mark.skipif(
    not peer_wheels.is_there("fastvideo"), reason=peer_wheels.how_to_install("fastvideo")
)
_DEVICES = "fastvideo.distributed.device_communicators"


def same_node(communicator: DeviceCommunicatorBase, port: int) -> list[int]:
    fastvideo_package.prepare()
    with integration.install():
        state = make_groups(2)
        group = state.StatelessProcessGroup.create(
            "127.0.0.1", port, communicator.rank, communicator.world_size
        )
        try:
            return list(state.get_same_node_ranks(group))
        finally:
            group.close()
            state.destroy_model_parallel()


def test_fastvideo_finds_the_ranks_of_a_node_through_our_stateless_group(ranks: Ranks):
    with reserved_port() as port:
        assert ranks.run(4, same_node, port) == [[0, 1, 2, 3]] * 4


class Library:
    """In the place of FastVideo's binding to NCCL or HCCL: keeps the id that a rank joins with."""

    def __init__(self, prefix: str, unique_id: type[Any]) -> None:
        self.joined_with: list[Any] = []
        setattr(self, f"{prefix}GetVersion", lambda: "none")
        setattr(self, f"{prefix}GetUniqueId", lambda: self.made_by_rank_0(unique_id))
        setattr(self, f"{prefix}CommInitRank", lambda _, id_, rank: self.joined_with.append(id_))
        setattr(self, f"{prefix}AllReduce", lambda *_: None)

    @staticmethod
    def made_by_rank_0(unique_id: type[Any]) -> Any:
        size = ctypes.sizeof(unique_id)
        return unique_id.from_buffer_copy(bytes(7 * i % 256 for i in range(size)))


def joined(communicator: DeviceCommunicatorBase, binding: str, port: int) -> list[bytes]:
    """What two communicators of FastVideo join with, on one group; the first rank made the id."""
    prefix = binding.removeprefix("py")
    devices = f"{_DEVICES}.{binding}"
    fastvideo_package.prepare()
    with integration.install(), pytest.MonkeyPatch.context() as patch:
        state = make_groups(2)
        module = importlib.import_module(devices)
        unique_id = getattr(module, f"{prefix}UniqueId")
        library = Library(prefix, unique_id)
        patch.setattr(module, f"{prefix.upper()}Library", lambda path: library)
        stream = types.SimpleNamespace(synchronize=lambda: None, cuda_stream=0, npu_stream=0)
        patch.setattr(module, "current_stream", lambda: stream)
        nothing = types.SimpleNamespace(device=lambda device: contextlib.nullcontext())
        patch.setattr(torch.cuda, "device", nothing.device)
        patch.setattr(torch, "npu", nothing, raising=False)
        group = state.StatelessProcessGroup.create("127.0.0.1", port, communicator.rank, 4)
        make = getattr(module, f"Py{prefix.capitalize()}Communicator")
        try:
            assert not make(group, torch.device("cpu")).disabled
            assert not make(group, torch.device("cpu")).disabled
        finally:
            group.close()
            state.destroy_model_parallel()
    assert all(type(each) is unique_id for each in library.joined_with)
    return list(map(bytes, library.joined_with))


@pytest.mark.parametrize(("binding", "size"), [("pynccl", 128), ("pyhccl", 4108)])
def test_fastvideos_own_bindings_join_over_a_stateless_group(ranks: Ranks, binding: str, size: int):
    unique_id = bytes(7 * i % 256 for i in range(size))
    with reserved_port() as port:
        assert ranks.run(4, joined, binding, port) == [[unique_id] * 2] * 4


def with_codecs(communicator: DeviceCommunicatorBase) -> None:
    """Groups that share a codec, and one that pickles."""
    fastvideo_package.prepare()
    with integration.install():
        state = make_groups(2)
        wrapper = importlib.import_module(f"{_DEVICES}.pynccl_wrapper")
        codec, secret = ObjectCodec(), b"s" * 32
        for options in ({"codec": codec}, {"codec": codec}, {"codec": "pickle", "secret": secret}):
            group = state.StatelessProcessGroup.create("127.0.0.1", 0, 0, 1, **options)
            with group:
                assert type(group) is state.StatelessProcessGroup
                group.send_obj(wrapper.ncclUniqueId(), 0)
                assert type(group.recv_obj(0)) is wrapper.ncclUniqueId
        state.destroy_model_parallel()


def test_a_codec_of_the_caller_knows_the_ids_too(ranks: Ranks):
    ranks.run(4, with_codecs)


def fused_exchange(communicator: DeviceCommunicatorBase) -> None:
    state = make_groups(2)
    state.destroy_model_parallel()
    cuda = importlib.import_module(f"{_DEVICES}.cuda_communicator")
    with pytest.MonkeyPatch.context() as patch:
        helpers = []
        patch.setattr(cuda, "maybe_create_helper", lambda *a: helpers.append(a))
        pynccl = importlib.import_module(f"{_DEVICES}.pynccl")
        patch.setattr(pynccl, "PyNcclCommunicator", lambda **_: None)
        group = communicator.device_group
        cuda.CudaCommunicator(group, torch.device("cpu"), group)
        assert helpers.pop(), "FastVideo's own communicator asks for its fused exchange"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            patch.setenv("FASTVIDEO_ULYSSES_A2A", "off")
            integration.install().uninstall()
        patch.setenv("FASTVIDEO_ULYSSES_A2A", " Auto")
        with pytest.warns(UserWarning, match=r"FASTVIDEO_ULYSSES_A2A=auto has no effect"):
            installation = integration.install()
        with installation:
            ours = cuda.CudaCommunicator(group, torch.device("cpu"), group)
            assert ours.all_to_all_4D(torch.zeros(1, 2, 4, 2)).shape == (1, 8, 1, 2)
            ours.destroy()
        assert not helpers, "with this library, nobody does"


def test_fastvideos_fused_exchange_is_not_used_and_who_asked_for_it_is_told(ranks: Ranks):
    ranks.run(4, fused_exchange)
