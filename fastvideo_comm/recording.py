"""How the Functions of the ops are run: recorded where somebody differentiates, else called.

Under forward mode a call has values and tangents. Most ops send both in one exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .collective.group import AnyGroup, Group
from .collective.layout import Split, Splits
from .collective.messages import Work
from .collective.route import records_graph

_set_eval_frame = torch._C._dynamo.eval_frame.set_eval_frame
_functorch_is_active = torch._C._are_functorch_transforms_active


def run(function: Any, group: AnyGroup, *arguments: Any) -> Any:
    """The output of a Function, which autograd records where somebody differentiates.

    Its bookkeeping is a third of a tiny call. And without a gradient to record, torch 2.13 cannot
    trace a Function of a variable number of tensors.
    """
    is_eager = isinstance(group, Group)  # a compiled graph holds no `Group`
    if forward_ad._current_level >= 0:
        tangents = tangents_of(arguments)
        if any(tangent is not None for tangent in tangents):
            if is_eager:
                return _uncompiled(_run_on_duals, function, group, arguments, tangents)
            return _run_on_duals(function, group, arguments, tangents)
    if not is_recorded(arguments, is_eager=is_eager):
        return function.forward(group, *arguments)
    if not is_eager:
        return function.apply(group, *arguments)
    if _functorch_is_active():
        return _uncompiled(function.eager.apply, group, *arguments)
    return function.eager.apply(group, *arguments)


def along(function: Any, group: AnyGroup, *arguments: Any) -> Any:
    """As `run`, for tangents. `torch.func.jacfwd` gives many of them; each has its own exchange."""
    return run(function.along if isinstance(group, Group) else function, group, *arguments)


def _uncompiled(call: Any, *arguments: Any) -> Any:
    """Calls what eager code calls.

    Forward mode and transforms of `torch.func` may surround a compiled function, which torch then
    runs eagerly. Yet it would compile what is called here, where neither is seen any more.
    """
    previous = _set_eval_frame(None)
    try:
        return call(*arguments)
    finally:
        _set_eval_frame(previous)


def is_recorded(arguments: Sequence[Any], *, is_eager: bool) -> bool:
    """Whether somebody differentiates: autograd, or a transform of `torch.func`."""
    if is_eager and _functorch_is_active():
        return True
    if torch.is_grad_enabled():
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.requires_grad:
                return True
    return False


def op(function: Any) -> Any:
    """Gives a Function its forms for eager code: forward mode, and what vmap does.

    `eager` refuses vmap; `along` takes the tangents of vmap one after the other. They are forms of
    their own, because torch.compile traces no Function that has a `jvp` or a `vmap`.
    """

    def one_by_one(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        outputs = [
            run(
                function.along,
                *(
                    argument.select(dim, index) if isinstance(dim, int) else argument
                    for argument, dim in zip(arguments, in_dims, strict=True)
                ),
            )
            for index in range(info.batch_size)
        ]
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs), 0
        return tuple(torch.stack(each) for each in zip(*outputs, strict=True)), (0,) * len(
            outputs[0]
        )

    def form(base: Any, vmap: Any) -> Any:
        methods = {"jvp": staticmethod(function.tangent), "vmap": staticmethod(vmap)}
        return type(base)(function.__name__, (base,), methods)

    if not hasattr(function, "carries_tangent"):
        function.carries_tangent = staticmethod(_always)
    function.eager = form(function, _refuse_vmap)
    function.along = type(function)(function.__name__, (function,), {})
    function.along.eager = form(function, one_by_one)
    return function


def _always(*_: Any) -> bool:
    return True


def _refuse_vmap(*_: Any) -> Any:
    raise RuntimeError(
        "an op of a communicator must not be called under torch.vmap, which would exchange what "
        "the other ranks do not expect: give it a tensor with one dim more"
    )


class _Context:
    """What a Function keeps for its tangent, where no autograd holds it."""

    saved_tensors: tuple[Tensor, ...] = ()

    def save_for_backward(self, *_: Tensor) -> None:
        """Keeps nothing: the values record their own gradient."""

    def save_for_forward(self, *tensors: Tensor) -> None:
        """Keeps the tensors that the tangent needs."""
        self.saved_tensors = tensors


class Together:
    """Values and tangents of one call of a Function, which travel in one exchange."""

    def __init__(self, function: Any, tangents: Sequence[Tensor]) -> None:
        """Not sent yet."""
        self.function = function
        self._tangents = tangents
        self._landed: Any = None

    def outputs(self, group: AnyGroup, arguments: Sequence[Any]) -> Any:
        """First the outputs of the values, which are `arguments`; then those of the tangents."""
        if self._landed is None:
            outputs = self.function.forward(group, *_of_both(arguments, self._tangents))
            values, self._landed = _halves(outputs)
            return values
        return self._landed


class Sent(torch.autograd.Function):
    """The derivatives of a Function whose values and tangents travel together.

    It is called for the values, and once more for the tangents.
    """

    @staticmethod
    def forward(together: Together, group: AnyGroup, *arguments: Any) -> Any:
        outputs = together.outputs(group, arguments)
        # A view that is made in a Function could not be written in place.
        return outputs.data if isinstance(outputs, Tensor) else outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.function = inputs[0].function
        ctx.function.setup_context(ctx, inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        return None, *ctx.function.backward(ctx, *grad_outputs)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Any) -> Any:
        return ctx.function.tangent(ctx, *tangents)

    @staticmethod
    def vmap(*_: Any) -> Any:
        return _refuse_vmap()


def tangents_of(arguments: Sequence[Any]) -> list[Tensor | None]:
    """The tangent of each argument, None where it has none."""
    return [
        forward_ad.unpack_dual(argument).tangent if isinstance(argument, Tensor) else None
        for argument in arguments
    ]


def _split_duals(
    arguments: Sequence[Any], tangents: Sequence[Tensor | None]
) -> tuple[list[Any], list[Any]]:
    """The arguments without their tangents, and the tangents: zeros where a tensor has none."""
    primals: list[Any] = []
    completed: list[Any] = []
    for argument, tangent in zip(arguments, tangents, strict=True):
        primal = argument if tangent is None else forward_ad.unpack_dual(argument).primal
        if isinstance(argument, Tensor) and (tangent is None or _has_no_memory(tangent)):
            tangent = primal.new_zeros(primal.shape)
        primals.append(primal)
        completed.append(tangent)
    return primals, completed


def _has_no_memory(tangent: Tensor) -> bool:
    """Whether it is one of torch's tensors of zeros without elements; compiled code has none."""
    return not torch.compiler.is_compiling() and tangent._is_zerotensor()


