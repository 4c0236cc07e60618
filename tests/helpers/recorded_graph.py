"""Captures what runs and replays it, as a CUDA graph does, without a GPU.

Recorded are torch's operators, launches of the emulated GPU and collectives of `rank_threads`, each
with the memory that it read and wrote; replayed they read and write that memory again, and no other
code runs. What an op decided on the host while it was captured is decided for good.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_here = threading.local()


def run_and_record(step: Callable[[], None]) -> None:
    """Runs `step`; a graph that captures in this thread takes it as one step."""
    graph: RecordedGraph | None = getattr(_here, "graph", None)
    if graph is None:
        step()
        return
    _here.graph = None
    try:
        step()
    finally:
        _here.graph = graph
    graph.steps.append(step)


class RecordedGraph(TorchDispatchMode):
    """`with graph:` captures what this thread runs; `graph.replay()` runs it again."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], None]] = []

    def __enter__(self) -> RecordedGraph:
        _here.graph = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _here.graph = None
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = kwargs or {}
        outputs = function(*args, **kwargs)

        def again() -> None:
            for old, new in zip(
                tree_leaves(outputs), tree_leaves(function(*args, **kwargs)), strict=True
            ):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # else a view
                    old.copy_(new)

        if getattr(_here, "graph", None) is self:
            self.steps.append(again)
        return outputs

    @torch.no_grad()
    def replay(self) -> None:
        for step in self.steps:
            step()
