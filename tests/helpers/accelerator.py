"""Where tests run: on the CPU, on an emulated GPU, and with the marker `gpu` on an accelerator."""

from __future__ import annotations

import pytest
import torch

GPU = "cuda"
# With the marker `gpu`, and skipped by name where there is none.
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: torch.cuda finds none"),
]
DEVICES = ["cpu", pytest.param(GPU, marks=needs_gpu)]
# Tensors on the CPU, the kernel compiled for a GPU: see emulated_gpu.py.
EMULATED = "emulated"
