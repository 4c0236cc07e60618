"""`copy_all_valid_` is `copy_` of every pair, in one launch; the kernel run by the interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strided_layouts import NAMED_PAIRS, assert_all_copied_like_torch, copies
from tile_copy_module import Launch, imported_tile_copy, recorded_launches
from torch import Tensor

from fastvideo_comm.collective.layout import message_view
from fastvideo_comm.kernels import copy_all_valid_
from fastvideo_comm.kernels.strided_copy import IMPLEMENTATION_VARIABLE

pytest.importorskip("triton", reason="the kernel needs triton")


@pytest.fixture(scope="module", autouse=True)
def interpreted() -> Iterator[ModuleType]:
    with imported_tile_copy(interpret=True) as module:
        yield module


@pytest.fixture
def launches(interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Every launch of the kernel."""
    return recorded_launches(interpreted, monkeypatch)


def _heads_for_rank(
    num_heads: int, dtype: torch.dtype = torch.bfloat16, sequence: int = 6
) -> tuple[Tensor, Tensor]:
    """The messages of `[2, s, H, 16]` to 2 ranks, and where they are packed."""
    x = torch.randn(2, sequence, num_heads, 16).to(dtype)
    view = message_view(x, 2, 2, 1)
    return torch.zeros(view.shape, dtype=dtype), view


