"""All ranks as threads on one device.

The ranks run on the CPU too: what works there is what is run on the GPU. Values are small integers
in fp64, so that sums are exact in any order.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerator import DEVICES, EMULATED, GPU, needs_gpu
from emulated_gpu import emulated_gpu
from rank_threads import run_ranks
from torch import Tensor

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.collective.route import MEMORY_VARIABLE
from fastvideo_comm.kernels.strided_copy import IMPLEMENTATION_VARIABLE

Job = Callable[[DeviceCommunicatorBase], object]


@pytest.fixture(params=[*DEVICES, EMULATED])
def device(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, emulated_gpu_directory: Path
) -> Iterator[str]:
    if request.param != "cpu":  # these tensors are too small for "auto"
        monkeypatch.setenv(IMPLEMENTATION_VARIABLE, "triton")
    if request.param == EMULATED:
        monkeypatch.setenv(MEMORY_VARIABLE, "off")  # which is for CPUs
        with emulated_gpu(emulated_gpu_directory):
            yield "cpu"
    else:
        yield request.param


def _values(*shape: int, device: str) -> Tensor:
    count = torch.Size(shape).numel()
    return ((torch.arange(count, dtype=torch.float64, device=device) * 7) % 23 - 11).view(shape)


def _run(world_size: int, device: str, job: Job) -> list[object]:
    def rank_job(group: dist.ProcessGroup) -> object:
        communicator = DeviceCommunicatorBase(group, torch.device(device))
        try:
            return job(communicator)
        finally:
            communicator.destroy()

    return run_ranks(world_size, rank_job)


def _forward_and_backward(
    communicator: DeviceCommunicatorBase,
    op: Callable[[Tensor], Tensor],
    input_: Tensor,
    grad_output: Tensor,
) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of the sum over ranks of `(output * grad_output).sum()`."""
    leaf = input_.detach().requires_grad_()
    output = op(leaf)
    (grad,) = torch.autograd.grad(output, leaf, grad_output.contiguous())
    return output.detach(), grad


