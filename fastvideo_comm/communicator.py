"""`DeviceCommunicatorBase`: the public ops of a group. Resolve, validate, call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from .autograd import DistributedAutograd
from .collective import validation
from .collective.exchange import Exchange
from .collective.layout import Share
from .collective.validation import Sizes
from .differentiable import Differentiable
from .forward_only import ForwardOnly
from .handle import AsyncHandle
from .warm_up import checked_calls, other_collectives, there_and_back


class DeviceCommunicatorBase(Differentiable, ForwardOnly):
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
                for all tensors or one for each. "auto": as even as can be (`near_even_sizes`); the
                heads of several tensors so that every rank has the key heads of its query heads.
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
            dims = (scatter_dim, gather_dim)
            inputs = validation.tensors(input_)

            def compare() -> None:
                self._diagnosis.before(
                    "all_to_all_4D",
                    inputs,
                    dims,
                    scatter_sizes=scatter_sizes,
                    gather_sizes=gather_sizes,
                    async_op=async_op or None,
                    uneven_dim=None if gather_sizes is None else gather_dim,
                )

            def sizes_of_all_ranks(sizes: list[int]) -> list[list[int]]:
                compare()  # before anything is sent, and this is
                return self._sizes_of_all_ranks(sizes)

            packed = not isinstance(input_, Tensor)
            if not (packed or async_op) and scatter_sizes is None and gather_sizes is None:
                return self._exchange(
                    "all_to_all_4D",
                    DistributedAutograd.AllToAll4D,
                    lambda: validation.all_to_all_4D(inputs[0], self.world_size, *dims),
                    compare,
                    inputs[0],
                    self.world_size,
                    *dims,
                )
            for each in inputs:
                self._check(each)
                self._count("all_to_all_4D", each)
            what = Exchange(
                *validation.exchange_shares(
                    inputs,
                    dims,
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
        gather_sizes: Sizes = None,
    ) -> Tensor:
        """Every rank's tensor side by side along `dim`, in rank order, on every rank.

        The gradient is a reduce_scatter: dx_r = sum over ranks q of g_q[part r], where part r is
        what rank r brought: c entries of `dim`, or `gather_sizes[r]`.

        Args:
            input_: `[A, c, ..]`, the same shape on every rank, but for `dim` if `gather_sizes` are
                given; any dtype and strides.
            dim: the dim along which the tensors are joined.
            grad: "reduce_scatter" where every rank computes a loss of its own from the result;
                "slice" where all ranks compute the same loss, which is then counted once:
                dx_r = g[part r], and nothing is sent.
            gather_sizes: what every rank has of `dim`, where it is not the same for all; the same
                list on all ranks. "auto": asked of the ranks, in one small collective more.

        Returns:
            `[A, P*c, ..]`, or `[A, sum of the sizes, ..]`, contiguous.

        Raises:
            ValueError: a 0-d tensor, `dim` out of range, sizes that the tensor does not fit,
                another `grad`, or another device.
            TypeError: not a dense tensor.
        """
        with self._named("all_gather"):
            validation.choice("grad", grad, ("reduce_scatter", "slice"))
            function: type[torch.autograd.Function] = DistributedAutograd.AllGather
            if grad == "slice":
                function = DistributedAutograd.Unslice

            def compare() -> None:
                self._diagnosis.before(
                    "all_gather",
                    input_,
                    (dim,),
                    gather_sizes=gather_sizes,
                    grad=grad if grad == "slice" else None,
                    uneven_dim=None if gather_sizes is None else dim,
                )

            def sizes_of_all_ranks(sizes: list[int]) -> list[list[int]]:
                compare()
                return self._sizes_of_all_ranks(sizes)

            share: int | Share = dim
            if gather_sizes is not None:
                self._check(input_)
                share = validation.all_gather_sizes(
                    input_,
                    dim,
                    gather_sizes,
                    (self.rank, self.world_size),
                    sizes_of_all_ranks=sizes_of_all_ranks,
                )
            return self._exchange(
                "all_gather",
                function,
                lambda: validation.all_gather(input_, share),
                None if gather_sizes == "auto" else compare,
                input_,
                self.world_size,
                share,
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
                "all_reduce",
                function,
                lambda: validation.all_reduce(input_, op),
                lambda: self._diagnosis.before(
                    "all_reduce", input_, (op,), grad=grad if grad == "identity" else None
                ),
                input_,
                op,
            )

    def slice(
        self,
        input_: Tensor,
        dim: int = -1,
        *,
        scale_grad: bool = False,
        scatter_sizes: Sizes = None,
    ) -> Tensor:
        """This rank's part of a tensor that every rank holds; nothing is sent in the forward.

        The gradient is an all_gather: dx = concat over ranks of g_r, the whole gradient on every
        rank, divided by P if `scale_grad`.

        Args:
            input_: `[A, P*c, ..]`, the same values on every rank; any dtype and strides.
            dim: the dim that is dealt out to the ranks; P divides its size, or `scatter_sizes` says
                what each rank gets.
            scale_grad: divides the gradient by P, for losses that are averaged over ranks.
            scatter_sizes: every rank's part of `dim`, the same list on all ranks. "auto": as even
                as can be (`near_even_sizes`).

        Returns:
            `[A, c, ..]`, or `[A, scatter_sizes[rank], ..]`, contiguous, in memory of its own.

        Raises:
            ValueError: a size that P does not divide or that the given sizes do not fit, `dim` out
                of range, another device.
            TypeError: not a dense tensor.
        """
        with self._named("slice"):
            share: int | Share = dim
            if scatter_sizes is not None:
                self._check(input_)
                share = validation.slice_sizes(input_, dim, scatter_sizes, self.world_size)
            return self._exchange(
                "slice",
                DistributedAutograd.Slice,
                lambda: validation.slice_(input_, self.world_size, share),
                lambda: self._diagnosis.before(
                    "slice",
                    input_,
                    (dim,),
                    scatter_sizes=scatter_sizes,
                    scale_grad=scale_grad or None,
                ),
                input_,
                self.world_size,
                share,
                scale_grad,
            )

    def warmup(
        self,
        shapes: Iterable[Sequence[int] | Sequence[Sequence[int]]],
        dtypes: Iterable[torch.dtype] = (torch.bfloat16,),
    ) -> None:
        """Makes the first training step cost what the second does; a collective itself.

        Exchanges tensors of the given shapes there and back, forward and backward, contiguous and
        with the heads before the sequence, as attention leaves them; and runs the other collectives
        once. Connections open, kernels compile, wire buffers are allocated, and NCCL is
        initialised, which must not happen under the capture of a CUDA graph.

        Example (inside a rank):
            >>> q, k = (1, 4096, 24, 128), (1, 4096, 8, 128)
            >>> communicator.warmup([q, (q, k, k)])  # alone, and three in one  # doctest: +SKIP

        Args:
            shapes: of this rank's tensors before attention, `[B, s, H, D]`, the same on every rank;
                for tensors that are exchanged in one call a sequence of their shapes. H that P does
                not divide is dealt out as evenly as can be. From a few dozen on no length s needs
                kernels of its own; every H, D, number of tensors and dtype does.
            dtypes: of the tensors.

        Raises:
            ValueError: a shape that is not 4 sizes.
            TypeError: one shape instead of several of them, or one dtype.
        """
        with self._named("warmup"):
            calls = checked_calls(shapes, dtypes)
        for call in calls:
            for heads_first in (False, True):
                there_and_back(self, call, heads_first=heads_first)
        other_collectives(self)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize(self.device)
