"""What a training run leaves behind, and two runs side by side: table, verdict and figure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor


@dataclass
class Run:
    """One training run; of a sequence-parallel one, what rank 0 saw."""

    name: str
    flags: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    first_gradients: dict[str, Tensor] = field(default_factory=dict)
    last_gradients: dict[str, Tensor] = field(default_factory=dict)
    step_seconds: list[float] = field(default_factory=list)
    communication_seconds: list[float] = field(default_factory=list)  # empty: not measured
    sent_bytes: int = 0  # by this rank, in one step
    pictures: dict[str, Tensor] = field(default_factory=dict)  # [channels, frames, height, width]

    def save(self, path: Path) -> None:
        """Writes what `load` reads."""
        torch.save(asdict(self), path)

    @classmethod
    def load(cls, path: Path) -> Run:
        """Reads tensors, numbers and names only: no file can run code here."""
        return cls(**torch.load(path, weights_only=True))


@dataclass(frozen=True)
class Comparison:
    """Largest relative differences between a run and its reference."""

    loss: float
    first_gradients: float
    last_gradients: float

    @classmethod
    def of(cls, reference: Run, run: Run) -> Comparison:
        """Over all losses, and over the parameters for the gradients."""
        return cls(
            loss=loss_differences(reference, run).max().item(),
            first_gradients=gradient_difference(reference.first_gradients, run.first_gradients),
            last_gradients=gradient_difference(reference.last_gradients, run.last_gradients),
        )

    def within(self, tolerance: float) -> bool:
        """False also where anything is NaN."""
        return all(difference <= tolerance for difference in asdict(self).values())


def loss_differences(reference: Run, run: Run) -> Tensor:
    expected, losses = (torch.tensor(r.losses, dtype=torch.float64) for r in (reference, run))
    return (losses - expected).abs() / expected


def gradient_difference(reference: dict[str, Tensor], gradients: dict[str, Tensor]) -> float:
    """The largest |g - g_ref| / |g_ref| (2-norms) over the parameters."""
    ratios = [
        torch.linalg.vector_norm(gradients[name].double() - expected.double())
        / torch.linalg.vector_norm(expected.double())
        for name, expected in reference.items()
    ]
    return torch.stack(ratios).max().item()


def print_table(reference: Run, run: Run, comparison: Comparison) -> None:
    table = Table(title="The same training, twice")
    table.add_column("", no_wrap=True)
    ranks = "\n".join((run.name, *run.flags))
    for heading in (reference.name, ranks, "relative\ndifference"):
        table.add_column(heading, justify="right", no_wrap=True)

    differences = loss_differences(reference, run).tolist()
    num_steps = len(differences)
    every = max(1, num_steps // 6)
    for step in sorted({*range(0, num_steps, every), num_steps - 1}):
        losses = (f"{losses[step]:.6f}" for losses in (reference.losses, run.losses))
        table.add_row(f"loss, step {step + 1}", *losses, scientific(differences[step]))
    table.add_section()
    table.add_row(f"largest of all {num_steps} losses", "", "", scientific(comparison.loss))
    for when, difference in (
        ("first", comparison.first_gradients),
        ("last", comparison.last_gradients),
    ):
        table.add_row(f"gradients, {when} step", "", "", scientific(difference))
    table.add_section()
    table.add_row(
        "step time", *(f"{median(r.step_seconds) * 1e3:.0f} ms" for r in (reference, run)), ""
    )
    if run.communication_seconds:
        communication = median(run.communication_seconds)
        table.add_row("of it in communication", "-", f"{communication * 1e3:.0f} ms", "")
        table.add_row("sent by a rank each step", "-", f"{run.sent_bytes / 1e6:.1f} MB", "")
    table.caption = (
        "Differences of gradients: the largest over the parameters. Times: medians over the steps. "
        "In communication: forward, backward and gradients, with the waits for other ranks."
    )
    Console().print(table)


def scientific(difference: float) -> str:
    return f"{difference:.1e}" if difference else "0"


def save_figure(reference: Run, run: Run, tolerance: float, path: Path) -> None:
    """Both loss curves, their difference, and what the model has learnt, as a PNG."""
    from matplotlib.figure import Figure  # the ranks draw nothing

    figure = Figure(figsize=(9, 9), layout="constrained")
    axes = figure.subplot_mosaic(
        [["losses", "differences"], *([name, name] for name in run.pictures)],
        height_ratios=[2.6, *[1] * len(run.pictures)],
    )
    steps = range(1, len(run.losses) + 1)
    axes["losses"].plot(steps, reference.losses, color="0.75", linewidth=5, label=reference.name)
    axes["losses"].plot(steps, run.losses, color="C0", linewidth=1.2, label=run.name)
    axes["losses"].set(title="flow-matching loss", xlabel="step", ylim=(0, None))
    axes["losses"].legend(frameon=False)
    # A log axis has no zero: losses that agree in every bit stand at its foot.
    differences = loss_differences(reference, run).clamp(min=1e-9)
    axes["differences"].semilogy(steps, differences, ".", color="C3")
    if tolerance > 0:
        axes["differences"].axhline(tolerance, color="0.5", linestyle="--", label="tolerance")
        axes["differences"].legend(frameon=False)
    axes["differences"].set(title="relative difference of the two losses", xlabel="step")
    for name, picture in run.pictures.items():
        strip = (picture.permute(2, 1, 3, 0).flatten(1, 2) * 0.5 + 0.5).clamp(0, 1)
        axes[name].imshow(strip)
        axes[name].set_title(name, fontsize="medium")
        axes[name].axis("off")
    figure.savefig(path, dpi=110)
