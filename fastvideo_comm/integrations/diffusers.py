"""diffusers' context parallelism over this library's exchange, where it has a seam.

`TemplatedUnifiedAttention` (Ulysses by ring) calls the autograd Function `SeqAllToAllDim`:
`install()` puts one of this library in its place. `TemplatedUlyssesAttention` writes its copies and
`_all_to_all_single` into its own forward and backward; there is nothing between them to replace
without copying its code, and it stays diffusers'. So do `ulysses_anything` and ring attention.

The log-sum-exp, `[B, S, h, 1]`, goes the same way. Sizes that do not divide are errors.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from .installation import Installation, checked_version, uninstall_from
from .sequence_exchange import Communicators, install_function

KNOWN_VERSIONS = ("0.42.1",)
_MODULE = "diffusers.models.attention_dispatch"


class SeqAllToAllDim:
    """In the place of diffusers' Function: `apply`, with its arguments.

    Example (what diffusers does):
        >>> SeqAllToAllDim(Communicators("diffusers")).apply(group, q, 2, 1)  # doctest: +SKIP
    """

    def __init__(self, communicators: Communicators) -> None:
        """Exchanges through `communicators`."""
        self._communicators = communicators

    def apply(
        self,
        group: ProcessGroup | None,
        input_: Tensor,
        scatter_id: int = 2,
        gather_id: int = 1,
    ) -> Tensor:
        """`[B, s, H, D] -> [B, S, h, D]` for (2, 1), and back for (1, 2); differentiable."""
        return self._communicators.exchange(group, input_, scatter_id, gather_id)


def install(*, allow_unknown_version: bool = False) -> Installation:
    """Makes the installed diffusers use this library's exchange in unified attention.

    Example:
        >>> from fastvideo_comm.integrations import diffusers
        >>> with diffusers.install():  # doctest: +SKIP
        ...     pipeline(prompt)

    Args:
        allow_unknown_version: tries versions that this library was not tested with.

    Returns:
        The installation; a second call returns the first one's.

    Raises:
        IntegrationError: diffusers is not installed, has an unknown version, or lacks the name.
    """
    version = checked_version("diffusers", KNOWN_VERSIONS, allow_unknown=allow_unknown_version)
    return install_function("diffusers", version, _MODULE, SeqAllToAllDim)


def uninstall() -> None:
    """Undoes `install`; does nothing where it was not called."""
    uninstall_from(_MODULE)
