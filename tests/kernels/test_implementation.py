"""Who copies: torch or Triton, by device, by bytes and by the environment."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastvideo_comm.kernels import implementation_on_cpu, strided_copy
from fastvideo_comm.kernels.strided_copy import (
    IMPLEMENTATION_VARIABLE,
    SMALL_COPY_BYTES,
    require_triton,
    triton_runs,
)


@pytest.fixture(autouse=True)
def _no_implementation_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(IMPLEMENTATION_VARIABLE, raising=False)
    monkeypatch.setattr(strided_copy, "_TRITON_IS_INSTALLED", True)


def tensor(device: str, num_bytes: int) -> Any:
    return SimpleNamespace(device=torch.device(device), is_cpu=device == "cpu", nbytes=num_bytes)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "xpu"])
def test_auto_is_triton_on_an_accelerator_from_so_many_bytes_of_all_pairs_on(device):
    half = SMALL_COPY_BYTES // 2
    assert triton_runs("auto", [tensor(device, SMALL_COPY_BYTES)])
    assert triton_runs("auto", [tensor(device, half), tensor(device, half)])
    assert not triton_runs("auto", [tensor(device, half), tensor(device, half - 1)])
    assert not triton_runs("auto", [])


def test_auto_is_torch_on_other_devices_and_without_triton(monkeypatch):
    assert not triton_runs("auto", [tensor("cpu", SMALL_COPY_BYTES)])
    assert not triton_runs("auto", [tensor("mps", SMALL_COPY_BYTES)])
    monkeypatch.setattr(strided_copy, "_TRITON_IS_INSTALLED", False)
    assert not triton_runs("auto", [tensor("cuda", SMALL_COPY_BYTES)])


def test_triton_is_an_error_where_it_is_not_installed_and_takes_every_accelerator(monkeypatch):
    for device in ("cuda", "xpu"):
        require_triton(tensor(device, 1))
    monkeypatch.setattr(strided_copy, "_TRITON_IS_INSTALLED", False)
    with pytest.raises(ValueError, match="'torch' or 'auto' where triton is not installed, got"):
        require_triton(tensor("cuda", 1))


@pytest.mark.parametrize(
    ("variable", "expected"),
    [(None, "torch"), ("auto", "torch"), ("triton", "auto"), ("torch", "auto"), ("fast", "auto")],
)
def test_many_copies_on_the_cpu_ask_the_environment_once_unless_it_says_something(
    monkeypatch, variable, expected
):
    """ "auto" asks again at every copy, which then refuses a wrong word too."""
    if variable is not None:
        monkeypatch.setenv(IMPLEMENTATION_VARIABLE, variable)
    assert implementation_on_cpu() == expected
