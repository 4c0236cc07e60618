"""FastVideo's real modules, without the packages that the tested ones only name.

`fastvideo/__init__.py` imports the whole product; here the parent package is an empty one at the
same place, so that every submodule that is imported is FastVideo's own file. What `fastvideo.utils`
imports and this test does not use is answered by modules whose names raise when they are called.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from typing import Any

import peer_wheels

# Imported by fastvideo/utils.py (FastVideo 0.2.1) for functions that are not called here.
_UNUSED = (
    "cloudpickle",
    "imageio",
    "torchvision",
    "torchvision.utils",
    "yaml",
    "diffusers",
    "diffusers.loaders",
    "diffusers.loaders.lora_base",
    "huggingface_hub",
    "remote_pdb",
)


def prepare() -> None:
    """After this, `import fastvideo.distributed` works."""
    if "fastvideo" in sys.modules:
        return
    os.environ.setdefault("FASTVIDEO_CONFIGURE_LOGGING", "0")
    os.environ["FASTVIDEO_ATTENTION_BACKEND"] = "TORCH_SDPA"
    assert peer_wheels.is_there("fastvideo")
    specification = importlib.util.find_spec("fastvideo")
    package = types.ModuleType("fastvideo")
    package.__spec__ = specification  # who asks whether it is there finds it
    package.__path__ = list(specification.submodule_search_locations)
    sys.modules["fastvideo"] = package
    before = {name: sys.modules.get(name) for name in _UNUSED}
    sys.modules.update({name: _Unused(name) for name in _UNUSED})
    try:
        importlib.import_module("fastvideo.utils")
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def make_groups(size: int) -> Any:
    """FastVideo's groups over the 4 ranks: tensor and sequence parallel of `size`."""
    prepare()
    state = importlib.import_module("fastvideo.distributed.parallel_state")
    importlib.import_module("fastvideo.attention")
    if state._WORLD is None:
        state._WORLD = state.init_world_group([0, 1, 2, 3], 0, "gloo")
    state.destroy_model_parallel()  # of a test that failed
    state.initialize_model_parallel(size, size, backend="gloo")
    return state


class _Unused(types.ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*_: Any, **__: Any) -> Any:
            raise AssertionError(f"{self.__name__}.{name} is not installed, and was called")

        return refuse
