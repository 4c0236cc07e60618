"""The machine code of an exchange by posted places, compiled here for GPUs that are not here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from posted_ranks import Kernels, imported_kernels
from production_copies import HEAD_DIM, HEADS, SEQUENCES, WORLD_SIZES, inputs
from test_codegen import ANY_ACCESS, TARGETS, WIDE_ACCESS, Driver, resource_usage
from tile_copy_module import imported_tile_copy
from torch import Tensor

triton = pytest.importorskip("triton", reason="the kernels need triton")

INT64 = torch.empty(16, dtype=torch.int64)
CAPABILITIES = ("sm_80", "sm_90", "sm_100")
# A thread's access to the place of its tile, which is one number.
PLACE = r"ld\.global\.b64"


@pytest.fixture(scope="module", params=CAPABILITIES)
def capability(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def kernels(capability: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernels]:
    with (
        triton.knobs.cache.scope(),
        imported_tile_copy(interpret=False),
        imported_kernels() as kernels,
        pytest.MonkeyPatch.context() as patch,
    ):
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton_cache"))
        # Not set_active: its inverse asks for a GPU.
        patch.setattr(triton.runtime.driver, "_active", Driver(TARGETS[capability]))
        yield kernels


def exchanges() -> Iterator[tuple[str, list[tuple[Tensor, int, tuple[int, ...]]]]]:
    """For every model: the parts of an input, and rank 1's offset and strides in an output."""
    for heads in HEADS:
        for world in WORLD_SIZES:
            if heads % world:
                continue
            for whole in SEQUENCES:
                length, part = -(-whole // world), heads // world
                for batch in (1, 2):
                    where = f"B={batch} s={length} H={heads} P={world}"
                    for layout, x in inputs(batch, length, heads):
                        src = x.unflatten(2, (world, part)).movedim(2, 0)
                        output = x.new_empty(batch, world * length, part, HEAD_DIM)
                        to = output.narrow(1, length, length)
                        yield f"heads, {layout}, {where}", [_delivery(src, to)] * 3
                    for layout, x in inputs(batch, world * length, part):
                        src = x.unflatten(1, (world, length)).movedim(1, 0)
                        output = x.new_empty(batch, length, heads, HEAD_DIM)
                        to = output.narrow(2, part, part)
                        yield f"sequence, {layout}, {where}", [_delivery(src, to)]


def _delivery(src: Tensor, to: Tensor) -> tuple[Tensor, int, tuple[int, ...]]:
    return src, to.storage_offset() * to.element_size(), to.stride()


@pytest.fixture(scope="module")
def deliveries(capability: str, kernels: Kernels) -> dict[str, Any]:
    """Each code that a launch would compile, once, with the name of one exchange that needs it.

    Each capability gets its share of them.
    """
    compiled: dict[Any, tuple[str, Any] | None] = {}
    for name, parts in exchanges():
        launch = plan_of(kernels, parts)
        key = (launch.elements, launch.tiles, tuple(map(len, launch.numbers)))
        if key not in compiled:
            mine = len(compiled) % len(CAPABILITIES) == CAPABILITIES.index(capability)
            compiled[key] = (name, code_of(kernels, launch)) if mine else None
    return dict(code for code in compiled.values() if code is not None)


def plan_of(kernels: Kernels, parts: Sequence[tuple[Tensor, int, tuple[int, ...]]]) -> Any:
    module = kernels.deliver
    fixed = []
    for src, offset, strides in parts:
        step = src.stride(0) * src.element_size()
        start = src.storage_offset() * src.element_size()
        layout = (
            *(tuple(src.shape[1:]), strides, src.stride()[1:], src.element_size()),
            *(offset % 16, (start | step) % 16),
        )
        fixed.append(module._Fixed(layout, src.shape[0], 0, 1, step, offset))
    return module._plan_launches(*fixed)


def code_of(kernels: Kernels, launch: Any) -> Any:
    srcs = tuple(triton.reinterpret(INT64, element) for element in launch.elements)
    return kernels.deliver.deliver.warmup(
        *(INT64, srcs, launch.numbers, launch.parts),
        grid=launch.grid,
        TILES=launch.tiles,
        num_warps=4,
        enable_fp_fusion=False,
    )


@pytest.fixture(scope="module")
def words(kernels: Kernels) -> dict[str, Any]:
    """The code of a post and of a done."""
    numbers = {"post": (0, 0), "done": (0,)}
    return {name: words_code(kernels, name, 0, *numbers[name]) for name in numbers}


def words_code(
    kernels: Kernels, name: str, rank: int, *numbers: int, places: Tensor = INT64
) -> Any:
    kernel = getattr(kernels.posts, name)
    options = {"grid": (16, 1, 1), "num_warps": 1, "enable_fp_fusion": False}
    return kernel.warmup(INT64, places, INT64, INT64, rank, *numbers, **options)


def test_every_access_of_a_delivery_is_16_bytes_wide(deliveries):
    for name, code in deliveries.items():
        accesses = re.findall(ANY_ACCESS["cuda"], code.asm["ptx"])
        wide = [each for each in accesses if re.fullmatch(WIDE_ACCESS["cuda"], each)]
        assert len(wide) >= 2, name
        others = [each for each in accesses if each not in wide]
        assert others == [PLACE.replace("\\", "")] * len(
            code.asm["ttir"].split("tt.int_to_ptr")[1:]
        )


def test_every_load_of_a_tile_is_in_flight_before_the_first_store(deliveries):
    for name, code in deliveries.items():
        wide = re.findall(WIDE_ACCESS["cuda"], code.asm["ptx"])
        per_tile = "".join("l" if each.startswith("ld") else "s" for each in wide)
        assert re.fullmatch(r"(l{4}s{4})+", per_tile), f"{name}: {per_tile}"


def test_nothing_is_spilled_and_no_shared_memory_is_used(deliveries, words, tmp_path):
    for name, code in (deliveries | words).items():
        usage = resource_usage(code.asm["cubin"], tmp_path)
        assert re.search(r"\bSTACK:0\b.*\bLOCAL:0\b", usage), f"{name}: {usage}"
        assert code.metadata.shared <= 16, name  # a word that a program's threads share


def test_no_thread_divides(deliveries):
    for name, code in deliveries.items():
        divisions = re.findall(r"arith\.(?:div|rem).*", code.asm["ttgir"])
        assert divisions, "programs find their tile by division"
        assert not [line for line in divisions if "tensor<" in line], name


def test_offsets_in_a_tensor_are_64_bits_wide(deliveries):
    for name, code in deliveries.items():
        offsets = re.findall(r"tt\.addptr .*, (?:tensor<[\dx]+x)?(i\d+)", code.asm["ttir"])
        assert offsets, name
        narrow = [each for each in offsets if each != "i64"]
        # places + part: the number of a rank
        assert len(narrow) == len(re.findall(r"tt\.int_to_ptr", code.asm["ttir"])), name


def test_a_word_is_released_and_acquired_at_the_scope_of_the_system(words):
    for name, code in words.items():
        ptx = code.asm["ptx"]
        assert len(re.findall(r"atom\.global\.sys\.release\.exch\.b64", ptx)) == 1, name
        # once before the loop and once in it
        assert len(re.findall(r"ld\.global\.sys\.acquire\.b64", ptx)) == 2, name
        assert not re.findall(r"\b(?:trap|brkpt|exit)\b", ptx), name


def test_another_rank_group_place_and_question_compile_nothing(kernels, words):
    places = INT64[1:]
    for rank, world, offset, digest in ((1, 1, 0, 1), (0, 2, 2**33 + 16, 16), (16, 16, 1, 0xFFFFF)):
        post = words_code(kernels, "post", rank, offset, digest, places=places)
        assert post is words["post"]
        assert words_code(kernels, "done", rank, world, places=places) is words["done"]
