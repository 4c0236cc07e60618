"""The encoded form of an object: what encoder and decoder agree on.

    <doc bytes u32> <number of attachments u32> <their sizes u64 ...> doc [padding attachment] ...

`doc` is one msgpack document; attachments are byte strings and arrays from 64 KiB on, each at a
multiple of 64 bytes so that an array can be used where it was received. A type that msgpack lacks
is an array whose first element is a marker (an extension value without content), so that nothing
nests in byte strings and both ways are linear. No array has `LONG` items or more: longer ones
travel in pieces, and a document that lies about its lengths cannot make the decoder reserve memory.
"""

from __future__ import annotations

import struct

Buffer = bytes | bytearray | memoryview

HEAD = struct.Struct("<II")
SIZE = struct.Struct("<Q")
ALIGNMENT = 64
ATTACHED_FROM = 64 * 1024
LONG = 16384
MAX_DEPTH = 128

# Markers; BIG_INT alone is an extension value with content.
(
    BIG_INT, TUPLE, SET, FROZENSET, LIST, DICT, BYTES, BYTEARRAY, DATETIME, TIMEDELTA,
    TORCH_SIZE, DTYPE, DEVICE, TENSOR, ARRAY, REGISTERED,
) = range(1, 17)  # fmt: skip
IN_PIECES = 64
