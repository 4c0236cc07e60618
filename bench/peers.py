"""The peers: their own published code, loaded by file and bound to a process group.

Nothing measured here is written by this project: each peer's file is executed as it was published
(by_file.py). The stand-ins for its imports are never part of the measured path, with one exception
that favours the peer: DeepSpeed's `deepspeed.comm` is answered by `torch.distributed` itself, which
spares DeepSpeed the bookkeeping of its own wrapper. Each peer runs in its fastest configuration
that gives the exact result: no synchronisation after an exchange, no padding, no fp8 messages,
FastVideo's attention without the `torch.compiler.disable` wrapper. A peer that is missing or does
not load is named with the reason.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from by_file import find, load_file, logger, never, refused, stand_ins

AllToAll = Callable[[torch.Tensor, int, int], torch.Tensor]
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Bound:
    """A system's calls on one process group.

    `all_to_all(x, scatter_dim, gather_dim)` is one exchange; `attention(q, k, v)` is the
    system's whole sequence around a local attention that returns its query.
    """

    all_to_all: AllToAll
    attention: Attention


@dataclass(frozen=True)
class Peer:
    """A peer that loaded: `bind(group)` gives its calls on that group."""

    name: str
    version: str
    file: str
    differentiable: bool
    bind: Callable[[dist.ProcessGroup], Bound]


class FirstOfThree(torch.autograd.Function):
    """A local attention that costs nothing: forward returns q, backward hands g to q, k and v."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Return a view of the query."""
        del ctx, key, value
        return query.view_as(query)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Give each input the output's gradient."""
        del ctx
        return grads[0], grads[0], grads[0]


def _fastvideo() -> Peer:
    """FastVideo: `DeviceCommunicatorBase.all_to_all_4D` and `DistributedAttention.forward`."""
    file = "fastvideo/distributed/device_communicators/base_device_communicator.py"
    path, version = find("fastvideo", file)
    module = load_file("fastvideo_base_device_communicator", path)
    layer_path, _ = find("fastvideo", "fastvideo/attention/layer.py")

    def bind(group: dist.ProcessGroup) -> Bound:
        communicator = module.DeviceCommunicatorBase(group, device_group=group)
        nothing = types.SimpleNamespace(attn_metadata=None)
        with stand_ins(
            fastvideo__attention__selector=dict.fromkeys(
                ("backend_name_to_enum", "get_attn_backend"), refused
            ),
            fastvideo__distributed__communication_op={
                "sequence_model_parallel_all_gather": communicator.all_gather,
                "sequence_model_parallel_all_to_all_4D": communicator.all_to_all_4D,
            },
            fastvideo__distributed__parallel_state={
                "get_sp_parallel_rank": lambda: communicator.rank,
                "get_sp_world_size": lambda: communicator.world_size,
            },
            fastvideo__forward_context={
                "ForwardContext": object,
                "get_forward_context": lambda: nothing,
            },
            fastvideo__platforms={"AttentionBackendEnum": object},
            fastvideo__utils={"get_compute_dtype": refused},
            fastvideo__layers__rotary_embedding={"_apply_rotary_emb": refused},
        ):
            layer = load_file("fastvideo_attention_layer", layer_path)
        attention = layer.DistributedAttention.__new__(layer.DistributedAttention)
        torch.nn.Module.__init__(attention)
        attention._compile_forward_enabled = True  # spares the wrapper of torch.compiler.disable
        attention.attn_impl = types.SimpleNamespace(
            preprocess_qkv=lambda qkv, _: qkv,
            postprocess_output=lambda output, _: output,
            forward=lambda q, k, v, _: FirstOfThree.apply(q, k, v),
        )
        return Bound(communicator.all_to_all_4D, lambda q, k, v: attention(q, k, v)[0])

    return Peer("fastvideo", version, file, True, bind)


def _yunchang() -> Peer:
    """Yunchang: `SeqAllToAll4D`, in the sequence of its `UlyssesAttention`."""
    file = "yunchang/comm/all_to_all.py"
    path, version = find("yunchang", file)
    module = load_file("yunchang_all_to_all", path)

    def bind(group: dist.ProcessGroup) -> Bound:
        def all_to_all(x: torch.Tensor, scatter_dim: int, gather_dim: int) -> torch.Tensor:
            return module.SeqAllToAll4D.apply(group, x, scatter_dim, gather_dim, False)

        return Bound(all_to_all, one_call_each(all_to_all))

    return Peer("yunchang", version, file, True, bind)


def _deepspeed() -> Peer:
    """DeepSpeed: `_SeqAllToAll` with the batch first, and `DistributedAttention`."""
    file = "deepspeed/sequence/layer.py"
    path, version = find("deepspeed", file)
    with stand_ins(
        deepspeed__comm=dist,
        deepspeed__accelerator={"get_accelerator": refused},
        deepspeed__module_inject__tp_shard=dict.fromkeys(
            ("AutoTPMeta", "get_shard_size_list"), refused
        ),
        deepspeed__utils={"groups": None},
    ):
        module = load_file("deepspeed_sequence_layer", path)

    def bind(group: dist.ProcessGroup) -> Bound:
        def all_to_all(x: torch.Tensor, scatter_dim: int, gather_dim: int) -> torch.Tensor:
            return module._SeqAllToAll.apply(group, x, scatter_dim, gather_dim, 0)

        attention = module.DistributedAttention(FirstOfThree.apply, group, 2, 1)
        return Bound(all_to_all, lambda q, k, v: attention(q, k, v, 0))

    return Peer("deepspeed", version, file, True, bind)


