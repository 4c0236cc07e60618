"""Ranks in processes of their own that share memory until one dies, for test_shared_memory."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import signal
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.errors import CollectiveError


def killed_between_exchanges() -> tuple[str, float]:
    """Of two ranks one is killed after an exchange; the other's next error, and its seconds."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(rank, folder, theirs), daemon=True)
            for rank in range(2)
        ]
        for process in processes:
            process.start()
        try:
            return ours.recv() if ours.poll(60) else ("nothing within 60 s", 60.0)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _rank(rank: int, folder: str, answer: Any) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    timeout = datetime.timedelta(seconds=20)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)
    communicator = DeviceCommunicatorBase(dist.group.WORLD, validate="off")
    x = torch.rand(1, 1024, 8, 64)  # 2 MiB
    communicator.all_to_all_4D(x)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        communicator.all_to_all_4D(x)
    except CollectiveError as error:
        answer.send((str(error), time.monotonic() - start))
