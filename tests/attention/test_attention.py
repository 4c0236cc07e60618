"""`ulysses_attention` against the attention of one process: outputs, gradients, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from attention_case import TOLERANCE, Case, attend, in_one_process
from hypothesis import example, given
from hypothesis import strategies as st
from ranks import Ranks
from test_autograd import one_function
from test_collectives import GROUPS, restride, same
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fastvideo_comm import DeviceCommunicatorBase, ulysses_attention

Wrapped = Callable[[Callable[..., Any]], Callable[..., Any]]


def on_ranks(
    communicator: DeviceCommunicatorBase,
    case: Case,
    attention: Callable[..., Tensor] | None = None,
    wrap: Wrapped = lambda call: call,
) -> list[Tensor]:
    """What `in_one_process` returns, of this rank."""
    ranks, rank = communicator.world_size, communicator.rank
    rows = case.rows(ranks)
    tensors = case.tensors(ranks)
    mine = [restride(t.split(rows, 1)[rank], case.strides).requires_grad_() for t in tensors[:3]]
    text = [restride(tensor, case.strides).requires_grad_() for tensor in tensors[3:]]

    gather_sizes = case.gather_sizes(ranks)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        result = ulysses_attention(
            communicator,
            *tensors[:3],
            attention,
            joint=tuple(tensors[3:]) or None,
            pipeline=case.pipeline,
            gather_sizes=gather_sizes,
        )
        return result if isinstance(result, tuple) else (result,)

    outputs = wrap(call)(*mine, *text)
    of_video, of_text = case.weights(ranks)
    weights = [of_video.split(rows, 1)[rank], of_text[rank]]
    sum((y * w).sum() for y, w in zip(outputs, weights, strict=False)).backward()
    return [*[y.detach() for y in outputs], *[x.grad for x in (*mine, *text)]]


def against_one_process(
    communicator: DeviceCommunicatorBase,
    case: Case,
    explicit: bool,
    wrap: Wrapped = lambda call: call,
) -> None:
    ranks, rank = communicator.world_size, communicator.rank
    got = on_ranks(communicator, case, attend if explicit else None, wrap)
    expected = in_one_process(case, ranks)
    assert len(got) == len(expected) == (4 if case.joint < 0 else 8)

    def mine(whole: Tensor) -> Tensor:
        return whole.split(case.rows(ranks), 1)[rank]

    of_text = () if case.joint < 0 else (1, 5, 6, 7)
    for index, (ours, whole) in enumerate(zip(got, expected, strict=True)):
        if index > 1 and index in of_text:  # a share of the gradient on every rank
            dist.all_reduce(ours, group=communicator.cpu_group)
        torch.testing.assert_close(ours, whole if index in of_text else mine(whole), **TOLERANCE)


CASES = st.builds(
    lambda key_heads, per_key, **fields: Case(key_heads * per_key, key_heads, **fields),
    key_heads=st.integers(1, 6),
    per_key=st.integers(1, 4),
    batch=st.integers(1, 2),
    sequence=st.integers(1, 7),
    uneven=st.sampled_from(("", "list", "auto")),
    joint=st.integers(-1, 3),
    pipeline=st.integers(1, 4),
    seed=st.integers(0, 99),
    strides=st.sampled_from(("contiguous", "chunk", "transposed", "stepped", "offset")),
)


@given(group=GROUPS, case=CASES, explicit=st.booleans())
@example(group=4, case=Case(12, 3, joint=2, pipeline=2), explicit=True)  # some use two key heads
@example(group=4, case=Case(12, 3, joint=1), explicit=True)  # two heads for one, one for another
@example(group=4, case=Case(2, 1, joint=2, pipeline=3), explicit=False)  # two ranks have no head
@example(group=4, case=Case(5, 5, joint=2, uneven="list", pipeline=2), explicit=False)
def test_outputs_and_gradients_are_those_of_one_process(ranks: Ranks, group, case, explicit):
    ranks.run(group, against_one_process, case, explicit)


# Plain, grouped and scarce, uneven, joint and in stages.
SOME = (
    Case(joint=-1),
    Case(6, 3, joint=2, uneven="list"),
    Case(5, 5, joint=2, pipeline=2),
    Case(6, 2, joint=2, uneven="list", pipeline=2),
)


def compiled(communicator: DeviceCommunicatorBase, case: Case) -> None:
    on_ranks(communicator, case)  # connects memory
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    against_one_process(
        communicator,
        case,
        False,
        lambda call: torch.compile(call, backend=counter, fullgraph=True),
    )
    assert counter.frame_count == 1


# One way each: what a case adds to a graph is the same on both.
@pytest.mark.parametrize(
    ("case", "size", "way"),
    [
        (SOME[0], 2, "messages"),
        (SOME[1], 2, "memory"),
        (Case(3, 3, joint=2, pipeline=2), 2, "messages"),  # a rank has no head for the last stage
        (SOME[3], 3, "memory"),
    ],
    ids=str,
)
def test_compiled_it_is_one_graph_and_equal(ranks: Ranks, case: Case, size, way):
    ranks.run(size, compiled, case, ways=(way,))


def growing(communicator: DeviceCommunicatorBase, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(ulysses_attention, backend=counter, fullgraph=True, dynamic=dynamic)
    for length in (3, 4, 5, 6):
        q, k, v = (torch.rand(1, length, 4, 2, dtype=torch.float64) for _ in range(3))
        expected = ulysses_attention(communicator, q, k, v)
        # The compiler fuses and reorders arithmetic in fp64.
        torch.testing.assert_close(call(communicator, q, k, v), expected, **TOLERANCE)
    assert counter.frame_count == (1 if dynamic else 2)  # the last one is for every length


@pytest.mark.parametrize(("dynamic", "way"), [(None, "messages"), (True, "memory")])
def test_another_length_does_not_compile_again(ranks: Ranks, dynamic: bool | None, way):
    ranks.run(2, growing, dynamic, ways=(way,))


def in_half_precision(communicator: DeviceCommunicatorBase, case: Case, dtype: torch.dtype) -> None:
    """The arithmetic is in float64 on both sides, and is rounded once."""
    ranks, rank = communicator.world_size, communicator.rank
    rows = case.rows(ranks)

    def attention(*tensors: Tensor) -> Tensor:
        return attend(*(each.double() for each in tensors)).to(dtype)

    whole = [tensor.to(dtype).requires_grad_() for tensor in case.tensors(ranks)]
    mine = [
        restride(tensor.detach().split(rows, 1)[rank], case.strides).requires_grad_()
        for tensor in whole
    ]
    of_video, _ = case.weights(ranks)
    expected = attention(*whole)
    (expected * of_video.to(dtype)).sum().backward()
    output = ulysses_attention(
        communicator,
        *mine,
        attention,
        pipeline=case.pipeline,
        gather_sizes=case.gather_sizes(ranks),
    )
    (output * of_video.to(dtype).split(rows, 1)[rank]).sum().backward()
    for ours, theirs in zip(
        (output, *(each.grad for each in mine)),
        (expected, *(each.grad for each in whole)),
        strict=True,
    ):
        same(ours.detach(), theirs.detach().split(rows, 1)[rank])


@given(
    group=GROUPS,
    key_heads=st.integers(4, 6),  # no fewer than ranks: the gradient of a key is one rank's
    per_key=st.integers(1, 2),
    uneven=st.sampled_from(("", "list")),
    pipeline=st.integers(1, 2),
    strides=st.sampled_from(("chunk", "transposed", "stepped")),
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
)
def test_in_half_precision_it_is_bit_for_bit_that_of_one_process(
    ranks: Ranks, group, key_heads, per_key, uneven, pipeline, strides, dtype
):
    heads = key_heads * per_key
    case = Case(heads, key_heads, uneven=uneven, joint=-1, pipeline=pipeline, strides=strides)
    ranks.run(group, in_half_precision, case, dtype)


def checkpointed(communicator: DeviceCommunicatorBase, case: Case, use_reentrant: bool) -> None:
    against_one_process(
        communicator,
        case,
        False,
        lambda call: lambda *x: checkpoint(call, *x, use_reentrant=use_reentrant),
    )


# With 2 heads on 4 ranks two have none, and yet recompute as far as the others.
@pytest.mark.parametrize("case", [*SOME, Case(2, 2, joint=2), Case(5, 5, pipeline=2)], ids=str)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_by_a_checkpoint_it_is_equal(ranks: Ranks, case: Case, use_reentrant: bool):
    ranks.run(4, checkpointed, case, use_reentrant)


def checked(communicator: DeviceCommunicatorBase, pipeline: int) -> None:
    torch.manual_seed(0)  # every rank checks the same inputs in the same order
    ranks = communicator.world_size
    inputs = torch.rand(ranks, 1, 2, 4, 2, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        text = tuple(x[:, :1] * factor for factor in (1, 2, 3))
        both = ulysses_attention(
            communicator, x, x.sin(), x * x, attend, joint=text, pipeline=pipeline
        )
        return torch.stack([(y**2).sum() for y in both]) * (communicator.rank + 1)

    function = one_function(communicator, call)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("pipeline", [1, 2])
def test_first_and_second_derivative_are_those_of_the_sum_of_losses(ranks: Ranks, pipeline: int):
    ranks.run(2, checked, pipeline)


class Layer(nn.Module):
    """Joint attention of video and text, and what each goes through behind it."""

    def __init__(self, heads: int, key_heads: int) -> None:
        super().__init__()
        self.heads = [heads, key_heads, key_heads]
        width = 2 * heads
        self.video = nn.Linear(width, 2 * sum(self.heads))
        self.text = nn.Linear(width, 2 * sum(self.heads))
        self.video_out, self.text_out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(
        self, video: Tensor, text: Tensor, attention: Callable[..., tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        q, k, v = self.video(video).unflatten(-1, (-1, 2)).split(self.heads, 2)
        joint = self.text(text).unflatten(-1, (-1, 2)).split(self.heads, 2)
        out, text_out = attention(q, k, v, joint)
        video = video + self.video_out(out.flatten(2)).tanh()
        return video, text + self.text_out(text_out.flatten(2)).tanh()


def model_and_data(heads: int, key_heads: int) -> tuple[nn.ModuleList, Tensor, Tensor]:
    torch.manual_seed(5)
    model = nn.ModuleList(Layer(heads, key_heads) for _ in range(2)).double()
    video = torch.randn(2, 11, 2 * heads, dtype=torch.float64)
    return model, video, torch.randn(2, 3, 2 * heads, dtype=torch.float64)


def run_model(model: nn.ModuleList, video: Tensor, text: Tensor, attention: Any) -> list[Tensor]:
    for layer in model:
        video, text = layer(video, text, attention)
    return [video, text]


def text_losses(communicator: DeviceCommunicatorBase, use: str, heads: int, pipeline: int) -> None:
    """Two layers, text and video: the sum over ranks of every parameter's gradient."""
    ranks, rank = communicator.world_size, communicator.rank
    rows = [4, 3, 4, 0][:ranks] if ranks > 2 else [6, 5][:ranks]
    model, video, text = model_and_data(heads, heads // 2)

    def alone(q: Tensor, k: Tensor, v: Tensor, joint: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        both = attend(*(torch.cat(pair, 1) for pair in zip((q, k, v), joint, strict=True)))
        return both.split([q.shape[1], 3], 1)

    video = video[:, : sum(rows)]
    out, text_out = run_model(model, video, text, alone)
    loss = out.square().sum()
    if use != "unused":
        loss = loss + text_out.square().sum()
    loss.backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()

    def over_ranks(q: Tensor, k: Tensor, v: Tensor, joint: tuple[Tensor, ...]) -> Any:
        return ulysses_attention(
            communicator, q, k, v, joint=joint, gather_sizes=rows, pipeline=pipeline
        )

    out, text_out = run_model(model, video.split(rows, 1)[rank], text, over_ranks)
    loss = out.square().sum()
    if use == "the same on every rank":
        loss = loss + text_out.square().sum() / ranks
    elif use == "every rank another part":
        loss = loss + text_out.tensor_split(ranks, 1)[rank].square().sum()
    elif use == "one rank alone" and rank == ranks - 1:
        loss = loss + text_out.square().sum()
    loss.backward()
    for parameter, whole in zip(model.parameters(), expected, strict=True):
        if whole is None:  # of the last layer's text, which no loss depends on
            assert use == "unused"
            assert parameter.grad is None
            continue
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert use == "one rank alone" or parameter.grad is not None
        dist.all_reduce(grad, group=communicator.cpu_group)
        torch.testing.assert_close(grad, whole, **TOLERANCE)


@pytest.mark.parametrize(
    "use", ["the same on every rank", "every rank another part", "one rank alone", "unused"]
)
@pytest.mark.parametrize(
    ("size", "heads", "pipeline"), [(1, 4, 1), (2, 8, 2), (3, 6, 1), (4, 6, 2)]
)
def test_parameters_of_text_and_video_have_gradients_whose_sum_is_that_of_one_process(
    ranks: Ranks, size, heads, pipeline, use
):
    ranks.run(size, text_losses, use, heads, pipeline)


def shares(communicator: DeviceCommunicatorBase) -> None:
    rank = communicator.rank
    q, k, v = (torch.rand(1, 2, 5, 2) for _ in range(3))
    joint = tuple(torch.rand(1, 3, 5, 2, requires_grad=True) for _ in range(3))
    _, text = ulysses_attention(communicator, q, k, v, joint=joint)
    text.sum().backward()
    own = [[0, 1], [2, 3], [4]][rank]
    for x in joint:
        assert x.grad[:, :, [head for head in range(5) if head not in own]].count_nonzero() == 0
    assert joint[2].grad[:, :, own].count_nonzero() == joint[2].grad[:, :, own].numel()


def test_a_rank_has_the_gradient_of_joint_tokens_for_the_heads_that_it_computes(ranks: Ranks):
    ranks.run(3, shares)
