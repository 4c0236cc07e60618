"""How much of an exchange `async_op=True` hides behind computation: gloo, two ranks.

Four systems a case: `exchange` alone, `compute` alone, `in sequence` (the exchange, then the
computation, which does not need it), and `overlapped` (started, the computation, `wait()`); a
fifth, `exchange, async`, waits at once, which shows what being asynchronous costs. Of the shorter
of the two alone the share

    hidden = (in sequence - overlapped) / min(exchange, compute)

is gone in the last; 1 is all, below 0 is a loss. `hidden` in the rows is that share of medians,
`hidden_of_min` of the fastest samples. The computation is matrix products of about the exchange's
time, as an attention block has them beside its value; `forward+grad` takes the gradients of both
too, so that there the reverse exchange travels while the products are differentiated.

The exchange of [1, 4096, 24, 128] bf16 a rank, 25 MB, is one call of `all_to_all_4D` through
sockets, as between hosts: memory that ranks share leaves nothing in flight to hide. Every rank runs
one thread. gloo's own threads and the sockets of the kernel need processors as well: where
the ranks fill the machine, there is nothing left to hide behind, and the share shows that. So each
case is measured once more in a network namespace whose loopback carries 4 Gbit/s and no more, as a
network between hosts: there most of an exchange is waiting, which computation can hide.

`attention` is `ulysses_attention` of three such tensors, with matrix products in the place of
attention, which take about as long as its exchanges. It is measured in 1, 2 and 4 stages
(`pipeline=`), and `exchange` is all of its exchanges alone. There `hidden` is what more stages gain
on one, as a share of the same kind.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import script
import torch
import torch.distributed as dist
from cases import Shape
from harness import Report, random_like, time_in_turn, track
from systems import sockets_only
from torch import Tensor

from fastvideo_comm import DeviceCommunicatorBase, ulysses_attention

WORLD_SIZE = 2
SHAPES = (Shape(1, 8192, 24, WORLD_SIZE), Shape(1, 1024, 24, WORLD_SIZE))
HIDDEN = 768
AT_ONCE = "exchange, async"
SYSTEMS = ("exchange", "compute", "in sequence", "overlapped")
STAGES = {"1 stage": 1, "2 stages": 2, "4 stages": 4}
LINK = "4gbit"  # in words of tc
LINK_VARIABLE = "FASTVIDEO_COMM_BENCH_LINK"  # set inside the namespace


class Products:
    """`repeats` products of one matrix with one weight, and their gradients."""

    def __init__(self, repeats: int, *, grad: bool) -> None:
        """`[512, HIDDEN]` by `[HIDDEN, HIDDEN]`, in fp32."""
        self.repeats = repeats
        self.x = torch.randn(512, HIDDEN)
        self.weight = torch.randn(HIDDEN, HIDDEN, requires_grad=grad)

    def __call__(self, part: float = 1.0) -> Tensor:
        """One number that depends on all of them, or on a part."""
        repeats = max(1, round(part * self.repeats))
        return torch.stack([(self.x @ self.weight).mean() for _ in range(repeats)]).sum()


class Block:
    """One exchange and one computation on a rank, which do not need each other."""

    def __init__(self, communicator: DeviceCommunicatorBase, shape: Shape, *, grad: bool) -> None:
        """The computation takes about as long as the exchange, on the slowest rank."""
        self.communicator = communicator
        self.grad = grad
        self.input = random_like(shape.local, torch.bfloat16, communicator.device)
        self.gradient = random_like(shape.exchanged, torch.bfloat16, communicator.device)
        exchange_s = self._seconds(lambda: self("exchange"))
        self.products = Products(8, grad=grad)
        product_s = self._seconds(lambda: self("compute")) / 8
        self.products = Products(max(1, round(exchange_s / product_s)), grad=grad)

    def __call__(self, system: str) -> None:
        """One sample of a system."""
        with torch.set_grad_enabled(self.grad):
            x = self.input.detach().requires_grad_(self.grad)
            if system == "compute":
                self._finish(None, self.products())
                return
            if system in ("overlapped", AT_ONCE):
                handle = self.communicator.all_to_all_4D(x, async_op=True)
                number = self.products() if system == "overlapped" else None
                self._finish(handle.wait(), number)
                return
            exchanged = self.communicator.all_to_all_4D(x)
            self._finish(exchanged, None if system == "exchange" else self.products())

    def _finish(self, exchanged: Tensor | None, number: Tensor | None) -> None:
        """Backward. What was called last is differentiated first: `wait` sends, then products."""
        if not self.grad:
            return
        roots = {exchanged: self.gradient, number: torch.ones(())}
        roots = {root: gradient for root, gradient in roots.items() if root is not None}
        torch.autograd.backward(list(roots), list(roots.values()))

    def _seconds(self, call: Callable[[], None]) -> float:
        times = []
        for _ in range(10):
            dist.barrier()
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return slowest([min(times)])[0]


class Layer(Block):
    """The exchanges of `ulysses_attention`, and the computation between them, in stages."""

    def __init__(self, communicator: DeviceCommunicatorBase, shape: Shape, *, grad: bool) -> None:
        """The same number of products in every stage, however many stages there are."""
        super().__init__(communicator, shape, grad=grad)
        most = max(STAGES.values())
        self.products.repeats = -(-self.products.repeats // most) * most

    def __call__(self, system: str) -> None:
        """One sample of a system."""
        with torch.set_grad_enabled(self.grad):
            if system == "compute":
                self._finish(None, self.products())
                return
            x = self.input.detach().requires_grad_(self.grad)
            heads = self.gradient.shape[2]

            def attention(query: Tensor, _: Tensor, __: Tensor) -> Tensor:
                if system not in STAGES:
                    return query
                return query + self.products(query.shape[2] / heads).to(query.dtype)

            out = ulysses_attention(
                self.communicator, x, x, x, attention, pipeline=STAGES.get(system, 1)
            )
            if self.grad:
                out.backward(x.detach())


def measure_on_ranks(options: script.Options) -> Report:
    """Every case, on each rank."""
    report = Report()
    communicator = sockets_only(dist.group.WORLD, options.device)
    shapes = SHAPES[1:] if options.size == "quick" else SHAPES
    cases = [(shape, grad) for shape in shapes for grad in (False, True)]
    with track(cases, "overlap", shown=communicator.rank == 0) as cases_in_turn:
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
    op = "forward+grad" if grad else "forward"
    rows = _rows(
        Block(communicator, shape, grad=grad), (*SYSTEMS, AT_ONCE), op, shape, options, report
    )
    for statistic, name in (("median_s", "hidden"), ("min_s", "hidden_of_min")):
        rows["overlapped"][name] = hidden(rows, statistic, *SYSTEMS)
    systems = ("exchange", "compute", *STAGES)
    layer = Layer(communicator, shape, grad=grad)
    rows = _rows(layer, systems, f"attention, {op}", shape, options, report)
    for stages in list(STAGES)[1:]:
        for statistic, name in (("median_s", "hidden"), ("min_s", "hidden_of_min")):
            rows[stages][name] = hidden(rows, statistic, *systems[:3], stages)


def _rows(
    block: Block,
    systems: tuple[str, ...],
    op: str,
    shape: Shape,
    options: script.Options,
    report: Report,
) -> dict[str, dict[str, float]]:
    """Measures the systems in turn; their new rows in the report, by system."""
    samples = time_in_turn(
        {system: lambda _, system=system: block(system) for system in systems},
        device=options.device,
        seconds=2 * options.seconds,
        barrier=dist.barrier,
        agree=lambda rounds: int(slowest([rounds])[0]),
    )
    before = len(report.rows)
    num_tensors = 4 if isinstance(block, Layer) else 1  # q, k, v there and the output back
    report.add(
        f"{op} {shape.name}" + (", 4 Gbit/s link" if LINK_VARIABLE in os.environ else ""),
        {system: slowest(times) for system, times in samples.items()},
        num_bytes=num_tensors
        * 2
        * shape.numel
        * torch.bfloat16.itemsize
        * (2 if block.grad else 1),
        limit=None,
        bench="overlap",
        op=op,
        shape=list(shape.local),
        world_size=WORLD_SIZE,
        dtype="bfloat16",
    )
    return {row["system"]: row for row in report.rows[before:]}


def hidden(rows: dict[str, dict[str, float]], statistic: str, *systems: str) -> float:
    """The share of the shorter of exchange and computation that is gone when they overlap."""
    exchange, compute, in_sequence, overlapped = (rows[name][statistic] for name in systems)
    return (in_sequence - overlapped) / min(exchange, compute)


def on_ranks(measure: Callable[[script.Options], Report], options: script.Options) -> Report:
    """Calls `measure` on every rank, with WORLD joined; returns the report of rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank_main, args=(measure, options, folder), nprocs=WORLD_SIZE)
        return Report(**json.loads(Path(folder, "report.json").read_text()))


