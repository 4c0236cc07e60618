"""Timing of layout copies: `strided_copy_`, torch's `copy_`, torch.compile's, and the limit.

The limit is a contiguous copy of the same number of bytes. Every system writes into memory that was
touched before, and its result is compared with `copy_` before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from harness import Report, num_input_sets, random_like, time_in_turn, track
from script import Options
from torch import Tensor

from fastvideo_comm.kernels import strided_copy_

OURS, TORCH, COMPILED, LIMIT = "fastvideo_comm", "torch copy_", "torch.compile", "contiguous copy"


@dataclass(frozen=True)
class CopyCase:
    """`view_dst` and `view_src` make, of contiguous tensors, two views of one shape."""

    name: str
    op: str
    dst_shape: tuple[int, ...]
    src_shape: tuple[int, ...]
    view_dst: Callable[[Tensor], Tensor] = lambda dst: dst
    view_src: Callable[[Tensor], Tensor] = lambda src: src
    dtype: torch.dtype = torch.bfloat16
    world_size: int | None = None
    compiled: bool = False


def measure_copies(bench: str, cases: Sequence[CopyCase], options: Options) -> Report:
    """One row for each case and system."""
    report = Report()
    with track(cases, bench) as cases_in_turn:
        for case in cases_in_turn:
            _measure(bench, case, options, report)
    return report


def _measure(bench: str, case: CopyCase, options: Options, report: Report) -> None:
    device = options.device
    probe = case.view_src(torch.empty(case.src_shape, dtype=case.dtype, device="meta"))
    num_bytes = 2 * probe.numel() * probe.element_size()
    sources, targets = [], []
    for _ in range(num_input_sets(num_bytes, device)):
        sources.append(case.view_src(random_like(case.src_shape, case.dtype, device)))
        targets.append(case.view_dst(random_like(case.dst_shape, case.dtype, device)))
    flat_sources = [random_like((probe.numel(),), case.dtype, device) for _ in sources]
    flat_targets = [torch.empty_like(flat).copy_(flat) for flat in flat_sources]
    systems = {
        OURS: lambda i: strided_copy_(targets[i], sources[i]),
        TORCH: lambda i: targets[i].copy_(sources[i]),
        LIMIT: lambda i: flat_targets[i].copy_(flat_sources[i]),
    }
    if case.compiled:
        compiled = _compiled_copy()
        systems[COMPILED] = lambda i: compiled(targets[i], sources[i])
    for name in [name for name in systems if name != LIMIT]:
        _bits(targets[0]).zero_()
        try:
            systems[name](0)
            if not torch.equal(_bits(targets[0]), _bits(sources[0])):
                raise RuntimeError("the result differs from copy_")
        except Exception as error:  # a compiler or an implementation that is not here is named
            report.problem(f"{bench}, {case.name}, {name}: {type(error).__name__}: {error}"[:300])
            del systems[name]
    samples = time_in_turn(
        systems, device=device, seconds=options.seconds / 2, num_sets=len(sources)
    )
    report.add(
        case.name,
        samples,
        num_bytes=num_bytes,
        limit=LIMIT,
        bench=bench,
        op=case.op,
        shape=list(case.src_shape),
        world_size=case.world_size,
        dtype=str(case.dtype).removeprefix("torch."),
    )


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers: not every dtype has `equal`."""
    return tensor.view(getattr(torch, f"int{8 * tensor.element_size()}"))


def _compiled_copy() -> Callable[[Tensor, Tensor], Tensor]:
    """torch.compile's copy, specialised on the case's sizes and strides."""
    torch._dynamo.reset()

    @torch.compile(dynamic=False)
    def copy(dst: Tensor, src: Tensor) -> Tensor:
        return dst.copy_(src)

    return copy
