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
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
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


def share(group: dist.ProcessGroup, num_bytes: int, device: torch.device) -> Shared:
    """Allocates the segments of all ranks of a group; collective.

    Args:
        group: the process group, of which the store and the ranks are used.
        num_bytes: the size, the same on all ranks.
        device: where.

    Returns:
        The segment of this rank. It is zero.

    Raises:
        RuntimeError: torch or the driver refuses.
    """
    from torch._C._distributed_c10d import _SymmetricMemory

    segment = _SymmetricMemory.empty_strided_p2p((num_bytes,), (1,), torch.uint8, device)
    handle = _SymmetricMemory.rendezvous(segment, group.group_name)
    if not all(handle.buffer_ptrs):
        raise RuntimeError(f"torch symmetric memory gave the addresses {handle.buffer_ptrs}")
    segment.zero_()
    torch.cuda.synchronize(device)
    offset = int(handle.offset)
    return Shared(segment, [address + offset for address in handle.buffer_ptrs], handle)
