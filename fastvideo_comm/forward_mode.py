"""Forward mode: the values and the tangents of dual tensors, taken apart, run and put together.

An exchange sends the values and the tangents in one call. In compiled code all of it stands in the
graph, because torch traces no autograd Function that has a `jvp`; what torch would compile to
another call is refused. In eager code this is done for one `torch.func.jvp`, or one
`forward_ad.dual_level`, alone: torch's own way through the `jvp` of a Function, which several
transforms take, costs milliseconds, and there the values travel before the tangents are known.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import forward_ad

from .collective.group import AnyGroup, Group
from .collective.layout import Splits

_functorch_is_active = torch._C._are_functorch_transforms_active
_LEAVES_OUT_TANGENTS = torch.__version__ < "2.15"  # later ones raise an error


class Arrived(NamedTuple):
    """An exchange that has taken place, and is still to be recorded by autograd.

    Attributes:
        splits: what was traded.
        outputs: what arrived; it is taken away when it is recorded.
        of: "values" or "tangents".
        call: the number of the call; None where calls have no number.
    """

    splits: Splits
    outputs: list[Tensor]
    of: str
    call: int | None


def run_on_duals(function: Any, group: AnyGroup, arguments: Sequence[Any]) -> Any:
    """In compiled code: the output of a Function, which is dual where an argument is."""
    values, tangents, is_dual = _apart(arguments)
    if not is_dual:
        return (function.apply if requires_grad(values) else function.forward)(group, *values)
    # A gradient of the values alone would make the tangents' gradient too, of zeros.
    if isinstance(values[0], Splits) and not requires_grad((*values, *tangents)):
        return _together(*_exchanged(function, group, values, tangents))
    return _together(*_one_after_the_other(function, group, values, tangents))


def run_on_eager_duals(function: Any, group: AnyGroup, arguments: Sequence[Any]) -> Any:
    """In eager code: as `run_on_duals`; NotImplemented where torch's way must be taken."""
    duals = EagerDuals.of(arguments)
    if duals is None:
        return NotImplemented
    values, tangents = duals.values, duals.tangents
    with duals.below():
        if isinstance(values[0], Splits):
            outputs, derivatives = _exchanged(function, group, values, tangents)
        else:
            outputs, derivatives = _one_after_the_other(function.eager, group, values, tangents)
    return _together(outputs, derivatives)


class EagerDuals(NamedTuple):
    """Arguments in eager code that one transform of forward mode, alone, gave tangents.

    Attributes:
        values: the arguments below the transform.
        tangents: their tangents, zeros where a tensor has none.
        level: what `forward_ad` and `torch.func` call the transform.
    """

    values: list[Any]
    tangents: list[Any]
    level: tuple[int, int]

    @staticmethod
    def of(arguments: Sequence[Any]) -> EagerDuals | None:
        """None if no argument has a tangent, or if there are several transforms."""
        if forward_ad._current_level < 0 or not torch._C._is_fwd_grad_enabled():
            return None
        stack = torch._C._functorch.get_interpreter_stack() or ()
        if len(stack) > 1 or (stack and stack[0].key().name != "Jvp"):
            return None
        values, tangents, is_dual = _apart(arguments)
        if not is_dual:
            return None
        if stack:
            level = stack[0].level()
            values = [_below(value, level) for value in values]
            tangents = [_below(tangent, level) for tangent in tangents]
        return EagerDuals(values, tangents, _level())

    @contextlib.contextmanager
    def below(self) -> Iterator[None]:
        """What runs inside is below the transform."""
        lower: Any = contextlib.nullcontext()
        if _functorch_is_active():
            lower = retrieve_current_functorch_interpreter().lower()
        with lower, forward_ad._set_fwd_grad_enabled(False):
            yield

    def start(self, function: Any, group: AnyGroup, exchange: Any) -> None:
        """Starts an exchange of the values and of the tangents, with `StartAllToAll`."""
        with self.below():
            function.forward(group, exchange, *_both(self.values, self.tangents))

    def finish(self, function: Any, group: AnyGroup, exchange: Any) -> tuple[Tensor, ...]:
        """Waits for the dual tensors; autograd records the exchange as `AllToAll`.

        Raises:
            RuntimeError: the transform is not around this call.
        """
        if _level() != self.level:
            raise RuntimeError(
                "wait() must be called inside the torch.func.jvp or forward_ad.dual_level in which "
                "tensors with tangents were given to the exchange, got a call outside"
            )
        with self.below():
            arrived = exchange.land()
            halves = _recorded(function, group, self.values, self.tangents, arrived, exchange.call)
        together: tuple[Tensor, ...] = _together(*halves)
        return together


def _apart(arguments: Sequence[Any]) -> tuple[list[Any], list[Any], bool]:
    """The values, their tangents, zeros where a tensor has none, and whether one has a tangent."""
    values: list[Any] = []
    tangents: list[Any] = []
    is_dual = False
    for argument in arguments:
        value, tangent = argument, None
        if isinstance(argument, Tensor):
            value, tangent = forward_ad.unpack_dual(argument)
            is_dual = is_dual or tangent is not None
        values.append(value)
        tangents.append(tangent)
    if is_dual:
        for index, (value, tangent) in enumerate(zip(values, tangents, strict=True)):
            if isinstance(value, Tensor) and tangent is None:
                tangents[index] = torch.zeros_like(value)
    return values, tangents, is_dual


