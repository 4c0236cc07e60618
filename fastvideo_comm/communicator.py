"""`DeviceCommunicatorBase`: the public ops of a group. Resolve, validate, call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from . import collectives, validation
from .autograd import DistributedAutograd, Flight, exchange_tensors
from .exchange import Exchange
from .forward_only import ForwardOnly
from .handle import AsyncHandle
from .validation import Sizes


class DeviceCommunicatorBase(ForwardOnly):
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

    @overload
    def all_to_all_4D(
        self,
        input_: Tensor,
        scatter_dim: int = 2,
        gather_dim: int = 1,
        *,
        scatter_sizes: Sizes = None,
        gather_sizes: Sizes = None,
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
        async_op: bool = False,
    ) -> Any:
        """Trades this rank's slice of one dim for its slice of another: heads for sequence.

        Example (inside a rank; H = 6 heads on P = 2 ranks):
            >>> x = torch.randn(1, 5, 6, 8)  # doctest: +SKIP
            >>> communicator.all_to_all_4D(x).shape  # doctest: +SKIP
            torch.Size([1, 10, 3, 8])
            >>> q, k, v = communicator.all_to_all_4D((q, k, v))  # one exchange  # doctest: +SKIP

        The gradient is the inverse exchange: dx = all_to_all_4D(g, gather_dim, scatter_dim).

        Args:
            input_: `[B, s, H, D]` for (2, 1): all heads of this rank's sequence; `[B, S, h, D]` for
                (1, 2): the whole sequence of this rank's heads. Any dtype; any strides, read in
                place. Or a sequence of such tensors, which may differ in everything, and are
                exchanged together. Among several, key and value heads fewer than the ranks,
                H < P with P a multiple of H, go to each of the P/H ranks whose query heads use
                them, and their gradients are summed.
            scatter_dim: the dim that is dealt out to the ranks; P divides its size, or
                `scatter_sizes` says what each rank gets.
            gather_dim: the dim that comes together from the ranks, in rank order.
            scatter_sizes: every rank's part of `scatter_dim`, the same list on all ranks; one list
                for all tensors or one for each. "auto": as even as can be (`near_even_sizes`).
            gather_sizes: what every rank has of `gather_dim`, where it is not the same for all.
                "auto": asked of the ranks, in one small collective more.
            async_op: returns at once a handle, whose `wait()` gives the result; until then the
                input must not be written.

        Returns:
            `[B, S, h, D]` or `[B, s, H, D]`, contiguous, with h = H/P and S = P*s, or what the
            sizes say; a tuple for a sequence; an `AsyncHandle` of either if `async_op`. A compiled
            call is asynchronous as the compiler sees fit, and its handle is complete.

        Raises:
            ValueError: not 4 dims, other dims than (2, 1) or (1, 2), a size that P does not divide
                or that the given sizes do not fit, or a tensor on another device.
            TypeError: not a dense tensor.
        """
        with self._named("all_to_all_4D"):
            if isinstance(input_, Tensor) and not (scatter_sizes or gather_sizes or async_op):
                dims = (scatter_dim, gather_dim)
                return self._exchange(
                    "all_to_all_4D",
                    DistributedAutograd.AllToAll4D,
                    lambda: validation.all_to_all_4D(input_, self.world_size, *dims),
                    input_,
                    self.world_size,
                    *dims,
                )
            inputs = validation.tensors(input_)

            def compare() -> None:
                self._diagnosis.before(
                    "all_to_all_4D",
                    inputs,
                    (scatter_dim, gather_dim, scatter_sizes, gather_sizes, async_op),
                    uneven_dim=None if gather_sizes is None else gather_dim,
                )

            def sizes_of_all_ranks(sizes: list[int]) -> list[list[int]]:
                compare()  # before anything is sent, and this is
                return self._sizes_of_all_ranks(sizes)

            for each in inputs:
                validation.check_tensor("input_", each)
                validation.check_device("input_", each, self.device)
                self._count("all_to_all_4D", each)
            packed = not isinstance(input_, Tensor)
            what = Exchange(
                *validation.exchange_shares(
                    inputs,
                    (scatter_dim, gather_dim),
                    (scatter_sizes, gather_sizes),
                    (self.rank, self.world_size),
                    packed=packed,
                    sizes_of_all_ranks=sizes_of_all_ranks,
                )
            )
            if gather_sizes != "auto":
                compare()
            return self._trade(inputs, what, packed=packed, async_op=async_op)

    def all_gather(
        self,
        input_: Tensor,
        dim: int = -1,
        *,
        grad: Literal["reduce_scatter", "slice"] = "reduce_scatter",
    ) -> Tensor:
        """Every rank's tensor side by side along `dim`, in rank order, on every rank.

        The gradient is a reduce_scatter: dx_r = sum over ranks q of g_q[part r].

        Args:
            input_: `[A, c, ..]`, the same shape on every rank; any dtype and strides.
            dim: the dim along which the tensors are joined.
            grad: "reduce_scatter" where every rank computes a loss of its own from the result;
                "slice" where all ranks compute the same loss, which is then counted once:
                dx_r = g[part r], and nothing is sent.

        Returns:
            `[A, P*c, ..]`, contiguous.

        Raises:
            ValueError: a 0-d tensor, `dim` out of range, another `grad`, or another device.
            TypeError: not a dense tensor.
        """
        with self._named("all_gather"):
            validation.choice("grad", grad, ("reduce_scatter", "slice"))
            function: type[torch.autograd.Function] = DistributedAutograd.AllGather
            if grad == "slice":
                function = DistributedAutograd.Unslice
            return self._exchange(
                "all_gather",
                function,
                lambda: validation.all_gather(input_, dim),
                input_,
                self.world_size,
                dim,
            )

    def all_reduce(
        self,
        input_: Tensor,
        op: validation.ReduceOp | None = ReduceOp.SUM,
        *,
        grad: Literal["all_reduce", "identity"] = "all_reduce",
    ) -> Tensor:
        """The reduction over ranks, element by element, as a new tensor on every rank.

        With G = sum over ranks of g: dx = G for SUM, G/P for AVG; for MAX and MIN G goes to the
        ranks that hold the extreme, in equal shares; for PRODUCT dx_r = G * product of the other
        ranks' values, exact also with zeros.

        Args:
            input_: any shape and strides, the same shape on every rank.
            op: SUM (also for None), AVG, MIN, MAX, PRODUCT; BAND, BOR, BXOR for integers.
            grad: "all_reduce" where every rank computes a loss of its own from the result;
                "identity" where all ranks compute the same loss, which is then counted once:
                G = g, and nothing is sent.

        Returns:
            The same shape and dtype, contiguous.

        Raises:
            ValueError: another op or `grad`, or a tensor on another device.
            TypeError: not a dense tensor, or a dtype that `op` or the backends cannot reduce.
        """
        with self._named("all_reduce"):
            validation.choice("grad", grad, ("all_reduce", "identity"))
            function: type[torch.autograd.Function] = DistributedAutograd.AllReduce
            if grad == "identity":
                function = DistributedAutograd.ReplicatedAllReduce
            return self._exchange(
                "all_reduce", function, lambda: validation.all_reduce(input_, op), input_, op
            )

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
            return self._exchange(
                "slice",
                DistributedAutograd.Slice,
                lambda: validation.parts(input_, self.world_size, dim),
                input_,
                self.world_size,
                dim,
                scale_grad,
            )

    def warmup(
        self,
        shapes: Iterable[Sequence[int]],
        dtypes: Iterable[torch.dtype] = (torch.bfloat16,),
    ) -> None:
        """Makes the first training step cost what the second does; a collective itself.

        Exchanges tensors of the given shapes there and back, forward and backward, and runs the
        other collectives once: connections open, kernels compile, wire buffers are allocated, and
        NCCL is initialised, which must not happen under the capture of a CUDA graph.

        Args:
            shapes: of this rank's tensors before attention, `[B, s, H, D]`; P divides H.
            dtypes: of the tensors.
        """
        dtypes = tuple(dtypes)
        for shape in shapes:
            for dtype in dtypes:
                x = torch.zeros(tuple(shape), dtype=dtype, device=self.device)
                x.requires_grad_(dtype.is_floating_point)
                y = self.all_to_all_4D(self.all_to_all_4D(x), 1, 2)
                if y.requires_grad:
                    y.backward(torch.zeros_like(y))
        small = torch.zeros(self.world_size, device=self.device, requires_grad=True)
        (self.all_gather(small).sum() + self.all_reduce(small).sum()).backward()
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize(self.device)

    def _exchange(
        self,
        op: str,
        function: type[torch.autograd.Function],
        validate: Callable[[], object],
        input_: Tensor,
        *arguments: Any,
    ) -> Tensor:
        """The one way through for differentiable ops.

        `function` validates its arguments itself, for those who apply it directly; `validate` does
        where it is not applied, or where the ranks compare arguments first.
        """
        channel = self._open()
        validation.check_tensor("input_", input_)
        validation.check_device("input_", input_, self.device)
        if self.world_size == 1 or self._compares_next():
            validate()
        if self.world_size == 1:
            return input_
        self._diagnosis.before(op, input_, arguments)
        self._count(op, input_)
        # A compiled graph holds the group; the compiler plans the buffers itself.
        group = self.device_group if torch.compiler.is_compiling() else channel
        output: Tensor = function.apply(group, collectives.plain(input_), *arguments)
        return output

    def _sizes_of_all_ranks(self, sizes: list[int]) -> list[list[int]]:
        """For each of this rank's sizes, what it is on every rank: one small all_gather.

        Never remembered: a rank whose size did not change would not know that another's did.
        """
        if torch.compiler.is_compiling():
            raise ValueError("gather_sizes must be given where a call is compiled, got 'auto'")
        on_device = self.cpu_group is self.device_group
        own = torch.tensor([sizes], device=self.device if on_device else "cpu")
        every: list[list[int]] = collectives.all_gather(self.cpu_group, own, 0).T.tolist()
        return every

    def _trade(
        self, inputs: tuple[Tensor, ...], what: Exchange, *, packed: bool, async_op: bool
    ) -> Any:
        """As `_exchange`, for an exchange with a plan."""
        channel = self._open()

        def result(outputs: Sequence[Tensor]) -> Any:
            return tuple(outputs) if packed else outputs[0]

        if self.world_size == 1:
            done = result(inputs)
            return AsyncHandle.done(done) if async_op else done
        inputs = tuple(collectives.plain(input_) for input_ in inputs)
        if torch.compiler.is_compiling() or not async_op:
            group = self.device_group if torch.compiler.is_compiling() else channel
            done = result(exchange_tensors(group, what, inputs))
            return AsyncHandle.done(done) if async_op else done
        flight = Flight(what)
        token = DistributedAutograd.Start4D.apply(channel, flight, *inputs)
        return AsyncHandle(
            "all_to_all_4D",
            lambda: result(DistributedAutograd.Finish4D.apply(channel, flight, token)),
            flight.is_completed,
        )
