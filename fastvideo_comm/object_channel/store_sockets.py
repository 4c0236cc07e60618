"""Listening and connecting: on one address only, within a deadline, with keep-alive probes."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import math
import os
import socket
import time
import weakref
from collections.abc import Callable
from typing import NamedTuple

from fastvideo_comm.errors import JoinError, JoinTimeoutError

# Between two tries to join.
FIRST_PAUSE = 0.01
LONGEST_PAUSE = 0.25
_BACKLOG = 512


class Heartbeat(NamedTuple):
    """When a peer whose kernel does not answer is given up.

    Attributes:
        interval: Seconds between two probes of an idle lifeline, whole seconds from 1 on.
        limit: How many unanswered probes end the connection.
    """

    interval: int
    limit: int

    @classmethod
    def checked(cls, interval: float, limit: int) -> Heartbeat:
        """Return the heartbeat; ValueError where the kernel could not do it."""
        if not 1 <= interval <= 3600 or interval != int(interval):
            raise ValueError(
                f"heartbeat_interval must be whole seconds from 1 to 3600, got {interval!r}"
            )
        if not 1 <= limit <= 100 or limit != int(limit):
            raise ValueError(f"heartbeat_limit must be a number from 1 to 100, got {limit!r}")
        return cls(int(interval), int(limit))

    def apply(self, sock: socket.socket) -> None:
        """Set the probes of a lifeline; unanswered data also ends it after interval * limit."""
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, self.interval)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, self.interval)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, self.limit)
        milliseconds = 1000 * self.interval * self.limit
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


def is_wildcard(sock: socket.socket) -> bool:
    """Whether a socket listens on every interface."""
    address = ipaddress.ip_address(sock.getsockname()[0].partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_unspecified


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on the host's address and on no other.

    Raises:
        JoinError: The name is unknown, or the port in use.
    """
    try:
        family, kind, protocol, _name, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise JoinError(f"host must be a known name or address, got {host!r}: {error}") from error
    sock = socket.socket(family, kind, protocol)
    try:
        if family == socket.AF_INET6:
            mapped = ipaddress.IPv6Address(str(address[0]).partition("%")[0]).ipv4_mapped
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, mapped is None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        in_use = error.errno == errno.EADDRINUSE
        advice = "; choose another port, or give rank 0 a listen_socket" if in_use else ""
        raise JoinError(f"cannot listen on {host} port {port}: {error}{advice}") from error
    return sock


def connect(host: str, port: int, deadline: float, *, was_there: bool = False) -> socket.socket:
    """Return a socket connected to the store; a store that does not listen yet is tried again.

    Args:
        host: Where the store listens.
        port: The port of the store.
        deadline: In `time.monotonic`.
        was_there: Whether the store has answered this rank: if nobody listens now, it has ended.

    Raises:
        JoinError: The name is unknown, or the store has ended.
        JoinTimeoutError: Nobody answered until the deadline.
    """
    pause = FIRST_PAUSE
    last: OSError | None = None
    while (left := deadline - time.monotonic()) > 0:
        try:
            sock = socket.create_connection((host, port), timeout=left)
        except socket.gaierror as error:
            raise JoinError(f"host must be a known name, got {host!r}: {error}") from error
        except OSError as error:
            if was_there and isinstance(error, ConnectionRefusedError):
                text = f"rank 0 ended the join: nobody listens on {host} port {port} any more"
                raise JoinError(text, peers=(0,)) from None
            last = error
            time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
            pause = min(2 * pause, LONGEST_PAUSE)
            continue
        # On loopback, a socket can by chance connect to itself where nobody listens.
        if sock.getsockname() != sock.getpeername():
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        sock.close()
    raise JoinTimeoutError(
        f"no store answers on {host} port {port}: {last}; a store listens until all have joined"
    )


def receive_exactly(sock: socket.socket, size: int, deadline: float) -> bytes:
    """Return `size` bytes.

    Raises:
        EOFError: The other end closed the connection before.
        TimeoutError: The bytes did not come until the deadline.
    """
    data = b""
    while len(data) < size:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no answer")
        sock.settimeout(left)
        part = sock.recv(size - len(data))
        if not part:
            raise EOFError("the connection was closed")
        data += part
    return data


def describe_peer(sock: socket.socket) -> str:
    """Return the address at the other end, for messages."""
    with contextlib.suppress(OSError):
        host, port = sock.getpeername()[:2]
        return f"a connection from {host} port {port}"
    return "a connection that is gone"


def call_after_fork(method: Callable[[], None]) -> None:
    """Call a bound method in every child that this process forks, while its object lives."""
    reference = weakref.WeakMethod(method)

    def run() -> None:
        bound = reference()
        if bound is not None:
            bound()

    os.register_at_fork(after_in_child=run)


def seconds_left(deadline: float) -> float:
    """Return the seconds until a deadline, 0 when it is over."""
    return max(0.0, deadline - time.monotonic())


def to_milliseconds(seconds: float) -> int:
    """Return whole milliseconds, rounded up, so that a wait never spins before its end."""
    return math.ceil(seconds * 1000)
