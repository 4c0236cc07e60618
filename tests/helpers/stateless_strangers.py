"""Connections by hand: strangers at the port of a group that forms, and ranks that misbehave."""

import contextlib
import os
import socket
import threading
import time

from stateless_ranks import SECRET, own_groups

from fastvideo_comm.object_channel.settings import GroupSettings
from fastvideo_comm.object_channel.store_handshake import (
    HELLO_BYTES,
    MAGIC,
    make_hello,
    shake_hands,
)
from fastvideo_comm.object_channel.store_link import Kind, Link
from fastvideo_comm.object_channel.store_messages import JoinRequest, pack_join


class FormingGroup:
    """A group whose rank 0 waits for the others; `groups` has each rank's once all have joined."""

    def __init__(self, open_group):
        self.open_group = open_group
        self.port = open_group.port
        self.groups = {}
        self.failures = {}
        self._threads = []

    def join_in_thread(self, rank):
        def join():
            try:
                self.groups[rank] = self.open_group(rank)
            except Exception as error:
                self.failures[rank] = error

        thread = threading.Thread(target=join)
        thread.start()
        self._threads.append(thread)

    def finish(self, *ranks):
        """Let these ranks join, and return the groups when everybody has, or has failed."""
        for rank in ranks:
            self.join_in_thread(rank)
        for thread in self._threads:
            thread.join()
        return self.groups


@contextlib.contextmanager
def forming_group(world_size=2, **options):
    """Yield a group that rank 0 has begun; at the end, all of its ranks leave."""
    with own_groups(world_size, **options) as open_group:
        forming = FormingGroup(open_group)
        forming.join_in_thread(0)
        try:
            yield forming
        finally:
            forming.finish()
            for rank in sorted(forming.groups, reverse=True):
                forming.groups[rank].close(timeout=2)


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=5)


def strangers_that_only_talk(port):
    """Open connections that say nothing, half a greeting, garbage, or far too much."""
    sockets = []
    for data in (
        b"", make_hello(None)[:20], b"GET / HTTP/1.1\r\n\r\n", os.urandom(HELLO_BYTES),
        make_hello(SECRET)[:-1], make_hello(SECRET) + os.urandom(32), b"\0" * 100_000,
    ):  # fmt: skip
        sock = connect(port)
        with contextlib.suppress(ConnectionError):  # refused in the middle
            sock.sendall(data)
        sockets.append(sock)
    return sockets


def strangers_that_know_the_magic(port, count):
    sockets = []
    for _ in range(count):
        sock = connect(port)
        sock.sendall(MAGIC)
        sockets.append(sock)
    return sockets


def proven_link(port, secret):
    """Connect and prove the secret, and say nothing more."""
    sock = connect(port)
    key, _session = shake_hands(sock, secret, time.monotonic() + 5)
    return Link(sock, 1 << 27, key, of_store=False)


def words(world_size, secret):
    """Return the settings that every rank repeats."""
    settings = GroupSettings.checked(
        0, world_size, 5.0, secret, "msgpack", 64 << 20, "default", "auto", None
    )
    return settings.words


def ask_to_join(
    link, rank, token=bytes(16), *, is_lifeline=False, settings=None, world_size=2, secret=None
):
    """Send a request to join on a connection that is proven."""
    settings = settings or words(world_size, secret)
    link.queue(Kind.JOIN, 1, pack_join(JoinRequest(is_lifeline, rank, token, settings)))
    link.flush()


def answer_on(link, seconds=5):
    """Wait for the next frame."""
    link.sock.settimeout(seconds)
    while not (frames := link.read()):
        pass
    return frames[0]


def joined_link(port, secret, rank=1, world_size=2):
    """Join as a rank with bare hands; return both connections."""
    first = proven_link(port, secret)
    options = {"world_size": world_size, "secret": secret}
    ask_to_join(first, rank, **options)
    second = proven_link(port, secret)
    ask_to_join(second, rank, answer_on(first).meta, is_lifeline=True, **options)
    return [first, second]
