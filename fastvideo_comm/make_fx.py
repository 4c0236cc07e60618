"""The Functions of the ops where make_fx records, as for `torch.func.linearize`.

What depends on an input of the graph is exchanged by operators, which the graph holds: each call of
the graph exchanges again. Everything else is exchanged once, while the graph is recorded, and is a
constant of the graph. So the function that `linearize` returns exchanges tangents alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .collective.group import RecordedGroup
from .collective.layout import Splits

_PROXIES = torch._C._TorchDispatchModeKey.PROXY


def recorded(function: Any) -> Any:
    """The form of a Function that takes a `RecordedGroup`."""

    def forward(group: RecordedGroup, *arguments: Any) -> Any:
        # Its import takes seconds, and is there where make_fx runs.
        from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

        def once(*arguments: Any) -> Any:
            with disable_proxy_modes_tracing():
                return function.forward(group.group, *arguments)

        depends = [_depends_on_an_input(argument) for argument in arguments]
        if not any(depends):
            return once(*arguments)
        splits, *inputs = arguments
        if not isinstance(splits, Splits) or all(depends[1:]):
            return function.forward(group.traced, *arguments)
        # An operator whose inputs are constants would be called once, and not be waited for.
        outputs: list[Any] = [None] * len(inputs)
        for is_input in (False, True):
            which = [index for index, each in enumerate(depends[1:]) if each == is_input]
            some = [inputs[index] for index in which]
            part = splits.of(which)
            got = function.forward(group.traced, part, *some) if is_input else once(part, *some)
            for index, output in zip(which, got, strict=True):
                outputs[index] = output
        return tuple(outputs)

    form = type(function)(function.__name__, (function,), {"forward": staticmethod(forward)})
    form.eager = form.recorded = form
    return form


def _depends_on_an_input(argument: Any) -> bool:
    """Whether a tensor was computed from an input of the graph that is recorded now."""
    from torch.fx.experimental.proxy_tensor import get_proxy_slot

    mode: Any = torch._C._get_dispatch_mode(_PROXIES)
    if mode is None or not isinstance(argument, Tensor):
        return False
    slot: Any = get_proxy_slot(argument, mode.tracer, None)
    nodes = [] if slot is None else [slot.proxy.node]
    known = set(nodes)
    while nodes:
        node = nodes.pop()
        if node.op == "placeholder":
            return True
        new = [each for each in node.all_input_nodes if each not in known]
        known.update(new)
        nodes += new
    return False
