"""What importing the package does and does not, and that `python -O` checks as much."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

# Runs before a program: triton is nowhere to be found, as where it is not installed.
WITHOUT_TRITON = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def _run(program: str, *options: str) -> str:
    """What a fresh interpreter prints; anything on stderr is an error."""
    result = subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def test_import_loads_no_triton_and_compiles_nothing(tmp_path):
    program = f"""
    import os, sys
    os.environ["TRITON_CACHE_DIR"] = {str(tmp_path / "cache")!r}

    def triton_modules():
        return {{name for name in sys.modules if name.partition(".")[0] == "triton"}}

    import torch
    before = triton_modules()
    import fastvideo_comm, fastvideo_comm.kernels, fastvideo_comm.utils
    import fastvideo_comm.device_communicators.base_device_communicator
    assert triton_modules() == before
    assert "fastvideo_comm.kernels.tile_copy" not in sys.modules
    """
    _run(program)
    assert not (tmp_path / "cache").exists()


def test_import_has_no_side_effects():
    _run("""
    import logging, os, random, signal, sys, threading, warnings
    import torch

    def state():
        return {
            "threads": {thread.name for thread in threading.enumerate()},
            "root handlers": list(logging.root.handlers),
            "root level": logging.root.level,
            "warning filters": list(warnings.filters),
            "environment": dict(os.environ),
            "signals": {name: signal.getsignal(name) for name in signal.valid_signals()},
            "random": random.getstate(),
            "torch random": torch.random.get_rng_state().tolist(),
            "torch threads": torch.get_num_threads(),
            "default dtype": torch.get_default_dtype(),
            "gradients": torch.is_grad_enabled(),
            "hook": sys.excepthook,
            "process group": torch.distributed.is_initialized(),
            "cuda": torch.cuda.is_initialized(),
        }

    before = state()
    import fastvideo_comm, fastvideo_comm.utils
    import fastvideo_comm.device_communicators.base_device_communicator
    for name, value in state().items():
        assert value == before[name], name
    logger = logging.getLogger("fastvideo_comm")
    assert logger.handlers == []
    assert logger.level == logging.NOTSET
    """)


def test_a_machine_without_triton_copies_with_torch():
    _run(
        WITHOUT_TRITON
        + textwrap.dedent("""
    import torch
    from fastvideo_comm.kernels import strided_copy_
    from fastvideo_comm.utils import split_tensor_along_last_dim

    assert strided_copy_(torch.zeros(2, 3), torch.ones(3, 2).T).sum() == 6
    assert len(split_tensor_along_last_dim(torch.ones(2, 6), 3, True)) == 3
    try:
        strided_copy_(torch.zeros(2), torch.ones(2), impl="triton")
    except ValueError as error:
        expected = "impl must be 'torch' or 'auto' where triton is not installed, got 'triton'"
        assert str(error) == expected, error
    else:
        raise SystemExit("impl='triton' was taken")
    """)
    )


# Wrong calls; each must raise, and alike with and without -O.
WRONG_CALLS = [
    "strided_copy_(torch.zeros(2), torch.zeros(3))",
    "strided_copy_(torch.zeros(2), torch.zeros(2, dtype=torch.int32))",
    "strided_copy_(torch.zeros(1).expand(2), torch.zeros(2))",
    "strided_copy_(torch.zeros(2), [0, 0])",
    "strided_copy_(torch.zeros(2), torch.zeros(2), impl='cuda')",
    "strided_copy_(torch.zeros(2), torch.zeros(2), impl='triton')",
    "divide(7, 2)",
    "divide(7, 0)",
    "ensure_divisibility(5, 3)",
    "split_tensor_along_last_dim(torch.zeros(5), 2)",
    "split_tensor_along_last_dim(torch.zeros(()), 1)",
    "split_tensor_along_last_dim(torch.zeros(4), 0)",
    "validation.all_to_all_4D(torch.zeros(2, 3), 2, 2, 1)",
    "validation.all_to_all_4D(torch.zeros(1, 2, 3, 4), 2, 2, 1)",
    "validation.all_to_all_4D(torch.zeros(1, 2, 4, 4), 2, 3, 1)",
    "validation.check_tensor('input_', 'x')",
    "validation.all_gather(torch.zeros(2), 1)",
    "validation.parts(torch.zeros(3), 2, 0)",
    "validation.all_reduce(torch.zeros(2, dtype=torch.bool), None)",
    "validation.peer('dst', 5, 0, 2, others_only=True)",
    "DeviceCommunicatorBase(None)",
]


@pytest.fixture(scope="module")
def errors() -> dict[str, list[str]]:
    """`type: message` of every wrong call, by the interpreter's options."""
    program = f"""
    import torch
    from fastvideo_comm import DeviceCommunicatorBase
    from fastvideo_comm.collective import validation
    from fastvideo_comm.kernels import strided_copy_
    from fastvideo_comm.utils import divide, ensure_divisibility, split_tensor_along_last_dim

    for call in {WRONG_CALLS!r}:
        try:
            eval(call)
        except Exception as error:
            print(type(error).__name__, repr(str(error)), sep=": ")
        else:
            print("no error")
    """
    program = "import sys" + textwrap.dedent(program)
    return {option: _run(program, option).splitlines() for option in ("-B", "-O")}


def test_bad_input_raises_an_error_of_this_package(errors):
    assert len(errors["-B"]) == len(WRONG_CALLS)
    for call, error in zip(WRONG_CALLS, errors["-B"], strict=True):
        kind, _, message = error.partition(": ")
        assert kind in ("ValueError", "TypeError", "DivisibilityError"), f"{call}: {error}"
        assert " must " in message, f"{call}: {error}"


def test_python_O_gives_the_same_errors(errors):
    assert errors["-O"] == errors["-B"]
