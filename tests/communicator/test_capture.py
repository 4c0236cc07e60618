"""Every op is captured once and replayed on new values: as a CUDA graph, and without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerator import GPU, needs_gpu
from emulated_gpu import EmulatedGPU, emulated_gpu
from op_table import OF_SHAPE, SHAPE
from rank_threads import run_ranks
from recorded_graph import RecordedGraph
from test_gpu import random_like
from torch import Tensor

from fastvideo_comm import DeviceCommunicatorBase, DistributedAutograd
from fastvideo_comm.collective.route import MEMORY_VARIABLE
from fastvideo_comm.kernels.strided_copy import IMPLEMENTATION_VARIABLE


@pytest.fixture(scope="module")
def gpu(emulated_gpu_directory: Path) -> Iterator[EmulatedGPU]:
    with emulated_gpu(emulated_gpu_directory) as gpu, pytest.MonkeyPatch.context() as patch:
        patch.setenv(IMPLEMENTATION_VARIABLE, "triton")
        patch.setenv(MEMORY_VARIABLE, "off")  # which is for CPUs
        yield gpu


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("name", OF_SHAPE)
def test_every_op_and_its_gradient_replay_on_new_values(gpu, name, world_size):
    """On the emulated GPU: all that an op does is on the device, in memory that stays its own."""

    def job(group: dist.ProcessGroup) -> None:
        communicator = DeviceCommunicatorBase(group)
        x = torch.zeros(SHAPE, requires_grad=True)
        weights = torch.zeros_like(OF_SHAPE[name](communicator, x))

        def step() -> tuple[Tensor, Tensor]:
            output = OF_SHAPE[name](communicator, x)
            (grad,) = torch.autograd.grad(output, x, weights)
            return output.detach(), grad

        step()
        with RecordedGraph() as graph:
            captured = step()
        for seed in range(2):
            with torch.no_grad():
                for each in (x, weights):
                    generator = torch.Generator().manual_seed(seed * 4 + communicator.rank)
                    each.copy_(torch.randint(-3, 4, each.shape, generator=generator))
            graph.replay()
            replayed = [each.clone() for each in captured]
            for actual, expected in zip(replayed, step(), strict=True):
                assert torch.equal(actual, expected)
        communicator.destroy()

    run_ranks(world_size, job)


class TestCUDAGraph:
    pytestmark = needs_gpu

    def test_every_op_is_captured_and_replayed(self, tmp_path, monkeypatch):
        """With NCCL at world size 1: the public ops, and the exchanges behind them."""
        monkeypatch.setenv(IMPLEMENTATION_VARIABLE, "triton")  # too small for "auto"
        store = dist.FileStore(str(tmp_path / "store"), 1)
        device = torch.device(GPU, 0)
        dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=device)
        graph = torch.cuda.CUDAGraph()
        try:
            group = dist.group.WORLD
            communicator = DeviceCommunicatorBase(group, device, group)
            communicator.warmup([(1, 6, 4, 128), (2, 6, 4, 128)])
            x = torch.zeros(2, 6, 4, 128, device=device)
            strided = torch.zeros(2, 4, 6, 128, device=device).transpose(1, 2)

            def ops() -> list[Tensor]:
                autograd = DistributedAutograd
                outputs = [
                    communicator.all_to_all_4D(x),
                    communicator.all_gather(x),
                    communicator.all_reduce(x),
                ]
                for input_ in (x, strided, x[:1], strided[:1]):
                    outputs += [
                        autograd.AllToAll4D.apply(group, input_, 1, 2, 1),
                        autograd.AllToAll4D.apply(group, input_, 1, 1, 2),
                        autograd.AllGather.apply(group, input_, 1, 2),
                        autograd.ReduceScatter.apply(group, input_, 1, 2),
                        autograd.AllReduce.apply(group, input_),
                        autograd.Slice.apply(group, input_, 1, 2, False),
                    ]
                return outputs

            expected = [x] * 3 + [
                each for each in (x, strided, x[:1], strided[:1]) for _ in range(6)
            ]
            ops()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                outputs = ops()
            for _ in range(2):
                x.copy_(random_like(x))
                strided.copy_(random_like(strided))
                graph.replay()
                for output, input_ in zip(outputs, expected, strict=True):
                    assert torch.equal(output, input_)
        finally:
            graph.reset()  # NCCL waits for ever for the end of graphs that hold its kernels
            dist.destroy_process_group()
