"""The doctor's checks of the network: where gloo, NCCL and the stores would listen."""

from __future__ import annotations

import os
import socket

from .doctor_checks import Finding


def network() -> list[Finding]:
    """Checks the names and interfaces that gloo and the stores depend on."""
    section = "network"
    findings = []
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
        text = f"this host's name resolves to {address}, where gloo listens by default"
        findings.append(Finding(section, "ok", text))
    except OSError:
        text = f"this host's own name {host!r} does not resolve: gloo cannot find an address"
        remedy = "add it to /etc/hosts, or set GLOO_SOCKET_IFNAME"
        findings.append(Finding(section, "problem", text, remedy))
    interfaces = {name for _, name in socket.if_nameindex()}
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        # NCCL knows prefixes, ^exclusions and =exact names
        for name in filter(None, os.environ.get(variable, "").split(",")):
            fits = name in interfaces or (
                variable.startswith("NCCL")
                and (
                    name.startswith("^")
                    or name.removeprefix("=") in interfaces
                    or any(i.startswith(name) for i in interfaces)
                )
            )
            if not fits:
                text = f"{variable} names {name!r}, which is none of {sorted(interfaces)}"
                findings.append(Finding(section, "problem", text, f"unset or correct {variable}"))
    findings.append(_store_address(section))
    return findings


def _store_address(section: str) -> Finding:
    """Finds where StatelessProcessGroup's store would listen for the launcher's address."""
    master = os.environ.get("MASTER_ADDR")
    if not master:
        text = "the store of StatelessProcessGroup listens on the host it is given, no other"
        return Finding(section, "ok", text)
    try:
        address = socket.gethostbyname(master)
    except OSError:
        remedy = "set MASTER_ADDR to an address of the first node"
        return Finding(section, "problem", f"MASTER_ADDR={master} does not resolve", remedy)
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
            place = "this host"
        except OSError:
            place = "another host"
    warning = address.startswith("127.") and int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    if warning:
        remedy = "set MASTER_ADDR to an address that the other nodes reach"
        return Finding(section, "problem", f"MASTER_ADDR is {address} for several nodes", remedy)
    text = f"a store on MASTER_ADDR listens on {address} ({place}), no other interface"
    return Finding(section, "ok", text)
