"""Who this process is in a group of ranks: what every communicator has before it has an op."""

from __future__ import annotations

import contextlib
import weakref
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from .collective.group import Channel
from .diagnosis import Diagnosis, Validate
from .errors import ClosedError, CommunicationError
from .profiling import OpStats, Stats, span

if TYPE_CHECKING:
    from typing_extensions import Self


class Membership:
    """A group, its device, this process's place in it, and an end."""

    def __init__(
        self,
        cpu_group: ProcessGroup,
        device: torch.device | None = None,
        device_group: ProcessGroup | None = None,
        unique_name: str = "",
        *,
        validate: Validate = "auto",
    ) -> None:
        """Wraps groups that the caller made, and goes on owning.

        Args:
            cpu_group: a group that this process is in.
            device: where the tensors will be; the CPU if None. A device without an index accepts
                tensors on any device of its type.
            device_group: the same ranks with the device's backend (NCCL); `cpu_group` if None.
            unique_name: what errors call this communicator.
            validate: which calls the ranks compare before they send anything: "auto" the first ones
                and then ever fewer, "always" all of them, "off" none. See `diagnosis`.

        Raises:
            ValueError: the two groups have different ranks, or another `validate`.
            TypeError: `cpu_group` is not a process group.
        """
        if not isinstance(cpu_group, ProcessGroup):
            raise TypeError(
                f"cpu_group must be a ProcessGroup that this process is in, got {cpu_group!r}"
            )
        self.device = torch.device("cpu" if device is None else device)
        self.cpu_group = cpu_group
        self.device_group = cpu_group if device_group is None else device_group
        self.unique_name = unique_name
        self.rank = self.rank_in_group = dist.get_rank(cpu_group)
        self.world_size = dist.get_world_size(cpu_group)
        self.ranks = dist.get_process_group_ranks(cpu_group)
        self.global_rank = dist.get_rank()
        self.global_world_size = dist.get_world_size()
        if dist.get_process_group_ranks(self.device_group) != self.ranks:
            raise ValueError(
                f"device_group must have cpu_group's ranks {self.ranks}, "
                f"got {dist.get_process_group_ranks(self.device_group)}"
            )
        self._channel: Channel | None = Channel(self.device_group, unique_name)
        self._diagnosis = Diagnosis(cpu_group, unique_name, validate=validate)
        self._channel.diagnosis = self._diagnosis  # the backward knows the channel alone
        self._stats = Stats()
        # At the interpreter's end, if nobody has: gloo groups that live on make torch abort there.
        weakref.finalize(self, _destroy, weakref.ref(self))

    @classmethod
    def from_group(
        cls,
        group: ProcessGroup,
        *,
        device: torch.device | None = None,
        unique_name: str = "",
        validate: Validate = "auto",
    ) -> Self:
        """A communicator on one group.

        Args:
            group: a group that this process is in.
            device: where the tensors will be; by default the current accelerator where the group's
                backend serves no other (NCCL, XCCL), else the CPU.
            unique_name: what errors call this communicator.
            validate: which calls the ranks compare: "auto", "always" or "off".
        """
        if device is None and isinstance(group, ProcessGroup):
            accelerated = dist.get_backend(group) in ("nccl", "xccl")
            device = torch.accelerator.current_accelerator() if accelerated else None
            if device is not None:
                device = torch.device(device.type, torch.accelerator.current_device_index())
        return cls(group, device, group, unique_name, validate=validate)

    @classmethod
    def from_mesh(
        cls,
        device_mesh: DeviceMesh,
        mesh_dim: str | int | None = None,
        *,
        unique_name: str = "",
        validate: Validate = "auto",
    ) -> Self:
        """A communicator on one dim of a mesh, such as sequence parallel beside data parallel.

        Example:
            >>> mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("dp", "sp"))
            ... # doctest: +SKIP
            >>> communicator = DeviceCommunicatorBase.from_mesh(mesh, "sp")  # doctest: +SKIP

        Args:
            device_mesh: a mesh that this process is in.
            mesh_dim: the name or number of the dim; None for a mesh of one dim.
            unique_name: what errors call this communicator; by default the name of the dim.
            validate: which calls the ranks compare: "auto", "always" or "off".

        Raises:
            ValueError: a mesh of several dims and no `mesh_dim`.
        """
        if mesh_dim is None and device_mesh.ndim > 1:
            raise ValueError(
                f"mesh_dim must be one of {device_mesh.mesh_dim_names or device_mesh.ndim} for a "
                f"mesh of {device_mesh.ndim} dims, got None"
            )
        group = device_mesh.get_group(mesh_dim)
        device = torch.device(device_mesh.device_type)
        if device.type != "cpu":
            device = torch.device(device.type, torch.accelerator.current_device_index())
        name = unique_name or str(mesh_dim or "")
        return cls(group, device, group, name, validate=validate)

    def stats(self) -> dict[str, OpStats]:
        """What each op has cost so far: calls, bytes and seconds. See `profiling.OpStats`."""
        return self._stats.snapshot()

    def destroy(self) -> None:
        """Lets go of the buffers and of the groups; may be called again.

        The groups stay the caller's to destroy. Whoever keeps one to the end of the interpreter may
        see torch 2.13 abort there, gloo's threads still running; a communicator lets go by itself.
        """
        if self._channel is not None:
            self._channel.close()
            self._diagnosis.close()
            self._channel = None
            del self.cpu_group, self.device_group

    def __repr__(self) -> str:
        """Whose communicator this is."""
        state = f" on {self.device}" if self._channel is not None else ", destroyed"
        return f"<{type(self).__name__}: {self._place()}{state}>"

    def __copy__(self) -> Self:
        """The communicator itself: a copy of a model exchanges with the same ranks."""
        return self

    def __deepcopy__(self, memo: object) -> Self:
        """The communicator itself, as for `copy`: a moving average of a model copies it deeply."""
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """A communicator belongs to its process.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"a communicator must stay in the process that made it, got {self!r} to pickle: save "
            "the state_dict of what holds it, and make another where that is loaded"
        )

    def _place(self) -> str:
        where = f"rank {self.rank} of {self.world_size}"
        return f"{where} in group {self.unique_name!r}" if self.unique_name else where

    def _open(self) -> Channel:
        if self._channel is None:
            raise ClosedError("the communicator was destroyed")
        return self._channel

    def _count(self, op: str, tensor: Tensor) -> None:
        """Adds the bytes of a call to its op's statistics."""
        if not torch.compiler.is_compiling():
            self._stats.add_bytes(op, tensor.nbytes)

    def _named(self, op: str) -> _Call:
        return _Call(op, self)


