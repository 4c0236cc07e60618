"""The examples in docstrings run and give what they say; those that need ranks are marked SKIP."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import fastvideo_comm

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(fastvideo_comm.__path__, "fastvideo_comm.")
    if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_there_are_examples_to_run():
    found = doctest.DocTestFinder().find(importlib.import_module("fastvideo_comm.utils"))
    assert sum(len(test.examples) for test in found) > 5
