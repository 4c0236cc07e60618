"""The peers' packages, installed or as the wheels that `make wheels` fetches; Python reads both."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path

WHEELS = Path(__file__).resolve().parents[2] / ".whl"


def is_there(package: str) -> bool:
    """Found, and from now on importable in this process; not imported."""
    if importlib.util.find_spec(package) is not None:
        return True
    folders = (WHEELS, Path(os.environ.get("FASTVIDEO_COMM_PEERS", WHEELS)))
    wheels = [wheel for folder in folders for wheel in sorted(folder.glob(f"{package}-*.whl"))]
    if not wheels:
        return False
    sys.path.append(str(wheels[-1]))  # last: it hides nothing
    importlib.invalidate_caches()
    return importlib.util.find_spec(package) is not None


def how_to_install(package: str) -> str:
    """The reason of a skipped test."""
    return f"{package} is not here: make wheels"
