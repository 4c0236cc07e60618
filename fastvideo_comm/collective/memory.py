"""The collectives by memory, for ranks that can write into each other's memory: no autograd.

A rank allocates its output in memory that the other ranks have mapped, and posts where the output
is. Every rank copies the parts of its input, with any strides, straight into the outputs of the
others. Nothing is packed, and every byte is copied once. A post also says what its rank asks for.
So every call finds ranks that disagree, before anything is written.

The rank that needs a sum adds the parts in rank order, so a sum is the same in every run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..diagnosis.record import Facts, facts_of
from ..kernels import contiguous_copy, copy_all_valid_
from ..memory.host import Spec
from .group import Group
from .layout import Split, Splits, near_even_sizes, replicated_view
from .memory_call import Copies, Work, nothing, run_call, run_pair, start_call

# In an all_reduce of up to so many bytes, every rank sends its whole tensor to every other rank,
# and all ranks reduce: one round of posts. Above, each rank reduces a part and sends the part to
# the others: two rounds, with P/2 times fewer bytes.
WHOLE_REDUCE_BYTES = 1 << 15

_REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "sum": torch.add,
    "avg": torch.add,
    "product": torch.mul,
    "min": torch.minimum,
    "max": torch.maximum,
    "band": torch.bitwise_and,
    "bor": torch.bitwise_or,
    "bxor": torch.bitwise_xor,
}


def all_to_all(group: Group, inputs: Sequence[Tensor], splits: Splits) -> list[Tensor]:
    """Trades `inputs` and waits for the outputs, each contiguous."""
    return start_all_to_all(group, inputs, splits, async_op=False).wait()


def start_all_to_all(
    group: Group, inputs: Sequence[Tensor], splits: Splits, *, async_op: bool
) -> Work:
    """Posts the outputs, then copies; with `async_op`, another thread copies."""
    rank, size = group.rank(), group.size()
    pairs = list(zip(inputs, splits.scatter, splits.gather, strict=True))
    is_even = splits.is_even  # then all ranks post the same specs
    even_specs: list[Spec] = []

    def specs_of(owner: int) -> list[Spec]:
        """Returns what a rank posts: its outputs; for an output that is a sum, its terms."""
        if even_specs:
            return even_specs
        specs: list[Spec] = even_specs if is_even else []
        for input_, scatter, gather in pairs:
            shape = splits.output_shape(input_.shape, scatter, gather, owner, size)
            if gather.replicas > 1:
                shape = gather.replicated_shape(shape)
            specs.append((shape, input_.dtype))
        return specs

    def copies(target: int, outputs: Sequence[Tensor]) -> Copies:
        parts = []
        for (input_, scatter, gather), output in zip(pairs, outputs, strict=True):
            if gather.replicas > 1:
                to = output[:, rank // gather.replicas, rank % gather.replicas]
            else:
                length = input_.shape[gather.dim]
                to = output.narrow(gather.dim, gather.start(length, rank), length)
            parts.append((to, scatter.part_of(input_, target, size)))
        return parts

    facts = group.take_asked()
    if facts is None:
        uneven = any(split.sizes is not None for split in splits.gather)
        facts = facts_of(
            "all_to_all_4D",
            inputs,
            (splits,),
            uneven_dim=splits.gather[0].dim if uneven else None,
        )
    # The facts of a backward do not say how many ranks hold a head.
    layout = splits.scatter, splits.gather
    received, flight = start_call(
        group, facts, inputs, specs_of, copies, layout=layout, async_op=async_op
    )
    if is_even:
        return Work(group, "all_to_all_4D", flight, received)
    outputs = list(received)
    sums = [
        (split, index, splits.output_shape(input_.shape, scatter, split, rank, size))
        for index, (input_, scatter, split) in enumerate(pairs)
        if split.replicas > 1
    ]

    def add_up() -> None:
        for split, index, shape in sums:
            # Allocated now: on a GPU, the stream that waits may not be the one that started.
            outputs[index] = received[index].new_empty(shape)
            view = replicated_view(outputs[index], split.dim, split.replicas)
            torch.sum(received[index], 2, out=view[:, :, 0])

    return Work(group, "all_to_all_4D", flight, outputs, add_up)


def all_gather(group: Group, input_: Tensor, split: Split) -> Tensor:
    """`[A, c, ..] -> [A, P*c, ..]`: every rank's tensor side by side along the split's dim."""
    rank, length = group.rank(), input_.shape[split.dim]
    shape = list(input_.shape)
    shape[split.dim] = split.whole(length, group.size())
    specs: list[Spec] = [(shape, input_.dtype)]

    def copies(_: int, outputs: Sequence[Tensor]) -> Copies:
        return [(outputs[0].narrow(split.dim, split.start(length, rank), length), input_)]

    uneven_dim = None if split.sizes is None else split.dim
    facts = facts_of("all_gather", input_, (split,), uneven_dim=uneven_dim)
    return run_call(group, facts, [input_], lambda _: specs, copies)[0]


def reduce_scatter(group: Group, input_: Tensor, split: Split) -> Tensor:
    """`[A, P*c, ..] -> [A, c, ..]`: the sum over ranks of this rank's part of the split's dim."""
    facts = facts_of("reduce_scatter", input_, (split,))
    return _reduce_scatter(group, facts, input_, split, "sum")


def _reduce_scatter(group: Group, facts: Facts, input_: Tensor, split: Split, op: str) -> Tensor:
    rank, size = group.rank(), group.size()

    def specs_of(owner: int) -> list[Spec]:
        """Returns the spec of a rank's part, once for every rank that adds to it."""
        shape = list(input_.shape)
        shape[split.dim] = split.part(shape[split.dim], owner, size)
        return [(shape, input_.dtype)] * size

    def copies(target: int, outputs: Sequence[Tensor]) -> Copies:
        return [(outputs[rank], split.part_of(input_, target, size))]

    return _reduced(run_call(group, facts, [input_], specs_of, copies), op)


