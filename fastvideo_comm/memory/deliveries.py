"""What the copies of a call have in common with those of later calls, planned once."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from .memfd import aligned

if TYPE_CHECKING:
    from ..kernels.deliver import Delivery

Spec: TypeAlias = "tuple[Sequence[int], torch.dtype]"
SpecsOf: TypeAlias = Callable[[int], "list[Spec]"]
CopiesOf: TypeAlias = Callable[[int, Sequence[Tensor]], "list[tuple[Tensor, Tensor]]"]
Planned = TypeVar("Planned")

# So many plans are kept: a model makes the same few calls again and again.
_MAX_PLANS = 256


class Part(NamedTuple):
    """What one rank copies of one of its inputs: into an output of one other rank, or of all.

    Attributes:
        shape: of the part; of the parts for all ranks together, `[P, *shape]`.
        strides: of the part where it is read, in elements.
        start: elements from the first of the input to the first of the part.
        target: the rank, or None where the parts for all ranks are together.
        offset: bytes from a rank's place to the first element that is written.
        target_strides: where a part is written, in elements.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    target: int | None
    offset: int
    target_strides: tuple[int, ...]


class Plan(NamedTuple):
    """What all calls have in common that ask for the same with inputs of the same layout.

    Attributes:
        specs: shape and dtype of this rank's outputs.
        parts: what is copied, each with the number of its input.
    """

    specs: list[Spec]
    parts: list[tuple[int, Part]]


def keep(plans: dict[Hashable, Planned], key: Hashable, plan: Planned) -> Planned:
    """Keeps a plan for the next call of its layout; returns it."""
    if len(plans) >= _MAX_PLANS:
        plans.clear()
    plans[key] = plan
    return plan


def layout_of(inputs: Sequence[Tensor]) -> Hashable:
    """What a plan depends on of the inputs."""
    return tuple([(each.shape, each.stride(), each.dtype) for each in inputs])


def parts_of(
    inputs: Sequence[Tensor], specs_of: SpecsOf, copies_of: CopiesOf, targets: Sequence[int]
) -> dict[int, list[tuple[int, Part]]]:
    """For each target, the parts that it is given, each with the number of its input.

    Example:
        >>> x = torch.arange(4).view(2, 2)  # a row for each rank; its output is its row, twice
        >>> def copies_of(target, outputs):
        ...     return [(outputs[0][0], x[target])]
        >>> parts = parts_of([x], lambda _: [((2, 2), x.dtype)], copies_of, range(2))
        >>> [(number, part.start, part.shape) for number, part in parts[1]]
        [(0, 2, torch.Size([2]))]
    """
    parts: dict[int, list[tuple[int, Part]]] = {}
    specs: list[Spec] | None = None
    outputs: list[Tensor] = []
    for target in sorted(targets):
        wanted = specs_of(target)
        if wanted is not specs:  # even calls have one list for all ranks
            specs, outputs = wanted, _layouts(wanted)
        parts[target] = []
        for index, (to, src) in enumerate(copies_of(target, outputs)):
            start = int(src.storage_offset() - inputs[index].storage_offset())
            offset = int(to.storage_offset()) * to.element_size()
            part = Part(src.shape, src.stride(), start, target, offset, to.stride())
            parts[target].append((index, part))
    return parts


def plan_of(
    inputs: Sequence[Tensor],
    specs_of: SpecsOf,
    copies_of: CopiesOf,
    targets: Sequence[int],
    rank: int,
    world: int,
) -> Plan:
    """Plans a call; see `DeviceMemory.start` for the first four arguments.

    The targets are served in the order rank + 1, rank + 2, .. Parts of one tensor for all targets
    are together, if they differ only in where they are in the tensor.

    Example:
        >>> x = torch.arange(4).view(2, 2)  # a row for each rank; its output is its row, twice
        >>> def copies_of(target, outputs):
        ...     return [(outputs[0][0], x[target])]
        >>> plan = plan_of([x], lambda _: [((2, 2), x.dtype)], copies_of, range(2), 0, 2)
        >>> [(each.src.tolist(), each.begin) for each in deliveries_of(plan, [x], 0, 2)]
        [([[0, 1], [2, 3]], 1)]
    """
    by_input: dict[int, list[Part]] = {}
    for parts_of_target in parts_of(inputs, specs_of, copies_of, targets).values():
        for index, part in parts_of_target:
            by_input.setdefault(index, []).append(part)
    merged: list[tuple[int, Part]] = []
    single: list[tuple[int, Part]] = []
    for index, parts in by_input.items():
        together = _together(parts) if len(parts) == world else None
        if together is None:
            single += [(index, part) for part in parts]
        else:
            merged.append((index, together))
    single.sort(key=lambda each: ((each[1].target or 0) - rank - 1) % world)
    return Plan(specs_of(rank), merged + single)


def deliveries_of(plan: Plan, inputs: Sequence[Tensor], rank: int, world: int) -> list[Delivery]:
    """The deliveries of a call with these inputs."""
    from ..kernels.deliver import Delivery

    deliveries = []
    for index, (shape, strides, start, target, offset, target_strides) in plan.parts:
        input_ = inputs[index]
        src = input_.as_strided(shape, strides, input_.storage_offset() + start)
        if target is None:
            deliveries.append(Delivery(src, 0, (rank + 1) % world, offset, target_strides))
        else:
            deliveries.append(Delivery(src[None], target, 0, offset, target_strides))
    return deliveries


def _layouts(specs: Sequence[Spec]) -> list[Tensor]:
    """Outputs without memory, which begin as far behind their storage as behind the place."""
    outputs, start = [], 0
    for shape, dtype in specs:
        first, count = start // dtype.itemsize, math.prod(shape)
        whole = torch.empty(first + count, dtype=dtype, device="meta")
        outputs.append(whole[first:].view(tuple(shape)))
        start += aligned(count * dtype.itemsize)
    return outputs


def _together(parts: Sequence[Part]) -> Part | None:
    """The parts as one, if they differ only in where they are in one tensor."""
    first = parts[0]
    step = parts[1].start - first.start if len(parts) > 1 else 0
    for index, part in enumerate(parts):
        if part != first._replace(start=first.start + index * step, target=part.target):
            return None
    return first._replace(
        shape=(len(parts), *first.shape), strides=(step, *first.strides), target=None
    )
