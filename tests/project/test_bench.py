"""The benchmarks' own machinery: statistics, rows, reports, and the peers' adapters."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"
if str(BENCH) not in sys.path:
    sys.path.append(str(BENCH))

import bench_all_to_all  # noqa: E402
import costs  # noqa: E402
import environment  # noqa: E402
import harness  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
import script  # noqa: E402
import systems  # noqa: E402
from cases import Shape, production  # noqa: E402
from copies import CopyCase, measure_copies  # noqa: E402
from local_group import local_group  # noqa: E402

CPU = torch.device("cpu")


class _Brief(script.Options):
    """The fewest rounds."""

    seconds = 0.0


BRIEF = _Brief(CPU, "quick")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_timing_is_the_median_and_the_extremes_of_its_samples():
    assert harness.Timing.of([5.0, 1.0, 9.0, 2.0]) == harness.Timing(3.5, 1.0, 9.0, 4)
    with pytest.raises(ValueError, match="samples must hold at least one number"):
        harness.Timing.of([])


def test_systems_take_turns_and_get_the_same_number_of_samples():
    order: list[str] = []
    systems_in_turn = {name: lambda _, name=name: order.append(name) for name in "abc"}
    samples = harness.time_in_turn(systems_in_turn, device=CPU, seconds=0.0)
    assert {len(times) for times in samples.values()} == {9}
    rounds = order[6:]  # after two warm-up rounds of one sample each
    firsts = [rounds[i * 12] for i in range(3)]
    assert firsts == ["a", "b", "c"]


def test_samples_rotate_over_the_input_sets():
    seen: list[int] = []
    harness.time_in_turn({"a": seen.append}, device=CPU, seconds=0.0, num_sets=3)
    assert seen == [i % 3 for i in range(len(seen))]


def test_of_copy_is_the_share_of_the_limits_bandwidth_in_the_same_case():
    rows = harness.Report()
    rows.add("case", {"x": [4.0], "copy": [1.0]}, num_bytes=8, limit="copy", bench="b")
    assert {row["system"]: row["of_copy"] for row in rows.rows} == {"x": 0.25, "copy": 1.0}
    rows.add("other", {"x": [4.0]}, num_bytes=8, limit=None, bench="b")
    assert rows.rows[-1]["of_copy"] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_input_is_random_and_finite(dtype):
    x = harness.random_like((64, 128), dtype, CPU).float()
    assert x.isfinite().all()
    assert (x != 0).float().mean() > 0.9


def test_production_shapes_are_divided_by_their_ranks():
    shapes = list(production())
    assert len(shapes) == 24  # 3 models, 3 sequences, 3 group sizes, less 12 heads on 8 ranks
    for shape in shapes:
        assert shape.heads % shape.world_size == 0
        assert shape.sequence % shape.world_size == 0
        assert 0 <= shape.sequence - min((32_760, 75_600, 118_800), key=_near(shape)) < 8


def _near(shape: Shape):
    return lambda sequence: abs(shape.sequence - sequence)


@pytest.fixture(params=[2, 4])
def group(request) -> Iterator[torch.distributed.ProcessGroup]:
    with local_group(request.param) as group:
        yield group


@pytest.mark.parametrize("name", peers.REGISTRY)
@pytest.mark.parametrize("op", ["forward", "back", "forward+grad", "attention", "attention+grad"])
def test_every_peer_gives_the_reference_result(name, op, group):
    peer = peers.load(name)
    if isinstance(peer, str):
        pytest.skip(f"{name}: {peer}")
    if "grad" in op and not peer.differentiable:
        pytest.skip(f"{name} has no gradient")
    _agrees(op, peer.bind(group), group)


@pytest.mark.parametrize("op", ["forward", "back", "forward+grad", "attention", "attention+grad"])
def test_the_bounds_have_the_shapes_and_the_gradient_of_an_exchange(op, group):
    for name in systems.BOUNDS:
        expected, got = _expected_and_got(
            op, systems.bounds(group, torch.device("cpu"))[name], group
        )
        assert [list(x.shape) for x in got] == [list(x.shape) for x in expected]


@pytest.mark.parametrize("op", ["forward", "back", "forward+grad", "attention", "attention+grad"])
def test_this_library_gives_the_reference_result(op, group):
    _agrees(op, systems.ours(group, CPU)[systems.OURS], group)


def _agrees(op: str, system: peers.Bound, group: torch.distributed.ProcessGroup) -> None:
    expected, got = _expected_and_got(op, system, group)
    assert [list(x.shape) for x in got] == [list(x.shape) for x in expected]
    assert all(map(torch.equal, got, expected))


def _expected_and_got(
    op: str, system: peers.Bound, group: torch.distributed.ProcessGroup
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    case = bench_all_to_all.Case(op, Shape(2, 5 * group.size(), 8, group.size(), 6))
    shape = case.shape.exchanged if op == "back" else case.shape.local
    inputs = [harness.random_like(shape, torch.float32, CPU) for _ in range(3)]
    last = case.shape.local if "attention" in op else case.shape.exchanged
    gradient = harness.random_like(last, torch.float32, CPU) if "grad" in op else None
    expected = bench_all_to_all._expected(case, inputs, gradient, group)
    if "attention" not in op:
        inputs = inputs[:1]
    return expected, bench_all_to_all._run(case, system, [inputs], gradient)(0)


def test_a_system_with_another_result_is_named_and_not_timed(threads):
    def wrong(x, scatter_dim, gather_dim):
        return systems.reference(x, scatter_dim, gather_dim, group) + 1

    case = bench_all_to_all.Case("forward", Shape(1, 64, 4, 2, 8))
    rows = harness.Report()
    with local_group(2) as group:
        bound = {"wrong": peers.Bound(wrong, None), **systems.bounds(group, torch.device("cpu"))}
        bench_all_to_all._measure(case, bound, group, BRIEF, rows)
    assert {row["system"] for row in rows.rows} == set(systems.BOUNDS)
    assert rows.problems == [f"wrong gives another result in {case.name}: not timed"]


def test_extra_memory_is_the_peak_less_the_result():
    x = torch.zeros(1 << 18)
    assert costs.extra_bytes(x.neg, CPU) == 0
    assert costs.extra_bytes(lambda: x.neg().neg(), CPU) == x.numel() * x.element_size()


def test_a_peer_that_is_not_there_is_named_with_the_reason(monkeypatch):
    def absent() -> peers.Peer:
        raise FileNotFoundError("no such wheel")

    monkeypatch.setattr(peers, "REGISTRY", {"absent": absent})
    assert peers.load_all() == ({}, {"absent": "FileNotFoundError: no such wheel"})


@pytest.fixture(scope="module")
def measured() -> dict:
    """A small report with copies and whole calls, as `run.py` writes it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    case = CopyCase("transpose", "t", (32, 16), (16, 32), view_src=lambda src: src.T)
    rows = measure_copies("layout", [case], BRIEF)
    for world_size in (2, 4):
        shape = Shape(1, 64, 4, world_size, 8)
        cases = [*bench_all_to_all.both(shape), *bench_all_to_all.tiny(world_size)[:1]]
        with local_group(world_size) as group:
            part = bench_all_to_all.measure_on(group, cases, BRIEF)
        rows.rows += part.rows
        rows.problems += part.problems
    torch.set_num_threads(before)
    head = environment.describe(CPU) | {"size": "quick"}
    return {"environment": head, "rows": rows.rows, "problems": rows.problems}


def test_rows_and_environment_have_the_documented_keys(measured):
    measured = json.loads(json.dumps(measured))
    for row in measured["rows"]:
        for key in ("case", "system", "bench", "op"):
            assert isinstance(row[key], str)
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
        assert row["bytes"] > 0
        assert row["of_copy"] > 0
        assert all(isinstance(size, int) for size in row["shape"])
    head = measured["environment"]
    assert {"date", "device", "machine", "gpu", "versions", "peers", "commit"} <= set(head)
    text = json.dumps(head)
    assert torch.__version__ in text
    assert str(BENCH.parent) not in text


def test_report_shows_every_case_and_system(measured, tmp_path):
    text = report.markdown(measured)
    for row in measured["rows"]:
        assert row["case"] in text
    assert "| case | fastvideo_comm | of the floor |" in text
    assert report.short(measured)
    assert report.duration(0.0123) == "12.3 ms"


def test_plots_are_written_beside_the_report(measured, tmp_path):
    pytest.importorskip("matplotlib")
    import plots

    names = {path.name for path in plots.draw(measured, tmp_path / "x")}
    assert names == {"x-bandwidth.png", "x-local.png", "x-growth.png"}
    assert all((tmp_path / name).stat().st_size > 5000 for name in names)
