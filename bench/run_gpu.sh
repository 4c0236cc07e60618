#!/usr/bin/env bash
# Every test and benchmark that needs a GPU, with the interpreter in PYTHON; installs nothing.
#
#     PYTHON=python3.12 bash bench/run_gpu.sh [--quick | --full] [--out FILE]
#
# The interpreter brings torch, triton, numpy, pytest and what the tests import; the peers come from
# its environment or from wheels in .whl/ (`make wheels`), those for several GPUs from its
# environment alone (`pip install --group gpu-peers`). Non-zero if a test or a benchmark failed.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
# Kernels of ranks as threads wait for each other: no two streams may share a queue of the device.
export CUDA_DEVICE_MAX_CONNECTIONS=32
# The checkout is the package.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "make gpu: $PYTHON has no torch that sees a GPU" >&2
    exit 1
fi

# pytest-timeout may be missing here; its settings in pyproject.toml are then unknown, not wrong.
# `timeout`: no Python handler ends a hang in NCCL or the driver. Warnings are not errors: the
# versions of all else that this interpreter brings are not ours.
timeout -k 10 "${TEST_SECONDS:-240}" "$PYTHON" -m pytest -m gpu -q --durations=5 \
    -o "addopts=--import-mode=importlib --strict-markers" -o timeout=60 -o faulthandler_timeout=50 \
    -W default -W "ignore:Unknown config option:pytest.PytestConfigWarning"
tests=$?

"$PYTHON" bench/run.py --device cuda "$@"
benchmarks=$?

echo "tests: $([ $tests -eq 0 ] && echo passed || echo "FAILED ($tests)")," \
    "benchmarks: $([ $benchmarks -eq 0 ] && echo passed || echo "FAILED ($benchmarks)")"
[ $tests -eq 0 ] && [ $benchmarks -eq 0 ]
