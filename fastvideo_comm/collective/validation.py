"""The checks of every op's arguments, before anything is sent.

Each function raises a short error, `<argument> must <rule>, got <value>`, or returns the arguments
in their normal form. The communicator adds op, group and rank to the error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..kernels.quantise import FORMATS, ROW_MULTIPLE
from ..reduce_ops import REDUCE_OPS, ReduceOp, reduce_op_name
from .group import AnyGroup
from .grouped_heads import HEADS_DIM, form_groups, grouped_splits
from .layout import HEADS_TO_SEQUENCE, SEQUENCE_TO_HEADS, Split, Splits, near_even_sizes
from .wire import REDUCED, WireFormat

# Every rank's size of a dim: one list for all tensors, or one list for each tensor. "auto": the
# library finds the sizes.
Sizes: TypeAlias = "Sequence[int] | Sequence[Sequence[int] | None] | Literal['auto'] | None"
# What tensors are rounded to while they travel: one dtype for all, or one for each.
WireDtypes: TypeAlias = "torch.dtype | Sequence[torch.dtype | None] | None"
Rounding: TypeAlias = Literal["nearest", "stochastic"]

_BITWISE = ("band", "bor", "bxor")


def check_tensor(name: str, value: Tensor) -> None:
    """Checks for a dense tensor that is whole on this rank."""
    if value is None:
        raise TypeError(
            f"{name} must be a tensor, got None; a parameter that the loss does not depend on has "
            "no gradient: give zeros on every rank, or skip it on every rank"
        )
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    if value.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one")
    if hasattr(value, "to_local"):  # of torch.distributed.tensor, which takes long to import
        raise TypeError(
            f"{name} must be this rank's own tensor, got a {type(value).__name__}: give its "
            "to_local()"
        )


def check_device(name: str, value: Tensor, device: torch.device) -> None:
    """Checks the device of a tensor; a device without an index allows every device of its type."""
    if value.device.type != device.type or (
        device.index is not None and value.device.index != device.index
    ):
        raise ValueError(f"{name} must be on the communicator's {device}, got {value.device}")


def check_world_size(group: AnyGroup, world_size: int) -> None:
    """Checks that the caller's world size is the group's."""
    if group.size() != world_size:
        raise ValueError(f"world_size must be the group's {group.size()}, got {world_size}")


def check_int(name: str, value: int) -> None:
    """Checks for an int that is not a bool."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def normal_dim(input_: Tensor, dim: int) -> int:
    """Checks `dim`; returns it counted from the front."""
    check_int("dim", dim)
    if input_.dim() == 0:
        raise ValueError("input_ must have at least 1 dim, got a 0-d tensor")
    if not -input_.dim() <= dim < input_.dim():
        raise ValueError(
            f"dim must be in [{-input_.dim()}, {input_.dim() - 1}] "
            f"for input_ of shape {list(input_.shape)}, got {dim}"
        )
    return dim % input_.dim()


def check_divisible(input_: Tensor, name: str, dim: int, world_size: int, remedy: str = "") -> None:
    """Checks that the world size divides the size at `dim`."""
    if input_.shape[dim] % world_size:
        raise ValueError(
            f"input_ must have a size at {name}={dim} that world_size={world_size} divides, "
            f"got {input_.shape[dim]} of shape {list(input_.shape)}{remedy}"
        )


def all_to_all_4D_dims(input_: Tensor, scatter_dim: int, gather_dim: int) -> tuple[int, int]:
    """Checks that a tensor has 4 dims, and the given two; returns these counted from the front."""
    if not type(scatter_dim) is type(gather_dim) is int:  # saves two calls in every exchange
        check_int("scatter_dim", scatter_dim)
        check_int("gather_dim", gather_dim)
    if input_.dim() != 4:
        raise ValueError(f"input_ must have 4 dims [B, S, H, D], got shape {list(input_.shape)}")
    dims = (
        scatter_dim + 4 if scatter_dim < 0 else scatter_dim,
        gather_dim + 4 if gather_dim < 0 else gather_dim,
    )
    if dims not in ((2, 1), (1, 2)):
        raise ValueError(
            f"(scatter_dim, gather_dim) must be (2, 1) or (1, 2), got {(scatter_dim, gather_dim)}"
        )
    return dims


