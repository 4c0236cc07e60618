"""The whole call, against the peers' own code and the floor, in two modes.

ranks: real processes and real exchanges, gloo on the CPU, NCCL where there are several GPUs; a
sample is the slowest rank's. local: one process; the exchange is, for all systems alike, a copy of
the message buffer (local_group.py), which shows the work that each system wraps around it.

Operations: `forward` is all_to_all_4D(x, 2, 1), `back` is (1, 2), `forward+grad` adds its gradient;
`attention` is a system's whole sequence for q, k and v there and the output back, around a local
attention that costs nothing (FastVideo: `DistributedAttention.forward`; DeepSpeed:
`DistributedAttention`; diffusers: `TemplatedUlyssesAttention`). `tiny` is [1, 8, 4, 8] and
[3, 8, 4, 8] in fp32, their host time. Every system's result, and gradient, is compared before it is
timed.

On the CPU every process runs one thread, so that P ranks and one process compare. "fresh pages"
gives the C heap back to the system before each sample: without it, freed tensors of less than
32 MiB stay mapped and serve the next call, with it, and always above 32 MiB, each new tensor is
paid for in page faults.
"""

from __future__ import annotations

import ctypes
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import costs
import gpu_peers
import peers
import script
import systems
import torch
import torch.distributed as dist
from cases import Shape, production
from harness import Report, num_input_sets, random_like, time_in_turn, track
from local_group import LocalGroup, local_group
from peers import Bound
from torch import Tensor

TINY_CALLS = 50


@dataclass(frozen=True)
class Case:
    """One operation on one shape, for the reports' `purpose`."""

    op: str
    shape: Shape
    purpose: str = "shape"
    fresh_pages: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        """For a row's `case`."""
        return f"{self.op} {self.shape.name}" + (", fresh pages" if self.fresh_pages else "")


def both(shape: Shape, **common: Any) -> list[Case]:
    """There and back."""
    return [Case("forward", shape, **common), Case("back", shape, **common)]


def tiny(world_size: int) -> list[Case]:
    """[1, 8, 4, 8] and [3, 8, 4, 8] fp32: nothing but the host's time."""
    shapes = [Shape(batch, 8 * world_size, 4, world_size, 8) for batch in (1, 3)]
    return [
        Case(f"tiny {op}", shape, "tiny", dtype=torch.float32)
        for shape in shapes
        for op in ("forward", "back")
    ]


def rank_cases(options: script.Options) -> list[Case]:
    """25 MB and 75 MB a rank at P = 2, then growth with P and with S."""
    main = Shape(1, 8192, 24, 2)
    cases = [*both(main, purpose="main"), *tiny(2)]
    if options.size == "quick":
        return [*cases, Case("attention", Shape(1, 2048, 24, 2), "main")]
    ops = ("forward+grad", "attention", "attention+grad")
    cases += both(main, purpose="main", fresh_pages=True)
    cases += [Case(op, main, "main") for op in ops]
    cases += both(Shape(3, 8192, 24, 2), purpose="main")
    for world_size in (2, 4, 8):
        cases += both(Shape(1, 4096, 24, world_size), purpose="growth with P")
    for sequence in (1024, 2048, 16_384):
        cases += both(Shape(1, sequence, 24, 2), purpose="growth with S")
    if options.size == "full":
        cases += [case for shape in production() for case in both(shape) if shape.world_size == 2]
    return cases


def local_cases(options: script.Options) -> list[Case]:
    """Production shapes over P = 2, 4, 8; on the CPU an eighth of the sequence unless `--full`."""
    if options.size == "quick":
        return [*both(Shape(1, 8192, 24, 4), purpose="main"), *tiny(4)]
    reduced = options.device.type == "cpu" and options.size != "full"
    shapes = list(production(scale=8 if reduced else 1))
    if reduced:
        shapes = [shape for shape in shapes if shape.heads == 24]
    cases = [case for shape in shapes for case in both(shape)]
    middle = [s for s in shapes if s.heads == 24 and s.sequence in (4096, 75_600)]
    for shape in middle:
        stacked = Shape(3, shape.sequence, shape.heads, shape.world_size)
        cases += both(stacked, purpose="main")
    for op in ("forward+grad", "attention", "attention+grad"):
        cases.append(Case(op, middle[1], "main"))
    return [*cases, *tiny(4)]


