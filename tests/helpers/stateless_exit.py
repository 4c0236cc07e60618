"""A script: ranks that end without closing their group, each a whole interpreter that shuts down.

    python stateless_exit.py WORLD_SIZE ROUNDS

The imports happen once; every rank is forked from here, before any thread exists, and then runs
the interpreter's normal end: exit functions, threads, finalisation.
"""

import gc
import os
import socket
import sys
import time

from fastvideo_comm.stateless import StatelessProcessGroup


def run_rank(rank, world_size, server, order):
    port = server.getsockname()[1]
    group = StatelessProcessGroup.create(
        "127.0.0.1", port, rank, world_size, timeout=30, listen_socket=server if rank == 0 else None
    )
    group.all_gather_obj(rank)
    group.barrier()
    if order == rank % 3:
        time.sleep(0.02)  # another rank is the last one in every round
    if rank:
        time.sleep(0.05)  # rank 0 is at its end by now, and serves on
        group.send_obj(rank, rank)
        if group.recv_obj(rank) != rank:
            sys.exit(1)


def main(world_size, rounds):
    gc.freeze()  # an exit does not look at all of torch for garbage
    for number in range(rounds):
        server = socket.create_server(("127.0.0.1", 0), backlog=64)
        children = []
        for rank in range(world_size):
            child = os.fork()
            if not child:
                run_rank(rank, world_size, server, number % 3)
                return
            children.append(child)
        server.close()
        start = time.monotonic()
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        seconds = time.monotonic() - start
        if any(codes) or seconds > 20:
            sys.stdout.write(f"round {number}: exit codes {codes} after {seconds:.1f} s\n")
            return
    sys.stdout.write(f"{rounds} clean\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
