"""StatelessProcessGroup against upstream's class, and the codec against pickle.

    python bench/bench_stateless.py [--quick | --full] [--json FILE]

Ranks are processes on this machine. Each opens a group of every system, and the systems take turns
in the same processes: a round gives each one a batch. Upstream's file is found and
loaded as the other peers' are (by_file.py), with a stand-in for its logger; nothing of it is
rewritten. Its store refuses values over 8 MiB, so for 64 MiB it is given a TCPStore
without libuv. The last part sends messages for long (1 000 000 with `--full`) and notes memory,
file descriptors, threads and keys on the way.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import logging
import multiprocessing
import os
import pickle
import platform
import re
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import msgpack
import torch
from by_file import find, load_file, stand_ins
from torch.distributed import TCPStore

from fastvideo_comm.object_channel import message_seal
from fastvideo_comm.object_channel.codec import ObjectCodec
from fastvideo_comm.stateless import StatelessProcessGroup

HERE = Path(__file__).resolve().parent
KIB = b"x" * 1024
MIB_64 = 1 << 26
OURS, SECRET, UPSTREAM = "fastvideo_comm", "fastvideo_comm, secret", "fastvideo"
# With the package cryptography, `SECRET` is encrypted, and this one authenticated only.
READABLE = "fastvideo_comm, secret, encryption off"
# As where the package cryptography is missing: authenticated by HMAC-SHA256.
HMAC = "fastvideo_comm, secret, no cryptography"
SECRETS = (SECRET, READABLE, HMAC)
UPSTREAM_LARGE = "fastvideo, no libuv"
ROUNDS = {"quick": 2, "normal": 10, "full": 30}
GROWTH = {"quick": 1_000, "normal": 100_000, "full": 1_000_000}
METADATA = {
    "model": "wan-2.1-14b", "rank": 3, "world_size": 8, "shape": (1, 32760, 40, 128),
    "dtype": torch.bfloat16, "device": torch.device("cuda:3"), "seed": 1234567890123,
    "timesteps": [1000 - 20 * i for i in range(50)], "sigmas": [i / 50 for i in range(50)],
    "names": [f"layer.{i}.attn" for i in range(16)],
    "guidance": {"scale": 5.0, "negative": "blurry, low quality, worst quality", "use": True},
}  # fmt: skip

Row = dict[str, Any]


def find_upstream() -> Path | None:
    """Upstream's file, or None where it is not there."""
    try:
        return find("fastvideo", "fastvideo/distributed/utils.py")[0]
    except FileNotFoundError:
        return None


def load_upstream(path: Path | None) -> type | None:
    """Upstream's class; None without a file."""
    if path is None:
        return None
    with stand_ins(fastvideo__logger={"init_logger": logging.getLogger}):
        module = load_file("upstream_utils", path)
    upstream: type = module.StatelessProcessGroup
    return upstream


def open_group(system: str, upstream: type | None, port: int, rank: int, size: int) -> Any:
    if system == UPSTREAM:
        return upstream.create("127.0.0.1", port, rank, size)  # type: ignore[union-attr]
    if system == UPSTREAM_LARGE:
        store = TCPStore("127.0.0.1", port, size, rank == 0, use_libuv=False)
        return upstream(rank, size, store)  # type: ignore[misc]
    no_cryptography = mock.patch.object(message_seal, "has_cryptography", return_value=False)
    with no_cryptography if system == HMAC else contextlib.nullcontext():
        return StatelessProcessGroup.create(
            "127.0.0.1",
            port,
            rank,
            size,
            secret=b"a secret for the benchmark" if system in SECRETS else None,
            encryption="off" if system == READABLE else "auto",
        )


def round_trip(group: Any, obj: Any, answer: Any) -> None:
    if group.rank == 0:
        group.send_obj(obj, 1)
        group.recv_obj(1)
    else:
        group.recv_obj(0)
        group.send_obj(answer, 0)


def kib_both_ways(group: Any) -> None:
    round_trip(group, KIB, KIB)


def tensor_there(group: Any) -> None:
    round_trip(group, large_tensor(), None)


