"""The README's code does what the README says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_example_runs_under_torchrun_and_prints_what_it_says(tmp_path):
    program = blocks("python")[0]
    (tmp_path / "demo.py").write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    # Each rank's output in a file of its own: on one screen two lines can become one.
    command += ["--nproc-per-node", "2", "--redirects", "1", "--log-dir", "logs", "demo.py"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr
    promised = re.search(r"print\(.*\)  # (.*)", program)[1]
    printed = [path.read_text() for path in (tmp_path / "logs").rglob("stdout.log")]
    assert printed == [f"{promised}\n"] * 2


def test_the_commands_are_targets_of_the_makefile():
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", README.read_text()):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_link_to_a_file_leads_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