def measure_on(group: dist.ProcessGroup, cases: list[Case], options: script.Options) -> Report:
    """Every case of one group size."""
    report = Report()
    present, missing = peers.load_all()
    if options.device.type == "cuda" and not isinstance(group, LocalGroup):
        on_gpus, absent = gpu_peers.load_all()
        on_gpus, refused = gpu_peers.bindable(
            on_gpus, group, lambda yes: _over_ranks([float(yes)], group, options.device)[0] > 0
        )
        present, missing = present | on_gpus, missing | absent | refused
    for name, reason in missing.items():
        report.problem(f"peer {name} is missing: {reason}")

    def bind() -> dict[str, Bound]:
        bound = systems.ours(group, options.device)
        bound |= {name: peer.bind(group) for name, peer in present.items()}
        return bound | systems.bounds(group, options.device)

    title = f"all_to_all P={group.size()}"
    with track(cases, title, shown=group.rank() == 0) as cases_in_turn:
        for case in cases_in_turn:
            differentiable = {name for name, peer in present.items() if peer.differentiable}
            candidates = bind()
            if "grad" in case.op:
                for name in set(present) - differentiable:
                    del candidates[name]
                    report.problem(f"{name} has no gradient: no row for {case.op}")
            _measure(case, candidates, group, options, report)
    return report


def _measure(
    case: Case,
    bound: dict[str, Bound],
    group: dist.ProcessGroup,
    options: script.Options,
    report: Report,
) -> None:
    device, is_local = options.device, group.name() == "local"
    shape = case.shape.exchanged if "back" in case.op else case.shape.local
    num_tensors = 3 if "attention" in case.op else 1
    num_bytes = case.shape.numel * case.dtype.itemsize
    is_tiny = case.purpose == "tiny"
    num_sets = 2 if is_tiny else num_input_sets(num_bytes * num_tensors, device)
    torch.manual_seed(group.rank())
    inputs = [
        [random_like(shape, case.dtype, device) for _ in range(num_tensors)]
        for _ in range(num_sets)
    ]
    gradient_shape = case.shape.local if "attention" in case.op else case.shape.exchanged
    gradient = random_like(gradient_shape, case.dtype, device) if "grad" in case.op else None
    expected = _expected(case, inputs[0], gradient, group)
    runs: dict[str, Callable[[int], list[Tensor]]] = {}
    context: dict[str, dict[str, Any]] = {}
    for name, system in bound.items():
        run = _run(case, system, inputs, gradient)
        context[name] = {}
        try:
            if case.purpose == "main" and options.size != "quick":
                context[name]["extra_bytes"] = costs.extra_bytes(lambda run=run: run(0)[0], device)
            if device.type == "cuda" and is_local and case.purpose == "main":
                context[name]["launches"] = costs.launches(lambda run=run: run(0))
            is_right = name in systems.BOUNDS or all(map(torch.equal, run(0), expected))
        except Exception as error:
            # In one process only: ranks of which one goes on alone would wait for each other.
            if name == systems.OURS or not is_local:
                raise
            text = f"{name} fails in {case.name}: {type(error).__name__}: {error}"
            report.problem(text[:300])
            continue
        if is_right:
            runs[name] = run
        else:
            report.problem(f"{name} gives another result in {case.name}: not timed")
    del expected
    host_clock = is_tiny or device.type == "cpu"

    def barrier() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if case.fresh_pages:
            ctypes.CDLL(None).malloc_trim(0)
        if not is_local:
            dist.barrier(group=group)

    samples = time_in_turn(
        runs,
        device=torch.device("cpu") if host_clock else device,
        seconds=options.seconds * (1 if device.type == "cuda" else 1.5),
        num_sets=num_sets,
        calls=TINY_CALLS if is_tiny else 1,
        barrier=barrier,
        agree=lambda rounds: int(_over_ranks([rounds], group, device)[0]),
    )
    slowest = {name: _over_ranks(times, group, device) for name, times in samples.items()}
    before = len(report.rows)
    report.add(
        case.name,
        slowest,
        num_bytes=2 * num_bytes * (4 if "attention" in case.op else 1),
        limit=systems.COPY,
        bench="all_to_all",
        mode="local" if is_local else "ranks",
        op=case.op,
        purpose=case.purpose,
        shape=list(shape),
        world_size=group.size(),
        dtype=str(case.dtype).removeprefix("torch."),
    )
    floor = next((r for r in report.rows[before:] if r["system"] == systems.FLOOR), None)
    for row in report.rows[before:]:
        row |= context[row["system"]]
        row["of_floor"] = row["median_s"] / floor["median_s"] if floor else None


