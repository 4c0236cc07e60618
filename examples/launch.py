"""How the example is started: its command line, its ranks and what each of them runs on."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

# The runs add up the same fp32 numbers in different orders. That moves the first gradients by 1e-6;
# training amplifies it, to 1e-4 in the gradients of the last of 36 steps. A swapped dim, a missing
# reduction or a factor of P moves them by 0.1 and more.
TOLERANCE = 1e-3
TORCHRUN_FLAGS = (
    "--nnodes",
    "--node-rank",
    "--master-addr",
    "--master-port",
    "--rdzv-backend",
    "--rdzv-endpoint",
    "--rdzv-id",
)
EXCHANGE_FLAGS = {
    "fused": "q, k and v are read in place from their fused projection; then norms and rotation",
    "async": "half of the heads of a rank travel while the other half is computed",
    "compile": "torch.compile of each transformer block, exchanges included",
}
FP8 = ("activations", "nearest", "stochastic")


def parse_arguments(description: str | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=36, help="of training (default: 36)")
    parser.add_argument("--nproc", type=int, default=2, help="ranks on this node (default: 2)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="largest relative difference of losses and of gradients (default: %(default)g)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo_output"), help="folder (default: demo_output)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of parameters and noise (default: 0)")
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)  # rank 0 to its parent
    group = parser.add_argument_group("how the ranks communicate; the loss is the same")
    for flag, text in EXCHANGE_FLAGS.items():
        group.add_argument(f"--{flag}", action="store_true", help=text)
    group.add_argument(
        "--fp8",
        choices=FP8,
        default="",
        help="what travels as fp8, in a model with heads of 48: activations; or gradients too, "
        "rounded to the nearest or at random. The losses differ: see --tolerance",
    )
    group = parser.add_argument_group("several nodes (handed to torchrun as they are)")
    for flag in TORCHRUN_FLAGS:
        group.add_argument(flag)
    return parser, parser.parse_args()


def given_exchange_flags(options: argparse.Namespace) -> list[str]:
    flags = [flag for flag in EXCHANGE_FLAGS if getattr(options, flag)]
    return [*flags, f"fp8={options.fp8}"] if options.fp8 else flags


def start_ranks(options: argparse.Namespace, results: Path | None) -> int:
    """Runs this file under torchrun; returns its exit status."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={options.nproc}"]
    # torchrun would set it, with a warning; share_cores has the last word.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    given = [f"{flag}={value}" for flag, value in torchrun_flags(options).items()]
    if given:
        torchrun += given
    else:
        torchrun += ["--standalone", "--local-addr=127.0.0.1"]
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    script = [sys.argv[0], f"--steps={options.steps}", f"--seed={options.seed}"]
    script += [f"--tolerance={options.tolerance}", f"--output={options.output}"]
    script += [f"--{flag}" for flag in given_exchange_flags(options)]
    if results is not None:
        script += [f"--results={results}"]
    return subprocess.run([*torchrun, *script], env=environment, check=False).returncode


def torchrun_flags(options: argparse.Namespace) -> dict[str, str]:
    values = {flag: getattr(options, flag[2:].replace("-", "_")) for flag in TORCHRUN_FLAGS}
    return {flag: value for flag, value in values.items() if value is not None}


def pick_device(num_local_ranks: int, local_rank: int = 0) -> torch.device:
    """A GPU for each rank of this node, or the CPU with a fair share of its cores."""
    if torch.cuda.is_available() and torch.cuda.device_count() >= num_local_ranks:
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def share_cores(num_local_ranks: int) -> None:
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_local_ranks))
