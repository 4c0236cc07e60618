"""The other copies that `message_view` describes: gathers, strided inputs, rows of odd lengths.

- gather_last, gather_sequence: what stands after `all_gather` along the last and the sequence dim;
- scatter_last: its backward, a reduce-scatter along the last dim, before the exchange;
- fused_qkv: pack of a chunk of one `[B, s, 3*H*D]` projection, read where it stands;
- transposed: pack of an input that is `[B, H, S, D]` in memory;
- rows: pack with h*D*2 of 96 to 1280 bytes, powers of two and not;
- dtypes: pack of 1-, 4- and 8-byte elements.
"""

from __future__ import annotations

import functools

import script
import torch
from copies import CopyCase, measure_copies
from harness import Report
from torch import Tensor

from fastvideo_comm.collective.layout import message_view


def measure(options: script.Options) -> Report:
    """Sequences of 75 600 over 4 ranks; on the CPU an eighth of it unless `--full`."""
    reduced = options.device.type == "cpu" and options.size != "full"
    s = 75_600 // (8 if reduced else 1) // 4
    cases = [*gathers(s), *strided_inputs(s), *rows(s), *dtypes(s)]
    if options.size == "quick":
        cases = list({case.op: case for case in reversed(cases)}.values())  # one of each kind
    return measure_copies("layout", cases, options)


def gathers(s: int) -> list[CopyCase]:
    """Hidden states `[B, s, C]` of the three models, gathered along C and along s."""
    cases = []
    for channels in (1536, 3072, 5120):
        for name, dim, shape in (
            ("gather_last", 2, (1, s, channels // 4)),
            ("gather_sequence", 1, (2, s, channels)),
        ):
            gathered = list(shape)
            gathered[dim] *= 4
            view = functools.partial(message_view, dim=dim, world_size=4, position=0)
            messages = (4, *shape)
            text = "x".join(map(str, messages))
            cases.append(
                CopyCase(f"{name} {text}", name, tuple(gathered), messages, view, world_size=4)
            )
            if name == "gather_last":
                case = CopyCase(
                    f"scatter_last {text}",
                    "scatter_last",
                    messages,
                    tuple(gathered),
                    world_size=4,
                    view_src=view,
                )
                cases.append(case)
    return cases


def strided_inputs(s: int) -> list[CopyCase]:
    """Inputs as models have them: a third of a fused projection; `[B, H, S, D]`."""
    cases = []
    for heads in (12, 24, 40):
        messages = (1, 4, s, heads // 4, 128)

        def chunk(x: Tensor, heads: int = heads) -> Tensor:
            return message_view(x.chunk(3, dim=-1)[1].unflatten(-1, (heads, 128)), 2, 4, 1)

        def transposed(x: Tensor) -> Tensor:
            return message_view(x.transpose(1, 2), 2, 4, 1)

        for name, shape, view in (
            ("fused_qkv", (1, s, 3 * heads * 128), chunk),
            ("transposed", (1, heads, s, 128), transposed),
        ):
            text = "x".join(map(str, shape))
            case = CopyCase(f"{name} {text}", name, messages, shape, view_src=view, world_size=4)
            cases.append(case)
    return cases


def rows(s: int) -> list[CopyCase]:
    """Rows of h*D elements that are shorter than a tile."""
    return [_pack("rows", s, heads, head_dim) for heads, head_dim in ROWS]


# (h, D): 96, 160, 256, 384, 640, 768 and 1280 bytes in bf16.
ROWS = ((1, 48), (1, 80), (1, 128), (3, 64), (5, 64), (3, 128), (5, 128))


def dtypes(s: int) -> list[CopyCase]:
    """The same rows in other element sizes: the copy sees bytes only."""
    kinds = (torch.float8_e4m3fn, torch.float32, torch.float64)
    return [_pack("dtypes", s, 6, 128, dtype) for dtype in kinds]


def _pack(
    op: str, s: int, heads: int, head_dim: int, dtype: torch.dtype = torch.bfloat16
) -> CopyCase:
    """Pack for 4 ranks with `heads` heads a rank."""
    shape = (1, s, 4 * heads, head_dim)
    return CopyCase(
        f"{op} {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}",
        op,
        (1, 4, s, heads, head_dim),
        shape,
        view_src=functools.partial(message_view, dim=2, world_size=4, position=1),
        dtype=dtype,
        world_size=4,
    )


if __name__ == "__main__":
    script.main(measure, __doc__)
