"""What the integrations of autograd Functions share: a communicator for each group they are given.

The packages hand a process group to every call. The communicators are kept, so that buffers are
reused; one is made anew where a group of the same name is another one.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fastvideo_comm.communicator import DeviceCommunicatorBase

from .installation import Installation, installed_on, looked_up


class Communicators:
    """A communicator for each process group, made at its first call.

    Example:
        >>> communicators = Communicators("yunchang")
        >>> communicators.exchange(group, x, 2, 1)  # doctest: +SKIP
    """

    def __init__(self, name: str) -> None:
        """Starts empty; `name` is what errors call the communicators."""
        self._name = name
        self._by_name: dict[str, DeviceCommunicatorBase] = {}

    def exchange(
        self, group: dist.ProcessGroup | None, input_: Tensor, scatter_dim: int, gather_dim: int
    ) -> Tensor:
        """`all_to_all_4D` on `group`, the default one if None."""
        if group is None:
            group = dist.distributed_c10d._get_default_group()
        known = self._by_name.get(group.group_name)
        if known is None or known.device_group is not group:
            known = DeviceCommunicatorBase(
                group, device=input_.device, device_group=group, unique_name=self._name
            )
            self._by_name[group.group_name] = known
        return known.all_to_all_4D(input_, scatter_dim, gather_dim)

    def clear(self) -> None:
        """Frees the buffers of all of them."""
        for communicator in self._by_name.values():
            communicator.destroy()
        self._by_name.clear()


def install_function(
    package: str, version: str, module_name: str, function: type[Any]
) -> Installation:
    """Puts `function`, made with `Communicators`, in the place of the package's one of its name.

    Returns:
        The installation; the one that is there already, if there is one.

    Raises:
        IntegrationError: the module has no such name.
    """
    module = importlib.import_module(module_name)
    existing = installed_on(module)
    if existing is not None:
        return existing
    original = looked_up(module, function.__name__, version)
    installation, communicators = Installation(package, version), Communicators(package)
    installation.replace(original, function(communicators))
    installation.on_uninstall(communicators.clear)
    installation.mark(module)
    return installation
