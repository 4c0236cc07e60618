"""Every code block of the docs runs, every drawing is what the ops return, every page is linked.

In a page, `<!-- ranks: 2 -->` before a block runs it on two ranks, `<!-- not run: reason -->` after
it leaves it out, `<!-- file: name -->` before it saves it for the `bash` blocks behind it. Blocks
on ranks know `communicator`, and what `StatelessProcessGroup.create` needs.
"""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import shlex
import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from fastvideo_comm import DeviceCommunicatorBase, StatelessProcessGroup
from fastvideo_comm.object_channel.settings import SECRET_VARIABLE

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
BLOCK = re.compile(
    r"(?:<!-- (?P<key>ranks|file): (?P<value>\S+) -->\n)?"
    r"^```(?P<language>\w*)\n(?P<code>.*?)^```\n?"
    r"(?P<reason><!-- not run: .*? -->)?",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    page: str
    line: int
    language: str
    code: str
    ranks: int
    file: str
    run: bool


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        source = page.read_text()
        for match in BLOCK.finditer(source):
            key, value = match["key"], match["value"]
            found.append(
                Block(
                    str(page.relative_to(DOCS)),
                    source[: match.start("code")].count("\n"),
                    match["language"],
                    match["code"],
                    int(value) if key == "ranks" else 0,
                    value if key == "file" else "",
                    not match["reason"],
                )
            )
    return found


BLOCKS = blocks()


def name(block: Block) -> str:
    return f"{block.page}:{block.line}"


def execute(code: str, where: str, **names: Any) -> None:
    """Runs a block as a module of its own, as torch.compile and dataclasses expect it."""
    module = types.ModuleType(re.sub(r"\W", "_", where))
    sys.modules[module.__name__] = module
    torch._dynamo.reset()  # as in a process of its own
    vars(module).update(torch=torch, dist=dist, **names)
    # Not with the __future__ of this module.
    exec(compile(code, where, "exec", dont_inherit=True), vars(module))


def execute_on_rank(
    communicator: DeviceCommunicatorBase, code: str, where: str, port: int, secret: bytes
) -> None:
    execute(
        code,
        where,
        communicator=communicator,
        host="127.0.0.1",
        port=port,
        rank=communicator.rank,
        world_size=communicator.world_size,
        secret=secret,
    )


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.ranks and b.run], ids=name)
def test_a_block_runs_on_ranks(ranks: Ranks, block: Block):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    secret = secrets.token_bytes(32)
    ranks.run(block.ranks, execute_on_rank, block.code, name(block), port, secret)


@pytest.mark.parametrize(
    "block",
    [b for b in BLOCKS if b.language == "python" and b.run and not (b.ranks or b.file)],
    ids=name,
)
def test_a_block_runs(block: Block):
    execute(block.code, name(block), StatelessProcessGroup=StatelessProcessGroup)


def is_export(block: Block) -> bool:
    return block.code.startswith("export ")


def scripts() -> list[tuple[Block, dict[str, str]]]:
    """`bash` blocks, each with the files of its page."""
    return [
        (block, {b.file: b.code for b in BLOCKS if b.file and b.page == block.page})
        for block in BLOCKS
        if block.language == "bash" and block.run and not is_export(block)
    ]


@pytest.mark.parametrize("block", [b for b in BLOCKS if is_export(b)], ids=name)
def test_an_exported_secret_is_long_and_another_each_time(block: Block):
    variable = block.code.removeprefix("export ").partition("=")[0]
    assert variable == SECRET_VARIABLE
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    values = {
        subprocess.run(
            ["bash", "-euc", f"{block.code}\nprintenv {variable}"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout.strip()
        for _ in range(2)
    }
    assert len(values) == 2
    assert all(len(bytes.fromhex(value)) == 32 for value in values)


@pytest.mark.parametrize(("block", "files"), scripts(), ids=[name(b) for b, _ in scripts()])
def test_a_command_runs(block: Block, files: dict[str, str], tmp_path: Path):
    for file, code in files.items():
        (tmp_path / file).write_text(code)
    program, *arguments = shlex.split(block.code)
    assert program == "torchrun"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert "rank 1: [1, 5, 6, 8] -> [1, 10, 3, 8]" in run.stdout


def test_every_block_has_a_language_and_the_blocks_are_found():
    assert {block.language for block in BLOCKS} == {"bash", "python", "text"}
    fences = sum(page.read_text().count("\n```") // 2 for page in PAGES)
    assert len(BLOCKS) == fences > 20


def drawings() -> Any:
    specification = importlib.util.spec_from_file_location("layouts", DOCS / "draw_layouts.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["layouts"] = module
    specification.loader.exec_module(module)
    return module


def drawn(communicator: DeviceCommunicatorBase) -> list[str]:
    """The drawings that are not what the ops return."""
    calls = {
        "all_to_all_to_heads": lambda x: communicator.all_to_all_4D(x[None, ..., None])[0, ..., 0],
        "all_to_all_to_sequence": lambda x: communicator.all_to_all_4D(x[None, ..., None], 1, 2)[
            0, ..., 0
        ],
        "all_gather": lambda x: communicator.all_gather(x, 0),
        "slice": lambda x: communicator.slice(x, 0),
        "gather": lambda x: communicator.gather(x, 0, 0),
        "all_reduce": communicator.all_reduce,
        "reduce_scatter": lambda x: communicator.reduce_scatter(x, 0),
        "broadcast": communicator.broadcast,
    }
    differ = []
    for drawing in drawings().DRAWINGS:
        expected = drawing.after(communicator.rank)
        got = calls.pop(drawing.file)(drawing.before(communicator.rank))
        if (got is None) != (expected is None) or (got is not None and not got.equal(expected)):
            differ.append(drawing.file)
    return [*differ, *calls]


def test_the_drawings_show_what_the_ops_return(ranks: Ranks):
    assert ranks.run(2, drawn) == [[], []]


def test_the_drawings_are_those_of_the_script(capsys):
    assert drawings().main(check=True) == 0, capsys.readouterr().out


def test_every_page_is_in_the_navigation_and_every_drawing_in_a_page():
    navigation = (ROOT / "mkdocs.yml").read_text()
    missing = [
        str(p.relative_to(DOCS)) for p in PAGES if str(p.relative_to(DOCS)) not in navigation
    ]
    assert not missing
    text = "".join(page.read_text() for page in PAGES)
    assert all(f"drawings/{file.name}" in text for file in (DOCS / "drawings").iterdir())


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install --group docs")
    arguments = ["-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    run = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=170
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "index.html").exists()
