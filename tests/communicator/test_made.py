"""What a communicator is made of, and that it lets go of all of it."""

from __future__ import annotations

import gc
import types
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.errors import ClosedError


class Asked(DeviceCommunicatorBase):
    """Keeps what it was asked to be made of, and makes it on the CPU."""

    def __init__(self, cpu_group: Any, device: Any, device_group: Any, unique_name: str) -> None:
        self.asked = device
        super().__init__(cpu_group, None, device_group, unique_name)


def on_accelerators(communicator: DeviceCommunicatorBase, backend: str, device: Any) -> None:
    group = communicator.cpu_group
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend", lambda _: backend)
        patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        patch.setattr(torch.accelerator, "current_device_index", lambda: 3)
        made = Asked.from_group(group, validate="off")
        assert made.asked == device
        explicit = torch.device("cpu")
        assert Asked.from_group(group, device=explicit, validate="off").asked == explicit
        mesh: Any = types.SimpleNamespace(
            ndim=1, device_type="cuda", mesh_dim_names=None, get_group=lambda _: group
        )
        assert Asked.from_mesh(mesh, validate="off").asked == torch.device("cuda", 3)


@pytest.mark.parametrize(
    ("backend", "device"),
    [("nccl", torch.device("cuda", 3)), ("xccl", torch.device("cuda", 3)), ("gloo", None)],
)
def test_a_group_of_accelerators_means_the_current_one(ranks: Ranks, backend: str, device: Any):
    ranks.run(1, on_accelerators, backend, device, ways=("messages",))


def reachable_groups(communicator: DeviceCommunicatorBase) -> list[dist.ProcessGroup]:
    """The process groups that live as long as a communicator and what belongs to it."""
    seen: dict[int, Any] = {}
    waiting: list[Any] = [vars(communicator)]
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen[id(each)] = each
        is_ours = type(each).__module__.startswith("fastvideo_comm")
        if is_ours or isinstance(each, dict | list | tuple | types.MethodType | types.CellType):
            waiting += gc.get_referents(each)
    return [each for each in seen.values() if isinstance(each, dist.ProcessGroup)]


def let_go(communicator: DeviceCommunicatorBase) -> None:
    for memory in ("on", "off"):
        made = DeviceCommunicatorBase(
            communicator.cpu_group, unique_name="made", memory=memory, validate="always"
        )
        x = torch.rand(1, 2, 4, 2, requires_grad=True)
        made.all_to_all_4D(x).sum().backward()
        made.reduce_gradients(x)
        assert reachable_groups(made)
        made.destroy()
        assert not reachable_groups(made)


def test_a_destroyed_communicator_keeps_no_group_alive(ranks: Ranks):
    """torch may abort at the end of the interpreter if a group of gloo lives until then."""
    ranks.run(2, let_go, ways=("messages",))


def at_the_end(communicator: DeviceCommunicatorBase) -> None:
    made = DeviceCommunicatorBase(communicator.cpu_group)
    made.barrier()
    (finalizer,) = [
        each
        for each in weakref.finalize._registry  # type: ignore[attr-defined]
        if each.alive and each.peek()[0] is made
    ]
    assert finalizer.atexit
    finalizer()
    with pytest.raises(ClosedError, match="the communicator was destroyed"):
        made.barrier()
    assert not hasattr(made, "cpu_group")


def test_the_end_of_the_interpreter_destroys_a_communicator(ranks: Ranks):
    ranks.run(2, at_the_end)


def test_sizes_are_asked_by_the_group_of_the_cpu_where_there_are_two():
    """Tensors of the meta device have no elements that a host could read."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        made = DeviceCommunicatorBase(
            dist.group.WORLD, torch.device("meta"), dist.new_group(), validate="off", memory="off"
        )
        x = torch.empty(3, 2, device="meta")
        assert made.all_gather(x, 0, gather_sizes="auto") is x
        made.destroy()
    finally:
        dist.destroy_process_group()


def compiled_sizes(communicator: DeviceCommunicatorBase) -> None:
    torch._dynamo.reset()
    words = "gather_sizes must be given where a call is compiled or recorded, got 'auto'"
    call = torch.compile(
        lambda x: communicator.all_gather(x, 0, gather_sizes="auto"), backend="eager"
    )
    with pytest.raises(ValueError, match=words):
        call(torch.zeros(2))


def test_sizes_cannot_be_asked_in_compiled_code(ranks: Ranks):
    ranks.run(2, compiled_sizes, ways=("messages",))


def settings(communicator: DeviceCommunicatorBase) -> None:
    group = communicator.cpu_group
    mesh: Any = types.SimpleNamespace(
        ndim=1, device_type="cpu", mesh_dim_names=("sp",), get_group=lambda _: group
    )
    for make, given in ((Asked.from_group, group), (Asked.from_mesh, mesh)):
        for validate in ("auto", "always", "off"):
            made = make(given, validate=validate)
            assert made._runner.group.diagnosis.validate == validate
            made.destroy()
        with pytest.raises(ValueError, match="validate must be one of auto, always, off"):
            make(given, validate="never")
    with pytest.raises(ValueError, match="memory_bytes must be a multiple of 4096 from 1 MiB on"):
        DeviceCommunicatorBase(group, memory_bytes=4096)
    with pytest.raises(ValueError, match=r"memory \(or .*\) must be one of auto, on, off"):
        DeviceCommunicatorBase(group, memory="maybe")


def test_every_way_to_make_one_takes_the_settings_and_checks_them(ranks: Ranks):
    ranks.run(1, settings)


def used_by_another_stream(communicator: DeviceCommunicatorBase) -> None:
    told: list[Any] = []
    tensor: Any = types.SimpleNamespace(record_stream=told.append)
    stream: Any = object()
    communicator.record_stream(tensor, stream)
    assert told == [stream]


def test_torch_is_told_of_a_stream_where_gpus_do_not_exchange_by_memory(ranks: Ranks):
    ranks.run(1, used_by_another_stream)
