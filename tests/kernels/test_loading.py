"""Kernels are loaded on the device that they run on, one at a time, and looked for once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton")

from posted_ranks import Kernels, imported_kernels

from fastvideo_comm.kernels.loading import load, loading


@pytest.fixture
def kernels() -> Iterator[Kernels]:
    with imported_kernels() as kernels:
        yield kernels


class Devices:
    """Devices that are not there: which one is current, where what was loaded and launched."""

    def __init__(self) -> None:
        self.current: list[int | None] = [None]
        self.loaded: list[int | None] = []
        self.launched: list[tuple[int | None, int | None]] = []

    @contextlib.contextmanager
    def device_index(self, index: int | None) -> Iterator[None]:
        self.current.append(index)
        yield
        self.current.pop()

    def load(self, *_: Any, **__: Any) -> Any:
        device = self.current[-1]
        self.loaded.append(device)

        def launch(*_: Any) -> None:
            self.launched.append((device, self.current[-1]))

        class Loaded:
            def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
                return launch

        return Loaded()


@pytest.fixture
def devices(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> Devices:
    made = Devices()
    monkeypatch.setattr(torch.accelerator, "device_index", made.device_index)
    for module in (kernels.posts, kernels.deliver):
        monkeypatch.setattr(module, "load", made.load)
    return made


class On:
    """A tensor as a launcher sees it, on a device that is not there."""

    def __init__(self, tensor: torch.Tensor, index: int) -> None:
        self._tensor = tensor
        self.device = torch.device("cuda", index)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)


ONCE_EACH = [(0, 0), (1, 1), (0, 0), (1, 1)]


@pytest.mark.parametrize("name", ["launch_post", "launch_done"])
def test_a_post_and_a_done_run_on_the_device_that_they_were_loaded_on(kernels, devices, name):
    launch = {
        "launch_post": lambda words: kernels.posts.launch_post(words, 16, 3),
        "launch_done": lambda words: kernels.posts.launch_done(words),
    }[name]
    for index in (0, 1, 0, 1):
        words = kernels.posts.Words(*[On(torch.zeros(2).long(), index) for _ in range(4)], rank=0)
        launch(words)
    assert devices.loaded == [0, 1]
    assert devices.launched == ONCE_EACH


def test_a_delivery_runs_on_the_device_that_it_was_loaded_on(kernels, devices, monkeypatch):
    monkeypatch.setattr(kernels.deliver.triton, "reinterpret", lambda tensor, _: tensor)
    src = torch.zeros(2, 64)
    for index in (0, 1, 0, 1):
        places = On(torch.zeros(2).long(), index)
        kernels.deliver.launch_deliveries(places, [kernels.deliver.Delivery(src, 0, 0, 0, (1,))])
    assert devices.loaded == [0, 1]
    assert devices.launched == ONCE_EACH


def test_a_kernel_is_compiled_and_loaded_by_one_thread_at_a_time_and_run_by_any():
    held: list[bool] = []

    class Compiled:
        def __getitem__(self, grid: tuple[int, int, int]) -> None:
            held.append(loading.locked())

    def warmup(*arguments: Any, grid: tuple[int, int, int], **settings: Any) -> Compiled:
        assert (arguments, grid) == ((1, 2), (3, 1, 1))
        assert settings == {"num_warps": 4, "enable_fp_fusion": False}
        held.append(loading.locked())
        return Compiled()

    compiled = load(SimpleNamespace(warmup=warmup), 1, 2, grid=(3, 1, 1), num_warps=4)
    assert type(compiled) is Compiled
    assert held == [True, True]
    assert not loading.locked()
