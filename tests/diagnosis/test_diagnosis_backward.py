"""The collectives of a backward are compared like those of a forward."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diagnosis_ranks import Checked
from op_table import calls_of
from ranks import Ranks
from torch.utils.checkpoint import checkpoint

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.diagnosis import Diagnosis, MismatchError
from fastvideo_comm.errors import ClosedError, CommunicationTimeoutError


def leaf(*shape: int) -> torch.Tensor:
    return torch.ones(shape, requires_grad=True)


def skipped(c: DeviceCommunicatorBase, mine: bool) -> None:
    """A loss that does not use the output on one rank, which goes on to the next forward."""
    x, other = leaf(2, 3), leaf(2)
    y = c.all_gather(x, 0)
    (other.sum() if mine else y.sum() + other.sum()).backward()
    c.all_reduce(other.detach())


def dropped_from_the_middle(c: DeviceCommunicatorBase, mine: bool) -> None:
    """The backward of the last op is the same on all ranks, that of the one before is not."""
    x, other = leaf(2, 3), leaf(2, 3)
    y = c.all_to_all_4D(x.view(1, 1, 3, 2), gather_sizes=[1] * c.world_size)
    z = c.all_reduce(other)
    (z.sum() if mine else (z.sum() + y.sum())).backward()
    c.slice(torch.ones(c.world_size))


def other_order(c: DeviceCommunicatorBase, mine: bool) -> None:
    x = leaf(2, 3)
    losses = [c.all_gather(x, 0).sum(), c.all_reduce(x, dist.ReduceOp.MAX).sum()]
    for loss in reversed(losses) if mine else losses:
        loss.backward()


def other_order_of_one_shape(c: DeviceCommunicatorBase, mine: bool) -> None:
    """Their gradients would be traded for each other, without an error of the backend."""
    x = leaf(2, 3)
    losses = [c.all_gather(x, 0).sum() for _ in range(2)]
    losses[mine].backward()


def other_exchange(c: DeviceCommunicatorBase, mine: bool) -> None:
    """Handles whose gradients are sent in another order."""
    x = leaf(1, 2, c.world_size, 2)
    handles = [
        c.all_to_all_4D(x, async_op=True),
        c.all_to_all_4D((x, torch.cat((x, x), 3)), async_op=True),
    ]
    losses = [handles[0].wait().sum(), handles[1].wait()[1].sum()]
    for loss in reversed(losses) if mine else losses:
        loss.backward()


def other_dtype(c: DeviceCommunicatorBase, mine: bool) -> None:
    """A slice sends nothing in its forward, so ranks can come to a backward with two dtypes."""
    x = torch.ones(c.world_size, dtype=torch.float64 if mine else torch.float32)
    validate, c.diagnosis.validate = c.diagnosis.validate, "auto"
    c.diagnosis._number = 9  # is not compared
    y = c.slice(x.requires_grad_())
    c.diagnosis.validate = validate
    y.sum().backward()


def other_second_order(c: DeviceCommunicatorBase, mine: bool) -> None:
    x = leaf(2, 3)
    (grad,) = torch.autograd.grad((c.all_gather(x, 0) ** 3).sum(), x, create_graph=True)
    if not mine:
        grad.sum().backward()
    c.all_reduce(torch.ones(2))


def no_second_order(c: DeviceCommunicatorBase, mine: bool) -> None:
    x = leaf(2, 3)
    torch.autograd.grad((c.all_gather(x, 0) ** 3).sum(), x, create_graph=not mine)


def extreme_of_one_loss(c: DeviceCommunicatorBase, mine: bool) -> None:
    """One loss that all ranks hold: that of MAX asks who holds the extreme."""
    x = leaf(2, 3)
    loss = c.all_reduce(x, dist.ReduceOp.MAX, grad="identity").sum()
    (x.sum() if mine else loss).backward()
    c.slice(torch.ones(c.world_size))


Program = Callable[[Any, bool], None]
# A program, what the table says of rank 0 (who is told `mine`), and of the others.
MISTAKES: dict[str, tuple[Program, str, str]] = {
    "skips": (skipped, r"all_reduce +\[2\]", r"all_gather backward +\[6, 3\]"),
    "skips one": (
        *(dropped_from_the_middle, r"slice +\[3\]"),
        r"all_to_all_4D backward +\[1, 3, 1, 2\]",
    ),
    "order": (
        *(other_order, r"all_reduce backward +\[2, 3\] +float32 +max"),
        r"all_gather backward +\[6, 3\]",
    ),
    "order of one shape": (
        *(other_order_of_one_shape, r"all_gather backward +\[6, 3\] .*of call 1"),
        r"all_gather backward +\[6, 3\] .*of call 0",
    ),
    "skips an extreme": (
        *(extreme_of_one_loss, r"slice +\[3\]"),
        r"all_reduce backward +\[2, 3\] +float32 +max, grad=identity",
    ),
    "order of handles": (
        *(other_exchange, r"all_to_all_4D backward +\[1, 6, 1, 2\] \[1, 6, 1, 4\] "),
        r"all_to_all_4D backward +\[1, 6, 1, 2\] +f.*async_op=True",
    ),
    "dtype": (other_dtype, r"slice backward +\[1\] +float64", r"slice backward +\[1\] +float32"),
    "second order": (
        *(other_second_order, r"all_reduce +\[2\]"),
        r"reduce_scatter backward +\[2, 3\]",
    ),
    "no second order": (
        *(no_second_order, r"all_gather backward .*False"),
        r"all_gather backward .*True",
    ),
}


def mistake(communicator: DeviceCommunicatorBase, name: str) -> tuple[str, float]:
    checked = Checked(communicator.cpu_group, validate="always", timeout=20.0)
    program = MISTAKES[name][0]
    begin = time.monotonic()
    with pytest.raises(MismatchError) as error:
        program(checked, communicator.rank == 0)
    seconds = time.monotonic() - begin
    assert checked.all_reduce(torch.ones(1)).item() == communicator.world_size, "still usable"
    return str(error.value), seconds


@pytest.mark.parametrize("name", MISTAKES)
def test_a_backward_that_goes_another_way_is_the_same_table_on_every_rank(ranks: Ranks, name):
    answers = ranks.run(3, mistake, name)
    tables = {text.partition("\n")[2] for text, _ in answers}
    assert len(tables) == 1
    lines = tables.pop().splitlines()
    for line, words in zip(lines[1:], MISTAKES[name][1:] + MISTAKES[name][2:], strict=True):
        assert re.search(words, line), line
    assert "<- " in lines[1]
    assert "<- " not in lines[2] + lines[3], "the majority is taken to be right"
    assert max(seconds for _, seconds in answers) < 2


def absent(communicator: DeviceCommunicatorBase) -> str:
    checked = Checked(communicator.cpu_group, timeout=0.5)
    y = checked.all_gather(leaf(2), 0)
    if communicator.rank == 1:
        return ""
    with pytest.raises(CommunicationTimeoutError) as error:
        y.sum().backward()
    assert error.value.peers == (1,)
    return str(error.value)


def test_a_rank_that_does_not_come_to_a_backward_is_named(ranks: Ranks):
    text = ranks.run(2, absent)[0]
    assert re.match(
        r"all_gather backward on rank 0 of 2 in group 'checked': every rank must arrive at call 1 "
        r"within 0.5 s, got rank 1 .* This rank asks for: all_gather backward \[4\] float32",
        text,
    )


def destroyed(communicator: DeviceCommunicatorBase) -> tuple[str, float]:
    checked = Checked(communicator.cpu_group, timeout=20.0)
    y = checked.all_gather(leaf(2), 0)
    if communicator.rank == 1:
        checked.destroy()
    begin = time.monotonic()
    with pytest.raises((ClosedError, MismatchError)) as error:
        y.sum().backward()
    return str(error.value), time.monotonic() - begin


def test_a_backward_after_destroy_is_told_to_the_others(ranks: Ranks):
    answers = ranks.run(3, destroyed)
    for rank, (text, seconds) in enumerate(answers):
        assert "destroyed before a backward that needs it" in text
        assert ("<- bad arguments" in text) == (rank != 1)
        assert seconds < 2


REDUCTIONS = (dist.ReduceOp.SUM, dist.ReduceOp.AVG, dist.ReduceOp.MAX, dist.ReduceOp.PRODUCT)


def program(c: DeviceCommunicatorBase) -> list[torch.Tensor]:
    """Every op, with another loss on every rank, to second order."""
    ranks, rank = c.world_size, c.rank
    torch.manual_seed(rank)
    x = torch.rand(2, 3, 2 * ranks, 4, dtype=torch.float64, requires_grad=True)
    rows = [3 + other for other in range(ranks)]
    own = torch.rand(1, rows[rank], ranks, 2, dtype=torch.float64, requires_grad=True)
    heads = [2, *[0] * (ranks - 2), ranks - 2]
    calls: list[Callable[[], Any]] = [
        *[partial(call, c, x) for call in calls_of("any").values()],
        lambda: c.all_to_all_4D((x, x[:, :, :1], x.sin())),
        lambda: c.all_to_all_4D(own, scatter_sizes=heads, gather_sizes=rows),
        lambda: c.all_to_all_4D((own, own), gather_sizes="auto", async_op=True).wait(),
        lambda: c.all_to_all_4D(c.all_to_all_4D(x, async_op=True).wait(), 1, 2),
        lambda: c.all_gather(own, 1, gather_sizes=rows),
        lambda: c.all_gather(own, 1, gather_sizes="auto", grad="slice"),
        lambda: c.slice(x, 2, scale_grad=True),
        lambda: c.all_gather(x, 1),
        lambda: c.slice(x, 1, scatter_sizes="auto"),
        *[
            lambda op=op, grad=grad: c.all_reduce(x, op, grad=grad)
            for op in REDUCTIONS
            for grad in ("all_reduce", "identity")
        ],
        lambda: checkpoint(lambda x: c.all_gather(c.all_reduce(x).sin(), 0), x, use_reentrant=True),
    ]
    results = []
    for call in calls:
        outputs = call()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        inputs = [x, own]
        # An expanded gradient on one rank, a strided one on another.
        loss = sum((o.sum() if rank == 0 else (o.mT * 2).sum()) for o in outputs)
        if call is calls[-1]:  # a reentrant checkpoint knows `backward` alone
            loss.backward()
            results.append(x.grad)
            continue
        results += derivative(loss, inputs, retain_graph=True)
        grads = derivative(sum((o**3).sum() for o in outputs), inputs, create_graph=True)
        results += grads
        results += derivative(sum((grad**2).sum() for grad in grads), inputs)
    for each in (c.gather(x, 0), c.all_reduce(x)):
        results += [] if each is None else [each]
    return [result.detach() for result in results]


def derivative(loss: torch.Tensor, inputs: list[torch.Tensor], **options: bool) -> list[Any]:
    grads = torch.autograd.grad(loss, inputs, allow_unused=True, **options)
    return [grad for grad in grads if grad is not None]


def undisturbed(communicator: DeviceCommunicatorBase, memory: str) -> int:
    answers, numbers = [], []
    for validate in ("off", "always"):
        c = DeviceCommunicatorBase(
            communicator.cpu_group, unique_name="all", validate=validate, memory=memory
        )
        answers.append(program(c))
        numbers.append(c._runner.group.diagnosis._number)
    for one, other in zip(*answers, strict=True):
        assert torch.equal(one, other)
    assert numbers[0] == 0, "off compares nothing"
    return numbers[1]


def test_a_right_program_is_not_disturbed_by_comparing_every_call(ranks: Ranks):
    ranks.run(3, undisturbed, "on")
    numbers = ranks.run(3, undisturbed, "off")
    assert len(set(numbers)) == 1
    assert numbers[0] > 80


def one_sided(communicator: DeviceCommunicatorBase) -> None:
    """What sends nothing is nobody else's concern."""
    checked = Checked(communicator.cpu_group, validate="always", timeout=1.0)
    x = leaf(2, 3)
    losses = [
        checked.all_gather(x, 0, grad="slice").sum(),
        checked.all_reduce(x, grad="identity").sum(),
    ]
    if communicator.rank == 1:
        for loss in losses:
            loss.backward()
    assert checked.all_reduce(torch.ones(1)).item() == 2