def all_to_all_4D(input_: Tensor, world_size: int, scatter_dim: int, gather_dim: int) -> Splits:
    """As `all_to_all_4D_dims`; also checks that P divides the size, and returns even splits."""
    dims = all_to_all_4D_dims(input_, scatter_dim, gather_dim)
    if input_.shape[dims[0]] % world_size:  # saves a call in every exchange
        remedy = "; scatter_sizes= shares it unevenly"
        check_divisible(input_, "scatter_dim", dims[0], world_size, remedy)
    return HEADS_TO_SEQUENCE if dims[0] == HEADS_DIM else SEQUENCE_TO_HEADS


def tensors(input_: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns one tensor, or a sequence of at least one, as a tuple."""
    if isinstance(input_, Tensor):
        return (input_,)
    if not isinstance(input_, list | tuple):
        raise TypeError(f"input_ must be a tensor or several, got {type(input_).__name__}")
    if not input_:
        raise ValueError("input_ must hold at least one tensor, got an empty sequence")
    return tuple(input_)


def scatter_splits(
    inputs: tuple[Tensor, ...], dim: int, sizes: Sizes, world_size: int, *, packed: bool
) -> tuple[Split, ...]:
    """Returns how `dim` of each tensor is divided; "auto" keeps groups of heads together."""
    of_each = sizes_of_each("scatter_sizes", sizes, len(inputs))
    remedy = "; scatter_sizes= shares it unevenly"
    if dim == HEADS_DIM:
        auto = [index for index, each in enumerate(of_each) if each == "auto"]
        heads = [inputs[index].shape[dim] for index in auto]
        if not form_groups(heads):
            raise ValueError(
                "input_ must have head counts that are multiples of the smallest for "
                f"scatter_sizes='auto', got {heads}; scatter_sizes= takes sizes for each tensor"
            )
        for index, grouped in zip(auto, grouped_splits(heads, world_size), strict=True):
            of_each[index] = grouped
        if len(inputs) > 1 and form_groups([input_.shape[dim] for input_ in inputs]):
            remedy = "; scatter_sizes='auto' gives every rank the key heads of its query heads"
    return tuple(
        scatter_split(input_, dim, each, world_size, packed=packed, remedy=remedy)
        for input_, each in zip(inputs, of_each, strict=True)
    )


def gather_splits(
    inputs: tuple[Tensor, ...], dim: int, of_each: Sequence[Any], rank: int, world_size: int
) -> tuple[Split, ...]:
    """Returns how `dim` of each tensor is joined, given every rank's sizes of it."""
    return tuple(
        gather_split(input_, dim, sizes, rank, world_size)
        for input_, sizes in zip(inputs, of_each, strict=True)
    )


def sizes_of_each(name: str, sizes: Sizes, num_tensors: int) -> list[Any]:
    """Returns one entry for each tensor: None, "auto", or every rank's size."""
    if sizes is None:
        return [None] * num_tensors
    if isinstance(sizes, str) and sizes != "auto":
        raise ValueError(f"{name} must be None, 'auto' or sizes, got {sizes!r}")
    if not isinstance(sizes, Sequence):
        remedy = ": give its .tolist()" if hasattr(sizes, "tolist") else ""
        raise TypeError(
            f"{name} must be None, 'auto' or a list of ints, got {type(sizes).__name__}{remedy}"
        )
    if isinstance(sizes, str) or not any(
        size is None or isinstance(size, Sequence) for size in sizes
    ):
        return [sizes] * num_tensors
    if len(sizes) != num_tensors:
        raise ValueError(f"{name} must hold sizes for {num_tensors} tensors, got {len(sizes)}")
    return list(sizes)


def wire_format(
    inputs: tuple[Tensor, ...],
    wire_dtype: WireDtypes,
    grad_wire_dtype: WireDtypes,
    rounding: Rounding,
    generator: torch.Generator | None,
) -> WireFormat | None:
    """Returns what tensors and their gradients are rounded to; None: all travel as they are."""
    choice("rounding", rounding, ("nearest", "stochastic"))
    dtypes = _wire_dtypes("wire_dtype", wire_dtype, inputs)
    of_gradients = _wire_dtypes("grad_wire_dtype", grad_wire_dtype, inputs)
    rounds_gradients = any(dtype is not None for dtype in of_gradients)
    if generator is not None:
        _check_generator(generator, inputs[0].device)
    if rounds_gradients:
        gradient = WireFormat(of_gradients, rounding, generator)
        return WireFormat(dtypes, gradient=gradient)
    return WireFormat(dtypes) if any(dtype is not None for dtype in dtypes) else None


def _wire_dtypes(
    name: str, given: WireDtypes, inputs: tuple[Tensor, ...]
) -> tuple[torch.dtype | None, ...]:
    """Returns one dtype for each tensor; checks that the tensor fits the dtype."""
    if isinstance(given, list | tuple):
        dtypes = tuple(given)
        if len(dtypes) != len(inputs):
            raise ValueError(
                f"{name} must hold dtypes for {len(inputs)} tensors, got {len(dtypes)}"
            )
    else:
        dtypes = (given,) * len(inputs)
    for dtype, input_ in zip(dtypes, inputs, strict=True):
        if dtype is None:
            continue
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{name} must be a dtype, several or None, got {type(dtype).__name__}")
        if dtype not in FORMATS:
            raise ValueError(f"{name} must be one of {', '.join(map(str, FORMATS))}, got {dtype}")
        if input_.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise TypeError(
                f"input_ must be float16, bfloat16 or float32 for {name}, got {input_.dtype}"
            )
        if input_.shape[-1] % ROW_MULTIPLE or not input_.shape[-1]:
            raise ValueError(
                f"input_ must have a last size that is a multiple of {ROW_MULTIPLE} for {name}, "
                f"got shape {list(input_.shape)}"
            )
    return dtypes


def _check_generator(generator: torch.Generator, device: torch.device) -> None:
    """Checks for a generator on the device of the tensors."""
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if generator.device.type != device.type:
        raise ValueError(f"generator must be on {device}, got one on {generator.device}")
    if torch.compiler.is_compiling():
        raise ValueError("generator must be None where a call is compiled, got a generator")


def uneven_split(name: str, dim: int, sizes: Sequence[int], world_size: int) -> Split:
    """Checks for a size of at least 0 for every rank; equal sizes make an even split."""
    sizes = tuple(sizes)
    for size in sizes:
        check_int(f"every entry of {name}", size)
    if len(sizes) != world_size or any(size < 0 for size in sizes):
        raise ValueError(
            f"{name} must hold world_size={world_size} sizes of at least 0, got {list(sizes)}"
        )
    # Not a set: a hashed size would become a constant of a compiled graph.
    return Split(dim, sizes if any(size != sizes[0] for size in sizes) else None)


def scatter_split(
    input_: Tensor, dim: int, sizes: Any, world_size: int, *, packed: bool, remedy: str
) -> Split:
    """Returns how `dim` of a tensor is divided; `sizes` may be a finished `Split`.

    In a sequence of tensors, a tensor of fewer heads than ranks is replicated.
    """
    if isinstance(sizes, Split):
        return sizes
    size = input_.shape[dim]
    if sizes is not None:
        return _given_scatter_split(input_, "scatter_dim", dim, sizes, world_size)
    if packed and dim == HEADS_DIM and 0 < size < world_size and world_size % size == 0:
        return Split(dim, None, world_size // size)
    check_divisible(input_, "scatter_dim", dim, world_size, remedy)
    return Split(dim)


def _given_scatter_split(input_: Tensor, name: str, dim: int, sizes: Any, world_size: int) -> Split:
    """Checks that sizes add up to the size of `dim`; errors call the dim `name`."""
    size = input_.shape[dim]
    if sizes == "auto":
        sizes = near_even_sizes(size, world_size)
    elif sum(sizes) != size:
        raise ValueError(
            f"scatter_sizes must add up to the {size} at {name}={dim} of shape "
            f"{list(input_.shape)}, got {list(sizes)}"
        )
    return uneven_split("scatter_sizes", dim, sizes, world_size)


def gather_split(
    input_: Tensor,
    dim: int,
    sizes: Sequence[int] | None,
    rank: int,
    world_size: int,
    name: str = "gather_dim",
) -> Split:
    """Checks every rank's size of the dim that is joined; errors call the dim `name`."""
    if sizes is None:
        return Split(dim)
    result = uneven_split("gather_sizes", dim, sizes, world_size)
    if sizes[rank] != input_.shape[dim]:
        raise ValueError(
            f"gather_sizes must hold the {input_.shape[dim]} at {name}={dim} of shape "
            f"{list(input_.shape)} for rank {rank}, got {list(sizes)}"
        )
    return result


def all_gather(input_: Tensor, dim: int) -> Split:
    """Checks for a tensor with at least one dim."""
    check_tensor("input_", input_)
    return Split(normal_dim(input_, dim))


def all_gather_sizes(
    input_: Tensor, dim: int, sizes: Sequence[int] | None, rank: int, world_size: int
) -> Split:
    """As `all_gather`, with every rank's size of `dim`."""
    return gather_split(input_, normal_dim(input_, dim), sizes, rank, world_size, "dim")


def parts(input_: Tensor, world_size: int, dim: int, remedy: str = "") -> Split:
    """Checks for a tensor whose `dim` holds a part of the same size for every rank."""
    result = all_gather(input_, dim)
    check_divisible(input_, "dim", result.dim, world_size, remedy)
    return result


def slice_(input_: Tensor, world_size: int, dim: int) -> Split:
    """As `parts`, for a caller who can also give `scatter_sizes`."""
    return parts(input_, world_size, dim, "; scatter_sizes= shares it unevenly")


def slice_sizes(input_: Tensor, dim: int, sizes: Sizes, world_size: int) -> Split:
    """As `slice_`, with every rank's part of `dim`."""
    dim = all_gather(input_, dim).dim
    (of_each,) = sizes_of_each("scatter_sizes", sizes, 1)
    if of_each is None:
        return slice_(input_, world_size, dim)
    return _given_scatter_split(input_, "dim", dim, of_each, world_size)


def reduce_scatter(input_: Tensor, dim: int, sizes: Sizes, world_size: int) -> Split:
    """Checks for a dtype that can be added, and a `dim` that holds a part for every rank."""
    split = slice_sizes(input_, dim, sizes, world_size)
    check_reduced(input_)
    return split


def check_reduced(input_: Tensor) -> None:
    """Checks for a dtype that every backend reduces."""
    if input_.dtype not in REDUCED:
        raise TypeError(
            f"input_ must have a dtype that backends reduce, got {input_.dtype}; "
            "convert it before and after"
        )


def all_reduce(input_: Tensor, op: ReduceOp | None) -> str:
    """Checks that `op` can reduce the dtype; returns the name of `op`."""
    check_tensor("input_", input_)
    name = reduce_op_name(op)
    if name is None:
        raise ValueError(f"op must be one of ReduceOp.{', '.join(REDUCE_OPS).upper()}, got {op}")
    check_reduced(input_)
    if input_.is_complex() and name not in ("sum", "avg"):
        raise TypeError(f"op must be SUM or AVG for {input_.dtype}, got {name.upper()}")
    if name == "avg" and not (input_.is_floating_point() or input_.is_complex()):
        raise TypeError(f"op must not be AVG for {input_.dtype}, got AVG")
    if name in _BITWISE and (input_.is_floating_point() or input_.is_complex()):
        raise TypeError(f"op must not be bitwise for {input_.dtype}, got {name.upper()}")
    return name


def memory_bytes(value: int) -> int:
    """Returns the size of a segment of GPU memory."""
    check_int("memory_bytes", value)
    if value < 1 << 20 or value % 4096:
        raise ValueError(f"memory_bytes must be a multiple of 4096 from 1 MiB on, got {value}")
    return value


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Checks that `value` is one of a few words."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def peer(name: str, value: int, rank: int, world_size: int, *, others_only: bool) -> None:
    """Checks for a rank of the group; for send and recv it must be another rank."""
    check_int(name, value)
    if not 0 <= value < world_size:
        raise ValueError(
            f"{name} must be a rank of the group in [0, {world_size - 1}], got {value}"
        )
    if others_only and value == rank:
        raise ValueError(f"{name} must be another rank than this one, got {value}")
