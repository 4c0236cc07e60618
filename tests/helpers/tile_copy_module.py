"""The kernel's module, interpreted or compiled, whatever was imported before; its launches."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import pytest

NAME = "fastvideo_comm.kernels.tile_copy"


@contextlib.contextmanager
def imported_tile_copy(*, interpret: bool) -> Iterator[ModuleType]:
    """The module while `strided_copy_` uses it, imported anew and forgotten afterwards.

    `triton.jit` decides when it decorates whether it interprets or compiles, by a knob; and
    `strided_copy_` imports the module when it launches.
    """
    import triton

    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = interpret
        with imported_anew(NAME) as module:
            yield module


@contextlib.contextmanager
def imported_anew(name: str) -> Iterator[ModuleType]:
    """A module as its first import makes it; forgotten afterwards."""
    before = sys.modules.pop(name, None)
    try:
        yield importlib.import_module(name)
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


class Launch(NamedTuple):
    """One launch of `tile_copy`."""

    num_programs: int
    access_bytes: tuple[int, ...]  # of each pair


def recorded_launches(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Every launch of the module's kernel from here on, as it happens."""
    recorded: list[Launch] = []
    kernel = module.tile_copy

    class Recorder:
        def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
            def run(dsts: Any, *arguments: Any, TILES: Any, **options: Any) -> None:  # noqa: N803
                access_bytes = [
                    dst.dtype.itemsize * tile[0] for dst, tile in zip(dsts, TILES, strict=True)
                ]
                recorded.append(Launch(grid[0], tuple(access_bytes)))
                kernel[grid](dsts, *arguments, TILES=TILES, **options)

            return run

    monkeypatch.setattr(module, "tile_copy", Recorder())
    return recorded
