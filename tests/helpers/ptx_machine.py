"""Runs PTX on the CPU: what Triton compiles for a GPU, instruction by instruction.

All threads of all blocks take each instruction together, as arrays `[blocks, threads]` (or with a
dim of 1, where all have the same). Only the instructions that this package's kernel compiles to are
known; any other is an error. What hardware may let pass is an error, too: an access outside the
given memory or at an address that is no multiple of its bytes, and a read of shared memory that
another warp wrote after the last barrier. What ranks may do with memory that they share says
memory_order.py, where one is given.

Source: PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution
"""

from __future__ import annotations

import functools
import re
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from memory_order import RankMemory
from ptx_arithmetic import OPERATIONS, Array, number

# The address of the first byte, and the bytes.
Memory: TypeAlias = Sequence[tuple[int, Array]]

WARP = 32
# `label:` or `@guard opcode operands;`, and no directive, which begins with a dot.
_STATEMENT = re.compile(
    r"(?<=[;\n])[ \t]*(?:(\$\w+):|(?:@(!?%p\d+)\s+)?([a-z][\w.]*)\s*([^;\n]*);)"
)


class Instruction(NamedTuple):
    """`@guard name.kinds operands;`"""

    guard: str
    name: str
    kinds: list[str]
    operands: list[str]


class Program:
    """A kernel: its parameters (name, bytes), the widths of its registers, its instructions."""

    def __init__(self, ptx: str) -> None:
        header, body = re.sub(r"//.*", "", ptx).split(".reqntid", 1)
        self.num_threads = int(body.split(maxsplit=1)[0])
        self.parameters = [
            (name, int(bits) // 8)
            for bits, name in re.findall(r"\.param \.\w(\d+)[^,)]*?(\w+)\s*[,)]", header)
        ]
        self.widths = {
            prefix: 1 if kind == "pred" else int(kind[1:])
            for kind, prefix in re.findall(r"\.reg \.(\w+)\s+(%[a-z]+)<", body)
        }
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        for label, guard, opcode, operands in _STATEMENT.findall(body):
            if label:
                self.labels[label] = len(self.instructions)
            else:
                name, *kinds = opcode.split(".")
                split = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^\s,]+", operands)
                self.instructions.append(Instruction(guard, name, kinds, split))


