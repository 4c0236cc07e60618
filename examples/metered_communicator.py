"""A communicator that knows how much it sent and how long that took."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.distributed import ReduceOp

from fastvideo_comm import DeviceCommunicatorBase
from fastvideo_comm.handle import AsyncHandle

T = TypeVar("T")


class MeteredCommunicator(DeviceCommunicatorBase):
    """Counts the bytes that this rank sends and the seconds that it spends, backward included.

    The seconds include its waits for the other ranks; of an asynchronous exchange, its start and
    its `wait()`, but not what is between. What runs inside a compiled graph is not counted.
    """

    seconds = 0.0
    sent_bytes = 0

    def reset(self) -> None:
        """Counts from zero again."""
        self.seconds, self.sent_bytes = 0.0, 0

    def all_to_all_4D(
        self,
        input_: Tensor | Sequence[Tensor],
        scatter_dim: int = 2,
        gather_dim: int = 1,
        *,
        scatter_sizes: Any = None,
        gather_sizes: Any = None,
        async_op: bool = False,
        wire_dtype: Any = None,
        grad_wire_dtype: Any = None,
        **rounding: Any,
    ) -> Any:
        """Sends all but the P-th part that stays on this rank; shared evenly, as far as counted."""
        exchange = partial(
            super().all_to_all_4D,
            input_,
            scatter_dim,
            gather_dim,
            scatter_sizes=scatter_sizes,
            gather_sizes=gather_sizes,
            async_op=async_op,
            wire_dtype=wire_dtype,
            grad_wire_dtype=grad_wire_dtype,
            **rounding,
        )
        if torch.compiler.is_compiling():
            return exchange()
        tensors = (input_,) if isinstance(input_, Tensor) else input_
        share = (self.world_size - 1) / self.world_size
        num_bytes, num_grad_bytes = (
            round(share * sum(map(wire_bytes, tensors, of_each(dtypes, len(tensors)))))
            for dtypes in (wire_dtype, grad_wire_dtype)
        )
        output = self._timed(exchange, num_bytes)
        if async_op:
            return MeteredHandle(self, output, num_grad_bytes)
        self._time_backward(output, num_grad_bytes)
        return output

    def all_reduce(self, input_: Tensor, op: ReduceOp | None = ReduceOp.SUM) -> Tensor:
        """Sends, in a ring, P - 1 parts of P to reduce them and P - 1 to hand them round."""
        reduce = super().all_reduce
        num_bytes = round(2 * (self.world_size - 1) / self.world_size * input_.nbytes)
        output = self._timed(lambda: reduce(input_, op), num_bytes)
        self._time_backward(output, num_bytes)
        return output

    def reduce_gradients(
        self, parameters: Tensor | Iterable[Tensor], *, average: bool = False
    ) -> None:
        """Sends as `all_reduce` does, of all gradients together."""
        given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        num_bytes = sum(each.grad.nbytes for each in given if each.grad is not None)
        reduce = super().reduce_gradients
        share = 2 * (self.world_size - 1) / self.world_size
        self._timed(lambda: reduce(given, average=average), round(share * num_bytes))

    def _timed(self, call: Callable[[], T], num_bytes: int = 0) -> T:
        self._start()
        output = call()
        self._stop(num_bytes)
        return output

    def _time_backward(self, output: Tensor | Sequence[Tensor], num_bytes: int) -> Node | None:
        """The backward exchanges as many bytes. Returns its node in the graph, if it has one."""
        first = output if isinstance(output, Tensor) else output[0]
        if self.world_size == 1 or not first.requires_grad:
            return None
        self._time_node(first.grad_fn, num_bytes)
        return first.grad_fn

    def _time_node(self, node: Node, num_bytes: int = 0) -> None:
        node.register_prehook(lambda _: self._start())
        node.register_hook(lambda _, __: self._stop(num_bytes))

    def _start(self) -> None:
        self._started = self._now()

    def _stop(self, num_bytes: int) -> None:
        self.seconds += self._now() - self._started
        self.sent_bytes += num_bytes

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # kernels run behind; the clock must not
        return perf_counter()


class MeteredHandle:
    """An exchange in flight, of which the waiting is timed, there and in the backward."""

    def __init__(
        self, communicator: MeteredCommunicator, handle: AsyncHandle[Any], num_bytes: int
    ) -> None:
        """`num_bytes` are sent in the backward."""
        self._communicator = communicator
        self._handle = handle
        self._num_bytes = num_bytes

    def wait(self) -> Any:
        """As `AsyncHandle.wait`; called once."""
        output = self._communicator._timed(self._handle.wait)
        # In the backward this node sends the gradients, and the one before it waits for them.
        node = self._communicator._time_backward(output, self._num_bytes)
        if node is not None:
            self._communicator._time_node(node.next_functions[0][0])
        return output


def of_each(dtypes: Any, num_tensors: int) -> Sequence[Any]:
    return dtypes if isinstance(dtypes, Sequence) else [dtypes] * num_tensors


def wire_bytes(tensor: Tensor, dtype: torch.dtype | None) -> int:
    """Bytes of all elements; as fp8, one for each and four for each row of the last dim."""
    if dtype is None:
        return tensor.nbytes
    return tensor.numel() + 4 * (tensor.numel() // tensor.shape[-1])
