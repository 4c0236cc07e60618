"""What an fp8 wire costs and saves: bytes, error and time over a link of 4 Gbit/s, two gloo ranks.

Each case is one exchange of bf16 tensors `[1, s, 24, 128]` through sockets, in a network namespace
whose loopback carries 4 Gbit/s in all. The systems are `exact`; `e4m3fn` and `e5m2`, the whole call
with both roundings and all copies; and `e4m3fn, its bytes`, an exchange of as many bytes that were
quantised before: what is left of the time where quantising is free, as on a GPU that computes
meanwhile. `wire_bytes` of a row are those of all messages of a rank, its own included, and
`max_error` is the largest error of an element as a share of its own magnitude plus 64e-6 of the
largest of its row, which the promise bounds by 1/16 for e4m3fn and by 1/8 for e5m2.

The ranks run one thread each. Quantising needs about as much processor time as this link needs for
the bytes, so other programs on the same cores change the rows much.
"""

from __future__ import annotations

import os

import script
import torch
import torch.distributed as dist
from bench_overlap import LINK_VARIABLE, WORLD_SIZE, on_ranks, over_a_slow_link, slowest
from cases import Shape
from harness import Report, time_in_turn, track
from systems import sockets_only
from torch import Tensor

from fastvideo_comm import DeviceCommunicatorBase

SHAPES = (Shape(1, 8192, 24, WORLD_SIZE), Shape(1, 1024, 24, WORLD_SIZE))
FORMATS = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
BYTES = "e4m3fn, its bytes"


def measure_on_ranks(options: script.Options) -> Report:
    """Every case, on each rank."""
    report = Report()
    communicator = sockets_only(dist.group.WORLD, options.device)
    with track(SHAPES, "fp8", shown=communicator.rank == 0) as shapes:
        for shape in shapes:
            _measure(communicator, shape, options, report)
    communicator.destroy()
    return report


def _measure(
    communicator: DeviceCommunicatorBase, shape: Shape, options: script.Options, report: Report
) -> None:
    x = torch.randn(shape.local, device=options.device).bfloat16()
    width = shape.head_dim
    bytes_ = torch.empty((*shape.local[:3], width + 4), dtype=torch.uint8, device=options.device)
    systems = {
        "exact": lambda _: communicator.all_to_all_4D(x),
        **{
            name: lambda _, dtype=dtype: communicator.all_to_all_4D(x, wire_dtype=dtype)
            for name, dtype in FORMATS.items()
        },
        BYTES: lambda _: communicator.all_to_all_4D(bytes_.view(1, WORLD_SIZE, 1, -1), 1, 2),
    }
    samples = time_in_turn(
        systems,
        device=options.device,
        seconds=4 * options.seconds,
        barrier=dist.barrier,
        agree=lambda rounds: int(slowest([rounds])[0]),
    )
    link = ", 4 Gbit/s link" if LINK_VARIABLE in os.environ else ""
    report.add(
        f"fp8 {shape.name}{link}",
        {system: slowest(times) for system, times in samples.items()},
        num_bytes=2 * x.nbytes,
        limit=None,
        bench="fp8",
        op="forward",
        shape=list(shape.local),
        world_size=WORLD_SIZE,
        dtype="bfloat16",
    )
    exact = communicator.all_to_all_4D(x)
    for row in report.rows[-len(systems) :]:
        dtype = FORMATS.get(row["system"])
        row["wire_bytes"] = x.nbytes if row["system"] == "exact" else bytes_.nbytes
        row["of_exact_bytes"] = row["wire_bytes"] / x.nbytes
        if dtype is not None:
            arrived = communicator.all_to_all_4D(x, wire_dtype=dtype)
            (row["max_error"],) = slowest([_relative_error(arrived, exact)])


def _relative_error(arrived: Tensor, exact: Tensor) -> float:
    magnitude = exact.double().abs()
    floor = magnitude + 64e-6 * magnitude.amax(-1, keepdim=True)
    return float(((arrived.double() - exact.double()).abs() / floor).max())


def measure(options: script.Options) -> Report:
    """Two ranks on the CPU, over a link that is slow."""
    if options.device.type != "cpu":
        report = Report()
        report.problem("fp8 between GPUs without NVLink: it needs several")
        return report
    report = on_ranks(measure_on_ranks, options)
    if LINK_VARIABLE not in os.environ and options.size != "quick":
        over_a_slow_link(__file__, options, report)
    return report


if __name__ == "__main__":
    script.main(measure, __doc__)
