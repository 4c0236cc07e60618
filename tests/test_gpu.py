"""The kernel native on an accelerator, and all ranks as threads on one device.

The ranks run on the CPU too: what works there is what is run on the GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from accelerator import DEVICES, GPU, needs_gpu
from hypothesis import given
from hypothesis import strategies as st
from production_copies import SEQUENCES, production_copies
from rank_threads import run_ranks
from strided_layouts import (
    DTYPES,
    NAMED_PAIRS,
    StridedLayout,
    assert_copies_like_torch,
    pairs_of_layouts,
)
from torch import Tensor

from fastvideo_comm import DeviceCommunicatorBase, DistributedAutograd
from fastvideo_comm.kernels import copy_all_valid_, strided_copy_
from fastvideo_comm.kernels.strided_copy import IMPLEMENTATION_VARIABLE, SMALL_COPY_BYTES
from fastvideo_comm.layout import message_view

# Rows of 1024 bytes that are more than 2**31 together.
ROWS = 2**21 + 16


def _triton_copy(dst: Tensor, src: Tensor) -> Tensor:
    return strided_copy_(dst, src, impl="triton")


class TestNativeKernel:
    pytestmark = needs_gpu

    @given(pairs_of_layouts(), st.sampled_from(DTYPES), st.integers(0, 2**32))
    def test_copies_every_layout_and_dtype_and_nothing_else(self, layouts, dtype, seed):
        assert_copies_like_torch(_triton_copy, *layouts, dtype, seed, GPU)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, torch.complex128])
    @pytest.mark.parametrize("layouts", NAMED_PAIRS.values(), ids=NAMED_PAIRS)
    def test_copies_every_kind_of_layout(self, layouts, dtype):
        assert_copies_like_torch(_triton_copy, *layouts, dtype, 0, GPU)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(1003, 1001), (1024, 768)], ids=["odd", "even"])
    def test_transposes_every_dtype(self, shape, dtype):
        rows, columns = shape
        dst, src = StridedLayout(shape, (columns, 1), 0), StridedLayout(shape, (1, rows), 0)
        assert_copies_like_torch(_triton_copy, dst, src, dtype, rows, GPU)

    @pytest.mark.parametrize("offset", [1, 2, 4, 8, 16])
    def test_copies_at_any_address(self, offset):
        dst, src = StridedLayout((99_999,), (1,), offset), StridedLayout((99_999,), (1,), 3)
        assert_copies_like_torch(_triton_copy, dst, src, torch.int8, offset, GPU)

    def test_copies_every_production_layout(self):
        for name, dst_view, src_view in production_copies():
            if "B=3" in name or not _is_shortest_sequence(name):
                continue
            dst, src = (_on_gpu(view) for view in (dst_view, src_view))
            src.copy_(_random_like(src))
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
        x.copy_(_random_like(x))
        with torch.profiler.profile(acc_events=True) as profile:  # else torch 2.11 warns
            copy_all_valid_(pairs, impl="triton")
            torch.cuda.synchronize()
        kernels = [
            e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA
        ]
        assert kernels == ["tile_copy"]
        for wire, view in pairs:
            assert torch.equal(wire, view)

    def test_copies_pairs_of_every_kind_beside_each_other(self):
        pairs = _a_pack_an_unpack_and_a_transpose()
        odd = torch.arange(-100, 101, dtype=torch.int8, device=GPU)
        pairs.append((torch.zeros_like(odd[1:]), odd[1:]))
        copy_all_valid_(pairs, impl="triton")
        for dst, src in pairs:
            assert torch.equal(dst, src)

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
                src.copy_(_random_like(src))
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
        src.copy_(_random_like(src))
    return copies


def _is_shortest_sequence(name: str) -> bool:
    world_size = int(name.rpartition("P=")[2])
    return f" s={-(-SEQUENCES[0] // world_size)} " in name


def _on_gpu(view: Tensor) -> Tensor:
    """Memory in the layout of a meta tensor."""
    layout = StridedLayout(tuple(view.shape), view.stride(), view.storage_offset())
    return layout.of(torch.empty(layout.num_elements(), dtype=view.dtype, device=GPU))


def _random_like(tensor: Tensor) -> Tensor:
    """Finite random values: `equal` compares them as they are."""
    return torch.randn(tensor.shape, device=tensor.device).to(tensor.dtype)


# Ranks as threads. Values are small integers in fp64, so that sums are exact in any order.

Job = Callable[[DeviceCommunicatorBase], object]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == GPU:  # these tensors are too small for "auto"
        monkeypatch.setenv(IMPLEMENTATION_VARIABLE, "triton")
    return request.param


def _values(*shape: int, device: str) -> Tensor:
    count = torch.Size(shape).numel()
    return ((torch.arange(count, dtype=torch.float64, device=device) * 7) % 23 - 11).view(shape)


def _run(world_size: int, device: str, job: Job) -> list[object]:
    def rank_job(group: dist.ProcessGroup) -> object:
        communicator = DeviceCommunicatorBase(group, torch.device(device))
        try:
            return job(communicator)
        finally:
            communicator.destroy()

    return run_ranks(world_size, rank_job)


def _forward_and_backward(
    communicator: DeviceCommunicatorBase,
    op: Callable[[Tensor], Tensor],
    input_: Tensor,
    grad_output: Tensor,
) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of the sum over ranks of `(output * grad_output).sum()`."""
    leaf = input_.detach().requires_grad_()
    output = op(leaf)
    (grad,) = torch.autograd.grad(output, leaf, grad_output.contiguous())
    return output.detach(), grad


