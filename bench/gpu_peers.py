"""The peers that need several GPUs: fast-ulysses and flashinfer's `comm.ulysses`.

They are packages of compiled code and are imported, not loaded by file: install the dependency
group `gpu-peers` with what it depends on. Each is measured between real ranks only, in its fastest
configuration that gives the exact result. fast-ulysses is measured twice: into a tensor that the
caller owns, and, as `fast-ulysses into buffers`, into symmetric buffers that later calls overwrite.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from peers import Bound, Peer, attempt, one_call_each, sorted_out
from torch import Tensor

# q, k and v of an attention lie in different buffers.
NUM_BUFFERS = 3
_MODES = {(2, 1): 0, (1, 2): 1}


def _fast_ulysses(*, into_buffers: bool) -> Peer:
    """fast-ulysses: `UlyssesGroup.all_to_all_4d`; with a buffer it has no gradient."""
    package = importlib.import_module("fast_ulysses")

    @functools.cache  # a group keeps its windows for as long as it lives
    def bind(group: dist.ProcessGroup) -> Bound:
        ulysses = package.UlyssesGroup(group)
        buffers: dict[Any, tuple[Any, ...]] = {}

        def all_to_all(x: Tensor, scatter_dim: int, gather_dim: int) -> Tensor:
            return ulysses.all_to_all_4d(x, mode=_MODES[scatter_dim, gather_dim])

        def all_to_all_into_buffers(x: Tensor, scatter_dim: int, gather_dim: int) -> Tensor:
            mode = _MODES[scatter_dim, gather_dim]
            key = (x.shape, x.dtype, mode)
            if key not in buffers:
                made = [ulysses.empty_output(x, mode=mode) for _ in range(NUM_BUFFERS)]
                buffers[key] = (itertools.cycle(made),)
            return ulysses.all_to_all_4d(x, mode=mode, out=next(buffers[key][0]))

        chosen = all_to_all_into_buffers if into_buffers else all_to_all
        return Bound(chosen, one_call_each(chosen))

    version = importlib.metadata.version("fast-ulysses")
    return Peer("fast-ulysses", version, "fast_ulysses/group.py", not into_buffers, bind)


def _flashinfer() -> Peer:
    """flashinfer: `UlyssesCommunicator`, NVLink where it has it, else NCCL; it has no gradient."""
    comm = importlib.import_module("flashinfer.comm")

    @functools.cache
    def bind(group: dist.ProcessGroup) -> Bound:
        communicators: dict[torch.dtype, Any] = {}

        def communicator_for(x: Tensor) -> Any:
            """One for each dtype, made anew where it is too small: collectively, as all calls."""
            known = communicators.get(x.dtype)
            if known is None or known.max_elems < x.numel():
                if known is not None:
                    known.close()
                known = comm.UlyssesCommunicator(
                    group, max_elems=x.numel(), dtype=x.dtype, device=x.device
                )
                communicators[x.dtype] = known
            return known

        def all_to_all(x: Tensor, scatter_dim: int, gather_dim: int) -> Tensor:
            communicator = communicator_for(x)
            if _MODES[scatter_dim, gather_dim] == 0:
                return communicator.scatter_heads(x)
            return communicator.gather_heads(x)

        return Bound(all_to_all, one_call_each(all_to_all))

    version = importlib.metadata.version("flashinfer-python")
    return Peer("flashinfer", version, "flashinfer/comm/ulysses.py", False, bind)


REGISTRY: dict[str, Callable[[], Peer]] = {
    "fast-ulysses": functools.partial(_fast_ulysses, into_buffers=False),
    "fast-ulysses into buffers": functools.partial(_fast_ulysses, into_buffers=True),
    "flashinfer": _flashinfer,
}


@functools.cache
def load(name: str) -> Peer | str:
    """The peer, or why it is missing."""
    return attempt(REGISTRY[name])


def load_all() -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers that loaded, and the missing ones with their reasons."""
    return sorted_out({name: load(name) for name in REGISTRY})


def bindable(
    peers: dict[str, Peer], group: dist.ProcessGroup, any_rank: Callable[[bool], bool]
) -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers that every rank can bind, and why a rank cannot bind the others.

    Args:
        peers: those that loaded, the same ones on all ranks.
        group: the ranks; each peer keeps what it makes for them.
        any_rank: whether one of the ranks says yes.
    """
    present, refused = {}, {}
    for name, peer in peers.items():
        reason = ""
        try:
            peer.bind(group)
        except Exception as error:  # fast-ulysses refuses GPUs without NVLink
            reason = f"{type(error).__name__}: {error}"
        if any_rank(bool(reason)):
            refused[name] = reason or "another rank cannot bind it"
        else:
            present[name] = peer
    return present, refused
