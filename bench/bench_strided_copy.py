"""The two copies of `all_to_all_4D` at production shapes, against the limit of a plain copy.

pack: `b s (P h) d -> b P s h d`, before the exchange that scatters heads; unpack, its inverse,
after the exchange that gathers them. Systems and method: copies.py.
"""

from __future__ import annotations

import functools

import cases
import script
from copies import CopyCase, measure_copies
from harness import Report

from fastvideo_comm.collective.layout import message_view


def measure(options: script.Options) -> Report:
    """Every production shape; on the CPU an eighth of the sequence unless `--full`."""
    reduced = options.device.type == "cpu" and options.size != "full"
    shapes = list(cases.production(scale=8 if reduced else 1, batches=(1,)))
    if options.size == "quick":
        shapes = [shape for shape in shapes if shape.heads == 24][:2]
    elif not reduced:
        middle = [shape for shape in cases.production() if shape.sequence // 1000 == 75]
        # B = 2, and q, k and v stacked.
        shapes += [
            cases.Shape(b, m.sequence, m.heads, m.world_size) for m in middle for b in (2, 3)
        ]
    return measure_copies("strided_copy", [c for s in shapes for c in both(s, options)], options)


def both(shape: cases.Shape, options: script.Options) -> list[CopyCase]:
    """Pack and unpack of one shape."""
    batch, s, heads, head_dim = shape.local
    messages = (batch, shape.world_size, s, heads // shape.world_size, head_dim)
    view = functools.partial(message_view, dim=2, world_size=shape.world_size, position=1)
    # Compiling takes seconds a case: every group size and model, at one sequence length.
    compiled = options.size == "full" or (shape.batch == 1 and _is_compiled(shape, options))
    common = {"world_size": shape.world_size, "compiled": compiled}
    return [
        CopyCase(f"pack {shape.name}", "pack", messages, shape.local, view_src=view, **common),
        CopyCase(f"unpack {shape.name}", "unpack", shape.local, messages, view_dst=view, **common),
    ]


def _is_compiled(shape: cases.Shape, options: script.Options) -> bool:
    if options.size == "quick":
        return False
    if options.device.type == "cuda":
        return 75_000 < shape.sequence < 76_000
    return shape.heads == 24 and shape.world_size == 2 and shape.sequence < 5000


if __name__ == "__main__":
    script.main(measure, __doc__)
