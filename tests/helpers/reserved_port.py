"""A port that nobody else is given until a job listens on it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def reserved_port(host: str = "127.0.0.1") -> Iterator[int]:
    """A port for a rank that is told where to listen.

    A socket is bound to the port and does not listen. While the port is bound, the kernel chooses
    it for no other socket, and a listening socket may still have it, because both allow the reuse
    of an address. A port that is looked up and let go again can be another process's a moment
    later.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((host, 0))
        yield holder.getsockname()[1]
