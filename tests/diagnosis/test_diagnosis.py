"""A mistake is the same error on every rank, at once; who is missing is named."""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Callable
from typing import Any

import diagnosis_ranks
import pytest
import torch
import torch.distributed as dist
from diagnosis_ranks import Checked
from ranks import Ranks
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.diagnosis import Diagnosis, MismatchError, is_due
from fastvideo_comm.diagnosis.board import Board
from fastvideo_comm.errors import CommunicationTimeoutError

X = torch.zeros(2, 3, 6, 4)
Call = Callable[[DeviceCommunicatorBase], Any]
# What rank 0 does, what the others do, what the table says of rank 0's line.
MISTAKES: dict[str, tuple[Call, Call, str]] = {
    "shape": (lambda c: c.all_gather(X[:1]), lambda c: c.all_gather(X), "shape"),
    "number of dims": (lambda c: c.all_gather(X[0], 0), lambda c: c.all_gather(X, 0), "shape"),
    "dtype": (lambda c: c.all_reduce(X.double()), lambda c: c.all_reduce(X), "dtype"),
    "order": (lambda c: c.all_reduce(X), lambda c: c.all_gather(X), "op, arguments"),
    "dims": (lambda c: c.all_gather(X, 0), lambda c: c.all_gather(X, 1), "arguments"),
    "direction": (
        lambda c: c.all_to_all_4D(X, 1, 2),
        lambda c: c.all_to_all_4D(X, 2, 1),
        "arguments",
    ),
    "reduce op": (
        lambda c: c.all_reduce(X, dist.ReduceOp.MAX),
        lambda c: c.all_reduce(X),
        "arguments",
    ),
    "requires_grad": (
        lambda c: c.all_reduce(X.clone().requires_grad_()),
        lambda c: c.all_reduce(X),
        "requires_grad",
    ),
}


def mistake(communicator: DeviceCommunicatorBase, name: str) -> tuple[str, float]:
    checked = Checked(communicator.cpu_group)
    first, others, _ = MISTAKES[name]
    begin = time.monotonic()
    with pytest.raises(MismatchError) as error:
        (first if communicator.rank == 0 else others)(checked)
    seconds = time.monotonic() - begin
    assert checked.all_reduce(torch.ones(1)).item() == communicator.world_size, "still usable"
    return str(error.value), seconds


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mismatch_is_the_same_table_on_every_rank_within_2_seconds(ranks: Ranks, name: str):
    answers = ranks.run(3, mistake, name)
    tables = {text.partition("\n")[2] for text, _ in answers}
    assert len(tables) == 1
    lines = tables.pop().splitlines()
    assert lines[0].split()[:4] == ["rank", "op", "shape", "dtype"]
    assert [line.split()[0] for line in lines[1:]] == ["0", "1", "2"]
    assert lines[1].endswith(f"<- {MISTAKES[name][2]}")
    assert "<-" not in lines[2] + lines[3], "the majority is taken to be right"
    for rank, (text, seconds) in enumerate(answers):
        assert re.match(rf"\w+ on rank {rank} of 3 in group 'checked': the ranks must ask", text)
        assert seconds < 2


def wrong_strides(communicator: DeviceCommunicatorBase, validate: str) -> str:
    checked = Checked(communicator.cpu_group, validate=validate)
    mine = X.transpose(0, 1).contiguous().transpose(0, 1) if communicator.rank == 1 else X
    try:
        checked.all_gather(mine)
    except MismatchError as error:
        return str(error)
    return "no error"


def test_different_strides_are_an_error_only_where_every_call_is_compared(ranks: Ranks):
    """Nothing depends on them: ranks may pack from different layouts."""
    assert ranks.run(2, wrong_strides, "auto") == ["no error"] * 2
    for text in ranks.run(2, wrong_strides, "always"):
        assert "<- strides" in text
        assert "contiguous" in text


def bad_arguments(communicator: DeviceCommunicatorBase) -> tuple[str, float]:
    checked = Checked(communicator.cpu_group)
    begin = time.monotonic()
    if communicator.rank == 1:
        checked.diagnosis.failed("all_gather", ValueError("dim must be in [-4, 3], got 9"))
        text = ""
    else:
        with pytest.raises(MismatchError) as error:
            checked.all_gather(X)
        text = str(error.value)
    assert checked.all_reduce(torch.ones(1)).item() == 3, "the numbers still agree"
    return text, time.monotonic() - begin


def test_bad_arguments_on_one_rank_are_shown_on_the_others(ranks: Ranks):
    for rank, (text, seconds) in enumerate(ranks.run(3, bad_arguments)):
        assert seconds < 2
        if rank != 1:
            line = text.splitlines()[3]
            assert line.startswith("1     all_gather  ValueError: dim must be in [-4, 3], got 9")
            assert line.endswith("<- bad arguments")


