"""`python -m fastvideo_comm.tools.kernel_check` compares the Triton kernel with its reference.

The check is a process of its own, because TRITON_INTERPRET must be set before triton is imported.
"""

from __future__ import annotations

import torch

from ..collective.layout import message_view
from ..kernels import strided_copy_


def check(device: torch.device) -> None:
    """Copies a few layouts with both implementations.

    Example (with a GPU, or under TRITON_INTERPRET=1):
        >>> check(torch.device("cpu"))  # doctest: +SKIP

    Raises:
        RuntimeError: the two copies differ.
    """
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(1, 5, 6, 8).to(device, dtype)
        for name, source in (
            ("pack", message_view(x, 2, 2, 1)),
            ("transpose", x.transpose(1, 3)),
            ("narrow", x[:, 1:, ::2]),
        ):
            fresh = source.new_full(source.shape, float("nan"))
            got = strided_copy_(fresh, source, impl="triton")
            expected = strided_copy_(torch.empty_like(fresh), source, impl="torch")
            if not torch.equal(got, expected):
                raise RuntimeError(f"{name} of {dtype} must equal torch's copy, got other values")


if __name__ == "__main__":
    check(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
