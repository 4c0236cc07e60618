"""A JSON report as Markdown tables and PNG plots.

    python bench/report.py bench/results/h200-2026-11-21.json

writes `h200-2026-11-21.md` and `h200-2026-11-21-*.png` beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

OURS = "fastvideo_comm"
SOCKETS = "fastvideo_comm, sockets"
GPU_PEERS = ("fast-ulysses", "fast-ulysses into buffers", "flashinfer")
PEERS = ("fastvideo", "yunchang", "deepspeed", "diffusers", "cache-dit", *GPU_PEERS)
BOUNDS = ("floor", "copy and exchange", "bare exchange", "contiguous copy")


def table(rows: Iterable[Row]) -> str:
    """Every row, a line each."""
    lines = [
        "| case | system | median | min | max | GB/s | of copy |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        rate = f"{row['bytes'] / row['median_s'] / 1e9:.1f}" if row.get("bytes") else ""
        share = "" if row.get("of_copy") is None else f"{row['of_copy']:.2f}"
        times = " | ".join(duration(row[key]) for key in ("median_s", "min_s", "max_s"))
        lines.append(f"| {row['case']} | {row['system']} | {times} | {rate} | {share} |")
    return "\n".join(lines)


def whole_calls(rows: Sequence[Row]) -> str:
    """A line per case: our time, its multiple of the floor, each peer's multiple of our time."""
    systems = [name for name in (SOCKETS, *PEERS) if any(row["system"] == name for row in rows)]
    head = ["case", OURS, "of the floor", *systems]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    for case, by_system in _cases(rows).items():
        if OURS not in by_system:
            continue
        ours = by_system[OURS]["median_s"]
        floor = by_system.get("floor")
        cells = [duration(ours), "" if floor is None else f"{ours / floor['median_s']:.2f}"]
        for name in systems:
            row = by_system.get(name)
            cells.append("" if row is None else f"{row['median_s'] / ours:.2f}x")
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def copy_shares(rows: Sequence[Row]) -> str:
    """A line per case: each system's share of a contiguous copy's bandwidth."""
    systems = list(dict.fromkeys(row["system"] for row in rows if row["of_copy"] is not None))
    lines = ["| case | " + " | ".join(systems) + " |", "|---" + "|--:" * len(systems) + "|"]
    for case, by_system in _cases(rows).items():
        shares = [
            f"{by_system[name]['of_copy']:.2f}" if name in by_system else "" for name in systems
        ]
        lines.append(f"| {case} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def costs(rows: Sequence[Row]) -> str:
    """Peak memory beside the result, as a multiple of the tensor, and launches on a GPU."""
    lines = ["| case | system | extra memory | launches |", "|---|---|--:|--:|"]
    for row in rows:
        size = row["bytes"] / 2 / (4 if row["op"].startswith("attention") else 1)
        if row["system"] in (OURS, *PEERS) and row.get("extra_bytes") is not None:
            memory = f"{row['extra_bytes'] / size:.2f}x"
            lines.append(
                f"| {row['case']} | {row['system']} | {memory} | {row.get('launches', '')} |"
            )
    return "\n".join(lines)


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report."""
    rows, head = report["rows"], report["environment"]
    parts = [f"# {head['device']}, {head['date']}", _head(head)]
    for mode, title in (
        ("ranks", "Whole call, real ranks"),
        ("local", "Whole call, one process, the exchange replaced by a copy"),
    ):
        chosen = select(rows, bench="all_to_all", mode=mode)
        if chosen:
            parts += [
                f"## {title}",
                "Peers: their time as a multiple of ours.",
                whole_calls(chosen),
            ]
    for bench, title in (("strided_copy", "Packing and unpacking"), ("layout", "Other layouts")):
        chosen = select(rows, bench=bench)
        if chosen:
            text = "Share of the bandwidth of a contiguous copy of the same bytes."
            parts += [f"## {title}", text, copy_shares(chosen)]
    if chosen := select(rows, bench="first_call"):
        parts += ["## First call of a process", table(chosen)]
    chosen = select(rows, bench="all_to_all", purpose="main", mode="local")
    if any("extra_bytes" in row for row in chosen):
        parts += ["## Memory and launches of one call", costs(chosen)]
    known = ("all_to_all", "strided_copy", "layout", "first_call")
    for bench in dict.fromkeys(row["bench"] for row in rows if row["bench"] not in known):
        parts += [f"## {bench}", table(select(rows, bench=bench))]
    if report["problems"]:
        parts += ["## Not measured", "\n".join(f"- {text}" for text in report["problems"])]
    return "\n\n".join(parts) + "\n"


def short(report: Mapping[str, Any]) -> str:
    """What fits on a screen: the main whole calls, and the worst copies."""
    rows = report["rows"]
    lines = []
    for mode in ("ranks", "local"):
        chosen = select(rows, bench="all_to_all", mode=mode)
        main = [row for row in chosen if row["purpose"] in ("main", "tiny")] or chosen
        if main:
            lines += [f"whole call, {mode} (peers: their time as a multiple of ours)"]
            lines += [whole_calls(main), ""]
    for bench in ("strided_copy", "layout"):
        ours = [row for row in select(rows, bench=bench) if row["system"] == OURS]
        if ours:
            shares = sorted((row["of_copy"], row["case"]) for row in ours)
            middle = shares[len(shares) // 2][0]
            lines.append(
                f"{bench}: {len(ours)} cases, share of a plain copy's bandwidth: "
                f"median {middle:.2f}, worst {shares[0][0]:.2f} ({shares[0][1]})"
            )
    return "\n".join(lines)


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows whose keys have these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def duration(seconds: float) -> str:
    """Three digits with a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _cases(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["system"]] = row
    return cases


def _head(head: Mapping[str, Any]) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in head["machine"].items())
    lines = [f"- machine: {machine}"]
    for key in ("gpu", "versions", "peers"):
        if head.get(key):
            text = ", ".join(f"{name} {value}" for name, value in head[key].items())
            lines.append(f"- {key}: {text}")
    return "\n".join([*lines, f"- commit: {head['commit']}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, nargs="+")
    for path in parser.parse_args().json:
        write(path)


def write(path: Path) -> None:
    """The Markdown and the plots beside the JSON file `path`."""
    report = json.loads(path.read_text())
    path.with_suffix(".md").write_text(markdown(report))
    print(path.with_suffix(".md"))
    try:
        import plots
    except ImportError as error:
        print(f"no plots: {error}")
        return
    for plot in plots.draw(report, path.with_suffix("")):
        print(plot)


if __name__ == "__main__":
    main()
