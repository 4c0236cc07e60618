"""Exchange by the memory of GPUs on one GPU: its kernels really wait.

Ranks are threads over plain memory, or processes that share the GPU by torch symmetric memory.
Times say nothing about several GPUs.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import device_ranks
import pytest
import torch
import torch.distributed as dist
from accelerator import GPU, needs_gpu
from device_ranks import device_memory_of
from torch import Tensor

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.errors import CollectiveError, CommunicationTimeoutError
from fastvideo_comm.memory.symmetric import OVERLAP_VARIABLE

pytestmark = needs_gpu

HEADS = (8, 4, 1)  # of q, k and v; the last is shared by all ranks


def inputs(rank: int, call: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(10 * call + rank)
    return [
        torch.randint(-4, 5, (2, 70, heads, 64), generator=generator).bfloat16().to(GPU)
        for heads in HEADS
    ]


def exchanged(communicator: DeviceCommunicatorBase, call: int) -> list[Tensor]:
    """Outputs and gradients, on the CPU, of calls in both directions, one of them asynchronous."""
    xs = [x.requires_grad_() for x in inputs(communicator.rank, call)]
    outputs = communicator.all_to_all_4D(xs)
    handle = communicator.all_to_all_4D(outputs[0] * 2, 1, 2, async_op=True)
    gathered = communicator.all_gather(outputs[2], 1)
    (handle.wait().sum() + (gathered * gathered.detach()).sum()).backward()
    kept = [*outputs, gathered, *[x.grad for x in xs]]
    return [each.detach().clone() for each in kept]


def expected(world: int, rank: int, call: int) -> list[Tensor]:
    """The same by slices of what all ranks have."""
    every = [inputs(each, call) for each in range(world)]
    whole = [torch.cat([xs[i] for xs in every], 1) for i in range(len(HEADS))]
    outputs = [each.chunk(world, 2)[rank] if each.shape[2] > 1 else each for each in whole]
    gathered = torch.cat([outputs[2]] * world, 1)
    back = world * world * every[rank][2]  # P ranks have the values P times in their losses
    grads = [torch.full_like(every[rank][0], 2), torch.zeros_like(every[rank][1]), back]
    return [*outputs, gathered, *grads]


def assert_right(world: int, rank: int, call: int, results: list[Tensor]) -> None:
    for result, right in zip(results, expected(world, rank, call), strict=True):
        assert torch.equal(result.float(), right.float())


@pytest.mark.parametrize("world", [2, 4])
def test_threads_exchange_forward_and_backward(world):
    pytest.importorskip("triton", reason="the kernels need triton")

    def job(communicator: DeviceCommunicatorBase) -> list[list[Tensor]]:
        return [exchanged(communicator, call) for call in range(3)]

    for rank, results in enumerate(device_ranks.run_on_gpu(world, job)):
        for call, outputs in enumerate(results):
            assert_right(world, rank, call, outputs)


def test_a_block_is_not_overwritten_before_another_stream_has_read_it():
    """The stream is late by some milliseconds; `record_stream` makes the kernels wait for it."""
    pytest.importorskip("triton", reason="the kernels need triton")

    def job(communicator: DeviceCommunicatorBase) -> tuple[Tensor, Tensor]:
        side = torch.cuda.Stream()
        x = inputs(communicator.rank, 0)[0]
        y = communicator.all_to_all_4D(x)
        right = y.clone()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            late = y.clone()
        communicator.record_stream(y, side)
        address = y.data_ptr()
        del y
        again = communicator.all_to_all_4D(x + 1)
        assert again.data_ptr() == address
        torch.cuda.current_stream().wait_stream(side)
        return late, right

    for late, right in device_ranks.run_on_gpu(2, job):
        assert torch.equal(late, right)


def test_a_rank_that_does_not_come_is_named():
    """And the device is as it was: the next ranks exchange."""
    pytest.importorskip("triton", reason="the kernels need triton")

    def job(communicator: DeviceCommunicatorBase) -> None:
        x = inputs(communicator.rank, 0)[0]
        communicator._runner.group.validate("off")
        memory = device_memory_of(communicator)
        is_dry = bool(memory._words.host[0])
        if communicator.rank == 1 and not is_dry:
            return
        communicator.all_to_all_4D(x)
        torch.cuda.current_stream().synchronize()
        if not is_dry:
            with pytest.raises(CommunicationTimeoutError, match="rank 1 did not come"):
                memory.check()

    device_ranks.run_on_gpu(2, job, timeout=1.0)
    test_threads_exchange_forward_and_backward(2)


def _exchanged(communicator: DeviceCommunicatorBase) -> None:
    for call in range(3):
        results = exchanged(communicator, call)
        assert_right(communicator.world_size, communicator.rank, call, results)


def _captured(communicator: DeviceCommunicatorBase) -> None:
    x = inputs(communicator.rank, 0)[0]

    def step() -> Tensor:
        return communicator.all_to_all_4D(communicator.all_to_all_4D(x), 1, 2) + 1

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    for call in range(1, 4):
        x.copy_(inputs(communicator.rank, call)[0])
        graph.replay()
        assert torch.equal(output, x + 1)
        assert torch.equal(step(), x + 1)
    torch.cuda.synchronize()
    graph.reset()


def _compiled(communicator: DeviceCommunicatorBase) -> None:
    def step(x: Tensor) -> Tensor:
        return communicator.all_to_all_4D(communicator.all_to_all_4D(x) * 2, 1, 2)

    x = inputs(communicator.rank, 0)[0].requires_grad_()
    compiled = torch.compile(step, fullgraph=True)(x)
    assert torch.equal(compiled, step(x))
    compiled.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))


def _process(
    rank: int,
    world: int,
    jobs: list[Callable[[DeviceCommunicatorBase], None]],
    folder: str,
    answer: Any,
) -> None:
    text = ""
    try:
        store = dist.FileStore(os.path.join(folder, "store"), world)
        timeout = datetime.timedelta(seconds=50)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
        device = torch.device(GPU, 0)
        torch.cuda.set_device(device)
        communicator = DeviceCommunicatorBase(
            dist.group.WORLD, device, unique_name="gpus", memory="on", memory_bytes=1 << 26
        )
        try:
            communicator.all_gather(torch.zeros(4, device=device), 0)
        except CollectiveError as error:
            text = f"refused: {error}"
        else:
            assert device_memory_of(communicator).staging_bytes == 1 << 24
            for job in jobs:
                job(communicator)
        communicator.destroy()
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
    answer.send(text)


# Each of them compiles anew, and has a minute with all that a process needs to start.
@pytest.mark.parametrize(
    ("world", "jobs"),
    [(2, [_exchanged, _captured]), (4, [_exchanged, _captured]), (2, [_compiled])],
)
def test_processes_exchange_by_symmetric_memory(world, jobs, tmp_path: Path, monkeypatch):
    """Forward and backward, captured, compiled."""
    pytest.importorskip("triton", reason="the kernels need triton")
    monkeypatch.setenv(OVERLAP_VARIABLE, "1")
    context = multiprocessing.get_context("spawn")
    answers, processes = [], []
    for rank in range(world):
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_process, args=(rank, world, jobs, str(tmp_path), theirs), daemon=True
        )
        process.start()
        theirs.close()
        answers.append(ours)
        processes.append(process)
    deadline = time.monotonic() + 55
    texts = []
    for ours in answers:
        came = ours.poll(max(0.0, deadline - time.monotonic()))
        try:
            texts.append(ours.recv() if came else "no answer")
        except EOFError:
            texts.append("the process died")
    for process in processes:
        process.kill()
        process.join()
    for text in texts:
        if text.startswith("refused: "):
            pytest.skip(text)
    assert texts == [""] * world
