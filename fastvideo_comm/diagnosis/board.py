"""Where ranks leave their records for each other: the group's store, and what /proc tells.

Keys are those of one communicator on one group and one call. A rank removes its record of the call
before the last when the last was complete: by then everyone has read it.
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
        states: what is known about each of them.
        lost: they are dead, so waiting on would be in vain.
    """

    def __init__(self, states: dict[int, str], *, lost: bool) -> None:
        """Keeps both."""
        super().__init__(str(states))
        self.states = states
        self.lost = lost


class Board:
    """The records of one communicator, seen from one rank."""

    def __init__(self, store: Store, rank: int) -> None:
        """Takes a number of its own in the store and says which process this is."""
        self._store = store
        self._rank = rank
        self._prefix = f"fastvideo_comm/{store.add(f'fastvideo_comm/instances/{rank}', 1)}"
        self._stale: dict[str, str] = {}
        store.set(f"{self._prefix}/process/{rank}", json.dumps(own_process()))

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Board | None:
        """A board on the group's store, over a connection of its own; None without a store.

        None for torch's "fake" backend too: its store answers nothing, and no other rank is there.
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
            store = clone()  # waits here do not keep other users of the store waiting
        return cls(store, group.rank())

    def put(self, call: str, record: bytes) -> None:
        """Leaves this rank's record of a call."""
        self._store.set(self._key(call, self._rank), record.decode())

    def collect(self, call: str, ranks: Sequence[int], seconds: float) -> dict[int, bytes]:
        """The records of all `ranks` for a call.

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
                # What a rank left just before it died counts.
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
        """What can be said about a rank that has not arrived."""
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
        """Collective calls are one line of succession, each pair of ranks is another."""
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
    """What other processes need to know to find this one."""
    pid = os.getpid()
    return {"pid": pid, "host": os.uname().nodename, "space": _space(), "start": _start(pid)}


def process_state(process: dict[str, str | int]) -> str:
    """`is dead`, `is stopped`, or nothing where all is well or this host cannot see it."""
    if not process["space"] or process["space"] != _space():
        return ""
    pid = int(process["pid"])
    if _start(pid) != process["start"]:
        return "is dead"
    state = _stat(pid)[0]
    return {"Z": "is dead", "X": "is dead", "T": "is stopped", "t": "is stopped"}.get(state, "")


def _space() -> str:
    """Where a process id means something: this boot of this machine, this pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start(pid: int) -> int:
    """When a process began, in ticks since boot: a pid may be used again."""
    return int(_stat(pid)[19])


def _stat(pid: int) -> list[str]:
    """`/proc/pid/stat` from the state on, or the values of a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["X", *["-1"] * 50]
