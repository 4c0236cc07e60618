"""The machine that runs compiled kernels sees what it is there to see."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_machine import Blocks, Program

# Two warps. %rd2 is the thread's 4 bytes of `data`, %r2 its number's 4 bytes in shared memory.
KERNEL = """
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .u32 kernel_param_1
)
.reqntid 64
{
    .reg .pred %p<9>;
    .reg .b32 %r<9>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b32 %r4, [kernel_param_1];
    mov.u32 %r1, %tid.x;  // a comment; with a semicolon
    mad.wide.u32 %rd2, %r1, 4, %rd1;
    shl.b32 %r2, %r1, 2;
    BODY
    ret;
}
"""


def run(body: str, parameter: int = 0, num_blocks: int = 1, start: int = 0) -> list[int]:
    """The 64 numbers of `data` after the kernel; they begin as 0, 1, .."""
    data = np.arange(64, dtype=np.uint32)
    memory = [(4096, data.view(np.uint8))]
    program = Program(KERNEL.replace("BODY", body))
    values = {"kernel_param_0": 4096 + start, "kernel_param_1": parameter}
    Blocks(program, values, num_blocks, 512, memory, memory).run()
    return data.tolist()


def test_each_thread_loads_and_stores_what_is_its_own():
    body = "ld.global.b32 %r3, [%rd2]; mul.lo.s32 %r3, %r3, %r4; st.global.b32 [%rd2], %r3;"
    assert run(body, 3) == [3 * i for i in range(64)]


def test_a_guard_keeps_threads_from_storing():
    body = "setp.lt.s32 %p1, %r1, %r4; @!%p1 st.global.b32 [%rd2], %r4;"
    assert run(body, 5) == [0, 1, 2, 3, 4] + [5] * 59


def test_blocks_part_at_a_branch():
    body = """
    mov.u32 %r5, %ctaid.x;
    setp.ne.b32 %p1, %r5, 1;
    @%p1 bra $OTHERS;
    st.global.b32 [%rd2], %r4;
$OTHERS:
    """
    assert run(body, 7, num_blocks=3) == [7] * 64
    assert run(body, 7, num_blocks=1) == list(range(64))


@pytest.mark.parametrize("jumps", ["eq", "ne"], ids=["who writes", "who waits"])
def test_blocks_that_wait_let_the_others_go_on(jumps):
    """Block 0 writes a number that the others wait for; one or the other jumps."""
    writes = "st.global.b32 [%rd1 + 0], %r4; bra.uni $END;"
    waits = """
$WAITS:
    ld.volatile.global.b32 %r3, [%rd1 + 0];
    setp.ne.b32 %p2, %r3, %r4;
    @%p2 bra $WAITS;
    bra.uni $END;
    """
    first, second = (waits, writes) if jumps == "eq" else (writes, waits)
    body = f"""
    mov.u32 %r5, %ctaid.x;
    setp.{jumps}.b32 %p1, %r5, 0;
    @%p1 bra $JUMPS;
    {first}
$JUMPS:
    {second}
$END:
    """
    assert run(body, 7, num_blocks=3)[0] == 7


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("add.s32 %r3, %r4, -5;", -2),
        ("shr.s32 %r3, %r4, 1; sub.s32 %r3, %r3, 3;", -2),
        ("sub.s32 %r3, 0, %r4; shr.s32 %r3, %r3, 1;", -2),
        ("sub.s32 %r3, 0, %r4; shr.u32 %r3, %r3, 31;", 1),
        ("mul.wide.s32 %rd3, %r4, -1; shr.u64 %rd3, %rd3, 32; cvt.u32.u64 %r3, %rd3;", -1),
        ("cvt.s64.s32 %rd3, %r4; neg.s64 %rd3, %rd3; cvt.u32.u64 %r3, %rd3;", -3),
        ("bfe.u32 %r3, %r4, 1, 1;", 1),
        ("bfe.s32 %r3, %r4, 1, 1;", -1),
        ("cvt.u64.u32 %rd3, %r4; bfe.s64 %rd3, %rd3, 1, 1; cvt.u32.u64 %r3, %rd3;", -1),
        ("prmt.b32 %r3, %r4, 256, 0x5040U;", 0x0103_0003),
        ("shf.l.wrap.b32 %r3, 0x80000000, %r4, 1;", 7),
        ("div.s32 %r3, 17, %r4; rem.s32 %r5, 17, %r4; mad.lo.s32 %r3, %r3, 10, %r5;", 52),
        ("setp.lt.s32 %p1, %r4, 2; selp.b32 %r3, 8, 9, %p1;", 9),
        ("shl.b32 %r3, %r4, 32;", 0),
        ("min.s32 %r3, %r4, -4;", -4),
        ("xor.b32 %r3, %r4, 1; or.b32 %r3, %r3, 8; and.b32 %r3, %r3, 10; not.b32 %r3, %r3;", -11),
    ],
)
def test_arithmetic_is_that_of_the_instruction_set(operation, expected):
    """Of 3, by hand from the PTX ISA."""
    assert run(f"{operation} st.global.b32 [%rd2], %r3;", 3)[0] == expected % 2**32


def test_shared_memory_that_a_barrier_makes_visible_is_read_in_another_order():
    turned = "xor.b32 %r5, %r2, 252; ld.shared.b32 %r3, [%r5]; st.global.b32 [%rd2], %r3;"
    stored = "ld.global.b32 %r3, [%rd2]; st.shared.b32 [%r2], %r3;"
    assert run(f"{stored} bar.sync 0; {turned}") == list(range(63, -1, -1))
    with pytest.raises(RuntimeError, match="a warp reads what another wrote, without a barrier"):
        run(f"{stored} {turned}")


def test_matrices_are_transposed_on_their_way():
    """One matrix: lane r of the first 8 has the address of row r; lane l gets 2 of row l // 4."""
    stored = "cvt.u16.u32 %rs1, %r1; shl.b32 %r5, %r1, 1; st.shared.b16 [%r5], %rs1; bar.sync 0;"
    rows = "shl.b32 %r6, %r1, 4; and.b32 %r6, %r6, 127;"
    load = "ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r3}, [%r6];"
    body = f".reg .b16 %rs<2>; {stored} {rows} {load} st.global.b32 [%rd2], %r3;"
    matrix = np.arange(64, dtype=np.uint16).reshape(8, 8)
    assert run(body)[:32] == np.ascontiguousarray(matrix.T).view(np.uint32).reshape(-1).tolist()
    back = "stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%r6], {%r3};"
    again = body.replace("st.global", f"{back} bar.sync 0; ld.shared.b32 %r3, [%r2]; st.global")
    assert run(again)[:32] == matrix.view(np.uint32).reshape(-1).tolist()


