"""Small models of diffusers, of three families, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers_package
import torch
from torch import Tensor


class Model(NamedTuple):
    """A transformer of diffusers with `num_heads` heads, and inputs for it.

    Two sizes of inputs: one whose sequences 4 ranks share evenly, and one where they do not.
    """

    module: str
    name: str
    configuration: dict[str, Any]
    inputs: Callable[[bool], dict[str, Any]]

    def make(self, num_heads: int) -> torch.nn.Module:
        """The same weights on every rank."""
        family = diffusers_package.module(f"models.transformers.{self.module}")
        torch.manual_seed(0)
        return getattr(family, self.name)(num_attention_heads=num_heads, **self.configuration)


def wan_inputs(even: bool) -> dict[str, Any]:
    """32 or 27 tokens, and 6 of text that every rank has."""
    frames, size = (2, 8) if even else (3, 6)
    return {
        "hidden_states": torch.randn(2, 4, frames, size, size),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(2, 6, 16),
    }


def flux_inputs(even: bool) -> dict[str, Any]:
    """Image and text, which diffusers shares among the ranks each for itself, and joins there."""
    image, text = (16, 8) if even else (15, 7)
    return {
        "hidden_states": torch.randn(2, image, 4),
        "encoder_hidden_states": torch.randn(2, text, 32),
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.tensor([1.0, 0.5]),
        "img_ids": torch.randn(image, 3),
        "txt_ids": torch.randn(text, 3),
    }


def qwen_inputs(even: bool) -> dict[str, Any]:
    """A mask that hides the end of the second text: it, too, is shared among the ranks."""
    size, text = (4, 8) if even else (5, 7)
    mask = torch.ones(2, text, dtype=torch.long)
    mask[1, text // 2 :] = 0
    return {
        "hidden_states": torch.randn(2, size * size, 16),
        "encoder_hidden_states": torch.randn(2, text, 16),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.tensor([1.0, 0.5]),
        "img_shapes": [(1, size, size)] * 2,
    }


MODELS = {
    "Wan": Model(
        *("transformer_wan", "WanTransformer3DModel"),
        {
            "patch_size": (1, 2, 2),
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 32,
            "ffn_dim": 32,
            "num_layers": 2,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 32,
        },
        wan_inputs,
    ),
    "Flux": Model(
        *("transformer_flux", "FluxTransformer2DModel"),
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": [4, 4, 8],
        },
        flux_inputs,
    ),
    "Qwen-Image": Model(
        *("transformer_qwenimage", "QwenImageTransformer2DModel"),
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 4, 4),
        },
        qwen_inputs,
    ),
}


def attention_with_lse(
    ctx: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    return_lse: bool,
    _save_ctx: bool = True,
    _parallel_config: Any = None,
) -> Any:
    """A `forward_op` for diffusers that has a log-sum-exp, which a ring needs, on the CPU."""
    if _save_ctx:
        ctx.save_for_backward(query, key, value)
    ctx.scale = query.shape[-1] ** -0.5 if scale is None else scale
    ctx.attn_mask = attn_mask
    scores = _scores(ctx, query, key)
    lse = scores.logsumexp(-1)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.sub(lse[..., None]).exp(), value)
    return (out, lse.transpose(1, 2).contiguous()) if return_lse else out


def gradient_of_attention(
    ctx: Any,
    grad_out: Tensor,
    query: Tensor | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Its `backward_op`; a ring gives the result over all keys with some of them."""
    if query is None:
        query, key, value = ctx.saved_tensors
    scores = _scores(ctx, query, key)
    lse = scores.logsumexp(-1) if lse is None else lse.transpose(1, 2)
    probabilities = scores.sub(lse[..., None]).exp()
    if out is None:
        out = torch.einsum("bhqk,bkhd->bqhd", probabilities, value)
    inner = (grad_out * out).sum(-1).transpose(1, 2)[..., None]
    grad_scores = torch.einsum("bqhd,bkhd->bhqk", grad_out, value).sub(inner) * probabilities
    return (
        torch.einsum("bhqk,bkhd->bqhd", grad_scores, key) * ctx.scale,
        torch.einsum("bhqk,bqhd->bkhd", grad_scores, query) * ctx.scale,
        torch.einsum("bhqk,bqhd->bkhd", probabilities, grad_out),
    )


def _scores(ctx: Any, query: Tensor, key: Tensor) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * ctx.scale
    if ctx.attn_mask is None:
        return scores
    return scores.masked_fill(~ctx.attn_mask, -torch.inf)
