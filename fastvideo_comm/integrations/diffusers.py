"""diffusers' context parallelism over this library's exchange.

`install()` replaces the classes of `diffusers.models.attention_dispatch` that exchange heads for
sequence:

    ulysses_degree=N                         TemplatedUlyssesAttention
    ulysses_degree=N, ulysses_anything=True  TemplatedUlyssesAnythingAttention
    ulysses_degree=N, ring_degree=M          SeqAllToAllDim; the ring stays diffusers'

Ring attention alone (`ring_degree=N`, with or without `ring_anything`) exchanges no heads and stays
diffusers'. The attention between the exchanges is diffusers' `forward_op` and `backward_op`, for
every backend that diffusers runs in parallel. Query, key and value travel in one exchange.

With `ulysses_anything`, gradients flow (diffusers itself refuses them), and any number of ranks may
divide any number of heads.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from fastvideo_comm.collective.layout import near_even_sizes
from fastvideo_comm.communicator import DeviceCommunicatorBase

from .installation import Installation, checked_version, uninstall_from
from .sequence_exchange import Communicators, check_shared, install_functions

KNOWN_VERSIONS = ("0.42.1",)
_MODULE = "diffusers.models.attention_dispatch"
SERVED = (
    "ulysses_degree=N",
    "ulysses_degree=N, ulysses_anything=True",
    "ulysses_degree=N, ring_degree=M",
)
_AttentionResult: TypeAlias = Tensor | tuple[Tensor, Tensor]
_Sizes: TypeAlias = tuple[list[int] | None, list[int] | None, list[int] | None]


class SeqAllToAllDim:
    """Replaces diffusers' Function of this name: its `apply` takes the same arguments.

    Example (what diffusers does):
        >>> SeqAllToAllDim(Communicators("diffusers")).apply(group, q, 2, 1)  # doctest: +SKIP
    """

    def __init__(self, communicators: Communicators) -> None:
        """Exchanges through `communicators`."""
        self._communicators = communicators

    def apply(
        self,
        group: ProcessGroup | None,
        input_: Tensor,
        scatter_id: int = 2,
        gather_id: int = 1,
    ) -> Tensor:
        """`[B, s, H, D] -> [B, S, h, D]` for (2, 1), and back for (1, 2); differentiable."""
        communicator = self._communicators.of(group, input_)
        check_shared(communicator, input_, scatter_id, "choose a ulysses_degree that divides it")
        return communicator.all_to_all_4D(input_, scatter_id, gather_id)


class TemplatedUlyssesAttention:
    """Replaces diffusers' Function of this name: its `apply` takes the same arguments.

    Example (what diffusers does):
        >>> TemplatedUlyssesAttention(Communicators("diffusers")).apply(
        ...     query, key, value, *arguments, parallel_config
        ... )  # doctest: +SKIP
    """

    def __init__(self, communicators: Communicators) -> None:
        """Exchanges through `communicators`."""
        self._communicators = communicators

    def apply(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
        return_lse: bool,
        forward_op: Any,
        backward_op: Any,
        _parallel_config: Any = None,
    ) -> _AttentionResult:
        """Attention over the sequence of all ranks, `[B, s, H, D] -> [B, s, H, D]`; differentiable.

        Args:
            query: `[B, s, H, D]`, this rank's.
            key: as `query`; its s may be another.
            value: as `key`.
            attn_mask: for the keys of the whole sequence, or of this rank: its last size decides.
            dropout_p: handed to `forward_op`.
            is_causal: see `dropout_p`.
            scale: see `dropout_p`.
            enable_gqa: see `dropout_p`.
            return_lse: also return the log-sum-exp.
            forward_op: diffusers' attention of one rank.
            backward_op: the gradient of `forward_op`.
            _parallel_config: diffusers' `ParallelConfig`.

        Returns:
            The output, or output and log-sum-exp `[B, s, H]`; no gradient flows through the latter.
        """
        group = _parallel_config.context_parallel_config._ulysses_mesh.get_group()
        communicator = self._communicators.of(group, query)
        query_sizes, key_sizes, heads = self._sizes(communicator, query, key)
        gather_sizes = None if query_sizes is None else [query_sizes, key_sizes, key_sizes]
        arguments = (dropout_p, is_causal, scale, enable_gqa, return_lse)
        operators = (forward_op, backward_op, _parallel_config)

        if attn_mask is not None and attn_mask.shape[-1] == key.shape[1]:
            attn_mask = communicator.all_gather(attn_mask, -1, gather_sizes=key_sizes)
        query, key, value = communicator.all_to_all_4D(
            (query, key, value), 2, 1, scatter_sizes=heads, gather_sizes=gather_sizes
        )
        result = _LocalAttention.apply(query, key, value, attn_mask, *arguments, *operators)
        outputs: tuple[Tensor, ...] = result if return_lse else (result,)
        outputs = communicator.all_to_all_4D(
            # The log-sum-exp is [B, S, h], or [B, S, h, 1] from some backends.
            [x if x.dim() == 4 else x.unsqueeze(-1) for x in outputs],
            *(1, 2),
            scatter_sizes=query_sizes,
            gather_sizes=heads,
        )
        return (outputs[0], outputs[1].squeeze(-1)) if return_lse else outputs[0]

    def _sizes(self, communicator: DeviceCommunicatorBase, query: Tensor, key: Tensor) -> _Sizes:
        """Every rank's sizes of queries, keys and heads; None where all ranks have the same."""
        for each in (query, key):
            check_shared(communicator, each, 2, "ulysses_anything=True shares any number of heads")
        return None, None, None


