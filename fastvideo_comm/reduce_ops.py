"""The reductions by their names."""

from __future__ import annotations

from typing import TypeAlias

import torch.distributed as dist

# c10d's constants are of the inner type, and compare equal to the outer.
ReduceOp: TypeAlias = dist.ReduceOp | dist.ReduceOp.RedOpType

REDUCE_OPS: dict[str, ReduceOp] = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.AVG,
    "product": dist.ReduceOp.PRODUCT,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
    "band": dist.ReduceOp.BAND,
    "bor": dist.ReduceOp.BOR,
    "bxor": dist.ReduceOp.BXOR,
}


def reduce_op_name(op: object) -> str | None:
    """The name of a reduction; "sum" for None, None for anything else.

    Example:
        >>> reduce_op_name(dist.ReduceOp.MAX), reduce_op_name(None), reduce_op_name("max")
        ('max', 'sum', None)
    """
    if op is None:
        return "sum"
    # By identity first: torch 2.11's tracer cannot compare c10d's constants.
    for name, known in REDUCE_OPS.items():
        if op is known:
            return name
    kinds = (dist.ReduceOp, dist.ReduceOp.RedOpType)
    if not isinstance(op, kinds):
        return None
    return next((name for name, known in REDUCE_OPS.items() if op == known), None)
