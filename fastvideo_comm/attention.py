"""Attention around the exchange: this rank's tokens there, this rank's heads back.

Everything here is made of `all_to_all_4D`, so gradients, second derivatives and compilation are
those of the exchange and of the attention between.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import _StopRecomputationError

from .collective import validation
from .collective.validation import Rounding, WireDtypes
from .communicator import DeviceCommunicatorBase
from .handle import AsyncHandle
from .head_plan import HeadPlan, plan_heads, uneven
from .op_runner import OpCall

# query [B, S, h, D], key and value [B, S, k, D] -> [B, S, h, D]
Attention: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
Joint: TypeAlias = tuple[Tensor, Tensor, Tensor]
RankSizes: TypeAlias = "Sequence[int] | Literal['auto'] | None"
FourDtypes: TypeAlias = "tuple[torch.dtype | None, ...]"

_OP = "ulysses_attention"


@overload
def ulysses_attention(
    communicator: DeviceCommunicatorBase,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention: Attention | None = None,
    *,
    joint: None = None,
    pipeline: int = 1,
    gather_sizes: RankSizes = None,
    wire_dtype: WireDtypes = None,
    grad_wire_dtype: WireDtypes = None,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
) -> Tensor: ...


@overload
def ulysses_attention(
    communicator: DeviceCommunicatorBase,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention: Attention | None = None,
    *,
    joint: Joint,
    pipeline: int = 1,
    gather_sizes: RankSizes = None,
    wire_dtype: WireDtypes = None,
    grad_wire_dtype: WireDtypes = None,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]: ...


def ulysses_attention(
    communicator: DeviceCommunicatorBase,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention: Attention | None = None,
    *,
    joint: Joint | None = None,
    pipeline: int = 1,
    gather_sizes: RankSizes = None,
    wire_dtype: WireDtypes = None,
    grad_wire_dtype: WireDtypes = None,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the whole sequence, of which every rank brings its part and takes it away.

    Example (inside a rank, of 2; H = 6 heads):
        >>> q, k, v = (torch.randn(1, 5, 6, 8) for _ in "qkv")  # this rank's 5 tokens of 10
        >>> ulysses_attention(communicator, q, k, v).shape
        torch.Size([1, 5, 6, 8])
        >>> text = tuple(torch.ones(1, 7, 6, 8) for _ in "qkv")  # the same on every rank
        >>> out, text_out = ulysses_attention(communicator, q, k, v, joint=text)
        >>> text_out.shape
        torch.Size([1, 7, 6, 8])

    query, key and value travel in one exchange, so that each rank has all tokens of some heads;
    `attention` computes them; one exchange brings the result back. Any number of heads works:
    `head_plan` says which rank computes which.

    Joint tokens take part once, behind the sequence. Every rank takes the heads that it computes
    from its own copy of them, so they are not sent; their result travels in the exchange back.
    With A the attention over S + T tokens, x_r rank r's copy of the joint tokens and L_r its loss:

        out_r = A(.., x)[tokens of r]     joint_out = A(.., x)[the last T tokens], on every rank
        d joint_out = sum over r of dL_r / d joint_out
        d x_r = what comes to x through the heads of rank r, 0 for other heads
        sum over r of d x_r = d(sum over r of L_r) / d x

    So the gradient of each parameter is the sum over ranks, whether text or video came through it;
    and joint_out may go on through the same layers on every rank, to the next attention and to the
    loss. A loss that all ranks compute from joint_out alike is counted P times, like every loss
    that all ranks share: divide it by P, or add it on one rank. Ranks that do not use a result
    still take part in its backward, if they use the other.

    Args:
        communicator: of the P ranks that share the sequence.
        query: `[B, s, H, D]`, any strides.
        key: `[B, s, K, D]`, any strides; K divides H.
        value: `[B, s, K, E]`, any strides; E is often D.
        attention: takes `[B, S, h, D]`, `[B, S, k, D]` and `[B, S, k, E]`, where query heads share
            key heads as in torch's `enable_gqa`, and returns `[B, S, h, E]`; with joint tokens, of
            S + T tokens. The tokens, and so masks and positions, stand in the order of ranks, the
            joint ones last. It is called for each stage of a pipeline, and not called where a rank
            has no heads: where there is such a rank, the result has the dtype of `value`, or that
            of autocast, and a gradient if one of the three has one. None: torch's
            `scaled_dot_product_attention`.
        joint: query `[B, T, H, D]`, key `[B, T, K, D]` and value `[B, T, K, E]` of tokens that are
            the same on every rank.
        pipeline: in how many stages the heads of a rank travel: while one is computed, the next and
            the last result are on their way, in the backward too. Fewer where a rank has fewer
            heads. The result is the same.
        gather_sizes: every rank's s, where it is not the same for all; the same list on all ranks.
            "auto": asked of the ranks, in one small collective more.
        wire_dtype: what query, key, value and the result are rounded to while they travel, as in
            `all_to_all_4D`: one dtype for all of them, or four: one or None for each.
        grad_wire_dtype: the same for their gradients.
        rounding: how gradients are rounded, as in `all_to_all_4D`.
        generator: makes the random numbers of rounding, as in `all_to_all_4D`.

    Returns:
        `[B, s, H, E]`; with `joint` also joint_out `[B, T, H, E]`, whole on every rank.

    Raises:
        ValueError: shapes that do not fit each other, `pipeline` below 1, `gather_sizes` that do
            not fit, another device, an attention that returns another shape, or a dtype or shape
            that does not travel as fp8.
        TypeError: not tensors, or an attention that cannot be called or returns no tensor.
    """
    if not isinstance(communicator, DeviceCommunicatorBase):
        raise TypeError(
            f"communicator must be a DeviceCommunicatorBase, got {type(communicator).__name__}"
        )
    with OpCall(communicator._runner, _OP):
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            _check_tensor(name, tensor, "s", communicator.device)
        _check_video(query, key, value)
        if joint is not None:
            _check_joint(joint, query, key, value)
        _check_settings(attention, pipeline)
        _check_sizes(gather_sizes, query, communicator)
        wire = _Wire(
            _four("wire_dtype", wire_dtype),
            _four("grad_wire_dtype", grad_wire_dtype),
            {"rounding": rounding, "generator": generator},
        )
        validation.wire_format((query, key, value, value), *wire[:2], rounding, generator)
    rows = gather_sizes
    if isinstance(rows, str):  # asked once, for both ways
        own = torch.tensor([query.shape[1]], device=communicator.device)
        rows = communicator.all_gather(own, 0).tolist()
    world_size = communicator.world_size
    plan = plan_heads(query.shape[2], key.shape[2], world_size, pipeline if world_size > 1 else 1)
    layer = _Layer(communicator, plan, attention or _scaled_dot_product_attention, rows, wire)
    outputs = layer(plan.sent(query, key, value), joint)
    out, *joint_out = [plan.joined(stages) for stages in zip(*outputs, strict=True)]
    return (out, joint_out[0]) if joint_out else out


