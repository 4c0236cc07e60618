"""The machine code of the kernel at production shapes, compiled here for GPUs that are not here.

What decides the speed of a copy is visible in the code: 16 bytes per access, loads in flight
together, nothing spilled, no division by threads.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from production_copies import ProductionCopy, production_copies
from tile_copy_module import imported_tile_copy

from fastvideo_comm.kernels import plan

triton = pytest.importorskip("triton", reason="the kernel needs triton")
GPUTarget = pytest.importorskip("triton.backends.compiler").GPUTarget

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Rows are contiguous in src, columns in dst: by the bytes of an element.
TRANSPOSES = {1: torch.int8, 2: torch.bfloat16, 4: torch.float32, 8: torch.int64}
WIDE_ACCESS = {
    "cuda": r"(?:ld|st)\.global(?:\.\w+)*\.(?:v4\.b32|v2\.b64)",
    "hip": r"(?:global|buffer)_(?:load|store)_dwordx4",
}
ANY_ACCESS = {
    "cuda": r"(?:ld|st)\.global[.\w]*",
    "hip": r"(?:global|buffer|flat|scratch)_(?:load|store)_\w+",
}


class Driver:
    """What Triton asks of a GPU before it compiles: which one it is."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return list(TARGETS.values()).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0


class Code:
    """One compiled specialisation."""

    def __init__(self, name: str, target: Any, kernel: Any, num_loads: list[int]) -> None:
        self.name = name
        self.backend = target.backend
        self.ttir: str = kernel.asm["ttir"]
        self.ttgir: str = kernel.asm["ttgir"]
        self.assembly: str = kernel.asm["ptx" if self.backend == "cuda" else "amdgcn"]
        self.binary: bytes = kernel.asm["cubin" if self.backend == "cuda" else "hsaco"]
        self.shared_bytes: int = kernel.metadata.shared
        self.num_loads = num_loads  # per thread, of each pair

    @property
    def accesses(self) -> list[str]:
        return re.findall(ANY_ACCESS[self.backend], self.assembly)


