"""The machine code of the kernels of fp8 rows at production shapes, for GPUs that are not here."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from quantise_rows_module import imported_quantise_rows, packed
from test_codegen import ANY_ACCESS, TARGETS, WIDE_ACCESS, Driver, resource_usage

from fastvideo_comm.kernels.plan import NUM_WARPS, ROWS_TILE_ELEMENTS
from fastvideo_comm.kernels.quantise import FORMATS, SMALLEST_SCALE

triton = pytest.importorskip("triton", reason="the kernels need triton")
NVIDIA = {name: target for name, target in TARGETS.items() if target.backend == "cuda"}
KERNELS = ("to the nearest", "at random", "dequantise")
# In triton 3.6 and 3.7 a thread that dequantises loads the scale of a row again for each 16
# bytes that it writes: twice for its 16 bfloat16, four times for its 16 float32.
LOADS_AGAIN = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
# Instructions between float32 and fp8: PTX has them from sm_89 on.
CONVERSION = r"cvt\.rn\.(?:satfinite\.e[45]m[32]x2\.f32|f16x2\.e[45]m[32]x2)"


class Code:
    """One compiled kernel."""

    def __init__(self, what: str, dtype: torch.dtype, format_: torch.dtype, kernel: Any) -> None:
        self.what = what
        self.name = f"{what}, {dtype}, {format_}"
        self.element_bytes = dtype.itemsize + 1  # read and written
        self.ptx: str = kernel.asm["ptx"]
        self.cubin: bytes = kernel.asm["cubin"]

    def accesses(self, is_wide: bool) -> list[str]:
        """Those of a vector, or those of a single number."""
        found = re.findall(ANY_ACCESS["cuda"], self.ptx)
        return [each for each in found if (".v" in each) == is_wide]


def compiled(module: ModuleType, what: str, dtype: torch.dtype, format_: torch.dtype) -> Code:
    rows = packed(1, 4096, 24, 128, dtype, format_)
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": False, "CONVERTS": module._converts()}
    if what == "dequantise":
        tensors = (rows.wide, rows.scales, rows.payload, rows.scales)
        grid, numbers, settings = module.plan_rows(*tensors, format_)
        kernel = module.dequantise_rows.warmup(
            *(rows.wide, rows.scales, rows.payload.view(torch.uint8), numbers),
            **settings, **options, grid=grid,
        )  # fmt: skip
    else:
        tensors = (rows.payload, rows.scales, rows.wide, rows.seeds)
        grid, numbers, settings = module.plan_rows(*tensors, format_)
        kernel = module.quantise_rows.warmup(
            *(rows.payload.view(torch.uint8), rows.scales, rows.wide, rows.seeds, numbers),
            **settings, **options, grid=grid, HAS_SEEDS=what == "at random",
            SMALLEST_SCALE=SMALLEST_SCALE,
        )  # fmt: skip
    return Code(what, dtype, format_, kernel)


@pytest.fixture(scope="module", params=NVIDIA)
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def codes(target: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Code]]:
    with (
        triton.knobs.cache.scope(),
        imported_quantise_rows(interpret=False) as module,
        pytest.MonkeyPatch.context() as patch,
    ):
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton_cache"))
        # Not set_active: its inverse asks for a GPU.
        patch.setattr(triton.runtime.driver, "_active", Driver(NVIDIA[target]))
        cases = itertools.product(KERNELS, (torch.bfloat16, torch.float32), FORMATS)
        left_out = list(NVIDIA).index(target)  # each case is compiled for two of the three
        yield [
            compiled(module, *case)
            for index, case in enumerate(cases)
            if index % len(NVIDIA) != left_out
        ]


def test_every_access_of_rows_is_16_bytes_wide(codes):
    for code in codes:
        accesses = code.accesses(is_wide=True)
        narrow = [each for each in accesses if not re.fullmatch(WIDE_ACCESS["cuda"], each)]
        assert not narrow, f"{code.name}: {narrow}"
        of_a_thread = ROWS_TILE_ELEMENTS // (32 * NUM_WARPS)
        assert len(accesses) == of_a_thread * code.element_bytes / 16, code.name


def test_a_thread_has_one_scale_and_one_seed_for_each_of_its_rows(codes):
    """It has 16 neighbours of a row, so 2 rows, and the other accesses are all of whole rows."""
    for code in codes:
        num_rows = ROWS_TILE_ELEMENTS // (32 * NUM_WARPS) // 16
        each = 2 if code.what == "at random" else 1
        if code.what == "dequantise" and LOADS_AGAIN:
            each = code.element_bytes - 1  # 16 of so many bytes, over 16
        assert len(code.accesses(is_wide=False)) <= num_rows * each, code.name


def test_nothing_is_spilled(codes, tmp_path):
    for code in codes:
        usage = resource_usage(code.cubin, tmp_path)
        assert re.search(r"\bLOCAL:0\b", usage), f"{code.name}: {usage}"


def test_every_division_is_exact(codes):
    for code in codes:
        divisions = re.findall(r"div\.[\w.]*f32", code.ptx)
        assert set(divisions) == (set() if code.what == "dequantise" else {"div.rn.f32"}), code.name
        assert "rcp" not in code.ptx, code.name
        assert ".ftz" not in code.ptx, f"{code.name}: small numbers must not become zero"


def test_fp8_is_converted_by_instructions_from_sm_89_on(codes, target):
    for code in codes:
        found = re.findall(CONVERSION, code.ptx)
        expected = target != "sm_80" and code.what != "at random"
        assert bool(found) == expected, f"{code.name} on {target}: {found}"
