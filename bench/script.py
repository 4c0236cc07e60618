"""The command line that every benchmark script shares.

python bench/bench_x.py [--quick | --full] [--device cpu|cuda] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import report
import torch
from harness import Report


@dataclass(frozen=True)
class Options:
    """How much to measure and where."""

    device: torch.device
    size: Literal["quick", "normal", "full"]

    @property
    def seconds(self) -> float:
        """Time for one case, all systems together."""
        if self.device.type == "cuda":
            return {"quick": 0.1, "normal": 0.25, "full": 1.0}[self.size]
        return {"quick": 0.4, "normal": 2.0, "full": 6.0}[self.size]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const="quick", default="normal")
    size.add_argument("--full", dest="size", action="store_const", const="full")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def main(measure: Callable[[Options], Report], description: str) -> None:
    parser = argparse.ArgumentParser(description=description)
    add_arguments(parser)
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    arguments = parser.parse_args()
    # One thread on the CPU: what a rank has where there is one for each core.
    torch.set_num_threads(1)
    result = measure(Options(torch.device(arguments.device), arguments.size))
    if arguments.json:
        content = {"rows": result.rows, "problems": result.problems}
        arguments.json.write_text(json.dumps(content))
    else:
        print(report.table(result.rows))
    for problem in result.problems:
        print(f"not measured: {problem}", file=sys.stderr)
