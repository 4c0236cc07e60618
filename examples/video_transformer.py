"""A small video diffusion transformer whose sequence may be split over ranks.

The model is the same in one process and over P ranks. Every rank holds all the parameters, its own
s = S/P tokens of the video and all T tokens of the text; everything but attention works on single
tokens and needs no communication. Attention needs all S + T tokens: `ulysses_attention` trades the
rank's slice of the sequence for its slice of the heads, and trades back afterwards.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fastvideo_comm import DeviceCommunicatorBase, ulysses_attention


@dataclass(frozen=True)
class Config:
    """Sizes; on purpose none that a wrong layout could get right because it is a power of two."""

    frames: int = 5
    height: int = 48
    width: int = 72
    channels: int = 3
    patch: int = 4
    num_heads: int = 6
    head_dim: int = 24  # a third for each of time, height and width, in pairs
    depth: int = 3
    num_text_tokens: int = 7
    text_dim: int = 32

    @property
    def hidden(self) -> int:
        """Channels of a token inside the model."""
        return self.num_heads * self.head_dim

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along time, height and width."""
        return self.frames, self.height // self.patch, self.width // self.patch

    @property
    def num_tokens(self) -> int:
        """S, the length of the whole sequence."""
        return math.prod(self.grid)

    @property
    def patch_dim(self) -> int:
        """Numbers in a patch of pixels."""
        return self.channels * self.patch**2

    def check_num_ranks(self, num_ranks: int) -> None:
        """Raises ValueError where the heads or the tokens cannot be shared out evenly."""
        for name, size in (("heads", self.num_heads), ("tokens", self.num_tokens)):
            if size % num_ranks:
                raise ValueError(
                    f"the number of ranks must divide the model's {size} {name}, got {num_ranks}"
                )


def patchify(video: Tensor, config: Config) -> Tensor:
    """`b c t (y p) (x q) -> b (t y x) (c p q)`: pixels to tokens."""
    patches = video.unflatten(4, (-1, config.patch)).unflatten(3, (-1, config.patch))
    return patches.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)


def unpatchify(tokens: Tensor, config: Config) -> Tensor:
    """`b (t y x) (c p q) -> b c t (y p) (x q)`: tokens to pixels."""
    patches = tokens.unflatten(2, (config.channels, config.patch, config.patch))
    patches = patches.unflatten(1, config.grid)  # b t y x c p q
    return patches.permute(0, 4, 1, 2, 5, 3, 6).flatten(5).flatten(3, 4)


def rotary_angles(config: Config) -> Tensor:
    """An angle for each token and pair of head channels, `[S, 1, D / 2]`; a third for each axis."""
    pairs = config.head_dim // 6
    frequencies = 100.0 ** (-torch.arange(pairs) / pairs)
    positions = torch.cartesian_prod(*(torch.arange(float(size)) for size in config.grid))
    return (positions[:, :, None] * frequencies).flatten(1)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the channel pairs of `[B, s, H, D]` by the angles of their token."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)


@dataclass(frozen=True)
class Exchanges:
    """How attention trades; what it computes is the same."""

    fused: bool = False
    """q, k and v travel as they stand in the projection; norms and rotation come behind that."""
    async_op: bool = False
    """Half of a rank's heads travel while the other half is computed."""
    fp8: str = ""
    """"activations" travel as fp8; "nearest" and "stochastic": their gradients too, so rounded."""

    @property
    def wire(self) -> dict[str, Any]:
        """The arguments of `ulysses_attention` that say what travels as fp8."""
        if not self.fp8:
            return {}
        if self.fp8 == "activations":
            return {"wire_dtype": torch.float8_e4m3fn}
        dtypes = {"wire_dtype": torch.float8_e4m3fn, "grad_wire_dtype": torch.float8_e4m3fn}
        return {**dtypes, "rounding": self.fp8}


