"""How the ranks of a group on GPUs decide together whether they write into each other's memory."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from ..diagnosis.board import group_timeout
from ..memory import symmetric
from ..memory.device import DeviceMemory

# Bytes of the segment of one communicator on each GPU, if the caller does not say.
SEGMENT_BYTES = 1 << 30
# A quarter of it is staging: the most that the outputs of one call may take on a rank.
_STAGING_PARTS = 4
# What a rank says of itself fits into so many bytes, if a reason has so many letters at most.
_FACTS_BYTES = 4096
_REASON_LETTERS = 500

Everyone = Callable[[bytes], "list[bytes]"]
T = TypeVar("T")


class Candidate(NamedTuple):
    """What one rank says of itself."""

    refusal: str
    host: str
    gpu: str
    versions: str
    num_bytes: int


# What is made in inference mode cannot be written to outside it, as the thread of the watch does.
@torch.inference_mode(False)
def connect_device(
    process_group: dist.ProcessGroup,
    everyone: Everyone,
    device: torch.device,
    num_bytes: int,
    name: str,
) -> tuple[DeviceMemory | None, str]:
    """Connects the GPUs of a group, all or none; collective.

    Args:
        process_group: the group.
        everyone: `everyone(payload)` gives what every rank gave, in rank order; all payloads of a
            call have one length.
        device: the GPU of this rank.
        num_bytes: the size of the segment.
        name: what errors call the group.

    Returns:
        The memory and an empty string; or None and the reason, the same on all ranks.
    """
    rank = process_group.rank()
    candidates = [Candidate(*facts) for facts in _told(everyone, own_facts(device, num_bytes))]
    refusal = difference(candidates)
    if refusal:
        return None, refusal
    others = {r: each.gpu for r, each in enumerate(candidates) if r != rank}
    refusal = _first(_told(everyone, symmetric.unreachable(device, others)))
    if refusal:
        return None, refusal
    # Nobody waits at the rendezvous for a rank that has no memory.
    segment, refusal = _made(everyone, lambda: symmetric.allocate(num_bytes, device))
    if segment is None:
        return None, refusal
    # Nobody posts before all segments are there.
    memory, refusal = _made(
        everyone,
        lambda: DeviceMemory(
            rank,
            symmetric.share(process_group, segment),
            staging_bytes=num_bytes // _STAGING_PARTS,
            timeout=group_timeout(process_group),
            name=name,
        ),
    )
    return memory, refusal


def own_facts(device: torch.device, num_bytes: int) -> Candidate:
    """What this rank says of itself."""
    refusal = symmetric.refusal(device)
    versions = [f"torch {torch.__version__}"]
    for package in ("triton", "fastvideo-comm"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} from a folder")
    gpu = "" if refusal else symmetric.uuid_of(device)
    return Candidate(refusal, _host(), gpu, ", ".join(versions), num_bytes)


def difference(candidates: Sequence[Candidate]) -> str:
    """Why these ranks cannot use memory; empty if they can, as far as they know.

    Example:
        >>> one = Candidate("", "host", "gpu 0", "torch 2.15.0", 1 << 30)
        >>> difference([one, one._replace(gpu="gpu 1")])
        ''
        >>> difference([one, one._replace(refusal="triton is not installed")])
        'rank 1: triton is not installed'
        >>> difference([one, one._replace(num_bytes=1 << 20)])
        'rank 1: memory_bytes is 1048576 there and 1073741824 on rank 0'
    """
    first = candidates[0]
    for rank, each in enumerate(candidates):
        if each.refusal:
            return f"rank {rank}: {each.refusal}"
        if each.host != first.host:
            return f"rank {rank}: it is not on the host of rank 0"
        if each.versions != first.versions:
            return f"rank {rank}: it has {each.versions}, and rank 0 has {first.versions}"
        if each.num_bytes != first.num_bytes:
            return (
                f"rank {rank}: memory_bytes is {each.num_bytes} there and {first.num_bytes} "
                "on rank 0"
            )
    return ""


def _first(refusals: Sequence[str]) -> str:
    return next((f"rank {rank}: {each}" for rank, each in enumerate(refusals) if each), "")


def _made(everyone: Everyone, make: Callable[[], T]) -> tuple[T | None, str]:
    """What `make` gives if it succeeds on all ranks; else None and the reason."""
    made, failure = None, ""
    try:
        made = make()
    except (RuntimeError, ValueError, MemoryError) as error:
        failure = f"{type(error).__name__}: {error}"[:_REASON_LETTERS]
    refusal = _first(_told(everyone, failure))
    return (None if refusal else made), refusal


def _told(everyone: Everyone, facts: str | Candidate) -> list[Any]:
    """What every rank says."""
    own = json.dumps(facts).encode().ljust(_FACTS_BYTES)
    return [json.loads(each) for each in everyone(own)]


def _host() -> str:
    """The kernel that runs this process: it is the same for all containers of a host."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