@functools.cache
def large_tensor() -> torch.Tensor:
    return torch.randn(MIB_64 // 4)


def barrier(group: Any) -> None:
    group.barrier()


# Name, ranks, systems, what one call does, calls in a batch, messages in a call, bytes.
CASES: list[tuple[str, int, list[str], Callable[[Any], None], int, int, int]] = [
    ("send+recv 1 KiB", 2, [OURS, *SECRETS, UPSTREAM], kib_both_ways, 300, 2, 1024),
    ("send+recv 64 MiB", 2, [OURS, *SECRETS, UPSTREAM_LARGE], tensor_there, 1, 1, MIB_64),
    ("barrier, 8 ranks", 8, [OURS, SECRET, UPSTREAM], barrier, 60, 1, 0),
]


def time_case(index: int, upstream_file: Path | None, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of single calls by system, taken in turn in the same processes."""
    _name, size, systems, *_rest = CASES[index]
    has_upstream = upstream_file is not None
    names = [s for s in systems if has_upstream or s in (OURS, *SECRETS)]
    reserved = {name: reserve_port() for name in names}  # held until the ranks have ended
    ports = {name: holder.getsockname()[1] for name, holder in reserved.items()}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "fastvideo_comm.stateless"])
    results = context.SimpleQueue()
    ranks = [
        context.Process(target=run_rank, args=(index, upstream_file, ports, rank, rounds, results))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    samples: dict[str, list[float]] = results.get()
    for process in ranks:
        process.join()
    for holder in reserved.values():
        holder.close()
    return samples


def run_rank(
    index: int,
    upstream_file: Path | None,
    ports: dict[str, int],
    rank: int,
    rounds: int,
    results: Any,
) -> None:
    torch.set_num_threads(1)
    upstream = load_upstream(upstream_file)
    _name, size, _systems, act, calls, messages, _bytes = CASES[index]
    groups = {s: open_group(s, upstream, port, rank, size) for s, port in ports.items()}
    samples: dict[str, list[float]] = {system: [] for system in groups}
    order = list(groups)
    for _round in range(rounds):
        for system in order:
            group = groups[system]
            group.barrier()
            act(group)
            for _ in range(calls):
                start = time.perf_counter()
                act(group)
                samples[system].append((time.perf_counter() - start) / messages)
            group.barrier()
        order = order[1:] + order[:1]
    if rank == 0:
        results.put(samples)
        time.sleep(0.5)  # upstream's server must outlive the other ranks


def time_codec(rounds: int) -> dict[tuple[str, str], list[float]]:
    codec = ObjectCodec()
    encoded, pickled = codec.encode(METADATA), pickle.dumps(METADATA)
    actions = {
        ("codec, encode 1 KiB of metadata", OURS): lambda: codec.encode(METADATA),
        ("codec, decode 1 KiB of metadata", OURS): lambda: codec.decode(encoded),
        ("codec, encode 1 KiB of metadata", "pickle"): lambda: pickle.dumps(METADATA),
        ("codec, decode 1 KiB of metadata", "pickle"): lambda: pickle.loads(pickled),
    }
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in actions}
    for _ in range(10 * rounds):
        for key, action in actions.items():
            start = time.perf_counter()
            for _ in range(100):
                action()
            samples[key].append((time.perf_counter() - start) / 100)
    return samples


def watch_growth(count: int, advance: Callable[[float], None]) -> list[dict[str, int]]:
    """Send 1 KiB messages for long; return what the process holds at 50 points on the way."""
    points = []
    with open_group(SECRET, None, 0, 0, 1) as group:
        for number in range(count + 1):
            if number % (count // 50) == 0:
                statm = Path("/proc/self/statm").read_text().split()
                points.append(
                    {
                        "messages": number,
                        "resident_bytes": int(statm[1]) * os.sysconf("SC_PAGE_SIZE"),
                        "file_descriptors": len(os.listdir("/proc/self/fd")),
                        "threads": threading.active_count(),
                        "store_keys": group.store.num_keys(),
                        "entries": len(group.entries),
                    }
                )
                advance(count / 50)
            group.send_obj(KIB, 0)
            group.recv_obj(0)
    return points


def draw_growth(points: list[dict[str, int]], path: Path) -> bool:
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 5), sharex=True, layout="constrained")
    messages = [point["messages"] for point in points]
    for axis, key, scale, label in zip(
        axes.flat,
        ("resident_bytes", "file_descriptors", "threads", "store_keys"),
        (2**20, 1, 1, 1),
        ("resident memory, MiB", "file descriptors", "threads", "keys in the store"),
        strict=True,
    ):
        values = [point[key] / scale for point in points]
        axis.plot(messages, values)
        axis.set_ylim(0, 1.3 * max(*values, 1))
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("messages of 1 KiB")
    figure.savefig(path, dpi=120)
    return True


def row(case: str, system: str, samples: list[float], size: int) -> Row:
    return {
        "op": "stateless",
        "case": case,
        "system": system,
        "median_s": statistics.median(samples),
        "min_s": min(samples),
        "max_s": max(samples),
        "samples": len(samples),
        "bytes": size,
        "of_copy": None,
    }


def reserve_port() -> socket.socket:
    """Bind a port, so that the kernel gives it to no other socket; a rank may listen there."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    return holder


def machine() -> dict[str, Any]:
    found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": found.group(1) if found else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "msgpack": ".".join(map(str, msgpack.version)),
    }


@contextlib.contextmanager
def progress(total: float) -> Iterator[Callable[[str, float], None]]:
    """Yield a function (text, steps) that moves a bar, where rich is installed."""
    try:
        from rich.progress import Progress
    except ImportError:
        yield lambda _text, _steps: None
        return
    with Progress(transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda text, steps: bar.update(task, description=text, advance=steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const="quick", default="normal")
    size.add_argument("--full", dest="size", action="store_const", const="full")
    parser.add_argument("--device", default="cpu", help="ignored: objects travel through the CPU")
    parser.add_argument("--json", type=Path, help="write the rows here instead of bench/results")
    arguments = parser.parse_args()
    problems = []
    upstream_file = find_upstream()
    if upstream_file is None:
        problems.append("peer fastvideo is missing: `make wheels` fetches it")
    head = machine()
    rounds = ROUNDS[arguments.size]
    rows: list[Row] = []
    with progress(len(CASES) + 2) as advance:
        for index, case in enumerate(CASES):
            advance(case[0], 0)
            for system, samples in time_case(index, upstream_file, rounds).items():
                rows.append(row(case[0], system, samples, case[-1]))
            advance(case[0], 1)
        for (name, system), samples in time_codec(rounds).items():
            rows.append(row(name, system, samples, 1024))
        advance("growth", 1)
        count = GROWTH[arguments.size]
        growth = watch_growth(count, lambda steps: advance("growth", steps / count))
    content = {"rows": rows, "problems": problems}
    if arguments.json is None:
        stem = f"stateless-{datetime.date.today().isoformat()}-{arguments.size}"
        out = HERE / "results" / f"{stem}.json"
        drawn = draw_growth(growth, out.with_name(f"{stem}-growth.png"))
        head["date"] = datetime.date.today().isoformat()
        out.write_text(json.dumps({"environment": head, **content, "growth": growth}, indent=1))
        print(f"wrote {out.name}" + (f" and {stem}-growth.png" if drawn else ""))
        print_summary(rows)
    else:
        arguments.json.write_text(json.dumps(content))
    first, last = growth[len(growth) // 5], growth[-1]
    print(f"after {first['messages']} messages: {first}\nafter {last['messages']}: {last}")
    for problem in problems:
        print(f"not measured: {problem}", file=sys.stderr)


def print_summary(rows: list[Row]) -> None:
    base = {r["case"]: r for r in rows if r["system"] in (UPSTREAM, UPSTREAM_LARGE, "pickle")}
    for r in rows:
        other = base.get(r["case"])
        ratio = (
            ""
            if other is None
            else f"{r['median_s'] / other['median_s']:6.2f}x of {other['system']}"
        )
        print(
            f"{r['case']:34} {r['system']:24} median {1e6 * r['median_s']:10.1f} us"
            f"  min {1e6 * r['min_s']:10.1f} us  {ratio}"
        )


if __name__ == "__main__":
    main()