def test_a_backward_that_sends_nothing_is_not_compared(ranks: Ranks):
    ranks.run(2, one_sided)


def compiled(communicator: DeviceCommunicatorBase) -> None:
    torch._dynamo.reset()
    checked = Checked(communicator.cpu_group, validate="always", timeout=5.0)
    function = torch.compile(
        lambda x: checked.all_to_all_4D(checked.all_to_all_4D(x * 2), 1, 2),
        backend="aot_eager",
        fullgraph=True,
    )
    x = leaf(1, 2, communicator.world_size, 2)
    function(x).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))
    assert checked.diagnosis._number == 0


def test_nothing_is_compared_in_compiled_code(ranks: Ranks):
    ranks.run(2, compiled)


def once(communicator: DeviceCommunicatorBase) -> list[str]:
    """The ops of a step in the order of their numbers, the backward's among them."""
    c = Checked(communicator.cpu_group, validate="always")
    seen: list[str] = []
    compare = c.diagnosis._compare

    def spy(board: Any, record: Any, call: str, members: Any) -> None:
        seen.append(f"{call} {record.op}")
        compare(board, record, call, members)

    c.diagnosis._compare = spy
    x = leaf(1, 2, 2, 2)
    y = c.all_to_all_4D(c.all_to_all_4D(x), 1, 2)
    c.all_gather(y).sum().backward()
    c.all_reduce(x.detach())
    return seen


def test_backward_and_forward_share_one_line_of_numbers(ranks: Ranks):
    assert (
        ranks.run(2, once)
        == [
            [
                *("0 all_to_all_4D", "1 all_to_all_4D", "2 all_gather"),
                *("3 all_gather backward", "4 all_to_all_4D backward", "5 all_to_all_4D backward"),
                "6 all_reduce",
            ]
        ]
        * 2
    )


def test_off_and_a_group_of_one_count_nothing(ranks: Ranks):
    ranks.run(1, uncounted)


def uncounted(communicator: DeviceCommunicatorBase) -> None:
    for validate in ("off", "auto"):
        diagnosis = Diagnosis(communicator.cpu_group, validate=validate)
        diagnosis.before_backward("all_gather", torch.ones(2), (0,))
        assert diagnosis._number == 0
