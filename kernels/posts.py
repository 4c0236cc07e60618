"""The Triton kernels by which ranks tell each other where to write and when it is written.

Each rank has memory that all ranks of its group can write to: its segment. A segment begins with
words of 8 bytes, two for each rank: in the first row the *posts*, in the second row the *dones*.
Rank r writes to the words in column r of the others' segments, and reads all words of its own.

A call has three launches in one stream: `post`, the copy (`deliver.py`), `done`. A post says where
this rank's outputs are. It holds the number of the call too, so a post of an earlier call is never
taken for one of this call. And it holds a digest of what the rank asks for: nothing is written for
a rank that asks for something else, whose outputs may be smaller. A done says that this rank has
written its part.

Memory order: a post and a done are released at the scope of the system, and acquired by whoever
waits for them. So a rank writes to an output only after its owner's earlier accesses to that
memory, and the owner reads the output only after the rank has written it.

One word for each direction of a pair of ranks is enough. A rank posts call n+1 only after all
others have said done for call n, so they have read its post of call n. It says done for call n+1
only after all others have posted call n+1, so they have read its done of call n.

Calls are counted on the device. So a captured CUDA graph can be replayed: every replay is a call.

A wait ends without the other rank when the host sets a word (`host[0]`). Each program writes its
step into another word that the host can see (`host[1 + peer]`). The step is odd while the program
waits, so the host knows which ranks have not come, and for how long. It is negative, the number of
the call, if the other rank asks for something else; `done` then sets `host[0]`, so that nothing
more is posted. A kernel does not end a wait by a trap, because a trap would end everything on the
device.

This module is imported at the first launch, so the package can be imported without triton.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .loading import load

# Bytes of a unit in which a post counts; the widest access of one thread.
PLACE_BYTES = tl.constexpr(16)
# Bits of a post that hold the place, and above them the digest. The others hold the call's number.
_PLACE_BITS = tl.constexpr(35)
_DIGEST_BITS = tl.constexpr(20)
_CALL_SHIFT = tl.constexpr(_PLACE_BITS.value + _DIGEST_BITS.value)
# Numbers of calls that a post tells apart; a word never holds a post older than the call before.
_CALLS = tl.constexpr(1 << 8)
# A wait looks at the host's word once in so many rounds: it is not in the device's memory.
_ROUNDS = tl.constexpr(64)
_POINTERS = ["bases", "places", "counts", "host"]


class Words(NamedTuple):
    """What the kernels of one rank keep from call to call; all tensors are int64.

    `bases` has the addresses of the segments of all ranks as this rank sees them, `places` the
    addresses of the outputs of all ranks in the present call (0 where a rank did not come), and
    `counts` the number of the present call, once for each rank. They are in this rank's memory.
    `host` is in memory of the host: 1 + P words.
    """

    bases: Tensor
    places: Tensor
    counts: Tensor
    host: Tensor
    rank: int


@triton.jit(
    do_not_specialize=["rank", "offset", "digest"], do_not_specialize_on_alignment=_POINTERS
)
def post(bases, places, counts, host, rank, offset: tl.int64, digest: tl.int64):
    """Tells one rank where this rank's outputs are, and waits for its place: a program for each.

    `offset` counts from the start of this rank's segment, in bytes, a multiple of 16. `digest` has
    20 bits.

    Example, checked by hand: rank 0 of 2 posts offset 256 in call 3, with the digest 9. Its program
    for rank 1 writes (3 << 55) + (9 << 35) + 16 to the first word of rank 1's segment. If rank 1
    posts offset 64 with the same digest, the program finds (3 << 55) + (9 << 35) + 4 in the second
    word of its own segment, and writes `bases[1] + 64` to `places[1]`. With another digest it
    writes 0 there. Its program for rank 0 writes `bases[0] + 256` to `places[0]`.
    """
    peer = tl.program_id(0)
    base = tl.load(bases + peer)
    if peer == rank:
        tl.store(places + peer, base + offset)
    else:
        call = tl.load(counts + peer) + 1
        tl.store(counts + peer, call)
        tl.store(places + peer, 0)
        wanted = call % _CALLS
        tl.store(host + 1 + peer, 4 * call + 1)
        if tl.load(host, volatile=True) == 0:
            word = (wanted << _CALL_SHIFT) + (digest << _PLACE_BITS) + offset // PLACE_BYTES
            tl.atomic_xchg(_words(base) + rank, word, sem="release", scope="sys")
        word, came = _wait(_words(tl.load(bases + rank)) + peer, wanted, host, _CALL_SHIFT)
        if came:
            if (word >> _PLACE_BITS) & ((1 << _DIGEST_BITS) - 1) == digest:
                place = (word & ((1 << _PLACE_BITS) - 1)) * PLACE_BYTES
                tl.store(places + peer, base + place)
                tl.store(host + 1 + peer, 4 * call + 2)
            else:
                tl.store(host + 1 + peer, -call)


@triton.jit(do_not_specialize=["rank", "world"], do_not_specialize_on_alignment=_POINTERS)
def done(bases, places, counts, host, rank, world):
    """Tells one rank that its outputs are written, and waits for the same: a program for each.

    A rank that did not come, or that asks for something else, has nothing from this rank: it is
    told nothing, and no later call is posted.
    """
    peer = tl.program_id(0)
    if peer != rank:
        if tl.load(places + peer) == 0:
            tl.store(host, 1)
        else:
            call = tl.load(counts + peer)
            tl.store(host + 1 + peer, 4 * call + 3)
            told = _words(tl.load(bases + peer)) + world + rank
            tl.atomic_xchg(told, call, sem="release", scope="sys")
            _, came = _wait(_words(tl.load(bases + rank)) + world + peer, call, host, 0)
            if came:
                tl.store(host + 1 + peer, 4 * call + 4)


@triton.jit
def _words(base):
    return base.to(tl.pointer_type(tl.int64))


@triton.jit
def _wait(word, wanted, host, SHIFT: tl.constexpr):
    """Waits for a word of which the bits above `SHIFT` are `wanted`, or for the host to stop it."""
    value = tl.atomic_add(word, 0, sem="acquire", scope="sys")
    rounds = 0
    stopped = tl.load(host, volatile=True)
    while ((value >> SHIFT) != wanted) & (stopped == 0):
        value = tl.atomic_add(word, 0, sem="acquire", scope="sys")
        rounds += 1
        if rounds % _ROUNDS == 0:
            stopped = tl.load(host, volatile=True)
    return value, (value >> SHIFT) == wanted


def digest_of(question: bytes) -> int:
    """The bits of a post that say what a rank asks for.

    Two different questions have the same bits once in a million.
    """
    digest = hashlib.blake2b(question, digest_size=8).digest()
    number = int.from_bytes(digest, "little")
    return number % (1 << int(_DIGEST_BITS.value))


def launch_post(words: Words, offset: int, digest: int) -> None:
    """Posts that this rank's outputs are `offset` bytes behind the start of its segment; waits.

    The current stream waits, not the caller.

    Args:
        words: of this rank.
        offset: a multiple of 16.
        digest: of what this rank asks for, by `digest_of`.
    """
    _launch(post, words, offset, digest)


def launch_done(words: Words) -> None:
    """Tells every rank that came that its outputs are written, and waits for the same.

    The current stream waits, not the caller.
    """
    _launch(done, words, words.bases.numel())


def _launch(kernel: Any, words: Words, *numbers: int) -> None:
    *tensors, rank = words
    device = words.bases.device.index
    with torch.accelerator.device_index(device):  # None, on the CPU: no change
        launch = _loaded(kernel, device, 1 + len(numbers))[(words.bases.numel(), 1, 1)]
        launch(*[tensor.data_ptr() for tensor in tensors], rank, *numbers)


# The code depends on none of the arguments. A search for it by the arguments takes longer than the
# launch.
@functools.cache
def _loaded(
    kernel: Any,
    device: int | None,  # noqa: ARG001 - the current device
    num_numbers: int,
) -> Any:
    arguments = [*[torch.int64] * len(_POINTERS), *[0] * num_numbers]
    return load(kernel, *arguments, grid=(1, 1, 1), num_warps=1)
