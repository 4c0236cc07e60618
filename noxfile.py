"""The whole suite on each pair of torch and triton that is supported: `make versions`.

Each pair has an environment of its own in `.nox/`. One pair, and arguments for pytest:

    make versions ARGS="-s 'suite(oldest)' -- tests/project/test_utils.py"
"""

from __future__ import annotations

import nox

# constraints.txt is the newest pair; the oldest is the floor of pyproject.toml's dependencies.
PAIRS = {
    "oldest": ("torch==2.11.0", "triton==3.6.0"),
    "2.13": ("torch==2.13.0", "triton==3.7.1"),
    "newest": ("-c", "constraints.txt", "torch", "triton"),
}


@nox.session
@nox.parametrize("pair", [nox.param(pair, id=name) for name, pair in PAIRS.items()])
def suite(session: nox.Session, pair: tuple[str, ...]) -> None:
    session.install("pip==26.3")  # 25.1 is the first that reads dependency groups
    session.install(*pair, "--group", "test", "--group", "demo", "-e", ".")
    session.run(
        "pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", *session.posargs
    )
