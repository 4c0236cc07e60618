"""A communicator that knows how much it sent and how long that took."""

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from fastvideo_comm import DeviceCommunicatorBase


class MeteredCommunicator(DeviceCommunicatorBase):
    """Counts the bytes that this rank sends and the seconds that it spends, backward included.

    The seconds include its waits for the other ranks.
    """

    seconds = 0.0
    sent_bytes = 0

    def reset(self) -> None:
        """Counts from zero again."""
        self.seconds, self.sent_bytes = 0.0, 0

    def all_to_all_4D(self, input_: Tensor, scatter_dim: int = 2, gather_dim: int = 1) -> Tensor:
        """Sends all but the P-th part that stays on this rank."""
        share = (self.world_size - 1) / self.world_size
        return self._metered(super().all_to_all_4D, share, input_, scatter_dim, gather_dim)

    def all_reduce(self, input_: Tensor, op: ReduceOp | None = ReduceOp.SUM) -> Tensor:
        """Sends, in a ring, P - 1 parts of P to reduce them and P - 1 to hand them round."""
        share = 2 * (self.world_size - 1) / self.world_size
        return self._metered(super().all_reduce, share, input_, op)

    def _metered(
        self, op: Callable[..., Tensor], share: float, input_: Tensor, *arguments: Any
    ) -> Tensor:
        num_bytes = round(share * input_.nbytes)  # the backward exchanges as many
        self._start()
        output = op(input_, *arguments)
        self._stop(num_bytes)
        if output.requires_grad and output is not input_:  # it is where there is only one rank
            output.grad_fn.register_prehook(lambda _: self._start())
            output.grad_fn.register_hook(lambda _, __: self._stop(num_bytes))
        return output

    def _start(self) -> None:
        self._started = self._now()

    def _stop(self, num_bytes: int) -> None:
        self.seconds += self._now() - self._started
        self.sent_bytes += num_bytes

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # kernels run behind; the clock must not
        return perf_counter()
