"""diffusers' own models and attention through this library's exchange, on gloo ranks."""

from __future__ import annotations

import logging
import os
import types
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import diffusers_package
import peer_wheels
import pytest
import torch
import torch.distributed as dist
from diffusers_models import MODELS, attention_with_lse, gradient_of_attention
from ranks import Ranks, device_mesh
from torch import Tensor

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.integrations import diffusers

pytestmark = pytest.mark.skipif(
    not peer_wheels.is_there("diffusers"), reason=peer_wheels.how_to_install("diffusers")
)
# The integration makes its own communicator of a group, whichever runs the job.
ONCE = ["messages"]
# The configuration, the heads of the model, whether 4 ranks share its sequences evenly.
CONFIGURATIONS: dict[str, tuple[dict[str, Any], int, bool]] = {
    "ulysses 2": ({"ulysses_degree": 2}, 4, True),
    "ulysses 4": ({"ulysses_degree": 4}, 4, True),
    "anything 2": ({"ulysses_degree": 2, "ulysses_anything": True}, 3, False),
    "anything 4": ({"ulysses_degree": 4, "ulysses_anything": True}, 6, False),
    "anything 4, 3 heads": ({"ulysses_degree": 4, "ulysses_anything": True}, 3, False),
    "ulysses 2 by ring 2": ({"ulysses_degree": 2, "ring_degree": 2}, 4, True),
}


@pytest.fixture(scope="module", autouse=True)
def placeholders_are_imported_quietly() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers_package.attention_dispatch()


def trained_step(model: torch.nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """The output of a model, and the gradients of its parameters."""
    output = model(**inputs, return_dict=False)[0]
    output.square().mean().backward()
    return [output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def gathered(part: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """What diffusers does behind the last layer, where gloo cannot: parts of different sizes."""
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, part, group)
    return torch.cat(parts, dim)


def differences(
    communicator: DeviceCommunicatorBase, family: str, configuration: str
) -> dict[str, Any]:
    """How far a model that is parallel by diffusers is from the same model in one process."""
    options, num_heads, even = CONFIGURATIONS[configuration]
    exchanges = []
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        dispatch = diffusers_package.attention_dispatch()
        parallel = diffusers_package.module("models._modeling_parallel")
        hooks = diffusers_package.module("hooks.context_parallel")
        patch.setattr(hooks, "_all_gather_anything", gathered)
        # Without an accelerator it is 0, by which diffusers divides.
        patch.setattr(torch.accelerator, "device_count", lambda: 1)
        # transformers adds it, and diffusers calls it.
        patch.setattr(logging.Logger, "warning_once", logging.Logger.warning, raising=False)
        ring = options.get("ring_degree", 1)
        if ring > 1:  # diffusers' CPU attention has no log-sum-exp
            patch.setattr(dispatch, "_native_attention_forward_op", attention_with_lse)
            patch.setattr(dispatch, "_native_attention_backward_op", gradient_of_attention)
        torch.manual_seed(1)
        inputs = MODELS[family].inputs(even)
        if ring > 1:
            inputs.pop("encoder_hidden_states_mask", None)  # diffusers' ring takes no mask
        expected = trained_step(MODELS[family].make(num_heads), inputs)

        shape = (4 // ring // options["ulysses_degree"], ring, options["ulysses_degree"])
        mesh = device_mesh(shape, ("data", "ring", "ulysses"))
        model = MODELS[family].make(num_heads)
        original = DeviceCommunicatorBase.all_to_all_4D
        patch.setattr(
            DeviceCommunicatorBase,
            "all_to_all_4D",
            lambda *a, **k: exchanges.append(a[0].unique_name) or original(*a, **k),
        )
        with diffusers.install():
            model.enable_parallelism(config=parallel.ContextParallelConfig(**options, mesh=mesh))
            got = trained_step(model, inputs)
    # Each rank has the gradients of its part of the sequence.
    gradients = torch.cat([gradient.flatten() for gradient in got[1:]])
    dist.all_reduce(gradients, group=mesh["ring", "ulysses"]._flatten().get_group())
    sizes = [gradient.numel() for gradient in got[1:]]
    got[1:] = map(torch.Tensor.view_as, gradients.split(sizes), got[1:])
    return {
        "exchanges": len(exchanges),
        "tensors": (len(got), len(expected)),
        "differ": max(
            float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3))
            for ours, theirs in zip(got, expected, strict=True)
        ),
    }


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("family", MODELS)
def test_a_parallel_model_is_the_model_of_one_process(
    ranks: Ranks, family: str, configuration: str
):
    # 2 attentions; unified attention exchanges q, k, v and the output one by one.
    exchanges = 2 * (4 if "ring" in configuration else 2)
    for result in ranks.run(4, differences, family, configuration, ways=ONCE):
        assert result["exchanges"] == exchanges
        # float32, summed in another order in each of a few layers.
        assert result["differ"] < 1e-4, result


Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None]
Attention = Callable[..., tuple[Tensor, Tensor]]


