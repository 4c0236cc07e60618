"""The doctor says what is wrong and what to do; the quick benchmark measures and draws."""

from __future__ import annotations

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastvideo_comm import __main__ as command
from fastvideo_comm import __version__
from fastvideo_comm.memory import symmetric
from fastvideo_comm.tools import (
    benchmark,
    doctor,
    doctor_checks,
    doctor_network,
    kernel_check,
    rank_pair,
)
from fastvideo_comm.tools.doctor_checks import Finding

ROW = {"bytes": 2e6, "heads": 2e-3, "sequence": 3e-3, "bare exchange": 1e-3}
COPIES = {"device": "cpu", "plain copy": 10.0, "strided_copy_": 9.0}


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for variable in doctor_checks._VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def problems(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.status == "problem"]


def test_a_healthy_installation_is_one_screen_and_exit_status_0():
    """Everything in it runs: the kernel in the interpreter, two ranks over gloo."""
    environment = {k: v for k, v in os.environ.items() if k not in doctor_checks._VARIABLES}
    arguments = [sys.executable, "-m", "fastvideo_comm", "doctor", "--json"]
    run = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=150)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(run.stdout)
    assert report["healthy"]
    findings = [Finding(**finding) for finding in report["findings"]]
    sections = list(dict.fromkeys(finding.section for finding in findings))
    names = "versions", "devices", "backends", "kernels", "network", "environment", "ranks"
    assert sections == list(names)
    screen = doctor.render(findings)
    assert f"fastvideo_comm {__version__}" in screen
    assert "strided_copy_ equals its reference" in screen
    assert "exact, by memory that the ranks share" in screen
    assert screen.endswith("no problem found")
    assert len(screen.splitlines()) <= 40
    assert max(map(len, screen.splitlines())) <= 110


def test_the_exit_status_is_1_where_something_is_wrong(monkeypatch, capsys):
    def fine() -> list[Finding]:
        return [Finding("a", "ok", "well")]

    def wrong() -> list[Finding]:
        return [Finding("b", "problem", "bad", "do this")]

    def broken() -> list[Finding]:
        raise OSError("no such thing")

    monkeypatch.setattr(doctor, "CHECKS", (fine,))
    assert command.main(["doctor"]) == 0
    monkeypatch.setattr(doctor, "CHECKS", (fine, wrong, broken))
    assert command.main(["doctor"]) == 1
    screen = capsys.readouterr().out
    assert "  WRONG bad\n        -> do this\n" in screen
    assert "could not be examined: OSError: no such thing" in screen
    assert screen.endswith("2 problems\n")
    assert command.main(["doctor", "--json"]) == 1
    assert not json.loads(capsys.readouterr().out)["healthy"]


