"""What is hostile is a DecodeError: it runs nothing, and takes no memory."""

import pickle
import random
import subprocess
import sys
from datetime import datetime, timedelta, timezone

import msgpack
import numpy as np
import pytest
import torch
from object_classes import Access, Color, Point, new_codec

from fastvideo_comm.errors import DecodeError
from fastvideo_comm.object_channel.format import HEAD, LONG


class Payload:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


HOSTILE_PICKLES = [
    pickle.dumps(Payload((exec, ("import sys; sys.unpickled = True",))), protocol=protocol)
    for protocol in range(6)
] + [
    b"cos\nsystem\n(S'exit 1'\ntR.", b"cbuiltins\neval\n(S'import sys; sys.unpickled = True'\ntR.",
    b"cbuiltins\nexec\n(Vimport sys; sys.unpickled = True\ntR.", b"(S'x'\nios\nsystem\n.",
    b"c__builtin__\neval\n(S'1'\ntR.", b"cposix\nsystem\n(S'exit 1'\ntR.",
    b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x06exit 1\x85R.",
    b"\x80\x02cos\nsystem\nX\x06\x00\x00\x00exit 1\x85R.", b"\x80\x05N.", b"I01\n.", b"N.",
    b"cnumpy\nload\n(S'/etc/passwd'\ntR.", b"ctorch\nload\n(S'/etc/passwd'\ntR.",
    b"cimportlib\nimport_module\n(S'this'\ntR.", b"csubprocess\nPopen\n(S'true'\ntR.",
    b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xff.", b"\x80\x04B\xff\xff\xff\x7f", b"(lp0\n.",
    b"\x80\x02}q\x00.", b"\x80\x03]q\x00.",
]  # fmt: skip


def test_there_are_26_hostile_pickles_and_they_do_run_when_unpickled():
    assert len(HOSTILE_PICKLES) == 26
    pickle.loads(HOSTILE_PICKLES[0])
    assert sys.unpickled
    del sys.unpickled


@pytest.mark.parametrize("data", HOSTILE_PICKLES)
def test_a_pickle_is_a_decode_error_and_runs_nothing(data):
    for message in (data, HEAD.pack(len(data), 0) + data, HEAD.pack(0, 0) + data):
        with pytest.raises(DecodeError, match="the message must hold an encoded object"):
            new_codec().decode(message)
    assert not hasattr(sys, "unpickled")


SAMPLES = [
    {"a": [1, 2.5, None, True, "text"], (1, 2): {3, 4}, "b": b"bytes", "c": 2**100},
    [torch.arange(6.0).reshape(2, 3), np.arange(4), torch.bfloat16, torch.Size([1, 2])],
    (
        datetime(2026, 1, 1, tzinfo=timezone.utc),
        timedelta(5),
        Point(3, ("x",)),
        Color.RED,
        Access.READ,
    ),
    [frozenset({1}), bytearray(b"q"), torch.device("cpu"), [[]] * 5, {"k": b"y" * 70_000}],
]


def test_mutated_documents_give_documented_errors_or_plain_objects():
    random_ = random.Random(0)
    codec = new_codec()
    encoded = [codec.encode(sample) for sample in SAMPLES]
    refused = 0
    for number in range(1000):
        data = bytearray(encoded[number % len(encoded)])
        for _ in range(random_.randint(1, 4)):
            place = random_.randrange(min(len(data), 300))
            kind = random_.randrange(3)
            if kind == 0:
                data[place] = random_.randrange(256)
            elif kind == 1:
                del data[place : place + random_.randint(1, 5)]
            else:
                data[place:place] = random_.randbytes(random_.randint(1, 5))
        try:
            codec.decode(data)
        except DecodeError:
            refused += 1
    assert 300 < refused <= 1000


def doc(data):
    return HEAD.pack(len(data), 0) + data


def ext(code, *rest):
    return msgpack.packb([msgpack.ExtType(code, b""), *rest])


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0" * 7, HEAD.pack(5, 0), HEAD.pack(1, 2**32 - 1) + b"\xc0", doc(b""),
        doc(b"\xc0\xc0"), doc(b"\x92\xc0"), doc(b"\xdd\xff\xff\xff\xff"),
        doc(b"\xdf\xff\xff\xff\xff"),
        doc(b"\xc6\xff\xff\xff\xff"), doc(b"\xdb\xff\xff\xff\xff"),
        doc(b"\xc9\xff\xff\xff\xff\x01"),
        doc(b"\x91" * 5000), doc(msgpack.packb([0] * LONG) + b"\0"), doc(b"\xc1"),
        doc(msgpack.packb(msgpack.ExtType(2, b""))),  # a marker alone
        doc(msgpack.packb([1, msgpack.ExtType(2, b"")])),  # a marker inside
        doc(msgpack.packb({"k": msgpack.ExtType(3, b"")})),
        doc(msgpack.packb(msgpack.ExtType(99, b""))),
        doc(ext(3, [1])), doc(ext(6, 1)), doc(ext(7, 0)), doc(ext(7, -1)),
        doc(ext(9, [1], 0, None)),
        doc(ext(10, 1, 2)), doc(ext(11, "x")), doc(ext(12, "float33")), doc(ext(12, "nn")),
        doc(ext(13, "no such device")), doc(ext(14, "float32", [2], b"1234")),
        doc(ext(14, "float32", [-1], b"1234")), doc(ext(14, "bool", [1], b"\x02")),
        doc(ext(14, "qint8", [1], b"1")), doc(ext(14, "float32", [2**40, 2**40], b"")),
        doc(ext(15, "|O", [1], b"12345678")), doc(ext(15, "<i4,<i4", [1], b"12345678")),
        doc(ext(15, "<U1", [1], b"\xff\xff\xff\xff")), doc(ext(15, "|b1", [1], b"\x07")),
        doc(ext(15, "<M8[bogus]", [1], b"12345678")), doc(ext(16, "os.system", "true")),
        doc(ext(16, 5, 5)), doc(ext(66, 1)), HEAD.pack(1, 1) + (5).to_bytes(8, "little") + b"\xc0",
        HEAD.pack(1, 1) + (0).to_bytes(8, "little") + b"\xc0" + bytes(47),  # never used
        HEAD.pack(1, 1) + (2**63).to_bytes(8, "little") + b"\xc0" + bytes(47),
    ],
    ids=range(45),
)  # fmt: skip
def test_a_malformed_document_is_a_decode_error(data):
    with pytest.raises(DecodeError, match="the message must hold an encoded object"):
        new_codec().decode(data)


