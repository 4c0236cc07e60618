"""Pickle as a codec, for groups that ask for it: whoever can make a message can run code.

`StatelessProcessGroup` refuses it without a secret, and decodes only what carried a valid seal.
"""

from __future__ import annotations

import pickle
from typing import Any

from fastvideo_comm.errors import DecodeError


class PickleCodec:
    """Encodes whatever pickle can; see the module's warning.

    >>> codec = PickleCodec()
    >>> codec.decode(b"".join(codec.encode_parts(range(3))))
    range(0, 3)
    """

    name = "pickle"

    def encode_parts(self, obj: object) -> list[bytes | memoryview]:
        """Return the pickled object."""
        return [pickle.dumps(obj, protocol=pickle.HIGHEST_PROTOCOL)]

    def decode(self, data: bytes | bytearray | memoryview) -> Any:
        """Return the unpickled object; DecodeError where unpickling fails in any way."""
        try:
            return pickle.loads(data)
        except Exception as error:
            raise DecodeError(f"the message must hold a pickle: {error}") from error