class Blocks:
    """Blocks of a grid that stand at one instruction: their registers and their shared memory.

    `loaded` and `stored` are the bytes that went from and to global memory; `sectors` are the
    sectors of 32 bytes that this took, each instruction of each warp by itself.
    """

    def __init__(
        self,
        program: Program,
        parameters: dict[str, int],
        num_blocks: int,
        shared_bytes: int,
        readable: Memory,
        writable: Memory,
        memory: RankMemory | None = None,
    ) -> None:
        self.program = program
        self.readable, self.writable = readable, writable
        self.memory = RankMemory() if memory is None else memory
        self.shape = (num_blocks, program.num_threads)
        self.loaded = self.stored = self.sectors = 0
        self.registers: dict[str, Array] = {
            name: number(value) for name, value in parameters.items()
        }
        self.registers["%ctaid.x"] = np.arange(num_blocks, dtype=np.uint64)[:, None]
        self.registers["%nctaid.x"] = number(num_blocks)
        self.registers["%tid.x"] = np.arange(program.num_threads, dtype=np.uint64)[None, :]
        self.registers["global_smem"] = number(0)
        self.shared = np.zeros((num_blocks, shared_bytes), np.uint8)
        # The warp that wrote a byte of shared memory since the last barrier.
        self.writer = np.full(self.shared.shape, -1)

    def run(self) -> None:
        """From the first instruction to the end.

        Blocks that have parted take turns: one may wait for a rank that waits for another of them.
        """
        turns: deque[tuple[Blocks, int]] = deque([(self, 0)])
        while turns:
            part, position = turns.popleft()
            goes_on = part._run_to_branch(position)
            turns.extend(goes_on)
            if part is not self and (part not in [each for each, _ in goes_on]):
                self.loaded += part.loaded
                self.stored += part.stored
                self.sectors += part.sectors

    def _run_to_branch(self, position: int) -> list[tuple[Blocks, int]]:
        """Runs up to the next branch; which blocks go on where."""
        while (instruction := self.program.instructions[position]).name != "bra":
            if instruction.name == "ret":
                return []
            self._execute(instruction)
            position += 1
        target = self.program.labels[instruction.operands[0]]
        jumps = self._active(instruction.guard)
        if jumps.all() or not jumps.any():
            return [(self, target if jumps.all() else position + 1)]
        if (jumps != jumps[:, :1]).any():
            raise NotImplementedError("a branch on which the threads of a block differ")
        parts = ((jumps[:, 0], target), (~jumps[:, 0], position + 1))
        return [(self._part(blocks), start) for blocks, start in parts]

    def _part(self, blocks: Array) -> Blocks:
        part = object.__new__(Blocks)
        part.__dict__.update(self.__dict__, loaded=0, stored=0, sectors=0)
        part.shape = (int(blocks.sum()), self.shape[1])
        part.registers = {
            name: value[blocks] if len(value) == len(blocks) else value
            for name, value in self.registers.items()
        }
        part.shared, part.writer = self.shared[blocks], self.writer[blocks]
        return part

    def _execute(self, instruction: Instruction) -> None:
        guard, name, kinds, operands = instruction
        if name == "bar":
            self.writer[:] = -1
        elif name in ("ldmatrix", "stmatrix"):
            self._move_matrices(instruction)
        elif name in ("ld", "st") and kinds[0] != "param":
            self._access(instruction)
        elif name == "atom":
            self._exchange(instruction)
        elif name == "shfl":
            self._shuffle(instruction)
        elif name not in OPERATIONS or guard:
            raise NotImplementedError(f"{guard} {name}.{'.'.join(kinds)}")
        else:
            values = [self._read(operand) for operand in operands[1:]]
            self._write(operands[0], OPERATIONS[name](kinds, *values))

    def _shuffle(self, instruction: Instruction) -> None:
        """`shfl.sync` of whole warps: a lane reads the one whose number differs by a mask (`bfly`),
        or all lanes read the first (`idx` 0).
        """
        guard, _, kinds, operands = instruction
        lane = np.arange(self.shape[1])
        if kinds == ["sync", "bfly", "b32"]:
            lane = lane ^ int(operands[2])
        elif kinds == ["sync", "idx", "b32"] and operands[2] == "0":
            lane = lane // WARP * WARP
        else:
            raise NotImplementedError(f"shfl.{'.'.join(kinds)} {operands}")
        if guard or operands[3:] != ["31", "-1"]:
            raise NotImplementedError(f"{guard} shfl.{'.'.join(kinds)} {operands}")
        value = np.broadcast_to(self._read(operands[1]), self.shape)
        self._write(operands[0], value[:, lane])

    def _exchange(self, instruction: Instruction) -> None:
        """`atom.exch`: the threads that take part write to different words."""
        guard, _, kinds, operands = instruction
        if set(kinds) - {"relaxed", "release"} != {"global", "sys", "exch", "b64"}:
            raise NotImplementedError(f"atom.{'.'.join(kinds)}")
        active = self._active(guard)
        at = self._address(operands[1])[active]
        new = np.broadcast_to(self._read(operands[2]), self.shape)[active]
        old = np.zeros(self.shape, dtype=np.uint64)
        before = np.zeros(at.shape, dtype=np.uint64)
        for start, inside, units, index in _places(self.writable, at, 8):
            before[inside] = self.memory.exchange(start, units, index, new[inside], kinds)
        old[active] = before
        self._write(operands[0], old)

    def _active(self, guard: str) -> Array:
        if not guard:
            return np.ones(self.shape, dtype=bool)
        value = np.broadcast_to(self.registers[guard.lstrip("!")] != 0, self.shape)
        return ~value if guard.startswith("!") else value

    def _width(self, register: str) -> int:
        return self.program.widths[_prefix(register)]

    def _read(self, operand: str) -> Array:
        first, *others = _names(operand)  # the first of several is the lowest
        value = self.registers[first] if first in self.registers else _immediate(first)
        shift = self._width(first) if others else 0
        for name in others:
            value = value | self.registers[name] << np.uint64(shift)
            shift += self._width(name)
        return value

    def _write(self, operand: str, value: Array) -> None:
        value = value.astype(np.uint64, copy=False)
        names = _names(operand)
        for name in names:  # "_" is for what is not wanted, and as wide as the others
            width = self._width(name if name != "_" else next(n for n in names if n != "_"))
            self.registers[name] = value & np.uint64(2**width - 1) if width < 64 else value
            if len(names) > 1:
                value = value >> np.uint64(width)

    def _address(self, operand: str) -> Array:
        base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
        address = self.registers[base] + number(int(offset or "0", 0))
        return np.broadcast_to(address, self.shape)

    def _access(self, instruction: Instruction) -> None:
        """`ld` and `st`, a register of a vector at a time."""
        guard, name, kinds, operands = instruction
        registers, address = operands if name == "ld" else reversed(operands)
        itemsize = int(kinds[-1][1:]) // 8
        active = self._active(guard)
        first = self._address(address)[active]
        if (first % np.uint64(itemsize * len(_names(registers)))).any():
            raise MemoryError(f"{name}.{'.'.join(kinds)} at an address that is no multiple of it")
        if "shared" not in kinds:
            block, thread = np.nonzero(active)
            warp = (block * self.shape[1] + thread) // WARP
            sector = (first >> np.uint64(5)).astype(np.int64)  # 16 aligned bytes lie in one
            sectors = np.sort(sector + (warp << 43))  # addresses have 48 bits
            self.sectors += np.count_nonzero(np.diff(sectors, prepend=-1))
        for i, register in enumerate(_names(registers)):
            at = first + np.uint64(i * itemsize)
            if name == "ld":
                before = self.registers.get(register, number(0))
                value = np.broadcast_to(before, self.shape).copy()
                value[active] = self._load(kinds, at, itemsize, active)
                self.registers[register] = value
            else:
                value = np.broadcast_to(self.registers[register], self.shape)[active]
                self._store(kinds, at, itemsize, active, value)

    def _load(self, kinds: list[str], at: Array, itemsize: int, active: Array) -> Array:
        if "shared" in kinds:
            return self._load_shared(np.nonzero(active), at, itemsize)
        self.loaded += at.size * itemsize
        value = np.zeros(at.shape, dtype=np.uint64)
        for start, inside, units, index in _places(self.readable, at, itemsize):
            value[inside] = self.memory.load(start, units, index, kinds)
        return value

    def _store(
        self, kinds: list[str], at: Array, itemsize: int, active: Array, value: Array
    ) -> None:
        if "shared" in kinds:
            self._store_shared(np.nonzero(active), at, itemsize, value)
            return
        self.stored += at.size * itemsize
        for start, inside, units, index in _places(self.writable, at, itemsize):
            self.memory.store(start, units, index, value[inside])

    def _store_shared(
        self, where: tuple[Array, ...], at: Array, itemsize: int, value: Array
    ) -> None:
        block, thread = where
        self.shared.view(f"u{itemsize}")[block, at // np.uint64(itemsize)] = value
        for byte in range(itemsize):
            self.writer[block, at + np.uint64(byte)] = thread // WARP

    def _load_shared(self, where: tuple[Array, ...], at: Array, itemsize: int) -> Array:
        block, thread = where
        for byte in range(itemsize):
            writer = self.writer[block, at + np.uint64(byte)]
            if ((writer != -1) & (writer != thread // WARP)).any():
                raise RuntimeError("a warp reads what another wrote, without a barrier in between")
        return self.shared.view(f"u{itemsize}")[block, at // np.uint64(itemsize)].astype(np.uint64)

    def _move_matrices(self, instruction: Instruction) -> None:
        """8x8 matrices of 16 bits; the address of row r of matrix i is lane `8*i + r`'s."""
        _, name, kinds, operands = instruction
        registers, address_of = operands if name == "ldmatrix" else reversed(operands)
        block, thread = where = np.indices(self.shape)
        lane = thread % WARP
        address = self._address(address_of)
        for i, register in enumerate(_names(registers)):
            value = np.zeros(self.shape, dtype=np.uint64)
            for half in range(2):  # a lane holds two neighbours in a row
                row, column = lane // 4, 2 * (lane % 4) + half
                if "trans" in kinds:
                    row, column = column, row
                at = address[block, thread - lane + 8 * i + row] + 2 * column.astype(np.uint64)
                if name == "ldmatrix":
                    value |= self._load_shared(where, at, 2) << np.uint64(16 * half)
                else:
                    self._store_shared(
                        where, at, 2, self.registers[register] >> np.uint64(16 * half)
                    )
            if name == "ldmatrix":
                self.registers[register] = value


@functools.cache
def _immediate(text: str) -> Array:
    """A number; one that begins with 0f is the bits of a float."""
    return number(int(text[2:], 16) if text.startswith("0f") else int(text.rstrip("U"), 0))


@functools.cache
def _names(operand: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in operand.strip("{}[] ").split(","))


@functools.cache
def _prefix(register: str) -> str:
    return register.rstrip("0123456789")


def _places(memory: Memory, at: Array, itemsize: int) -> list[tuple[int, Array, Array, Array]]:
    """For each range of `memory` that is accessed: its start, by which accesses, its units, and
    which of them.
    """
    places = []
    outside = np.ones(at.shape, dtype=bool)
    for start, data in memory:
        if start % 16:
            raise NotImplementedError(f"memory that begins at {start:#x}, no multiple of 16")
        inside = (at >= start) & (at + np.uint64(itemsize) <= start + data.size) & outside
        if inside.any():
            outside &= ~inside
            index = (at[inside] - np.uint64(start)) // np.uint64(itemsize)
            units = data[: data.size // itemsize * itemsize].view(f"u{itemsize}")
            places.append((start, inside, units, index))
    if outside.any():
        ranges = [f"{start:#x} + {data.size}" for start, data in memory]
        raise MemoryError(f"{itemsize} bytes at {at[outside][0]:#x} are in none of {ranges}")
    return places
