"""The kernels of fp8 rows as they are compiled for GPUs, run on the CPU: their twins' bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from ptx_machine import Blocks, Program
from quantise_rows_module import Rows, imported_quantise_rows, packed
from test_codegen import TARGETS, Driver
from test_quantise import DTYPES, rows_of_all_magnitudes
from test_quantise_codegen import LOADS_AGAIN
from test_quantise_rows import of_values
from torch import Tensor

from fastvideo_comm.kernels import dequantise_, quantise_
from fastvideo_comm.kernels.plan import NUM_WARPS
from fastvideo_comm.kernels.quantise import FORMATS, SMALLEST_SCALE

triton = pytest.importorskip("triton", reason="the kernels need triton")


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def module(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ModuleType]:
    """sm_80 rounds by integer arithmetic, sm_90 by instructions."""
    with (
        triton.knobs.cache.scope(),
        imported_quantise_rows(interpret=False) as module,
        pytest.MonkeyPatch.context() as patch,
    ):
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton_cache"))
        # Not set_active: its inverse asks for a GPU.
        patch.setattr(triton.runtime.driver, "_active", Driver(TARGETS[request.param]))
        yield module


def memory(tensors: Sequence[Tensor]) -> list[tuple[int, Any]]:
    """The storages of tensors, as the machine takes them."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors}
    return [
        (address, torch.tensor([], dtype=torch.uint8).set_(storage).numpy())
        for address, storage in storages.items()
    ]


def run(
    module: ModuleType, kernel: Any, written: Sequence[Tensor], read: Sequence[Tensor],
    pointers: Sequence[Tensor], plan: Any, **constants: Any,
) -> Blocks:  # fmt: skip
    grid, numbers, settings = plan
    compiled = kernel.warmup(
        *pointers, numbers, **settings, **constants, CONVERTS=module._converts(),
        grid=grid, num_warps=NUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    program = Program(compiled.asm["ptx"])
    values = [pointer.data_ptr() for pointer in pointers] + list(numbers) + [0, 0]
    names = [name for name, _ in program.parameters]
    blocks = Blocks(
        program,
        dict(zip(names, values, strict=True)),
        grid[0],
        compiled.metadata.shared,
        memory(read),
        memory(written),
    )
    blocks.run()
    return blocks


def assert_as_twin(module: ModuleType, rows: Rows, has_seeds: bool) -> tuple[Blocks, Blocks]:
    seeds = rows.seeds if has_seeds else None
    payload, scales = rows.payload, rows.scales
    quantise_(payload, scales, rows.wide, seeds)
    expected = payload.view(torch.uint8).clone(), scales.clone()
    payload.view(torch.uint8).fill_(0x55)
    scales.fill_(-1)
    tensors = (payload, scales, rows.wide, scales if seeds is None else seeds)
    there = run(
        module, module.quantise_rows, [payload, scales], tensors[2:],
        (payload.view(torch.uint8), *tensors[1:]), module.plan_rows(*tensors, payload.dtype),
        HAS_SEEDS=has_seeds, SMALLEST_SCALE=SMALLEST_SCALE,
    )  # fmt: skip
    assert torch.equal(payload.view(torch.uint8), expected[0])
    assert torch.equal(scales, expected[1])
    expected_wide = torch.empty_like(rows.wide)
    dequantise_(expected_wide, payload, scales)
    wide = torch.empty_like(rows.wide)
    tensors = (wide, scales, payload, scales)
    back = run(
        module, module.dequantise_rows, [wide], [payload, scales],
        (wide, scales, payload.view(torch.uint8)), module.plan_rows(*tensors, payload.dtype),
    )  # fmt: skip
    # The bits of a NaN are the machine's own.
    torch.testing.assert_close(wide, expected_wide, rtol=0, atol=0, equal_nan=True)
    return there, back


@pytest.mark.parametrize("has_seeds", [False, True], ids=["nearest", "random"])
@pytest.mark.parametrize("format_", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_all_magnitudes_zeros_infinities_and_nans(module, dtype, format_, has_seeds):
    values = rows_of_all_magnitudes(7, dtype, 48)
    values[0] = 0.0
    values[1, 3], values[2, 4], values[3, 5] = torch.inf, -torch.inf, torch.nan
    values[4] = torch.nan
    values[5, 6] = -0.0
    assert_as_twin(module, of_values(values, format_), has_seeds)


@pytest.mark.parametrize("format_", FORMATS, ids=str)
def test_messages_are_read_and_written_once(module, format_):
    rows = packed(1, 96, 6, 128, torch.bfloat16, format_)
    rows.wide.copy_(torch.randn(rows.wide.shape, generator=torch.Generator().manual_seed(0)))
    there, back = assert_as_twin(module, rows, has_seeds=False)
    wide, narrow = rows.wide.nbytes, rows.payload.nbytes + rows.scales.nbytes
    assert (there.loaded, there.stored) == (wide, narrow)
    assert back.stored == wide
    # Threads that share a row each read its scale, from the same 32 bytes.
    assert (
        rows.payload.nbytes
        < back.loaded
        <= rows.payload.nbytes + 8 * (2 if LOADS_AGAIN else 1) * rows.scales.nbytes
    )