def _dual(value: Tensor, tangent: Tensor) -> Tensor:
    """The dual tensor of both; integers have no tangent."""
    if not (value.is_floating_point() or value.is_complex()):
        return value
    dual: Tensor = forward_ad.make_dual(value, tangent)
    return dual


def _halves(outputs: Any) -> tuple[Any, Any]:
    """The values and the tangents of what `_of_both` were exchanged to."""
    if isinstance(outputs, Tensor):
        value, tangent = outputs.unbind(0)
        return value, tangent
    half = len(outputs) // 2
    return outputs[:half], outputs[half:]


def _of_both(arguments: Sequence[Any], tangents: Sequence[Tensor]) -> list[Any]:
    """The arguments of one call for values and tangents.

    An exchange takes several tensors. The other ops take one, in which both are stacked.
    """
    if isinstance(arguments[0], Splits):
        scatter, gather = arguments[0]
        return [Splits(scatter * 2, gather * 2), *arguments[1:], *tangents]
    (tangent,) = tangents
    both: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            both.append(torch.stack((argument, tangent)))
        else:
            both.append(argument.moved(1) if isinstance(argument, Split) else argument)
    return both


def _run_on_duals(
    function: Any, group: AnyGroup, arguments: Sequence[Any], tangents: Sequence[Tensor | None]
) -> Any:
    """`run` where arguments have tangents at the current level: runs on both, joins both again."""
    primals, completed = _split_duals(arguments, tangents)
    together = _together(function, group, primals, completed)
    if together is None:
        values = run(function, group, *primals)
        context = _Context()
        function.setup_context(context, (group, *primals), values)
        derivatives = function.tangent(context, None, *completed)
    else:
        values = _run_together(together, group, primals)
        derivatives = _run_together(together, group, _replaced(primals, completed))
    if isinstance(values, Tensor):
        return _dual(values, derivatives)
    return joined((*values, *derivatives))