def all_reduce(group: Group, input_: Tensor, op: str) -> Tensor:
    """The reduction over ranks, element by element, into a new tensor."""
    facts = facts_of("all_reduce", input_, (op,))
    if input_.nbytes <= WHOLE_REDUCE_BYTES:
        rank = group.rank()
        specs: list[Spec] = [(input_.shape, input_.dtype)] * group.size()

        def copies(_: int, outputs: Sequence[Tensor]) -> Copies:
            return [(outputs[rank], input_)]

        return _reduced(run_call(group, facts, [input_], lambda _: specs, copies), op)
    sizes = tuple(near_even_sizes(input_.numel(), group.size()))
    split = Split(0, sizes)
    flat = contiguous_copy(input_).view(-1)
    part = _reduce_scatter(group, facts, flat, split, op)
    return all_gather(group, part, split).resize_(input_.shape)


def add_buckets(group: Group, buckets: Sequence[Sequence[Tensor]]) -> None:
    """Writes sums over ranks in place."""
    for tensors in buckets:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        total = all_reduce(group, flat, "sum")
        parts = total.split([tensor.numel() for tensor in tensors])
        copy_all_valid_(
            [(to, part.view(to.shape)) for to, part in zip(tensors, parts, strict=True)]
        )


def _reduced(parts: list[Tensor], op: str) -> Tensor:
    """Reduces the parts of all ranks in rank order, into the memory of the first part."""
    total = parts[0]
    for part in parts[1:]:
        _REDUCTIONS[op](total, part, out=total)
    return total.div_(len(parts)) if op == "avg" else total


def broadcast(group: Group, input_: Tensor, src: int) -> Tensor:
    """Rank `src`'s tensor, as a new tensor on every rank."""
    specs: list[Spec] = [(input_.shape, input_.dtype)]

    def copies(_: int, outputs: Sequence[Tensor]) -> Copies:
        return [(outputs[0], input_)]

    facts = facts_of("broadcast", input_, (src,))
    targets = range(group.size()) if group.rank() == src else []
    return run_call(group, facts, [input_], lambda _: specs, copies, targets, sources=[src])[0]


def reduce(group: Group, input_: Tensor, dst: int) -> Tensor:
    """The sum over ranks on rank `dst`, zeros elsewhere."""
    rank = group.rank()
    specs: list[Spec] = [(input_.shape, input_.dtype)] * group.size()

    def copies(_: int, outputs: Sequence[Tensor]) -> Copies:
        return [(outputs[rank], input_)]

    facts = facts_of("reduce", input_, (dst,))
    parts = run_call(
        group, facts, [input_], lambda owner: specs if owner == dst else [], copies, targets=[dst]
    )
    return _reduced(parts, "sum") if parts else input_.new_zeros(input_.shape)


def barrier(group: Group, _: torch.device) -> None:
    """Returns when every rank has come here."""
    check(group, facts_of("barrier", (), ()))


def gather(group: Group, input_: Tensor, dst: int, dim: int) -> Tensor | None:
    """As `all_gather`, on rank `dst` only; None elsewhere."""
    rank, length = group.rank(), input_.shape[dim]
    shape = list(input_.shape)
    shape[dim] *= group.size()
    specs: list[Spec] = [(shape, input_.dtype)]

    def copies(_: int, outputs: Sequence[Tensor]) -> Copies:
        return [(outputs[0].narrow(dim, rank * length, length), input_)]

    facts = facts_of("gather", input_, (dst, dim))
    outputs = run_call(
        group, facts, [input_], lambda owner: specs if owner == dst else [], copies, targets=[dst]
    )
    return outputs[0] if outputs else None


def send(group: Group, tensor: Tensor, dst: int) -> None:
    """Sends `tensor` to rank `dst`, which receives at the same time."""
    run_pair(group, "send", tensor.shape, tensor.dtype, dst, tensor)


def recv(
    group: Group, size: Sequence[int], dtype: torch.dtype, src: int, device: torch.device
) -> Tensor:
    """A tensor of `size` from rank `src`."""
    return run_pair(group, "recv", size, dtype, src, None)[0].to(device)


def check(group: Group, facts: Facts) -> None:
    """Compares what the ranks ask for; sends nothing else."""
    run_call(group, facts, [], nothing, nothing, targets=[])
