"""Ranks for tests: as threads of this process, or as processes forked from a warm server."""

import contextlib
import multiprocessing
import os
import signal
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path

from torch.distributed import FileStore, HashStore, TCPStore

from fastvideo_comm.errors import CommunicationError
from fastvideo_comm.stateless import StatelessProcessGroup

CONTEXT = multiprocessing.get_context("forkserver")
SECRET = b"a secret for tests"


def listener(host="127.0.0.1"):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, 0), family=family, backlog=128)


def run_threads(world_size, program, open_group):
    """Run `program(group)` on every rank in a thread of its own; re-raise the first failure."""
    results = [None] * world_size
    failures = []

    def run(rank):
        try:
            with open_group(rank) as group:
                results[rank] = program(group)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results


@contextlib.contextmanager
def own_groups(world_size, host="127.0.0.1", **options):
    """Yield a function that opens the group of a rank on the library's own store."""
    server = listener(host)
    port = server.getsockname()[1]
    options = {"timeout": 20.0, **options}

    def open_group(rank):
        return StatelessProcessGroup.create(
            host,
            port,
            rank,
            world_size,
            listen_socket=server if rank == 0 else None,
            **options,
        )

    open_group.port = port
    try:
        yield open_group
    finally:
        server.close()


def run_own(world_size, program, **options):
    with own_groups(world_size, **options) as open_group:
        return run_threads(world_size, program, open_group)


@contextlib.contextmanager
def torch_groups(kind, world_size, directory, **options):
    """Yield a function that opens the group of a rank on a store of torch."""
    options = {"timeout": 20.0, **options}
    shared = HashStore()
    master = tcp_store(0, master=True) if kind == "tcp" else None

    def open_group(rank):
        if kind == "tcp":
            store = tcp_store(master.port)
        elif kind == "file":
            store = FileStore(str(directory / "store"), world_size)
        else:
            store = shared
        return StatelessProcessGroup(rank, world_size, store, **options)

    yield open_group


def tcp_store(port, master=False):
    return TCPStore("127.0.0.1", port, None, master, timedelta(seconds=20), wait_for_workers=False)


class RankProcess:
    """A rank in a process; `outcome` is ("done", value) or (error's type, text, peers, seconds)."""

    def __init__(self, rank, process, pipe):
        self.rank = rank
        self.process = process
        self.pipe = pipe

    def expect(self, word, timeout=30.0):
        assert self.pipe.poll(timeout), f"rank {self.rank} did not say {word!r}"
        said = self.pipe.recv()
        assert said == word, f"rank {self.rank} said {said!r}, not {word!r}"

    def outcome(self, timeout=30.0):
        assert self.pipe.poll(timeout), f"rank {self.rank} said nothing"
        return self.pipe.recv()

    def signal(self, number):
        os.kill(self.process.pid, number)
        if number == signal.SIGSTOP:  # all its threads must have stopped
            threads = Path(f"/proc/{self.process.pid}/task")
            while not all(is_stopped(thread) for thread in threads.iterdir()):
                time.sleep(0.001)


def is_stopped(thread):
    """Whether a thread of another process is stopped, or has ended."""
    try:
        return (thread / "stat").read_text().rpartition(")")[2].split()[0] in "TtZX"
    except OSError:
        return True


@contextlib.contextmanager
def rank_processes(world_size, program, *args, store=None, **options):
    """Start the ranks and yield them when all have joined; at the end none is left."""
    options = {"timeout": 20.0, **options}
    ranks = []
    try:
        for rank in range(world_size):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(
                target=_rank_main, args=(theirs, program, rank, world_size, store, args, options)
            )
            process.start()
            theirs.close()
            ranks.append(RankProcess(rank, process, ours))
        port = ranks[0].outcome()
        for rank in ranks[1:]:
            rank.pipe.send(port)
        for rank in ranks:
            rank.expect("joined")
        yield ranks
    finally:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.process.pid, signal.SIGKILL)
            rank.process.join()
            rank.process.close()
            rank.pipe.close()


def _rank_main(pipe, program, rank, world_size, store, args, options):
    port = None
    if rank:
        port = pipe.recv()
    if store is None:
        server = listener() if rank == 0 else None
        if server is not None:
            port = server.getsockname()[1]
            pipe.send(port)
        group = StatelessProcessGroup.create(
            "127.0.0.1", port, rank, world_size, listen_socket=server, **options
        )
    else:
        if store == "tcp":
            torch_store = tcp_store(port or 0, master=rank == 0)
            port = torch_store.port
        else:
            torch_store = FileStore(store, world_size)
        if rank == 0:
            pipe.send(port)
        group = StatelessProcessGroup(rank, world_size, torch_store, **options)
    pipe.send("joined")
    start = time.monotonic()
    try:
        outcome = ("done", program(group, pipe, *args))
    except (CommunicationError, KeyboardInterrupt) as error:
        peers = getattr(error, "peers", ())
        outcome = (type(error).__name__, str(error), peers, time.monotonic() - start)
    pipe.send(outcome)
    if store == "tcp":
        pipe.recv()  # the server must outlive the others
    group.close(timeout=5)
