"""The examples in docstrings run and give what they say.

`Example (inside a rank, of 2):` runs on each of two ranks, with `communicator` and its `group`.
What needs another package or a GPU is marked SKIP.
"""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch
from op_table import OPS
from ranks import Ranks

import fastvideo_comm
from fastvideo_comm import AsyncHandle, DeviceCommunicatorBase, ulysses_attention

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(fastvideo_comm.__path__, "fastvideo_comm.")
    if not module.name.endswith("__main__")
)
ON_RANKS = "Example (inside a rank, of 2"


def examples(name: str, *, on_ranks: bool, **names: object) -> list[doctest.DocTest]:
    """Those of a module that run on ranks, or the others."""
    found = doctest.DocTestFinder().find(importlib.import_module(name), extraglobs=names)
    return [
        test for test in found if test.examples and (ON_RANKS in (test.docstring or "")) == on_ranks
    ]


def failures(tests: list[doctest.DocTest]) -> list[str]:
    """What the runner says of each example that gives something else."""
    runner, said = doctest.DocTestRunner(verbose=False), list[str]()
    for test in tests:
        runner.run(test, out=said.append)
    return said


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name):
    assert not failures(examples(name, on_ranks=False))


def run_on_a_rank(communicator: DeviceCommunicatorBase, name: str) -> None:
    names = {"communicator": communicator, "group": communicator.cpu_group, "torch": torch}
    said = failures(examples(name, on_ranks=True, **names))
    assert not said, "".join(said)


@pytest.mark.parametrize("name", [name for name in MODULES if examples(name, on_ranks=True)])
def test_the_examples_of_a_module_run_on_ranks(ranks: Ranks, name: str):
    ranks.run(2, run_on_a_rank, name)


def test_there_are_examples_to_run():
    found = examples("fastvideo_comm.utils", on_ranks=False)
    assert sum(len(test.examples) for test in found) > 5


def test_every_op_has_an_example_that_runs_on_ranks():
    modules = {each.__module__ for each in (DeviceCommunicatorBase, AsyncHandle, ulysses_attention)}
    found = {test.name: test for name in modules for test in examples(name, on_ranks=True)}
    ops = [f"{DeviceCommunicatorBase.__module__}.DeviceCommunicatorBase.{op}" for op in OPS]
    assert not {*ops, "fastvideo_comm.attention.ulysses_attention"} - set(found)
    for test in found.values():
        assert not any(doctest.SKIP in example.options for example in test.examples), test.name