def _destroy(reference: weakref.ref[Membership]) -> None:
    communicator = reference()
    if communicator is not None:
        communicator.destroy()


class _Call:
    """A public call: counted, seen by profilers, and named in what is wrong with its arguments."""

    __slots__ = ("_begin", "_communicator", "_number", "_op", "_span")

    def __init__(self, op: str, communicator: Membership) -> None:
        self._op = op
        self._communicator = communicator
        self._number = -1

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():  # a graph must not depend on the number of a call
            return
        self._number = self._communicator._diagnosis.number
        self._span = span(self._op, self._communicator.unique_name)
        self._span.__enter__()
        self._begin = perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._number >= 0:
            seconds = perf_counter() - self._begin
            self._span.__exit__(kind, error, traceback)
            if error is None:
                self._communicator._stats.add_call(self._op, seconds)
        if not isinstance(error, ValueError | TypeError | ClosedError):
            return
        communicator = self._communicator
        if self._number == communicator._diagnosis.number:
            # The others would wait for this rank's call. That they cannot be told is not the news.
            with contextlib.suppress(CommunicationError):
                communicator._diagnosis.failed(self._op, error)
        # Not str(error), which torch 2.11 cannot trace.
        text = error.args[0] if error.args else ""
        raise type(error)(f"{self._op} on {communicator._place()}: {text}") from None
