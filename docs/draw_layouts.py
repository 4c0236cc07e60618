"""Draws who holds what before and after each op, as SVG: `python docs/draw_layouts.py`.

Every picture is made from two functions of a rank, the input and the output; a test
runs the ops on ranks and compares, so that a drawing cannot say anything that is not so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

RANKS = 2
PART, HEADS = 3, 4  # s and H; S = P*s, h = H/P
FOLDER = Path(__file__).parent / "drawings"
COLOURS = ("#5b8ff9", "#f6a04d", "#61c0a0", "#b58adf")
INK, PAPER, LINE = "#1c2733", "#ffffff", "#c8d0d9"
CELL_WIDTH, CELL_HEIGHT, GAP, TOP, LEFT = 34, 24, 26, 54, 46
FONT = 'font-family="Roboto, Helvetica, Arial, sans-serif"'


@dataclass(frozen=True)
class Drawing:
    """One op: `[rows, columns]` of element numbers for each rank, before and after."""

    file: str
    title: str
    rows: tuple[str, str]
    columns: tuple[str, str]
    before: Callable[[int], Tensor]
    after: Callable[[int], Tensor | None]
    sums: bool = False


def whole() -> Tensor:
    """All elements, `[S, H]`, numbered."""
    return torch.arange(RANKS * PART * HEADS).reshape(RANKS * PART, HEADS)


def by_sequence(rank: int) -> Tensor:
    """All heads of a part of the sequence, `[s, H]`."""
    return whole().chunk(RANKS, 0)[rank]


def by_heads(rank: int) -> Tensor:
    """The whole sequence of a part of the heads, `[S, h]`."""
    return whole().chunk(RANKS, 1)[rank]


def everything(rank: int) -> Tensor:
    """The same on every rank, `[S, H]`."""
    del rank
    return whole()


DRAWINGS = (
    Drawing(
        "all_to_all_to_heads",
        "all_to_all_4D(x, 2, 1): [B, s, H, D] to [B, S, h, D]",
        ("s", "S"),
        ("H", "h"),
        by_sequence,
        by_heads,
    ),
    Drawing(
        "all_to_all_to_sequence",
        "all_to_all_4D(x, 1, 2): [B, S, h, D] to [B, s, H, D]",
        ("S", "s"),
        ("h", "H"),
        by_heads,
        by_sequence,
    ),
    Drawing(
        "all_gather",
        "all_gather(x, 0): every rank's part, on every rank",
        ("c", "P*c"),
        ("", ""),
        by_sequence,
        everything,
    ),
    Drawing(
        "slice",
        "slice(x, 0): this rank's part of what every rank holds",
        ("P*c", "c"),
        ("", ""),
        everything,
        by_sequence,
    ),
    Drawing(
        "gather",
        "gather(x, dst=0, dim=0): every rank's part, on one rank",
        ("c", "P*c"),
        ("", ""),
        by_sequence,
        lambda rank: whole() if rank == 0 else None,
    ),
    Drawing(
        "all_reduce",
        "all_reduce(x): the sum over ranks, on every rank",
        ("", ""),
        ("", ""),
        lambda rank: torch.arange(6).reshape(2, 3) + 10 * rank,
        lambda _: 2 * torch.arange(6).reshape(2, 3) + 10,
        sums=True,
    ),
    Drawing(
        "reduce_scatter",
        "reduce_scatter(x, 0): this rank's part of the sum over ranks",
        ("P*c", "c"),
        ("", ""),
        lambda rank: torch.arange(12).reshape(4, 3) + 10 * rank,
        lambda rank: (2 * torch.arange(12).reshape(4, 3) + 10).chunk(RANKS, 0)[rank],
        sums=True,
    ),
    Drawing(
        "broadcast",
        "broadcast(x, src=0): the tensor of one rank, on every rank",
        ("", ""),
        ("", ""),
        lambda rank: torch.arange(6).reshape(2, 3) + 10 * rank,
        lambda _: torch.arange(6).reshape(2, 3),
    ),
)


def owner(drawing: Drawing, element: int) -> int | None:
    """The rank that alone held an element before; None where all of them did."""
    holders = [rank for rank in range(RANKS) if (drawing.before(rank) == element).any()]
    return holders[0] if len(holders) == 1 else None


def draw(drawing: Drawing) -> str:
    """The picture: a column of ranks before, an arrow, a column of ranks after."""
    sides = [[side(rank) for rank in range(RANKS)] for side in (drawing.before, drawing.after)]
    widths = [max(t.shape[1] for t in side if t is not None) * CELL_WIDTH for side in sides]
    heights = [
        [CELL_HEIGHT * (1 if t is None else len(t)) for t in (side[rank] for side in sides)]
        for rank in range(RANKS)
    ]
    row_heights = [max(pair) for pair in heights]
    second = LEFT + widths[0] + 84
    width = max(second + LEFT + widths[1] + 16, 8 * len(drawing.title))
    height = TOP + sum(row_heights) + GAP * RANKS
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" role="img" aria-label="{drawing.title}">',
        f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>',
        text(14, 24, drawing.title, size=15, bold=True),
    ]
    top = TOP
    for rank in range(RANKS):
        for place, left in enumerate((LEFT, second + LEFT)):
            tensor = sides[place][rank]
            parts.append(text(left, top - 8, f"rank {rank}", size=12))
            parts += grid(drawing, tensor, left, top, rank, after=place == 1)
            if tensor is not None:
                parts += labels(drawing, tensor, left, top, place)
        top += row_heights[rank] + GAP
    middle = TOP + (height - TOP - GAP) / 2
    start, end = LEFT + widths[0] + 16, second + 16
    parts.append(
        f'<path d="M{start} {middle}H{end}m-8 -6l8 6l-8 6" fill="none" stroke="{INK}" '
        'stroke-width="2"/>'
    )
    return "\n".join([*parts, "</svg>", ""])


def grid(
    drawing: Drawing, tensor: Tensor | None, left: int, top: int, rank: int, *, after: bool
) -> list[str]:
    """The elements that a rank holds, in the colour of the rank that they come from."""
    if tensor is None:
        return [text(left, top + 16, "None", size=12)]
    parts = []
    for y, row in enumerate(tensor.tolist()):
        for x, element in enumerate(row):
            source = None if drawing.sums and after else owner(drawing, element)
            if drawing.sums and not after:
                source = rank
            fill = LINE if source is None else COLOURS[source]
            place = (left + x * CELL_WIDTH, top + y * CELL_HEIGHT)
            parts.append(
                f'<rect x="{place[0]}" y="{place[1]}" width="{CELL_WIDTH}" '
                f'height="{CELL_HEIGHT}" fill="{fill}" stroke="{PAPER}" stroke-width="2"/>'
            )
            parts.append(
                text(place[0] + CELL_WIDTH / 2, place[1] + 17, str(element), size=12, middle=True)
            )
    return parts


def labels(drawing: Drawing, tensor: Tensor, left: int, top: int, place: int) -> list[str]:
    """The names of the two dims: rows on the left, columns above."""
    rows, columns = drawing.rows[place], drawing.columns[place]
    right, middle = left + tensor.shape[1] * CELL_WIDTH, top + len(tensor) * CELL_HEIGHT / 2
    parts = []
    if columns:
        parts.append(text(right - 4 - 8 * len(columns), top - 8, columns, size=13, bold=True))
    if rows:
        parts.append(text(left - 8 - 8 * len(rows), middle + 5, rows, size=13, bold=True))
    return parts


def text(
    x: float, y: float, words: str, *, size: int, bold: bool = False, middle: bool = False
) -> str:
    """A text element."""
    weight = ' font-weight="600"' if bold else ""
    anchor = ' text-anchor="middle"' if middle else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{INK}" {FONT}{weight}{anchor}>'
        f"{words}</text>"
    )


def main(check: bool = False) -> int:
    """Writes the drawings; with `check` only says whether they are as they should be."""
    FOLDER.mkdir(exist_ok=True)
    stale = []
    for drawing in DRAWINGS:
        file = FOLDER / f"{drawing.file}.svg"
        picture = draw(drawing)
        if check and (not file.exists() or file.read_text() != picture):
            stale.append(file.name)
        elif not check:
            file.write_text(picture)
    if stale:
        sys.stdout.write(f"stale: {', '.join(stale)}; run python docs/draw_layouts.py\n")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
