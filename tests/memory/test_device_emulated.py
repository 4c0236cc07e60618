"""Exchange by the memory of GPUs with the compiled kernels, under the memory order of PTX."""

from __future__ import annotations

from pathlib import Path

import device_ranks
import torch
from device_ranks import device_memory_of, emulated_kernels
from emulated_gpu import emulated_gpu
from torch import Tensor

from fastvideo_comm import DeviceCommunicatorBase


def tensors(communicator: DeviceCommunicatorBase, call: int) -> list[Tensor]:
    """q of 4 heads, k and v of one, which two ranks share."""
    generator = torch.Generator().manual_seed(10 * call + communicator.rank)
    return [
        torch.randint(-4, 5, (1, 3, heads, 8), generator=generator).bfloat16().requires_grad_()
        for heads in (4, 1, 1)
    ]


def results(communicator: DeviceCommunicatorBase, call: int) -> list[Tensor]:
    xs = tensors(communicator, call)
    q, k, v = communicator.all_to_all_4D(xs)
    handle = communicator.all_to_all_4D(q * (k + v), 1, 2, async_op=True)
    (handle.wait() * xs[0].detach()).sum().backward()
    return [q.detach(), k.detach(), *[x.grad for x in xs]]


def test_calls_and_their_gradients_are_those_by_messages(emulated_gpu_directory: Path):
    """Several times, so that blocks are used again; on rank 1 the pool has no room for all."""

    def job(communicator: DeviceCommunicatorBase) -> int:
        group = communicator._runner.group
        memory, group.device_memory = group.device_memory, None
        expected = [results(communicator, call) for call in range(4)]
        group.device_memory = memory
        held = []
        for call in range(4):
            actual = results(communicator, call)
            for each, other in zip(actual, expected[call], strict=True):
                assert torch.equal(each, other)
            if communicator.rank:
                held.append(actual)
        return device_memory_of(communicator).num_staged

    with emulated_gpu(emulated_gpu_directory) as gpu, emulated_kernels(gpu):
        staged = device_ranks.run(2, job, segment_bytes=3 << 10, staging_bytes=1 << 10)
        assert staged[0] < staged[1]
        assert gpu.num_launches > 90, "3 for each of 4 exchanges on 2 ranks, 4 times"


def test_after_warmup_no_kernel_is_loaded(emulated_gpu_directory: Path):
    """Loading one may wait for the kernels of other ranks, which wait for this rank."""

    def job(communicator: DeviceCommunicatorBase) -> tuple[int, int]:
        communicator.warmup([(1, 24, 4, 16)])
        communicator.barrier()  # the ranks are threads of one process
        before = gpu.num_kernels
        for length in (24, 31):
            x = torch.rand(1, length, 4, 16).bfloat16().requires_grad_()
            y = communicator.all_to_all_4D(x)
            communicator.all_to_all_4D(y.transpose(1, 2).contiguous().transpose(1, 2), 1, 2)
            z = communicator.all_to_all_4D(y * 2, 1, 2, async_op=True).wait()
            z.backward(torch.ones_like(z))
        return before, gpu.num_kernels

    with emulated_gpu(emulated_gpu_directory) as gpu, emulated_kernels(gpu):
        for before, after in device_ranks.run(2, job, staging_bytes=1 << 14):
            assert 0 < before == after
