"""PNG plots of a report: whole calls, bandwidth and the copy limit, local time, growth with P."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import report as tables
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

COLOURS = {
    "fastvideo_comm": "#0b6e4f",
    "fastvideo_comm, sockets": "#7fb09c",
    "fastvideo": "#c8553d",
    "yunchang": "#e0a458",
    "deepspeed": "#5b6c9e",
    "diffusers": "#8e6c8a",
    "cache-dit": "#4c9aa6",
    "fast-ulysses": "#b5838d",
    "fast-ulysses into buffers": "#e5b3bb",
    "flashinfer": "#6a994e",
    "torch copy_": "#8a8a8a",
    "torch.compile": "#c9b458",
    "floor": "#222222",
}

_BELOW: dict[str, Any] = {
    "loc": "outside lower center",
    "ncols": 4,
    "frameon": False,
    "fontsize": 8,
}


def draw(report: Mapping[str, Any], stem: Path) -> list[Path]:
    """Every plot for which the report has rows."""
    head = report["environment"]
    title = f"{head['gpu']['name'] if head['gpu'] else head['device']}, {head['date']}"
    figures = {
        "calls": _calls(report["rows"]),
        "bandwidth": _bandwidth(report["rows"]),
        "local": _local(report["rows"]),
        "growth": _growth(report["rows"]),
    }
    paths = []
    for name, figure in figures.items():
        if figure is None:
            continue
        figure.suptitle(title, fontsize=9, x=0.99, ha="right", color="#555555")
        path = stem.with_name(f"{stem.name}-{name}.png")
        with mpl.rc_context({"font.size": 9}):
            figure.savefig(path, dpi=150)
        paths.append(path)
    return paths


def _calls(rows: list[tables.Row]) -> Figure | None:
    """Whole calls between real ranks, the main cases side by side."""
    chosen = tables.select(rows, bench="all_to_all", mode="ranks", purpose="main")
    chosen = [row for row in chosen if row["op"] in ("forward", "back", "attention")]
    cases = list(dict.fromkeys(row["case"] for row in chosen))
    if not cases:
        return None
    columns = min(3, len(cases))
    lines = -(-len(cases) // columns)
    figure = Figure(figsize=(3.2 * columns, 0.4 + 2.1 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    systems = [*tables.BOUNDS[:1], tables.OURS, tables.SOCKETS, *tables.PEERS][::-1]
    for axes, case in zip(grid, cases, strict=False):
        times = {row["system"]: row["median_s"] * 1e3 for row in tables.select(chosen, case=case)}
        names = [name for name in systems if name in times]
        bars = axes.barh(
            names, [times[name] for name in names], color=[COLOURS[name] for name in names]
        )
        axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
        axes.set_title(case, fontsize=8, loc="left")
        axes.set_xlabel("ms")
        axes.margins(x=0.15)
        _tidy(axes)
    for axes in grid[len(cases) :]:
        axes.set_visible(False)
    return figure


def _bandwidth(rows: list[tables.Row]) -> Figure | None:
    """One dot per case and system, worst case of ours first."""
    chosen = tables.select(rows, bench="strided_copy") + tables.select(rows, bench="layout")
    if not chosen:
        return None
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    ours = {row["case"]: row["of_copy"] for row in tables.select(chosen, system=tables.OURS)}
    order = {case: i for i, case in enumerate(sorted(ours, key=lambda case: ours[case]))}
    for name in ("torch.compile", "torch copy_", tables.OURS):
        dots = [
            (order[row["case"]], row["of_copy"])
            for row in tables.select(chosen, system=name)
            if row["case"] in order
        ]
        if dots:
            axes.plot(*zip(*dots, strict=True), "o", ms=3.5, color=COLOURS[name], label=name)
    axes.axhline(1.0, color="black", lw=0.8)
    axes.set_ylim(0, 1.15)
    axes.set_xlabel("layout, sorted by fastvideo_comm's share")
    axes.set_ylabel("share of a plain copy's bandwidth")
    axes.legend(frameon=False, loc="lower right")
    _tidy(axes)
    return figure


def _local(rows: list[tables.Row]) -> Figure | None:
    """Exchange and local work, stacked, for one shape in both directions."""
    chosen = tables.select(rows, bench="all_to_all", mode="local")
    panels = []
    for op in ("forward", "back"):
        cases = tables.select(chosen, op=op, purpose="shape", world_size=4)
        cases = cases or tables.select(chosen, op=op)
        if cases:
            middle = sorted({row["case"] for row in cases}, key=_bytes_of(cases))
            panels.append(tables.select(cases, case=middle[len(middle) // 2]))
    if not panels:
        return None
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        times = {row["system"]: row["median_s"] * 1e3 for row in panel}
        exchange = times["bare exchange"]
        names = [
            name for name in ("floor", tables.OURS, tables.SOCKETS, *tables.PEERS) if name in times
        ][::-1]
        local = [max(0.0, times[name] - exchange) for name in names]
        axes.barh(names, [exchange] * len(names), color="#d8d8d8", label="exchange (a copy)")
        colours = [COLOURS[name] for name in names]
        axes.barh(names, local, left=exchange, color=colours)
        axes.set_xlabel("ms")
        axes.set_title(panel[0]["case"], fontsize=9, loc="left")
        _tidy(axes)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), **_BELOW)
    return figure


def _growth(rows: list[tables.Row]) -> Figure | None:
    """Time against P, at one sequence length, forward."""
    panels = {}
    for mode, purpose in (("local", "shape"), ("ranks", "growth with P")):
        chosen = tables.select(rows, bench="all_to_all", mode=mode, op="forward", purpose=purpose)
        # The same S and H on every P: the bytes of one rank times P agree, but for rounding.
        whole = [round(row["bytes"] * row["world_size"] / 2**20, -1) for row in chosen]
        sizes = sorted(set(whole), key=lambda size: (-whole.count(size), size))
        chosen = [row for row, size in zip(chosen, whole, strict=True) if size == sizes[0]]
        if len({row["world_size"] for row in chosen}) > 1:
            panels[mode] = chosen
    if not panels:
        return None
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    for axes, (mode, chosen) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for name in ("floor", tables.OURS, tables.SOCKETS, *tables.PEERS):
            line = sorted(
                (row["world_size"], row["median_s"] * 1e3)
                for row in tables.select(chosen, system=name)
            )
            if line:
                style = "--" if name == "floor" else "o-"
                axes.plot(*zip(*line, strict=True), style, ms=4, color=COLOURS[name], label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5, 7)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_xticks([2, 4, 8], ["2", "4", "8"])
        axes.set_xlabel("P")
        axes.set_ylabel("ms a call")
        axes.set_title(f"forward, {mode}", fontsize=9, loc="left")
        _tidy(axes)
    figure.legend(*figure.axes[-1].get_legend_handles_labels(), **_BELOW)
    return figure


def _bytes_of(rows: list[tables.Row]) -> Any:
    sizes = {row["case"]: row["bytes"] for row in rows}
    return lambda case: sizes[case]


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
