"""The exchange by memory as torch.compile sees it: one operator of its own.

The operator does what `memory.all_to_all` does, so compiled code writes straight into the other
ranks' outputs too. The other collectives do what `traced` does.

The compiler may move an operator. If the graphs of the ranks differ, the ranks may move it
differently. So compile the same code with the same shapes on every rank of a group.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import device, memory, traced
from .group import Group, OperatorGroup
from .layout import Split, Splits

# An operator gets its group by name, as torch's own collectives do.
_groups: weakref.WeakValueDictionary[str, Group] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(group: Group) -> str:
    """Returns a name by which the operator finds a group that has connected memory."""
    name = f"group {next(_numbers)}"
    _groups[name] = group
    return name


def all_to_all(group: OperatorGroup, inputs: Sequence[Tensor], splits: Splits) -> list[Tensor]:
    """As `memory.all_to_all`."""
    outputs: list[Tensor] = torch.ops.fastvideo_comm.all_to_all(
        [traced.resolved(input_) for input_ in inputs], group.name, _encoded(splits)
    )
    return outputs


def all_gather(group: OperatorGroup, input_: Tensor, split: Split) -> Tensor:
    """As `traced.all_gather`."""
    return traced.all_gather(group.process_group, input_, split)


def reduce_scatter(group: OperatorGroup, input_: Tensor, split: Split) -> Tensor:
    """As `traced.reduce_scatter`."""
    return traced.reduce_scatter(group.process_group, input_, split)


def all_reduce(group: OperatorGroup, input_: Tensor, op: str) -> Tensor:
    """As `traced.all_reduce`."""
    return traced.all_reduce(group.process_group, input_, op)


def broadcast(group: OperatorGroup, input_: Tensor, src: int) -> Tensor:
    """As `traced.broadcast`."""
    return traced.broadcast(group.process_group, input_, src)


def reduce(group: OperatorGroup, input_: Tensor, dst: int) -> Tensor:
    """As `traced.reduce`."""
    return traced.reduce(group.process_group, input_, dst)


@torch.library.custom_op("fastvideo_comm::all_to_all", mutates_args=())
def _all_to_all(inputs: Sequence[Tensor], group: str, splits: Sequence[int]) -> list[Tensor]:
    """Exchanges `inputs` as the `Splits` say that `_encoded` turned into `splits`."""
    found = _group(group)
    exchange = device.all_to_all if found.memory is None else memory.all_to_all
    return exchange(found, inputs, _decoded(splits, len(inputs), found.size()))


@_all_to_all.register_fake
def _(inputs: Sequence[Tensor], group: str, splits: Sequence[int]) -> list[Tensor]:
    found = _group(group)
    decoded = _decoded(splits, len(inputs), found.size())
    return [
        input_.new_empty(
            decoded.output_shape(input_.shape, scatter, gather, found.rank(), found.size())
        )
        for input_, scatter, gather in zip(inputs, decoded.scatter, decoded.gather, strict=True)
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:  # noqa: ARG001
    _, ctx.group, ctx.splits = inputs


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[list[Tensor], None, None]:
    splits = _decoded(ctx.splits, len(grads), _group(ctx.group).size())
    return _all_to_all(grads, ctx.group, _encoded(splits.reverse())), None, None


_all_to_all.register_autograd(_backward, setup_context=_save)


def _group(name: str) -> Group:
    group = _groups.get(name)
    if group is None or (group.memory is None and group.device_memory is None):
        raise RuntimeError(
            f"the communicator of group {name!r}, for which this code was compiled, must be open; "
            "it was destroyed"
        )
    return group


def _encoded(splits: Splits) -> list[int]:
    """Returns integers: for each split its dim, its replicas, the number of sizes, the sizes."""
    numbers: list[int] = []
    for split in (*splits.scatter, *splits.gather):
        sizes = split.sizes or ()
        numbers += [split.dim, split.replicas, len(sizes), *sizes]
    return numbers


def _decoded(numbers: Sequence[int], num_tensors: int, world_size: int) -> Splits:
    """The inverse of `_encoded`."""
    splits: list[Split] = []
    at = 0
    for _ in range(2 * num_tensors):
        dim, replicas, count = numbers[at : at + 3]
        at += 3
        sizes = tuple(numbers[at : at + world_size]) if count else None
        splits.append(Split(dim, sizes, replicas))
        at += world_size if count else 0
    return Splits(tuple(splits[:num_tensors]), tuple(splits[num_tensors:]))
