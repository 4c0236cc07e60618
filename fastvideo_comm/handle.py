"""`AsyncHandle`: what an asynchronous call returns."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class AsyncHandle(Generic[T]):
    """An exchange in flight; `wait()` gives its result and is the autograd node.

    Between the call and `wait()` the caller computes while the data travels; the backward does the
    same in the other direction. Several handles may be in flight, and are waited for in any order.
    The order must be the same on all ranks where gradients flow, because it is the order of the
    backward, and where the ranks use messages. A handle that is dropped without `wait()` is
    reported by a `RuntimeWarning`: its exchange went on, and its result is lost.

    Example (inside a rank, of 2):
        >>> x = torch.randn(1, 5, 6, 8)
        >>> handle = communicator.all_to_all_4D(x, async_op=True)
        >>> gate = x.sigmoid()  # x travels meanwhile
        >>> handle.wait().shape
        torch.Size([1, 10, 3, 8])
    """

    def __init__(
        self,
        op: str,
        place: str,
        finish: Callable[[], T] | None,
        is_completed: Callable[[], bool],
    ) -> None:
        """Only a communicator makes handles; it says which op this is and on which rank."""
        self._op = op
        self._place = place
        self._finish = finish
        self._is_completed = is_completed
        self._result: list[T] = []

    @staticmethod
    def done(result: T) -> AsyncHandle[T]:
        """A handle of a result that exists already."""
        handle: AsyncHandle[T] = AsyncHandle("", "", None, lambda: True)
        handle._result.append(result)
        return handle

    def wait(self) -> T:
        """Waits and returns the result; later calls return the same result.

        Raises:
            CollectiveError: the backend failed, or its timeout ran out.
            RuntimeError: it failed before; or the exchange was given tensors with tangents, and
                this call is outside their `torch.func.jvp` or `forward_ad.dual_level`.
        """
        if self._finish is not None:
            finish, self._finish = self._finish, None
            self._result.append(finish())
        if not self._result:
            raise RuntimeError(f"{self._op} on {self._place} failed when it was waited for before")
        return self._result[0]

    def is_completed(self) -> bool:
        """Whether `wait()` would return at once."""
        return self._finish is None or self._is_completed()

    def __del__(self) -> None:
        """Reports a result that nobody waited for."""
        if getattr(self, "_finish", None) is not None:
            warnings.warn(
                f"{self._op}(async_op=True) was dropped without wait() on {self._place}: "
                "its result is lost",
                RuntimeWarning,
                stacklevel=2,
            )
