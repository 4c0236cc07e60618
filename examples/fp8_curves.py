r"""Trains the example's model with an exact and with an fp8 exchange, over seeds, and compares.

    python examples/fp8_curves.py --steps 300 --seeds 0 1 2 --output demo_output

Two ranks train a small model on a short clip: exactly; with activations as fp8; with gradients as
fp8 too, rounded to the nearest and at random. `fp8_losses_<steps>.json` has what was trained before
and is not trained again, so a run that was interrupted goes on. Then the table is printed, and
`fp8_losses_<steps>.png` is drawn where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from metered_communicator import MeteredCommunicator
from train_sequence_parallel import train
from video_transformer import Config

RANKS = 2
# A tenth of the example's tokens and two of its layers: twelve runs of 300 steps in minutes.
CONFIG = Config(frames=2, height=24, width=32, num_heads=2, head_dim=48, depth=2)
EXACT = "exact"
KINDS = (EXACT, "activations", "nearest", "stochastic")
LABELS = {
    EXACT: "exact",
    "activations": "activations as fp8",
    "nearest": "gradients too, to the nearest",
    "stochastic": "gradients too, at random",
}
# The mean loss over so many last steps is compared: a loss depends on the noise of its step.
LAST = 12


def name_of(kind: str, seed: int) -> str:
    return f"{kind}, seed {seed}"


def train_all(rank: int, folder: str, seeds: list[int], steps: int, results: Path) -> None:
    """One rank trains everything that `results` does not have; rank 0 writes."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    communicator = MeteredCommunicator(dist.group.WORLD, unique_name="sp")
    losses = read(results)
    for seed in seeds:
        for kind in KINDS:
            # All ranks read the file before rank 0 writes to it.
            communicator.barrier()
            if name_of(kind, seed) in losses:
                continue
            options = argparse.Namespace(
                steps=steps,
                seed=seed,
                fp8="" if kind == EXACT else kind,
                fused=False,
                compile=False,
                **{"async": False},
            )
            run = train(name_of(kind, seed), options, torch.device("cpu"), communicator, CONFIG)
            losses[name_of(kind, seed)] = run.losses
            if rank == 0:
                results.write_text(json.dumps(losses))
    communicator.destroy()
    dist.destroy_process_group()


def read(results: Path) -> dict[str, list[float]]:
    return json.loads(results.read_text()) if results.exists() else {}


def table(losses: dict[str, list[float]], seeds: list[int]) -> str:
    """A row for each kind: its last losses, beside those of the exact exchange of the same seed."""
    last = {name: mean(each[-LAST:]) for name, each in losses.items()}
    exact = [last[name_of(EXACT, seed)] for seed in seeds]
    lines = [
        "| what travels as fp8 | last loss, by seed | against exact, by seed |",
        "|---|---|---|",
    ]
    for kind in KINDS:
        of_kind = [last[name_of(kind, seed)] for seed in seeds]
        differences = [f"{a / b - 1:+.2%}" for a, b in zip(of_kind, exact, strict=True)]
        numbers = ", ".join(f"{loss:.4f}" for loss in of_kind)
        lines.append(f"| {LABELS[kind]} | {numbers} | {', '.join(differences)} |")
    spread = (max(exact) - min(exact)) / mean(exact)
    return "\n".join([*lines, "", f"Exact losses of the seeds lie {spread:.2%} apart."])


def save_figure(losses: dict[str, list[float]], seeds: list[int], path: Path) -> None:
    """The losses of all runs, and how far each is from the exact one of its seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    for index, kind in enumerate(KINDS):
        for seed in seeds:
            each = smoothed(losses[name_of(kind, seed)])
            exact = smoothed(losses[name_of(EXACT, seed)])
            label = LABELS[kind] if seed == seeds[0] else None
            style = {"color": f"C{index}", "linewidth": 1, "label": label}
            above.semilogy(range(LAST, LAST + len(each)), each, **style)
            if kind != EXACT:
                ratios = [a / b - 1 for a, b in zip(each, exact, strict=True)]
                below.plot(range(LAST, LAST + len(each)), ratios, **style)
    above.set(title=f"flow-matching loss, mean of {LAST} steps, {len(seeds)} seeds")
    above.legend(frameon=False)
    below.axhline(0, color="0.5", linewidth=1)
    below.set(title="relative difference from the exact exchange of the same seed", xlabel="step")
    figure.savefig(path, dpi=110)


def smoothed(losses: list[float]) -> list[float]:
    return [mean(losses[end - LAST : end]) for end in range(LAST, len(losses) + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    results = options.output / f"fp8_losses_{options.steps}.json"
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, options.seeds, options.steps, results)
        mp.start_processes(train_all, arguments, nprocs=RANKS, start_method="spawn")
    losses = read(results)
    print(table(losses, options.seeds))
    try:
        save_figure(losses, options.seeds, results.with_suffix(".png"))
    except ImportError as error:
        print(f"No figure: {error}")


if __name__ == "__main__":
    main()
