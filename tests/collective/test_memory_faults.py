"""Ranks that die, stop, fork, run out of memory or are interrupted in exchanges by memory."""

from __future__ import annotations

import gc
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import mortal_ranks
import pytest
import torch
from memory_ranks import exchange, exchanged, fresh, num_descriptors, num_mappings, numbered
from mortal_ranks import GONE
from ranks import Ranks

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.collective import memory_call as ops
from fastvideo_comm.errors import (
    ClosedError,
    CollectiveError,
    CommunicationError,
    CommunicationTimeoutError,
    MismatchError,
    PeerLostError,
)

CULPRIT = 1


def in_the_copy(then: Callable[[], None]) -> Callable[..., None]:
    """A copy of parts that does something in the middle of the first of them, once."""
    copy, is_done = ops.copy_all_valid_, [False]

    def copy_all(pairs: Any, **options: Any) -> None:
        if not is_done[0]:
            is_done[0] = True
            for output, input_ in pairs:
                output[..., :1] = input_[..., :1] + 1
            then()
        copy(pairs, **options)

    return copy_all


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(communicator: DeviceCommunicatorBase, when: str) -> tuple[list[str], float]:
    """Errors of two calls, and the seconds to the first."""
    held = [exchange(communicator, call, 5) for call in range(4)]
    x = numbered(communicator, 9).float().requires_grad_()
    output = communicator.all_to_all_4D(x)
    communicator.all_gather(torch.ones(1), 0)
    if communicator.rank == CULPRIT:
        if when == "before":
            time.sleep(0.3)
            kill()
        ops.copy_all_valid_ = in_the_copy(kill if when != "in flight" else lambda: time.sleep(60))
    begin = time.monotonic()
    texts = []
    for again in range(2):
        with pytest.raises(PeerLostError) as error:  # noqa: PT012
            if when == "backward":
                torch.autograd.grad(output.sum(), x, retain_graph=True)
            elif when == "in flight":
                handle = communicator.all_to_all_4D(x.detach(), async_op=True)
                if communicator.rank == CULPRIT:
                    time.sleep(0.3)
                    kill()
                handle.wait()
            else:
                exchange(communicator, 4)
        assert error.value.peers == (CULPRIT,)
        assert isinstance(error.value, CommunicationError)
        texts.append(str(error.value))
        if not again:
            seconds = time.monotonic() - begin
    for call, tensor in enumerate(held):
        assert torch.equal(tensor, exchanged(communicator, call, 5))
    assert torch.equal(output.detach().long(), exchanged(communicator, 9))
    return texts, seconds


@pytest.mark.parametrize("when", ["before", "in the copy", "in flight", "backward"])
def test_a_killed_rank_is_named_at_once_on_all_others_which_live(when):
    answers = mortal_ranks.run(3, killed, when, gone=(CULPRIT,))
    for rank, answer in enumerate(answers):
        if rank == CULPRIT:
            assert answer == GONE
            continue
        texts, seconds = answer
        for text in texts:
            assert f"on rank {rank} of 3 in group 'mortal': rank 1 has died" in text
        assert seconds < 0.3 + 1


def stopped(communicator: DeviceCommunicatorBase) -> tuple[str, float]:
    held = exchange(communicator, 0)
    (processes,) = communicator.all_gather(torch.tensor([[os.getpid()]]), 1).tolist()
    if communicator.rank == CULPRIT:
        ops.copy_all_valid_ = in_the_copy(lambda: os.kill(os.getpid(), signal.SIGSTOP))
    begin = time.monotonic()
    text = ""
    try:
        exchange(communicator, 1)
        assert communicator.rank == CULPRIT, "it may have had its parts before it was stopped"
    except CommunicationTimeoutError as error:
        text = str(error)
    seconds = time.monotonic() - begin
    if communicator.rank == 0:
        time.sleep(0.3)  # all others have raised too
        os.kill(processes[CULPRIT], signal.SIGCONT)
    # Nothing of the call that failed is written into anything that came later.
    kept = [exchange(communicator, call) for call in range(2, 8)]
    for call, tensor in enumerate(kept, 2):
        assert torch.equal(tensor, exchanged(communicator, call))
    assert torch.equal(held, exchanged(communicator, 0))
    return text, seconds


def test_a_stopped_rank_is_named_within_the_timeout_and_may_go_on():
    for rank, (text, seconds) in enumerate(mortal_ranks.run(3, stopped, timeout=2.0)):
        assert seconds < 3.5
        if rank != CULPRIT:
            assert f"all_to_all_4D on rank {rank} of 3 in group 'mortal'" in text
            assert "rank 1 came and did not finish" in text


