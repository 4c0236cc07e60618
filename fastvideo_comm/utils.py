"""Arithmetic and tensor helpers; upstream has them in `distributed.utils`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .collective.layout import message_view, near_even_sizes
from .kernels import contiguous_copy
from .stateless import StatelessProcessGroup

__all__ = [
    "StatelessProcessGroup",
    "compute_padding_for_sp",
    "divide",
    "ensure_divisibility",
    "logger",
    "near_even_sizes",
    "pad_sequence_tensor",
    "split_tensor_along_last_dim",
    "unpad_sequence_tensor",
]

logger = logging.getLogger("fastvideo_comm")


class DivisibilityError(ValueError, AssertionError):
    """A size is not divisible; also an AssertionError, which callers of upstream catch."""


def ensure_divisibility(numerator: int, denominator: int) -> None:
    """Raises unless `denominator` divides `numerator`.

    Raises:
        DivisibilityError: `denominator` is 0 or does not divide `numerator`. The error is a
            ValueError and an AssertionError.
    """
    if denominator == 0 or numerator % denominator:
        raise DivisibilityError(
            f"numerator must be a multiple of denominator, got {numerator} and {denominator}: "
            f"{numerator} is not divisible by {denominator}"
        )


def divide(numerator: int, denominator: int) -> int:
    """Divides without remainder.

    Example:
        >>> divide(12, 4)
        3

    Raises:
        DivisibilityError: `denominator` does not divide `numerator`.
    """
    ensure_divisibility(numerator, denominator)
    return numerator // denominator


def split_tensor_along_last_dim(
    tensor: Tensor, num_partitions: int, contiguous_split_chunks: bool = False
) -> Sequence[Tensor]:
    """Splits the last dim into equal chunks.

    Example:
        >>> import torch
        >>> [chunk.tolist() for chunk in split_tensor_along_last_dim(torch.arange(6), 3)]
        [[0, 1], [2, 3], [4, 5]]

    Args:
        tensor: `[.., P*c]`.
        num_partitions: P.
        contiguous_split_chunks: if True, one launch copies all chunks into new contiguous memory.
            If False, the chunks are views of `tensor`. Both are differentiable: dx = concat of the
            chunks' gradients.

    Returns:
        A tuple of P tensors `[.., c]`.

    Raises:
        DivisibilityError: `num_partitions` does not divide the last dim's size.
        ValueError: a 0-d tensor.
    """
    if tensor.dim() == 0:
        raise ValueError("tensor must have at least 1 dim, got a 0-d tensor")
    if num_partitions < 1:
        raise ValueError(f"num_partitions must be at least 1, got {num_partitions}")
    ensure_divisibility(tensor.shape[-1], num_partitions)
    chunks = message_view(tensor, -1, num_partitions, 0)
    if not contiguous_split_chunks:
        return chunks.unbind(0)
    split: tuple[Tensor, ...] = _SplitContiguous.apply(tensor, num_partitions)
    return split


class _SplitContiguous(torch.autograd.Function):
    """`[.., P*c]` -> P tensors `[.., c]`, contiguous: one copy. dx = concat of the gradients."""

    @staticmethod
    def forward(tensor: Tensor, num_partitions: int) -> tuple[Tensor, ...]:
        chunks = message_view(tensor, -1, num_partitions, 0)
        return contiguous_copy(chunks).unbind(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps nothing: the gradient does not depend on the values."""

    @staticmethod
    def backward(_: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return torch.cat(grad_outputs, -1), None


def compute_padding_for_sp(seq_len: int, sp_world_size: int) -> tuple[int, int]:
    """Returns the next length that `sp_world_size` divides, and how much longer it is.

    Example:
        >>> compute_padding_for_sp(32_759, 8)
        (32760, 1)

    Raises:
        ValueError: `seq_len` is negative or `sp_world_size` is less than 1.
    """
    if seq_len < 0:
        raise ValueError(f"seq_len must not be negative, got {seq_len}")
    if sp_world_size < 1:
        raise ValueError(f"sp_world_size must be at least 1, got {sp_world_size}")
    padding = -seq_len % sp_world_size
    return seq_len + padding, padding


def pad_sequence_tensor(
    tensor: Tensor, target_seq_len: int, seq_dim: int = 1, pad_value: float = 0.0
) -> Tensor:
    """Adds `pad_value` at the end of `seq_dim`, up to the size `target_seq_len`.

    Example:
        >>> import torch
        >>> pad_sequence_tensor(torch.ones(1, 2), 4)
        tensor([[1., 1., 0., 0.]])

    Args:
        tensor: any shape with a dim `seq_dim`.
        target_seq_len: the size of `seq_dim` in the result. If `tensor` already has this size or a
            larger one, `tensor` itself is returned.
        seq_dim: the dim that grows.
        pad_value: the value of the new elements; converted to `tensor`'s dtype.

    Returns:
        The padded tensor. Its gradient is the gradient of the unpadded part.
    """
    missing = target_seq_len - tensor.shape[seq_dim]
    if missing <= 0:
        return tensor
    shape = list(tensor.shape)
    shape[seq_dim] = missing
    return torch.cat((tensor, tensor.new_full(shape, pad_value)), dim=seq_dim)


def unpad_sequence_tensor(tensor: Tensor, original_seq_len: int, seq_dim: int = 1) -> Tensor:
    """Returns the first `original_seq_len` entries along `seq_dim`: a view without the padding.

    Example:
        >>> import torch
        >>> unpad_sequence_tensor(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), 2)
        tensor([[1., 1.]])

    Raises:
        ValueError: `original_seq_len` is negative or longer than the tensor.
    """
    size = tensor.shape[seq_dim]
    if not 0 <= original_seq_len <= size:
        raise ValueError(
            f"original_seq_len must be in [0, {size}] for seq_dim={seq_dim} of shape "
            f"{list(tensor.shape)}, got {original_seq_len}"
        )
    return tensor.narrow(seq_dim, 0, original_seq_len)