class TestCommunicatorOnOneDevice:
    pytestmark = needs_gpu

    def test_every_op_is_captured_and_replayed(self, tmp_path):
        """With NCCL at world size 1: the public ops, and the exchanges behind them."""
        store = dist.FileStore(str(tmp_path / "store"), 1)
        device = torch.device(GPU, 0)
        dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=device)
        try:
            group = dist.group.WORLD
            communicator = DeviceCommunicatorBase(group, device, group)
            communicator.warmup([(1, 6, 4, 128), (2, 6, 4, 128)])
            x = torch.zeros(2, 6, 4, 128, device=device)
            strided = torch.zeros(2, 4, 6, 128, device=device).transpose(1, 2)

            def ops() -> list[Tensor]:
                autograd = DistributedAutograd
                outputs = [
                    communicator.all_to_all_4D(x),
                    communicator.all_gather(x),
                    communicator.all_reduce(x),
                ]
                for input_ in (x, strided, x[:1], strided[:1]):
                    outputs += [
                        autograd.AllToAll4D.apply(group, input_, 1, 2, 1),
                        autograd.AllToAll4D.apply(group, input_, 1, 1, 2),
                        autograd.AllGather.apply(group, input_, 1, 2),
                        autograd.ReduceScatter.apply(group, input_, 1, 2),
                        autograd.AllReduce.apply(group, input_),
                        autograd.Slice.apply(group, input_, 1, 2, False),
                    ]
                return outputs

            expected = [x] * 3 + [
                each for each in (x, strided, x[:1], strided[:1]) for _ in range(6)
            ]
            ops()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = ops()
            for _ in range(2):
                x.copy_(_random_like(x))
                strided.copy_(_random_like(strided))
                graph.replay()
                for output, input_ in zip(outputs, expected, strict=True):
                    assert torch.equal(output, input_)
        finally:
            dist.destroy_process_group()

    def test_after_warmup_nothing_compiles(self, monkeypatch):
        monkeypatch.setenv(IMPLEMENTATION_VARIABLE, "triton")
        kernel = importlib.import_module("fastvideo_comm.kernels.tile_copy").tile_copy
        shape = (1, 6, 8, 128)

        def num_kernels() -> int:
            return sum(len(caches[0]) for caches in kernel.device_caches.values())

        def job(communicator: DeviceCommunicatorBase) -> tuple[int, int]:
            communicator.warmup([shape], [torch.bfloat16])
            before = num_kernels()
            x = torch.rand(shape, device=communicator.device).bfloat16().requires_grad_()
            y = communicator.all_to_all_4D(communicator.all_to_all_4D(x), 1, 2)
            y.square().sum().backward()
            return before, num_kernels()

        for before, after in _run(2, GPU, job):
            assert 0 < before == after


