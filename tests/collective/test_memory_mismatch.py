"""Ranks that disagree about a call by memory: an error on all of them, in every call."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import mortal_ranks
import pytest
import torch
import torch.distributed as dist
from memory_ranks import exchange, fresh
from ranks import Ranks

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.errors import CommunicationTimeoutError, MismatchError, PeerLostError

Call = Callable[[DeviceCommunicatorBase, torch.Tensor], Any]


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.clone().requires_grad_()


def many(c: DeviceCommunicatorBase, x: torch.Tensor) -> Any:
    """The right call after one that the others do not make."""
    c.all_gather(x, 1)
    return right(c, x)


def right(c: DeviceCommunicatorBase, x: torch.Tensor) -> Any:
    return c.all_to_all_4D(x)


# What rank 0 calls, what the others call, and the columns that the table marks.
MISTAKES: dict[str, tuple[Call, Call, str]] = {
    "shape": (lambda c, x: c.all_to_all_4D(x[:, :1]), right, "shape"),
    "same bytes": (
        lambda c, x: c.all_to_all_4D(x.view(1, 3, 2 * x.shape[2], 2)),
        right,
        "shape",
    ),
    "dtype": (lambda c, x: c.all_to_all_4D(x.double()), right, "dtype"),
    "dtype of the same bytes": (
        lambda c, x: c.all_to_all_4D(x.view(torch.int32)),
        right,
        "dtype",
    ),
    "op": (lambda c, x: c.all_reduce(x), right, "op, arguments"),
    "dims": (
        lambda c, x: c.all_to_all_4D(x.repeat(1, c.world_size, 1, 1)[:, : 3 * c.world_size], 1, 2),
        lambda c, x: c.all_to_all_4D(x.repeat(1, c.world_size, 1, 1)[:, : 3 * c.world_size]),
        "arguments",
    ),
    "dim": (lambda c, x: c.all_gather(x, 1), lambda c, x: c.all_gather(x, 2), "arguments"),
    "sizes": (
        lambda c, x: c.all_to_all_4D(x, gather_sizes=[3] * c.world_size),
        lambda c, x: (
            c.all_to_all_4D(x, gather_sizes=[*[3] * (c.world_size - 1), 4])
            if c.rank < c.world_size - 1
            else c.all_to_all_4D(
                torch.cat((x, x[:, :1]), 1), gather_sizes=[*[3] * (c.world_size - 1), 4]
            )
        ),
        "arguments",
    ),
    "scatter sizes": (
        lambda c, x: c.all_to_all_4D(x, scatter_sizes=[c.world_size, *[0] * (c.world_size - 1)]),
        lambda c, x: c.all_to_all_4D(x, scatter_sizes=[*[0] * (c.world_size - 1), c.world_size]),
        "arguments",
    ),
    "number of tensors": (lambda c, x: c.all_to_all_4D((x, x)), right, "shape"),
    "asynchronous": (
        lambda c, x: c.all_to_all_4D(x, async_op=True).wait(),
        right,
        "arguments",
    ),
    "requires_grad": (lambda c, x: c.all_to_all_4D(leaf(x)), right, "requires_grad"),
    "grad=": (
        lambda c, x: c.all_gather(x, 1, grad="slice"),
        lambda c, x: c.all_gather(x, 1),
        "arguments",
    ),
    "reduce op": (
        lambda c, x: c.all_reduce(x, dist.ReduceOp.MAX),
        lambda c, x: c.all_reduce(x),
        "arguments",
    ),
    "large reduce": (
        lambda c, x: c.all_reduce(x.repeat(1, 2000, 1, 1)),
        lambda c, x: c.all_reduce(x.repeat(1, 1000, 1, 1)),
        "shape",
    ),
    "dst": (
        lambda c, x: c.gather(x, 0, 1),
        lambda c, x: c.gather(x, 1, 1),
        "arguments",
    ),
    "number of calls": (many, right, "op, arguments"),
}


def mistaken(c: DeviceCommunicatorBase, name: str) -> str:
    """One mistake; whatever anybody holds stays as it is, and the next calls work."""
    x = torch.rand(1, 3, c.world_size, 4)
    held = [c.all_gather(x, 1), c.all_to_all_4D(x), x]
    copies = [tensor.clone() for tensor in held]
    rank_0, others, _ = MISTAKES[name]
    begin = time.monotonic()
    with pytest.raises(MismatchError) as error:
        (rank_0 if c.rank == 0 else others)(c, x)
    seconds = time.monotonic() - begin
    assert seconds < 2
    for call in range(3):
        exchange(c, call)
    for tensor, copy in zip(held, copies, strict=True):
        assert torch.equal(tensor, copy)
    return str(error.value)


def many_mistakes(communicator: DeviceCommunicatorBase, names: list[str]) -> list[str]:
    return [mistaken(communicator, name) for name in names]


def check_tables(answers: list[list[str]], names: list[str]) -> None:
    size = len(answers)
    for name, texts in zip(names, zip(*answers, strict=True), strict=True):
        tables = {text.partition("\n")[2] for text in texts}
        assert len(tables) == 1, (name, texts)
        lines = tables.pop().splitlines()
        assert [line.split()[0] for line in lines[1:]] == [str(rank) for rank in range(size)]
        if size > 2:
            assert lines[1].endswith(f"<- {MISTAKES[name][2]}"), (name, lines)
            assert "<-" not in "".join(lines[2:]), "the majority is taken to be right"
        for rank, text in enumerate(texts):
            assert f"on rank {rank} of {size} in group 'test': the ranks must ask for" in text


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_raise_the_same_table_and_go_on(ranks: Ranks, size):
    names = list(MISTAKES)
    check_tables(ranks.run(size, many_mistakes, names, ways=["memory"]), names)


def after_many_calls(communicator: DeviceCommunicatorBase, names: list[str]) -> list[str]:
    x = torch.rand(1, 3, communicator.world_size, 4)
    for _ in range(1000):
        communicator.all_to_all_4D(x)
    return many_mistakes(communicator, names)


@pytest.mark.parametrize("size", [2, 3])
def test_at_call_1000_too(ranks: Ranks, size):
    names = ["shape", "dtype of the same bytes", "number of calls"]
    check_tables(ranks.run(size, after_many_calls, names, ways=["memory"]), names)


def first_call(communicator: DeviceCommunicatorBase, name: str, validate: str) -> str:
    """The call in which the ranks connect their memory."""
    rank_0, others, _ = MISTAKES[name]
    x = torch.rand(1, 3, communicator.world_size, 4)
    with fresh(communicator, validate=validate) as other:
        begin = time.monotonic()
        with pytest.raises(MismatchError) as error:
            (rank_0 if communicator.rank == 0 else others)(other, x)
        assert time.monotonic() - begin < 2
        exchange(other, 1)
    return str(error.value).partition("\n")[2]


@pytest.mark.parametrize("validate", ["auto", "always", "off"])
@pytest.mark.parametrize("size", [2, 3])
def test_at_the_first_call_too(ranks: Ranks, size, validate):
    for name in ("shape", "op", "requires_grad", "dtype"):
        answers = ranks.run(size, first_call, name, validate, ways=["memory"])
        assert len(set(answers)) == 1
        assert f"<- {MISTAKES[name][2]}" in answers[0]


def bad_arguments(c: DeviceCommunicatorBase, culprit: int) -> list[str]:
    texts = []
    x = torch.rand(1, 3, c.world_size, 4)
    held = c.all_to_all_4D(x)
    copy = held.clone()
    calls: list[tuple[Call, Call, str]] = [
        (lambda c, x: c.all_to_all_4D(x[0]), right, "must have 4 dims"),
        (lambda c, x: c.all_gather(x, 7), lambda c, x: c.all_gather(x, 1), "dim must be in"),
        (lambda c, x: c.all_reduce(x, 3), lambda c, x: c.all_reduce(x), "op must be one of"),
        (lambda c, x: c.gather(None), lambda c, x: c.gather(x, 1), "must be a tensor, got None"),
    ]
    for bad, good, words in calls:
        begin = time.monotonic()
        if c.rank == culprit:
            with pytest.raises((ValueError, TypeError), match=words) as error:
                bad(c, x)
            assert not isinstance(error.value, MismatchError)
        else:
            with pytest.raises(MismatchError, match="<- bad arguments") as mismatch:
                good(c, x)
            assert words in str(mismatch.value)
            texts.append(str(mismatch.value).partition("\n")[2])
        assert time.monotonic() - begin < 2
        exchange(c, 5)
    assert torch.equal(held, copy)
    return texts


@pytest.mark.parametrize("culprit", [0, 2])
def test_bad_arguments_on_one_rank_are_shown_on_all_others(ranks: Ranks, culprit):
    answers = ranks.run(3, bad_arguments, culprit, ways=["memory"])
    first, second = (answer for rank, answer in enumerate(answers) if rank != culprit)
    assert len(first) == 4
    for one, other in zip(first, second, strict=True):
        assert one.count("<- bad arguments") == other.count("<- bad arguments") == 1


def bad_slice(communicator: DeviceCommunicatorBase) -> None:
    """A slice sends nothing: where it is not compared, nobody waits for the rank that is wrong."""
    ranks = communicator.world_size
    for validate in ("off", "auto"):
        with fresh(communicator, validate=validate) as other:
            exchange(other, 1)
            for call in range(12):
                x = torch.rand(ranks * 2)
                for _ in range(2 if validate == "auto" else 0):
                    if not other._runner.group.diagnosis.compares_next():
                        break
                    other.slice(x)
                if other.rank == 1:
                    with pytest.raises(ValueError, match="must have a size"):
                        other.slice(torch.rand(2 * ranks + 1))
                elif other._runner.group.diagnosis.compares_next():
                    with pytest.raises(MismatchError, match="<- bad arguments"):
                        other.slice(x)
                else:
                    other.slice(x)
                exchange(other, call)


def test_a_bad_slice_does_not_bring_the_ranks_out_of_step(ranks: Ranks):
    ranks.run(3, bad_slice, ways=["memory"])


def pairs(c: DeviceCommunicatorBase) -> None:
    """A send and a recv that do not fit; others are not concerned."""
    exchange(c, 0)
    cases = [
        (lambda: c.recv((2, 4), torch.float32, 0), "<- shape"),
        (lambda: c.recv((3, 2), torch.float32, 0), "<- shape"),
        (lambda: c.recv((2, 3), torch.int32, 0), "<- dtype"),
        (lambda: c.send(torch.ones(2, 3), 0), "<- needs the other of send and recv"),
    ]
    for receive, words in cases:
        begin = time.monotonic()
        if c.rank < 2:
            with pytest.raises(MismatchError, match=words) as error:
                c.send(torch.ones(2, 3), 1) if c.rank == 0 else receive()
            assert f"on rank {c.rank} of 3 in group 'test'" in str(error.value)
        assert time.monotonic() - begin < 2
        if c.rank == 0:
            c.send(torch.ones(5), 1)
        elif c.rank == 1:
            assert c.recv((5,), torch.float32, 0).sum() == 5
    exchange(c, 1)


def test_a_send_and_a_recv_that_do_not_fit_are_an_error_on_both(ranks: Ranks):
    ranks.run(3, pairs, ways=["memory"])


def other_strides(communicator: DeviceCommunicatorBase, validate: str) -> str:
    with fresh(communicator, validate=validate) as other:
        exchange(other, 0)
        x = torch.rand(1, other.world_size, 3, 4)
        x = x.transpose(1, 2) if other.rank else x.transpose(1, 2).contiguous()
        try:
            other.all_to_all_4D(x)
        except MismatchError as error:
            return str(error)
    return "no error"


def test_strides_are_compared_only_where_every_call_is_validated(ranks: Ranks):
    assert ranks.run(2, other_strides, "auto", ways=["memory"]) == ["no error"] * 2
    for text in ranks.run(2, other_strides, "always", ways=["memory"]):
        assert "<- strides" in text


def other_backward(c: DeviceCommunicatorBase, name: str) -> str:
    x = torch.ones(1, 3, c.world_size, 4, requires_grad=True)
    y, z = c.all_to_all_4D(x), c.all_gather(x, 1)
    loss = y.sum() if c.rank == 0 else z.sum()
    begin = time.monotonic()
    with pytest.raises(MismatchError) as error:  # noqa: PT012
        if name == "another":
            loss.backward()
        elif c.rank == 0:  # none: it goes on to the next forward
            c.all_gather(torch.ones(1), 0)
        else:
            y.sum().backward()
    assert time.monotonic() - begin < 2
    assert x.grad is None
    exchange(c, 0)
    return str(error.value).partition("\n")[2]


@pytest.mark.parametrize("name", ["another", "none"])
@pytest.mark.parametrize("size", [2, 3])
def test_a_backward_that_differs_is_the_same_table_on_all(ranks: Ranks, size, name):
    tables = ranks.run(size, other_backward, name, ways=["memory"])
    assert len(set(tables)) == 1
    assert "all_to_all_4D backward" in tables[0]


def in_flight(c: DeviceCommunicatorBase) -> None:
    """A mismatch of one exchange leaves those before and behind it alone."""
    ranks, rank = c.world_size, c.rank
    x = torch.full((1, 2, ranks, 2), float(rank))
    first = c.all_to_all_4D(x, async_op=True)
    second = c.all_to_all_4D(x[:, : 1 + (rank > 0)], async_op=True)
    third = c.all_to_all_4D(x * 2, async_op=True)
    with pytest.raises(MismatchError, match="in call"):
        second.wait()
    numbers = torch.arange(ranks).view(-1, 1)
    assert (third.wait().view(ranks, -1) == 2 * numbers).all()
    assert (first.wait().view(ranks, -1) == numbers).all()
    with pytest.raises(RuntimeError, match="failed when it was waited for before"):
        second.wait()


def test_flights_around_a_mismatch_arrive(ranks: Ranks):
    ranks.run(3, in_flight, ways=["memory"])


def never_comes(communicator: DeviceCommunicatorBase) -> tuple[str, float]:
    """Rank 1 makes another kind of call, for which nobody waits, or none."""
    exchange(communicator, 0)
    begin = time.monotonic()
    with pytest.raises(CommunicationTimeoutError) as error:  # noqa: PT012
        if communicator.rank == 1:
            communicator.recv((2,), torch.float32, 0)
        else:
            communicator.all_gather(torch.ones(2), 0)
    return str(error.value), time.monotonic() - begin


def test_a_call_that_the_others_do_not_make_ends_with_the_timeout():
    answers = mortal_ranks.run(3, never_comes, timeout=2.0)
    for rank, (text, seconds) in enumerate(answers):
        assert f"on rank {rank} of 3 in group 'mortal'" in text
        assert f"rank {0 if rank == 1 else 1} did not come" in text
        assert 1.5 < seconds < 4


def one_call_less(communicator: DeviceCommunicatorBase) -> str:
    for call in range(5):
        exchange(communicator, call)
    if communicator.rank == 1:
        communicator.destroy()
        return ""
    with pytest.raises(PeerLostError) as error:
        exchange(communicator, 5)
    assert error.value.peers == (1,)
    return str(error.value)


def test_a_rank_that_has_ended_is_named():
    for rank, text in enumerate(mortal_ranks.run(3, one_call_less)):
        if rank != 1:
            assert f"all_to_all_4D on rank {rank} of 3 in group 'mortal': rank 1 has left" in text
