"""The kernel's module, interpreted or compiled, whatever was imported before."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

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
        before = sys.modules.pop(NAME, None)
        try:
            yield importlib.import_module(NAME)
        finally:
            del sys.modules[NAME]
            if before is not None:
                sys.modules[NAME] = before
