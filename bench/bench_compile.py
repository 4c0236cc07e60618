"""Under torch.compile: the layout copies in sight of the compiler, or behind an operator; gloo.

A rotary embedding, computed in fp32 and rounded to bf16, and the exchange of its result:

- `eager`: no compiler;
- `traced`: compiled as this library does it, with the copies around the exchange as views and
  `cat`, which inductor may fuse with the rotation in front of them, and in the backward with the
  one behind;
- `operator`: compiled around a registered operator with a fake implementation, written here, whose
  body is the eager exchange; the compiler sees nothing of the copies and cannot fuse them.

Results and gradients are compared with eager before anything is timed, within the tolerance that
`torch.testing.assert_close` has for bf16: the compiler contracts multiplications and additions. Two
ranks with one thread each, exchanging through sockets alike: eager calls could share memory, which
compiled code does not. Compiling takes seconds to minutes and is in no row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import script
import torch
import torch.distributed as dist
from bench_overlap import WORLD_SIZE, on_ranks, slowest
from cases import Shape
from harness import Report, time_in_turn, track
from systems import sockets_only
from torch import Tensor

from fastvideo_comm import DeviceCommunicatorBase

SHAPES = (Shape(1, 512, 24, WORLD_SIZE), Shape(1, 8192, 24, WORLD_SIZE))
COMMUNICATORS: dict[str, DeviceCommunicatorBase] = {}  # an operator's schema has no place for one


@torch.library.custom_op("fastvideo_comm_bench::all_to_all_4D", mutates_args=())
def exchange(x: Tensor, scatter_dim: int, gather_dim: int, group_name: str) -> Tensor:
    """The eager exchange, opaque to the compiler."""
    return COMMUNICATORS[group_name].all_to_all_4D(x, scatter_dim, gather_dim)


@exchange.register_fake
def _(x: Tensor, scatter_dim: int, gather_dim: int, group_name: str) -> Tensor:
    size = COMMUNICATORS[group_name].world_size
    shape = list(x.shape)
    shape[scatter_dim] //= size
    shape[gather_dim] *= size
    return x.new_empty(shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    _, ctx.scatter_dim, ctx.gather_dim, ctx.group_name = inputs


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return exchange(gradient, ctx.gather_dim, ctx.scatter_dim, ctx.group_name), None, None, None


exchange.register_autograd(_backward, setup_context=_save)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The two halves of each head, turned; `[B, s, H, D]` bf16, `cos` and `sin` `[s, 1, D / 2]`."""
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1).to(x.dtype)


def measure_on_ranks(options: script.Options) -> Report:
    """Every case, on each rank."""
    report = Report()
    communicator = sockets_only(dist.group.WORLD, options.device)
    COMMUNICATORS["compile"] = communicator
    cases = [(shape, grad) for shape in SHAPES for grad in (False, True)]
    if options.size == "quick":
        cases = cases[:1]
    with track(cases, "compile", shown=communicator.rank == 0) as cases_in_turn:
        for shape, grad in cases_in_turn:
            _measure(communicator, shape, options, report, grad=grad)
    communicator.destroy()
    return report


def _measure(
    communicator: DeviceCommunicatorBase,
    shape: Shape,
    options: script.Options,
    report: Report,
    *,
    grad: bool,
) -> None:
    torch.manual_seed(communicator.rank)
    x = torch.randn(shape.local, dtype=torch.bfloat16)
    gradient = torch.randn(shape.exchanged, dtype=torch.bfloat16)
    angles = torch.rand(shape.local[1], 1, shape.head_dim // 2)
    cos, sin = angles.cos(), angles.sin()

    def traced(x: Tensor) -> Tensor:
        return communicator.all_to_all_4D(rotate(x, cos, sin))

    def opaque(x: Tensor) -> Tensor:
        return exchange(rotate(x, cos, sin), 2, 1, "compile")

    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "eager": traced,
        "traced": torch.compile(traced, fullgraph=True, dynamic=False),
        "operator": torch.compile(opaque, fullgraph=True, dynamic=False),
    }

    def run(name: str) -> list[Tensor]:
        with torch.set_grad_enabled(grad):
            leaf = x.detach().requires_grad_(grad)
            output = functions[name](leaf)
            if not grad:
                return [output]
            return [output.detach(), *torch.autograd.grad(output, leaf, gradient)]

    expected = run("eager")
    calls = {}
    for name in functions:
        try:
            torch.testing.assert_close(run(name), expected)
        except AssertionError:
            report.problem(f"{name} gives another result for {shape.name}: not timed")
        else:
            calls[name] = lambda _, name=name: run(name)
    samples = time_in_turn(
        calls,
        device=options.device,
        seconds=3 * options.seconds,
        barrier=dist.barrier,
        agree=lambda rounds: int(slowest([rounds])[0]),
    )
    op = "forward+grad" if grad else "forward"
    report.add(
        f"rotary, {op} {shape.name}",
        {name: slowest(times) for name, times in samples.items()},
        num_bytes=2 * shape.numel * x.dtype.itemsize * (2 if grad else 1),
        limit=None,
        bench="compile",
        op=op,
        shape=list(shape.local),
        world_size=WORLD_SIZE,
        dtype="bfloat16",
    )


def measure(options: script.Options) -> Report:
    """Two ranks on the CPU."""
    if options.device.type != "cpu":
        report = Report()
        report.problem("traced and opaque copies under torch.compile on GPUs: it needs several")
        return report
    return on_ranks(measure_on_ranks, options)


if __name__ == "__main__":
    script.main(measure, __doc__)
