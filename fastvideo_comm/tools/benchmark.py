"""The small benchmark: copies on this device, and exchanges between two gloo ranks.

It gives a first impression of a machine. `make bench` in the repository measures more cases, and
compares other systems.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from ..collective.layout import message_view
from ..kernels import strided_copy_
from .rank_pair import run_pair

_REPEATS = 9
_SEQUENCES = (64, 512, 2048, 8192)  # of 12 heads of 128 in bf16: 0.2 to 25 MB


def main(plot: Path, *, as_json: bool = False) -> int:
    """Measures, prints a table and draws the plot; returns the exit status."""
    tasks: list[tuple[str, Callable[[], dict[str, Any]]]] = [("copy", copy_bandwidth)]
    tasks += [
        (f"{s} tokens", lambda s=s: run_pair("measure", s))  # type: ignore[misc]
        for s in _SEQUENCES
    ]
    results = [task() for _, task in _progress(tasks, [name for name, _ in tasks])]
    copies, exchanges = results[0], results[1:]
    if as_json:
        sys.stdout.write(json.dumps({"copies": copies, "exchanges": exchanges}, indent=2) + "\n")
        return 0
    sys.stdout.write(table(copies, exchanges) + "\n" + draw(exchanges, plot) + "\n")
    return 0


def copy_bandwidth() -> dict[str, Any]:
    """Measures GB/s (read and written) of a copy and of packing `[1, s, H, D]` for two ranks.

    Example:
        >>> copy_bandwidth()["device"]  # doctest: +SKIP
        'cpu'
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # 50 MB, or 800 MB on a GPU: more than fits the cache, and the launch is short beside the copy.
    sequence = 1 << (14 if device.type == "cpu" else 18)
    x = torch.empty(1, sequence, 12, 128, dtype=torch.bfloat16, device=device).uniform_()
    plain, view = torch.empty_like(x), message_view(x, 2, 2, 1)
    packed = view.new_empty(view.shape)
    result: dict[str, Any] = {"device": str(device)}
    for name, call in (
        ("plain copy", lambda: plain.copy_(x)),
        ("strided_copy_", lambda: strided_copy_(packed, view)),
    ):
        result[name] = 2 * x.nbytes / _median(call, device) / 1e9
    return result


def table(copies: dict[str, Any], exchanges: list[dict[str, float]]) -> str:
    """Returns the results as text.

    Example:
        >>> row = {"bytes": 2e6, "heads": 2e-3, "sequence": 3e-3, "bare exchange": 1e-3}
        >>> print(table({"device": "cpu", "plain copy": 10.0, "strided_copy_": 9.0}, [row]))
        on cpu: plain copy 10.0 GB/s, strided_copy_ 9.0 GB/s (packing for 2 ranks)
        <BLANKLINE>
        2 ranks, gloo       to heads    to sequence   bare exchange
              2.0 MB         2.00 ms        3.00 ms         1.00 ms
    """
    lines = [
        f"on {copies['device']}: plain copy {copies['plain copy']:.1f} GB/s, "
        f"strided_copy_ {copies['strided_copy_']:.1f} GB/s (packing for 2 ranks)",
        "",
        f"{'2 ranks, gloo':16}{'to heads':>12}{'to sequence':>15}{'bare exchange':>16}",
    ]
    for row in exchanges:
        lines.append(
            f"{row['bytes'] / 1e6:9.1f} MB    {1e3 * row['heads']:9.2f} ms"
            f"{1e3 * row['sequence']:12.2f} ms{1e3 * row['bare exchange']:13.2f} ms"
        )
    return "\n".join(lines)


def draw(exchanges: list[dict[str, float]], plot: Path) -> str:
    """Draws bandwidth over size; returns what to tell the user."""
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    sizes = [row["bytes"] / 1e6 for row in exchanges]
    for name, style in (("heads", "o-"), ("sequence", "s-"), ("bare exchange", "x--")):
        speed = [row["bytes"] / row[name] / 1e9 for row in exchanges]
        axes.plot(sizes, speed, style, label=name if "bare" in name else f"all_to_all_4D to {name}")
    axes.set(xscale="log", xlabel="tensor of one rank (MB)", ylabel="GB/s", ylim=(0, None))
    axes.set_title("Exchange between two gloo ranks")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(plot, dpi=120)
    pyplot.close(figure)
    return f"plot: {plot}"


def _median(call: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(_REPEATS):
        begin = perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(perf_counter() - begin)
    return sorted(times)[_REPEATS // 2]


def _progress(items: Iterable[Any], names: list[str]) -> Iterator[Any]:
    """Shows a bar on the terminal where rich is installed, else a line for each step."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        for name, item in zip(names, items, strict=True):
            sys.stderr.write(f"measuring {name}\n")
            yield item
        return
    yield from track(
        list(items), "measuring", console=Console(stderr=True), transient=True, total=len(names)
    )
