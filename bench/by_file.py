"""Published packages found without importing them, and single files of theirs executed.

Where a file imports logging, configuration or platform modules that drag in far more than torch,
`stand_ins` answers those imports while the file loads and is gone from `sys.modules` afterwards.
Packages are found, in this order, in the environment (`pip install --no-deps` of the dependency
group `peers`), in `.whl/` as wheels, and in the folder that `FASTVIDEO_COMM_PEERS` names, as wheels
or unpacked.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import re
import sys
import tempfile
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def _unpacked_wheels() -> tempfile.TemporaryDirectory[str]:
    """A folder for wheels to be unpacked into, gone with the process."""
    return tempfile.TemporaryDirectory(prefix="fastvideo_comm_peers_")


def _wheel_roots(distribution: str) -> Iterator[tuple[Path, str]]:
    """(folder that holds the package, version) for each copy in `.whl/` or FASTVIDEO_COMM_PEERS."""
    for folder in (ROOT / ".whl", Path(os.environ.get("FASTVIDEO_COMM_PEERS", ROOT / ".whl"))):
        for path in sorted(folder.glob(f"{distribution}-*"), reverse=True):
            version = re.match(rf"{distribution}-([^-]+?)(-|\.tar|$)", path.name)
            if version is None:
                continue
            if path.is_dir():
                yield path, version[1]
            elif path.suffix == ".whl":
                target = Path(_unpacked_wheels().name) / path.stem
                if not target.exists():
                    with zipfile.ZipFile(path) as wheel:
                        wheel.extractall(target)
                yield target, version[1]


def find(package: str, file: str) -> tuple[Path, str]:
    """The peer's file and its version, without importing the package."""
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or []) if spec else []:
        path = Path(location).parent / file
        if path.exists():
            return path, importlib.metadata.version(package)
    for root, version in _wheel_roots(package):
        if (root / file).exists():
            return root / file, version
    raise FileNotFoundError(
        f"no {file} in the environment or in .whl/ (`make wheels` puts it there)"
    )


def refused(*_: object, **__: object) -> Any:
    raise RuntimeError("a stand-in was called: the measured path should not reach it")


def never(*_: object, **__: object) -> bool:
    """Answers `is_flash_attn_available()` and the like."""
    return False


def logger(*_: object) -> Any:
    import logging

    return logging.getLogger("peer")


@contextlib.contextmanager
def stand_ins(**members: dict[str, Any] | types.ModuleType) -> Iterator[None]:
    """Put modules into `sys.modules`, dots written as `__`, and take them out again."""
    names = {name.replace("__", "."): content for name, content in members.items()}
    added: list[str] = []
    try:
        for name, content in names.items():
            for end in [i for i, char in enumerate(name) if char == "."] + [len(name)]:
                if name[:end] not in sys.modules:
                    module = types.ModuleType(name[:end])
                    module.__path__ = []  # a package without files: other submodules do not exist
                    sys.modules[name[:end]] = module
                    added.append(name[:end])
            if isinstance(content, types.ModuleType):
                sys.modules[name] = content
            else:
                vars(sys.modules[name]).update(content)
            parent, _, leaf = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], leaf, sys.modules[name])
        yield
    finally:
        for name in added:
            sys.modules.pop(name, None)


def load_file(module_name: str, path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path.name} must be a Python file")
    module = importlib.util.module_from_spec(spec)
    # Registered only while it runs: dataclasses look their module up by name.
    before = sys.modules.get(module_name)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        if before is None:
            del sys.modules[module_name]
        else:
            sys.modules[module_name] = before
    return module
