"""`DeviceCommunicatorBase`: the public ops of a group. Resolve, validate, call."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp
from torch.distributed.device_mesh import DeviceMesh

from . import collectives, validation
from .autograd import DistributedAutograd
from .channel import Channel
from .errors import ClosedError

if TYPE_CHECKING:
    from typing_extensions import Self


class DeviceCommunicatorBase:
    """The collectives of one group of ranks on one device, differentiable and compilable.

    Example:
        >>> communicator = DeviceCommunicatorBase(group)  # doctest: +SKIP
        >>> q = communicator.all_to_all_4D(q)  # [B, s, H, D] -> [B, S, h, D]  # doctest: +SKIP

    All ranks of the group make the same calls in the same order, with the same shapes, dtypes and
    `requires_grad`. The loss is the sum over ranks of each rank's local loss; the gradients are
    stated with each op. At world size 1 arguments are checked like at any other, and then the ops
    return their input itself.

    Errors name op, group and rank. Bad arguments are a `ValueError` or `TypeError` on the rank
    that made them, before anything is sent; what the backend reports, a peer that died or a
    timeout of the group, is a `CollectiveError`, a `RuntimeError` too.

    Attributes:
        device: where tensors must be.
        cpu_group: the group as given.
        device_group: the group that exchanges: as given, or `cpu_group`.
        unique_name: the name in errors.
        rank: this process in the group; `rank_in_group` is the same.
        world_size: P, the number of ranks in the group.
        ranks: the global rank of every rank of the group.
        global_rank: this process in the world.
        global_world_size: the number of processes in the world.
    """

    def __init__(
        self,
        cpu_group: ProcessGroup,
        device: torch.device | None = None,
        device_group: ProcessGroup | None = None,
        unique_name: str = "",
    ) -> None:
        """Wraps groups that the caller made, and goes on owning.

        Args:
            cpu_group: a group that this process is in.
            device: where the tensors will be; the CPU if None. A device without an index accepts
                tensors on any device of its type.
            device_group: the same ranks with the device's backend (NCCL); `cpu_group` if None.
            unique_name: what errors call this communicator.

        Raises:
            ValueError: the process is not in `cpu_group`, or the two groups have different ranks.
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

    @classmethod
    def from_group(
        cls, group: ProcessGroup, *, device: torch.device | None = None, unique_name: str = ""
    ) -> Self:
        """A communicator on one group.

        Args:
            group: a group that this process is in.
            device: where the tensors will be; by default the current accelerator where the group's
                backend serves no other (NCCL, XCCL), else the CPU.
            unique_name: what errors call this communicator.
        """
        if device is None and isinstance(group, ProcessGroup):
            accelerated = dist.get_backend(group) in ("nccl", "xccl")
            device = torch.accelerator.current_accelerator() if accelerated else None
            if device is not None:
                device = torch.device(device.type, torch.accelerator.current_device_index())
        return cls(group, device=device, device_group=group, unique_name=unique_name)

    @classmethod
    def from_mesh(
        cls, device_mesh: DeviceMesh, mesh_dim: str | int | None = None, *, unique_name: str = ""
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
        return cls(group, device=device, device_group=group, unique_name=name)

    def all_to_all_4D(self, input_: Tensor, scatter_dim: int = 2, gather_dim: int = 1) -> Tensor:
        """Trades this rank's slice of one dim for its slice of another: heads for sequence.

        Example (inside a rank; H = 6 heads on P = 2 ranks):
            >>> x = torch.randn(1, 5, 6, 8)  # doctest: +SKIP
            >>> communicator.all_to_all_4D(x).shape  # doctest: +SKIP
            torch.Size([1, 10, 3, 8])

        The gradient is the inverse exchange: dx = all_to_all_4D(g, gather_dim, scatter_dim).

        Args:
            input_: `[B, s, H, D]` for (2, 1): all heads of this rank's sequence; `[B, S, h, D]` for
                (1, 2): the whole sequence of this rank's heads. Any dtype; any strides, read in
                place.
            scatter_dim: the dim that is dealt out to the ranks; P divides its size.
            gather_dim: the dim that comes together from the ranks, in rank order.

        Returns:
            `[B, S, h, D]` or `[B, s, H, D]`, contiguous, with h = H/P and S = P*s.

        Raises:
            ValueError: not 4 dims, other dims than (2, 1) or (1, 2), a size that P does not divide,
                or a tensor on another device.
            TypeError: not a dense tensor.
        """
        with self._named("all_to_all_4D"):
            validation.all_to_all_4D(input_, self.world_size, scatter_dim, gather_dim)
            return self._exchange(
                DistributedAutograd.AllToAll4D, input_, self.world_size, scatter_dim, gather_dim
            )

    def all_gather(self, input_: Tensor, dim: int = -1) -> Tensor:
        """Every rank's tensor side by side along `dim`, in rank order, on every rank.

        The gradient is a reduce_scatter: dx_r = sum over ranks q of g_q[part r].

        Args:
            input_: `[A, c, ..]`, the same shape on every rank; any dtype and strides.
            dim: the dim along which the tensors are joined.

        Returns:
            `[A, P*c, ..]`, contiguous.

        Raises:
            ValueError: a 0-d tensor, `dim` out of range, or a tensor on another device.
            TypeError: not a dense tensor.
        """
        with self._named("all_gather"):
            validation.all_gather(input_, dim)
            return self._exchange(DistributedAutograd.AllGather, input_, self.world_size, dim)

    def all_reduce(self, input_: Tensor, op: validation.ReduceOp | None = ReduceOp.SUM) -> Tensor:
        """The reduction over ranks, element by element, as a new tensor on every rank.

        With G = sum over ranks of g: dx = G for SUM, G/P for AVG; for MAX and MIN G goes to the
        ranks that hold the extreme, in equal shares; for PRODUCT dx_r = G * product of the other
        ranks' values, exact also with zeros.

        Args:
            input_: any shape and strides, the same shape on every rank.
            op: SUM (also for None), AVG, MIN, MAX, PRODUCT; BAND, BOR, BXOR for integers.

        Returns:
            The same shape and dtype, contiguous.

        Raises:
            ValueError: another op, or a tensor on another device.
            TypeError: not a dense tensor, or a dtype that `op` or the backends cannot reduce.
        """
        with self._named("all_reduce"):
            validation.all_reduce(input_, op)
            return self._exchange(DistributedAutograd.AllReduce, input_, op)

    def slice(self, input_: Tensor, dim: int = -1, *, scale_grad: bool = False) -> Tensor:
        """This rank's part of a tensor that every rank holds; nothing is sent in the forward.

        The gradient is an all_gather: dx = concat over ranks of g_r, the whole gradient on every
        rank, divided by P if `scale_grad`.

        Args:
            input_: `[A, P*c, ..]`, the same values on every rank; any dtype and strides.
            dim: the dim that is dealt out to the ranks.
            scale_grad: divides the gradient by P, for losses that are averaged over ranks.

        Returns:
            `[A, c, ..]`, contiguous, in memory of its own.

        Raises:
            ValueError: a size that P does not divide, `dim` out of range, another device.
            TypeError: not a dense tensor.
        """
        with self._named("slice"):
            validation.parts(input_, self.world_size, dim)
            return self._exchange(
                DistributedAutograd.Slice, input_, self.world_size, dim, scale_grad
            )

    def gather(self, input_: Tensor, dst: int = 0, dim: int = -1) -> Tensor | None:
        """As `all_gather`, but the result exists on rank `dst` alone. Carries no gradient.

        Args:
            input_: `[A, c, ..]`, the same shape on every rank; any dtype and strides.
            dst: the rank in the group that receives.
            dim: the dim along which the tensors are joined.

        Returns:
            `[A, P*c, ..]` on `dst`, contiguous and without `requires_grad`; None elsewhere.

        Raises:
            ValueError: a 0-d tensor, `dim` or `dst` out of range, another device.
            TypeError: not a dense tensor.
        """
        with self._named("gather"):
            channel = self._open()
            dim = validation.all_gather(input_, dim)
            validation.check_device("input_", input_, self.device)
            validation.peer("dst", dst, self.rank, self.world_size, others_only=False)
            if self.world_size == 1:
                return input_.detach()
            with torch.no_grad():
                return collectives.gather(channel, _plain(input_), dst, dim)

    def send(self, tensor: Tensor, dst: int | None = None) -> None:
        """Sends a tensor to another rank, which calls `recv`. Carries no gradient.

        Args:
            tensor: any shape, dtype and strides.
            dst: the rank in the group that receives; the next one if None.

        Raises:
            ValueError: `dst` is out of range or this rank itself, or another device.
            TypeError: not a dense tensor.
        """
        with self._named("send"):
            channel = self._open()
            dst = (self.rank + 1) % self.world_size if dst is None else dst
            validation.check_tensor("tensor", tensor)
            validation.check_device("tensor", tensor, self.device)
            validation.peer("dst", dst, self.rank, self.world_size, others_only=True)
            with torch.no_grad():
                collectives.send(channel, _plain(tensor), dst)

    def recv(
        self, size: torch.Size | Sequence[int], dtype: torch.dtype, src: int | None = None
    ) -> Tensor:
        """Receives a tensor that another rank sends. Carries no gradient.

        Args:
            size: the shape that was sent.
            dtype: the dtype that was sent.
            src: the rank in the group that sends; the previous one if None.

        Returns:
            A new contiguous tensor on `device`.

        Raises:
            ValueError: `src` is out of range or this rank itself.
            TypeError: `dtype` is not a dtype.
        """
        with self._named("recv"):
            channel = self._open()
            src = (self.rank - 1) % self.world_size if src is None else src
            validation.peer("src", src, self.rank, self.world_size, others_only=True)
            if not isinstance(dtype, torch.dtype):
                raise TypeError(f"dtype must be a torch.dtype, got {type(dtype).__name__}")
            return collectives.recv(channel, size, dtype, src, self.device)

    def destroy(self) -> None:
        """Frees the buffers; may be called again. The groups stay the caller's to destroy."""
        if self._channel is not None:
            self._channel.buffers.clear()
        self._channel = None

    def _exchange(
        self, function: type[torch.autograd.Function], input_: Tensor, *arguments: Any
    ) -> Tensor:
        """The one way through for differentiable ops with valid arguments."""
        channel = self._open()
        validation.check_device("input_", input_, self.device)
        if self.world_size == 1:
            return input_
        # A compiled graph holds the group; the compiler plans the buffers itself.
        group = self.device_group if torch.compiler.is_compiling() else channel
        output: Tensor = function.apply(group, _plain(input_), *arguments)
        return output

    def _open(self) -> Channel:
        if self._channel is None:
            raise ClosedError("the communicator was destroyed")
        return self._channel

    def _named(self, op: str) -> _Named:
        return _Named(op, self)


class _Named:
    """Adds op, group and rank to what is wrong with the arguments of a public call."""

    def __init__(self, op: str, communicator: DeviceCommunicatorBase) -> None:
        self.op = op
        self.communicator = communicator

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, ValueError | TypeError | ClosedError):
            rank, size = self.communicator.rank, self.communicator.world_size
            name = self.communicator.unique_name
            where = f"rank {rank} of {size} in group {name!r}" if name else f"rank {rank} of {size}"
            raise type(error)(f"{self.op} on {where}: {error}") from None


def _plain(tensor: Tensor) -> Tensor:
    """`tensor` whose memory is its values: not lazily conjugated or negated."""
    return tensor.resolve_conj().resolve_neg()
