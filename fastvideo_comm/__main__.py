"""`python -m fastvideo_comm doctor` and `python -m fastvideo_comm bench --quick`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one of the commands.

    Example:
        >>> main(["doctor", "--json"])  # doctest: +SKIP
        0

    Returns:
        The exit status: 1 where something is wrong, 2 for a command that cannot run here.
    """
    parser = argparse.ArgumentParser(prog="python -m fastvideo_comm", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="what this installation can do, and what is wrong")
    doctor.add_argument("--json", action="store_true", help="for programs")
    bench = commands.add_parser("bench", help="how fast copies and exchanges are here")
    bench.add_argument("--quick", action="store_true", help="the small benchmark; about a minute")
    bench.add_argument("--json", action="store_true", help="for programs; no plot")
    bench.add_argument(
        "--plot", type=Path, default=Path("fastvideo_comm_bench.png"), help="the picture's file"
    )
    options = parser.parse_args(arguments)
    if options.command == "doctor":
        from .tools import doctor as doctor_module

        return doctor_module.main(as_json=options.json)
    if not options.quick:
        sys.stderr.write(
            "bench must be given --quick: the whole benchmark is in the repository (make bench)\n"
        )
        return 2
    from .tools import benchmark

    return benchmark.main(options.plot, as_json=options.json)


if __name__ == "__main__":
    raise SystemExit(main())
