"""The place where ranks leave records for each other, in the group's store, and facts from /proc.

A key names the communicator, the call and the rank. When the records of call n+1 are complete, a
rank removes its record of call n: by then every rank has read it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

logger = logging.getLogger("fastvideo_comm")

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.0002, 0.02
_LOOK_FOR_DEAD_EVERY = 0.25
_SAY_WAITING_AFTER = 30.0
_DEFAULT_TIMEOUT = 1800.0


class AbsentError(Exception):
    """Ranks did not arrive.

    Attributes:
        states: what is known about each of these ranks.
        lost: True if the ranks are dead and will never arrive.
    """

    def __init__(self, states: dict[int, str], *, lost: bool) -> None:
        """Keeps `states` and `lost`."""
        super().__init__(str(states))
        self.states = states
        self.lost = lost


class Board:
    """The records of one communicator, seen from one rank."""

    def __init__(self, store: Store, rank: int) -> None:
        """Takes a number in the store for this communicator, and says which process this is."""
        self._store = store
        self._rank = rank
        self._prefix = f"fastvideo_comm/{store.add(f'fastvideo_comm/instances/{rank}', 1)}"
        self._stale: dict[str, str] = {}
        store.set(f"{self._prefix}/process/{rank}", json.dumps(own_process()))

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Board | None:
        """Makes a board on the group's store, with a connection of its own; None without a store.

        Returns None for torch's "fake" backend too, which has no other ranks.
        """
        if dist.get_backend(group) == "fake":
            return None
        try:
            store = group.get_group_store()
        except RuntimeError:
            return None
        if store is None:  # a group that was not made through a store
            return None
        clone = getattr(store, "clone", None)
        if clone is not None:
            store = clone()  # other users of the store need not wait while this board waits
        return cls(store, group.rank())

    def put(self, call: str, record: bytes) -> None:
        """Leaves this rank's record of a call."""
        self._store.set(self._key(call, self._rank), record.decode())

    def collect(self, call: str, ranks: Sequence[int], seconds: float) -> dict[int, bytes]:
        """Waits for the records of all `ranks` for a call, and returns them.

        Raises:
            AbsentError: a rank is dead, or did not leave its record in time.
        """
        keys = {rank: self._key(call, rank) for rank in ranks}
        begin = time.monotonic()
        pause, look, said = _SHORTEST_PAUSE, begin + _LOOK_FOR_DEAD_EVERY, False
        while not self._store.check(list(keys.values())):
            now = time.monotonic()
            if now >= look or now >= begin + seconds:
                look = now + _LOOK_FOR_DEAD_EVERY
                states = {rank: self.state_of(rank) for rank, key in keys.items() if self._no(key)}
                dead = {rank: state for rank, state in states.items() if "dead" in state}
                # A record that a rank left just before it died is valid.
                dead = {rank: state for rank, state in dead.items() if self._no(keys[rank])}
                if dead:
                    raise AbsentError(dead, lost=True)
                if now >= begin + seconds and states:
                    raise AbsentError(states, lost=False)
                if not said and now >= begin + _SAY_WAITING_AFTER:
                    said = True
                    logger.warning("call %s waits for ranks %s", call, sorted(states))
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        records = {rank: bytes(self._store.get(key)) for rank, key in keys.items()}
        self._forget_older(call)
        return records

    def state_of(self, rank: int) -> str:
        """Says what is known about a rank that has not arrived."""
        key = f"{self._prefix}/process/{rank}"
        if self._no(key):
            return "has not made this communicator"
        process = json.loads(self._store.get(key))
        where = f"(process {process['pid']} on {process['host']})"
        state = process_state(process)
        return f"{where} {state or 'has not arrived'}"

    def _no(self, key: str) -> bool:
        return not self._store.check([key])

    def _key(self, call: str, rank: int) -> str:
        return f"{self._prefix}/call/{call}/{rank}"

    def _forget_older(self, call: str) -> None:
        """Removes this rank's last record for the collectives, or for the same pair of ranks."""
        line = call.rpartition("/")[0]
        older = self._stale.pop(line, None)
        if older is not None:
            with contextlib.suppress(RuntimeError):  # a store that cannot delete
                self._store.delete_key(older)
        self._stale[line] = self._key(call, self._rank)


def group_timeout(group: dist.ProcessGroup) -> float:
    """The timeout of a group's collectives, in seconds."""
    for kind in ("cpu", "cuda"):
        with contextlib.suppress(RuntimeError, AttributeError):
            backend = group._get_backend(torch.device(kind))
            return float(backend.options._timeout.total_seconds())
    return _DEFAULT_TIMEOUT


def own_process() -> dict[str, str | int]:
    """Returns what other processes need to find this process."""
    pid = os.getpid()
    return {"pid": pid, "host": os.uname().nodename, "space": _space(), "start": _start(pid)}


def process_state(process: dict[str, str | int]) -> str:
    """Returns "is dead", "is stopped", or "" if the process runs or is not visible from here."""
    if not process["space"] or process["space"] != _space():
        return ""
    pid = int(process["pid"])
    if _start(pid) != process["start"]:
        return "is dead"
    state = _stat(pid)[0]
    return {"Z": "is dead", "X": "is dead", "T": "is stopped", "t": "is stopped"}.get(state, "")


def _space() -> str:
    """Names the space of process ids: this boot of this machine, and this pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start(pid: int) -> int:
    """Returns when a process began, in ticks since boot; a pid alone may be used again."""
    return int(_stat(pid)[19])


def _stat(pid: int) -> list[str]:
    """Returns `/proc/pid/stat` from the state on; for a process that is gone, made-up values."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["X", *["-1"] * 50]
