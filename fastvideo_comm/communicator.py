"""`DeviceCommunicatorBase`: the public ops of a group.

Each op validates its arguments, lets the ranks compare their calls, and calls a Function.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp
from torch.distributed.device_mesh import DeviceMesh

from . import functions, gradient_buckets, warm_up
from .collective import validation
from .collective.device_connection import SEGMENT_BYTES
from .collective.group import Group, MemoryMode
from .collective.layout import Splits
from .collective.route import memory_mode
from .collective.validation import Rounding, Sizes, WireDtypes
from .diagnosis import Diagnosis, Validate
from .handle import AsyncHandle
from .op_runner import OpCall, OpRunner
from .profiling import MemoryStats, OpStats
from .reduce_ops import ReduceOp as AnyReduceOp

if TYPE_CHECKING:
    from typing_extensions import Self


class DeviceCommunicatorBase:
    """The collectives of one group of ranks on one device, differentiable and compilable.

    Example (inside a rank, of 2):
        >>> sp = DeviceCommunicatorBase(group, unique_name="sp")
        >>> sp.all_to_all_4D(torch.ones(1, 5, 6, 8)).shape  # [B, s, H, D] -> [B, S, h, D]
        torch.Size([1, 10, 3, 8])

    All ranks of the group make the same calls in the same order, with the same shapes, dtypes and
    `requires_grad`. The loss is the sum over ranks of each rank's local loss. Each op states its
    gradient. At world size 1 the ops check their arguments and return the input itself.

    Errors name op, group and rank. Bad arguments are a `ValueError` or `TypeError` on the rank
    that gave them, before anything is sent. If ranks ask for different things, every rank raises a
    `MismatchError`. If the backend fails, the error is a `CollectiveError`, which is also a
    `RuntimeError`.

    Attributes:
        device: where tensors must be.
        cpu_group: the group as given.
        device_group: the group that exchanges tensors: as given, or `cpu_group`.
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
        *,
        validate: Validate = "auto",
        memory: MemoryMode | None = None,
        memory_bytes: int = SEGMENT_BYTES,
    ) -> None:
        """Wraps groups that the caller made. The caller keeps owning them.

        Args:
            cpu_group: a group that this process is in.
            device: where the tensors will be; the CPU if None. A device without an index accepts
                tensors on any device of its type.
            device_group: the same ranks with the device's backend (NCCL); `cpu_group` if None.
            unique_name: what errors call this communicator.
            validate: which calls by messages the ranks compare before they send anything. "auto":
                the first calls, and later fewer and fewer. "always": all calls. "off": none. See
                `diagnosis`. Calls by memory are always compared.
            memory: whether ranks of one host write straight into each other's outputs. "auto": on
                the CPU if all ranks can, on GPUs not yet. "on": it is an error if one rank cannot.
                "off": never. None: the environment variable FASTVIDEO_COMM_MEMORY decides, "auto"
                if it is not set. On GPUs, "on" is given on all ranks or on none.
            memory_bytes: on GPUs, what memory="on" allocates on each GPU, the same on all ranks. A
                call whose outputs take more than a quarter of it on a rank goes by NCCL.

        Raises:
            ValueError: the two groups have different ranks, another `validate` or `memory`, or a
                `memory_bytes` that is under 1 MiB or no multiple of 4096.
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
        diagnosis = Diagnosis(cpu_group, unique_name, validate=validate)
        mode = memory_mode(memory, self.device_group, self.device)
        group = Group(
            self.device_group,
            unique_name,
            diagnosis,
            memory=mode,
            device=None if self.device.type == "cpu" else self.device,
            memory_bytes=validation.memory_bytes(memory_bytes),
        )
        self._runner = OpRunner(group, self.device, cpu_group)
        # Lets go of the groups before the interpreter ends: torch aborts if a gloo group lives on.
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

        Example (inside a rank, of 2):
            >>> DeviceCommunicatorBase.from_group(group, unique_name="sp").world_size
            2

        Args:
            group: a group that this process is in.
            device: where the tensors will be. By default the current accelerator if the group's
                backend is NCCL or XCCL, else the CPU.
            unique_name: what errors call this communicator.
            validate: which calls the ranks compare: "auto", "always" or "off".

        Raises:
            ValueError: another `validate`.
            TypeError: not a process group that this process is in.
        """
        if device is None and isinstance(group, ProcessGroup):
            accelerated = dist.get_backend(group) in ("nccl", "xccl")
            device = torch.accelerator.current_accelerator() if accelerated else None
            if device is not None:
                device = torch.device(device.type, torch.accelerator.current_device_index())
        return cls._made(group, device, unique_name, validate)

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
        dim_names = device_mesh.mesh_dim_names
        if dim_names is not None and not isinstance(mesh_dim, str):
            mesh_dim = dim_names[mesh_dim or 0]
        name = unique_name or str("" if mesh_dim is None else mesh_dim)
        return cls._made(group, device, name, validate)

    @classmethod
    def _made(
        cls, group: ProcessGroup, device: torch.device | None, name: str, validate: Validate
    ) -> Self:
        """Passes only upstream's arguments, because a subclass may take no others."""
        communicator = cls(group, device, group, name)
        communicator._runner.group.validate(validate)
        return communicator

    @overload
    def all_to_all_4D(
        self,
        input_: Tensor,
        scatter_dim: int = 2,
        gather_dim: int = 1,
        *,
        scatter_sizes: Sizes = None,
        gather_sizes: Sizes = None,
        wire_dtype: WireDtypes = None,
        grad_wire_dtype: WireDtypes = None,
        rounding: Rounding = "nearest",
        generator: torch.Generator | None = None,
        async_op: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def all_to_all_4D(
        self,
        input_: Sequence[Tensor],
        scatter_dim: int = 2,
        gather_dim: int = 1,
        *,
        scatter_sizes: Sizes = None,
        gather_sizes: Sizes = None,
        wire_dtype: WireDtypes = None,
        grad_wire_dtype: WireDtypes = None,
        rounding: Rounding = "nearest",
        generator: torch.Generator | None = None,
        async_op: Literal[False] = False,
    ) -> tuple[Tensor, ...]: ...

    @overload
    def all_to_all_4D(
        self,
        input_: Tensor,
        scatter_dim: int = 2,
        gather_dim: int = 1,
        *,
        scatter_sizes: Sizes = None,
        gather_sizes: Sizes = None,
        wire_dtype: WireDtypes = None,
        grad_wire_dtype: WireDtypes = None,
        rounding: Rounding = "nearest",
        generator: torch.Generator | None = None,
        async_op: Literal[True],
    ) -> AsyncHandle[Tensor]: ...

    @overload
    def all_to_all_4D(
        self,
        input_: Sequence[Tensor],
        scatter_dim: int = 2,
        gather_dim: int = 1,
        *,
        scatter_sizes: Sizes = None,
        gather_sizes: Sizes = None,
        wire_dtype: WireDtypes = None,
        grad_wire_dtype: WireDtypes = None,
        rounding: Rounding = "nearest",
        generator: torch.Generator | None = None,
        async_op: Literal[True],
    ) -> AsyncHandle[tuple[Tensor, ...]]: ...

    def all_to_all_4D(
        self,
        input_: Tensor | Sequence[Tensor],
        scatter_dim: int = 2,
        gather_dim: int = 1,
        *,
        scatter_sizes: Sizes = None,
        gather_sizes: Sizes = None,
        wire_dtype: WireDtypes = None,
        grad_wire_dtype: WireDtypes = None,
        rounding: Rounding = "nearest",
        generator: torch.Generator | None = None,
        async_op: bool = False,
    ) -> Any:
        """Trades this rank's slice of one dim for its slice of another dim: heads for sequence.

        Example (inside a rank, of 2; H = 6 heads):
            >>> x = torch.randn(1, 5, 6, 8)
            >>> communicator.all_to_all_4D(x).shape
            torch.Size([1, 10, 3, 8])
            >>> q, k, v = communicator.all_to_all_4D((x, x.sin(), x.cos()))  # one exchange

        The gradient is the inverse exchange: dx = all_to_all_4D(g, gather_dim, scatter_dim).

        Args:
            input_: `[B, s, H, D]` for (2, 1): all heads of this rank's sequence. `[B, S, h, D]` for
                (1, 2): the whole sequence of this rank's heads. Any dtype and any strides; the
                tensor is read in place. Or a sequence of such tensors, which are exchanged
                together and may differ in shape, dtype and strides. In a sequence, a tensor may
                have fewer heads than ranks, if P is a multiple of H. Then each head goes to the P/H
                ranks whose query heads use it, and the gradients of those ranks are summed.
            scatter_dim: the dim that is divided among the ranks. P divides its size, or
                `scatter_sizes` says what each rank gets.
            gather_dim: the dim along which the parts of the ranks are joined, in rank order.
            scatter_sizes: every rank's part of `scatter_dim`, the same list on all ranks. One list
                for all tensors, or one list for each tensor. "auto": as even as possible
                (`near_even_sizes`); heads of several tensors are divided so that every rank has the
                key heads of its query heads.
            gather_sizes: every rank's size of `gather_dim`, if the ranks have different sizes.
                "auto": the ranks ask each other, in one more small collective.
            wire_dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`: the values travel as fp8, with
                one scale for each row of D. One dtype for all tensors, or one or None for each.
                None: they travel as they are. An element arrives within |x|/16 of its value
                (e5m2: |x|/8) plus 4e-6 of the largest magnitude of its row. The tensors are
                float16, bfloat16 or float32, and 16 divides D. What travels to this rank itself is
                rounded too. See docs/fp8.md.
            grad_wire_dtype: the same for the gradients. The rounding is not differentiated.
                Tangents, and everything in derivatives of higher order, travel as they are.
            rounding: how `grad_wire_dtype` rounds. "nearest", or "stochastic": up or down at
                random, so that the expectation of a gradient is the gradient. Values of
                `wire_dtype` are always rounded to the nearest.
            generator: makes the random numbers of "stochastic", on the device of the tensors.
                None: torch's default generator. Compiled code takes no other.
            async_op: returns a handle at once. The `wait()` of the handle gives the result. Do not
                write to the input before `wait()`.

        Returns:
            `[B, S, h, D]` or `[B, s, H, D]`, contiguous, with h = H/P and S = P*s, or with the
            given sizes. A tuple for a sequence of tensors. An `AsyncHandle` of either if
            `async_op`. In compiled code the compiler decides when the exchange runs, and the handle
            is complete at once.

        Raises:
            ValueError: not 4 dims, other dims than (2, 1) or (1, 2), a size that P does not divide
                or that the given sizes do not fit, a tensor on another device, a dtype that is not
                fp8, or a D that 16 does not divide with `wire_dtype` or `grad_wire_dtype`.
            TypeError: not a dense tensor, or a dtype that is not rounded to fp8.
        """
        with OpCall(self._runner, "all_to_all_4D") as call:
            plain = scatter_sizes is None and gather_sizes is None and not async_op
            plain = plain and wire_dtype is None and grad_wire_dtype is None
            plain = plain and rounding == "nearest" and generator is None
            if plain and isinstance(input_, Tensor):  # most calls
                call.check("input_", input_)
                splits = validation.all_to_all_4D(input_, self.world_size, scatter_dim, gather_dim)
                call.compare(input_, (scatter_dim, gather_dim))
                return call.run(functions.AllToAll, splits, input_, alone=(input_,))[0]
            call.check_open()
            packed = not isinstance(input_, Tensor)
            inputs = validation.tensors(input_)
            for each in inputs:
                call.check("input_", each)
                dims = validation.all_to_all_4D_dims(each, scatter_dim, gather_dim)
            wire = validation.wire_format(inputs, wire_dtype, grad_wire_dtype, rounding, generator)
            scatter = validation.scatter_splits(
                inputs, dims[0], scatter_sizes, self.world_size, packed=packed
            )
            sizes = validation.sizes_of_each("gather_sizes", gather_sizes, len(inputs))
            sizes_are_asked = "auto" in sizes
            if not sizes_are_asked:
                gather = validation.gather_splits(
                    inputs, dims[1], sizes, self.rank, self.world_size
                )
            call.compare(
                inputs,
                (scatter_dim, gather_dim),
                scatter_sizes=scatter_sizes,
                gather_sizes=gather_sizes,
                async_op=async_op or None,
                wire_dtype=None if wire is None else wire.dtypes,
                grad_wire_dtype=wire.gradient.dtypes if wire and wire.gradient else None,
                uneven_dim=None if gather_sizes is None else dims[1],
            )
            if sizes_are_asked:
                sizes = call.sizes_of_all_ranks([each.shape[dims[1]] for each in inputs])
                gather = validation.gather_splits(
                    inputs, dims[1], sizes, self.rank, self.world_size
                )
            splits = Splits(scatter, gather, wire)
            if async_op:
                return call.start(splits, inputs, packed=packed)
            outputs = call.run(functions.AllToAll, splits, *inputs, alone=inputs)
            return tuple(outputs) if packed else outputs[0]

    def all_gather(
        self,
        input_: Tensor,
        dim: int = -1,
        *,
        grad: Literal["reduce_scatter", "slice"] = "reduce_scatter",
        gather_sizes: Sizes = None,
    ) -> Tensor:
        """Joins every rank's tensor along `dim`, in rank order; every rank gets the result.

        Example (inside a rank, of 2):
            >>> communicator.all_gather(torch.full((1, 2), communicator.rank), dim=1)
            tensor([[0, 0, 1, 1]])

        The gradient is a reduce_scatter: dx_r = sum over ranks q of g_q[part r]. Part r is the part
        of rank r: c entries of `dim`, or `gather_sizes[r]` entries.

        Args:
            input_: `[A, c, ..]`, any dtype and strides. The shape is the same on every rank; with
                `gather_sizes` the size of `dim` may differ.
            dim: the dim along which the tensors are joined.
            grad: "reduce_scatter" if every rank computes a loss of its own from the result.
                "slice" if all ranks compute the same loss: the loss is then counted once,
                dx_r = g[part r], and the backward sends nothing.
            gather_sizes: every rank's size of `dim`, if the ranks have different sizes; the same
                list on all ranks. "auto": the ranks ask each other, in one more small collective.

        Returns:
            `[A, P*c, ..]`, or `[A, sum of the sizes, ..]`, contiguous.

        Raises:
            ValueError: a 0-d tensor, `dim` out of range, sizes that the tensor does not fit,
                another `grad`, or another device.
            TypeError: not a dense tensor.
        """
        with OpCall(self._runner, "all_gather") as call:
            call.check("input_", input_)
            validation.choice("grad", grad, ("reduce_scatter", "slice"))
            split = validation.all_gather(input_, dim)
            (sizes,) = validation.sizes_of_each("gather_sizes", gather_sizes, 1)
            if sizes not in (None, "auto"):
                split = validation.gather_split(
                    input_, split.dim, sizes, self.rank, self.world_size, "dim"
                )
            call.compare(
                input_,
                (dim,),
                gather_sizes=gather_sizes,
                grad=grad if grad == "slice" else None,
                uneven_dim=None if gather_sizes is None else dim,
            )
            if sizes == "auto":
                (sizes,) = call.sizes_of_all_ranks([input_.shape[split.dim]])
                split = validation.gather_split(
                    input_, split.dim, sizes, self.rank, self.world_size, "dim"
                )
            function = functions.AllGather if grad == "reduce_scatter" else functions.Unslice
            output: Tensor = call.run(function, input_, split, alone=input_)
            return output

    def all_reduce(
        self,
        input_: Tensor,
        op: AnyReduceOp | None = ReduceOp.SUM,
        *,
        grad: Literal["all_reduce", "identity"] = "all_reduce",
    ) -> Tensor:
        """Reduces a tensor over ranks, element by element, into a new tensor on every rank.

        Example (inside a rank, of 2):
            >>> communicator.all_reduce(torch.tensor([1.0, 5.0]) + communicator.rank)
            tensor([ 3., 11.])

        The gradient, with G = sum over ranks of g: dx = G for SUM and dx = G/P for AVG. For MAX and
        MIN, G goes to the ranks that hold the extreme, in equal shares. For PRODUCT, dx_r = G *
        product of the other ranks' values, which is also correct where a value is zero.

        Args:
            input_: any shape and strides, the same shape on every rank.
            op: SUM, AVG, MIN, MAX or PRODUCT; for integers also BAND, BOR or BXOR. None means SUM.
            grad: "all_reduce" if every rank computes a loss of its own from the result.
                "identity" if all ranks compute the same loss: the loss is then counted once,
                G = g, and for SUM and AVG the backward sends nothing.

        Returns:
            The same shape and dtype, contiguous.

        Raises:
            ValueError: another op or `grad`, or a tensor on another device.
            TypeError: not a dense tensor, or a dtype that `op` or the backends cannot reduce.
        """
        with OpCall(self._runner, "all_reduce") as call:
            call.check("input_", input_)
            validation.choice("grad", grad, ("all_reduce", "identity"))
            name = validation.all_reduce(input_, op)
            is_replicated = grad == "identity"
            call.compare(input_, (name,), grad=grad if is_replicated else None)
            output: Tensor = call.run(
                functions.AllReduce, input_, name, is_replicated, alone=input_
            )
            return output

    def reduce_scatter(
        self, input_: Tensor, dim: int = -1, *, scatter_sizes: Sizes = None
    ) -> Tensor:
        """This rank's part of the sum over ranks: what `all_reduce` and then `slice` give.

        Example (inside a rank, of 2):
            >>> communicator.reduce_scatter(torch.ones(3, 4))  # [A, P*c] -> [A, c]
            tensor([[2., 2.],
                    [2., 2.],
                    [2., 2.]])

        The gradient is an all_gather: dx = concat over ranks of g_r, the same on every rank.

        Args:
            input_: `[A, P*c, ..]`, the same shape on every rank; any strides.
            dim: the dim that is dealt out to the ranks; P divides its size, or `scatter_sizes` says
                what each rank gets.
            scatter_sizes: every rank's part of `dim`, the same list on all ranks. "auto": as even
                as can be (`near_even_sizes`).

        Returns:
            `[A, c, ..]`, or `[A, scatter_sizes[rank], ..]`, contiguous.

        Raises:
            ValueError: a size that P does not divide or that the given sizes do not fit, `dim` out
                of range, another device.
            TypeError: not a dense tensor, or a dtype that the backends cannot add.
        """
        with OpCall(self._runner, "reduce_scatter") as call:
            call.check("input_", input_)
            split = validation.reduce_scatter(input_, dim, scatter_sizes, self.world_size)
            call.compare(input_, (dim,), scatter_sizes=scatter_sizes)
            output: Tensor = call.run(functions.ReduceScatter, input_, split, alone=input_)
            return output

    def broadcast(self, input_: Tensor, src: int = 0) -> Tensor:
        """Rank `src`'s tensor, as a new tensor on every rank.

        Example (inside a rank, of 2):
            >>> x = torch.full((2,), float(communicator.rank))
            >>> communicator.broadcast(x, src=1)
            tensor([1., 1.])

        The gradient is the sum over ranks, on `src`: dx_src = sum over ranks r of g_r, and dx_r = 0
        elsewhere.

        Args:
            input_: `[*]`, the same shape and dtype on every rank; any dtype and strides. Only the
                values of rank `src` are read.
            src: the rank in the group that sends.

        Returns:
            `[*]`, contiguous, the same values on every rank.

        Raises:
            ValueError: `src` is out of range, or a tensor on another device.
            TypeError: not a dense tensor, or `src` is not an int.
        """
        with OpCall(self._runner, "broadcast") as call:
            call.check("input_", input_)
            validation.peer("src", src, self.rank, self.world_size, others_only=False)
            call.compare(input_, (src,))
            output: Tensor = call.run(functions.Broadcast, input_, src, alone=input_)
            return output

    def reduce_gradients(
        self, parameters: Tensor | Iterable[Tensor], *, average: bool = False
    ) -> None:
        """Sums the gradients of parameters that every rank holds over the ranks, in place.

        For each parameter, `grad` = sum over ranks of `grad`, or that sum divided by P. Call it
        once, between the last `backward` of a step and clipping or the optimizer.

        Example (inside a rank, of 2):
            >>> weight = torch.zeros(3, requires_grad=True)
            >>> (weight * (1 + communicator.rank)).sum().backward()  # of this rank's tokens
            >>> communicator.reduce_gradients([weight])
            >>> weight.grad  # the same on every rank
            tensor([3., 3., 3.])

        The ranks compare in one small collective what they have. A parameter whose `grad` is None
        on all ranks keeps None. Where it is None on some ranks only, the loss of those ranks does
        not depend on the parameter: their gradient counts as zeros, and they get the sum like the
        others. Gradients of one dtype travel together in buckets; by messages, one bucket is packed
        while the one before it travels. After an error some gradients may be summed and others
        not.

        Args:
            parameters: the same ones in the same order on every rank, of any shapes; one that is
                given twice is reduced once. Not those of FSDP and DDP, which reduce their
                gradients themselves.
            average: divides the sums by P.

        Raises:
            ValueError: no parameters (an iterator that is used up has none), a tensor on another
                device, a gradient whose elements share memory, or a call that is compiled.
            TypeError: a gradient that is sparse, a DTensor, or a dtype that the backends cannot
                add, unless the parameter is frozen; the error names index and shape of the
                parameter.
            MismatchError: the ranks gave different parameters, or another rank gave bad ones.
        """
        with OpCall(self._runner, "reduce_gradients") as call:
            call.check_open()
            call.check_not_compiled()
            try:
                checked = gradient_buckets.checked_parameters(parameters, self.device)
            except (TypeError, ValueError):
                call.bring_no_gradients()
                raise
            call.compare((), (), average=average or None)
            if self.world_size == 1:
                return
            gradients = call.gradients_of(checked)
            for gradient in gradients:
                call.count(gradient)
            size = gradient_buckets.BUCKET_BYTES
            call.run_unrecorded("add_buckets", gradient_buckets.buckets(gradients, size))
            if average and gradients:
                with torch.no_grad():
                    torch._foreach_div_(gradients, float(self.world_size))

    def slice(
        self,
        input_: Tensor,
        dim: int = -1,
        *,
        scale_grad: bool = False,
        scatter_sizes: Sizes = None,
    ) -> Tensor:
        """Returns this rank's part of a tensor that every rank holds; the forward sends nothing.

        Example (inside a rank, of 2):
            >>> part = communicator.slice(torch.arange(6), dim=0)
            >>> part.tolist() == [[0, 1, 2], [3, 4, 5]][communicator.rank]
            True

        The gradient is an all_gather: dx = concat over ranks of g_r. Every rank gets the whole
        gradient, divided by P if `scale_grad`.

        Args:
            input_: `[A, P*c, ..]`, the same values on every rank; any dtype and strides.
            dim: the dim that is divided among the ranks. P divides its size, or `scatter_sizes`
                says what each rank gets.
            scale_grad: divides the gradient by P, for losses that are averaged over ranks.
            scatter_sizes: every rank's part of `dim`, the same list on all ranks. "auto": as even
                as possible (`near_even_sizes`).

        Returns:
            `[A, c, ..]`, or `[A, scatter_sizes[rank], ..]`, contiguous, in memory of its own.

        Raises:
            ValueError: a size that P does not divide or that the given sizes do not fit, `dim` out
                of range, another device.
            TypeError: not a dense tensor.
        """
        with OpCall(self._runner, "slice") as call:
            call.check("input_", input_)
            split = validation.slice_sizes(input_, dim, scatter_sizes, self.world_size)
            call.compare(
                input_,
                (dim,),
                scatter_sizes=scatter_sizes,
                scale_grad=scale_grad or None,
                sends=False,
            )
            output: Tensor = call.run(functions.Slice, input_, split, scale_grad, alone=input_)
            return output

    def gather(self, input_: Tensor, dst: int = 0, dim: int = -1) -> Tensor | None:
        """As `all_gather`, but only rank `dst` gets the result. There is no gradient.

        Example (inside a rank, of 2):
            >>> whole = communicator.gather(torch.ones(2, 3), dst=1, dim=0)
            >>> whole is None if communicator.rank == 0 else whole.shape == (4, 3)
            True

        Args:
            input_: `[A, c, ..]`, the same shape on every rank; any dtype and strides.
            dst: the rank in the group that receives.
            dim: the dim along which the tensors are joined.

        Returns:
            `[A, P*c, ..]` on `dst`, contiguous and without `requires_grad`; None elsewhere.

        Raises:
            ValueError: a 0-d tensor, `dim` or `dst` out of range, another device, or a call that is
                compiled.
            TypeError: not a dense tensor.
        """
        with OpCall(self._runner, "gather") as call:
            call.check("input_", input_)
            dim = validation.all_gather(input_, dim).dim
            validation.peer("dst", dst, self.rank, self.world_size, others_only=False)
            if self.world_size == 1:
                return input_.detach()
            call.compare(input_, (dst, dim))
            output: Tensor | None = call.run_unrecorded("gather", input_, dst, dim)
            return output

    def send(self, tensor: Tensor, dst: int | None = None) -> None:
        """Sends a tensor to another rank, which calls `recv`. There is no gradient.

        Example (inside a rank, of 2):
            >>> if communicator.rank == 0:
            ...     communicator.send(torch.ones(3), dst=1)
            ... else:
            ...     assert communicator.recv((3,), torch.float32, src=0).sum() == 3

        Args:
            tensor: any shape, dtype and strides.
            dst: the rank in the group that receives; the next rank if None.

        Raises:
            ValueError: `dst` is out of range or this rank itself, another device, or a call that is
                compiled.
            TypeError: not a dense tensor.
        """
        with OpCall(self._runner, "send") as call:
            call.check("tensor", tensor)
            dst = (self.rank + 1) % self.world_size if dst is None else dst
            validation.peer("dst", dst, self.rank, self.world_size, others_only=True)
            call.compare_pair("send", tensor.shape, tensor.dtype, dst)
            call.run_unrecorded("send", tensor, dst)

    def recv(
        self, size: torch.Size | Sequence[int], dtype: torch.dtype, src: int | None = None
    ) -> Tensor:
        """Receives a tensor that another rank sends. There is no gradient.

        Example (inside a rank, of 2):
            >>> if communicator.rank == 0:
            ...     communicator.send(torch.ones(3), dst=1)
            ... else:
            ...     assert communicator.recv((3,), torch.float32, src=0).sum() == 3

        Args:
            size: the shape that was sent.
            dtype: the dtype that was sent.
            src: the rank in the group that sends; the previous rank if None.

        Returns:
            A new contiguous tensor on `device`.

        Raises:
            ValueError: `src` is out of range or this rank itself, or a call that is compiled.
            TypeError: `dtype` is not a dtype.
        """
        with OpCall(self._runner, "recv") as call:
            call.check_open()
            src = (self.rank - 1) % self.world_size if src is None else src
            validation.peer("src", src, self.rank, self.world_size, others_only=True)
            if not isinstance(dtype, torch.dtype):
                raise TypeError(f"dtype must be a torch.dtype, got {type(dtype).__name__}")
            call.compare_pair("recv", size, dtype, src)
            received: Tensor = call.run_unrecorded("recv", size, dtype, src, self.device)
            call.count(received)
            return received

    def barrier(self) -> None:
        """Waits until every rank of the group has called it, at most the group's timeout.

        Example (inside a rank, of 2):
            >>> communicator.barrier()  # what rank 0 wrote before, every rank can read now

        It moves nothing and carries no gradient. Where the group's backend is a GPU's, the host
        also waits for the work of this rank that is before it on the current stream.

        Raises:
            ValueError: the call is compiled; a graph has no place for it.
            CollectiveError: a rank died or did not come in time.
        """
        with OpCall(self._runner, "barrier") as call:
            call.check_open()
            call.check_not_compiled()
            call.compare((), ())
            if self.world_size > 1:
                call.run_unrecorded("barrier", self.device)

    def warmup(
        self,
        shapes: Iterable[Sequence[int] | Sequence[Sequence[int]]],
        dtypes: Iterable[torch.dtype] = (torch.bfloat16,),
        *,
        wire_dtype: torch.dtype | None = None,
        grad_wire_dtype: torch.dtype | None = None,
        rounding: Rounding = "nearest",
    ) -> None:
        """Prepares everything that the first training step needs; all ranks call it together.

        Exchanges tensors of the given shapes in both directions, forward and backward. The tensors
        are contiguous, and once more with the heads before the sequence, as attention leaves them.
        The other collectives run once. Connections open, kernels compile, buffers are allocated,
        memory is connected and NCCL is initialised. None of this may happen while a CUDA graph is
        captured.

        Example (inside a rank, of 2):
            >>> q, k = (1, 64, 6, 16), (1, 64, 2, 16)
            >>> communicator.warmup([q, (q, k, k)])  # one tensor, then three

        Args:
            shapes: the shapes `[B, s, H, D]` of this rank's tensors before attention, the same on
                every rank. For tensors that are exchanged in one call, give a sequence of their
                shapes. An H that P does not divide is divided as evenly as possible. Every H, D,
                number of tensors and dtype needs kernels of its own. A length s does not, except
                for very short sequences.
            dtypes: the dtypes of the tensors.
            wire_dtype: as in `all_to_all_4D`; one for all tensors.
            grad_wire_dtype: likewise.
            rounding: likewise. What is rounded to nearest and what is rounded at random needs
                kernels of its own.

        Raises:
            ValueError: a shape that is not 4 sizes; with a wire dtype, what `all_to_all_4D` says.
            TypeError: one shape instead of several of them, or one dtype.
        """
        with OpCall(self._runner, "warmup"):
            calls = warm_up.checked_calls(shapes, dtypes)
        own = DeviceCommunicatorBase  # a subclass may take fewer arguments
        exchange = functools.partial(
            own.all_to_all_4D,
            self,
            wire_dtype=wire_dtype,
            grad_wire_dtype=grad_wire_dtype,
            rounding=rounding,
        )
        for call in calls:
            for heads_first in (False, True):
                warm_up.there_and_back(
                    exchange,
                    call,
                    self.device,
                    self.world_size,
                    heads_first=heads_first,
                )
        warm_up.other_collectives(
            functools.partial(own.all_gather, self),
            functools.partial(own.slice, self),
            functools.partial(own.all_reduce, self),
            functools.partial(own.reduce_scatter, self),
            functools.partial(own.broadcast, self),
            self.device,
        )
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize(self.device)

    def stats(self) -> dict[str, OpStats]:
        """Returns the calls, bytes and seconds of each op so far. See `profiling.OpStats`.

        Example (inside a rank, of 2):
            >>> _ = communicator.all_gather(torch.ones(4), dim=0)
            >>> communicator.stats()["all_gather"].bytes >= 16
            True
        """
        return self._runner.stats.snapshot()

    def memory_stats(self) -> MemoryStats:
        """What this rank's shared memory takes, or why it is not used. See `MemoryStats`.

        Example:
            >>> communicator.memory_stats().refusal  # doctest: +SKIP
            'rank 3: it is switched off there'
        """
        return self._runner.group.memory_stats()

    def record_stream(self, tensor: Tensor, stream: torch.Stream) -> None:
        """Says that another stream uses an output, as `Tensor.record_stream` does.

        Where ranks on GPUs exchange by memory, call this and not `Tensor.record_stream`, which
        torch ignores for memory that its allocator did not make. An output needs it if work on a
        stream reads it that is not the stream on which the op was called or its handle waited for,
        and that work may not be done when the last reference to the output goes.

        Example:
            >>> communicator.record_stream(output, side_stream)  # doctest: +SKIP

        Args:
            tensor: an output of this communicator, or any tensor on its device.
            stream: the stream that uses it.
        """
        on_gpu = self._runner.group.device_memory
        if on_gpu is None or not on_gpu.record_stream(tensor, stream):
            tensor.record_stream(stream)

    def destroy(self) -> None:
        """Lets go of the buffers and of the groups; may be called again.

        The caller destroys the groups. If a gloo group lives until the interpreter ends, torch 2.13
        may abort, because gloo's threads still run. A communicator lets go by itself before that.
        """
        if self._runner.is_open:
            self._runner.close()
            del self.cpu_group, self.device_group

    def __repr__(self) -> str:
        """The class, this rank in its group, and the device."""
        state = f" on {self.device}" if self._runner.is_open else ", destroyed"
        return f"<{type(self).__name__}: {self._runner.group.place}{state}>"

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


def _destroy(reference: weakref.ref[DeviceCommunicatorBase]) -> None:
    communicator = reference()
    if communicator is not None:
        communicator.destroy()