def pairs(communicator: DeviceCommunicatorBase, mine: list[tuple[Any, ...]]) -> tuple[str, float]:
    diagnosis = Diagnosis(communicator.cpu_group, "pairs", timeout=20)
    begin = time.monotonic()
    try:
        diagnosis.before_pair(*mine[communicator.rank])
    except MismatchError as error:
        return str(error), time.monotonic() - begin
    return "no error", 0.0


def test_a_send_and_a_recv_that_do_not_fit_are_an_error_on_both(ranks: Ranks):
    send, f32 = ("send", (2, 3), torch.float32, 1), torch.float32
    cases = [
        (("recv", (2, 4), f32, 0), "<- shape"),
        (("recv", (2, 3), torch.int8, 0), "<- dtype"),
        (("send", (2, 3), f32, 0), "<- needs the other of send and recv"),
    ]
    assert ranks.run(2, pairs, [send, ("recv", (2, 3), f32, 0)]) == [("no error", 0.0)] * 2
    for other, words in cases:
        for text, seconds in ranks.run(2, pairs, [send, other]):
            assert words in text
            assert seconds < 2


def missing(communicator: DeviceCommunicatorBase) -> tuple[str, tuple[int, ...]]:
    checked = Checked(communicator.cpu_group, timeout=1.0)
    if communicator.rank == 1:
        return "", ()
    with pytest.raises(CommunicationTimeoutError) as error:
        checked.all_gather(X)
    return str(error.value), error.value.peers


def test_a_rank_that_does_not_arrive_is_named_on_the_others(ranks: Ranks):
    answers = ranks.run(3, missing)
    for rank in (0, 2):
        text, peers = answers[rank]
        assert peers == (1,)
        assert re.search(
            rf"\w+ on rank {rank} of 3 in group 'checked': every rank must arrive at call 0 "
            r"within 1 s, got rank 1 \(process \d+ on .*\) has not arrived. This rank asks for: "
            r"\w+ \[2, 3, 6, 4\] float32",
            text,
        )


def test_a_killed_rank_is_named_at_once():
    answers = diagnosis_ranks.run("killed", diagnosis_ranks.KILL, 1, "file")
    assert sorted(answers) == [0, 2]
    for text, seconds in answers.values():
        assert re.match(r"PeerLostError: .*got rank 1 \(process \d+ on .*\) is dead", text)
        assert text.endswith("peers=(1,)")
        assert seconds < 2


def test_a_stopped_rank_is_named_after_the_timeout():
    answers = diagnosis_ranks.run("stopped", diagnosis_ranks.STOP, 1, "file")
    assert sorted(answers) == [0, 2]
    for text, seconds in answers.values():
        assert re.match(r"CommunicationTimeoutError: .* within 1 s, got rank 1 .* is stopped", text)
        assert 1 < seconds < 3


@pytest.mark.parametrize(
    ("signal_number", "words"),
    [
        (diagnosis_ranks.KILL, "PeerLostError: .*: the store must be reachable, got"),
        (diagnosis_ranks.STOP, "CommunicationTimeoutError: .*: the store must answer within 1 s"),
    ],
    ids=["killed", "stopped"],
)
def test_a_store_whose_process_is_gone_is_an_error_and_not_a_hang(signal_number, words):
    answers = diagnosis_ranks.run("host", signal_number, 0, "rank 0")
    assert sorted(answers) == [1, 2]
    for text, seconds in answers.values():
        assert re.match(words, text), text
        assert seconds < 4


def by_number(communicator: DeviceCommunicatorBase) -> list[int]:
    """Numbers of the calls where a difference was seen."""
    diagnosis = Diagnosis(communicator.cpu_group)
    seen = []
    for number in range(70):
        try:
            diagnosis.before("op", X[: 1 + communicator.rank])
        except MismatchError:
            seen.append(number)
    return seen


def test_which_calls_are_compared_follows_from_their_number(ranks: Ranks):
    expected = [*range(9), 16, 32, 64]
    assert ranks.run(2, by_number) == [expected] * 2
    assert [number for number in range(70) if is_due(number)] == expected
    assert sum(map(is_due, range(10**6))) < 30


def cost(communicator: DeviceCommunicatorBase) -> tuple[float, float]:
    diagnosis = Diagnosis(communicator.cpu_group)
    x = torch.zeros(1, 4096, 12, 128)  # 25 MB
    for _ in range(600):  # warm
        diagnosis.before("all_to_all_4D", x, (2, 1))
    calls = 2000
    begin = time.perf_counter()
    for _ in range(calls):
        diagnosis.before("all_to_all_4D", x, (2, 1))
    each = (time.perf_counter() - begin) / calls
    communicator.all_to_all_4D(x)
    begin = time.perf_counter()
    for _ in range(5):
        communicator.all_to_all_4D(x)
    return each, (time.perf_counter() - begin) / 5


def test_a_warm_auto_costs_under_a_hundredth_of_a_25_mb_call(ranks: Ranks):
    for each, call in ranks.run(2, cost):
        assert each < call / 100


