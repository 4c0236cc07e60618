"""The place where ranks leave records for each other, in the group's store, and facts from /proc.

A key names the communicator, the call and the rank. When the records of call n+1 are complete, a
rank removes its records of earlier calls: no rank reads them any more. A rank that destroys its
communicator leaves a list of its keys that are still there and counts itself out. The last rank to
do so removes the keys of all ranks. Nothing of the communicator is then left in the store.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
import weakref
from collections import defaultdict
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

# How many boards this process has made for each group: torch's groups take no attributes.
_num_boards: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()


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

    def __init__(self, store: Store, rank: int, size: int, number: int) -> None:
        """Says in the store which process this is.

        Args:
            store: the store of the group.
            rank: this rank.
            size: how many ranks have a board like this one.
            number: which board of these ranks this is; the same on all of them.
        """
        self._store = store
        self._rank = rank
        self._size = size
        self._prefix = f"fastvideo_comm/{number}"
        process = f"{self._prefix}/process/{rank}"
        # What this rank has set and not removed: its process, then records by their line of calls.
        self._keys: defaultdict[str, list[str]] = defaultdict(list, process=[process])
        self._has_left = False
        store.set(process, json.dumps(own_process()))

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
        number = _num_boards[group] = _num_boards.get(group, 0) + 1
        return cls(store, group.rank(), group.size(), number)

    def put(self, call: str, record: bytes) -> None:
        """Leaves this rank's record of a call, also after `leave`."""
        key = self._key(call, self._rank)
        self._keys[_line(call)].append(key)
        if self._has_left:
            self._list_keys()
        self._store.set(key, record.decode())
        # The last rank removes the counter before it reads the lists. If the counter is still
        # there, that rank will find this key in the list.
        if self._has_left and self._no(f"{self._prefix}/left"):
            self._delete(*self._all_keys(), self._list_of(self._rank))

    def leave(self) -> None:
        """Counts this rank out; the last rank removes the keys of all. Waits for nobody."""
        if self._has_left:
            return
        self._has_left = True
        self._list_keys()
        if self._store.add(f"{self._prefix}/left", 1) < self._size:
            return
        self._delete(f"{self._prefix}/left")
        for rank in range(self._size):
            listed = self._list_of(rank)
            # Unlike `get` this does not wait, should that rank's `put` remove the list just now.
            keys = self._store.compare_set(listed, "", "").decode()
            self._delete(*keys.split(), listed)

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
        """Removes this rank's earlier records for the collectives, or for this pair of ranks."""
        keys = self._keys[_line(call)]
        while len(keys) > 1:
            self._delete(keys.pop(0))

    def _list_keys(self) -> None:
        """Tells the last rank to leave which keys it has to remove."""
        self._store.set(self._list_of(self._rank), " ".join(self._all_keys()))

    def _list_of(self, rank: int) -> str:
        return f"{self._prefix}/left/{rank}"

    def _all_keys(self) -> list[str]:
        return [key for keys in self._keys.values() for key in keys]

    def _delete(self, *keys: str) -> None:
        with contextlib.suppress(RuntimeError):  # a store that cannot delete
            for key in keys:
                self._store.delete_key(key)


def _line(call: str) -> str:
    """Returns the line of a call, in which calls follow each other: a pair's, or collectives."""
    return call.rpartition("/")[0]


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
