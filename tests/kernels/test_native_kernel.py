"""The kernel as it is compiled for GPUs: run in emulation everywhere, and on a GPU where one is."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerator import GPU, needs_gpu
from emulated_gpu import EmulatedGPU, emulated_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from production_copies import production_copies
from strided_layouts import (
    DTYPES,
    NAMED_PAIRS,
    StridedLayout,
    assert_all_copied_like_torch,
    assert_copies_like_torch,
    copies,
    pairs_of_layouts,
)
from torch import Tensor

from fastvideo_comm.collective.layout import message_view
from fastvideo_comm.kernels import copy_all_valid_, strided_copy_

WIDTHS = (torch.int8, torch.bfloat16, torch.float32, torch.int64, torch.complex128)
CAPABILITIES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
# Every random layout is compiled: each capability gets its share of a test's examples.
A_SHARE = settings(max_examples=-(-settings().max_examples // len(CAPABILITIES)))


def _triton_copy(dst: Tensor, src: Tensor) -> Tensor:
    return strided_copy_(dst, src, impl="triton")


@pytest.fixture(scope="module", params=[*CAPABILITIES, pytest.param(GPU, marks=needs_gpu)])
def gpu(
    request: pytest.FixtureRequest, emulated_gpu_directory: Path
) -> Iterator[EmulatedGPU | None]:
    """The emulated GPU; None where a real one is used."""
    if request.param == GPU:
        yield None
    else:
        with emulated_gpu(emulated_gpu_directory, CAPABILITIES[request.param]) as gpu:
            yield gpu


@pytest.fixture(scope="module")
def device(gpu: EmulatedGPU | None) -> str:
    return GPU if gpu is None else "cpu"


def share(request: pytest.FixtureRequest, cases: Iterable[Any]) -> list[Any]:
    """The capabilities take turns with the cases of a test; a GPU gets all of them."""
    gpu, cases = request.node.callspec.params["gpu"], list(cases)
    return cases if gpu == GPU else cases[list(CAPABILITIES).index(gpu) :: len(CAPABILITIES)]


class TestCopies:
    @A_SHARE
    @given(pairs_of_layouts(), st.sampled_from(DTYPES), st.integers(0, 2**32))
    def test_every_layout_and_dtype_and_nothing_else(self, device, layouts, dtype, seed):
        assert_copies_like_torch(_triton_copy, *layouts, dtype, seed, device)

    def test_every_kind_of_layout(self, request, device):
        """Every capability copies each of them, in other widths."""
        for layouts, dtype in share(request, itertools.product(NAMED_PAIRS.values(), WIDTHS)):
            assert_copies_like_torch(_triton_copy, *layouts, dtype, 0, device)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(133, 131), (128, 192)], ids=["odd", "even"])
    def test_transposes_of_every_dtype(self, device, shape, dtype):
        rows, columns = shape
        dst, src = StridedLayout(shape, (columns, 1), 0), StridedLayout(shape, (1, rows), 0)
        assert_copies_like_torch(_triton_copy, dst, src, dtype, rows, device)

    @pytest.mark.parametrize("offset", [1, 2, 4, 8, 16])
    def test_at_any_address(self, device, offset):
        dst, src = StridedLayout((20_000,), (1,), offset), StridedLayout((20_000,), (1,), 3)
        assert_copies_like_torch(_triton_copy, dst, src, torch.int8, offset, device)

    def test_one_layout_at_other_addresses_and_alignments(self, request, device):
        """Which kernel serves a layout is remembered; which side of it is aligned belongs to it."""
        offsets = [(0, 1), (1, 0), (1, 1), (0, 0), (3, 2), (2, 3), (0, 1)]
        for dtype, (dst_offset, src_offset) in itertools.product(share(request, WIDTHS), offsets):
            buffer = (torch.arange(4096, device=device) % 121).to(dtype)
            src = buffer[src_offset:][:1500]
            dst = torch.zeros_like(buffer)
            _triton_copy(dst[dst_offset:][:1500], src)
            assert torch.equal(dst[dst_offset:][:1500], src)
            assert not dst[:dst_offset].any()
            assert not dst[dst_offset + 1500 :].any()

    def test_every_production_layout_moving_each_byte_once(self, request, gpu, device):
        """And wherever a warp touches 32 bytes of memory it wants all of them."""
        for name, dst_view, src_view in share(request, production_copies([104])):  # 13 a rank for 8
            dst, src = (_memory_for(view, device) for view in (dst_view, src_view))
            src.copy_(torch.randn(src.shape))
            before = _moved(gpu)
            assert torch.equal(_triton_copy(dst, src), src), name
            if gpu:
                moved = [after - b for after, b in zip(_moved(gpu), before, strict=True)]
                assert moved == [1, dst.nbytes, dst.nbytes, 2 * dst.nbytes // 32], name

    def test_q_k_and_v_with_fewer_heads_in_one_launch(self, gpu, device):
        x = torch.randn(1, 300, 24, 128, device=device).bfloat16()
        views = [message_view(heads, 2, 4, 1) for heads in (x, x[:, :, :8], x[:, :, 8:16])]
        pairs = [(torch.zeros(view.shape, dtype=x.dtype, device=device), view) for view in views]
        before = gpu.num_launches if gpu else 0
        copy_all_valid_(pairs, impl="triton")
        assert not gpu or gpu.num_launches == before + 1
        for dst, src in pairs:
            assert torch.equal(dst, src)

    @A_SHARE
    @given(st.lists(copies(), max_size=9), st.integers(0, 2**32))
    def test_pairs_of_any_layouts_beside_each_other(self, device, cases, seed):
        assert_all_copied_like_torch(cases, seed, device=device)

    def test_every_kind_of_layout_beside_every_other(self, request, device):
        dtypes = itertools.cycle((torch.bfloat16, torch.int8, torch.float32, torch.int64))
        cases = share(request, zip(NAMED_PAIRS.values(), dtypes, strict=False))
        assert_all_copied_like_torch(cases, 0, device=device)

    def test_a_layout_that_was_launched_before_is_launched_as_it_was(self, device):
        """Triton looks at the arguments of the first launch alone."""
        kernel = importlib.import_module("fastvideo_comm.kernels.tile_copy").tile_copy
        looks: list[object] = []
        kernel.add_pre_run_hook(look := lambda *_, **__: looks.append(None))
        try:
            for _ in range(3):
                src = torch.randn(37, 19, 5, device=device).transpose(0, 1)  # of no other test
                assert torch.equal(_triton_copy(torch.zeros(src.shape, device=device), src), src)
        finally:
            kernel.pre_run_hooks.remove(look)
        assert len(looks) == 1

    @pytest.mark.parametrize(
        ("shape", "strides"),
        [
            ((2, 64), (2**31 + 64, 1)),
            ((2, 64), (2**31 + 65, 1)),
            ((2, 3, 5, 64), (2**31 + 64, 400, 70, 1)),
            ((64, 65), (1, 2**25 + 64)),
            ((64, 65), (2**25 + 64, 3)),
        ],
        ids=["rows", "odd rows", "outer dim", "transpose", "single elements"],
    )
    @pytest.mark.parametrize("far", ["dst", "src"])
    def test_elements_that_are_2_31_apart(self, device, shape, strides, far):
        """On the CPU memory that nobody touches takes none."""
        buffer = torch.empty(2**31 + 2**26, dtype=torch.int8, device=device)
        there = buffer.as_strided(shape, strides)
        here = (torch.arange(there.numel(), device=device) % 251 - 125).to(torch.int8).view(shape)
        dst, src = (there, here) if far == "dst" else (torch.zeros_like(here), there)
        if far == "src":
            there.copy_(here)
        assert torch.equal(_triton_copy(dst, src), here)


def _moved(gpu: EmulatedGPU | None) -> list[int]:
    return [gpu.num_launches, gpu.loaded, gpu.stored, gpu.sectors] if gpu else []


def _memory_for(view: Tensor, device: str) -> Tensor:
    """Memory in the layout of a meta tensor."""
    layout = StridedLayout(tuple(view.shape), view.stride(), view.storage_offset())
    return layout.of(torch.zeros(layout.num_elements(), dtype=view.dtype, device=device))