def interrupted(communicator: DeviceCommunicatorBase, phase: str) -> str:
    """One rank is interrupted in a call; it and the others go on with the next one."""
    ranks, rank = communicator.world_size, communicator.rank

    def interrupt(*_: Any, **__: Any) -> Any:
        if phase == "wait":
            patch.undo()  # the send may have to wait as well
            communicator.send(torch.ones(1), 0)
        raise KeyboardInterrupt

    with fresh(communicator) as other:
        held = exchange(other, 0)
        x = torch.full((1, 2, ranks, 3), float(rank))
        one_head = x[:, :, :1]
        text = ""
        memory_type = type(other._runner.group.memory)
        with pytest.MonkeyPatch.context() as patch:
            if rank == CULPRIT:
                if phase == "copy":
                    patch.setattr(ops, "copy_all_valid_", interrupt)
                elif phase == "middle of the copy":
                    patch.setattr(ops, "copy_all_valid_", in_the_copy(interrupt))
                elif phase == "start":
                    patch.setattr(memory_type, "start", interrupt)
                elif phase == "allocate":
                    patch.setattr(memory_type, "allocate", interrupt)
                elif phase == "wait":
                    patch.setattr("fastvideo_comm.memory.engine.Engine._rest", interrupt)
                elif phase == "sum":
                    patch.setattr("fastvideo_comm.collective.memory._reduced", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    other.all_reduce(x) if phase == "sum" else other.all_to_all_4D((x, one_head))
            elif phase in ("copy", "middle of the copy", "wait"):
                if phase == "wait" and rank == 0:
                    communicator.recv((1,), torch.float32, CULPRIT)  # which has to wait
                try:
                    outputs = other.all_to_all_4D((x, one_head))
                except CollectiveError as error:
                    text = str(error)
                else:  # rank 2 may have all that it needs before the culprit gives the call up
                    assert phase == "wait"
                    assert rank == 2
                    assert outputs[0].flatten().tolist() == [0.0] * 6 + [1.0] * 6 + [2.0] * 6
                    del outputs
            elif phase == "sum":  # the call was complete
                assert other.all_reduce(x)[0, 0, 0, 0] == 3
        # Where nothing had been said, the next call takes the place of this one.
        for call in range(1, 6):
            exchange(other, call)
        assert torch.equal(held, exchanged(other, 0))
        gc.collect()
        assert other.memory_stats().bytes_in_use <= 64 * -(-held.nbytes // 64)
    return text


@pytest.mark.parametrize(
    "phase", ["allocate", "start", "copy", "middle of the copy", "wait", "sum"]
)
def test_a_rank_that_was_interrupted_may_call_again(ranks: Ranks, phase):
    texts = ranks.run(3, interrupted, phase, ways=["memory"])
    if phase in ("copy", "middle of the copy", "wait"):
        assert "rank 1 gave the call up: KeyboardInterrupt" in texts[0]
        assert texts[2] == "" or "rank 1 gave the call up: KeyboardInterrupt" in texts[2]


class UserError(Exception):
    """Of the program, not of the library."""


def error_of_the_user(communicator: DeviceCommunicatorBase) -> None:
    ranks, rank = communicator.world_size, communicator.rank
    with fresh(communicator) as other:
        exchange(other, 0)
        files = num_descriptors()
        x = torch.full((1, 2, ranks, 3), float(rank), requires_grad=True)

        def step() -> torch.Tensor:
            handle = other.all_to_all_4D(x, async_op=True)
            if rank == CULPRIT:
                raise UserError
            return handle.wait()

        if rank == CULPRIT:
            with pytest.warns(RuntimeWarning, match="was dropped without"):  # noqa: PT031
                with pytest.raises(UserError):
                    step()
                gc.collect()
        else:
            assert step().sum() == 2 * 3 * sum(range(ranks))
        kept = [exchange(other, call) for call in range(1, 9)]
        for call, tensor in enumerate(kept, 1):
            assert torch.equal(tensor, exchanged(other, call))
        assert num_descriptors() <= files + 1  # the eventfd of the thread in the background


def test_an_exception_between_start_and_wait_concerns_nobody_else(ranks: Ranks):
    ranks.run(3, error_of_the_user, ways=["memory"])


def destroyed_in_flight(communicator: DeviceCommunicatorBase) -> None:
    rank = communicator.rank
    communicator.all_reduce(torch.ones(1))  # connects its own memory
    files, maps = num_descriptors(), num_mappings()
    other = DeviceCommunicatorBase(communicator.cpu_group, unique_name="fresh", memory="on")
    held = exchange(other, 0)
    if rank == 0:
        # The others have started, and destroyed theirs.
        communicator.all_reduce(torch.ones(1))
        with pytest.raises(PeerLostError, match=r"closed its communicator|has left") as error:
            other.all_to_all_4D(numbered(other, 1), async_op=True).wait()
        assert error.value.peers[0] in (1, 2)
        del error
        # They have posted another call than this one, and left before they could say which.
        with pytest.raises(MismatchError, match=r"\[1, 3, 3, 4\] .*\n.*no word .* rank 1, 2$"):
            exchange(other, 2)
        other.destroy()
    else:
        handles = [other.all_to_all_4D(numbered(other, call), async_op=True) for call in (1, 2)]
        other.destroy()
        for handle in handles:
            # Ranks 1 and 2 may hear of each other's end before their own.
            with pytest.raises(
                (ClosedError, PeerLostError),
                match=r"'fresh' was destroyed (during|before) the call|"
                r"'fresh': rank [12] closed its communicator during the call",
            ):
                handle.wait()
        del handles, handle
        communicator.all_reduce(torch.ones(1))
    assert torch.equal(held, exchanged(communicator, 0))
    del other, held
    gc.collect()
    assert num_descriptors() == files
    assert num_mappings() == maps


def test_destroying_with_exchanges_in_flight_is_a_named_error_and_leaves_nothing(ranks: Ranks):
    ranks.run(3, destroyed_in_flight, ways=["memory"])


def backward_after_destroy(communicator: DeviceCommunicatorBase) -> None:
    other = DeviceCommunicatorBase(communicator.cpu_group, unique_name="fresh", memory="on")
    leaf = torch.ones(1, 2, other.world_size, 2, requires_grad=True)
    losses = [
        (other.all_to_all_4D(leaf) ** 2).sum(),
        (other.all_gather(leaf, 1) ** 2).sum(),
        (other.all_to_all_4D(leaf, async_op=True).wait() ** 2).sum(),
    ]
    if other.rank == CULPRIT:
        other.destroy()
        for loss in losses:
            with pytest.raises(ClosedError, match="destroyed before a backward that needs it"):
                loss.backward()
    else:
        begin = time.monotonic()
        for loss in losses:
            with pytest.raises(PeerLostError, match="rank 1 has left the group"):
                loss.backward()
        assert time.monotonic() - begin < 2
        other.destroy()
    assert leaf.grad is None


def test_a_backward_after_destroy_is_an_error_on_all_ranks(ranks: Ranks):
    ranks.run(3, backward_after_destroy, ways=["memory"])


def at_random(communicator: DeviceCommunicatorBase, fate: str, seed: int) -> list[str]:
    """Mixed calls until the culprit is killed or stopped, at any moment."""
    rank = communicator.rank
    random_ = random.Random(seed)
    number = signal.SIGKILL if fate == "killed" else signal.SIGSTOP
    seconds = 0.05 + 0.3 * random_.random()
    exchange(communicator, 0)
    if rank == CULPRIT:
        threading.Timer(seconds, lambda: os.kill(os.getpid(), number)).start()
    held: list[tuple[int, int, torch.Tensor]] = []
    kind = PeerLostError if fate == "killed" else CommunicationTimeoutError
    begin = time.monotonic()
    try:
        for call in range(1, 1_000_000):
            assert time.monotonic() < begin + 30, "the others go on for ever"
            length = random_.choice((1, 3, 3, 500, 20_000))
            begin_call = time.monotonic()
            handle = None
            if call % 5 == 0:
                handle = communicator.all_to_all_4D(numbered(communicator, call, 3), async_op=True)
            output = exchange(communicator, call, length)
            if handle is not None:
                assert torch.equal(handle.wait(), exchanged(communicator, call, 3))
            if call % 7 == 0:
                communicator.all_reduce(torch.ones(length))
            held.append((call, length, output))
            del held[:-10]
    except kind as error:
        waited = time.monotonic() - begin_call
        gc.collect()
        for call, length, tensor in held:
            assert torch.equal(tensor, exchanged(communicator, call, length))
        assert waited < (2 if fate == "killed" else 4), waited
        return [str(error)]
    raise AssertionError("unreachable")


def check_random(fate: str, seed: int) -> None:
    answers = mortal_ranks.run(3, at_random, fate, seed, gone=(CULPRIT,), timeout=2.0)
    words = "rank 1 has died" if fate == "killed" else "ranks? (1|0, 1|1, 2) (did|came)"
    for rank in (0, 2):
        assert re.search(words, answers[rank][0]), answers[rank][0]


@pytest.mark.parametrize("fate", ["killed", "stopped"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_rank_killed_or_stopped_at_any_moment_is_named_and_harms_nothing(fate, seed):
    check_random(fate, seed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fate", ["killed", "stopped"])
def test_100_moments(fate):
    for seed in range(2, 102):
        check_random(fate, seed)
