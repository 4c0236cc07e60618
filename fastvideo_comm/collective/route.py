"""Which way a collective goes. One function decides, from facts that all ranks share."""

from __future__ import annotations

import os
from types import ModuleType

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from . import device, memory, messages, operator, traced
from .group import MEMORY_MODES, AnyGroup, Group, MemoryMode, OperatorGroup, RecordedGroup

MEMORY_VARIABLE = "FASTVIDEO_COMM_MEMORY"
_PROXIES = torch._C._TorchDispatchModeKey.PROXY


def memory_mode(
    given: MemoryMode | None, group: dist.ProcessGroup, on: torch.device
) -> MemoryMode | None:
    """Returns this rank's memory mode; None if memory cannot be used and no rank is asked.

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

    - `traced` in code that is compiled or recorded: there the compiler plans copies and buffers.
    - `operator` in such code of a communicator that has connected memory. The first eager call
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
    if not isinstance(group, Group):  # which a graph never holds
        if torch.compiler.is_compiling() or is_recording():
            return (operator if isinstance(group, OperatorGroup) else traced), group
        if isinstance(group, OperatorGroup):  # compiled code runs eagerly, as in a debugger
            group = group.process_group
        group = Group(group)
    if not group.connects_memory():
        return messages, group
    if not group.operator_name:
        group.operator_name = operator.register(group)
    return (memory if group.memory is not None else device), group


def traced_form(group: Group) -> ProcessGroup | OperatorGroup | RecordedGroup:
    """Returns the form of a group that compiled or recorded code holds."""
    traced_: ProcessGroup | OperatorGroup = group.process_group
    if group.memory is not None or group.device_memory is not None:
        traced_ = OperatorGroup(group.process_group, group.operator_name)
    return traced_ if torch.compiler.is_compiling() else RecordedGroup(group, traced_)


def is_recording() -> bool:
    """Whether make_fx records what runs, as for `torch.func.linearize`."""
    return torch._C._get_dispatch_mode(_PROXIES) is not None


def route_of_pair(group: Group) -> ModuleType:
    """As `route`, for two ranks: they use memory only if all ranks have connected it before."""
    return memory if group.memory is not None else messages
