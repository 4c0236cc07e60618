"""No op lets the host see what is on the device, so that none waits for it and all can be captured.

On torch's meta device there is nothing to see: a tensor has a shape and no elements, and whoever
asks for one gets an error. A tensor on the host among them would be a copy to the device or from
it, which a CUDA graph records once and never renews.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from op_table import OF_SHAPE, SHAPE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastvideo_comm import DeviceCommunicatorBase

WORLD_SIZE = 4
META = torch.device("meta")


class SilentGroup(dist.ProcessGroup):
    """Takes every collective and moves nothing."""

    def getBackendName(self) -> str:
        return "silent"

    def getGroupName(self) -> str:
        return "silent"

    def setGroupName(self, name: str) -> None:
        pass

    def _get_backend(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(supports_coalescing=False, name=lambda: "silent")

    def _silence(self, *_: Any) -> None:
        pass

    alltoall_base = _allgather_base = _reduce_scatter_base = _silence
    allreduce = broadcast = reduce = gather = send = recv = _silence


class OnDevice(TorchDispatchMode):
    """Raises where an operator reads or makes a tensor that is not on the meta device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        output = function(*args, **(kwargs or {}))
        for each in tree_leaves((args, kwargs, output)):
            if isinstance(each, Tensor) and each.device != META:
                raise AssertionError(f"{function} touches a tensor on {each.device}")
        return output


@pytest.fixture
def communicator() -> Iterator[DeviceCommunicatorBase]:
    if "silent" not in dist.Backend.backend_list:
        dist.Backend.register_backend(
            "silent", lambda store, rank, size, timeout: SilentGroup(rank, size), devices=["cpu"]
        )
    dist.init_process_group("silent", rank=1, world_size=WORLD_SIZE, store=dist.HashStore())
    try:
        group = dist.group.WORLD
        yield DeviceCommunicatorBase(group, META, group, validate="off")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", OF_SHAPE)
def test_no_op_nor_its_derivatives_read_the_device(communicator, name):
    x = torch.rand(SHAPE, device=META, requires_grad=True)
    with OnDevice():
        output = OF_SHAPE[name](communicator, x)
        (grad,) = torch.autograd.grad(output.float().square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), x)
        with torch.no_grad():
            assert OF_SHAPE[name](communicator, x).shape == output.shape
    assert second.shape == grad.shape == x.shape


def test_nor_do_those_without_a_gradient(communicator):
    x = torch.rand(2, 8, device=META).mT
    with OnDevice():
        assert communicator.gather(x, 0) is None
        gathered = communicator.gather(x, 1, 0)
        communicator.send(x, 2)
        received = communicator.recv((3, 5), torch.bfloat16, 2)
    assert gathered.shape == (32, 2)
    assert (received.shape, received.device) == ((3, 5), META)


def test_the_check_sees_a_host_tensor_and_a_reading_host():
    x = torch.rand(2, device=META)
    with OnDevice(), pytest.raises(AssertionError, match="touches a tensor on cpu"):
        x + torch.ones(2)
    with OnDevice(), pytest.raises(RuntimeError, match="meta"):
        x.sum().item()
