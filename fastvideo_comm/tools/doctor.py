"""The doctor: prints what this installation can do, and a remedy for each problem."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence

from .doctor_checks import (
    Finding,
    backends,
    devices,
    environment,
    gpu_memory,
    kernels,
    ranks,
    versions,
)
from .doctor_network import network

_SIGNS = {"ok": "ok  ", "note": "note", "problem": "WRONG"}
CHECKS = (versions, devices, gpu_memory, backends, kernels, network, environment, ranks)


def examine() -> list[Finding]:
    """Runs all checks; this takes some seconds, because one of them starts two ranks.

    Example:
        >>> [finding.text for finding in examine() if finding.status == "problem"]
        ... # doctest: +SKIP
        []
    """
    findings: list[Finding] = []
    for check in CHECKS:
        findings += _guarded(check)
    return findings


def render(findings: Sequence[Finding]) -> str:
    """Returns the findings as the text that the doctor prints.

    Example:
        >>> print(render([Finding("kernels", "problem", "wrong values", "reinstall triton")]))
        kernels
          WRONG wrong values
                -> reinstall triton
        <BLANKLINE>
        1 problem
    """
    lines: list[str] = []
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines.append(section)
        lines.append(f"  {_SIGNS[finding.status]:5} {finding.text}")
        if finding.remedy:
            lines.append(f"        -> {finding.remedy}")
    count = sum(finding.status == "problem" for finding in findings)
    lines += ["", "no problem found" if not count else f"{count} problem{'s' * (count > 1)}"]
    return "\n".join(lines)


def main(*, as_json: bool = False) -> int:
    """Prints the findings as text or JSON; returns 1 if there is a problem, else 0."""
    findings = examine()
    wrong = any(finding.status == "problem" for finding in findings)
    if as_json:
        report = {"healthy": not wrong, "findings": [finding._asdict() for finding in findings]}
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        sys.stdout.write(render(findings) + "\n")
    return int(wrong)


def _guarded(check: Callable[[], list[Finding]]) -> list[Finding]:
    """Runs a check; an exception in the check becomes a finding."""
    try:
        return check()
    except Exception as error:
        name = check.__name__.replace("_", " ")
        text = f"could not be examined: {type(error).__name__}: {error}"
        return [Finding(name, "problem", text, "report this with the output of --json")]