def slowest(numbers: list[float]) -> list[float]:
    """The largest of each over the ranks."""
    tensor = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def _rank_main(
    rank: int, measure: Callable[[script.Options], Report], options: script.Options, folder: str
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE
    )
    report = measure(options)
    if rank == 0:
        Path(folder, "report.json").write_text(json.dumps(asdict(report)))
    dist.barrier()
    dist.destroy_process_group()


def measure(options: script.Options) -> Report:
    """Two ranks on the CPU; between GPUs the exchange has a stream and no processor to share."""
    if options.device.type != "cpu":
        report = Report()
        report.problem("overlap of exchange and computation on GPUs: it needs several")
        return report
    report = on_ranks(measure_on_ranks, options)
    if LINK_VARIABLE not in os.environ and options.size != "quick":
        over_a_slow_link(__file__, options, report)
    return report


def over_a_slow_link(path: str, options: script.Options, report: Report) -> None:
    """The same again, by the script at `path` in a namespace; needs Linux, unshare, ip and tc."""
    link = f"ip link set lo up && tc qdisc add dev lo root tbf rate {LINK} burst 256kb latency 1s"
    namespace = ["unshare", "--map-root-user", "--net", "sh", "-ec", f'{link}; exec "$@"', "sh"]
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder, "part.json")
        command = [sys.executable, path, "--device", "cpu", "--json", str(part)]
        command += ["--full"] if options.size == "full" else []
        environment = os.environ | {LINK_VARIABLE: LINK}
        try:
            subprocess.run([*namespace, *command], check=True, env=environment)
        except (OSError, subprocess.CalledProcessError) as error:
            report.problem(f"{Path(path).stem} over a link of {LINK}: {error}")
            return
        report.rows += json.loads(part.read_text())["rows"]


if __name__ == "__main__":
    script.main(measure, __doc__)
