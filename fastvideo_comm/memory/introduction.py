"""How the ranks of a host find each other and connect, all together or none.

Each rank listens on an abstract Unix socket with a random name. The names and a secret of each rank
travel through the group, so only its ranks know the secrets. The higher rank of each pair connects
and sends the secret of the lower; both look at the uid of the other process (SO_PEERCRED). Where
one pair cannot connect, because the ranks are on other hosts, in other network namespaces or of
other users, all ranks refuse together and say why.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable

from . import memfd
from .line import Line

# `everyone(payload)`: what every rank gave, in rank order; all payloads are of one length.
Everyone = Callable[[bytes], list[bytes]]

_TOKEN_BYTES = 16
_REASON_BYTES = 200
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_HELLO = struct.Struct(f"<I{_TOKEN_BYTES}s")


def introduce(
    rank: int, world_size: int, everyone: Everyone, *, timeout: float, enabled: bool
) -> tuple[dict[int, Line], str]:
    """A line to every other rank, or none and the reason; the same on all ranks.

    Args:
        rank: This rank.
        world_size: How many ranks there are.
        everyone: Gathers equally long bytes from all ranks; called three times.
        timeout: Seconds that a connection may take.
        enabled: False where this rank does not want to share memory.
    """
    listener: socket.socket | None = None
    links: dict[int, socket.socket] = {}
    try:
        name, secret = secrets.token_bytes(_TOKEN_BYTES), secrets.token_bytes(_TOKEN_BYTES)
        reason = "" if enabled else "it is switched off there"
        if enabled:
            try:
                listener = _listen(name, world_size)
            except OSError as error:
                reason = f"it cannot share memory: {error}"
        offers, refusal = _agree(everyone, reason, name + secret)
        if refusal or listener is None:
            return {}, refusal
        for lower in range(rank):
            theirs = offers[lower]
            try:
                links[lower] = _connect(theirs[:_TOKEN_BYTES], timeout)
                links[lower].send(_HELLO.pack(rank, theirs[_TOKEN_BYTES:]))
            except OSError as error:
                reason = f"it cannot reach rank {lower}: {error}"
                break
        _, refusal = _agree(everyone, reason)
        if refusal:
            return {}, refusal
        # Every higher rank has connected and sent its hello: nothing is waited for.
        _accept(listener, secret, rank, world_size, links)
        missing = [other for other in range(world_size) if other != rank and other not in links]
        if missing:
            reason = f"nobody who is rank {missing[0]} has connected to it"
        _, refusal = _agree(everyone, reason)
        if refusal:
            return {}, refusal
        lines = {other: Line(link) for other, link in sorted(links.items())}
        links = {}
        return lines, ""
    finally:
        for link in (listener, *links.values()):
            if link is not None:
                link.close()


def _agree(everyone: Everyone, reason: str, payload: bytes = b"") -> tuple[list[bytes], str]:
    """Every rank's payload, and the reason of the first rank that has one."""
    text = reason.encode()[:_REASON_BYTES].ljust(_REASON_BYTES, b"\0")
    answers = everyone(text + payload)
    for other, answer in enumerate(answers):
        given = answer[:_REASON_BYTES].rstrip(b"\0").decode(errors="replace")
        if given:
            return [], f"rank {other}: {given}"
    return [answer[_REASON_BYTES:] for answer in answers], ""


def _listen(name: bytes, world_size: int) -> socket.socket:
    """A listening socket; OSError if this system lacks what else is needed."""
    memfd.Segment(descriptor := memfd.create(memfd.GRANULE), memfd.GRANULE)
    os.close(descriptor)
    if not hasattr(os, "eventfd"):
        raise OSError("this system has no eventfd")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        listener.bind(_address(name))
        listener.listen(world_size + 8)  # strangers may stand in the queue too
    except BaseException:
        listener.close()
        raise
    return listener


def _connect(name: bytes, timeout: float) -> socket.socket:
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        deadline = time.monotonic() + timeout
        while True:
            try:
                link.connect(_address(name))
                break
            except BlockingIOError:  # the queue of the other is full
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.001)
        _check_user(link)
    except BaseException:
        link.close()
        raise
    return link


def _accept(
    listener: socket.socket,
    secret: bytes,
    rank: int,
    world_size: int,
    links: dict[int, socket.socket],
) -> None:
    """Adds the waiting connections of processes that know the secret and are of this user."""
    with contextlib.suppress(BlockingIOError):
        while True:
            link, _ = listener.accept()
            link.setblocking(False)
            other = -1
            with contextlib.suppress(OSError):
                _check_user(link)
                hello = link.recv(_HELLO.size + 1)
                if len(hello) == _HELLO.size:
                    claimed, token = _HELLO.unpack(hello)
                    if secrets.compare_digest(token, secret):
                        other = claimed
            if rank < other < world_size and other not in links:
                links[other] = link
            else:
                link.close()


def _address(name: bytes) -> bytes:
    """An abstract address: it is in no file system, and goes with its last socket."""
    return b"\0fastvideo_comm-" + name.hex().encode()


def _check_user(link: socket.socket) -> None:
    credentials = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(credentials)
    if user != os.geteuid():
        raise PermissionError(f"the process there is of uid {user}, not {os.geteuid()}")
