"""Small tensors that take the way of large ones, so that tests of that way are fast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from fastvideo_comm.collective import messages


@contextlib.contextmanager
def entry_by_entry() -> Iterator[None]:
    """Every batch entry is an exchange of its own, however small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(messages, "TOGETHER_BYTES", 0)
        yield
