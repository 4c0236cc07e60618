"""Ranks in processes of their own that die, stop and mislay their store, for test_diagnosis."""

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
from fastvideo_comm.diagnosis import Diagnosis

WORLD_SIZE = 3


class Checked(DeviceCommunicatorBase):
    """A communicator whose diagnosis has the given settings."""

    def __init__(self, group: dist.ProcessGroup, **options: Any) -> None:
        super().__init__(group, unique_name="checked", validate="off", memory="off")
        self.diagnosis = Diagnosis(group, "checked", **options)
        self._runner.group.diagnosis = self.diagnosis


def run(fate: str, signal_number: int, culprit: int, host: str) -> dict[int, tuple[str, float]]:
    """One call that works, then `culprit` gets a signal, then one that cannot.

    Returns:
        For every other rank its error and the seconds it took.
    """
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        processes, answers = [], {}
        for rank in range(WORLD_SIZE):
            ours, theirs = context.Pipe()
            arguments = (rank, folder, theirs, signal_number, culprit, host)
            processes.append(context.Process(target=_rank, args=arguments, daemon=True))
            processes[-1].start()
            answers[rank] = ours
        try:
            return {
                rank: answers[rank].recv()
                for rank in answers
                if rank != culprit and answers[rank].poll(60)
            }
        finally:
            for process in processes:
                process.kill()
                process.join()


def _rank(rank: int, folder: str, answer: Any, signal_number: int, culprit: int, host: str) -> None:
    torch.set_num_threads(1)
    store: Any = dist.FileStore(os.path.join(folder, "store"), WORLD_SIZE)
    if host == "rank 0":
        port_file = os.path.join(folder, "port")
        port = 0
        if rank:
            while not os.path.exists(port_file):
                time.sleep(0.01)
            with open(port_file) as file:
                port = int(file.read())
        store = dist.TCPStore("127.0.0.1", port, WORLD_SIZE, rank == 0, wait_for_workers=False)
        if not rank:
            with open(f"{port_file}.new", "w") as file:
                file.write(str(store.port))
            os.rename(f"{port_file}.new", port_file)
    timeout = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=timeout)
    communicator = Checked(dist.group.WORLD, timeout=1.0)
    assert communicator.all_reduce(torch.ones(1)).item() == WORLD_SIZE
    if rank == culprit:
        time.sleep(0.2)
        os.kill(os.getpid(), signal_number)
        time.sleep(60)
    begin = time.monotonic()
    try:
        time.sleep(0.5)
        communicator.all_gather(torch.ones(2, 3))
        answer.send(("no error", 0.0))
    except Exception as error:
        text = f"{type(error).__name__}: {error} peers={getattr(error, 'peers', None)}"
        answer.send((text, time.monotonic() - begin))
    time.sleep(60)


KILL, STOP = signal.SIGKILL, signal.SIGSTOP
