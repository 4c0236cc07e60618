"""What the integrations of autograd Functions share: a communicator for each group they are given.

The packages hand a process group to every call. The communicators are kept, so that buffers are
reused. A new one is made if another group has the name of an earlier one.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fastvideo_comm.communicator import DeviceCommunicatorBase
from fastvideo_comm.op_runner import OpCall

from .installation import Installation, installed_on, looked_up


class Communicators:
    """A communicator for each process group, made at its first call.

    Example:
        >>> communicators = Communicators("yunchang")
        >>> communicators.of(group, x).all_to_all_4D(x, 2, 1)  # doctest: +SKIP
    """

    def __init__(self, name: str) -> None:
        """Starts empty; `name` is the name of the communicators in errors."""
        self._name = name
        self._by_name: dict[str, DeviceCommunicatorBase] = {}

    def of(self, group: dist.ProcessGroup | None, input_: Tensor) -> DeviceCommunicatorBase:
        """The communicator of `group`, the default one if None, for tensors beside `input_`."""
        if group is None:
            group = dist.distributed_c10d._get_default_group()
        known = self._by_name.get(group.group_name)
        if known is None or known.device_group is not group:
            known = DeviceCommunicatorBase(
                group, device=input_.device, device_group=group, unique_name=self._name
            )
            self._by_name[group.group_name] = known
        return known

    def clear(self) -> None:
        """Frees the buffers of all communicators."""
        for communicator in self._by_name.values():
            communicator.destroy()
        self._by_name.clear()


def check_shared(
    communicator: DeviceCommunicatorBase, input_: Tensor, dim: int, remedy: str
) -> None:
    """Checks that P divides the size at `dim`; `remedy` is what the package's caller can do.

    Raises:
        ValueError: P does not divide the size. The other ranks are told.
    """
    if input_.dim() == 4 and input_.shape[dim] % communicator.world_size:
        with OpCall(communicator._runner, "all_to_all_4D"):
            raise ValueError(
                f"input_ must have a size at scatter_dim={dim} that "
                f"world_size={communicator.world_size} divides, got {input_.shape[dim]} of shape "
                f"{list(input_.shape)}; {remedy}"
            )


def install_functions(
    package: str,
    version: str,
    module_name: str,
    functions: Sequence[type[Any]],
    served: Sequence[str],
) -> Installation:
    """Replaces the package's classes by `functions` of the same names, made with `Communicators`.

    Returns:
        The installation; the one that is there already, if there is one.

    Raises:
        IntegrationError: the module lacks one of the names; nothing has been replaced then.
    """
    module = importlib.import_module(module_name)
    existing = installed_on(module)
    if existing is not None:
        return existing
    originals = [looked_up(module, function.__name__, version) for function in functions]
    installation, communicators = Installation(package, version, served), Communicators(package)
    for original, function in zip(originals, functions, strict=True):
        installation.replace(original, function(communicators))
    installation.on_uninstall(communicators.clear)
    installation.mark(module)
    return installation
