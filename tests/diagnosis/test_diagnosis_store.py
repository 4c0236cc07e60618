"""Nothing of a communicator stays in the group's store once all ranks have destroyed it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.diagnosis import Diagnosis, MismatchError
from fastvideo_comm.diagnosis.board import AbsentError, Board
from fastvideo_comm.errors import CommunicationError

STORES: dict[str, Callable[[Path], Any]] = {
    "HashStore": lambda _: dist.HashStore(),
    "FileStore": lambda folder: dist.FileStore(str(folder / "store"), 1),
    "TCPStore": lambda _: dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False),
    "PrefixStore": lambda _: dist.PrefixStore("a", dist.PrefixStore("b", dist.HashStore())),
}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    made = STORES[request.param](tmp_path)
    made.set("of somebody else", "1")
    return made


def boards_of(store: Any, number: int, size: int = 3) -> list[Board]:
    return [Board(store, rank, size, number) for rank in range(size)]


def call(boards: list[Board], name: str, ranks: tuple[int, ...] = (0, 1, 2)) -> None:
    for rank in ranks:
        boards[rank].put(name, f"of {rank}".encode())
    for rank in ranks:
        assert boards[rank].collect(name, ranks, 10) == {r: f"of {r}".encode() for r in ranks}


def use(boards: list[Board]) -> None:
    """Collectives, pairs of ranks, and records that nobody reads."""
    call(boards, "0")
    call(boards, "0-1/0", (0, 1))
    boards[1].put("1", b"failed")
    call(boards, "2")
    call(boards, "1-2/0", (1, 2))
    call(boards, "1-2/1", (1, 2))
    boards[2].put("3", b"nobody else came")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_the_last_rank_that_leaves_clears_the_store_of_each_communicator(store, order):
    before = store.num_keys()
    first, second = boards_of(store, 1), boards_of(store, 2)
    use(first)
    use(second)
    for rank in order:
        assert store.num_keys() > before
        first[rank].leave()
        first[rank].leave()  # counts once
    call(second, "4")  # another communicator of the group goes on
    for rank in reversed(order):
        assert store.num_keys() > before
        second[rank].leave()
    assert store.num_keys() == before
    assert store.get("of somebody else") == b"1"


def test_a_communicator_that_never_called_leaves_nothing(store):
    before = store.num_keys()
    for board in boards_of(store, 1):
        board.leave()
    assert store.num_keys() == before


def test_earlier_records_are_removed_while_ranks_go_on():
    store = dist.HashStore()
    boards = boards_of(store, 1)
    num_processes = store.num_keys()
    assert num_processes == 3
    for number in range(50):
        boards[number % 3].put(f"{2 * number}", b"failed")
        call(boards, f"{2 * number + 1}")
    assert store.num_keys() == num_processes + 3


def test_a_rank_that_never_leaves_keeps_the_keys_of_that_communicator_alone(store):
    before = store.num_keys()
    first, second = boards_of(store, 1), boards_of(store, 2)
    use(first)
    use(second)
    for rank in (0, 1, 2):
        second[rank].leave()
    for rank in (0, 2):
        first[rank].leave()
    # It can still read what the others have left, and say who they are.
    assert first[1].collect("2", (0, 1, 2), 10)[0] == b"of 0"
    with pytest.raises(AbsentError) as error:
        first[1].collect("9", (0, 2), 0)
    assert all("has not arrived" in state for state in error.value.states.values())
    assert not store.check(["fastvideo_comm/2/process/1", "fastvideo_comm/2/left"])
    first[1].leave()
    assert store.num_keys() == before


class Interleaved:
    """A store that runs something before the n-th request of one board."""

    def __init__(self, store: dist.Store, at: int, action: Callable[[], None]) -> None:
        self.store, self.at, self.action = store, at, action
        self.num_requests = 0

    def __getattr__(self, name: str) -> Any:
        if name == "clone":
            raise AttributeError(name)
        if self.num_requests == self.at:
            self.action()
        self.num_requests += 1
        return getattr(self.store, name)


@pytest.mark.parametrize("at", range(12))
@pytest.mark.parametrize("interrupted", [0, 1])
def test_a_record_of_a_rank_that_has_left_is_removed_whenever_it_comes(interrupted, at):
    """A backward after `destroy` tells the others: before, while or after the last rank leaves."""
    store = dist.HashStore()
    late, last = Board(store, 0, 2, 1), Board(store, 1, 2, 1)
    late.leave()
    acts = [lambda: late.put("0", b"destroyed"), last.leave]
    spy = Interleaved(store, at, acts[1 - interrupted])
    (late, last)[interrupted]._store = spy  # type: ignore[assignment]
    acts[interrupted]()
    if spy.num_requests <= at:
        acts[1 - interrupted]()
    assert store.num_keys() == 0


def test_a_record_of_a_rank_that_has_left_is_read_by_those_who_have_not():
    store = dist.HashStore()
    boards = boards_of(store, 1, size=2)
    boards[0].leave()
    boards[0].put("0", b"destroyed")
    boards[1].put("0", b"here")
    assert boards[1].collect("0", (0, 1), 10) == {0: b"destroyed", 1: b"here"}


def test_ranks_of_a_group_leave_nothing_for_every_communicator(ranks: Ranks):
    ranks.run(4, made_and_destroyed, ways=["messages"])


def made_and_destroyed(communicator: DeviceCommunicatorBase) -> None:
    group, rank = communicator.cpu_group, communicator.rank
    store = group.get_group_store()
    x = torch.ones(2, 4, 4, 2)
    communicator.all_reduce(x)
    before = num_keys_now(group)
    several = [
        DeviceCommunicatorBase(group, unique_name=name, memory=memory)
        for name in "ab"
        for memory in ("off", "on")
    ]
    for made in several[:-1]:
        made.all_reduce(x)
        made.all_gather(x)
        if rank < 2:
            made.send(x, 1) if rank == 0 else made.recv(x.shape, x.dtype, 0)
    with pytest.raises(MismatchError):
        several[0].all_gather(x, dim=rank % 2)
    assert store.num_keys() > before
    for index, made in enumerate(several):
        time.sleep(0.01 * ((rank + index) % 4))
        made.destroy()
    dist.barrier(group)
    await_num_keys(store, before)


def num_keys_now(group: dist.ProcessGroup) -> int:
    store = group.get_group_store()
    # torch's FileStore adds a key of its own when the first copy of a store dies.
    if hasattr(store, "clone"):
        store.clone()
    dist.barrier(group)
    found: int = store.num_keys()
    dist.barrier(group)
    return found


def await_num_keys(store: dist.Store, expected: int) -> None:
    # A rank goes on in the background where the store needs more than the second it waits.
    deadline = time.monotonic() + 20
    while (found := store.num_keys()) != expected and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found == expected


def test_a_communicator_that_compares_no_longer_leaves_nothing(ranks: Ranks):
    ranks.run(2, switched_off, ways=["messages"])


def switched_off(communicator: DeviceCommunicatorBase) -> None:
    group = communicator.cpu_group
    store = group.get_group_store()
    before = num_keys_now(group)
    diagnosis = Diagnosis(group)
    diagnosis.before("a", torch.ones(1))
    for _ in range(3):
        diagnosis.set_validate("off")
        dist.barrier(group)
        await_num_keys(store, before)
        dist.barrier(group)
        diagnosis.set_validate("always")
        diagnosis.before("a", torch.ones(1))
    diagnosis.close()
    dist.barrier(group)
    await_num_keys(store, before)


class Spy:
    """Stands in the place of a board."""

    def __init__(self, leave: Callable[[], object]) -> None:
        self.leave = leave


@pytest.fixture
def diagnosis() -> Iterator[Diagnosis]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Diagnosis(dist.group.WORLD)
    dist.destroy_process_group()


def test_closing_waits_a_second_for_a_store_that_does_not_answer(diagnosis):
    answered = threading.Event()
    diagnosis._board = Spy(lambda: answered.wait(60))
    begin = time.monotonic()
    diagnosis.close()
    assert 0.9 < time.monotonic() - begin < 5
    answered.set()


@pytest.mark.parametrize("error", [RuntimeError("Broken pipe"), CommunicationError("lost")])
def test_closing_succeeds_though_the_store_is_gone(diagnosis, error):
    calls = []

    def leave() -> None:
        calls.append("leave")
        raise error

    diagnosis._board = Spy(leave)
    diagnosis.close()
    assert calls == ["leave"]


AT_EXIT = """
import sys
import weakref
import torch.distributed as dist
from fastvideo_comm.diagnosis import Diagnosis

class Spy:
    def leave(self):
        print("left", flush=True)

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
diagnosis = Diagnosis(dist.group.WORLD)
diagnosis._board = Spy()
if sys.argv[1] == "before":
    diagnosis.close()
weakref.finalize(Spy, lambda: (diagnosis.close(), print("closed", flush=True)))
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("when", "output"), [("before", "left\nclosed\n"), ("at exit", "closed\n")]
)
def test_the_end_of_a_process_asks_the_store_for_nothing(when, output):
    """The process that serves the store may have ended, and torch would print a warning."""
    result = subprocess.run(
        [sys.executable, "-c", AT_EXIT, when], capture_output=True, text=True, timeout=100
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, output, "")
