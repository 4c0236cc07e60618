"""Outputs by memory are their holders' own, whatever becomes of them and in whichever order."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from memory_ranks import fresh
from ranks import Ranks
from test_collectives import same

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.errors import MismatchError
from fastvideo_comm.handle import AsyncHandle

# What ranks call, with the tensor that is to be expected on this rank.
Call = Callable[[DeviceCommunicatorBase, list[torch.Tensor]], tuple[Any, Any]]


def there(c: DeviceCommunicatorBase, xs: list[torch.Tensor]) -> tuple[Any, Any]:
    return c.all_to_all_4D(xs[c.rank]), torch.cat(xs, 1).chunk(c.world_size, 2)[c.rank]


def back(c: DeviceCommunicatorBase, xs: list[torch.Tensor]) -> tuple[Any, Any]:
    whole = torch.cat(xs, 1)
    mine = whole.chunk(c.world_size, 2)[c.rank]
    return c.all_to_all_4D(mine, 1, 2), xs[c.rank]


def packed(c: DeviceCommunicatorBase, xs: list[torch.Tensor]) -> tuple[Any, Any]:
    one_head = [x[:, :, :1] for x in xs]  # which every rank gets
    _, heads = c.all_to_all_4D((xs[c.rank], one_head[c.rank]))
    return heads, torch.cat(one_head, 1)


def uneven(c: DeviceCommunicatorBase, xs: list[torch.Tensor]) -> tuple[Any, Any]:
    xs = [x[:, : min(rank, x.shape[1])] for rank, x in enumerate(xs)]
    rows = [x.shape[1] for x in xs]
    heads = [xs[0].shape[2] - 1, *[0] * (c.world_size - 2), 1]
    output = c.all_to_all_4D(xs[c.rank], scatter_sizes=heads, gather_sizes=rows)
    return output, torch.cat(xs, 1).split(heads, 2)[c.rank]


def gathered(c: DeviceCommunicatorBase, xs: list[torch.Tensor]) -> tuple[Any, Any]:
    return c.all_gather(xs[c.rank], 1), torch.cat(xs, 1)


def reduced(c: DeviceCommunicatorBase, xs: list[torch.Tensor]) -> tuple[Any, Any]:
    return c.all_reduce(xs[c.rank]), torch.stack(xs).sum(0)


def asynchronous(c: DeviceCommunicatorBase, xs: list[torch.Tensor]) -> tuple[Any, Any]:
    handle = c.all_to_all_4D(xs[c.rank], async_op=True)
    return handle, torch.cat(xs, 1).chunk(c.world_size, 2)[c.rank]


CALLS: tuple[Call, ...] = (
    *(there, back, packed, uneven, gathered, reduced),
    *(asynchronous, asynchronous, asynchronous),
)


class Thread(threading.Thread):
    """Holds an output, looks at it once more, and lets go of it: all in a thread of its own."""

    def __init__(self, output: torch.Tensor, expected: torch.Tensor) -> None:
        super().__init__()
        self._held: tuple[torch.Tensor, torch.Tensor] | None = (output, expected)
        self.event = threading.Event()
        self.is_right = False
        self.start()

    def run(self) -> None:
        assert self._held is not None
        self.event.wait(60)
        self.is_right = torch.equal(*self._held)
        self._held = None


class Holder:
    """What one rank does with its outputs."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.graphs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.threads: list[Thread] = []
        self.flying: list[tuple[AsyncHandle[torch.Tensor], torch.Tensor]] = []

    def takes(self, output: Any, expected: torch.Tensor) -> None:
        if isinstance(output, AsyncHandle):
            self.flying.append((output, expected))
            return
        same(output, expected)
        expected = expected.clone()
        fate = self.random.randrange(7)
        if fate == 0:
            self.kept.append((output, expected))
        elif fate == 1:
            output.mul_(2)
            output[..., 0] = self.random.randrange(99)
            self.kept.append((output, output.clone()))
        elif fate == 2 and output.numel():
            at = self.random.randrange(output.shape[1])
            self.kept.append((output[:, at:].mT, expected[:, at:].mT))
        elif fate == 3:
            leaf = torch.full_like(expected, 3).requires_grad_()
            self.graphs.append((leaf, leaf * output, expected))  # autograd saves the output
        elif fate == 4:
            self.threads.append(Thread(output, expected))
        # Otherwise it is dropped.

    def lets_go(self) -> None:
        """Of something, after a last look."""
        for things, look in (
            (self.kept, lambda pair: same(*pair)),
            (self.graphs, self._differentiated),
            (self.threads, self._joined),
            (self.flying, lambda pair: self.takes(pair[0].wait(), pair[1])),
        ):
            if things and self.random.random() < 0.4:
                look(things.pop(self.random.randrange(len(things))))

    def ends(self) -> None:
        self.random.shuffle(self.flying)  # another order on every rank
        for handle, expected in self.flying:
            self.takes(handle.wait(), expected)
        for pair in self.kept:
            same(*pair)
        for graph in self.graphs:
            self._differentiated(graph)
        for thread in self.threads:
            self._joined(thread)

    def _differentiated(self, graph: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        leaf, product, expected = graph
        (gradient,) = torch.autograd.grad(product.sum(), leaf)
        same(gradient, expected)

    def _joined(self, thread: Thread) -> None:
        thread.event.set()
        thread.join()
        assert thread.is_right


def history(communicator: DeviceCommunicatorBase, steps: list[tuple[int, int]], seed: int) -> None:
    ranks = communicator.world_size
    holder = Holder(1000 * seed + communicator.rank)
    for number, (kind, length) in enumerate(steps):
        generator = torch.Generator().manual_seed(seed + number)
        shape = (2, length, 2 * ranks, 3)
        xs = [torch.randint(-99, 99, shape, generator=generator).double() for _ in range(ranks)]
        output, expected = CALLS[kind](communicator, xs)
        holder.takes(output, expected)
        del output, xs
        holder.lets_go()
    holder.ends()


STEPS = st.lists(
    st.tuples(st.integers(0, len(CALLS) - 1), st.sampled_from((0, 1, 2, 2, 2, 5, 40))),
    min_size=4,
    max_size=30,
)


@given(size=st.integers(2, 4), steps=STEPS, seed=st.integers(0, 99))
def test_no_history_of_outputs_changes_what_anybody_holds(ranks: Ranks, size, steps, seed):
    ranks.run(size, history, steps, seed, ways=["memory"])


def flying_in_any_order(communicator: DeviceCommunicatorBase, seed: int) -> None:
    """Each rank starts the same exchanges and waits for them in an order of its own."""
    ranks, rank = communicator.world_size, communicator.rank
    order = random.Random(100 * seed + rank).sample(range(12), 12)
    generator = torch.Generator().manual_seed(seed)
    # Two of each shape: their posts differ in nothing but the number of the call.
    wholes = [
        torch.rand((1, 4 * ranks * (1 + call // 2), ranks, 3), generator=generator)
        for call in range(12)
    ]
    inputs = [whole.chunk(ranks, 1)[rank].clone() for whole in wholes]
    handles = [communicator.all_to_all_4D(x, async_op=True) for x in inputs]
    between = communicator.all_gather(torch.tensor([rank]), 0)
    outputs: dict[int, torch.Tensor] = {}
    for count, call in enumerate(order):
        outputs[call] = handles[call].wait()
        inputs[call].fill_(-1)  # the rank's own again
        if count == 5:
            total = communicator.all_reduce(torch.ones(1))
    for call, whole in enumerate(wholes):
        same(outputs[call], whole.chunk(ranks, 2)[rank].contiguous())
    assert between.tolist() == list(range(ranks))
    assert total.item() == ranks


@pytest.mark.parametrize("size", [2, 3, 4])
def test_flights_are_waited_for_in_another_order_on_every_rank(ranks: Ranks, size):
    for seed in range(5):
        ranks.run(size, flying_in_any_order, seed, ways=["memory"])


def with_gradients(communicator: DeviceCommunicatorBase, seed: int) -> None:
    """Waited for in an order that the ranks share, which is the order of their backward."""
    ranks, rank = communicator.world_size, communicator.rank
    order = random.Random(seed).sample(range(5), 5)
    leaves = [torch.full((1, 2, ranks, 3), float(call + 1)) for call in range(5)]
    for leaf in leaves:
        leaf.requires_grad_()
    handles = [communicator.all_to_all_4D(leaf, async_op=True) for leaf in leaves]
    outputs: dict[int, torch.Tensor] = {call: handles[call].wait() for call in order}
    loss = sum((output**2).sum() * (call + 1) for call, output in outputs.items())
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    for call, leaf in enumerate(leaves):
        same(leaf.grad, torch.full_like(leaf, 2.0 * (call + 1) ** 2))
    (again,) = torch.autograd.grad(
        communicator.all_to_all_4D(leaves[0], async_op=True).wait()[..., rank % 3].sum(), leaves[0]
    )
    for head in range(ranks):
        assert again[:, :, head, head % 3].eq(1).all()
    assert again.sum() == 2 * ranks


@pytest.mark.parametrize("size", [2, 3])
def test_flights_with_gradients_are_waited_for_in_any_order(ranks: Ranks, size):
    for seed in range(4):
        ranks.run(size, with_gradients, seed, ways=["memory"])


def dropped_while_computing(communicator: DeviceCommunicatorBase) -> float:
    """Rank 0 drops its handle and makes no call; the others must have their outputs meanwhile."""
    ranks, rank = communicator.world_size, communicator.rank
    with fresh(communicator) as other:
        other.all_reduce(torch.ones(1))
        x = torch.full((1, 50_000, ranks, 4), float(rank), requires_grad=True)
        begin = time.monotonic()
        if rank == 0:
            with pytest.warns(RuntimeWarning, match="was dropped without"):
                other.all_to_all_4D(x, async_op=True)
            del x
            while time.monotonic() < begin + 1.5:
                torch.rand(64, 64) @ torch.rand(64, 64)
            seconds = 0.0
        else:
            output = other.all_to_all_4D(x, async_op=True).wait()
            seconds = time.monotonic() - begin
            assert output.view(ranks, -1).eq(torch.arange(ranks).view(-1, 1)).all()
        # The block of what was dropped is free, and the calls are still in step.
        assert other.all_gather(torch.tensor([rank]), 0).tolist() == list(range(ranks))
        if rank == 0:
            assert other.memory_stats().bytes_in_use == 0
    return seconds


@pytest.mark.parametrize("size", [2, 3])
def test_a_dropped_handle_holds_nobody_up_while_its_rank_computes(ranks: Ranks, size):
    for seconds in ranks.run(size, dropped_while_computing, ways=["memory"]):
        assert seconds < 1.4


def input_of_a_dropped_handle(communicator: DeviceCommunicatorBase) -> None:
    """Its memory must not become another tensor's before it was copied."""
    ranks, rank = communicator.world_size, communicator.rank
    for call in range(20):
        x = torch.full((1, 3000, ranks, 4), float(10 * call + rank))
        if rank == 0:
            with pytest.warns(RuntimeWarning, match="was dropped without"):
                communicator.all_to_all_4D(x, async_op=True)
            del x
            torch.full((1, 3000, ranks, 4), -1.0)  # likely at the same place
        else:
            output = communicator.all_to_all_4D(x, async_op=True).wait()
            numbers = 10 * call + torch.arange(ranks).view(-1, 1)
            assert output.view(ranks, -1).eq(numbers).all()


def test_the_input_of_a_dropped_handle_lives_until_it_was_copied(ranks: Ranks):
    ranks.run(2, input_of_a_dropped_handle, ways=["memory"])


def completed(communicator: DeviceCommunicatorBase) -> None:
    ranks, rank = communicator.world_size, communicator.rank
    if rank == 0:
        time.sleep(0.3)
    handle = communicator.all_to_all_4D(torch.rand(1, 2, ranks, 2), async_op=True)
    if rank:
        assert not handle.is_completed(), "rank 0 has not come yet"
    deadline = time.monotonic() + 30
    while not handle.is_completed():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    output = handle.wait()
    assert handle.wait() is output


def test_a_handle_is_completed_without_being_waited_for(ranks: Ranks):
    ranks.run(3, completed, ways=["memory"])


def in_another_order(communicator: DeviceCommunicatorBase, name: str) -> str:
    """Two calls of one shape whose backwards the ranks begin in another order."""
    ranks, rank = communicator.world_size, communicator.rank
    leaves = [torch.ones(1, 2, ranks, 2, requires_grad=True) for _ in range(2)]
    if name == "handles":
        handles = [communicator.all_to_all_4D(leaf, async_op=True) for leaf in leaves]
        order = (0, 1) if rank == 0 else (1, 0)
        outputs = {call: handles[call].wait() for call in order}
        loss = outputs[0].sum() + 10 * outputs[1].sum()
    else:
        losses = [getattr(communicator, name)(leaf).sum() for leaf in leaves]
        loss = losses[rank == 0]
    begin = time.monotonic()
    with pytest.raises(MismatchError, match=r"backward .*of call \d") as error:
        loss.backward()
    assert time.monotonic() - begin < 2
    assert [leaf.grad for leaf in leaves] == [None, None]
    assert communicator.all_reduce(torch.ones(1)).item() == ranks
    return str(error.value).partition("\n")[2]


@pytest.mark.parametrize("name", ["handles", "all_to_all_4D", "all_gather", "all_reduce"])
def test_backwards_that_begin_in_another_order_do_not_trade_their_gradients(ranks: Ranks, name):
    tables = ranks.run(3, in_another_order, name, ways=["memory"])
    if name != "handles":  # of which two are in the air; a rank names the one that it waits for
        assert len(set(tables)) == 1
    for table in tables:
        assert [line.endswith("<- arguments") for line in table.splitlines()[1:]] == [
            *(True, False, False)
        ]


def in_another_order_of_slices(communicator: DeviceCommunicatorBase) -> None:
    """A slice sends nothing; its backward is known by the call before it."""
    ranks, rank = communicator.world_size, communicator.rank
    losses = []
    for _ in range(2):
        losses.append(communicator.slice(torch.ones(ranks, requires_grad=True)).sum())
        communicator.all_reduce(torch.ones(1))
    with pytest.raises(MismatchError, match=r"slice backward .*of call \d"):
        losses[rank % 2].backward()


def test_slices_do_not_trade_their_gradients_either(ranks: Ranks):
    ranks.run(2, in_another_order_of_slices, ways=["memory"])
