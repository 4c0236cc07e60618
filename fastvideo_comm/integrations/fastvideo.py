"""Makes FastVideo use this library's communicator, without a change in FastVideo's code.

`install()` replaces, in the installed package, `DeviceCommunicatorBase`, its CPU and CUDA
subclasses, `DistributedAutograd` and `StatelessProcessGroup`; `GroupCoordinator` and everything
above it stay FastVideo's. Groups that exist already get a communicator of this library too. Call
`install()` on every rank, outside of any collective.

Besides speed, this changes: on gloo, gradients flow through `all_gather` and `all_reduce`
(FastVideo's CPU communicator drops them), and `all_reduce` leaves its input as it was. Gradients of
MAX, MIN and PRODUCT are right. Sizes that P does not divide are errors. On CUDA, the groups use
neither FastVideo's own NCCL binding nor its fused exchange. If `FASTVIDEO_ULYSSES_A2A` asks for the
fused exchange, `install()` warns that the variable has no effect. NPU is left to FastVideo.

FastVideo's NCCL and HCCL bindings on a `StatelessProcessGroup` work as before: the ids that they
broadcast, `ncclUniqueId` and `hcclUniqueId`, are types that the group knows.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from typing import Any

import torch
from torch.distributed import ProcessGroup

from fastvideo_comm.autograd import DistributedAutograd
from fastvideo_comm.communicator import DeviceCommunicatorBase
from fastvideo_comm.object_channel import ObjectCodec
from fastvideo_comm.stateless import StatelessProcessGroup

from .installation import Installation, checked_version, installed_on, looked_up, uninstall_from

KNOWN_VERSIONS = ("0.2.1",)
SERVED = (
    "GroupCoordinator and communication_op, on the CPU and CUDA",
    "StatelessProcessGroup, with PyNccl and PyHccl on it",
)

_DISTRIBUTED = "fastvideo.distributed"
_BASE = f"{_DISTRIBUTED}.device_communicators.base_device_communicator"
_REPLACEMENTS = (
    (f"{_DISTRIBUTED}.device_communicators.cpu_communicator", "CpuCommunicator"),
    (f"{_DISTRIBUTED}.device_communicators.cuda_communicator", "CudaCommunicator"),
    (_BASE, "DeviceCommunicatorBase"),
)
_UNIQUE_IDS = (
    (f"{_DISTRIBUTED}.device_communicators.pynccl_wrapper", "ncclUniqueId"),
    (f"{_DISTRIBUTED}.device_communicators.pyhccl_wrapper", "hcclUniqueId"),
)


class FastVideoCommunicator(DeviceCommunicatorBase):
    """The communicator of a FastVideo `GroupCoordinator`.

    FastVideo calls the device of a machine without an accelerator "mps". Here "mps" means the CPU
    where torch has no such device.

    Example (what `GroupCoordinator` does):
        >>> FastVideoCommunicator(cpu_group, device, device_group, "sp:0")  # doctest: +SKIP
    """

    def __init__(
        self,
        cpu_group: ProcessGroup,
        device: torch.device | None = None,
        device_group: ProcessGroup | None = None,
        unique_name: str = "",
    ) -> None:
        """As `DeviceCommunicatorBase`, but "mps" may mean the CPU."""
        if device is not None and device.type == "mps" and not torch.backends.mps.is_available():
            device = torch.device("cpu")
        super().__init__(cpu_group, device, device_group, unique_name)


class FastVideoStatelessProcessGroup(StatelessProcessGroup):
    """A group that can send the ids of FastVideo's NCCL and HCCL bindings.

    Example (what `PyNcclCommunicator` does):
        >>> group = FastVideoStatelessProcessGroup.create(host, port, rank, 2)  # doctest: +SKIP
        >>> unique_id = group.broadcast_obj(unique_id, src=0)  # doctest: +SKIP
    """

    def __post_init__(self) -> None:
        """As `StatelessProcessGroup`; registers the two types, which pickle does not need."""
        super().__post_init__()
        if not isinstance(self.codec, ObjectCodec):
            return
        for module, name in _UNIQUE_IDS:
            unique_id = getattr(importlib.import_module(module), name)
            with contextlib.suppress(ValueError):  # registered by a group with the same codec
                self.register_type(
                    unique_id, to_fields=bytes, from_fields=unique_id.from_buffer_copy
                )


def install(*, allow_unknown_version: bool = False) -> Installation:
    """Makes the installed FastVideo use this library, from now on and in groups that exist.

    Example:
        >>> from fastvideo_comm.integrations import fastvideo
        >>> with fastvideo.install():  # doctest: +SKIP
        ...     train()  # FastVideo's own code

    Args:
        allow_unknown_version: tries versions that this library was not tested with.

    Returns:
        The installation: `uninstall()` undoes it, and so does the end of a `with`. A second call
        returns the first one's.

    Raises:
        IntegrationError: FastVideo is not installed, has an unknown version, or lacks a name that
            is to be replaced; nothing has been replaced then.

    Warns:
        UserWarning: `FASTVIDEO_ULYSSES_A2A` is "auto": FastVideo's fused exchange is not used.
    """
    version = checked_version("fastvideo", KNOWN_VERSIONS, allow_unknown=allow_unknown_version)
    base = importlib.import_module(_BASE)
    existing = installed_on(base)
    if existing is not None:
        return existing
    state = importlib.import_module(f"{_DISTRIBUTED}.parallel_state")
    utils = importlib.import_module(f"{_DISTRIBUTED}.utils")
    pairs: list[tuple[Any, Any]] = [
        (looked_up(importlib.import_module(module), name, version), FastVideoCommunicator)
        for module, name in _REPLACEMENTS
    ]
    pairs.append((looked_up(base, "DistributedAutograd", version), DistributedAutograd))
    pairs.append(
        (looked_up(utils, "StatelessProcessGroup", version), FastVideoStatelessProcessGroup)
    )
    for module, name in _UNIQUE_IDS:
        looked_up(importlib.import_module(module), name, version)
    registry = looked_up(state, "_groups", version)
    # Loaded later, the NPU communicator would derive from this library's.
    with contextlib.suppress(ImportError):
        importlib.import_module(f"{_DISTRIBUTED}.device_communicators.npu_communicator")
    originals = tuple(original for original, _ in pairs[: len(_REPLACEMENTS)])

    installation = Installation("fastvideo", version, SERVED)
    for original, replacement in pairs:
        installation.replace(original, replacement)
    for coordinator in [reference() for reference in registry.values()]:
        communicator = getattr(coordinator, "device_communicator", None)
        if type(communicator) in originals:
            _replace_communicator(installation, coordinator)
    installation.mark(base)
    if os.environ.get("FASTVIDEO_ULYSSES_A2A", "off").strip().lower() == "auto":
        warnings.warn(
            "FASTVIDEO_ULYSSES_A2A=auto has no effect while fastvideo_comm is installed: its "
            "all_to_all_4D is used in the place of FastVideo's fused one",
            stacklevel=2,
        )
    return installation


def uninstall() -> None:
    """Undoes `install`; does nothing where it was not called."""
    uninstall_from(_BASE)


def _replace_communicator(installation: Installation, coordinator: Any) -> None:
    """Replaces the communicator of a group that exists; keeps the old one for `uninstall`."""
    ours = FastVideoCommunicator(
        coordinator.cpu_group,
        coordinator.device,
        coordinator.device_group,
        coordinator.unique_name,
    )
    installation.set(coordinator, "device_communicator", ours)
    installation.on_uninstall(ours.destroy)
