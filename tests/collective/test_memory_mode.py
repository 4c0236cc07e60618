"""Which of argument, environment and device decides whether ranks use each other's memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastvideo_comm.collective import operator
from fastvideo_comm.collective.route import MEMORY_VARIABLE, memory_mode

ANY_GROUP: Any = object()


@pytest.fixture(autouse=True)
def gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda group: "gloo")
    monkeypatch.delenv(MEMORY_VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("given", "variable", "device", "mode"),
    [
        (None, None, "cpu", "auto"),
        (None, "on", "cpu", "on"),
        (None, "off", "cpu", "off"),  # the others ask this rank, which says no
        ("on", "off", "cpu", "on"),
        ("off", "on", "cpu", "off"),
        ("auto", "off", "cpu", "auto"),
        (None, None, "cuda", None),
        (None, "on", "cuda", "on"),
        (None, "off", "cuda", None),
        ("on", None, "cuda", "on"),
        ("off", "on", "cuda", None),
        (None, "on", "xpu", None),  # the variable is for all programs of a machine
        ("auto", None, "xpu", None),
        ("off", None, "xpu", None),
    ],
)
def test_the_argument_goes_before_the_variable(monkeypatch, given, variable, device, mode):
    if variable is not None:
        monkeypatch.setenv(MEMORY_VARIABLE, variable)
    assert memory_mode(given, ANY_GROUP, torch.device(device)) == mode


def test_ranks_of_torchs_fake_backend_ask_nobody(monkeypatch):
    monkeypatch.setattr(dist, "get_backend", lambda group: "fake")
    assert memory_mode(None, ANY_GROUP, torch.device("cpu")) is None
    assert memory_mode("auto", ANY_GROUP, torch.device("cuda")) is None
    with pytest.raises(ValueError, match="got 'on' for cpu and backend fake"):
        memory_mode("on", ANY_GROUP, torch.device("cpu"))


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu"])
@pytest.mark.parametrize(("given", "variable"), [("yes", "on"), (None, "1"), (None, "")])
def test_another_word_is_refused_on_every_device(monkeypatch, given, variable, device):
    monkeypatch.setenv(MEMORY_VARIABLE, variable)
    wrong: Any = variable if given is None else given
    text = rf"memory \(or {MEMORY_VARIABLE}\) must be one of auto, on, off, got '{wrong}'"
    with pytest.raises(ValueError, match=text):
        memory_mode(given, ANY_GROUP, torch.device(device))


def test_the_operator_finds_a_group_by_a_name_of_its_own_and_keeps_none_alive():
    class Group:
        memory = device_memory = "connected"

    first: Any
    second: Any
    first, second = Group(), Group()
    names = [operator.register(each) for each in (first, second)]
    assert [operator._group(name) for name in names] == [first, second]
    del first
    with pytest.raises(RuntimeError, match="must be open; it was destroyed"):
        operator._group(names[0])
    assert operator._group(names[1]) is second
    second.memory = None  # on GPUs
    assert operator._group(names[1]) is second
    second.device_memory = None
    with pytest.raises(RuntimeError, match="must be open; it was destroyed"):
        operator._group(names[1])