def _diffusers() -> Peer:
    """Diffusers: `SeqAllToAllDim`, and `TemplatedUlyssesAttention` as its models call it."""
    file = "diffusers/models/attention_dispatch.py"
    path, version = find("diffusers", file)
    names = re.search(r"from \.\.utils import \(([^)]*)\)", path.read_text())
    utilities = dict.fromkeys(re.findall(r"\w+", names[1]) if names else [], never)
    utilities |= {"get_logger": logger, "is_torch_version": lambda *_: False}
    constants = {
        "DIFFUSERS_ATTN_BACKEND": "native",
        "DIFFUSERS_ATTN_CHECKS": False,
        "DIFFUSERS_TRUST_REMOTE_KERNELS": False,
    }
    with stand_ins(
        huggingface_hub={"get_organization_overview": refused},
        huggingface_hub__constants={"HF_HUB_OFFLINE": True},
        diffusers={"__version__": version},
        diffusers__utils=utilities,
        diffusers__utils__constants=constants,
        diffusers__utils__torch_utils={
            "lru_cache_unless_export": functools.lru_cache,
            "maybe_allow_in_graph": lambda function: function,
        },
        diffusers__models___modeling_parallel={"gather_size_by_comm": refused},
    ):
        module = load_file("diffusers.models.attention_dispatch", path)

    def forward_op(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object, **__: object
    ) -> torch.Tensor:
        return FirstOfThree.forward(ctx, q, k, v)

    def bind(group: dist.ProcessGroup) -> Bound:
        def all_to_all(x: torch.Tensor, scatter_dim: int, gather_dim: int) -> torch.Tensor:
            return module.SeqAllToAllDim.apply(group, x, scatter_dim, gather_dim)

        context_parallel = types.SimpleNamespace(
            _ulysses_mesh=types.SimpleNamespace(get_group=lambda: group),
            ulysses_degree=dist.get_world_size(group),
        )
        config = types.SimpleNamespace(context_parallel_config=context_parallel)

        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return module.TemplatedUlyssesAttention.apply(
                *(q, k, v, None, 0.0, False, None, False, False),
                *(forward_op, FirstOfThree.backward, config),
            )

        return Bound(all_to_all, attention)

    return Peer("diffusers", version, file, True, bind)


def _cache_dit() -> Peer:
    """cache-dit: `_All2AllComm`, its exchanges of q, k and v all started before the first wait."""
    file = "cache_dit/distributed/core/_distributed_primitives.py"
    path, version = find("cache_dit", file)
    with stand_ins(
        cache_dit__platforms={"current_platform": None},
        cache_dit__logger={"init_logger": logger},
        cache_dit__distributed__core={},
    ):
        module = load_file("cache_dit.distributed.core._distributed_primitives", path)

    def bind(group: dist.ProcessGroup) -> Bound:
        def all_to_all(x: torch.Tensor, scatter_dim: int, gather_dim: int) -> torch.Tensor:
            del gather_dim
            if scatter_dim == 2:
                return module._all_to_all_single_qkv_async(x, group)()
            num_heads = x.shape[2] * dist.get_world_size(group)
            return module._all_to_all_single_o_async(x, group, NUM_QO_HEAD=num_heads)()

        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            num_heads = q.shape[2]
            started = [module._all_to_all_single_qkv_async(x, group) for x in (q, k, v)]
            output = FirstOfThree.apply(*(wait() for wait in started))
            return module._all_to_all_single_o_async(output, group, NUM_QO_HEAD=num_heads)()

        return Bound(all_to_all, attention)

    # An inference library: its exchange differentiates, its attention's backward raises.
    return Peer("cache-dit", version, file, False, bind)


def one_call_each(all_to_all: AllToAll) -> Attention:
    """The Ulysses sequence with one exchange each for q, k, v and the output."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return all_to_all(FirstOfThree.apply(*(all_to_all(x, 2, 1) for x in (q, k, v))), 1, 2)

    return attention


REGISTRY: dict[str, Callable[[], Peer]] = {
    "fastvideo": _fastvideo,
    "yunchang": _yunchang,
    "deepspeed": _deepspeed,
    "diffusers": _diffusers,
    "cache-dit": _cache_dit,
}


@functools.cache
def load(name: str) -> Peer | str:
    """The peer, or why it is missing; once per process, for custom ops register only once."""
    return attempt(REGISTRY[name])


def attempt(make: Callable[[], Peer]) -> Peer | str:
    """The peer that is made, or why it is not."""
    try:
        return make()
    except Exception as error:  # whatever a peer's file raises is a reason to name it
        return f"{type(error).__name__}: {error}"


def load_all() -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers that loaded, and the missing ones with their reasons."""
    return sorted_out({name: load(name) for name in REGISTRY})


def sorted_out(loaded: dict[str, Peer | str]) -> tuple[dict[str, Peer], dict[str, str]]:
    """Those that loaded, and the reasons of the others."""
    present = {name: peer for name, peer in loaded.items() if isinstance(peer, Peer)}
    missing = {name: reason for name, reason in loaded.items() if isinstance(reason, str)}
    return present, missing
