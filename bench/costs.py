"""What a call costs besides time: memory at its peak, and work items launched on a GPU."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def extra_bytes(call: Callable[[], torch.Tensor], device: torch.device) -> int:
    """Peak memory of one call above what was there before, without the result itself.

    Called on a freshly bound system, so that buffers which it keeps for later are counted too.
    """
    gc.collect()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # no line on stderr for each start and stop
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        # The CPU allocator keeps no statistics; the profiler sees each of its calls.
        with profile(
            activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as session:
            result = call()
        events = [e for e in session.profiler.kineto_results.events() if e.name() == "[memory]"]
        peak = now = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            peak = max(peak, now)
    return peak - result.numel() * result.element_size()


def launches(call: Callable[[], object]) -> int:
    """Kernels, memory copies and fills that one call puts on the GPU."""
    call()
    torch.cuda.synchronize()
    with profile(
        activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], acc_events=True
    ) as session:
        call()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return sum(
        event.device_type == cuda and not event.is_user_annotation for event in session.events()
    )
