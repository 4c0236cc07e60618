"""The kernels by which ranks on GPUs exchange by memory, on one GPU: a bound, not an exchange.

`deliver` copies what a rank sends in all_to_all_4D(x, 2, 1), to places that all are in the memory
of this GPU, beside a contiguous copy of the same bytes. `post and done` is what a call needs
besides: ranks with a stream each post to each other, wait, say done and wait. What NVLink does to
either is seen on several GPUs only.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import cases
import script
import torch
from harness import Report, num_input_sets, random_like, time_in_turn, track
from torch import Tensor

from fastvideo_comm.collective.layout import message_view

OURS, LIMIT = "fastvideo_comm", "contiguous copy"


def measure(options: script.Options) -> Report:
    """Production shapes of one length, then the words of 2 and 4 ranks."""
    report = Report()
    if options.device.type != "cuda":
        report.problem("exchange by memory on GPUs: there is no GPU")
        return report
    shapes = [shape for shape in cases.production() if shape.sequence // 1000 == 75]
    if options.size == "quick":
        shapes = shapes[:1]
    with track(shapes, "memory_gpu") as items:
        for shape in items:
            _measure_delivery(shape, options, report)
    for world_size in (2, 4):
        samples = {OURS: _sampled(post_and_done(world_size), options)}
        report.add(
            f"post and done, P={world_size}",
            samples,
            num_bytes=0,
            limit=None,
            op="post and done",
            world_size=world_size,
        )
    return report


def delivery(x: Tensor, world_size: int) -> tuple[Callable[[], None], list[Tensor]]:
    """What rank 0 of `world_size` delivers of `[B, s, H, D]`, and the outputs of all ranks."""
    from fastvideo_comm.kernels.deliver import Delivery, launch_deliveries

    batch, s, heads, width = x.shape
    shape = (batch, world_size * s, heads // world_size, width)
    outputs = [torch.empty(shape, dtype=x.dtype, device=x.device) for _ in range(world_size)]
    places = torch.tensor([output.data_ptr() for output in outputs], device=x.device)
    src = message_view(x, 2, world_size, 0)
    deliveries = [Delivery(src, 0, 1, 0, outputs[0].stride())]
    return lambda: launch_deliveries(places, deliveries), outputs


def post_and_done(world_size: int) -> Callable[[int], None]:
    """All ranks post, wait, say done and wait: each on a stream of its own."""
    from fastvideo_comm.kernels.posts import Words, launch_done, launch_post

    device = torch.device("cuda", torch.cuda.current_device())
    segments = [torch.zeros(4096, dtype=torch.uint8, device=device) for _ in range(world_size)]
    bases = torch.tensor([segment.data_ptr() for segment in segments], device=device)
    words = [
        Words(
            bases,
            torch.zeros_like(bases),
            torch.zeros_like(bases),
            torch.zeros(1 + world_size, dtype=torch.int64, pin_memory=True),
            rank,
        )
        for rank in range(world_size)
    ]
    streams = [torch.cuda.Stream() for _ in range(world_size)]
    alone = Words(
        *[each[:1].clone() for each in words[0][:3]], torch.zeros(2).long().pin_memory(), 0
    )
    launch_post(alone, 256, 0)  # loads the kernels, which may not happen while others wait
    launch_done(alone)
    torch.cuda.synchronize()

    def call(_: int) -> None:
        current = torch.cuda.current_stream()
        # The words have only the addresses of the segments.
        for stream, each, _segment in zip(streams, words, segments, strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                launch_post(each, 256, 0)
                launch_done(each)
        for stream in streams:
            current.wait_stream(stream)

    return call


def _measure_delivery(shape: cases.Shape, options: script.Options, report: Report) -> None:
    num_bytes = 4 * shape.numel
    sets: list[Any] = []
    for _ in range(num_input_sets(num_bytes, options.device)):
        x = random_like(shape.local, torch.bfloat16, options.device)
        sets.append((x, *delivery(x, shape.world_size), torch.empty_like(x)))
    x, call, outputs, _ = sets[0]
    call()
    for rank, output in enumerate(outputs):
        wanted = message_view(x, 2, shape.world_size, 0)[rank]
        if not torch.equal(output[:, : x.shape[1]].view(torch.int16), wanted.view(torch.int16)):
            report.problem(f"deliver, {shape.name}: the result is wrong")
            return
    systems = {OURS: lambda i: sets[i][1](), LIMIT: lambda i: sets[i][3].copy_(sets[i][0])}
    samples = time_in_turn(
        systems, device=options.device, seconds=options.seconds, num_sets=len(sets)
    )
    report.add(
        f"deliver {shape.name}",
        samples,
        num_bytes=num_bytes,
        limit=LIMIT,
        op="deliver",
        shape=list(shape.local),
        world_size=shape.world_size,
        dtype="bfloat16",
    )


def _sampled(call: Callable[[int], None], options: script.Options) -> list[float]:
    samples = time_in_turn({OURS: call}, device=options.device, seconds=options.seconds)
    return samples[OURS]


def median_seconds(call: Callable[[], None], device: torch.device, seconds: float) -> float:
    """For `tune_tiles.py`: one call, over and over."""
    samples = time_in_turn({OURS: lambda _: call()}, device=device, seconds=seconds)
    return statistics.median(samples[OURS])


if __name__ == "__main__":
    script.main(measure, __doc__)
