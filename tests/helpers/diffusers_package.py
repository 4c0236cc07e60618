"""diffusers' real modules, without the packages that they only name.

While it is imported, packages that are missing are answered by modules of placeholders, and
diffusers' own check of its dependencies is left out.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any

import peer_wheels

_UNUSED = (
    *("httpx", "huggingface_hub", "importlib_metadata", "regex", "requests", "safetensors"),
    *("tqdm", "yaml"),
)
_CHECK = "diffusers.dependency_versions_check"


def attention_dispatch() -> Any:
    """`diffusers.models.attention_dispatch`."""
    return module("models.attention_dispatch")


def module(name: str) -> Any:
    """A module of diffusers, by its name within the package."""
    name = f"diffusers.{name}"
    if name in sys.modules:
        return sys.modules[name]
    assert peer_wheels.is_there("diffusers")
    check = types.ModuleType(_CHECK)
    check.dep_version_check = lambda *_, **__: None
    sys.modules[_CHECK] = check
    finder = _Finder()
    sys.meta_path.append(finder)  # last: what is installed is found before
    try:
        # Some of its schedulers import all of scipy.
        importlib.import_module("diffusers.utils.import_utils")._scipy_available = False
        return importlib.import_module(name)
    finally:
        sys.meta_path.remove(finder)
        for each in [m for m, value in sys.modules.items() if isinstance(value, _Placeholders)]:
            del sys.modules[each]


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] not in _UNUSED:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Placeholders(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Placeholders(types.ModuleType):
    """Constants are text, classes are empty, functions return their argument, as decorators do."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.isupper():
            return "/nonexistent"
        return type(name, (), {}) if name[:1].isupper() else lambda value=None, *_, **__: value
