"""The kernel native on an accelerator."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from accelerator import GPU, needs_gpu
from production_copies import SEQUENCES, production_copies
from strided_layouts import (
    StridedLayout,
)
from torch import Tensor

from fastvideo_comm.collective.layout import message_view
from fastvideo_comm.kernels import copy_all_valid_, strided_copy_
from fastvideo_comm.kernels.strided_copy import IMPLEMENTATION_VARIABLE, SMALL_COPY_BYTES

# Rows of 1024 bytes that are more than 2**31 together.
ROWS = 2**21 + 16


def _triton_copy(dst: Tensor, src: Tensor) -> Tensor:
    return strided_copy_(dst, src, impl="triton")


class TestNativeKernel:
    pytestmark = needs_gpu

    def test_copies_every_production_layout(self):
        for name, dst_view, src_view in production_copies():
            if "B=3" in name or not _is_shortest_sequence(name):
                continue
            dst, src = (_on_gpu(view) for view in (dst_view, src_view))
            src.copy_(random_like(src))
            assert torch.equal(_triton_copy(dst, src), src), name

    @pytest.mark.parametrize(
        "pair",
        [
            lambda x: (x.new_empty(2, ROWS, 512), message_view(x.view(ROWS, 1024), 1, 2, 0)),
            lambda x: (x.new_empty(ROWS, 1024), x.view(1024, ROWS).T),
            lambda x: (x.new_empty(2, 64), x.as_strided((2, 64), (2**31 + 64, 1))),
            lambda x: (x.new_empty(2**31 + 5), x[1 : 2**31 + 6]),
        ],
        ids=["pack", "transpose", "rows 2**31 apart", "odd address"],
    )
    def test_offsets_over_2_31_are_right(self, pair: Callable[[Tensor], tuple[Tensor, Tensor]]):
        free, _ = torch.cuda.mem_get_info()
        if free < 12 * 2**30:
            pytest.skip(f"needs 12 GiB of free GPU memory, got {free / 2**30:.1f}")
        x = torch.randint(-128, 128, (ROWS * 1024,), dtype=torch.int8, device=GPU)
        dst, src = pair(x)
        dst.fill_(77)
        _triton_copy(dst, src)
        for part, expected in zip(dst.chunk(8, -1), src.chunk(8, -1), strict=True):
            assert torch.equal(part, expected)

    def test_copies_q_k_and_v_in_one_launch(self):
        x = torch.zeros(1, 300, 24, 128, dtype=torch.bfloat16, device=GPU)
        views = [message_view(heads, 2, 4, 1) for heads in (x, x[:, :, :8], x[:, :, 8:16])]
        pairs = [
            (torch.empty_like(view, memory_format=torch.contiguous_format), view) for view in views
        ]
        copy_all_valid_(pairs, impl="triton")  # compiles
        x.copy_(random_like(x))
        with torch.profiler.profile(acc_events=True) as profile:  # else torch 2.11 warns
            copy_all_valid_(pairs, impl="triton")
            torch.cuda.synchronize()
        kernels = [
            e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA
        ]
        assert kernels == ["tile_copy"]
        for wire, view in pairs:
            assert torch.equal(wire, view)

    def test_captured_copies_replay_on_new_values(self):
        copies = _a_pack_an_unpack_and_a_transpose()
        for dst, src in copies:
            _triton_copy(dst, src)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for dst, src in copies:
                _triton_copy(dst, src)
        for _ in range(2):
            for dst, src in copies:
                src.copy_(random_like(src))
                dst.zero_()
            graph.replay()
            for dst, src in copies:
                assert torch.equal(dst, src)

    @pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
    def test_does_not_wait_for_the_device(self):
        copies = _a_pack_an_unpack_and_a_transpose()
        for dst, src in copies:
            _triton_copy(dst, src)
        torch.cuda.set_sync_debug_mode("error")
        try:
            with pytest.raises(RuntimeError, match="synchronizing"):
                copies[0][0].sum().item()  # the mode does report
            for dst, src in copies:
                _triton_copy(dst, src)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_allocates_nothing(self):
        copies = _a_pack_an_unpack_and_a_transpose()
        for dst, src in copies:
            _triton_copy(dst, src)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        for dst, src in copies:
            _triton_copy(dst, src)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before

    def test_runs_on_the_current_stream(self):
        src = torch.zeros(2**26, dtype=torch.int8, device=GPU)
        dst = torch.zeros_like(src)
        stream = torch.cuda.Stream()
        assert not _triton_copy(dst, src).any()  # compiles, and takes the memory of `any`
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(500_000_000)  # a quarter of a second
            src.fill_(1)
            _triton_copy(dst, src)
        assert not dst.any()  # the default stream runs ahead of the one that sleeps
        stream.synchronize()
        assert dst.all()

    def test_runs_on_the_device_of_its_tensors(self):
        if torch.cuda.device_count() < 2:
            pytest.skip("needs 2 GPUs")
        src = torch.randn(1000, 1000, device="cuda:1")
        assert torch.cuda.current_device() == 0
        assert torch.equal(_triton_copy(torch.empty_like(src), src.T), src.T)
        assert torch.cuda.current_device() == 0

    def test_auto_takes_the_kernel_from_the_size_on_at_which_it_pays(self, monkeypatch):
        tile_copy = importlib.import_module("fastvideo_comm.kernels.tile_copy")
        monkeypatch.delenv(IMPLEMENTATION_VARIABLE, raising=False)
        copied: list[int] = []
        monkeypatch.setattr(
            tile_copy,
            "launch_tile_copies",
            lambda pairs: copied.extend(dst.nbytes for dst, _ in pairs),
        )
        for num_bytes in (SMALL_COPY_BYTES - 1, SMALL_COPY_BYTES):
            x = torch.zeros(num_bytes, dtype=torch.uint8, device=GPU)
            strided_copy_(torch.empty_like(x), x)
        assert copied == [SMALL_COPY_BYTES]


def _a_pack_an_unpack_and_a_transpose() -> list[tuple[Tensor, Tensor]]:
    x = torch.zeros(1, 300, 12, 128, dtype=torch.bfloat16, device=GPU)
    view = message_view(x, 2, 4, 1)
    y = torch.zeros_like(x)
    square = torch.zeros(640, 512, device=GPU)
    copies = [
        (torch.empty(view.shape, dtype=x.dtype, device=GPU), view),
        (message_view(y, 2, 4, 1), torch.zeros(view.shape, dtype=x.dtype, device=GPU)),
        (torch.empty(512, 640, device=GPU), square.T),
    ]
    for _, src in copies:
        src.copy_(random_like(src))
    return copies


def _is_shortest_sequence(name: str) -> bool:
    world_size = int(name.rpartition("P=")[2])
    return f" s={-(-SEQUENCES[0] // world_size)} " in name


def _on_gpu(view: Tensor) -> Tensor:
    """Memory in the layout of a meta tensor."""
    layout = StridedLayout(tuple(view.shape), view.stride(), view.storage_offset())
    return layout.of(torch.empty(layout.num_elements(), dtype=view.dtype, device=GPU))


def random_like(tensor: Tensor) -> Tensor:
    """Finite random values: `equal` compares them as they are."""
    return torch.randn(tensor.shape, device=tensor.device).to(tensor.dtype)