@pytest.mark.parametrize(
    ("body", "start", "message"),
    [
        ("ld.global.b32 %r3, [%rd2];", 4, r"^4 bytes at 0x1100 are in none of \['0x1000 \+ 256'\]"),
        ("st.global.b32 [%rd2+-4], %r1;", 0, r"^4 bytes at 0xffc are in none of"),
        ("ld.global.b32 %r3, [%rd2];", 2, r"^ld.global.b32 at an address that is no multiple"),
        ("ld.global.v2.b32 {%r3, %r5}, [%rd2];", 0, r"^ld.global.v2.b32 at an address that is no"),
    ],
)
def test_an_access_outside_or_across_is_an_error(body, start, message):
    with pytest.raises(MemoryError, match=message):
        run(body, start=start)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("fma.rn.f32 %r3, %r4, %r4, %r4;", r"fma\.rn\.f32"),
        ("atom.global.gpu.release.exch.b64 %rd3, [%rd1], %rd3;", r"atom\.global\.gpu"),
        ("atom.global.sys.acquire.add.u64 %rd3, [%rd1], %rd3;", r"atom\.global\.sys\.acquire"),
        ("shfl.sync.idx.b32 %r3, %r1, 5, 31, -1;", r"shfl\.sync\.idx"),
        ("setp.lt.s32 %p1, %r1, 5; @%p1 bra $END;\n$END:", "threads of a block differ"),
        ("div.s32 %r3, -1, %r4;", "division"),
    ],
)
def test_what_it_does_not_know_is_an_error(body, message):
    with pytest.raises(NotImplementedError, match=message):
        run(body, 1)


def test_lanes_of_a_warp_trade_numbers():
    body = "shfl.sync.bfly.b32 %r3, %r1, 3, 31, -1; st.global.b32 [%rd2], %r3;"
    assert run(body) == [i ^ 3 for i in range(64)]
    first = "shfl.sync.idx.b32 %r3, %r1, 0, 31, -1; st.global.b32 [%rd2], %r3;"
    assert run(first) == [0] * 32 + [32] * 32


def test_an_exchange_writes_a_number_and_returns_the_one_before():
    words = "mad.wide.u32 %rd3, %r1, 8, %rd1; setp.lt.s32 %p1, %r1, 2; mov.b64 %rd4, 7;"
    swap = "@%p1 atom.global.sys.release.exch.b64 %rd5, [%rd3], %rd4;"
    back = "@%p1 st.global.b64 [%rd3 + 32], %rd5;"
    assert run(f"{words} {swap} {back}")[:12] == [7, 0, 7, 0, 4, 5, 6, 7, 0, 1, 2, 3]


def test_the_number_of_blocks_is_known_to_each():
    body = "mov.u32 %r3, %nctaid.x; st.global.b32 [%rd2], %r3;"
    assert run(body, num_blocks=3) == [3] * 64


def test_blocks_go_around_a_loop_so_often_as_each_wants():
    """Block b adds one b + 1 times to its number; 3 blocks, from 0, 1 and 2."""
    body = """
    mov.u32 %r5, %ctaid.x;
    mad.wide.u32 %rd3, %r5, 4, %rd1;
    setp.eq.b32 %p1, %r1, 0;
    mov.b32 %r6, 0;
$AGAIN:
    ld.volatile.global.b32 %r3, [%rd3];
    add.s32 %r3, %r3, 1;
    @%p1 st.global.b32 [%rd3], %r3;
    add.s32 %r6, %r6, 1;
    setp.le.s32 %p2, %r6, %r5;
    @%p2 bra $AGAIN;
    """
    assert run(body, num_blocks=3)[:4] == [1, 3, 5, 3]


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.rn.f32 %r3, %r4, 0f40000000", 3.5),
        ("sub.rn.f32 %r3, %r4, 0f40000000", -0.5),
        ("mul.rn.f32 %r3, %r4, 0fC0000000", -3.0),
        ("div.rn.f32 %r3, %r4, 0f40400000", 0.5),
        ("max.f32 %r3, %r4, 0f7FC00000", 1.5),
        ("min.f32 %r3, %r4, 0f3F800000", 1.0),
        ("neg.f32 %r3, %r4", -1.5),
    ],
)
def test_floats_are_those_of_float32(instruction, expected):
    """With 1.5 in %r4; 0f begins the bits of a float, and 0f7FC00000 is a NaN."""
    one_and_a_half, result = np.array([1.5, expected], dtype=np.float32).view(np.uint32)
    body = f"{instruction}; st.global.b32 [%rd2], %r3;"
    assert run(body, int(one_and_a_half)) == [result] * 64
