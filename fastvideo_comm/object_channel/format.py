"""The encoded form of an object: what encoder and decoder agree on.

    <doc bytes u32> <number of attachments u32> <their sizes u64 ...> doc [padding attachment] ...

`doc` is one msgpack document of plain values and arrays; attachments are byte strings and arrays
from 64 KiB on, each at a multiple of 64 bytes so that an array can be used where it was received.
A type that msgpack lacks becomes an array whose first element is a marker (an extension value
without content). So nothing is nested in byte strings, and encoding and decoding take linear time.
A dict becomes such an array too: msgpack would build a map before anybody could look at its keys.

Two rules keep a short message from costing much:

- No array has more than `LONG` items; longer ones travel in pieces. msgpack reserves memory for
  the announced length of each array that is still open, so a false length costs 1 MiB at most.
- Everything that is built has a cost in bytes, below, and a message must be as long as the sum of
  its costs less `FREE_COST`. The encoder pads a message that is shorter, which happens to objects
  of many thousand items or containers. The costs are chosen so that what is built takes at most 20
  times the memory of the message, and at most 30 ns for each of its bytes.
"""

from __future__ import annotations

import struct

Buffer = bytes | bytearray | memoryview

HEAD = struct.Struct("<II")
SIZE = struct.Struct("<Q")
ALIGNMENT = 64
ATTACHED_FROM = 64 * 1024
LONG = 128
MAX_DEPTH = 128

# Markers; BIG_INT alone is an extension value with content.
(
    BIG_INT, TUPLE, SET, FROZENSET, LIST, DICT, BYTES, BYTEARRAY, DATETIME, TIMEDELTA,
    TORCH_SIZE, DTYPE, DEVICE, TENSOR, ARRAY, REGISTERED, TEXT, PADDED,
) = range(1, 19)  # fmt: skip
IN_PIECES = 64
CONTAINERS = frozenset({TUPLE, SET, FROZENSET, LIST, DICT, TORCH_SIZE, TEXT})
NUM_CODES = 2 * IN_PIECES

# Costs in bytes. An array costs ARRAY_COST and ITEM_COST for each item, the marker included. A
# marker costs MARKER_COSTS[its code] more, and sets and dicts add a cost for each key.
FREE_COST = 64 * 1024
ARRAY_COST = 64
ITEM_COST = 8
KEY_COST = 16
# Keys whose hash is not keyed, so that a sender can make them collide: see `hashing`.
UNKEYED_KEY_COST = 64
MARKER_COSTS = [32] * NUM_CODES
for _code in (SET, FROZENSET, DICT, TORCH_SIZE):
    MARKER_COSTS[_code] = 64
for _code in (DATETIME, TIMEDELTA, DTYPE, DEVICE, REGISTERED):
    MARKER_COSTS[_code] = 128
for _code in (TENSOR, ARRAY):
    MARKER_COSTS[_code] = 1024
