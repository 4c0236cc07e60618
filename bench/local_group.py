"""A process group of P ranks in one process, whose exchange is a copy of the message buffer.

Every system's exchange ends here, whichever of torch's front doors it takes (`all_to_all_single`,
the functional collectives, `alltoall_base` itself), and costs one device copy. What is timed beside
it is the local work that the system wraps around its exchange. As message p this rank receives what
it sends to rank p, so results are defined and can be compared.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist


class _Done(dist._Work):
    """The handle of an exchange that is already queued on the current stream."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self._future: torch.futures.Future[list[torch.Tensor]] = torch.futures.Future()
        self._future.set_result(tensors)

    def wait(self, timeout: Any = None) -> bool:
        """Nothing to wait for."""
        del timeout
        return True

    def is_completed(self) -> bool:
        """Always."""
        return True

    def get_future(self) -> torch.futures.Future[list[torch.Tensor]]:
        """The tensors that were written."""
        return self._future


class LocalGroup(dist.ProcessGroup):
    """Rank 0 of a group in which the other ranks send back what they would get."""

    def __init__(self, rank: int, size: int) -> None:
        """As torch constructs groups."""
        super().__init__(rank, size)
        self._name = "local"

    def getBackendName(self) -> str:
        """The name it is registered under."""
        return "local"

    def getGroupName(self) -> str:
        """Read by the functional collectives, which address groups by name."""
        return self._name

    def setGroupName(self, name: str) -> None:
        """Called once, by torch."""
        self._name = name

    def _get_backend(self, device: torch.device) -> Any:
        """What a caller may ask about the backend of a device."""
        del device
        return types.SimpleNamespace(name=self.getBackendName, supports_coalescing=False)

    def alltoall_base(
        self,
        output: torch.Tensor,
        input: torch.Tensor,  # noqa: A002 - torch's name
        output_split_sizes: list[int],
        input_split_sizes: list[int],
        options: Any = None,
    ) -> _Done:
        """The exchange: one copy of the messages."""
        del output_split_sizes, input_split_sizes, options
        output.view(-1).copy_(input.view(-1))
        return _Done([output])

    def _allgather_base(
        self,
        output: torch.Tensor,
        input: torch.Tensor,  # noqa: A002 - torch's name
        options: Any = None,
    ) -> _Done:
        """All ranks give what this one does."""
        del options
        output.view(self.size(), -1).copy_(input.view(1, -1))
        return _Done([output])


def _create(store: Any, rank: int, size: int, timeout: Any) -> LocalGroup:
    del store, timeout
    return LocalGroup(rank, size)


@contextlib.contextmanager
def local_group(world_size: int) -> Iterator[dist.ProcessGroup]:
    """`torch.distributed` initialised with a `LocalGroup` of that size."""
    if "local" not in dist.Backend.backend_list:
        dist.Backend.register_backend("local", _create, devices=["cpu", "cuda"])
    dist.init_process_group("local", rank=0, world_size=world_size, store=dist.HashStore())
    try:
        group = dist.group.WORLD
        if group is None:
            raise RuntimeError("torch.distributed must have a default group")
        yield group
    finally:
        dist.destroy_process_group()
