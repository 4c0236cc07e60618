"""KeyboardInterrupt at every point of a call: the others hear it, and nothing is lost."""

from __future__ import annotations

import contextlib
import random
import signal
import time

import memory_worlds as worlds
import pytest
import torch
from interruption import Interruption
from memory_worlds import ask_all, ask_pair, exchange, in_processes, outputs

from fastvideo_comm.errors import CollectiveError
from fastvideo_comm.memory import engine, flight, host, ledger, line
from fastvideo_comm.memory.host import HostMemory
from fastvideo_comm.memory.waiter import Waiter

MODULES = {module.__file__ for module in (engine, flight, host, ledger, line)}


def interrupted(memory: HostMemory, at: int, background: bool) -> tuple[bool, str]:
    """One call, interrupted at a point; made again where it had not begun."""
    numbers = memory._engine._ledger.next_numbers
    before = numbers[-1]
    ask = ask_all(memory, at)
    with Interruption(at, MODULES) as interruption:
        try:
            memory.start(ask, background=background).wait()
            how = "completed"
        except KeyboardInterrupt:
            how = "interrupted"
    if numbers[-1] == before:
        exchange(memory, at)
        how = "completed"
    if how == "completed" and numbers[-1] == before + 1 and not interruption.fired:
        assert torch.equal(outputs(ask), worlds.expected_all(memory, at))
    return interruption.fired, how


@pytest.mark.parametrize("background", [False, True])
def test_an_interrupt_at_any_point_is_heard_by_the_other_and_harms_nothing(background):
    def job(memory: HostMemory) -> int:
        ways, reasons = set(), []
        at = 0
        while True:
            if memory.rank == 1:
                fired, how = interrupted(memory, at, background)
                ways.add(how)
            else:
                ask = ask_all(memory, at)
                try:
                    memory.start(ask).wait()
                    assert torch.equal(outputs(ask), worlds.expected_all(memory, at))
                except CollectiveError as error:
                    reasons.append(str(error))
                fired = True
                del ask
            at += 1
            # Both go on together: rank 1 says whether it was the last.
            stop = ask_pair(memory, 1, 0, at, size=1)
            memory.start(stop).wait()
            goes_on = ask_pair(memory, 1, 0, int(fired), size=1)
            memory.start(goes_on).wait()
            if memory.rank == 0:
                fired = bool(outputs(goes_on).item() - 100)
            if not fired:
                break
        exchange(memory, 3)
        del stop, goes_on
        assert worlds.settled(memory) == 0
        assert set(reasons) <= {"rank 1 gave the call up: KeyboardInterrupt"}
        if memory.rank == 0:
            assert len(reasons) > at // 5  # the other interrupts came before it or after it
        else:
            assert ways == {"completed", "interrupted"}
            assert at > (20 if background else 100)
        return at

    first, second = in_processes(2, job, timeout=20)
    assert first == second


def test_what_was_received_before_an_interrupt_is_not_forgotten():
    """Rank 1 is interrupted while it handles the last message that it will ever get."""

    def job(memory: HostMemory) -> None:
        asks = [ask_pair(memory, 0, 1, call) for call in range(2)]
        first, second = (memory.start(ask) for ask in asks)
        if memory.rank == 0:
            second.wait()
            time.sleep(1.5)
            return
        ledger = memory._engine._ledger
        hear = ledger._hear

        def interrupt(rank: int, end: line.Line, heard: line.Heard) -> None:
            if heard.record.kind == line.DONE and heard.record.number == 1:
                ledger._hear = hear
                raise KeyboardInterrupt
            hear(rank, end, heard)

        ledger._hear = interrupt
        waiter = Waiter()
        with contextlib.suppress(KeyboardInterrupt):
            first.wait()
        while ledger._hear is not hear:  # the message came later than that of the first call
            with contextlib.suppress(KeyboardInterrupt):
                memory._engine._turn(waiter.ready(ledger.lines, (), 0.01))
        begin = time.monotonic()
        second.wait(10)
        assert time.monotonic() - begin < 1
        assert outputs(asks[1]).tolist() == [worlds.value(1, 0, 1)] * 3

    in_processes(2, job)


def test_a_segment_that_was_announced_before_an_interrupt_is_not_taken_for_the_next():
    def job(memory: HostMemory) -> None:
        if memory.rank == 1:
            pool = memory.pool
            make = pool._new_segment

            def interrupt(num_bytes: int) -> None:
                make(num_bytes)
                raise KeyboardInterrupt

            pool._new_segment = interrupt
            with pytest.raises(KeyboardInterrupt):
                memory.allocate([((8,), torch.int64)])
            pool._new_segment = make
        exchange(memory, 1)  # checks the values
        exchange(memory, 2)

    in_processes(2, job)


def test_interrupts_by_signal_at_random_times():
    armed = [False]

    def handler(*_: object) -> None:
        if armed[0]:
            raise KeyboardInterrupt

    def job(memory: HostMemory) -> None:
        generator = random.Random(memory.rank)
        signal.signal(signal.SIGALRM, handler)
        numbers = memory._engine._ledger.next_numbers
        for call in range(200):
            wanted = call + 1
            ask = None
            while numbers[-1] < wanted:
                try:
                    if generator.random() < 0.5:
                        armed[0] = True
                        signal.setitimer(signal.ITIMER_REAL, generator.uniform(5e-5, 2e-3))
                    ask = ask_all(memory, call)
                    memory.start(ask).wait()
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    assert torch.equal(outputs(ask), worlds.expected_all(memory, call))
                except (KeyboardInterrupt, CollectiveError):
                    armed[0] = False  # the timer may still run, after an error of the other rank
                    signal.setitimer(signal.ITIMER_REAL, 0)
        exchange(memory, 999)
        del ask
        assert worlds.settled(memory) == 0

    in_processes(2, job, timeout=20)
