"""Machines that few have: what the doctor says about each of them."""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import socket
import subprocess
import types

import pytest
import torch
import torch.distributed as dist
from test_doctor import gpus, problems

from fastvideo_comm import __main__ as command
from fastvideo_comm.memory import symmetric
from fastvideo_comm.tools import benchmark, doctor, doctor_checks, doctor_network, rank_pair
from fastvideo_comm.tools.doctor_checks import Finding


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for variable in doctor_checks._VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def texts(findings: list[Finding]) -> list[str]:
    return [f"{finding.status}: {finding.text}" for finding in findings]


def test_a_version_is_compared_as_numbers_and_the_least_one_is_enough(monkeypatch):
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda _: ["torch>=2.11", "triton>=3.6", "x>=1.1"]
    )
    monkeypatch.setattr(
        importlib.metadata,
        "version",
        {"torch": "2.11.0a0+git1", "triton": "3.10.1", "x": "1.1"}.get,
    )
    assert not problems(doctor_checks.versions())

    def missing(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    *_, finding = doctor_checks.versions()
    assert finding.status == "note"
    assert finding.text == "fastvideo-comm is not installed, only importable"


def test_a_build_for_gpus_without_a_gpu_is_a_note(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for cuda, hip, status, words in (
        ("13.0", None, "note", " (torch is built for 13.0)"),
        (None, "7.1", "note", " (torch is built for 7.1)"),
        (None, None, "ok", ""),
    ):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        text = f"{status}: no GPU: tensors on the CPU, exchanges over gloo{words}"
        assert texts(doctor_checks.devices()) == [text]
    assert doctor_checks.gpu_memory() == []


def test_one_gpu_has_no_peers_and_some_pairs_may_lack_access(monkeypatch):
    gpus(monkeypatch, 1, False)
    assert len(doctor_checks.devices()) == 1
    gpus(monkeypatch, 3, True)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: (a, b) != (2, 0))
    *_, finding = doctor_checks.devices()
    assert finding.text == "no peer access between 1 of 6 pairs: [(2, 0)]"


def test_memory_of_gpus_that_is_not_possible_is_a_note_unless_it_was_asked_for(monkeypatch):
    gpus(monkeypatch, 1, True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(symmetric, "refusal", lambda device: "too old")
    for value, status in (("", "note"), ("auto", "note"), ("on", "problem")):
        monkeypatch.setenv(doctor_checks.MEMORY_VARIABLE, value)
        (finding,) = doctor_checks.gpu_memory()
        assert (finding.status, bool(finding.remedy)) == (status, status == "problem")


def test_the_backends_of_this_build_are_listed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("gloo", "nccl", "xccl", "mpi"):
        monkeypatch.setattr(dist, f"is_{name}_available", lambda: False)
    (finding,) = doctor_checks.backends()
    assert (finding.status, finding.text) == ("problem", "torch has no backend")
    monkeypatch.setattr(dist, "is_mpi_available", lambda: True)
    monkeypatch.setattr(dist, "is_gloo_available", lambda: True)
    assert texts(doctor_checks.backends()) == ["ok: gloo, mpi"]


@pytest.mark.parametrize(
    ("gpu", "variables", "last"),
    [
        (False, {}, "ok: impl='auto' means here: torch"),
        (False, {"FASTVIDEO_COMM_IMPL": "torch"}, "ok: impl='torch' means here: torch"),
        (
            False,
            {"FASTVIDEO_COMM_IMPL": "triton", "TRITON_INTERPRET": "1"},
            "ok: impl='triton' means here: triton",
        ),
        (True, {"FASTVIDEO_COMM_IMPL": "triton"}, "ok: impl='triton' means here: triton"),
        (True, {}, "ok: impl='auto' means here: triton from {} MiB on, torch below"),
    ],
)
def test_which_implementation_is_picked_is_said(monkeypatch, gpu, variables, last):
    environments = []

    def run(*_, env, timeout, **__):
        environments.append(env)
        return types.SimpleNamespace(returncode=0, stderr="a warning")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(subprocess, "run", run)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = doctor_checks.kernels()
    assert not problems(found)
    assert len(found) == 2
    assert texts(found)[-1] == last.format(doctor_checks.SMALL_COPY_BYTES >> 20)
    # Without a GPU the kernel runs in the interpreter, and with one it is compiled.
    assert environments[0].get("TRITON_INTERPRET") == (None if gpu else "1")


def test_an_interpreter_beside_a_gpu_is_a_note_and_a_check_that_hangs_is_a_problem(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def hang(arguments, *, timeout, **_):
        raise subprocess.TimeoutExpired(arguments, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    first, second, _ = doctor_checks.kernels()
    assert first.status == "problem"
    assert first.text.endswith("the check did not end within 240 s")
    assert second.status == "note"
    assert second.text.startswith("TRITON_INTERPRET is set: kernels run in Python")


def test_an_address_alone_or_a_whole_launch_is_no_problem(monkeypatch):
    (finding,) = doctor_checks.environment()
    assert finding.text == "none of the known variables is set"
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("FASTVIDEO_COMM_SECRET", "")
    (finding,) = doctor_checks.environment()
    assert finding.text == "FASTVIDEO_COMM_SECRET=, MASTER_ADDR=127.0.0.1"
    monkeypatch.setenv("WORLD_SIZE", "1")
    (finding,) = problems(doctor_checks.environment())
    assert finding.text.startswith("MASTER_PORT, RANK must be set beside")


@pytest.mark.parametrize(("refusal", "status"), [("", "ok"), ("no shared memory", "note")])
def test_the_way_of_the_two_ranks_is_said(monkeypatch, refusal, status):
    monkeypatch.setattr(rank_pair, "run_pair", lambda job: {"check": refusal}[job])
    (finding,) = doctor_checks.ranks()
    assert finding.status == status
    assert finding.text.endswith(refusal or "by memory that the ranks share")


def test_ranks_that_do_not_answer_are_a_problem(monkeypatch):
    def late(job: str) -> str:
        raise TimeoutError("ranks [1] must answer within 120 s")

    monkeypatch.setattr(rank_pair, "run_pair", late)
    (finding,) = doctor_checks.ranks()
    assert (finding.status, finding.text) == (
        "problem", "two ranks over gloo: ranks [1] must answer within 120 s",
    )  # fmt: skip


def test_a_master_on_another_host_is_told_apart_and_loopback_is_fine_for_one_node(monkeypatch):
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo")])
    addresses = {"there": "192.0.2.1", "here": "127.0.0.1"}
    monkeypatch.setattr(socket, "gethostbyname", lambda name: addresses.get(name, "127.0.0.1"))
    *_, finding = doctor_network.network()
    assert finding.text.startswith("the store of StatelessProcessGroup listens on the host it is")
    monkeypatch.setenv("MASTER_ADDR", "there")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    *_, finding = doctor_network.network()
    assert (finding.status, "192.0.2.1 (another host)" in finding.text) == ("ok", True)
    monkeypatch.setenv("MASTER_ADDR", "here")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    assert not problems(doctor_network.network())


# The pair of ranks and the commands


def answered(*answers: tuple[str, object] | None) -> list[object]:
    """Return connections on which ranks have said this; None: the rank has died."""
    connections = []
    for answer in answers:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        if answer is not None:
            theirs.send(answer)
        theirs.close()
        connections.append(ours)
    return connections


def test_the_answer_of_a_pair_is_that_of_rank_0_and_any_failure_is_raised():
    assert rank_pair._first_answer(answered(("", "zero"), ("", "one")), 5.0) == "zero"
    with pytest.raises(RuntimeError, match="rank 1 died"):
        rank_pair._first_answer(answered(("", "zero"), None), 5.0)
    with pytest.raises(RuntimeError, match="rank 1 failed: its text"):
        rank_pair._first_answer(answered(("", "zero"), ("its text", None)), 5.0)
    ours, theirs = multiprocessing.Pipe(duplex=False)
    with theirs, pytest.raises(TimeoutError, match=r"ranks \[1\] must answer within 0\.01 s"):
        rank_pair._first_answer([*answered(("", "zero")), ours], 0.01)


def test_a_measurement_is_the_median(monkeypatch):
    seconds = iter([0.0, 9.0] + [t for repeat in range(8) for t in (0.0, repeat + 1.0)])
    monkeypatch.setattr(benchmark, "perf_counter", lambda: next(seconds))
    assert benchmark._median(lambda: None, torch.device("cpu")) == 5.0


def test_a_section_is_named_once_and_its_findings_keep_their_order():
    findings = [
        Finding("a", "ok", "one"), Finding("a", "note", "two", "do"), Finding("b", "problem", "x"),
    ]  # fmt: skip
    screen = doctor.render(findings)
    assert screen == "a\n  ok    one\n  note  two\n        -> do\nb\n  WRONG x\n\n1 problem"


def test_a_command_is_needed_and_bench_draws_where_it_is_told(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        command.main([])
    assert "the following arguments are required: command" in capsys.readouterr().err
    calls = []
    monkeypatch.setattr(
        benchmark, "main", lambda plot, as_json: calls.append((os.fspath(plot), as_json)) or 0
    )
    assert command.main(["bench", "--quick"]) == 0
    assert command.main(["bench", "--quick", "--json", "--plot", "x.png"]) == 0
    assert calls == [("fastvideo_comm_bench.png", False), ("x.png", True)]
