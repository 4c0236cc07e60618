"""Profiles and fixtures of the whole suite."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import pytest
from ranks import Ranks

# A shell starts a job in the background with Ctrl-C ignored, and children inherit that: tests that
# interrupt a rank would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A process that compiles makes no others for it, which would import torch again.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# What ranks are forked from. The server does not see pytest's paths, so no module of the tests.
multiprocessing.set_forkserver_preload(
    ["torch._inductor.compile_fx", "torch.distributed", "fastvideo_comm", "hypothesis", "pytest"]
)

# `ci` is the same examples every time; `thorough` looks for new ones:
# HYPOTHESIS_PROFILE=thorough make test
_COMMON = {
    "deadline": None,  # a busy machine is no failure; pytest-timeout ends what hangs
    "suppress_health_check": [hypothesis.HealthCheck.too_slow],
    "print_blob": True,
    "phases": [phase for phase in hypothesis.Phase if phase is not hypothesis.Phase.shrink],
}
hypothesis.settings.register_profile("ci", max_examples=40, derandomize=True, **_COMMON)
hypothesis.settings.register_profile("thorough", max_examples=1000, **_COMMON)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


# A worker takes whole files. The longest begin first, so that no worker is left with one alone;
# then those that wait more than they compute, beside others that compute.
_FIRST = [
    "test_example.py",
    "test_native_kernel.py",
    "test_forward_mode.py",
    "test_stateless_faults.py",
    "test_flight_faults.py",
    "test_traced.py",
    "test_memory_tensors.py",
    "test_stateless_join.py",
    "test_attention.py",
    "test_every_dtype.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts by file; the tests of a file stay in their order."""
    places = {name: place for place, name in enumerate(_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported here stays: nobody looks in it for garbage, now or in a test."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_unconfigure() -> None:
    """The end of the process finds everything again."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Gloo ranks in processes; `ranks.run(3, job, argument)` runs a job on three of them."""
    pool = Ranks()
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def emulated_gpu_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `emulated_gpu` builds."""
    return tmp_path_factory.mktemp("emulated_gpu")
