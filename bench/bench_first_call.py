"""The first call of a process: what compiling and first use cost before anything is warm.

Each system runs in a child of its own, forked from a process that has imported torch and touched
no GPU, on a local group of four (local_group.py) whose exchange was used once. On a GPU this
library is measured twice: with an empty Triton cache, as after an installation, and with the cache
that this left on disk.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from multiprocessing.connection import Connection

import peers
import script
import systems
import torch
import torch.distributed as dist
from cases import Shape
from harness import Report, random_like, track
from local_group import local_group

SHAPE = Shape(1, 8192, 24, 4)
REPEATS = 2


def measure(options: script.Options) -> Report:
    """First and second call of every system."""
    report = Report()
    present, missing = peers.load_all()
    for name, reason in missing.items():
        report.problem(f"peer {name} is missing: {reason}")
    names = [systems.OURS, *present]
    repeats = 1 if options.size == "quick" else REPEATS
    with tempfile.TemporaryDirectory() as folder, track(names, "first call") as names_in_turn:
        for name in names_in_turn:
            caches = {name: ""}
            if name == systems.OURS and options.device.type == "cuda":
                caches = {f"{name}, empty cache": "cold", f"{name}, cache on disk": "warm"}
            for label, cache in caches.items():
                times = []
                for repeat in range(repeats):
                    # "warm" reads what the first "cold" run wrote.
                    kept = f"{folder}/{repeat if cache == 'cold' else 0}"
                    try:
                        times.append(_in_child(name, options, kept if cache else None))
                    except RuntimeError as error:
                        report.problem(f"first call: {error}")
                if not times:
                    continue
                firsts, seconds = zip(*times, strict=True)
                for which, samples in (("first", firsts), ("second", seconds)):
                    report.add(
                        f"{which} call {SHAPE.name}",
                        {label: samples},
                        num_bytes=2 * SHAPE.numel * 2,
                        limit=None,
                        bench="first_call",
                        op=which,
                        shape=list(SHAPE.local),
                        world_size=SHAPE.world_size,
                        dtype="bfloat16",
                    )
    return report


def _in_child(name: str, options: script.Options, cache: str | None) -> tuple[float, float]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "systems"])
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(name, options, cache, sender))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"the process that measured {name} died") from None
    finally:
        child.join()


def _child(name: str, options: script.Options, cache: str | None, sender: Connection) -> None:
    if cache is not None:
        os.environ["TRITON_CACHE_DIR"] = cache
    device = options.device
    torch.set_num_threads(1)
    with local_group(SHAPE.world_size) as group:
        peer = peers.load(name) if name != systems.OURS else None
        x = random_like(SHAPE.local, torch.bfloat16, device)
        dist.all_to_all_single(torch.empty_like(x).view(-1), x.view(-1), group=group)
        system = peer.bind(group) if peer else systems.ours(group, device)[systems.OURS]
        times = []
        for _ in range(2):
            _synchronize(device)
            start = time.perf_counter()
            system.all_to_all(x, 2, 1)
            _synchronize(device)
            times.append(time.perf_counter() - start)
    sender.send(tuple(times))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    script.main(measure, __doc__)
