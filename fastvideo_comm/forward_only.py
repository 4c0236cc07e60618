"""The public ops without a gradient: `gather`, `send` and `recv`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .collective import messages as collectives
from .collective import validation
from .membership import Membership


class ForwardOnly(Membership):
    """What a communicator can do with tensors that no backward comes back to."""

    def gather(self, input_: Tensor, dst: int = 0, dim: int = -1) -> Tensor | None:
        """As `all_gather`, but the result exists on rank `dst` alone. Carries no gradient.

        Args:
            input_: `[A, c, ..]`, the same shape on every rank; any dtype and strides.
            dst: the rank in the group that receives.
            dim: the dim along which the tensors are joined.

        Returns:
            `[A, P*c, ..]` on `dst`, contiguous and without `requires_grad`; None elsewhere.

        Raises:
            ValueError: a 0-d tensor, `dim` or `dst` out of range, another device.
            TypeError: not a dense tensor.
        """
        with self._named("gather"):
            channel = self._open()
            dim = validation.all_gather(input_, dim).dim
            validation.check_device("input_", input_, self.device)
            validation.peer("dst", dst, self.rank, self.world_size, others_only=False)
            if self.world_size == 1:
                return input_.detach()
            self._diagnosis.before("gather", input_, (dst, dim))
            self._count("gather", input_)
            with torch.no_grad():
                return collectives.gather(channel, input_, dst, dim)

    def send(self, tensor: Tensor, dst: int | None = None) -> None:
        """Sends a tensor to another rank, which calls `recv`. Carries no gradient.

        Args:
            tensor: any shape, dtype and strides.
            dst: the rank in the group that receives; the next one if None.

        Raises:
            ValueError: `dst` is out of range or this rank itself, or another device.
            TypeError: not a dense tensor.
        """
        with self._named("send"):
            channel = self._open()
            dst = (self.rank + 1) % self.world_size if dst is None else dst
            validation.check_tensor("tensor", tensor)
            validation.check_device("tensor", tensor, self.device)
            validation.peer("dst", dst, self.rank, self.world_size, others_only=True)
            self._diagnosis.before_pair("send", tensor.shape, tensor.dtype, dst)
            self._count("send", tensor)
            with torch.no_grad():
                collectives.send(channel, tensor, dst)

    def recv(
        self, size: torch.Size | Sequence[int], dtype: torch.dtype, src: int | None = None
    ) -> Tensor:
        """Receives a tensor that another rank sends. Carries no gradient.

        Args:
            size: the shape that was sent.
            dtype: the dtype that was sent.
            src: the rank in the group that sends; the previous one if None.

        Returns:
            A new contiguous tensor on `device`.

        Raises:
            ValueError: `src` is out of range or this rank itself.
            TypeError: `dtype` is not a dtype.
        """
        with self._named("recv"):
            channel = self._open()
            src = (self.rank - 1) % self.world_size if src is None else src
            validation.peer("src", src, self.rank, self.world_size, others_only=True)
            if not isinstance(dtype, torch.dtype):
                raise TypeError(f"dtype must be a torch.dtype, got {type(dtype).__name__}")
            self._diagnosis.before_pair("recv", size, dtype, src)
            received = collectives.recv(channel, size, dtype, src, self.device)
            self._count("recv", received)
            return received