class TemplatedUlyssesAnythingAttention(TemplatedUlyssesAttention):
    """Replaces diffusers' Function for sequences and heads that P does not divide.

    Example (what diffusers does):
        >>> TemplatedUlyssesAnythingAttention(Communicators("diffusers")).apply(
        ...     query, key, value, *arguments, parallel_config
        ... )  # doctest: +SKIP
    """

    def _sizes(self, communicator: DeviceCommunicatorBase, query: Tensor, key: Tensor) -> _Sizes:
        """Asks all ranks in one small collective at every call: the sizes of others may change."""
        own = torch.tensor([[query.shape[1], key.shape[1]]], device=query.device)
        query_sizes, key_sizes = communicator.all_gather(own, 0).T.tolist()
        return query_sizes, key_sizes, near_even_sizes(query.shape[2], communicator.world_size)


class _LocalAttention(torch.autograd.Function):
    """diffusers' attention of one rank: `forward_op` and `backward_op`, which share its `ctx`."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        *arguments: Any,
    ) -> _AttentionResult:
        """`[B, S, h, D] -> [B, S, h, D]`, and the log-sum-exp if `return_lse`."""
        *arguments_of_op, return_lse, forward_op, backward_op, parallel_config = arguments
        if query.shape[2] == 0:
            forward_op, backward_op = _attention_without_heads, _gradient_without_heads
        ctx.forward_op, ctx.backward_op = forward_op, backward_op
        ctx._parallel_config = parallel_config
        result = forward_op(
            *(ctx, query, key, value, attn_mask, *arguments_of_op, return_lse),
            _save_ctx=True,
            _parallel_config=parallel_config,
        )
        return tuple(result[:2]) if return_lse else result

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """As diffusers: the gradient of the log-sum-exp is left out."""
        grad_query, grad_key, grad_value, *_ = ctx.backward_op(ctx, grad_out)
        return grad_query, grad_key, grad_value, *(None,) * 9


def _attention_without_heads(
    ctx: Any, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **__: Any
) -> _AttentionResult:
    """The result of a rank without heads: torch's own may end the process (2.11, on the CPU)."""
    ctx.save_for_backward(query, key, value)
    *_, return_lse = arguments
    shape = query.shape[:3]
    out = query.new_empty(*shape, value.shape[-1])
    return (out, query.new_empty(shape, dtype=torch.float32)) if return_lse else out


def _gradient_without_heads(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
    return tuple(map(torch.zeros_like, ctx.saved_tensors))


def install(*, allow_unknown_version: bool = False) -> Installation:
    """Makes the installed diffusers use this library's exchange in Ulysses and unified attention.

    Example:
        >>> from fastvideo_comm.integrations import diffusers
        >>> with diffusers.install() as installation:  # doctest: +SKIP
        ...     print(installation)  # what is replaced, and which configurations it serves
        ...     transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
        ...     pipeline(prompt)

    Args:
        allow_unknown_version: tries versions that this library was not tested with.

    Returns:
        The installation; a second call returns the first one's.

    Raises:
        IntegrationError: diffusers is not installed, has an unknown version, or lacks a name.
    """
    version = checked_version("diffusers", KNOWN_VERSIONS, allow_unknown=allow_unknown_version)
    functions = (SeqAllToAllDim, TemplatedUlyssesAttention, TemplatedUlyssesAnythingAttention)
    return install_functions("diffusers", version, _MODULE, functions, SERVED)


def uninstall() -> None:
    """Undoes `install`; does nothing where it was not called."""
    uninstall_from(_MODULE)
