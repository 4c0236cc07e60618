"""The checks of the doctor: each returns findings and changes nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from .. import __version__
from ..collective.route import MEMORY_VARIABLE
from ..kernels.strided_copy import _IMPLEMENTATIONS, IMPLEMENTATION_VARIABLE, SMALL_COPY_BYTES
from ..memory import symmetric

_KERNEL_SECONDS = 240
# The doctor shows whether the secret is set, and never shows the secret.
_SECRET_VARIABLE = "FASTVIDEO_COMM_SECRET"
_LAUNCH_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
_VARIABLES = (
    IMPLEMENTATION_VARIABLE,
    MEMORY_VARIABLE,
    _SECRET_VARIABLE,
    "TRITON_INTERPRET",
    *_LAUNCH_VARIABLES,
    "LOCAL_RANK",
    "CUDA_VISIBLE_DEVICES",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "NCCL_P2P_DISABLE",
    "NCCL_IB_DISABLE",
    "NCCL_DEBUG",
    "TORCH_DISTRIBUTED_DEBUG",
    "OMP_NUM_THREADS",
)


class Finding(NamedTuple):
    """One line of what the doctor prints; a problem has a remedy."""

    section: str
    status: Literal["ok", "note", "problem"]
    text: str
    remedy: str = ""


def versions() -> list[Finding]:
    """Compares the versions of the library's requirements with the floors in its metadata."""
    python = platform.python_version()
    findings = [Finding("versions", "ok", f"fastvideo_comm {__version__}, python {python}")]
    try:
        requirements = importlib.metadata.requires("fastvideo-comm") or []
    except importlib.metadata.PackageNotFoundError:
        return [
            *findings,
            Finding("versions", "note", "fastvideo-comm is not installed, only importable"),
        ]
    for requirement in requirements:
        match = re.match(r"([\w-]+)>=([\d.]+)(?:.*sys_platform == .(\w+))?", requirement)
        if match is None or (match[3] and match[3] != sys.platform):
            continue
        name, floor = match[1], match[2]
        remedy = f"pip install '{name}>={floor}'"
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding("versions", "problem", f"{name} is missing", remedy))
            continue
        if _numbers(version) < _numbers(floor):
            text = f"{name} must be at least {floor}, got {version}"
            findings.append(Finding("versions", "problem", text, remedy))
        else:
            findings.append(Finding("versions", "ok", f"{name} {version} (at least {floor})"))
    return findings


def devices() -> list[Finding]:
    """Lists the accelerators, and finds those that do not reach each other's memory."""
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        text = "no GPU: tensors on the CPU, exchanges over gloo"
        if built:
            return [
                Finding(
                    "devices",
                    "note",
                    f"{text} (torch is built for {built})",
                    "with a GPU in this machine: check nvidia-smi and CUDA_VISIBLE_DEVICES",
                )
            ]
        return [Finding("devices", "ok", text)]
    count = torch.cuda.device_count()
    findings = []
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        text = (
            f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"sm_{properties.major}{properties.minor}"
        )
        findings.append(Finding("devices", "ok", text))
    apart = [
        (a, b)
        for a in range(count)
        for b in range(count)
        if a != b and not torch.cuda.can_device_access_peer(a, b)
    ]
    if apart:
        text = f"no peer access between {len(apart)} of {count * (count - 1)} pairs: {apart[:4]}"
        remedy = "exchanges go through host memory; nvidia-smi topo -m shows why"
        findings.append(Finding("devices", "note", text, remedy))
    elif count > 1:
        findings.append(Finding("devices", "ok", f"peer access between all {count} GPUs"))
    return findings


def gpu_memory() -> list[Finding]:
    """Whether ranks on GPUs can write into each other's memory, and whether they are to."""
    if not torch.cuda.is_available():
        return []
    refusal = symmetric.refusal(torch.device("cuda", torch.cuda.current_device()))
    wanted = os.environ.get(MEMORY_VARIABLE) == "on"
    if refusal:
        text = f"exchange by memory is not possible on GPUs: {refusal}"
        remedy = f"unset {MEMORY_VARIABLE}: 'on' will be an error" if wanted else ""
        return [Finding("devices", "problem" if wanted else "note", text, remedy)]
    mode = "is on" if wanted else f"is off: memory='on' or {MEMORY_VARIABLE}=on switches it on"
    return [Finding("devices", "ok", f"exchange by memory on GPUs {mode}")]


