"""The machine and the software that a measurement belongs to; no host name and no path."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("triton", "numpy")


def describe(device: torch.device) -> dict[str, Any]:
    """Machine, GPU, driver, versions and commit, for the head of a JSON report."""
    import gpu_peers
    import peers

    import fastvideo_comm

    present, missing = peers.load_all()
    if torch.cuda.device_count() > 1:
        on_gpus, absent = gpu_peers.load_all()
        present, missing = present | on_gpus, missing | absent
    load = os.getloadavg()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "device": device_name(device),
        "machine": {
            "cpu": _first_line("/proc/cpuinfo", r"model name\s*:\s*(.*)"),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(int(_first_line("/proc/meminfo", r"MemTotal:\s*(\d+)")) / 2**20),
            "system": f"{platform.system()} {platform.machine()}",
            "load_before": round(load, 2),
            "busy": load > 0.25 * len(os.sched_getaffinity(0)),
        },
        "gpu": _gpu(device),
        "versions": {
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "torch": torch.__version__,
            "fastvideo_comm": fastvideo_comm.__version__,
            **{name: version for name in LIBRARIES if (version := _version(name))},
        },
        "peers": {name: peer.version for name, peer in present.items()},
        "missing_peers": missing,
        "commit": commit(),
    }


def device_name(device: torch.device) -> str:
    """The device in a file's name: `h200` or `cpu-2core`."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device).lower().removeprefix("nvidia ")
        return re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    return f"cpu-{len(os.sched_getaffinity(0))}core"


def commit() -> str:
    """The commit that was measured, `+changes` where the library's files differ from it."""
    if given := os.environ.get("FASTVIDEO_COMM_COMMIT"):
        return given
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + (
            "+changes" if _git("status", "--porcelain", "fastvideo_comm", "kernels") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


def _gpu(device: torch.device) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "memory_gib": round(properties.total_memory / 2**30),
        "l2_cache_mib": round(properties.L2_cache_size / 2**20),
        "driver": _driver(),
    }


def _driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        text = subprocess.run(query, check=True, capture_output=True, text=True).stdout
        return text.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return _first_line("/proc/driver/nvidia/version", r"Kernel Module(?: for \S+)?\s+(\S+)")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(path: str, pattern: str) -> str:
    try:
        match = re.search(pattern, Path(path).read_text())
    except OSError:
        match = None
    return match[1].strip() if match else "0"