class Compiler:
    """Compiles what a launch would compile, each specialisation once."""

    def __init__(self, module: ModuleType, target: Any) -> None:
        self.module = module
        self.target = target
        self.codes: dict[Any, Code] = {}

    def compile(
        self,
        name: str,
        shape: tuple[int, ...],
        dst_strides: tuple[int, ...],
        src_strides: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Code:
        layout = (shape, dst_strides, src_strides, dtype.itemsize, 0, 0)
        return self.compile_all(name, [layout])

    def compile_share(self, launches: Iterable[tuple[str, list[Any]]]) -> list[Code]:
        """Each code that these launches need, once. The GPUs of a backend take turns with them."""
        needed: dict[Any, tuple[str, list[Any]]] = {}
        for name, layouts in launches:
            key = self.key_of(self.module._plan_launch(*layouts))
            needed.setdefault(key, (name, layouts))
        alike = [each for each in TARGETS.values() if each.backend == self.target.backend]
        mine = list(needed.values())[alike.index(self.target) :: len(alike)]
        return [self.compile_all(*each) for each in mine]

    def key_of(self, launch: Any) -> Any:
        """Equal for launches of one specialisation."""
        widths = tuple(tuple(number >= 2**31 for number in each) for each in launch.numbers)
        return launch.elements, widths, launch.tiles

    def compile_all(self, name: str, layouts: list[Any]) -> Code:
        launch = self.module._plan_launch(*layouts)
        key = self.key_of(launch)
        if key not in self.codes:
            pointers = tuple(
                triton.reinterpret(torch.empty(16), element) for element in launch.elements
            )
            kernel = self.warmup(pointers, launch)
            num_loads = [
                tile[2] * tile[3] * element.itemsize // (4 * self.target.warp_size * 16)
                for element, tile in zip(launch.elements, launch.tiles, strict=True)
            ]
            self.codes[key] = Code(name, self.target, kernel, num_loads)
        return self.codes[key]

    def warmup(self, pointers: tuple[Any, ...], launch: Any) -> Any:
        """The kernel of this launch, compiled with the options of a launch."""
        return self.module.tile_copy.warmup(
            *(pointers, pointers, launch.numbers),
            grid=launch.grid,
            TILES=launch.tiles,
            num_warps=plan.NUM_WARPS,
            enable_fp_fusion=False,
        )


@pytest.fixture(scope="module", params=TARGETS)
def compiler(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Compiler]:
    target = TARGETS[request.param]
    if not any(b.compiler.supports_target(target) for b in triton.backends.backends.values()):
        pytest.skip(f"this build of triton has no {target.backend} backend for {request.param}")
    with (
        triton.knobs.cache.scope(),
        imported_tile_copy(interpret=False) as module,
        pytest.MonkeyPatch.context() as patch,
    ):
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton_cache"))
        # Not set_active: its inverse asks for a GPU.
        patch.setattr(triton.runtime.driver, "_active", Driver(target))
        yield Compiler(module, target)


@pytest.fixture(scope="module")
def production(compiler: Compiler) -> list[Code]:
    return compiler.compile_share((copy.name, [_layout(copy)]) for copy in production_copies())


@pytest.fixture(scope="module")
def packs(compiler: Compiler) -> list[Code]:
    """q, k and v of every production shape in one launch; k and v also with fewer heads than q."""
    copies = {copy.name: copy for copy in production_copies()}
    launches = []
    for name, copy in copies.items():
        if not (name.startswith(("scatter", "gather heads")) and "B=2" in name and "P=2" in name):
            continue
        fewer = copies.get(name.replace("H=24", "H=12").replace("H=40", "H=24"), copy)
        for others in (copy, fewer):
            launches.append((f"3 x {name}", list(map(_layout, (copy, others, others)))))
    return compiler.compile_share(launches)


def _layout(copy: ProductionCopy) -> tuple[Any, ...]:
    _, dst, src = copy
    itemsize = dst.element_size()
    addresses = (view.storage_offset() * itemsize % 16 for view in (dst, src))
    return tuple(dst.shape), dst.stride(), src.stride(), itemsize, *addresses


@pytest.fixture(scope="module")
def transposes(compiler: Compiler) -> list[Code]:
    return [
        compiler.compile(f"transpose {dtype}", (640, 512), (512, 1), (1, 640), dtype)
        for dtype in TRANSPOSES.values()
    ]


@pytest.fixture(scope="module")
def narrow(compiler: Compiler) -> list[Code]:
    """Copies in which odd sizes, strides or addresses leave one element per access."""
    launches = []
    for size in (1, 2):  # bytes of an element: the smaller, the more of them
        odd = {
            "odd address": ((1_000_000,), (1,), (1,)),
            "odd rows": ((100, 1001), (1001, 1), (1003, 1)),
            "odd transpose": ((1001, 1003), (1003, 1), (1, 1001)),
            "every third": ((1001, 1003), (4001, 3), (4003, 3)),
        }
        for name, layout in odd.items():
            launches.append((f"{name} of {size} bytes", [(*layout, size, size, size)]))
    return compiler.compile_share(launches)


def test_every_access_of_a_production_copy_is_16_bytes_wide(production, packs):
    for code in production + packs:
        assert code.accesses, code.name
        narrow = [a for a in code.accesses if not re.fullmatch(WIDE_ACCESS[code.backend], a)]
        assert not narrow, f"{code.name}: {narrow}"


def test_every_load_of_a_tile_is_in_flight_before_the_first_store(production, packs):
    for code in production + packs:
        loads = [bool(re.match(r"ld|\w+_load", access)) for access in code.accesses]
        expected: list[bool] = []
        for num_loads in code.num_loads:
            expected += [True] * num_loads + [False] * num_loads
        assert loads == expected, code.name


def test_no_access_reaches_beyond_the_tensors(production, packs, transposes, narrow):
    """A value beside the tensor that is read and not used shows in no result: the mask must."""
    for code in production + packs + transposes + narrow:
        operands = re.findall(r"tt\.(load|store) (.*?) :", code.ttir)
        counts = [(access, len(values.split(","))) for access, values in operands]
        # pointer, mask; pointer, value, mask
        assert counts == [("load", 2), ("store", 3)] * len(code.num_loads), code.name


def test_a_production_copy_needs_no_shared_memory(production, packs):
    codes = production + packs
    assert {code.name: code.shared_bytes for code in codes if code.shared_bytes} == {}


def test_both_sides_of_a_transpose_are_16_bytes_wide_through_shared_memory(transposes):
    for code in transposes:
        narrow = [a for a in code.accesses if not re.fullmatch(WIDE_ACCESS[code.backend], a)]
        assert not narrow, f"{code.name}: {narrow}"
        assert code.shared_bytes > 0, code.name


def test_nothing_is_spilled_and_local_memory_is_not_used(
    production, packs, transposes, narrow, tmp_path
):
    for code in production + packs + transposes + narrow:
        if code.backend == "cuda":
            usage = resource_usage(code.binary, tmp_path)
            assert re.search(r"\bSTACK:0\b.*\bLOCAL:0\b", usage), f"{code.name}: {usage}"
        else:
            counts = re.findall(
                r"\.(?:[sv]gpr_spill_count|private_segment_fixed_size):\s*(\d+)", code.assembly
            )
            assert counts == ["0", "0", "0"], f"{code.name}: {counts}"


def test_no_thread_divides(production, packs, transposes, narrow):
    """Programs find their tile by scalar division; addresses inside it are sums and products."""
    for code in production + packs + transposes + narrow:
        for ir in (code.ttir, code.ttgir):
            divisions = [line for line in ir.splitlines() if re.search(r"arith\.(div|rem)", line)]
            assert divisions, "program ids are divided, so the pattern must find something"
            assert not [line for line in divisions if "tensor<" in line], code.name


def test_offsets_are_64_bits_wide_from_the_first_multiplication_on(
    production, packs, transposes, narrow
):
    for code in production + packs + transposes + narrow:
        types = re.findall(r"arith\.muli .* : (?:tensor<[\dx]+x)?(i\d+)", code.ttir)
        assert types, code.name
        assert set(types) == {"i64"}, code.name
        offsets = re.findall(r"tt\.addptr .*, (?:tensor<[\dx]+x)?(i\d+)", code.ttir)
        assert offsets, code.name
        assert set(offsets) == {"i64"}, code.name


def test_another_length_and_batch_of_a_layout_compile_nothing(compiler):
    """Triton would specialise numbers in a tuple that are 1 or multiples of 16."""
    kernels = []
    for batch, sequence in ((16, 4096), (3, 4099)):
        row = 8 * 128
        strides = (sequence * row, row, 1), (4 * sequence * row, 3 * row, 1)
        launch = compiler.module._plan_launch(((batch, sequence, row), *strides, 2, 0, 0))
        pointers = (triton.reinterpret(torch.empty(16), *launch.elements),)
        kernels.append(compiler.warmup(pointers, launch))
    assert len(launch.numbers[0]) == 10, "a batch, rows and columns"
    assert kernels[0] is kernels[1]


def test_strides_over_2_31_compile_to_the_same_accesses(compiler):
    code = compiler.compile("wide rows", (640, 256), (256, 1), (2**36, 1), torch.bfloat16)
    assert re.search(r"%numbers[.\w]*: i64", code.ttir)
    assert all(re.fullmatch(WIDE_ACCESS[code.backend], access) for access in code.accesses)


def resource_usage(cubin: bytes, folder: Path) -> str:
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    report = subprocess.run(
        [tool, "-res-usage", str(path)], capture_output=True, text=True, check=True
    )
    return report.stdout + report.stderr
