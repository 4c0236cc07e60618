"""README, the reference, the pages of ops and the navigation name every public op and no other."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from op_table import CALLS, NOT_OPS, OPS, WITHOUT_GRADIENT

import fastvideo_comm
from fastvideo_comm import DeviceCommunicatorBase

ROOT = Path(__file__).parents[2]
# A page of its own, and no method of a communicator.
BESIDE = {"ulysses_attention": "ulysses_attention.md"}


def titles_of(text: str) -> set[str]:
    """The names in a title such as `send and recv`."""
    return set(text.split()) - {"and"}


def test_the_table_has_every_public_method_that_is_an_op_and_no_other():
    methods = {
        name
        for name, _ in inspect.getmembers(DeviceCommunicatorBase, callable)
        if not name.startswith("_")
    }
    assert methods == set(OPS) | NOT_OPS
    assert not set(OPS) & NOT_OPS


def test_every_op_with_a_gradient_is_called_by_tests():
    assert {re.match(r"\w+", name)[0] for name in CALLS} == set(OPS) - WITHOUT_GRADIENT


def test_readme_has_every_op_in_its_table():
    section = (ROOT / "README.md").read_text().split("## Operations")[1].split("\n\n")
    (table,) = (block for block in section if block.startswith("| op |"))
    first_cells = [row.split("|")[1] for row in table.splitlines()[2:]]
    named = {name for cell in first_cells for name in re.findall(r"`(\w+)\(", cell)}
    assert named == set(OPS)


def test_the_reference_has_every_op_with_its_page():
    rows = re.findall(
        r"^\| `(\w+)` \| \[.*\]\(ops/(.*)\) \|$", (ROOT / "docs/reference.md").read_text(), re.M
    )
    assert dict(rows) == OPS
    assert len(rows) == len(OPS)


def test_the_reference_has_every_public_name_of_the_package():
    reference = (ROOT / "docs/reference.md").read_text()
    missing = [
        name
        for name in fastvideo_comm.__all__
        if not name.startswith("__") and not re.search(rf"\b{name}\b", reference)
    ]
    # What utils has from elsewhere is listed there; the rest is a `:::` of its own.
    assert not missing


def test_every_op_has_a_page_that_is_titled_by_its_name():
    pages = {path.name: path.read_text() for path in (ROOT / "docs/ops").glob("*.md")}
    expected: dict[str, set[str]] = {}
    for op, page in {**OPS, **BESIDE}.items():
        expected.setdefault(page, set()).add(op)
    assert {
        name: titles_of(text.splitlines()[0].removeprefix("# ")) for name, text in pages.items()
    } == expected


def test_the_navigation_has_every_op():
    navigation = (ROOT / "mkdocs.yml").read_text()
    rows = re.findall(r"^      - (.*): ops/(.*)$", navigation, re.MULTILINE)
    named = {op: page for title, page in rows for op in titles_of(title)}
    assert named == {**OPS, **BESIDE}
