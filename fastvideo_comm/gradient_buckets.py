"""The gradients of replicated parameters, summed over ranks in buckets.

Each rank holds all parameters, and of each gradient the share that came through its own tokens and
heads. A collective for each parameter would cost more than the bytes: gradients of one dtype travel
together. The ranks first compare their parameters, and which of them have a gradient, in one small
collective; so that no rank waits for a bucket that another does not send.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .collective.validation import check_device
from .collective.wire import REDUCED
from .errors import MismatchError

# The size of torch's DistributedDataParallel, which overlaps buckets with each other too.
BUCKET_BYTES = 25 << 20

# `everyone(numbers)`: for each of this rank's numbers, what it is on every rank.
Everyone = Callable[[list[int]], list[list[int]]]

# What a rank whose parameters are bad brings in the place of their number and of two digests.
NO_GRADIENTS = [-1, 0, 0]

# The dtypes that gradients have.
_DTYPES = sorted([d for d in REDUCED if d.is_floating_point or d.is_complex], key=str)


def checked_parameters(parameters: Tensor | Iterable[Tensor], device: torch.device) -> list[Tensor]:
    """The parameters, each once.

    Raises:
        ValueError: none, on another device, a gradient that shares memory with itself, or that two
            parameters have.
        TypeError: no tensor, a DTensor, a gradient that is sparse, or a dtype that backends do not
            add where there is, or may be, a gradient.
    """
    if not isinstance(parameters, Iterable):
        raise TypeError(
            f"parameters must be tensors, such as model.parameters(), got "
            f"{type(parameters).__name__}"
        )
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if not given:
        raise ValueError("parameters must hold at least one tensor, got none")
    for index, parameter in enumerate(given):
        if not isinstance(parameter, Tensor):
            raise TypeError(
                f"parameters must be tensors, got {type(parameter).__name__} at index {index}"
            )
        name = f"parameter {index} of shape {list(parameter.shape)}"
        is_frozen = parameter.grad is None and not parameter.requires_grad
        for tensor in (parameter, parameter.grad):
            if tensor is not None:
                _check(tensor, name, device, may_have_any_dtype=is_frozen)
    parameters = list({id(parameter): parameter for parameter in given}.values())
    holders: dict[int, int] = {}  # by the address of the first element
    for index, parameter in enumerate(parameters):
        if parameter.grad is not None and parameter.grad.numel():
            holder = holders.setdefault(parameter.grad.data_ptr(), index)
            if holder != index:  # it would be added up twice
                raise ValueError(
                    "parameters must have a gradient tensor each, got one tensor for two different "
                    f"ones, the second of shape {list(parameter.shape)}"
                )
    return parameters


def _check(tensor: Tensor, name: str, device: torch.device, *, may_have_any_dtype: bool) -> None:
    """A dense tensor of this rank that can be added up and written."""
    if hasattr(tensor, "to_local"):  # of torch.distributed.tensor, which takes long to import
        raise TypeError(
            f"parameters must be this rank's own tensors, got a {type(tensor).__name__} for {name}:"
            " what made it reduces its gradient"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"parameters must have dense gradients, got {tensor.layout} for {name}")
    if tensor.dtype not in _DTYPES and not may_have_any_dtype:
        raise TypeError(
            f"parameters must have a floating-point dtype that backends reduce, "
            f"got {tensor.dtype} for {name}"
        )
    dims = zip(tensor.shape, tensor.stride(), strict=True)
    if any(stride == 0 and size > 1 for size, stride in dims):
        raise ValueError(
            f"parameters must have gradients with memory for each element, got strides "
            f"{list(tensor.stride())} for {name}"
        )
    check_device(name, tensor, device)


def agreed_gradients(parameters: Sequence[Tensor], everyone: Everyone, where: str) -> list[Tensor]:
    """This rank's gradients of those parameters that have one on some rank; zeros where none is.

    Args:
        parameters: of this rank.
        everyone: asks the other ranks.
        where: how an error begins.

    Raises:
        MismatchError: the ranks have different parameters, or gradients of different dtypes.
    """
    codes = [_code(parameter.grad) for parameter in parameters]
    shapes = [_digest([*p.shape, str(p.dtype), p.requires_grad]) for p in parameters]
    counts, of_shapes, of_codes = everyone([len(parameters), _digest(shapes), _digest(codes)])
    if -1 in counts:
        bad = ", ".join(str(rank) for rank, count in enumerate(counts) if count == -1)
        raise MismatchError(
            f"{where}: parameters must be good on every rank, got bad ones on rank {bad}, which "
            "raises what is wrong with them"
        )
    if len(set(counts)) > 1:
        raise MismatchError(
            f"{where}: parameters must be the same on every rank, got {counts} of them on the ranks"
        )
    if len(set(of_shapes)) > 1:
        _raise_first_difference(parameters, everyone(shapes), where)
    if len(set(of_codes)) > 1:
        for index, of_all in enumerate(everyone(codes)):
            kinds = set(of_all) - {0}
            if len(kinds) > 1:
                dtypes = [str(_DTYPES[code - 1]) if code else None for code in of_all]
                raise MismatchError(
                    f"{where}: parameters must have gradients of one dtype on every rank, got "
                    f"{dtypes} on the ranks for parameter {index}"
                )
            if kinds and not codes[index]:
                dtype = _DTYPES[kinds.pop() - 1]
                parameters[index].grad = torch.zeros_like(parameters[index], dtype=dtype)
    return [each.grad for each in parameters if each.grad is not None]


def _raise_first_difference(
    parameters: Sequence[Tensor], of_all: Sequence[Sequence[int]], where: str
) -> None:
    index = next(index for index, each in enumerate(of_all) if len(set(each)) > 1)
    own = parameters[index]
    raise MismatchError(
        f"{where}: parameters must have the same shapes, dtypes and requires_grad on every rank, "
        f"got other ones than {list(own.shape)}, {own.dtype}, {own.requires_grad} for parameter "
        f"{index} on some rank"
    )


def _code(gradient: Tensor | None) -> int:
    """0 for no gradient, else a number for its dtype."""
    return 0 if gradient is None else 1 + _DTYPES.index(gradient.dtype)


def _digest(facts: Sequence[int | str]) -> int:
    """A number of 63 bits, the same for the same facts in every process."""
    text = repr(list(facts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def buckets(gradients: Iterable[Tensor], num_bytes: int) -> list[list[Tensor]]:
    """The gradients in buckets of one dtype; a larger gradient has one to itself.

    Example:
        >>> sizes = [torch.zeros(size) for size in (1, 2, 3, 1)]
        >>> [[each.numel() for each in bucket] for bucket in buckets(sizes, 12)]
        [[1, 2], [3], [1]]
    """
    done: list[list[Tensor]] = []
    filling: dict[torch.dtype, list[Tensor]] = {}
    filled: dict[torch.dtype, int] = {}
    for gradient in gradients:
        dtype = gradient.dtype
        if dtype in filling and filled[dtype] + gradient.nbytes > num_bytes:
            done.append(filling.pop(dtype))
        filled[dtype] = gradient.nbytes + (filled[dtype] if dtype in filling else 0)
        filling.setdefault(dtype, []).append(gradient)
    return done + list(filling.values())
