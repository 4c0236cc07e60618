"""Compiles kernels and makes them ready, without launching them."""

from __future__ import annotations

import threading
from typing import Any

# Held where a kernel may be compiled and loaded, which Triton does at its first launch: a second
# thread could launch a half-loaded kernel, and Python 3.11 parses in one thread at a time only.
loading = threading.Lock()


def load(kernel: Any, *arguments: Any, grid: tuple[int, int, int], **settings: Any) -> Any:
    """Returns a kernel compiled for these arguments, loaded on the current device.

    A dtype may stand for a tensor.

    The lock is not held while a kernel runs: a kernel may wait for one that another thread of this
    process has still to load.
    """
    with loading:
        # triton 3.9 warns if fp fusion is not set
        compiled = kernel.warmup(*arguments, grid=grid, enable_fp_fusion=False, **settings)
        compiled[grid]
    return compiled
