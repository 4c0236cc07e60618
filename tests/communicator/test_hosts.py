"""Two hosts on one machine: network namespaces joined by a cable, a veth pair.

Needs root and iproute2. Nothing outside the two namespaces is reached from them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import host_ranks
import pytest

from fastvideo_comm.collective.route import MEMORY_VARIABLE

ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = (host_ranks.FIRST_HOST, "10.77.0.2")


class Host(NamedTuple):
    """A network namespace, and its end of the cable."""

    name: str
    interface: str

    def start(self, *arguments: str, memory: str = "off") -> subprocess.Popen[str]:
        """A Python program on this host."""
        variables = {
            **os.environ,
            # The host's own name resolves to loopback, where gloo would listen.
            "GLOO_SOCKET_IFNAME": self.interface,
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            # Where it is off everything crosses the cable, as between machines.
            MEMORY_VARIABLE: memory,
        }
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, sys.executable, *arguments],
            env=variables,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed: apt-get install iproute2")
    number = os.getpid()
    pair = (Host(f"fvc{number}a", f"fvc{number}a"), Host(f"fvc{number}b", f"fvc{number}b"))
    try:
        with contextlib.ExitStack() as stack:
            for host in pair:
                ip("netns", "add", host.name)
                stack.callback(ip, "netns", "del", host.name)
            first, second = pair
            ip(*("link", "add", first.interface, "netns", first.name, "type", "veth"),
               *("peer", "name", second.interface, "netns", second.name))  # fmt: skip
            for host, address in zip(pair, ADDRESSES, strict=True):
                ip("-n", host.name, "addr", "add", f"{address}/24", "dev", host.interface)
                ip("-n", host.name, "link", "set", host.interface, "up")
                ip("-n", host.name, "link", "set", "lo", "up")
            yield pair
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")


def answers(processes: list[subprocess.Popen[str]], seconds: float) -> list[Any]:
    """The last lines of all programs; none of them outlives this."""
    deadline = time.monotonic() + seconds
    try:
        outputs = [p.communicate(timeout=deadline - time.monotonic()) for p in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def test_a_store_listens_on_the_address_that_it_was_given_until_all_have_joined(hosts, tmp_path):
    program = host_ranks.__file__
    first, second = answers(
        [host.start(program, "store", str(rank), str(tmp_path)) for rank, host in enumerate(hosts)],
        60,
    )
    assert first["sum"] == second["sum"] == 2
    little_endian = "".join(f"{int(part):02X}" for part in reversed(ADDRESSES[0].split(".")))
    assert first["listening"] == [little_endian]
    assert second["listening"] == []
    assert first["afterwards"] == second["afterwards"] == []


@pytest.mark.parametrize(
    ("what", "kind", "words"),
    [
        ("exchange", "CollectiveError", "in group 'over the link' failed"),
        ("objects", "CommunicationError", "_obj"),
    ],
)
def test_cutting_the_link_is_a_named_error_within_the_timeout(hosts, tmp_path, what, kind, words):
    program = host_ranks.__file__
    processes = [
        host.start(program, what, str(rank), str(tmp_path)) for rank, host in enumerate(hosts)
    ]
    try:
        deadline = time.monotonic() + 60
        while not all((tmp_path / f"ready{rank}").exists() for rank in range(2)):
            assert time.monotonic() < deadline, "the ranks must find each other"
            assert all(process.poll() is None for process in processes)
            time.sleep(0.05)
        ip("-n", hosts[0].name, "link", "set", hosts[0].interface, "down")
        (tmp_path / "cut").touch()
    except BaseException:
        for process in processes:
            process.kill()
        raise
    for rank, answer in enumerate(answers(processes, 60)):
        assert answer["error"] is not None, f"rank {rank} got a result over a cut link"
        assert kind in answer["kinds"], answer
        assert words in answer["error"]
        assert f"rank {rank} of 2" in answer["error"]
        assert answer["seconds"] < host_ranks.TIMEOUT_SECONDS + 3


def test_hosts_cannot_share_memory_and_use_messages(hosts, tmp_path):
    program = host_ranks.__file__
    processes = [
        host.start(program, "memory", str(rank), str(tmp_path), memory="auto")
        for rank, host in enumerate(hosts)
    ]
    first, second = answers(processes, 60)
    assert first["sums"] == second["sums"] == [12.0] * 3
    # Both know why, and it is the same for both.
    assert first["refusal"] == second["refusal"]
    assert first["refusal"].startswith("rank 1: it cannot reach rank 0: ")
    assert "rank 1: it cannot reach rank 0" in first["error"]
    assert "rank 1: it cannot reach rank 0" in second["error"]


@pytest.mark.slow
def test_the_example_trains_across_two_hosts(hosts, tmp_path):
    flags = ["--nnodes", "2", "--nproc", "1", "--steps", "3", "--output", str(tmp_path)]
    flags += ["--master-addr", ADDRESSES[0], "--master-port", "29642"]
    program = str(ROOT / "examples" / "train_sequence_parallel.py")
    processes = [
        host.start(program, *flags, "--node-rank", str(rank)) for rank, host in enumerate(hosts)
    ]
    try:
        outputs = [process.communicate(timeout=170) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    assert "The runs agree within the tolerance" in outputs[0][0]