@pytest.mark.parametrize("device", [EMULATED, pytest.param(GPU, marks=needs_gpu)], indirect=True)
@pytest.mark.parametrize("batch", [1, 2])
def test_after_warmup_nothing_compiles(device, batch):
    heads, head_dim = 8, 64
    q, k = (batch, 70, heads, head_dim), (batch, 70, 2, head_dim)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, device=device).bfloat16().requires_grad_()

    def backward(*outputs: Tensor) -> None:
        """With gradients as attention makes them, contiguous and not."""
        for layout in (contiguous, heads_first):
            grads = [layout(torch.ones_like(output)) for output in outputs]
            torch.autograd.backward(outputs, grads, retain_graph=True)

    def contiguous(x: Tensor) -> Tensor:
        return x.contiguous()

    def heads_first(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def job(communicator: DeviceCommunicatorBase) -> tuple[int, int]:
        communicator.warmup([q, (q, q, q), (q, k, k)], [torch.bfloat16])
        communicator.barrier()  # the ranks are threads of one process
        before = _num_kernels()
        exchange = communicator.all_to_all_4D
        for length in (70, 101):
            fused = random(batch, length, 3 * heads * head_dim)
            parts = [part.unflatten(-1, (heads, head_dim)) for part in fused.chunk(3, -1)]
            for layout in (contiguous, heads_first):
                x = exchange(layout(parts[0]))
                backward(x, exchange(layout(x), 1, 2))
            backward(exchange(parts[1], async_op=True).wait())
            backward(*exchange(parts))
            backward(*exchange([random(batch, length, h, head_dim) for h in (heads, 2, 2)]))
            whole = communicator.all_gather(random(batch, length * 64, 16), 1)
            part = communicator.slice(whole, 1)
            part.backward(torch.ones_like(part))
        return before, _num_kernels()

    for before, after in _run(2, device, job):
        assert 0 < before == after


@pytest.mark.parametrize("device", [EMULATED, pytest.param(GPU, marks=needs_gpu)], indirect=True)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_after_warmup_with_fp8_nothing_compiles(device, rounding):
    q, k = (1, 40, 4, 128), (1, 40, 2, 128)  # longer than a tile, which has 32 rows of 128
    fp8: dict[str, Any] = {
        "wire_dtype": torch.float8_e4m3fn,
        "grad_wire_dtype": torch.float8_e5m2,
        "rounding": rounding,
    }

    def job(communicator: DeviceCommunicatorBase) -> tuple[int, int]:
        communicator.warmup([q, (q, k, k)], [torch.bfloat16], **fp8)
        communicator.barrier()  # the ranks are threads of one process
        before = _num_kernels()
        for length in (40, 53):
            xs = [
                torch.rand(1, length, heads, 128, device=device).bfloat16().requires_grad_()
                for heads in (4, 2, 2)
            ]
            x = communicator.all_to_all_4D(xs[0], **fp8)
            y = communicator.all_to_all_4D(x, 1, 2, **fp8)
            outputs = [y, *communicator.all_to_all_4D(xs, **fp8)]
            torch.autograd.backward(outputs, [torch.ones_like(each) for each in outputs])
        return before, _num_kernels()

    for before, after in _run(2, device, job):
        assert 0 < before == after


def _num_kernels() -> int:
    """Specialisations of the kernels that were compiled in this process."""
    tile_copy = importlib.import_module("fastvideo_comm.kernels.tile_copy")
    rows = importlib.import_module("fastvideo_comm.kernels.quantise_rows")
    kernels = (tile_copy.tile_copy, rows.quantise_rows, rows.dequantise_rows)
    return sum(len(caches[0]) for each in kernels for caches in each.device_caches.values())


@pytest.mark.parametrize("world_size", [2, 3])
class TestRanksAsThreads:
    @pytest.mark.parametrize("batch", [1, 2])
    @pytest.mark.parametrize("dims", [(2, 1), (1, 2)])
    def test_all_to_all_4D_and_its_gradient_are_slices_of_the_global_tensor(
        self, world_size, device, dims, batch
    ):
        scatter, gather = dims
        x = _values(batch, 3 * world_size, 5 * world_size, 4, device=device)
        g = _values(*x.shape, device=device) * 2

        def job(communicator: DeviceCommunicatorBase) -> object:
            rank = communicator.rank
            return _forward_and_backward(
                communicator,
                lambda leaf: communicator.all_to_all_4D(leaf, scatter, gather),
                x.chunk(world_size, gather)[rank],  # not contiguous for (1, 2)
                g.chunk(world_size, scatter)[rank],
            )

        for rank, (output, grad) in enumerate(_run(world_size, device, job)):
            assert torch.equal(output, x.chunk(world_size, scatter)[rank])
            assert torch.equal(grad, g.chunk(world_size, gather)[rank])
            assert output.is_contiguous()

    @pytest.mark.parametrize("dim", [0, 1, 2, -1])
    def test_all_gather_joins_and_its_gradient_is_the_sum_of_the_parts(
        self, world_size, device, dim
    ):
        shape = [2, 3, 4]
        shape[dim] *= world_size
        x = _values(*shape, device=device)

        def job(communicator: DeviceCommunicatorBase) -> object:
            return _forward_and_backward(
                communicator,
                lambda leaf: communicator.all_gather(leaf, dim),
                x.chunk(world_size, dim)[communicator.rank],
                x * (communicator.rank + 1),
            )

        total = x * sum(range(1, world_size + 1))
        for rank, (output, grad) in enumerate(_run(world_size, device, job)):
            assert torch.equal(output, x)
            assert torch.equal(grad, total.chunk(world_size, dim)[rank])

    @pytest.mark.parametrize("dim", [0, 1, -1])
    def test_parts_of_any_size_are_joined_and_dealt_out(self, world_size, device, dim):
        shape, sizes = [2, 3, 4], [3, 0, 2, 2][:world_size]
        shape[dim] = sum(sizes)
        x = _values(*shape, device=device)
        parts = x.split(sizes, dim)

        def job(communicator: DeviceCommunicatorBase) -> object:
            rank = communicator.rank
            joined = _forward_and_backward(
                communicator,
                lambda leaf: communicator.all_gather(leaf, dim, gather_sizes=sizes),
                parts[rank],
                x * (rank + 1),
            )
            dealt = _forward_and_backward(
                communicator,
                lambda leaf: communicator.slice(leaf, dim, scatter_sizes=sizes),
                x,
                parts[rank],
            )
            return *joined, *dealt

        total = x * sum(range(1, world_size + 1))
        for rank, (joined, grad, part, whole) in enumerate(_run(world_size, device, job)):
            assert torch.equal(joined, x)
            assert torch.equal(grad, total.split(sizes, dim)[rank])
            assert torch.equal(part, parts[rank])
            assert torch.equal(whole, x)

    @pytest.mark.parametrize("op", ["SUM", "AVG", "MAX", "MIN", "PRODUCT"])
    def test_all_reduce_and_its_gradient_are_those_of_the_stacked_tensor(
        self, world_size, device, op
    ):
        x = _values(world_size, 3, 5, device=device)
        g = _values(world_size, 3, 5, device=device) % 3
        stacked = x.clone().requires_grad_()
        expected = {
            "SUM": lambda: stacked.sum(0),
            "AVG": lambda: stacked.sum(0) / world_size,
            "MAX": lambda: stacked.amax(0),  # ties share the gradient equally
            "MIN": lambda: stacked.amin(0),
            "PRODUCT": lambda: stacked.prod(0),
        }[op]()
        (expected_grad,) = torch.autograd.grad(expected, stacked, g.sum(0))

        def job(communicator: DeviceCommunicatorBase) -> object:
            rank = communicator.rank
            reduce_op = getattr(dist.ReduceOp, op)
            return _forward_and_backward(
                communicator,
                lambda leaf: communicator.all_reduce(leaf, reduce_op),
                x[rank].T,
                g[rank].T,
            )

        for rank, (output, grad) in enumerate(_run(world_size, device, job)):
            # Division by P and products round, each side in its own order.
            torch.testing.assert_close(output.T, expected.detach(), rtol=1e-14, atol=0)
            torch.testing.assert_close(grad.T, expected_grad[rank], rtol=1e-14, atol=1e-14)

    @pytest.mark.parametrize("scale_grad", [False, True])
    def test_slice_and_its_gradient_are_parts_and_their_join(self, world_size, device, scale_grad):
        x = _values(2, 4 * world_size, 3, device=device)
        g = _values(*x.shape, device=device)

        def job(communicator: DeviceCommunicatorBase) -> object:
            return _forward_and_backward(
                communicator,
                lambda leaf: communicator.slice(leaf, 1, scale_grad=scale_grad),
                x,
                g.chunk(world_size, 1)[communicator.rank],
            )

        for rank, (output, grad) in enumerate(_run(world_size, device, job)):
            assert torch.equal(output, x.chunk(world_size, 1)[rank])
            assert torch.equal(grad, g / world_size if scale_grad else g)

    def test_gather_gives_the_join_to_one_rank(self, world_size, device):
        x = _values(2, 3 * world_size, device=device)

        def job(communicator: DeviceCommunicatorBase) -> object:
            part = x.chunk(world_size, -1)[communicator.rank]
            return communicator.gather(part, dst=world_size - 1)

        *others, gathered = _run(world_size, device, job)
        assert others == [None] * (world_size - 1)
        assert torch.equal(gathered, x)

    def test_a_tensor_goes_round_the_ring(self, world_size, device):
        x = _values(world_size, 4, 3, device=device).transpose(1, 2)

        def job(communicator: DeviceCommunicatorBase) -> object:
            communicator.send(x[communicator.rank])
            return communicator.recv(x.shape[1:], x.dtype)

        for rank, received in enumerate(_run(world_size, device, job)):
            assert torch.equal(received, x[rank - 1])

    def test_attention_over_the_ranks_is_attention_in_one(self, world_size, device):
        """q, k, v as chunks of a fused projection, out to all heads and back; with gradients."""
        batch, length, heads, head_dim = 2, 4 * world_size, 2 * world_size, 8
        torch.manual_seed(0)
        shape = (batch, length, 3 * heads * head_dim)
        qkv = torch.randn(shape, dtype=torch.float64, device=device)
        g = torch.randn(batch, length, heads, head_dim, dtype=torch.float64, device=device)

        def attend(qkv: Tensor, to_heads: Callable[[Tensor], Tensor]) -> Tensor:
            q, k, v = (
                to_heads(part.unflatten(-1, (heads, head_dim))).transpose(1, 2)
                for part in qkv.chunk(3, dim=-1)
            )
            weights = (q @ k.transpose(-1, -2)).softmax(-1)
            return (weights @ v).transpose(1, 2)

        leaf = qkv.clone().requires_grad_()
        expected = attend(leaf, lambda part: part)
        (expected_grad,) = torch.autograd.grad(expected, leaf, g)

        def job(communicator: DeviceCommunicatorBase) -> object:
            rank = communicator.rank
            return _forward_and_backward(
                communicator,
                lambda leaf: communicator.all_to_all_4D(
                    attend(leaf, communicator.all_to_all_4D), 1, 2
                ),
                qkv.chunk(world_size, 1)[rank],
                g.chunk(world_size, 1)[rank],
            )

        outputs, grads = zip(*_run(world_size, device, job), strict=True)
        # The same sums in other matrix shapes: fp64 rounding.
        torch.testing.assert_close(torch.cat(outputs, 1), expected.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.cat(grads, 1), expected_grad, rtol=1e-12, atol=1e-12)


def test_the_error_of_one_rank_ends_all():
    def job(communicator: DeviceCommunicatorBase) -> object:
        if communicator.rank == 1:
            raise KeyError("rank 1")
        return communicator.all_gather(torch.zeros(2))

    with pytest.raises(KeyError, match="rank 1"):
        _run(2, "cpu", job)
