"""Which tile, and from what size on: the constants of kernels/, chosen by measuring on this GPU.

    python bench/tune_tiles.py [--seconds 0.1]

For packs and unpacks of production shapes, every tile size and number of warps in turn in one run,
as shares of a contiguous copy's bandwidth; then the smallest copy at which the Triton launch is not
slower than torch's, host time included; then how many programs deliver by memory. Prints what to
put into `kernels/plan.py` (`TILE_BYTES`, `NUM_WARPS`, `MAX_DELIVERY_PROGRAMS`) and
`kernels/strided_copy.py` (`SMALL_COPY_BYTES`); changes nothing. The number of programs is that of
one GPU's memory: where the writes go to other GPUs, fewer may be enough, and faster.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time

import bench_memory_gpu
import cases
import torch
from harness import num_input_sets, random_like, time_in_turn, track

from fastvideo_comm.collective.layout import message_view
from fastvideo_comm.kernels import plan, strided_copy_

TILE_BYTES = (4096, 8192, 16384, 32768)
NUM_WARPS = (4, 8)
DELIVERY_PROGRAMS = (32, 64, 128, 256, 512, 1024)
HEADS = (12, 24, 40)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.1, help="for one shape and candidate")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune_tiles: needs a GPU that torch sees", file=sys.stderr)
        return 1
    candidates = list(itertools.product(TILE_BYTES, NUM_WARPS))
    shares: dict[tuple[int, int], list[float]] = {candidate: [] for candidate in candidates}
    shapes = [
        cases.Shape(1, 75_600, heads, ranks)
        for heads in HEADS
        for ranks in (2, 4, 8)
        if heads % ranks == 0
    ]
    with track(shapes, "tiles") as items:
        for shape in items:
            for candidate, share in of_copy(shape, candidates, arguments.seconds).items():
                shares[candidate].append(share)
    print("tile bytes  warps  worst shape  middle shape   (share of a contiguous copy)")
    for (tile_bytes, num_warps), values in shares.items():
        worst, middle = min(values), statistics.median(values)
        print(f"{tile_bytes:10}  {num_warps:5}  {worst:11.3f}  {middle:12.3f}")
    best = max(shares, key=lambda candidate: (min(shares[candidate]), sum(shares[candidate])))
    choose(*best)
    print(f"\nTILE_BYTES = {best[0]}\nNUM_WARPS = {best[1]}\nSMALL_COPY_BYTES = {break_even()}")
    print(f"MAX_DELIVERY_PROGRAMS = {programs_of_a_delivery(arguments.seconds)}")
    return 0


def choose(tile_bytes: int, num_warps: int) -> None:
    """Makes the next launches use a candidate."""
    from fastvideo_comm.kernels import tile_copy

    plan.TILE_BYTES, plan.NUM_WARPS = tile_bytes, num_warps
    tile_copy._plan_launch.cache_clear()


def of_copy(
    shape: cases.Shape, candidates: list[tuple[int, int]], seconds: float
) -> dict[tuple[int, int], float]:
    """Each candidate's bandwidth in a pack and an unpack, as a share of a contiguous copy's."""
    device = torch.device("cuda")
    sets = num_input_sets(4 * shape.numel, device)
    tensors = [random_like(shape.local, torch.bfloat16, device) for _ in range(sets)]
    views = [message_view(tensor, 2, shape.world_size, 1) for tensor in tensors]
    wires = [torch.empty(view.shape, dtype=view.dtype, device=device) for view in views]

    def copies(candidate: tuple[int, int]):
        def call(i: int) -> None:
            choose(*candidate)
            strided_copy_(wires[i], views[i], impl="triton")
            strided_copy_(views[i], wires[i], impl="triton")

        return call

    def contiguous(i: int) -> None:
        wires[i].view(-1).copy_(tensors[i].view(-1))
        tensors[i].view(-1).copy_(wires[i].view(-1))

    systems = {str(candidate): copies(candidate) for candidate in candidates}
    systems["copy"] = contiguous
    samples = time_in_turn(
        systems, device=device, seconds=seconds * len(systems), num_sets=sets, calls=1
    )
    limit = statistics.median(samples["copy"])
    return {
        candidate: limit / statistics.median(samples[str(candidate)]) for candidate in candidates
    }


def programs_of_a_delivery(seconds: float) -> int:
    """The number of programs of `deliver` that is the fastest in the middle of all shapes."""
    from fastvideo_comm.kernels import deliver

    device = torch.device("cuda")
    ratios: dict[int, list[float]] = {number: [] for number in DELIVERY_PROGRAMS}
    for heads, ranks in itertools.product(HEADS, (2, 4, 8)):
        if heads % ranks:
            continue
        shape = cases.Shape(1, 75_600, heads, ranks)
        x = random_like(shape.local, torch.bfloat16, device)
        times = {}
        for number in DELIVERY_PROGRAMS:
            plan.MAX_DELIVERY_PROGRAMS = number
            deliver._plan_launches.cache_clear()
            call, _ = bench_memory_gpu.delivery(x, ranks)
            times[number] = bench_memory_gpu.median_seconds(call, device, seconds)
        for number, time_s in times.items():
            ratios[number].append(time_s / min(times.values()))
    print("\nprograms  middle shape, of the fastest number's time")
    for number, values in ratios.items():
        print(f"{number:8}  {statistics.median(values):.3f}")
    return min(ratios, key=lambda number: statistics.median(ratios[number]))


def break_even() -> int:
    """The least power of 2 of bytes from which Triton's call is not slower than torch's."""
    for exponent in range(12, 28):
        src = random_like((1 << exponent - 9, 2, 128), torch.bfloat16, torch.device("cuda"))
        dst = torch.empty_like(src.transpose(0, 1).contiguous())
        seconds = {
            impl: call_seconds(dst, src.transpose(0, 1), impl) for impl in ("triton", "torch")
        }
        if seconds["triton"] <= seconds["torch"]:
            return 1 << exponent
    return 1 << 28


def call_seconds(dst: torch.Tensor, src: torch.Tensor, impl: str) -> float:
    """Median seconds from the call to its end on the device."""
    samples = []
    for _ in range(50):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        strided_copy_(dst, src, impl=impl)
        torch.cuda.synchronize()
        samples.append(time.perf_counter() - begin)
    return statistics.median(samples[10:])


if __name__ == "__main__":
    raise SystemExit(main())
