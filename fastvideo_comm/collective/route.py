"""Which way a collective goes: one function decides, from what is the same on all ranks."""

from __future__ import annotations

from types import ModuleType

import torch

from . import messages, traced
from .group import AnyGroup, Group

MEMORY_VARIABLE = "FASTVIDEO_COMM_MEMORY"


def route(group: AnyGroup) -> tuple[ModuleType, AnyGroup]:
    """The module with the collectives, and the group in the form that the module takes.

    `traced` where torch.compile is looking: the compiler plans copies and buffers itself. Else
    `messages`.

    Example (inside a rank):
        >>> way, group = route(group)  # doctest: +SKIP
        >>> output = way.all_gather(group, input_, split)  # doctest: +SKIP
    """
    if torch.compiler.is_compiling():
        return traced, group
    return messages, Group.of(group)
