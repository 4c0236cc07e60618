"""Forward mode in compiled code, where torch traces no autograd Function that has a `jvp`.

There the values and the tangents are taken out of the dual tensors, exchanged, and put together
again: all of it stands in the graph. What torch would compile to another call is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .collective.group import AnyGroup

_functorch_is_active = torch._C._are_functorch_transforms_active
_LEAVES_OUT_TANGENTS = torch.__version__ < "2.15"  # later ones raise an error


def run_on_duals(function: Any, group: AnyGroup, arguments: Sequence[Any]) -> Any:
    """The output of a Function, of arguments that may be dual tensors; then it is dual too."""
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
    run_values = function.apply if requires_grad(values) else function.forward
    outputs = run_values(group, *values)
    if not is_dual:
        if _LEAVES_OUT_TANGENTS and not _functorch_is_active():
            raise RuntimeError(
                "an op of a communicator must get a tensor with a tangent in compiled code inside "
                f"forward_ad.dual_level, got none: torch {torch.__version__} leaves out the "
                "tangents of what compiled code is given; make the dual tensors inside it"
            )
        return outputs
    for index, (value, tangent) in enumerate(zip(values, tangents, strict=True)):
        if isinstance(value, Tensor) and tangent is None:
            tangents[index] = torch.zeros_like(value)
    context = _Context()
    function.setup_context(context, (group, *values), outputs)
    derivatives = function.tangent(context, None, *tangents)
    if isinstance(outputs, Tensor):
        return _dual(outputs, derivatives)
    return tuple(_dual(*pair) for pair in zip(outputs, derivatives, strict=True))


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


def requires_grad(arguments: Sequence[Any]) -> bool:
    """Whether autograd records what is computed of the arguments."""
    if torch.is_grad_enabled():
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.requires_grad:
                return True
    return False


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
    if requires_grad([_below(argument) for argument in arguments]):
        raise RuntimeError(
            "an op of a communicator must not be recorded by autograd inside torch.func.jvp in "
            "compiled code: make the dual tensors with torch.autograd.forward_ad there, or call "
            "torch.func.jvp outside compiled code"
        )


def _below(argument: Any) -> Any:
    """What the one transform around a call wraps."""
    is_tensor = isinstance(argument, Tensor)
    return torch._C._functorch._unwrap_for_grad(argument, 1) if is_tensor else argument


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