def attention_of(dispatch: Any, communicator: DeviceCommunicatorBase, **options: Any) -> Attention:
    """diffusers' attention over a group: output and log-sum-exp."""
    mesh = types.SimpleNamespace(get_group=lambda: communicator.device_group)
    config = types.SimpleNamespace(
        ulysses_degree=communicator.world_size,
        ring_degree=1,
        ulysses_anything=False,
        _ulysses_mesh=mesh,
    )
    vars(config).update(options)
    parallel_config = types.SimpleNamespace(context_parallel_config=config)

    def attention(*qkv_mask: Any) -> Any:
        return dispatch._templated_context_parallel_attention(
            *qkv_mask,
            return_lse=True,
            forward_op=attention_with_lse,
            backward_op=gradient_of_attention,
            _parallel_config=parallel_config,
        )

    return attention


def one_process(*qkv_mask: Any) -> tuple[Tensor, Tensor]:
    """The same attention where everything is."""
    return attention_with_lse(
        types.SimpleNamespace(), *qkv_mask, 0.0, False, None, False, True, _save_ctx=False
    )


def with_gradients(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Any
) -> list[Tensor]:
    """Output, log-sum-exp and the gradients of q, k and v, of an output weighted by its place."""
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    output, lse = attention(*inputs, mask)
    (output * output.detach().cos()).sum().backward()
    return [output.detach(), lse.detach(), *(x.grad for x in inputs)]


def whole(communicator: DeviceCommunicatorBase, part: Tensor) -> Tensor:
    return communicator.all_gather(part, 1, gather_sizes="auto")


def same_bits(communicator: DeviceCommunicatorBase, masked: bool, memory: str) -> list[bool]:
    """Whether each of the results is diffusers', bit for bit."""
    dispatch = diffusers_package.attention_dispatch()
    theirs = dispatch.TemplatedUlyssesAttention
    attention = attention_of(dispatch, communicator)
    generator = torch.Generator().manual_seed(communicator.rank)
    q, k, v = torch.randn(3, 2, 5, 4, 8, generator=generator)
    mask = torch.rand(2, 1, 1, 5, generator=generator) < 0.9 if masked else None
    expected = with_gradients(attention, q, k, v, mask)
    with mock.patch.dict(os.environ, FASTVIDEO_COMM_MEMORY=memory), diffusers.install():
        assert dispatch.TemplatedUlyssesAttention is not theirs
        got = with_gradients(attention, q, k, v, mask)
    assert dispatch.TemplatedUlyssesAttention is theirs
    return [torch.equal(*pair) for pair in zip(got, expected, strict=True)]


