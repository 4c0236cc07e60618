"""How a differentiable op goes: checked, compared, counted, recorded for autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .autograd import DistributedAutograd, Flight, exchange_tensors
from .collective import messages as collectives
from .collective import validation
from .collective.exchange import Exchange
from .collective.group import Channel
from .collective.layout import Share
from .handle import AsyncHandle
from .membership import Membership


class Differentiable(Membership):
    """The two ways through: `_exchange` for one tensor, `_trade` for an exchange with a plan."""

    def _exchange(
        self,
        op: str,
        function: type[torch.autograd.Function],
        validate: Callable[[], object],
        compare: Callable[[], None] | None,
        input_: Tensor,
        *arguments: Any,
    ) -> Tensor:
        """`function` of a tensor that the whole group brings.

        `function` validates its arguments itself, for those who apply it directly; `validate` does
        where it is not applied, or where the ranks compare arguments first. `compare` is None where
        they have done so.
        """
        channel = self._check(input_)
        if self.world_size == 1 or self._diagnosis.compares_next():
            validate()
        if self.world_size == 1:
            return input_
        if compare is not None:
            compare()
        self._count(op, input_)
        # A compiled graph holds the group; the compiler plans the buffers itself.
        group = self.device_group if torch.compiler.is_compiling() else channel
        if _is_observed(input_):
            output: Tensor = function.apply(group, input_, *arguments)
        else:  # an autograd Function's bookkeeping is a third of a tiny call
            output = function.forward(_Unrecorded(), group, input_, *arguments)
        return output

    def _trade(
        self, inputs: tuple[Tensor, ...], what: Exchange, *, packed: bool, async_op: bool
    ) -> Any:
        """As `_exchange`, for several tensors or uneven shares, checked and compared already."""
        channel = self._open()

        def result(outputs: Sequence[Tensor]) -> Any:
            return tuple(outputs) if packed else outputs[0]

        if self.world_size == 1:
            done = result(inputs)
            return AsyncHandle.done(done) if async_op else done
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

    def _check(self, input_: Tensor) -> Channel:
        """The channel of an open communicator, for a dense tensor on its device."""
        channel = self._open()
        validation.check_tensor("input_", input_)
        validation.check_device("input_", input_, self.device)
        return channel

    def _sizes_of_all_ranks(self, sizes: list[int]) -> list[list[int]]:
        """For each of this rank's sizes, what it is on every rank: one small all_gather.

        Never remembered: a rank whose size did not change would not know that another's did.
        """
        if torch.compiler.is_compiling():
            raise ValueError("gather_sizes must be given where a call is compiled, got 'auto'")
        on_device = self.cpu_group is self.device_group
        own = torch.tensor([sizes], device=self.device if on_device else "cpu")
        every: list[list[int]] = collectives.all_gather(self.cpu_group, own, Share(0)).T.tolist()
        return every


def _is_observed(input_: Tensor) -> bool:
    """Whether a transformation of torch has to see the autograd Function of an op on `input_`.

    Autograd does, and so do the compiler, forward-mode derivatives and functorch, if only to say
    that they cannot.
    """
    return (
        (input_.requires_grad and torch.is_grad_enabled())
        or torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )


class _Unrecorded:
    """A `ctx` for a `forward` that nobody will differentiate."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Keeps nothing."""