LYING = """
import sys
import tracemalloc
from fastvideo_comm.object_channel.codec import ObjectCodec
from fastvideo_comm.object_channel.format import HEAD, LONG

def peaks():
    lines = open("/proc/self/status").read().splitlines()
    return [int(line.split()[1]) for line in lines if line.startswith(("VmPeak", "VmHWM"))]

def array(length):
    return b"\\xdd" + length.to_bytes(4, "big")

codec = ObjectCodec()
before = peaks()
# msgpack itself refuses what is longer than the document, 1.25 MiB here, and nests 1024 deep: a
# length between ours and that is the one that only our limit stops before anything is reserved.
limits = {
    array(2**32 - 1): 1 << 20,
    array(1 << 20): 1 << 20,
    array(LONG + 1): 1 << 20,
    array(LONG - 1): 160 << 20,
    b"\\xdf\\xff\\xff\\xff\\xff": 1 << 20,
}
for head, limit in limits.items():
    doc = head * (1 << 18)
    data = HEAD.pack(len(doc), 0) + doc
    tracemalloc.start()
    try:
        codec.decode(data)
    except ValueError:
        pass
    else:
        sys.exit(f"{head} accepted")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    if peak > limit:
        sys.exit(f"{head} reserved {peak} bytes")
address_space, memory = (after - start for after, start in zip(peaks(), before))
sys.exit(0 if address_space < 600_000 and memory < 200_000 else f"{address_space} {memory} KiB")
"""


def test_lengths_that_lie_reserve_no_memory():
    result = subprocess.run(
        [sys.executable, "-c", LYING], capture_output=True, text=True, timeout=90
    )
    assert (result.returncode, result.stderr) == (0, "")
