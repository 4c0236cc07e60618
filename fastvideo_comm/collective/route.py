"""Which way a collective goes. One function decides, from facts that all ranks share."""

from __future__ import annotations

import os
from types import ModuleType

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from . import device, memory, messages, operator, traced
from .group import MEMORY_MODES, AnyGroup, Group, MemoryMode, OperatorGroup

MEMORY_VARIABLE = "FASTVIDEO_COMM_MEMORY"


def memory_mode(
    given: MemoryMode | None, group: dist.ProcessGroup, on: torch.device
) -> MemoryMode | None:
    """Whether a communicator uses memory, before the other ranks are asked; None: none is asked.

    On GPUs "auto" means "off": the exchange by memory was never measured on several GPUs.

    Raises:
        ValueError: `given`, or the environment variable, is another word; or `given` is "on" where
            memory cannot be used.
    """
    mode = os.environ.get(MEMORY_VARIABLE, "auto") if given is None else given
    for known in MEMORY_MODES:
        if mode == known:
            # torch's "fake" backend has no other ranks.
            if on.type in ("cpu", "cuda") and dist.get_backend(group) != "fake":
                return known if on.type == "cpu" or known == "on" else None
            if given == "on":
                raise ValueError(
                    "memory must be 'auto' or 'off' for ranks that are not on CPUs or CUDA "
                    f"devices, got 'on' for {on} and backend {dist.get_backend(group)}"
                )
            return None
    raise ValueError(
        f"memory (or {MEMORY_VARIABLE}) must be one of {', '.join(MEMORY_MODES)}, got {mode!r}"
    )


def route(group: AnyGroup) -> tuple[ModuleType, AnyGroup]:
    """Returns the module with the collectives, and the group in the form that the module takes.

    The module is one of these:

    - `traced` in compiled code: there the compiler plans copies and buffers.
    - `operator` in compiled code of a communicator that has connected memory. The first eager call
      connects it.
    - `device` if ranks on GPUs have connected their memory: by memory as far as it goes, else by
      messages.
    - `memory` if ranks on the CPU can write into each other's memory, for every size: it is the
      fastest at every size that was measured (bench/NOTES.md, "Exchange by memory").
    - `messages` otherwise.

    Example (inside a rank):
        >>> way, group = route(group)  # doctest: +SKIP
        >>> output = way.all_gather(group, input_, split)  # doctest: +SKIP
    """
    if torch.compiler.is_compiling():
        return (operator if isinstance(group, OperatorGroup) else traced), group
    if isinstance(group, OperatorGroup):  # compiled code runs eagerly, for example in a debugger
        group = group.process_group
    group = Group.of(group)
    if not group.connects_memory():
        return messages, group
    if not group.operator_name:
        group.operator_name = operator.register(group)
    return (memory if group.memory is not None else device), group


def traced_form(group: Group) -> ProcessGroup | OperatorGroup:
    """Returns the form of a group that compiled code holds."""
    if group.memory is None and group.device_memory is None:
        return group.process_group
    return OperatorGroup(group.process_group, group.operator_name)


def route_of_pair(group: Group) -> ModuleType:
    """As `route`, for two ranks: they use memory only if all ranks have connected it before."""
    return memory if group.memory is not None else messages
