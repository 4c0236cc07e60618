"""torch symmetric memory: what a rank on a GPU shares with the kernels of the others.

In torch 2.11 to 2.15 `buffer_ptrs` are the addresses of the allocations, to which `offset` is
added. A rendezvous needs the group's store, ranks on one host, and a GPU for each rank; with
TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1 several ranks may share one, for tests.
"""

from __future__ import annotations

import importlib.util
import os

import torch
import torch.distributed as dist
from torch import Tensor

from .shared import Shared

OVERLAP_VARIABLE = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
# What release and acquire at the scope of the system need.
_CAPABILITY = (7, 0)


def refusal(device: torch.device) -> str:
    """Why this process cannot share memory of `device`; empty if nothing is known against it.

    Example:
        >>> refusal(torch.device("cpu"))
        'cpu is not a CUDA device'
    """
    if device.type != "cuda":
        return f"{device} is not a CUDA device"
    if torch.version.hip:
        return "torch is built for ROCm, where this was never tried"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    for package in ("triton", "numpy"):  # torch needs numpy for `__cuda_array_interface__`
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        return f"{device} has compute capability {capability}, and {_CAPABILITY} is needed"
    try:
        from torch._C._distributed_c10d import _SymmetricMemory
    except ImportError:
        return "torch is built without symmetric memory"
    backend = _SymmetricMemory.get_backend(device)
    if backend not in (None, "CUDA"):
        return f"torch symmetric memory was set to the backend {backend}, and CUDA is needed"
    return ""


def unreachable(device: torch.device, others: dict[int, str]) -> str:
    """Why the kernels of `device` cannot write to the GPUs of other ranks; empty if they can.

    GPUs that this process does not see are left to the rendezvous.

    Args:
        device: this rank's.
        others: the uuid of each other rank's GPU.
    """
    own = uuid_of(device)
    seen = {uuid_of(torch.device("cuda", i)): i for i in range(torch.cuda.device_count())}
    for rank, uuid in others.items():
        if uuid == own:
            if os.environ.get(OVERLAP_VARIABLE) != "1":
                return f"it has the same GPU as rank {rank}"
        elif uuid in seen and not torch.cuda.can_device_access_peer(seen[own], seen[uuid]):
            return f"its GPU has no peer access to the GPU of rank {rank}"
    return ""


def uuid_of(device: torch.device) -> str:
    """What names a GPU in all processes of a host."""
    return str(torch.cuda.get_device_properties(device).uuid)


def allocate(num_bytes: int, device: torch.device) -> Tensor:
    """Allocates the segment of this rank. It is zero.

    Raises:
        RuntimeError: torch or the driver refuses, for example because the memory is full.
    """
    from torch._C._distributed_c10d import _SymmetricMemory

    segment = _SymmetricMemory.empty_strided_p2p((num_bytes,), (1,), torch.uint8, device)
    segment.zero_()
    torch.cuda.synchronize(device)
    return segment


def share(group: dist.ProcessGroup, segment: Tensor) -> Shared:
    """Opens the segments of all ranks of a group to each other; collective.

    A rank that does not come keeps the others waiting until the store gives up. So all ranks must
    have a segment before any of them calls this.

    Args:
        group: the process group, of which the store and the ranks are used.
        segment: what `allocate` gave, the same size on all ranks.

    Returns:
        The segment of this rank, and where those of the others are.

    Raises:
        RuntimeError: torch or the driver refuses.
    """
    from torch._C._distributed_c10d import _SymmetricMemory

    handle = _SymmetricMemory.rendezvous(segment, group.group_name)
    pointers, offset = handle.buffer_ptrs, int(handle.offset)
    addresses = [address + offset for address in pointers]
    if not all(pointers) or addresses[group.rank()] != segment.data_ptr():
        raise RuntimeError(
            f"torch symmetric memory gave the addresses {pointers} and the offset {offset} for a "
            f"segment at {segment.data_ptr()} of rank {group.rank()}"
        )
    return Shared(segment, addresses, handle)