def _run(
    case: Case, system: Bound, inputs: list[list[Tensor]], gradient: Tensor | None
) -> Callable[[int], list[Tensor]]:
    def call(tensors: list[Tensor]) -> Tensor:
        if "attention" in case.op:
            return system.attention(*tensors)
        return system.all_to_all(tensors[0], *((1, 2) if "back" in case.op else (2, 1)))

    if gradient is None:

        def forward(i: int) -> list[Tensor]:
            with torch.no_grad():
                return [call(inputs[i])]

        return forward

    def forward_and_backward(i: int) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs[i]]
        output = call(leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]

    return forward_and_backward


def _expected(
    case: Case, tensors: list[Tensor], gradient: Tensor | None, group: dist.ProcessGroup
) -> list[Tensor]:
    def there(x: Tensor) -> Tensor:
        return systems.reference(x, 2, 1, group)

    def back(x: Tensor) -> Tensor:
        return systems.reference(x, 1, 2, group)

    if "attention" in case.op:
        gradients = [] if gradient is None else [back(there(gradient))] * 3
        return [back(there(tensors[0])), *gradients]
    if "back" in case.op:
        return [back(tensors[0])]
    return [there(tensors[0]), *([] if gradient is None else [back(gradient)])]


def _over_ranks(
    numbers: list[float] | list[int], group: dist.ProcessGroup, device: torch.device
) -> list[float]:
    """The largest of each number over the ranks."""
    if group.name() == "local":
        return [float(number) for number in numbers]
    tensor = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group)
    return tensor.tolist()


def _rank_main(rank: int, world_size: int, options: script.Options, folder: str) -> None:
    is_cuda = options.device.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(rank)
        options = script.Options(torch.device("cuda", rank), options.size)
    else:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        init_method=f"file://{folder}/store-{world_size}",
        rank=rank,
        world_size=world_size,
    )
    cases = [case for case in rank_cases(options) if case.shape.world_size == world_size]
    report = measure_on(dist.group.WORLD, cases, options)
    if rank == 0:
        Path(folder, f"report-{world_size}.json").write_text(json.dumps(asdict(report)))
    dist.barrier()
    dist.destroy_process_group()


def measure(options: script.Options) -> Report:
    """Both modes: first one process, then groups of real ranks."""
    report = Report()
    local = local_cases(options)
    for world_size in sorted({case.shape.world_size for case in local}):
        with local_group(world_size) as group:
            cases = [case for case in local if case.shape.world_size == world_size]
            _extend(report, asdict(measure_on(group, cases, options)))
    with tempfile.TemporaryDirectory() as folder:
        for world_size in sorted({case.shape.world_size for case in rank_cases(options)}):
            if options.device.type == "cuda" and torch.cuda.device_count() < world_size:
                report.problem(
                    f"real exchanges between {world_size} GPUs: {torch.cuda.device_count()} here"
                )
                continue
            torch.multiprocessing.spawn(
                _rank_main, args=(world_size, options, folder), nprocs=world_size
            )
            result = Path(folder, f"report-{world_size}.json").read_text()
            _extend(report, json.loads(result))
    return report


def _extend(report: Report, other: dict[str, Any]) -> None:
    report.rows += other["rows"]
    for problem in other["problems"]:
        report.problem(problem)


if __name__ == "__main__":
    script.main(measure, __doc__)