class Attention(nn.Module):
    """Attention over all S tokens, of which each rank brings s and takes s away, and the text."""

    def __init__(
        self, config: Config, communicator: DeviceCommunicatorBase | None, exchanges: Exchanges
    ) -> None:
        """Without a communicator s = S."""
        super().__init__()
        self.communicator = communicator
        self.norms_first = communicator is None or not exchanges.fused
        self.num_stages = 2 if exchanges.async_op else 1
        self.wire = exchanges.wire
        self.heads = (config.num_heads, config.head_dim)
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.text_qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.query_norm = nn.RMSNorm(config.head_dim)
        self.key_norm = nn.RMSNorm(config.head_dim)
        self.out = nn.Linear(config.hidden, config.hidden)

    def forward(self, x: Tensor, text: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        """`x` `[B, s, hidden]`, `text` `[B, T, hidden]`; returns the same shapes.

        What becomes of the text is not projected yet. `angles` are those of this rank's tokens,
        `[s, 1, D / 2]`; if fused, of all S + T tokens.
        """
        query, key, value = self.qkv(x).unflatten(-1, (3, *self.heads)).unbind(2)
        joint = self.text_qkv(text).unflatten(-1, (3, *self.heads)).unbind(2)
        if self.norms_first:
            query, key = self.norm_and_rotate(query, key, angles)
            joint = (self.query_norm(joint[0]), self.key_norm(joint[1]), joint[2])
        if self.communicator is None:
            both = self.attend(
                *(torch.cat(pair, 1) for pair in zip((query, key, value), joint, strict=True))
            )
            attended, text_attended = both.split([x.shape[1], text.shape[1]], 1)
        else:
            attended, text_attended = ulysses_attention(
                self.communicator,
                query,
                key,
                value,
                self.attend if self.norms_first else partial(self.norm_and_attend, angles),
                joint=joint,
                pipeline=self.num_stages,
                **self.wire,
            )
        return self.out(attended.flatten(2)), text_attended.flatten(2)

    def norm_and_rotate(self, query: Tensor, key: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        """Any tokens of any heads."""
        cos, sin = angles.cos(), angles.sin()
        return rotate(self.query_norm(query), cos, sin), rotate(self.key_norm(key), cos, sin)

    def norm_and_attend(self, angles: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """All tokens of some heads: norms and rotation cost what they cost the other way round."""
        return self.attend(*self.norm_and_rotate(query, key, angles), value)

    @staticmethod
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Each head on its own: `[B, S + T, h, D]` in and out, for any number of heads."""
        heads_first = (t.transpose(1, 2) for t in (query, key, value))
        return scaled_dot_product_attention(*heads_first).transpose(1, 2)


class Block(nn.Module):
    """Attention and MLP, each normed, scaled, shifted and gated by the condition (adaLN)."""

    def __init__(
        self,
        config: Config,
        communicator: DeviceCommunicatorBase | None,
        exchanges: Exchanges,
        *,
        is_last: bool,
    ) -> None:
        """Only attention needs the communicator; nothing reads the text behind the last block."""
        super().__init__()
        self.modulation = nn.Linear(config.hidden, 6 * config.hidden)
        self.attention_norm = nn.LayerNorm(config.hidden, elementwise_affine=False)
        self.attention = Attention(config, communicator, exchanges)
        self.text_out = None if is_last else nn.Linear(config.hidden, config.hidden)
        self.mlp_norm = nn.LayerNorm(config.hidden, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(config.hidden, 3 * config.hidden),
            nn.GELU(approximate="tanh"),
            nn.Linear(3 * config.hidden, config.hidden),
        )
        # Scales and gates are 1 + modulation and nothing starts at zero, unlike adaLN-Zero: at the
        # first step every parameter has a gradient that the two runs can be compared by.
        nn.init.normal_(self.modulation.weight, std=0.02)
        nn.init.zeros_(self.modulation.bias)

    def forward(
        self, x: Tensor, text: Tensor, condition: Tensor, angles: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`x` `[B, s, hidden]`, `text` `[B, T, hidden]`, `condition` `[B, hidden]`.

        Returns the shapes of `x` and `text`.
        """
        modulation = self.modulation(condition)[:, None].chunk(6, dim=-1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        normed = self.attention_norm(x) * (1 + scale) + shift
        attended, text_attended = self.attention(normed, self.attention_norm(text), angles)
        x = x + (1 + gate) * attended
        x = x + (1 + mlp_gate) * self.mlp(self.mlp_norm(x) * (1 + mlp_scale) + mlp_shift)
        return x, text if self.text_out is None else text + self.text_out(text_attended)


class VideoTransformer(nn.Module):
    """Predicts the flow-matching velocity of noisy patches.

    With a communicator it takes and returns this rank's tokens, without one all of them. The text
    is the same on every rank, and so is what becomes of it.
    """

    angles: Tensor
    time_frequencies: Tensor

    def __init__(
        self,
        config: Config,
        communicator: DeviceCommunicatorBase | None = None,
        exchanges: Exchanges = Exchanges(),
    ) -> None:
        """The parameters are the same with and without a communicator, given the same seed."""
        super().__init__()
        self.embed = nn.Linear(config.patch_dim, config.hidden)
        self.embed_text = nn.Linear(config.text_dim, config.hidden)
        self.condition = nn.Sequential(
            nn.Linear(config.hidden, config.hidden),
            nn.SiLU(),
            nn.Linear(config.hidden, config.hidden),
            nn.SiLU(),
        )
        self.blocks = nn.ModuleList(
            Block(config, communicator, exchanges, is_last=index == config.depth - 1)
            for index in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.hidden)
        self.head = nn.Linear(config.hidden, config.patch_dim)
        angles = rotary_angles(config)
        if communicator is not None and exchanges.fused:  # the text behind it is not rotated
            angles = torch.cat((angles, torch.zeros(config.num_text_tokens, *angles.shape[1:])))
        elif communicator is not None:
            angles = communicator.slice(angles, dim=0)
        self.register_buffer("angles", angles, persistent=False)
        octaves = torch.linspace(0, 5, config.hidden // 2)
        self.register_buffer("time_frequencies", math.pi * 2.0**octaves, persistent=False)

    def forward(self, patches: Tensor, text: Tensor, time: Tensor) -> Tensor:
        """`patches` `[B, s, patch_dim]`, `text` `[B, T, text_dim]`, `time` `[B]` in 0..1.

        Returns the shape of `patches`.
        """
        phase = time[:, None] * self.time_frequencies
        condition = self.condition(torch.cat((phase.sin(), phase.cos()), dim=-1))
        x, text = self.embed(patches), self.embed_text(text)
        for block in self.blocks:
            x, text = block(x, text, condition, self.angles)
        return self.head(self.norm(x))
