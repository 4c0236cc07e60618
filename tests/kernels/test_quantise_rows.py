"""The kernels of fp8 rows, interpreted: bit for bit what their torch twins write."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from quantise_rows_module import Rows, imported_quantise_rows, packed
from test_quantise import DTYPES, rows_of_all_magnitudes
from torch import Tensor

from fastvideo_comm.kernels import dequantise_, quantise_
from fastvideo_comm.kernels.quantise import FORMATS

triton = pytest.importorskip("triton", reason="the kernels need triton")


@pytest.fixture(scope="module", autouse=True)
def interpreted() -> Iterator[None]:
    with imported_quantise_rows(interpret=True):
        yield


def assert_as_twin(rows: Rows, has_seeds: bool) -> None:
    """Payload, scales and what becomes of them; NaNs may have other bits."""
    seeds = rows.seeds if has_seeds else None
    numbers = []
    for impl in ("torch", "triton"):
        rows.payload.view(torch.uint8).fill_(0x55)
        rows.scales.fill_(-1)
        quantise_(rows.payload, rows.scales, rows.wide, seeds, impl=impl)
        numbers.append((rows.payload.view(torch.uint8).clone(), rows.scales.clone()))
    for twin, kernel in zip(*numbers, strict=True):
        assert torch.equal(twin, kernel)
    results = []
    # The interpreter cuts bits off where it makes bfloat16; compiled code rounds.
    dtype = torch.float32 if rows.wide.dtype is torch.bfloat16 else rows.wide.dtype
    for impl in ("torch", "triton"):
        result = torch.empty_like(rows.wide, dtype=dtype)
        dequantise_(result, rows.payload, rows.scales, impl=impl)
        results.append(result)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0, equal_nan=True)


def of_values(values: Tensor, format_: torch.dtype) -> Rows:
    payload = torch.empty(values.shape, dtype=format_)
    seeds = torch.arange(len(values), dtype=torch.int32)[:, None] * 7919
    return Rows(payload, torch.empty(len(values), 1), values, seeds)


@pytest.mark.parametrize("has_seeds", [False, True], ids=["nearest", "random"])
@pytest.mark.parametrize("format_", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_all_magnitudes(dtype, format_, has_seeds):
    for num_columns in (16, 48, 208):
        values = rows_of_all_magnitudes(num_columns, dtype, num_columns)
        if dtype is torch.bfloat16:  # the interpreter reads its subnormal numbers wrongly
            values[values.abs() < 2.0**-126] = 0
        assert_as_twin(of_values(values, format_), has_seeds)


# numpy, which interprets, warns of a NaN that becomes an integer. Its code is replaced afterwards.
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("has_seeds", [False, True], ids=["nearest", "random"])
@pytest.mark.parametrize("format_", FORMATS, ids=str)
def test_zeros_infinities_nans_and_the_ends_of_float32(format_, has_seeds):
    values = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    values[0] = 0.0
    values[1] = -0.0
    values[2, 3], values[3, 4], values[4, 5] = torch.inf, -torch.inf, torch.nan
    values[5] = torch.nan
    for row, magnitude in enumerate((torch.finfo(torch.float32).max, 1e-35, 1e-38, 1e-43), 6):
        values[row] = values[row].sign() * magnitude
    assert_as_twin(of_values(values, format_), has_seeds)


@pytest.mark.parametrize("format_", FORMATS, ids=str)
def test_every_number_of_the_format_and_every_tie_between_two(format_):
    codes = torch.arange(256, dtype=torch.uint8).view(format_).float()
    numbers = codes[codes.isfinite()].sort().values
    ties = (numbers[1:] + numbers[:-1]) / 2
    beside = torch.cat([ties * (1 + 2.0**-23), ties * (1 - 2.0**-23)])
    values = torch.cat([numbers, ties, beside])
    values = torch.nn.functional.pad(values, (0, -len(values) % 15)).view(-1, 15)
    largest = torch.full((len(values), 1), torch.finfo(format_).max)
    assert_as_twin(of_values(torch.cat([values, largest], 1), format_), has_seeds=False)


@pytest.mark.parametrize("has_seeds", [False, True], ids=["nearest", "random"])
@pytest.mark.parametrize("shape", [(1, 33, 4, 48), (2, 9, 6, 16), (3, 1, 2, 32)], ids=str)
def test_rows_in_messages(shape, has_seeds):
    rows = packed(*shape, torch.bfloat16, torch.float8_e4m3fn)
    rows.wide.copy_(torch.randn(rows.wide.shape, generator=torch.Generator().manual_seed(0)))
    assert_as_twin(rows, has_seeds)


@pytest.mark.parametrize("offset", [0, 1, 8])
def test_any_strides_and_addresses(offset):
    storage = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    wide = storage[offset:].as_strided((5, 7, 32), (40, 1, 7 * 40))
    payload = torch.empty(40_000, dtype=torch.uint8)[offset:].view(torch.float8_e5m2)
    rows = Rows(
        payload.as_strided((5, 7, 32), (3, 15 * 33, 15)),
        torch.empty(35).as_strided((5, 7, 1), (1, 5, 1)),
        wide,
        torch.arange(35, dtype=torch.int32).view(5, 7, 1),
    )
    assert_as_twin(rows, has_seeds=True)


@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 32), (2, 0)])
def test_no_rows_and_no_columns_launch_nothing(shape):
    assert_as_twin(
        Rows(
            torch.empty(shape, dtype=torch.float8_e4m3fn),
            torch.empty(*shape[:-1], 1),
            torch.empty(shape),
            torch.empty(*shape[:-1], 1, dtype=torch.int32),
        ),
        has_seeds=True,
    )


@pytest.mark.parametrize(
    ("backend", "arch", "converts"),
    [("cuda", 80, False), ("cuda", 89, True), ("cuda", 90, True), ("hip", 942, False)],
)
def test_instructions_for_fp8_are_those_of_nvidia_from_8_9_on(backend, arch, converts):
    module = importlib.import_module("fastvideo_comm.kernels.quantise_rows")
    target = SimpleNamespace(backend=backend, arch=arch)
    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: target))
    with pytest.MonkeyPatch.context() as patch, triton.knobs.runtime.scope():
        patch.setattr(triton.runtime, "driver", driver)
        assert not module._converts(), "interpreted"
        triton.knobs.runtime.interpret = False
        assert module._converts() is converts
