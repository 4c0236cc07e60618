"""Every benchmark that this machine can run, one report.

    python bench/run.py [--quick | --full] [--device cpu|cuda] [--out FILE]

Runs each `bench_*.py` beside this file in a process of its own, merges their rows into
`bench/results/<device>-<date>.json` (`-quick` is marked and not for keeping), writes the Markdown
and the plots beside it, and prints a short table last. A benchmark that fails makes the exit status
non-zero; one that is impossible here (a peer that is not installed, a second GPU) is named.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import environment
import report
import script
import torch

HERE = Path(__file__).resolve().parent
# What `--quick` leaves out, to end in a minute on two cores.
SLOW = ("bench_compile.py", "bench_first_call.py", "bench_fp8.py", "bench_overlap.py")
# Of processors alone: minutes in which a GPU that is lent would idle.
CPU_ONLY = ("bench_stateless.py",)
# The first call is measured last: its processes take long and it matters least.
ORDER = {"bench_strided_copy.py": -2, "bench_all_to_all.py": -1, "bench_first_call.py": 1}
# For one script; none comes near it, unless something hangs.
LIMIT_SECONDS = {"quick": 120, "normal": 900, "full": 7200}
CUDA_LIMIT_SECONDS = {"quick": 90, "normal": 200, "full": 1200}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    script.add_arguments(parser)
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    # The machine is described before it is under our own load.
    result = {"environment": environment.describe(device), "rows": [], "problems": []}
    result["environment"]["size"] = arguments.size
    if result["environment"]["machine"]["busy"]:
        result["problems"].append("a quiet machine: others were using it, so only ratios count")
    failed = []
    limits = CUDA_LIMIT_SECONDS if device.type == "cuda" else LIMIT_SECONDS
    out = arguments.out or default_path(result["environment"])
    out.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        paths = sorted(HERE.glob("bench_*.py"))
        for path in sorted(paths, key=lambda path: ORDER.get(path.name, 0)):
            if device.type == "cuda" and path.name in CPU_ONLY:
                result["problems"].append(f"{path.name}: measured without a GPU")
                continue
            if arguments.size == "quick" and path.name in SLOW:
                result["problems"].append(f"{path.name}: not with --quick")
                continue
            part = Path(folder, f"{path.stem}.json")
            command = [sys.executable, str(path), "--device", arguments.device, "--json", str(part)]
            if arguments.size != "normal":
                command.append(f"--{arguments.size}")
            try:
                subprocess.run(command, check=True, timeout=limits[arguments.size])
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                failed.append(path.name)
                reason = "ran out of time" if hasattr(error, "timeout") else "failed"
                result["problems"].append(f"{path.name} {reason}; its message is above")
                continue
            content = json.loads(part.read_text())
            name = path.stem.removeprefix("bench_")
            result["rows"] += [{"bench": name, **row} for row in content["rows"]]
            news = [text for text in content["problems"] if text not in result["problems"]]
            result["problems"] += news
            # What there is so far, should this process be ended before its end.
            out.write_text(json.dumps(result, indent=1) + "\n")
    result["environment"]["seconds"] = round(time.monotonic() - started)
    result["environment"]["machine"]["load_after"] = round(os.getloadavg()[0], 2)
    out.write_text(json.dumps(result, indent=1) + "\n")
    report.write(out)
    print(f"\n{report.short(result)}\n")
    for problem in result["problems"]:
        print(f"not measured: {problem}")
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    return 1 if failed else 0


def default_path(described: dict[str, str]) -> Path:
    """`bench/results/<device>-<date>.json`."""
    mark = "" if described["size"] == "normal" else f"-{described['size']}"
    return HERE / "results" / f"{described['device']}-{described['date']}{mark}.json"


if __name__ == "__main__":
    sys.exit(main())
