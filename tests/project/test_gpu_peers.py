"""The adapters of the peers that need several GPUs, against doubles with the peers' own calls.

The packages do not run here. A double has the signatures and the checks of the real one, read in
its sources (fast-ulysses 0.2.1, flashinfer 0.7.2), and exchanges by this library.
"""

from __future__ import annotations

import importlib.metadata
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor

from fastvideo_comm import DeviceCommunicatorBase

BENCH = Path(__file__).resolve().parents[2] / "bench"
if str(BENCH) not in sys.path:
    sys.path.append(str(BENCH))

import bench_all_to_all  # noqa: E402
import gpu_peers  # noqa: E402
import harness  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
from cases import Shape  # noqa: E402


class UlyssesGroup:
    """In the place of `fast_ulysses.UlyssesGroup`."""

    def __init__(self, process_group: Any = None, device: Any = None) -> None:
        self.communicator = DeviceCommunicatorBase(process_group)

    def all_to_all_4d(self, x: Tensor, *, mode: int = 0, out: Tensor | None = None) -> Tensor:
        if out is not None and torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("all_to_all_4d(out=...) does not support autograd")
        result = self.communicator.all_to_all_4D(x, *((2, 1), (1, 2))[mode])
        return result if out is None else out.copy_(result)

    def empty_output(self, x: Tensor, *, mode: int = 0) -> Tensor:
        return torch.empty_like(self.all_to_all_4d(x, mode=mode))


class UlyssesCommunicator:
    """In the place of `flashinfer.comm.UlyssesCommunicator`."""

    def __init__(self, group: Any = None, *, max_elems: int, dtype: Any, device: Any) -> None:
        self.communicator = DeviceCommunicatorBase(group)
        self.max_elems, self.dtype, self.is_open = max_elems, dtype, True

    def scatter_heads(self, x: Tensor) -> Tensor:
        self.check(x)
        return self.communicator.all_to_all_4D(x.detach(), 2, 1)

    def gather_heads(self, x: Tensor) -> Tensor:
        self.check(x)
        return self.communicator.all_to_all_4D(x.detach(), 1, 2)

    def check(self, x: Tensor) -> None:
        if not (self.is_open and x.is_contiguous()):
            raise ValueError("tensor must be contiguous")
        if x.dtype != self.dtype or x.numel() > self.max_elems:
            raise ValueError("exceeding the communicator capacity")

    def close(self) -> None:
        self.is_open = False


@pytest.fixture(autouse=True)
def nothing_is_remembered() -> None:
    gpu_peers.load.cache_clear()


def install_doubles(patch: pytest.MonkeyPatch) -> None:
    gpu_peers.load.cache_clear()
    for name, members in {
        "fast_ulysses": {"UlyssesGroup": UlyssesGroup},
        "flashinfer": {},
        "flashinfer.comm": {"UlyssesCommunicator": UlyssesCommunicator},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        patch.setitem(sys.modules, name, module)
    patch.setattr(importlib.metadata, "version", lambda name: f"of {name}")


def results_of(communicator: DeviceCommunicatorBase, name: str, op: str) -> list[bool]:
    """Whether the results are the reference's, for two sizes, the second one larger."""
    group = communicator.device_group
    with pytest.MonkeyPatch.context() as patch:
        install_doubles(patch)
        peer = gpu_peers.load(name)
        assert isinstance(peer, peers.Peer), peer
        right = []
        for batch in (1, 2):
            case = bench_all_to_all.Case(op, Shape(batch, 6, 4, 2, 8), dtype=torch.float32)
            shape = case.shape.exchanged if op == "back" else case.shape.local
            torch.manual_seed(communicator.rank)
            inputs = [
                harness.random_like(shape, torch.float32, torch.device("cpu")) for _ in range(3)
            ]
            inputs = inputs if "attention" in op else inputs[:1]
            last = case.shape.local if "attention" in op else case.shape.exchanged
            gradient = torch.randn(last) if "grad" in op else None
            expected = bench_all_to_all._expected(case, inputs, gradient, group)
            got = bench_all_to_all._run(case, peer.bind(group), [inputs], gradient)(0)
            right.append(len(got) == len(expected) and all(map(torch.equal, got, expected)))
        gpu_peers.load.cache_clear()
    return right


@pytest.mark.parametrize("op", ["forward", "back", "attention"])
@pytest.mark.parametrize("name", gpu_peers.REGISTRY)
def test_every_adapter_gives_the_reference_result(ranks: Ranks, name: str, op: str):
    assert ranks.run(2, results_of, name, op) == [[True, True]] * 2


def test_fast_ulysses_has_the_gradient_of_the_reference(ranks: Ranks):
    assert ranks.run(2, results_of, "fast-ulysses", "attention+grad") == [[True, True]] * 2


def test_only_what_differentiates_says_so(monkeypatch: pytest.MonkeyPatch):
    install_doubles(monkeypatch)
    present, missing = gpu_peers.load_all()
    assert not missing
    assert [name for name, peer in present.items() if peer.differentiable] == ["fast-ulysses"]


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch):
    for name in ("fast_ulysses", "flashinfer", "flashinfer.comm"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not there
    present, missing = gpu_peers.load_all()
    assert not present
    assert set(missing) == set(gpu_peers.REGISTRY)
    assert missing["fast-ulysses"].startswith("ModuleNotFoundError: import of fast_ulysses")
    assert missing["flashinfer"].startswith("ModuleNotFoundError: import of flashinfer")


def test_every_peer_has_a_column_in_the_reports_and_a_colour():
    plots = pytest.importorskip("plots", reason="plots need matplotlib")
    names = [*peers.REGISTRY, *gpu_peers.REGISTRY]
    assert list(report.PEERS) == names
    assert set(names) <= set(plots.COLOURS)


def test_a_peer_that_one_rank_cannot_bind_is_measured_on_none():
    def refuse(group: Any) -> peers.Bound:
        raise RuntimeError("GPUs 0 and 1 are not NVLink-joined")

    def bind(group: Any) -> peers.Bound:
        return peers.Bound(lambda *_: None, lambda *_: None)

    def loaded(make: Callable[[Any], peers.Bound]) -> peers.Peer:
        return peers.Peer("peer", "1", "peer.py", True, make)

    both = {"refused": loaded(refuse), "bound": loaded(bind)}
    here = gpu_peers.bindable(both, None, any_rank=lambda yes: yes)
    assert here == (
        {"bound": both["bound"]},
        {"refused": "RuntimeError: GPUs 0 and 1 are not NVLink-joined"},
    )
    elsewhere = gpu_peers.bindable(both, None, any_rank=lambda yes: True)
    assert elsewhere[0] == {}
    assert elsewhere[1]["bound"] == "another rank cannot bind it"