@pytest.mark.parametrize("memory", ["on", "off"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_ulysses_attention_gives_the_bits_of_diffusers(
    ranks: Ranks, size: int, masked: bool, memory: str
):
    assert ranks.run(size, same_bits, masked, memory, ways=ONCE) == [[True] * 5] * size


def uneven(communicator: DeviceCommunicatorBase, masked: str) -> list[float]:
    """How far "anything" is from one process, where the ranks cannot share evenly.

    Queries, keys and 3 heads: on 4 ranks, one of them gets no head.
    """
    dispatch = diffusers_package.attention_dispatch()
    rank = communicator.rank
    generator = torch.Generator().manual_seed(rank)
    q = torch.randn(2, 5 - rank, 3, 8, generator=generator)
    k, v = torch.randn(2, 2, 2 + 3 * rank, 3, 8, generator=generator)
    parts = [part.shape[1] for part in (q, k)]
    mask = torch.rand(2, 1, 1, parts[1], generator=generator) < 0.8
    every = communicator.all_gather(mask, -1, gather_sizes="auto")
    qkv = [whole(communicator, x) for x in (q, k, v)]
    expected = with_gradients(one_process, *qkv, None if masked == "not" else every)
    given = {"not": None, "own keys": mask, "all keys": every}[masked]
    attention = attention_of(dispatch, communicator, ulysses_anything=True)
    with diffusers.install():
        got = with_gradients(attention, q, k, v, given)
    return [
        float((whole(communicator, ours) - theirs).abs().max())
        for ours, theirs in zip(got, expected, strict=True)
    ]


@pytest.mark.parametrize("masked", ["not", "own keys", "all keys"])
@pytest.mark.parametrize("size", [2, 4])
def test_any_sequences_and_heads_are_those_of_one_process_with_gradients(
    ranks: Ranks, size: int, masked: str
):
    for differences in ranks.run(size, uneven, masked, ways=ONCE):
        # float32 sums over 30 keys.
        assert max(differences) < 1e-5


def without_a_remedy(communicator: DeviceCommunicatorBase) -> None:
    dispatch = diffusers_package.attention_dispatch()
    q = torch.zeros(1, 2, 5, 2)
    with diffusers.install():
        attention = attention_of(dispatch, communicator)
        with pytest.raises(ValueError, match=r"divides, got 5 .*; ulysses_anything=True shares"):
            attention(q, q, q, None)
        four = torch.zeros(1, 2, 4, 2)
        with pytest.raises(ValueError, match=r"divides, got 5 .*; ulysses_anything=True shares"):
            attention(four, q, q, None)
        with pytest.raises(ValueError, match=r"divides, got 5 .*; choose a ulysses_degree"):
            attention_of(dispatch, communicator, ring_degree=2)(q, q, q, None)


def test_the_error_names_what_a_user_of_diffusers_can_do(ranks: Ranks):
    ranks.run(2, without_a_remedy, ways=ONCE)


def rings(communicator: DeviceCommunicatorBase) -> bool:
    dispatch = diffusers_package.attention_dispatch()
    names = ("TemplatedRingAttention", "TemplatedRingAnythingAttention")
    before = [getattr(dispatch, name) for name in names]
    with diffusers.install() as installation:
        assert not [each for each in installation.replaced if "Ring" in each]
        return [getattr(dispatch, name) for name in names] == before


def test_a_ring_alone_stays_diffusers(ranks: Ranks):
    assert ranks.run(2, rings, ways=ONCE) == [True, True]


def compiled(communicator: DeviceCommunicatorBase, options: dict[str, Any], whole: bool) -> bool:
    dispatch = diffusers_package.attention_dispatch()
    attention = attention_of(dispatch, communicator, **options)
    q, k, v = torch.randn(3, 2, 5, 4, 8)
    with diffusers.install():
        expected = attention(q, k, v, None)
        torch._dynamo.reset()
        got = torch.compile(attention, fullgraph=whole, backend="aot_eager")(q, k, v, None)
    return all(map(torch.equal, got, expected))


@pytest.mark.parametrize(
    ("options", "whole"), [({}, True), ({"ulysses_anything": True}, False)], ids=["all", "anything"]
)
def test_a_compiled_attention_is_the_eager_one(ranks: Ranks, options: dict[str, Any], whole: bool):
    """In one graph, but for "anything": its sizes are known only when the ranks have been asked."""
    assert ranks.run(2, compiled, options, whole, ways=ONCE) == [True, True]