def uneven(communicator: DeviceCommunicatorBase) -> None:
    diagnosis = Diagnosis(communicator.cpu_group)
    x = torch.zeros(2, 3 + communicator.rank, 5)
    diagnosis.before("all_gather", x, (1,), uneven_dim=1)
    with pytest.raises(MismatchError, match=r"\[2, 3, 5\]"):
        diagnosis.before("all_gather", x, (1,))


def test_a_dim_that_may_differ_is_not_compared(ranks: Ranks):
    ranks.run(2, uneven)


def never(communicator: DeviceCommunicatorBase) -> None:
    diagnosis = Diagnosis(communicator.cpu_group, validate="off")
    if communicator.rank == 0:
        diagnosis.before("alone", X)
        diagnosis.before_pair("send", (1,), torch.int8, 1)
        diagnosis.failed("alone", ValueError())
    with pytest.raises(ValueError, match="validate must be one of auto, always, off, got 'on'"):
        Diagnosis(communicator.cpu_group, validate="on")
    with pytest.raises(ValueError, match="timeout must be a positive number of seconds, got 0"):
        Diagnosis(communicator.cpu_group, timeout=0)
    for timeout in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="timeout must be a positive number of seconds"):
            Diagnosis(communicator.cpu_group, timeout=timeout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Board, "of", lambda _: None)
        words = "validate must not be 'always' for a group without a store"
        with pytest.raises(ValueError, match=words):
            Diagnosis(communicator.cpu_group, validate="always")
        Diagnosis(communicator.cpu_group).before("alone", X)
    group = dist.new_group(timeout=datetime.timedelta(seconds=7))
    assert Diagnosis(group, validate="off").timeout == 7


def test_off_waits_for_nobody_and_bad_settings_are_errors(ranks: Ranks):
    ranks.run(4, never)


def test_two_communicators_on_one_group_do_not_see_each_others_calls(ranks: Ranks):
    ranks.run(2, two)


def two(communicator: DeviceCommunicatorBase) -> None:
    first, second = (Diagnosis(communicator.cpu_group) for _ in range(2))
    for _ in range(3):
        first.before("a", X)
    second.before("b", X[0])
    first.before("a", X)


def through_the_communicator(communicator: DeviceCommunicatorBase) -> list[str]:
    """What each op says where the ranks disagree, and what a rank's own mistake does."""
    always = DeviceCommunicatorBase(
        communicator.cpu_group, unique_name="always", validate="always", memory="off"
    )
    rank = communicator.rank
    calls: list[Callable[[], Any]] = [
        lambda: always.gather(X, 0, rank),
        lambda: always.all_to_all_4D((X, X[..., : 3 + rank])),
        lambda: always.all_gather(X if rank else None),
        lambda: always.send(X, 1) if rank == 0 else always.recv((2, 3), X.dtype, 0),
    ]
    said = []
    for call in calls:
        try:
            call()
        except (MismatchError, TypeError) as error:
            said.append(str(error))
    always.all_to_all_4D(torch.zeros(1, 3 + rank, 4, 2), gather_sizes=[3, 4])
    return said


def test_every_op_of_a_communicator_is_compared(ranks: Ranks):
    for rank, said in enumerate(ranks.run(2, through_the_communicator)):
        gather, packed, bad, pair = said
        assert "<- arguments" in gather
        assert "[2, 3, 6, 4] [2, 3, 6, 3]" in packed
        assert "<- shape" in packed
        assert "input_ must be a tensor, got None;" in bad
        assert ("<- bad arguments" in bad) == (rank == 1)
        assert "<- shape" in pair


def settings(communicator: DeviceCommunicatorBase) -> None:
    with pytest.raises(ValueError, match="validate must be one of auto, always, off, got 'on'"):
        DeviceCommunicatorBase(communicator.cpu_group, validate="on")
    off = DeviceCommunicatorBase.from_group(communicator.cpu_group, validate="off")
    if communicator.rank == 0:
        off.slice(X, 2)  # nothing is sent, and nobody is waited for
    auto = DeviceCommunicatorBase(communicator.cpu_group, memory="off")
    if communicator.rank == 0:
        with pytest.raises(ValueError, match="dst must be a rank of the group"):
            auto.send(X, 9)
    assert auto.all_reduce(torch.ones(1)).item() == 2, "a bad send is no collective"


def test_off_compares_nothing_and_a_bad_send_concerns_nobody(ranks: Ranks):
    ranks.run(2, settings)


def test_a_communicator_of_torchs_fake_backend_compares_nothing():
    """Those who plan memory for many ranks make such groups, with one process."""
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    try:
        communicator = DeviceCommunicatorBase(dist.group.WORLD, memory="off")
        assert communicator.all_to_all_4D(torch.zeros(2, 3, 8, 5)).shape == (2, 12, 2, 5)
        assert communicator.all_to_all_4D(torch.zeros(1, 600, 8, 64)).shape == (1, 2400, 2, 64)
    finally:
        dist.destroy_process_group()