def backends() -> list[Finding]:
    """Lists the backends that torch.distributed was built with."""
    known = {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "xccl": dist.is_xccl_available(),
        "mpi": dist.is_mpi_available(),
    }
    present = [name for name, available in known.items() if available]
    if torch.cuda.is_available() and not known["nccl"]:
        remedy = "install torch's CUDA build"
        return [Finding("backends", "problem", f"a GPU, but no NCCL in {present}", remedy)]
    if not present:
        return [Finding("backends", "problem", "torch has no backend", "install another build")]
    return [Finding("backends", "ok", ", ".join(present))]


def kernels() -> list[Finding]:
    """Checks that the kernel compiles here and equals its reference; says what "auto" picks."""
    section = "kernels"
    chosen = os.environ.get(IMPLEMENTATION_VARIABLE, "auto")
    if chosen not in _IMPLEMENTATIONS:
        text = f"{IMPLEMENTATION_VARIABLE} must be one of {', '.join(_IMPLEMENTATIONS)}"
        remedy = f"unset {IMPLEMENTATION_VARIABLE}"
        return [Finding(section, "problem", f"{text}, got {chosen}", remedy)]
    gpu = torch.cuda.is_available()
    environment = os.environ if gpu else {**os.environ, "TRITON_INTERPRET": "1"}
    try:
        outcome = subprocess.run(
            [sys.executable, "-m", f"{__package__}.kernel_check"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_KERNEL_SECONDS,
        )
        wrong = outcome.stderr.strip().splitlines()[-1:] if outcome.returncode else []
    except subprocess.TimeoutExpired:
        wrong = [f"the check did not end within {_KERNEL_SECONDS} s"]
    how = "compiled for the GPU" if gpu else "interpreted, there is no GPU to compile for"
    if wrong:
        text = f"strided_copy_ ({how}): {wrong[0]}"
        remedy = f"reinstall triton, or set {IMPLEMENTATION_VARIABLE}=torch"
        findings = [Finding(section, "problem", text, remedy)]
    else:
        findings = [Finding(section, "ok", f"strided_copy_ equals its reference ({how})")]
    if chosen == "triton" and not gpu and not os.environ.get("TRITON_INTERPRET"):
        text = f"{IMPLEMENTATION_VARIABLE}=triton, but no GPU: every copy will be an error"
        remedy = f"unset {IMPLEMENTATION_VARIABLE}"
        return [*findings, Finding(section, "problem", text, remedy)]
    if os.environ.get("TRITON_INTERPRET") and gpu:
        text = "TRITON_INTERPRET is set: kernels run in Python, thousands of times slower"
        findings.append(Finding(section, "note", text, "unset TRITON_INTERPRET"))
    large = f"triton from {SMALL_COPY_BYTES >> 20} MiB on, torch below" if gpu else "torch"
    picked = chosen if chosen != "auto" else large
    return [*findings, Finding(section, "ok", f"impl='{chosen}' means here: {picked}")]


def environment() -> list[Finding]:
    """Lists the environment variables that change what the library does."""
    section = "environment"
    words = []
    for variable in _VARIABLES:
        value = os.environ.get(variable)
        if value is not None:
            secret = variable == _SECRET_VARIABLE
            words.append(f"{variable}={'<set>' if secret and value else value}")
    unset = [name for name in _LAUNCH_VARIABLES if name not in os.environ]
    findings = [Finding(section, "ok", ", ".join(words) or "none of the known variables is set")]
    if 0 < len(unset) < len(_LAUNCH_VARIABLES) and {"RANK", "WORLD_SIZE"} & set(os.environ):
        text = f"{', '.join(unset)} must be set beside the others of {list(_LAUNCH_VARIABLES)}"
        findings.append(Finding(section, "problem", text, "start with torchrun"))
    return findings


def ranks() -> list[Finding]:
    """Starts two gloo ranks, which trade heads for sequence and back."""
    from .rank_pair import run_pair

    section = "ranks"
    try:
        refusal = run_pair("check")
    except (RuntimeError, TimeoutError) as error:
        text = str(error).strip().splitlines()[-1]
        remedy = "gloo needs an interface that reaches this host: try GLOO_SOCKET_IFNAME=lo"
        return [Finding(section, "problem", f"two ranks over gloo: {text}", remedy)]
    way = f"by messages, because {refusal}" if refusal else "by memory that the ranks share"
    text = f"two ranks over gloo: all_to_all_4D and back, exact, {way}"
    return [Finding(section, "note" if refusal else "ok", text)]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])
