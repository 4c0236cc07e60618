"""One rank on one host, for test_hosts: `python host_ranks.py <what> <rank> <folder>`.

Its last line on stdout is what the test reads.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.stateless import StatelessProcessGroup

FIRST_HOST, PORT = "10.77.0.1", 29641
TIMEOUT_SECONDS = 4.0


def listening(port: int) -> list[str]:
    """The local addresses, in hexadecimal, on which this host listens on a port."""
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            if state == "0A" and int(address.rpartition(":")[2], 16) == port:
                found.append(address.rpartition(":")[0])
    return found


def store(rank: int, folder: Path) -> dict[str, Any]:
    """Objects between the hosts; where the store listens while the group forms, and afterwards."""
    seen: set[str] = set()
    has_joined = threading.Event()

    def watch() -> None:
        while not has_joined.wait(0.02):
            seen.update(listening(PORT))

    watcher = threading.Thread(target=watch)
    watcher.start()
    if rank == 1:
        time.sleep(1.0)  # the group forms for so long at least
    with StatelessProcessGroup.create(
        FIRST_HOST, PORT, rank, 2, timeout=30.0, secret=b"the secret of this test"
    ) as group:
        has_joined.set()
        watcher.join()
        everyone = group.all_gather_obj({"rank": rank, "x": torch.full((2,), float(rank))})
        afterwards = listening(PORT)
        group.barrier()
    total = sum(entry["x"].sum().item() for entry in everyone)
    return {"sum": total, "listening": sorted(seen), "afterwards": afterwards}


def objects_cut(rank: int, folder: Path) -> dict[str, Any]:
    """The link is cut before the ranks trade objects; what they sent may never arrive."""
    group = StatelessProcessGroup.create(
        FIRST_HOST, PORT, rank, 2, timeout=30.0, secret=b"the secret of this test"
    )
    group.barrier()
    wait_for_the_cut(rank, folder)

    def trade() -> None:
        group.send_obj("across", 1 - rank, timeout=TIMEOUT_SECONDS / 2)
        group.recv_obj(1 - rank, timeout=TIMEOUT_SECONDS / 2)

    return error_of(trade)


def exchange_cut(rank: int, folder: Path) -> dict[str, Any]:
    """The link is cut between two exchanges."""
    timeout = datetime.timedelta(seconds=TIMEOUT_SECONDS)
    dist.init_process_group(
        "gloo", init_method=f"tcp://{FIRST_HOST}:{PORT}", rank=rank, world_size=2, timeout=timeout
    )
    communicator = DeviceCommunicatorBase(dist.group.WORLD, unique_name="over the link")
    x = torch.full((1, 4, 2, 3), float(rank))
    for _ in range(20):  # past the calls that diagnosis compares
        assert communicator.all_to_all_4D(x).sum() == 12
    wait_for_the_cut(rank, folder)
    return error_of(lambda: communicator.all_to_all_4D(x))


def memory_refused(rank: int, folder: Path) -> dict[str, Any]:
    """The hosts exchange though they cannot share memory; what a rank says that insists on it."""
    timeout = datetime.timedelta(seconds=30)
    dist.init_process_group(
        "gloo", init_method=f"tcp://{FIRST_HOST}:{PORT}", rank=rank, world_size=2, timeout=timeout
    )
    communicator = DeviceCommunicatorBase(dist.group.WORLD, unique_name="over the link")
    x = torch.full((1, 4, 2, 3), float(rank))
    sums = [communicator.all_to_all_4D(x).sum().item() for _ in range(3)]
    refusal = communicator.memory_stats().refusal
    insisting = DeviceCommunicatorBase(dist.group.WORLD, unique_name="insists", memory="on")
    return {
        "sums": sums,
        "refusal": refusal,
        "error": error_of(lambda: insisting.all_to_all_4D(x))["error"],
    }


def wait_for_the_cut(rank: int, folder: Path) -> None:
    (folder / f"ready{rank}").touch()
    while not (folder / "cut").exists():
        time.sleep(0.02)


def error_of(call: Callable[[], Any]) -> dict[str, Any]:
    """What a call raises, and after how many seconds."""
    begin = time.monotonic()
    try:
        call()
    except Exception as error:
        seconds = time.monotonic() - begin
        names = [kind.__name__ for kind in type(error).__mro__]
        return {"error": str(error), "kinds": names, "seconds": seconds}
    return {"error": None, "kinds": [], "seconds": time.monotonic() - begin}


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = {
        "store": store,
        "objects": objects_cut,
        "exchange": exchange_cut,
        "memory": memory_refused,
    }
    answer = jobs[sys.argv[1]](int(sys.argv[2]), Path(sys.argv[3]))
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
    sys.stdout.flush()
    os._exit(0)  # the groups cannot say goodbye over a link that is cut
