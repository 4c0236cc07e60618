"""yunchang's attention layers over this library's exchange.

The seam is the autograd Function `SeqAllToAll4D`, which `UlyssesAttention`, `LongContextAttention`
and their variants call: `install()` puts one of this library in its place. `SeqAllToAll5D` (packed
q, k, v) and `AsyncLongContextAttention`, which calls `all_to_all_single` itself, stay yunchang's.

At world size 1 the input is returned as it is. Sizes that P does not divide are errors.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .installation import Installation, checked_version, uninstall_from
from .sequence_exchange import Communicators, check_shared, install_functions

KNOWN_VERSIONS = ("0.6.4",)
_MODULE = "yunchang.comm.all_to_all"
SERVED = ("UlyssesAttention", "LongContextAttention")


class SeqAllToAll4D:
    """Replaces yunchang's Function of this name: its `apply` takes the same arguments.

    Example (what yunchang's layers do):
        >>> SeqAllToAll4D(Communicators("yunchang")).apply(group, q, 2, 1)  # doctest: +SKIP
    """

    def __init__(self, communicators: Communicators) -> None:
        """Exchanges through `communicators`."""
        self._communicators = communicators

    def apply(
        self,
        group: ProcessGroup | None,
        input_: Tensor,
        scatter_idx: int,
        gather_idx: int,
        use_sync: bool = False,
    ) -> Tensor:
        """`[B, s, H, D] -> [B, S, h, D]` for (2, 1), and back for (1, 2); differentiable."""
        communicator = self._communicators.of(group, input_)
        check_shared(communicator, input_, scatter_idx, "yunchang shares heads evenly: pad them")
        output = communicator.all_to_all_4D(input_, scatter_idx, gather_idx)
        if use_sync and output.device.type != "cpu":
            torch.accelerator.synchronize()
        return output


def install(*, allow_unknown_version: bool = False) -> Installation:
    """Makes the installed yunchang use this library's exchange.

    Example:
        >>> from fastvideo_comm.integrations import yunchang
        >>> with yunchang.install():  # doctest: +SKIP
        ...     output = UlyssesAttention(group)(q, k, v)

    Args:
        allow_unknown_version: tries versions that this library was not tested with.

    Returns:
        The installation; a second call returns the first one's.

    Raises:
        IntegrationError: yunchang is not installed, has an unknown version, or lacks the name.
    """
    version = checked_version("yunchang", KNOWN_VERSIONS, allow_unknown=allow_unknown_version)
    return install_functions("yunchang", version, _MODULE, (SeqAllToAll4D,), SERVED)


def uninstall() -> None:
    """Undoes `install`; does nothing where it was not called."""
    uninstall_from(_MODULE)