def _one_after_the_other(
    function: Any, group: AnyGroup, values: Sequence[Any], tangents: Sequence[Any]
) -> tuple[Any, Any]:
    """The outputs of a Function and their tangents."""
    outputs = (function.apply if requires_grad(values) else function.forward)(group, *values)
    context = _Context()
    function.setup_context(context, (group, *values), outputs)
    return outputs, function.tangent(context, None, *tangents)


def _exchanged(
    function: Any, group: AnyGroup, values: Sequence[Any], tangents: Sequence[Any]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The same of `AllToAll`, in one call; each of the two has a gradient of its own."""
    arrived = function.forward(group, values[0].with_tangents(), *_both(values, tangents))
    return _recorded(function, group, values, tangents, arrived, last_call(group))


def _both(values: Sequence[Any], tangents: Sequence[Any]) -> list[Tensor]:
    """What an exchange takes that autograd records when it has taken place."""
    return [value.detach() for value in (*values[1:], *tangents[1:])]


def _recorded(
    function: Any,
    group: AnyGroup,
    values: Sequence[Any],
    tangents: Sequence[Any],
    arrived: Sequence[Tensor],
    call: int | None,
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """What arrived of the values and of the tangents; autograd records the exchange of each."""
    splits = values[0]
    count = len(values) - 1
    found = [arrived[:count], arrived[count:]]
    for index, (inputs, of) in enumerate(((values, "values"), (tangents, "tangents"))):
        if requires_grad(inputs):
            exact = splits.exact() if index else splits
            exchange = Arrived(exact, list(found[index]), of, call)
            found[index] = function.arrived.apply(group, exchange, *inputs[1:])
    return found[0], found[1]


def _together(values: Any, tangents: Any) -> Any:
    """The dual tensors of both."""
    if isinstance(values, Tensor):
        return _dual(values, tangents)
    return tuple([_dual(*pair) for pair in zip(values, tangents, strict=True)])


def _dual(value: Tensor, tangent: Tensor) -> Tensor:
    """The dual tensor of both; integers have no tangent."""
    if not (value.is_floating_point() or value.is_complex()):
        return value
    dual: Tensor = forward_ad.make_dual(value, tangent)
    return dual


class _Context:
    """What a Function keeps for its tangent, where no autograd holds it."""

    saved_tensors: tuple[Tensor, ...] = ()

    def save_for_backward(self, *_: Tensor) -> None:
        """Keeps nothing: the values record their own gradient."""

    def save_for_forward(self, *tensors: Tensor) -> None:
        """Keeps the tensors that the tangent needs."""
        self.saved_tensors = tensors


def last_call(group: AnyGroup) -> int | None:
    """The number of the last call, which a backward names; None where calls have no number."""
    return group.last_call if isinstance(group, Group) else None


def requires_grad(arguments: Sequence[Any]) -> bool:
    """Whether autograd records what is computed of the arguments."""
    if torch.is_grad_enabled():
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.requires_grad:
                return True
    return False


def check_tangents(arguments: Sequence[Any]) -> None:
    """Raises where compiled code may have been given tangents that torch leaves out."""
    if forward_ad._current_level < 0 or not _LEAVES_OUT_TANGENTS or _functorch_is_active():
        return
    if not _apart(arguments)[2]:
        raise RuntimeError(
            "an op of a communicator must get a tensor with a tangent in compiled code inside "
            f"forward_ad.dual_level, got none: torch {torch.__version__} leaves out the tangents "
            "of what compiled code is given; make the dual tensors inside it"
        )


def check_transforms(arguments: Sequence[Any], *, is_forward: bool) -> None:
    """Raises where torch would compile a call to another one without an error."""
    transforms = _transforms()
    if "Vmap" in transforms:
        refuse_vmap()
    if not is_forward:
        return
    if len(transforms) > 1:
        raise RuntimeError(
            "an op of a communicator must be differentiated by one transform of torch.func in "
            f"compiled code where torch.func.jvp is one, got {', '.join(transforms)}: call them "
            "outside compiled code"
        )
    # Inside torch.func.jvp torch does not see that autograd records, and leaves out our backward.
    if requires_grad([_below(argument, 1) for argument in arguments]):
        raise RuntimeError(
            "an op of a communicator must not be recorded by autograd inside torch.func.jvp in "
            "compiled code: make the dual tensors with torch.autograd.forward_ad there, or call "
            "torch.func.jvp outside compiled code"
        )


def _below(argument: Any, level: int) -> Any:
    """What the transform of this level, the innermost one, wraps."""
    is_tensor = isinstance(argument, Tensor)
    return torch._C._functorch._unwrap_for_grad(argument, level) if is_tensor else argument


def _level() -> tuple[int, int]:
    """The numbers of the innermost transforms of forward_ad and of torch.func."""
    return forward_ad._current_level, torch._C._functorch.maybe_current_level() or 0


def _transforms() -> tuple[str, ...]:
    """The transforms of `torch.func` around a call, from the outermost."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return tuple(interpreter.key().name for interpreter in stack)


# What `torch.compiler.assume_constant_result` sets, whose import takes seconds.
_transforms._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refuse_vmap(*_: Any) -> Any:
    """The vmap of a Function: an error."""
    raise RuntimeError(
        "an op of a communicator must not be called under torch.vmap, which would exchange what "
        "the other ranks do not expect: give it a tensor with one dim more. torch.func.jacfwd, "
        "which uses torch.vmap too, must be called outside compiled code"
    )


def primals(saved: Sequence[Tensor]) -> list[Tensor]:
    """What a Function saved for its tangent, without the tangents that it has at this level."""
    return [forward_ad.unpack_dual(tensor).primal for tensor in saved]