def test_an_old_or_missing_requirement_is_named_with_its_remedy(monkeypatch):
    requirements = ["torch>=2.11", "triton>=3.6; sys_platform == 'linux'", "msgpack>=1.1"]
    requirements += ["windowsonly>=1; sys_platform == 'win32'"]
    installed = {"torch": "2.9.1+cu128", "triton": "3.10.0"}

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "requires", lambda _: requirements)
    monkeypatch.setattr(importlib.metadata, "version", version)
    found = problems(doctor_checks.versions())
    assert [(finding.text, finding.remedy) for finding in found] == [
        ("torch must be at least 2.11, got 2.9.1+cu128", "pip install 'torch>=2.11'"),
        ("msgpack is missing", "pip install 'msgpack>=1.1'"),
    ]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"FASTVIDEO_COMM_IMPL": "fast"}, "must be one of auto, triton, torch, got fast"),
        ({"FASTVIDEO_COMM_IMPL": "triton"}, "but no GPU: every copy will be an error"),
    ],
)
def test_an_implementation_that_cannot_run_here_is_a_problem(monkeypatch, environment, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = types.SimpleNamespace(returncode=0, stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (finding,) = problems(doctor_checks.kernels())
    assert words in finding.text
    assert finding.remedy == "unset FASTVIDEO_COMM_IMPL"


def test_a_kernel_that_gives_other_values_is_a_problem(monkeypatch):
    done = types.SimpleNamespace(returncode=1, stderr="Traceback\nRuntimeError: pack must equal")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    (finding,) = problems(doctor_checks.kernels())
    assert "RuntimeError: pack must equal" in finding.text
    assert "FASTVIDEO_COMM_IMPL=torch" in finding.remedy

    def zeros(dst: torch.Tensor, src: torch.Tensor, *, impl: str) -> torch.Tensor:
        return dst.zero_() if impl == "triton" else dst.copy_(src)

    monkeypatch.setattr(kernel_check, "strided_copy_", zeros)
    with pytest.raises(RuntimeError, match=r"pack of torch.bfloat16 must equal torch's copy"):
        kernel_check.check(torch.device("cpu"))


def gpus(monkeypatch, count: int, peers: bool) -> None:
    properties = types.SimpleNamespace(name="H200", total_memory=141 << 30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: peers)


def test_gpus_are_listed_with_their_peer_access(monkeypatch):
    gpus(monkeypatch, 2, True)
    texts = [finding.text for finding in doctor_checks.devices()]
    assert texts == [
        "cuda:0 H200, 141 GiB, sm_90",
        "cuda:1 H200, 141 GiB, sm_90",
        "peer access between all 2 GPUs",
    ]
    gpus(monkeypatch, 2, False)
    *_, finding = doctor_checks.devices()
    assert finding.status == "note"
    assert finding.text == "no peer access between 2 of 2 pairs: [(0, 1), (1, 0)]"


def test_exchange_by_memory_on_gpus_is_said_to_be_off_on_or_impossible(monkeypatch):
    assert torch.cuda.is_available() or doctor_checks.gpu_memory() == []
    gpus(monkeypatch, 2, True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(symmetric, "refusal", lambda device: "")
    (finding,) = doctor_checks.gpu_memory()
    assert (finding.status, finding.text) == (
        "ok",
        "exchange by memory on GPUs is off: memory='on' or FASTVIDEO_COMM_MEMORY=on switches it on",
    )
    monkeypatch.setenv("FASTVIDEO_COMM_MEMORY", "on")
    (finding,) = doctor_checks.gpu_memory()
    assert finding.text == "exchange by memory on GPUs is on"
    monkeypatch.setattr(symmetric, "refusal", lambda device: f"{device} is too old")
    (finding,) = doctor_checks.gpu_memory()
    assert finding.status == "problem"
    assert finding.text == "exchange by memory is not possible on GPUs: cuda:0 is too old"


def test_a_gpu_without_nccl_is_a_problem(monkeypatch):
    gpus(monkeypatch, 1, True)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    (finding,) = doctor_checks.backends()
    assert (finding.status, finding.remedy) == ("problem", "install torch's CUDA build")


def test_names_and_interfaces_that_do_not_exist_are_problems(monkeypatch):
    def resolve(name: str) -> str:
        if name == "here":
            return "127.0.0.1"
        raise OSError("unknown")

    monkeypatch.setattr(socket, "gethostname", lambda: "nameless")
    monkeypatch.setattr(socket, "gethostbyname", resolve)
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth,^docker")
    monkeypatch.setenv("MASTER_ADDR", "nowhere")
    name, interface, master = problems(doctor_network.network())
    assert "own name 'nameless' does not resolve" in name.text
    assert interface.text == "GLOO_SOCKET_IFNAME names 'eth9', which is none of ['eth0', 'lo']"
    assert master.text == "MASTER_ADDR=nowhere does not resolve"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("MASTER_ADDR", "here")
    *_, store = doctor_network.network()
    assert store.text == (
        "a store on MASTER_ADDR listens on 127.0.0.1 (this host), no other interface"
    )
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    *_, store = doctor_network.network()
    assert store.text == "MASTER_ADDR is 127.0.0.1 for several nodes"


@pytest.mark.parametrize(
    ("given", "by_gloo", "by_nccl"),
    [("eth0", 0, 0), ("=eth0", 1, 0), ("eth", 1, 0), ("=eth", 1, 1), ("^lo", 1, 0)],
)
def test_prefixes_and_exclusions_are_interfaces_for_nccl_only(monkeypatch, given, by_gloo, by_nccl):
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.0.1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    found = {}
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(variable, given)
        found[variable] = len(problems(doctor_network.network()))
        monkeypatch.delenv(variable)
    assert found == {"GLOO_SOCKET_IFNAME": by_gloo, "NCCL_SOCKET_IFNAME": by_nccl}


def test_variables_are_shown_but_not_the_secret(monkeypatch):
    monkeypatch.setenv("FASTVIDEO_COMM_SECRET", "hunter2")
    monkeypatch.setenv("RANK", "1")
    shown, half = doctor_checks.environment()
    assert shown.text == "FASTVIDEO_COMM_SECRET=<set>, RANK=1"
    assert half.status == "problem"
    assert half.text.startswith("MASTER_ADDR, MASTER_PORT, WORLD_SIZE must be set beside")
    assert half.remedy == "start with torchrun"
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    assert not problems(doctor_checks.environment())


def test_ranks_that_fail_are_a_problem_with_their_own_error(monkeypatch):
    def fails(*_: object) -> None:
        raise RuntimeError("rank 1 failed: Traceback ..\nValueError: no address")

    monkeypatch.setattr(rank_pair, "run_pair", fails)
    (finding,) = doctor_checks.ranks()
    assert finding.status == "problem"
    assert finding.text == "two ranks over gloo: ValueError: no address"


def test_a_pair_of_ranks_gives_an_answer_or_an_error_in_time():
    with pytest.raises(RuntimeError, match="KeyError: 'nonsense'"):
        rank_pair.run_pair("nonsense")
    begin = time.perf_counter()
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] must answer within 0.01 s"):
        rank_pair.run_pair("measure", 4, seconds=0.01)
    given_up = time.perf_counter()
    row = rank_pair.run_pair("measure", 4)
    assert given_up - begin < (time.perf_counter() - given_up) / 2, "they were not waited for"
    assert row["bytes"] == 4 * 12 * 128 * 2
    assert all(0 < row[name] < 10 for name in ("heads", "sequence", "bare exchange"))


def test_the_benchmark_prints_a_table_and_draws_a_plot(monkeypatch, capsys, tmp_path):
    asked = []
    monkeypatch.setattr(benchmark, "copy_bandwidth", lambda: COPIES)
    monkeypatch.setattr(benchmark, "run_pair", lambda job, s: asked.append(s) or ROW)
    plot = tmp_path / "plot.png"
    assert command.main(["bench", "--quick", "--plot", str(plot)]) == 0
    assert asked == [64, 512, 2048, 8192]
    output = capsys.readouterr().out
    assert "plain copy 10.0 GB/s" in output
    assert f"plot: {plot}" in output
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert command.main(["bench", "--quick", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"copies": COPIES, "exchanges": [ROW] * 4}


def test_without_matplotlib_and_rich_the_benchmark_says_so_and_goes_on(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert "matplotlib is not installed" in benchmark.draw([ROW], Path("never.png"))
    assert list(benchmark._progress([1, 2], ["a", "b"])) == [1, 2]
    assert capsys.readouterr().err == "measuring a\nmeasuring b\n"


def test_the_whole_benchmark_is_not_in_the_package(capsys):
    assert command.main(["bench"]) == 2
    assert "bench must be given --quick" in capsys.readouterr().err


def test_copies_are_measured_on_this_device():
    result = benchmark.copy_bandwidth()
    assert result["plain copy"] > 0.01
    assert result["strided_copy_"] > 0.01


@pytest.mark.slow
def test_the_benchmarkmark_runs_as_a_command(tmp_path):
    arguments = [sys.executable, "-m", "fastvideo_comm", "bench", "--quick"]
    subprocess.run(arguments, cwd=tmp_path, check=True, timeout=170)
    assert (tmp_path / "fastvideo_comm_bench.png").exists()
