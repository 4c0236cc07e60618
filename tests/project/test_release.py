"""What is released: an sdist, a wheel that is built from it, and an environment with nothing else.

Built from a copy of the tracked files as they are now, by the installed setuptools: nothing is
downloaded.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

import fastvideo_comm

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow

SMOKE = """
import importlib, importlib.metadata, json, pkgutil, sys
import fastvideo_comm, fastvideo_comm.kernels, torch
names = [m.name for m in pkgutil.walk_packages(fastvideo_comm.__path__, "fastvideo_comm.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
x = torch.randn(2, 3, 4)
moved = fastvideo_comm.kernels.strided_copy_(torch.empty(4, 3, 2), x.permute(2, 1, 0))
assert torch.equal(moved, x.permute(2, 1, 0))
print(json.dumps({
    "file": fastvideo_comm.__file__,
    "version": fastvideo_comm.__version__,
    "metadata": importlib.metadata.version("fastvideo-comm"),
    "names": names,
    "kernels": fastvideo_comm.kernels.__file__,
}))
"""


class Release(NamedTuple):
    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Release:
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "dist"))
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("the tree is not a git checkout: which files belong to it is not known")
    listed = subprocess.run(
        [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if not (ROOT / name).exists():
            continue
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=170, cwd=out)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return Release(sdist, wheel)


@pytest.fixture(scope="module")
def environment(release: Release, tmp_path_factory) -> Path:
    """The interpreter of an environment with the wheel, and this one's torch beside it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(release.wheel)]
    subprocess.run([python, *install], check=True, timeout=170)
    paths = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", vars=paths))
    # Only its path: the .pth files there, such as that of an editable install, are not read.
    (packages / "torch_beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_wheel_works_away_from_the_repository(environment: Path, tmp_path: Path):
    run = subprocess.run(
        [environment, "-I", "-c", SMOKE], cwd=tmp_path, capture_output=True, text=True, timeout=170
    )
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout)
    for name in ("file", "kernels"):
        assert Path(answer[name]).is_relative_to(environment.parent.parent)
    assert answer["version"] == answer["metadata"] == fastvideo_comm.__version__
    expected = {
        ".".join(["fastvideo_comm", *file.relative_to(package).with_suffix("").parts])
        for package in [ROOT / "fastvideo_comm"]
        for file in package.rglob("*.py")
    }
    expected = {name.removesuffix(".__init__") for name in expected} - {"fastvideo_comm"}
    assert set(answer["names"]) == expected | kernels(), "every module is in the wheel"


def kernels() -> set[str]:
    """The modules behind the symbolic link, which `rglob` does not follow on every Python."""
    names = {f"fastvideo_comm.kernels.{file.stem}" for file in (ROOT / "kernels").glob("*.py")}
    return {name.removesuffix(".__init__") for name in names}


def test_the_doctor_is_content_there(environment: Path, tmp_path: Path):
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")
    variables = {name: value for name, value in os.environ.items() if name not in names}
    run = subprocess.run(
        [environment, "-m", "fastvideo_comm", "doctor", "--json"],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert json.loads(run.stdout)["healthy"]


def test_the_archives_hold_what_they_should_and_nothing_else(release: Release):
    with zipfile.ZipFile(release.wheel) as wheel:
        names = wheel.namelist()
    for name in ("fastvideo_comm/py.typed", "fastvideo_comm/kernels/strided_copy.py"):
        assert name in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    tops = {name.partition("/")[0] for name in names}
    version = fastvideo_comm.__version__
    assert tops == {"fastvideo_comm", f"fastvideo_comm-{version}.dist-info"}
    with tarfile.open(release.sdist) as sdist:
        members = {name.partition("/")[2] for name in sdist.getnames()}
    for name in (
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "fastvideo_comm/kernels/strided_copy.py",
    ):
        assert name in members
    assert not {name for name in members if re.search(r"\.venv|__pycache__|\.pyc$|\.so$", name)}


def test_the_version_stands_in_one_place(release: Release):
    version = fastvideo_comm.__version__
    assert f"-{version}-" in release.wheel.name
    assert release.sdist.name == f"fastvideo_comm-{version}.tar.gz"
    stated = [
        str(file.relative_to(ROOT))
        for file in [*ROOT.glob("fastvideo_comm/**/*.py"), ROOT / "pyproject.toml"]
        if re.search(rf"""version\w* *= *["']{re.escape(version)}["']""", file.read_text())
    ]
    assert stated == ["fastvideo_comm/__init__.py"]