def duals_together(splits: Splits, inputs: Sequence[Tensor]) -> list[Any] | None:
    """The splits and tensors of an exchange of values and tangents; None as for `_together`.

    Also None where gradients are recorded: the backward would send both. `joined` takes the
    outputs.
    """
    if forward_ad._current_level < 0:
        return None
    tangents = tangents_of(inputs)
    if all(tangent is None for tangent in tangents):
        return None
    primals, completed = _split_duals(inputs, tangents)
    unwrapped = [_unwrapped(each) for each in (*primals, *completed)]
    is_split = any(each is None or each.requires_grad for each in unwrapped)
    if records_graph() or (is_split and torch.is_grad_enabled()):
        return None
    return _of_both((splits, *primals), completed)


def joined(outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The dual tensors of values and their tangents."""
    return tuple(_dual(*pair) for pair in zip(*_halves(outputs), strict=True))


def _run_together(together: Together, group: AnyGroup, arguments: Sequence[Any]) -> Any:
    if is_recorded(arguments, is_eager=isinstance(group, Group)):
        return Sent.apply(together, group, *arguments)
    return together.outputs(group, arguments)


def _replaced(arguments: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    """The arguments, with tangents in the place of tensors."""
    return [
        tangent if isinstance(argument, Tensor) else argument
        for argument, tangent in zip(arguments, tangents, strict=True)
    ]


def _together(
    function: Any, group: AnyGroup, primals: Sequence[Any], tangents: Sequence[Any]
) -> Together | None:
    """Values and tangents in one exchange; None where each has an exchange of its own.

    That is where the op is not linear, where nothing is sent, where one value has many tangents,
    and where a graph is recorded that is used for many tangents or has gradients: the backward of
    a graph would send zeros for tangents that no loss uses.
    """
    if not function.carries_tangent(*primals):
        return None
    own = [tangent for tangent in tangents if isinstance(tangent, Tensor)]
    if not isinstance(group, Group):
        return None if is_recorded((*primals, *own), is_eager=False) else Together(function, own)
    unwrapped = [_unwrapped(tangent) for tangent in own]
    if records_graph() or any(tangent is None for tangent in unwrapped):
        return None
    return Together(function, unwrapped)


def _unwrapped(tensor: Tensor) -> Tensor | None:
    """The tensor below all levels of `torch.func`; None if vmap made it of many."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return None
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


class Flight:
    """An exchange between its start and its finish, and those of its gradients and tangents."""

    def __init__(self, splits: Splits) -> None:
        """Not sent yet."""
        self.splits = splits
        self.call: int | None = None
        self.work: Work | None = None
        self.returning: Flight | None = None
        self._tangents: dict[int | None, Flight] = {}

    def tangents(self) -> Flight:
        """The exchange of the tangents at the current level of `torch.func`; levels nest."""
        level = torch._C._functorch.maybe_current_level()
        return self._tangents.setdefault(level, Flight(self.splits))

    def is_completed(self) -> bool:
        """Whether `land` would return at once."""
        return self.work is None or self.work.is_completed()

    def land(self) -> list[Tensor]:
        """Waits for what `StartAllToAll` sent."""
        if self.work is None:
            raise RuntimeError("an exchange must be started before it is finished, and only once")
        work, self.work = self.work, None
        return work.wait()