# Half a second each in Triton's interpreter; the compiled kernel copies many more.
@settings(max_examples=settings().max_examples // 5)
@pytest.mark.parametrize("impl", ["triton", "torch"])
@given(st.lists(copies(), max_size=5), st.integers(0, 2**32))
def test_pairs_of_any_layouts_and_dtypes_are_copied_and_nothing_else(impl, cases, seed):
    assert_all_copied_like_torch(cases, seed, impl)


def test_every_kind_of_layout_is_copied_beside_every_other():
    kinds = list(NAMED_PAIRS.values())
    dtypes = (torch.bfloat16, torch.int8, torch.float32)
    cases = [(pair, dtypes[index % 3]) for index, pair in enumerate(kinds)]
    assert_all_copied_like_torch(cases, 0)
    assert_all_copied_like_torch(cases[::-1], 1)


@pytest.mark.parametrize("heads", [(12, 12, 12), (12, 4, 4), (2, 10, 6)])
def test_q_k_and_v_are_packed_and_unpacked_in_one_launch_each(heads, launches):
    packs = [_heads_for_rank(num_heads) for num_heads in heads]
    copy_all_valid_(packs, impl="triton")
    assert len(launches) == 1
    assert all(torch.equal(wire, view) for wire, view in packs)
    unpacks = [(torch.zeros_like(view), wire) for wire, view in packs]
    copy_all_valid_(unpacks, impl="triton")
    assert len(launches) == 2
    for (back, _), (_, view) in zip(unpacks, packs, strict=True):
        assert torch.equal(back, view)


def test_pairs_of_different_dtypes_and_widths_are_one_launch(launches):
    pairs = [
        _heads_for_rank(4, torch.float32),
        _heads_for_rank(4, torch.float8_e5m2),
        (torch.zeros(33, dtype=torch.int8), torch.arange(34, dtype=torch.int8)[1:]),
        (torch.zeros(48, 32), torch.randn(32, 48).T),
    ]
    copy_all_valid_(pairs, impl="triton")
    assert [launch.access_bytes for launch in launches] == [(16, 16, 1, 16)]
    for dst, src in pairs:
        assert torch.equal(dst.view(torch.int8), src.contiguous().view(torch.int8))


def test_the_programs_of_a_launch_are_those_of_its_pairs(launches):
    pairs = [_heads_for_rank(4, sequence=200), _heads_for_rank(6, sequence=90)]
    for pair in pairs:
        copy_all_valid_([pair], impl="triton")
    alone = [launch.num_programs for launch in launches]
    launches.clear()
    copy_all_valid_(pairs, impl="triton")
    assert min(alone) > 1
    assert [launch.num_programs for launch in launches] == [sum(alone)]


def test_a_program_copies_a_tile_of_one_pair(interpreted, monkeypatch):
    """The programs of the first pair leave the second alone."""
    first, second = _heads_for_rank(4, sequence=200), _heads_for_rank(4, sequence=200)
    kernel = interpreted.tile_copy

    class Half:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return kernel[(grid[0] // 2,)]

    monkeypatch.setattr(interpreted, "tile_copy", Half())
    copy_all_valid_([first, second], impl="triton")
    assert torch.equal(*first)
    assert not second[0].any()


def test_empty_pairs_launch_nothing(launches):
    empty = (torch.empty(3, 0), torch.empty(3, 0))
    copy_all_valid_([], impl="triton")
    copy_all_valid_([empty, empty], impl="triton")
    assert launches == []
    pack = _heads_for_rank(4)
    copy_all_valid_([empty, pack, empty], impl="triton")
    assert [launch.access_bytes for launch in launches] == [(16,)]
    assert torch.equal(*pack)


def test_more_pairs_than_a_launch_takes_are_a_launch_for_every_eight(launches, interpreted):
    assert interpreted.MAX_PAIRS == 8
    pairs = [(torch.zeros(3), torch.randn(3)) for _ in range(17)]
    copy_all_valid_(pairs, impl="triton")
    assert [len(launch.access_bytes) for launch in launches] == [8, 8, 1]
    assert all(torch.equal(dst, src) for dst, src in pairs)


@pytest.mark.parametrize("num_tensors", [1, 2])
def test_a_grid_has_less_than_2_31_programs(interpreted, num_tensors):
    """What the first dim of a grid takes is 2**31 - 1."""
    tile = 8192  # bytes that one program copies of a long run

    def launch(num_programs: int) -> Any:
        lengths = [tile * (num_programs - num_tensors + 1), *[tile] * (num_tensors - 1)]
        return interpreted._plan_launch(*[((n,), (1,), (1,), 1, 0, 0) for n in lengths])

    assert launch(2**31 - 1).grid == (2**31 - 1, 1, 1)
    assert launch(2**31) is None


class OnDevice:
    """A tensor as the launcher sees it, on a device that is not there."""

    def __init__(self, tensor: Tensor, index: int) -> None:
        self._tensor = tensor
        self.device = torch.device("cuda", index)
        self.dtype, self.shape = tensor.dtype, tensor.shape

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)


def test_a_kernel_is_launched_on_the_device_that_it_was_compiled_on(interpreted, monkeypatch):
    current: list[int] = []
    compiled: list[int] = []
    launched: list[tuple[int, int]] = []

    @contextlib.contextmanager
    def device_index(index: int) -> Iterator[None]:
        current.append(index)
        yield
        current.pop()

    class Kernel:
        """Compiles at its first launch, and returns what it compiled."""

        def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Compiled]:
            def compile_and_run(*arguments: Any, **options: Any) -> Compiled:
                compiled.append(current[-1])
                return Compiled(current[-1])

            return compile_and_run

    class Compiled:
        def __init__(self, index: int) -> None:
            self.index = index

        def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
            return lambda *arguments: launched.append((self.index, current[-1]))

    monkeypatch.setattr(torch.accelerator, "device_index", device_index)
    monkeypatch.setattr(interpreted, "tile_copy", Kernel())
    interpreted._plan_launch.cache_clear()
    for index in (0, 1, 0, 1, 1):
        pair = [OnDevice(torch.zeros(6, 4).T, index), OnDevice(torch.zeros(4, 6), index)]
        interpreted.launch_tile_copies([tuple(pair)])
    interpreted._plan_launch.cache_clear()
    assert compiled == [0, 1]
    assert launched == [(0, 0), (1, 1), (1, 1)]


def test_a_pair_of_too_many_dims_is_copied_beside_another():
    """Padded in every dim on both sides, differently: nothing merges."""
    src = torch.arange(4**6).reshape([4] * 6)[:2, :2, :2, :2, :2, :3]
    dst = torch.zeros([4] * 6, dtype=src.dtype).permute(5, 4, 3, 2, 1, 0)[:2, :2, :2, :2, :2, :3]
    pack = _heads_for_rank(4)
    copy_all_valid_([pack, (dst, src), _heads_for_rank(6)], impl="triton")
    assert torch.equal(dst, src)
    assert torch.equal(*pack)


@pytest.mark.parametrize("impl", ["triton", "torch"])
class TestEitherImplementation:
    def test_counts_as_a_write_to_every_dst(self, impl):
        for written in (0, 1):
            x = torch.ones(3, requires_grad=True)
            ys = [x * 2, x * 3]
            product = ys[written] * ys[written]
            copy_all_valid_([(y, torch.zeros(3)) for y in ys], impl=impl)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                product.sum().backward()

    def test_is_not_seen_by_autograd(self, impl):
        leaf = torch.zeros(3, requires_grad=True)
        copy_all_valid_([(leaf, torch.ones(3, requires_grad=True) * 2)], impl=impl)
        assert leaf.is_leaf
        assert leaf.tolist() == [2, 2, 2]

    def test_resolves_conjugated_and_negated_sources(self, impl):
        x = torch.tensor([1 + 2j, 3 - 4j])
        pairs = [(torch.empty_like(x), x.conj()), (torch.empty(2), x.conj().imag)]
        copy_all_valid_(pairs, impl=impl)
        assert pairs[0][0].tolist() == [1 - 2j, 3 + 4j]
        assert pairs[1][0].tolist() == [-2, 4]


def test_the_environment_decides_for_auto(monkeypatch, launches):
    pairs = [(torch.zeros(2), torch.ones(2)), (torch.zeros(3), torch.ones(3))]
    monkeypatch.setenv(IMPLEMENTATION_VARIABLE, "triton")
    copy_all_valid_(pairs)
    assert len(launches) == 1
    monkeypatch.setenv(IMPLEMENTATION_VARIABLE, "torch")
    copy_all_valid_(pairs)
    assert len(launches) == 1
    monkeypatch.setenv(IMPLEMENTATION_VARIABLE, "fast")
    with pytest.raises(ValueError, match=r"FASTVIDEO_COMM_IMPL\) must be one of .*, got 'fast'$"):
        copy_all_valid_(pairs)


def test_triton_refuses_a_pair_on_another_device():
    meta = (torch.zeros(2, device="meta"), torch.ones(2, device="meta"))
    with pytest.raises(ValueError, match=r"^impl='triton' must be given accelerator .*, got meta$"):
        copy_all_valid_([(torch.zeros(2), torch.ones(2)), meta], impl="triton")