class _Wire(NamedTuple):
    """What query, key, value, result and their gradients are rounded to while they travel."""

    dtypes: FourDtypes
    of_gradients: FourDtypes
    settings: dict[str, Any]

    def arguments(self, which: Sequence[int]) -> dict[str, Any]:
        """Returns the arguments of the exchange of some of the four."""
        if not any((*self.dtypes, *self.of_gradients)):
            return {}
        return {
            "wire_dtype": [self.dtypes[each] for each in which],
            "grad_wire_dtype": [self.of_gradients[each] for each in which],
            **self.settings,
        }


def _four(name: str, given: WireDtypes) -> FourDtypes:
    """Returns the dtypes of query, key, value and the result."""
    if not isinstance(given, list | tuple):
        return (given, given, given, given)  # type: ignore[return-value]  # checked later
    if len(given) != 4:
        raise ValueError(
            f"{name} must be one dtype, or four for query, key, value and the result, "
            f"got {len(given)}"
        )
    return tuple(given)


class _Layer:
    """One call: the exchanges there, the attention and the exchanges back, stage by stage."""

    def __init__(
        self,
        communicator: DeviceCommunicatorBase,
        plan: HeadPlan,
        attention: Attention,
        rows: Sequence[int] | None,
        wire: _Wire,
    ) -> None:
        """`rows` are the lengths of all ranks, unless they are equal."""
        self.communicator = communicator
        self.plan = plan
        self.attention = attention
        self.rows = rows
        self.wire = wire
        self.num_stages = len(plan.query)

    def __call__(
        self, sent: Sequence[Sequence[Tensor]], joint: Joint | None
    ) -> list[tuple[Tensor, ...]]:
        """Of each stage the heads of all ranks: `[B, s, ., E]` and, if joint, `[B, T, ., E]`."""
        rank = self.communicator.rank
        joint_sent = [] if joint is None else self.plan.sent(*joint, replicate=True)
        length = 0 if joint is None else joint[0].shape[1]
        there: list[AsyncHandle[tuple[Tensor, ...]]] = []
        back: list[AsyncHandle[tuple[Tensor, ...]]] = []
        try:
            there.append(self._there(sent[0], 0))
            keys: list[Tensor] = []
            for stage in range(self.num_stages):
                if stage + 1 < self.num_stages:
                    there.append(self._there(sent[stage + 1], stage + 1))
                own = there[stage].wait()
                if joint is not None:
                    pairs = zip(own, self.plan.own(joint_sent[stage], stage, rank), strict=True)
                    own = tuple(torch.cat(pair, 1) for pair in pairs)
                keys = list(own[1:]) or keys
                key, value = (self.plan.keys_used(each, stage, rank) for each in keys)
                attended = self._attend(own[0], key, value)
                back.append(self._back(attended, length, stage, is_joint=joint is not None))
            return [handle.wait() for handle in back]
        except Exception:
            # Among others the one with which a checkpoint ends its recomputation.
            for handle in (*there, *back):
                with contextlib.suppress(Exception):
                    handle.wait()
            raise

    def _there(self, tensors: Sequence[Tensor], stage: int) -> AsyncHandle[tuple[Tensor, ...]]:
        """`[B, s, ., D]` of all heads of a stage -> `[B, S, ., D]` of this rank's heads."""
        sizes = self.plan.scatter_sizes(stage)
        wire = self.wire.arguments(range(len(tensors)))
        return self._exchange(tensors, 2, 1, scatter_sizes=sizes, gather_sizes=self.rows, **wire)

    def _exchange(self, *arguments: Any, **named: Any) -> AsyncHandle[tuple[Tensor, ...]]:
        """`all_to_all_4D`, asynchronous if there are other stages to compute meanwhile."""
        if self.num_stages > 1:
            handle: AsyncHandle[tuple[Tensor, ...]] = self.communicator.all_to_all_4D(
                *arguments, **named, async_op=True
            )
            return handle
        outputs: tuple[Tensor, ...] = self.communicator.all_to_all_4D(*arguments, **named)
        return AsyncHandle.done(outputs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`attention`, whose result has the shape that the exchange back needs."""
        if query.shape[2] == 0:
            # A rank without heads sends nothing, but its gradients take the same exchanges as
            # those of the others. The product saves a tensor, as an attention does: a checkpoint
            # recomputes as far as the last of these, which must be as far on every rank.
            nothing = value[:, :, :0] * (1 + query.sum() + key[:, :, :0].sum())
            device = value.device.type
            # What the others compute has its dtype; autocast leaves float64 as it is.
            if torch.is_autocast_enabled(device) and value.dtype != torch.float64:
                return nothing.to(torch.get_autocast_dtype(device))
            return nothing
        try:
            attended = self.attention(query, key, value)
            self._check_attended(attended, query)
        except Exception as error:
            # Except where a checkpoint ends its recomputation, which every rank does.
            if not isinstance(error, _StopRecomputationError):
                self.communicator._runner.tell_others(_OP, error)
            raise
        return attended

    def _check_attended(self, attended: Tensor, query: Tensor) -> None:
        """A tensor of the tokens and the heads of the query."""
        is_tensor = isinstance(attended, Tensor)
        if not is_tensor or attended.dim() != 4 or attended.shape[:3] != query.shape[:3]:
            where = self.communicator._runner.group.where(_OP)
            if not is_tensor:
                got = type(attended).__name__
                raise TypeError(f"{where}: attention must return a tensor, got {got}")
            raise ValueError(
                f"{where}: attention must return [B, S, h, E] for query of shape "
                f"{list(query.shape)}, got shape {list(attended.shape)}"
            )

    def _back(
        self, attended: Tensor, length: int, stage: int, *, is_joint: bool
    ) -> AsyncHandle[tuple[Tensor, ...]]:
        """`[B, S + T, h, E]` of this rank's heads -> `[B, s, ., E]` and `[B, T, ., E]` of all."""
        world_size = self.communicator.world_size
        tensors = [attended]
        if is_joint:
            sequence, joint = attended.split([attended.shape[1] - length, length], 1)
            # One copy for every rank; their gradients come back and are added.
            tensors = [sequence, joint.repeat(1, world_size, 1, 1)]
        scatter = None if self.rows is None else [self.rows, [length] * world_size][: len(tensors)]
        gather = uneven(self.plan.query[stage])
        wire = self.wire.arguments([3] * len(tensors))
        return self._exchange(tensors, 1, 2, scatter_sizes=scatter, gather_sizes=gather, **wire)


def _scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's, which wants the heads before the tokens."""
    is_grouped = False
    if query.shape[2] != key.shape[2]:  # compiled, the comparison itself may be symbolic
        is_grouped = True
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return scaled_dot_product_attention(query, key, value, enable_gqa=is_grouped).transpose(1, 2)


def _check_video(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Three tensors of one batch and length, whose key heads query heads can share."""
    batch, length, heads, width = query.shape
    if key.shape[:2] != query.shape[:2] or key.shape[3] != width:
        raise ValueError(
            f"key must have shape [{batch}, {length}, K, {width}] for query of shape "
            f"{list(query.shape)}, got {list(key.shape)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value must have shape [{batch}, {length}, {key.shape[2]}, E] for key of shape "
            f"{list(key.shape)}, got {list(value.shape)}"
        )
    if heads == 0:
        raise ValueError(f"query must have at least 1 head, got shape {list(query.shape)}")
    if key.shape[2] == 0 or heads % key.shape[2]:
        raise ValueError(
            f"key must have a number of heads that divides the {heads} of query, got "
            f"{key.shape[2]} of shape {list(key.shape)}"
        )


def _check_joint(joint: Joint, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Three more of the same batch, heads and widths, and of one length of their own."""
    if not isinstance(joint, tuple | list) or len(joint) != 3:
        got = f"{len(joint)} of them" if isinstance(joint, tuple | list) else type(joint).__name__
        raise TypeError(f"joint must be a tuple of query, key and value, got {got}")
    for index, tensor in enumerate(joint):
        _check_tensor(f"joint[{index}]", tensor, "T", query.device)
    for index, tensor in enumerate((query, key, value)):
        expected = [tensor.shape[0], joint[0].shape[1], *tensor.shape[2:]]
        if list(joint[index].shape) != expected:
            raise ValueError(
                f"joint[{index}] must have shape {expected} beside {list(tensor.shape)} of the "
                f"sequence, got {list(joint[index].shape)}"
            )


def _check_tensor(name: str, tensor: Tensor, length: str, device: torch.device) -> None:
    """A dense tensor of 4 dims on the communicator's device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    validation.check_tensor(name, tensor)
    validation.check_device(name, tensor, device)
    if tensor.dim() != 4:
        raise ValueError(
            f"{name} must have 4 dims [B, {length}, heads, D], got shape {list(tensor.shape)}"
        )


def _check_settings(attention: Attention | None, pipeline: int) -> None:
    """Something to call, and a number of stages."""
    if attention is not None and not callable(attention):
        raise TypeError(f"attention must be callable or None, got {type(attention).__name__}")
    validation.check_int("pipeline", pipeline)
    if pipeline < 1:
        raise ValueError(f"pipeline must be at least 1, got {pipeline}")


def _check_sizes(given: RankSizes, query: Tensor, communicator: DeviceCommunicatorBase) -> None:
    """Every rank's length, or "auto" where the ranks can ask each other."""
    (sizes,) = validation.sizes_of_each("gather_sizes", given, 1)
    if sizes != "auto":
        validation.gather_split(query, 1, sizes, communicator.rank, communicator.world_size)
    elif torch.compiler.is_compiling():
        raise ValueError("gather_sizes must be given where a call is compiled, got 'auto'")
