"""What rank processes do in the fault tests."""

import os
import socket
import time

from fastvideo_comm.stateless import StatelessProcessGroup


def traffic(group, _pipe, op):
    """Repeat one op without an end, every rank its part."""
    right, left = (group.rank + 1) % group.world_size, (group.rank - 1) % group.world_size
    while True:
        if op == "send_obj":
            group.send_obj(b"x" * 1000, right)
            group.recv_obj(left)
        elif op == "broadcast_obj":
            for src in range(group.world_size):
                group.broadcast_obj(b"x" * 1000, src)
        elif op == "all_gather_obj":
            group.all_gather_obj(b"x" * 1000)
        elif op == "large":
            group.send_obj(b"x" * 8_000_000, right)
            group.recv_obj(left)
        else:
            group.barrier()


def block_in(group, pipe, op, blocked_ranks, seconds):
    """On some ranks, one call that nobody completes; the others wait to be told."""
    if group.rank not in blocked_ranks:
        pipe.recv()
        return "told"
    pipe.send("calling")
    waiting_for = (group.rank + 1) % group.world_size
    if op == "send_obj":
        while True:
            group.send_obj(b"x" * 100_000, waiting_for, timeout=seconds)
    wait_in(group, op, waiting_for, seconds)
    return "returned"


def call_when_told(group, pipe, op, seconds):
    """One call after the word; then a second one, whose error is the outcome."""
    while pipe.recv() != "stop":
        start = time.monotonic()
        try:
            call(group, op, seconds)
            pipe.send(("returned", "", (), time.monotonic() - start))
        except Exception as error:
            peers = getattr(error, "peers", ())
            text = (type(error).__name__, str(error), peers, time.monotonic() - start)
            pipe.send(text)


def call(group, op, seconds):
    other = 0 if group.rank else 1
    if op == "send_obj":
        group.send_obj("x", other, timeout=seconds)
    elif op == "recv_obj":
        group.recv_obj(other, timeout=seconds)
    elif op == "broadcast_obj":
        group.broadcast_obj("x", group.rank, timeout=seconds)
    elif op == "all_gather_obj":
        group.all_gather_obj("x", timeout=seconds)
    elif op == "expire_data":
        time.sleep(0.01)
        group.data_expiration_seconds = 0
        group.expire_data(timeout=seconds)
    elif op == "close":
        group.close(timeout=seconds)
    else:
        group.barrier(timeout=seconds)


def fork_and_wait(group, pipe):
    """Leave a child behind that holds copies of everything open, as a data loader does."""
    child = os.fork()
    if not child:
        time.sleep(20)
        os._exit(0)
    pipe.send("forked")
    group.recv_obj(1, timeout=30)


def call_and_let_out(group, pipe, op, seconds):
    """One call after the word, whatever it raises."""
    pipe.recv()
    call(group, op, seconds)


def join_alone(pipe, rank):
    """Join a group whose other rank never comes."""
    server = socket.create_server(("127.0.0.1", 0))
    pipe.send("joining")
    try:
        StatelessProcessGroup.create(
            "127.0.0.1",
            server.getsockname()[1],
            rank,
            2,
            timeout=60,
            listen_socket=server if rank == 0 else None,
        )
    except KeyboardInterrupt:
        pipe.send("KeyboardInterrupt")


def wait_in(group, op, waiting_for, seconds):
    """Call what waits for that rank."""
    if op == "recv_obj":
        group.recv_obj(waiting_for, timeout=seconds)
    elif op == "broadcast_obj":
        group.broadcast_obj(None, waiting_for, timeout=seconds)
    elif op == "all_gather_obj":
        group.all_gather_obj(1, timeout=seconds)
    else:
        group.barrier(timeout=seconds)
