"""What it costs that ranks compare their calls before they send: gloo, two ranks.

Three systems a case, one communicator each: `validate="off"`; `"auto"`, warm, whose calls number
9 and on are compared ever more rarely; `"always"`, every call. The cases are a tiny exchange, where
host time is all, and one of 25 MB a rank.
"""

from __future__ import annotations

import script
import torch
import torch.distributed as dist
from bench_overlap import on_ranks, slowest
from cases import Shape
from harness import Report, random_like, time_in_turn, track

from fastvideo_comm import DeviceCommunicatorBase

WORLD_SIZE = 2
MODES = ("off", "auto", "always")
TINY = Shape(1, 16, 4, WORLD_SIZE, 8)
LARGE = Shape(1, 8192, 24, WORLD_SIZE)
# After so many calls "auto" compares one in a thousand.
WARM_CALLS = 600


def measure_on_ranks(options: script.Options) -> Report:
    """Every case, on each rank."""
    report = Report()
    group = dist.group.WORLD
    communicators = {mode: DeviceCommunicatorBase(group, validate=mode) for mode in MODES}
    tiny = random_like(TINY.local, torch.float32, options.device)
    for _ in range(WARM_CALLS):
        communicators["auto"].all_to_all_4D(tiny)
    shapes = (TINY,) if options.size == "quick" else (TINY, LARGE)
    with track(shapes, "diagnosis", shown=dist.get_rank() == 0) as items:
        for shape in items:
            dtype = torch.float32 if shape is TINY else torch.bfloat16
            x = random_like(shape.local, dtype, options.device)
            samples = time_in_turn(
                {
                    mode: lambda _, on=communicators[mode], x=x: on.all_to_all_4D(x)
                    for mode in MODES
                },
                device=options.device,
                seconds=2 * options.seconds,
                calls=20 if shape is TINY else 1,
                barrier=dist.barrier,
                agree=lambda rounds: int(slowest([rounds])[0]),
            )
            report.add(
                f"forward {shape.name}",
                {f"validate={mode}": slowest(times) for mode, times in samples.items()},
                num_bytes=2 * shape.numel * dtype.itemsize,
                limit=None,
                bench="diagnosis",
                op="forward",
                shape=list(shape.local),
                world_size=WORLD_SIZE,
                dtype=str(dtype).removeprefix("torch."),
            )
    for communicator in communicators.values():
        communicator.destroy()
    return report


def measure(options: script.Options) -> Report:
    """Two ranks on the CPU; between GPUs the comparison is the same, over the store."""
    if options.device.type != "cpu":
        report = Report()
        report.problem("the cost of comparing calls between GPUs: it needs several")
        return report
    return on_ranks(measure_on_ranks, options)


if __name__ == "__main__":
    script.main(measure, __doc__)