@pytest.mark.parametrize("world_size", [2, 3, 4])
class TestRanksAsThreads:
    @pytest.mark.parametrize("batch", [1, 2])
    @pytest.mark.parametrize("dims", [(2, 1), (1, 2)])
    def test_all_to_all_4D_and_its_gradient_are_slices_of_the_global_tensor(
        self, world_size, device, dims, batch
    ):
        scatter, gather = dims
        x = _values(batch, 3 * world_size, 5 * world_size, 4, device=device)
        g = _values(*x.shape, device=device) * 2

        def job(communicator: DeviceCommunicatorBase) -> object:
            rank = communicator.rank
            return _forward_and_backward(
                communicator,
                lambda leaf: communicator.all_to_all_4D(leaf, scatter, gather),
                x.chunk(world_size, gather)[rank],  # not contiguous for (1, 2)
                g.chunk(world_size, scatter)[rank],
            )

        for rank, (output, grad) in enumerate(_run(world_size, device, job)):
            assert torch.equal(output, x.chunk(world_size, scatter)[rank])
            assert torch.equal(grad, g.chunk(world_size, gather)[rank])
            assert output.is_contiguous()

    @pytest.mark.parametrize("dim", [0, 1, 2, -1])
    def test_all_gather_joins_and_its_gradient_is_the_sum_of_the_parts(
        self, world_size, device, dim
    ):
        shape = [2, 3, 4]
        shape[dim] *= world_size
        x = _values(*shape, device=device)

        def job(communicator: DeviceCommunicatorBase) -> object:
            return _forward_and_backward(
                communicator,
                lambda leaf: communicator.all_gather(leaf, dim),
                x.chunk(world_size, dim)[communicator.rank],
                x * (communicator.rank + 1),
            )

        total = x * sum(range(1, world_size + 1))
        for rank, (output, grad) in enumerate(_run(world_size, device, job)):
            assert torch.equal(output, x)
            assert torch.equal(grad, total.chunk(world_size, dim)[rank])

    @pytest.mark.parametrize("dim", [0, 1, -1])
    def test_parts_of_any_size_are_joined_and_dealt_out(self, world_size, device, dim):
        shape, sizes = [2, 3, 4], [3, 0, 2, 2][:world_size]
        shape[dim] = sum(sizes)
        x = _values(*shape, device=device)
        parts = x.split(sizes, dim)

        def job(communicator: DeviceCommunicatorBase) -> object:
            rank = communicator.rank
            joined = _forward_and_backward(
                communicator,
                lambda leaf: communicator.all_gather(leaf, dim, gather_sizes=sizes),
                parts[rank],
                x * (rank + 1),
            )
            dealt = _forward_and_backward(
                communicator,
                lambda leaf: communicator.slice(leaf, dim, scatter_sizes=sizes),
                x,
                parts[rank],
            )
            return *joined, *dealt

        total = x * sum(range(1, world_size + 1))
        for rank, (joined, grad, part, whole) in enumerate(_run(world_size, device, job)):
            assert torch.equal(joined, x)
            assert torch.equal(grad, total.split(sizes, dim)[rank])
            assert torch.equal(part, parts[rank])
            assert torch.equal(whole, x)

    @pytest.mark.parametrize("op", ["SUM", "AVG", "MAX", "MIN", "PRODUCT"])
    def test_all_reduce_and_its_gradient_are_those_of_the_stacked_tensor(
        self, world_size, device, op
    ):
        x = _values(world_size, 3, 5, device=device)
        g = _values(world_size, 3, 5, device=device) % 3
        stacked = x.clone().requires_grad_()
        expected = {
            "SUM": lambda: stacked.sum(0),
            "AVG": lambda: stacked.sum(0) / world_size,
            "MAX": lambda: stacked.amax(0),  # ties share the gradient equally
            "MIN": lambda: stacked.amin(0),
            "PRODUCT": lambda: stacked.prod(0),
        }[op]()
        (expected_grad,) = torch.autograd.grad(expected, stacked, g.sum(0))

        def job(communicator: DeviceCommunicatorBase) -> object:
            rank = communicator.rank
            reduce_op = getattr(dist.ReduceOp, op)
            return _forward_and_backward(
                communicator,
                lambda leaf: communicator.all_reduce(leaf, reduce_op),
                x[rank].T,
                g[rank].T,
            )

        for rank, (output, grad) in enumerate(_run(world_size, device, job)):
            # Division by P and products round, each side in its own order.
            torch.testing.assert_close(output.T, expected.detach(), rtol=1e-14, atol=0)
            torch.testing.assert_close(grad.T, expected_grad[rank], rtol=1e-14, atol=1e-14)

    @pytest.mark.parametrize("scale_grad", [False, True])
    def test_slice_and_its_gradient_are_parts_and_their_join(self, world_size, device, scale_grad):
        x = _values(2, 4 * world_size, 3, device=device)
        g = _values(*x.shape, device=device)

        def job(communicator: DeviceCommunicatorBase) -> object:
            return _forward_and_backward(
                communicator,
                lambda leaf: communicator.slice(leaf, 1, scale_grad=scale_grad),
                x,
                g.chunk(world_size, 1)[communicator.rank],
            )

        for rank, (output, grad) in enumerate(_run(world_size, device, job)):
            assert torch.equal(output, x.chunk(world_size, 1)[rank])
            assert torch.equal(grad, g / world_size if scale_grad else g)

    def test_gather_gives_the_join_to_one_rank(self, world_size, device):
        x = _values(2, 3 * world_size, device=device)

        def job(communicator: DeviceCommunicatorBase) -> object:
            part = x.chunk(world_size, -1)[communicator.rank]
            return communicator.gather(part, dst=world_size - 1)

        *others, gathered = _run(world_size, device, job)
        assert others == [None] * (world_size - 1)
        assert torch.equal(gathered, x)

    def test_a_tensor_goes_round_the_ring(self, world_size, device):
        x = _values(world_size, 4, 3, device=device).transpose(1, 2)

        def job(communicator: DeviceCommunicatorBase) -> object:
            communicator.send(x[communicator.rank])
            return communicator.recv(x.shape[1:], x.dtype)

        for rank, received in enumerate(_run(world_size, device, job)):
            assert torch.equal(received, x[rank - 1])

    def test_attention_over_the_ranks_is_attention_in_one(self, world_size, device):
        """q, k, v as chunks of a fused projection, out to all heads and back; with gradients."""
        batch, length, heads, head_dim = 2, 4 * world_size, 2 * world_size, 8
        torch.manual_seed(0)
        shape = (batch, length, 3 * heads * head_dim)
        qkv = torch.randn(shape, dtype=torch.float64, device=device)
        g = torch.randn(batch, length, heads, head_dim, dtype=torch.float64, device=device)

        def attend(qkv: Tensor, to_heads: Callable[[Tensor], Tensor]) -> Tensor:
            q, k, v = (
                to_heads(part.unflatten(-1, (heads, head_dim))).transpose(1, 2)
                for part in qkv.chunk(3, dim=-1)
            )
            weights = (q @ k.transpose(-1, -2)).softmax(-1)
            return (weights @ v).transpose(1, 2)

        leaf = qkv.clone().requires_grad_()
        expected = attend(leaf, lambda part: part)
        (expected_grad,) = torch.autograd.grad(expected, leaf, g)

        def job(communicator: DeviceCommunicatorBase) -> object:
            rank = communicator.rank
            return _forward_and_backward(
                communicator,
                lambda leaf: communicator.all_to_all_4D(
                    attend(leaf, communicator.all_to_all_4D), 1, 2
                ),
                qkv.chunk(world_size, 1)[rank],
                g.chunk(world_size, 1)[rank],
            )

        outputs, grads = zip(*_run(world_size, device, job), strict=True)
        # The same sums in other matrix shapes: fp64 rounding.
        torch.testing.assert_close(torch.cat(outputs, 1), expected.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.cat(grads, 1), expected_grad, rtol=1e-12, atol=1e-12)


def test_the_error_of_one_rank_ends_all():
    def job(communicator: DeviceCommunicatorBase) -> object:
        if communicator.rank == 1:
            raise KeyError("rank 1")
        return communicator.all_gather(torch.zeros(2))

    with pytest.raises(KeyError, match="rank 1"):
        _run(2, "cpu", job)
