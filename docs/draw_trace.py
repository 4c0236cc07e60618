"""Draws what a profiler sees of an attention layer on a rank: `python docs/draw_trace.py`.

The ranges are read from `torch.profiler`'s own trace of a real run, so the picture shows times of
the machine that drew it, and is for their order and names.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.distributed as dist

from fastvideo_comm import DeviceCommunicatorBase

FILE = Path(__file__).parent / "trace.png"
LANES = ("op", "phase", "attention")
COLOURS = {
    "all_to_all_4D": "#5b8ff9",
    "pack": "#f6a04d",
    "exchange": "#61c0a0",
    "unpack": "#b58adf",
    "attention": "#c8d0d9",
}


def main() -> None:
    """Traces two ranks and draws the first."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(trace_rank, args=(folder,), nprocs=2)
        ranges = json.loads(Path(folder, "ranges.json").read_text())
    draw(ranges)


def trace_rank(rank: int, folder: str) -> None:
    """One traced attention layer, after two that warm up."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    communicator = DeviceCommunicatorBase(dist.group.WORLD, unique_name="sp", validate="off")
    qkv = torch.randn(2, 512, 3 * 12 * 64)

    def layer() -> None:
        parts = [part.unflatten(-1, (12, 64)) for part in qkv.chunk(3, -1)]
        q, k, v = communicator.all_to_all_4D(parts)
        with torch.profiler.record_function("attention"):
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            x = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            x = x.transpose(1, 2).contiguous()
        communicator.all_to_all_4D(x, 1, 2)

    for _ in range(2):
        layer()
    dist.barrier()
    with torch.profiler.profile(acc_events=True) as profile:
        layer()
    if rank == 0:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        ranges = [
            (event["name"], event["ts"], event["dur"])
            for event in json.loads(trace.read_text())["traceEvents"]
            if event.get("cat") == "user_annotation" or "fastvideo_comm::" in event.get("name", "")
            if event.get("ph") == "X"
        ]
        Path(folder, "ranges.json").write_text(json.dumps(ranges))
    communicator.destroy()
    dist.barrier()
    dist.destroy_process_group()


def draw(ranges: list[tuple[str, float, float]]) -> None:
    """One bar for each range, in three lanes."""
    ranges = [
        (name.removeprefix("fastvideo_comm::").partition("[")[0], begin, length)
        for name, begin, length in ranges
        if name == "attention" or name.startswith("fastvideo_comm::")
    ]
    start = min(begin for _, begin, _ in ranges)
    figure, axes = plt.subplots(figsize=(9, 2.6), layout="constrained")
    for name, begin, length in ranges:
        lane = {"all_to_all_4D": 0, "attention": 2}.get(name, 1)
        axes.barh(
            lane, length / 1000, left=(begin - start) / 1000, color=COLOURS[name], edgecolor="white"
        )
    axes.set_yticks(range(len(LANES)), LANES)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    axes.set_title("q, k, v of a fused projection there, attention, and back: rank 0 of 2, gloo")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    axes.legend(
        handles,
        COLOURS,
        ncols=len(COLOURS),
        loc="upper center",
        frameon=False,
        bbox_to_anchor=(0.5, -0.28),
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FILE, dpi=120)


if __name__ == "__main__":
    main()
