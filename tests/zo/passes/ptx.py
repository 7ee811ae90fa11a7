"""Run PTX, NVIDIA's assembly, on NumPy arrays: all threads take each instruction together.

It knows what the kernels of the passes are compiled to and stops at any other instruction, so at
one that contracts or flushes. Registers are bits; all threads have to take the same branches.
"""

import ctypes
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

Array = np.ndarray[Any, Any]
_LINE = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.]*)\s*(.*);")
_PART = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")

_TWO: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "shl": np.left_shift,
    "shr": np.right_shift,
}
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}


def _dtype(kind: str) -> str:
    """NumPy's name of a type as PTX names it: of u32, s64, f16, b32 (bits)."""
    return {"b": "u", "s": "i"}.get(kind[0], kind[0]) + str(int(kind[1:]) // 8)


def _read(bits: Array, kind: str) -> Array:
    """The values that registers hold."""
    return bits.astype("u" + _dtype(kind)[1:]).view(_dtype(kind))


def _pattern(values: Array, kind: str) -> Array:
    """The registers that hold values."""
    if kind == "pred":
        return values.astype(np.uint64)
    return values.astype(_dtype(kind)).view("u" + _dtype(kind)[1:]).astype(np.uint64)


class Machine:
    """Threads that run one kernel.

    Args:
        ptx: the kernel.
        arguments: of the kernel, in order.
        blocks: how many blocks of threads are started.
    """

    def __init__(self, ptx: str, arguments: Sequence[Tensor | int], blocks: int) -> None:
        (threads,) = re.findall(r"\.reqntid (\d+)", ptx)
        count = int(threads) * blocks
        self._registers: dict[str, Array] = {
            "%tid.x": np.arange(count, dtype=np.uint64) % int(threads),
            "%ctaid.x": np.arange(count, dtype=np.uint64) // int(threads),
        }
        self._count = count
        # What lies in shared memory, a row a block; its address is that in the row.
        self._shared = np.zeros((blocks, 1 << 16), np.uint8)
        self._buffers = [_bytes_of(x) for x in arguments if isinstance(x, Tensor)]
        self._parameters = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
        body = ptx[ptx.index("{", ptx.index(".reqntid")) :]
        self._lines = [line.split("//")[0].strip() for line in body.splitlines()]

    def run(self) -> None:
        """Take all instructions."""
        labels = {line[:-1]: n for n, line in enumerate(self._lines) if line.endswith(":")}
        number = 0
        with np.errstate(all="ignore"):
            while number < len(self._lines):
                found = _LINE.fullmatch(self._lines[number])
                number += 1
                if found is None or found[3] in ("bar.sync",):
                    continue
                no, guard, name, rest = found.groups()
                active = np.ones(self._count, bool)
                if guard:
                    active = self._registers[guard].astype(bool) ^ bool(no)
                if name == "ret":
                    return
                if name == "bra":
                    assert active.all() or not active.any()
                    number = labels[rest] if active.all() else number
                    continue
                self._take(name.split("."), _PART.findall(rest), active)

    def _take(self, name: list[str], parts: list[str], active: Array) -> None:
        """One instruction, of the active threads."""
        if name[:2] == ["ld", "param"]:
            given = self._parameters[int(parts[1].strip("[]").rpartition("_")[2])]
            self._write(parts[0], np.full(self._count, np.uint64(given % (1 << 64))), active)
        elif name[0] in ("ld", "st", "ldmatrix", "stmatrix"):
            self._move(name, parts, active)
        elif name[0] == "mov":
            self._pack(name[-1], parts, active)
        else:
            kind = {"setp": "pred", "cvt": name[-2]}.get(name[0], name[-1])
            kind = kind[0] + "64" if "wide" in name else kind.replace("s16x2", "b32")
            found = self._value(name, [self._operand(x) for x in parts[1:]])
            self._write(parts[0], _pattern(found, kind), active)

    def _value(self, name: list[str], given: list[Array]) -> Array:
        """What an instruction computes of its operands."""
        kind, what = name[-1], ".".join(name[:-1])
        if kind == "pred":
            return np.asarray(_TWO[what](*given))
        if name[0] == "selp":
            return np.where(given[2].astype(bool), _read(given[0], kind), _read(given[1], kind))
        if name[0] == "prmt":
            return _permuted(*given)
        if kind == "s16x2":  # two integers in one register
            ones = [self._value([*name[:-1], "s16"], [_low(x, 16) for x in given])]
            ones += [self._value([*name[:-1], "s16"], [x >> np.uint64(16) for x in given])]
            low, high = (_pattern(x, "s16") for x in ones)
            return low | high << np.uint64(16)
        a, *rest = (_read(x, kind) for x in given)
        if name[0] == "cvt":
            return _converted(name[1:-2], name[-2], a)
        if name[0] == "setp":
            return np.asarray(_COMPARE[name[1]](a, rest[0]))
        if name[0] in ("neg", "abs"):
            assert kind in ("f32", "s16", "s32", "s64")  # what is not float has no rounding
            return -a if what == "neg" else np.abs(a)
        if what == "bfe":
            return np.asarray((a >> rest[0]) & ((1 << rest[1]) - 1))
        if what in ("mul.wide", "mad.wide"):
            wide = _dtype(kind[0] + "64")
            found = a.astype(wide) * rest[0].astype(wide)
            return found + _read(given[2], kind[0] + "64") if what == "mad.wide" else found
        # What names no rounding is the assembler's to contract, and ftz flushes.
        asked = ["rn"] if kind == "f32" else ["lo"] if name[0] == "mul" else []
        assert name[1:-1] == asked, name
        if name[0] in ("shl", "shr"):
            assert (rest[0] < 8 * a.itemsize).all()
        return np.asarray(_TWO[name[0]](a, rest[0].astype(a.dtype)))

    def _operand(self, text: str) -> Array:
        if text in self._registers:
            return self._registers[text]
        if text == "global_smem":
            return np.zeros(self._count, np.uint64)
        if text.startswith("0f"):
            number = int(text[2:], 16)
        else:
            number = int(text.removesuffix("U"), 0) % (1 << 64)
        return np.full(self._count, np.uint64(number))

    def _write(self, register: str, bits: Array, active: Array) -> None:
        before = self._registers.get(register, np.zeros(self._count, np.uint64))
        self._registers[register] = np.where(active, bits, before)

    def _pack(self, kind: str, parts: list[str], active: Array) -> None:
        """Move a register, or between one and the halves of it in braces."""
        to, of = (re.findall(r"[^\s,{}]+", part) for part in parts)
        width = 64 if kind == "pred" else int(kind[1:])
        bits = np.zeros(self._count, np.uint64)
        for n, text in enumerate(of):
            bits |= _low(self._operand(text), width // len(of)) << np.uint64(n * width // len(of))
        for n, register in enumerate(to):
            part = bits >> np.uint64(n * width // len(to))
            self._write(register, _low(part, width // len(to)), active)

    def _move(self, name: list[str], parts: list[str], active: Array) -> None:
        """Load from memory or store to it."""
        is_store, is_matrix = name[0].startswith("st"), name[0].endswith("matrix")
        place, registers = parts if is_store else parts[::-1]
        base, _, offset = place.strip("[] ").partition("+")
        address = self._operand(base.strip()) + np.uint64(int(offset or 0))
        width, space = int(name[-1][1:]) // 8, name[1]
        if is_matrix:  # of eight by eight 16-bit numbers, a row eight threads, two to a thread
            assert name[1:] == ["sync", "aligned", "m8n8", "x4", "shared", "b16"]
            width, space = 4, "shared"
        for n, register in enumerate(re.findall(r"[^\s,{}]+", registers)):
            there = address + np.uint64(n * width)
            if is_matrix:  # the n-th eight threads of 32 name the rows of the n-th matrix
                me = np.arange(self._count)
                row = me // 32 * 32 + 8 * n + me % 32 // 4
                there = address[row] + (4 * (me % 4)).astype(np.uint64)
            found = np.zeros((self._count, 8), np.uint8)
            if is_store:
                found = self._operand(register).view(np.uint8).reshape(-1, 8)
            for lies, memory, at in self._memories(space, there, active):
                where = at[:, None] + np.arange(width)
                if is_store:
                    memory[where] = found[lies, :width]
                else:
                    found[lies, :width] = memory[where]
            if not is_store:
                self._write(register, found.view(np.uint64).reshape(-1), active)

    def _memories(
        self, space: str, address: Array, active: Array
    ) -> list[tuple[Array, Any, Array]]:
        """Which threads' addresses lie in which memory, and where there."""
        if space == "shared":
            row = self._registers["%ctaid.x"] * np.uint64(self._shared.shape[1])
            at = (address + row)[active].astype(np.int64)
            return [(np.flatnonzero(active), self._shared.reshape(-1), at)]
        found, left = [], active.copy()
        for start, memory in self._buffers:
            lies = left & (address >= start) & (address < start + np.uint64(len(memory)))
            if lies.any():
                at = (address[lies] - start).astype(np.int64)
                found.append((np.flatnonzero(lies), memory, at))
            left &= ~lies
        assert not left.any()  # an address that is nobody's
        return found


def _low(bits: Array, width: int) -> Array:
    """The low bits of registers."""
    return bits & np.uint64((1 << width) - 1)


def _bytes_of(tensor: Tensor) -> tuple[Any, Array]:
    size = tensor.numel() * tensor.element_size()
    raw = (ctypes.c_uint8 * size).from_address(tensor.data_ptr())
    return np.uint64(tensor.data_ptr()), np.frombuffer(raw, np.uint8)


def _converted(how: list[str], kind: str, values: Array) -> Array:
    """Values of another type."""
    if how[:1] == ["rmi"]:
        assert kind == "f32"
        assert ((values == 0) | (np.abs(values) >= 2.0**-126)).all()  # ftz would flush others
        return np.floor(values)
    assert how in ([], ["rn"])
    assert kind[0] == "f" or values.dtype.kind != "f"
    return values.astype(_dtype(kind))


def _permuted(a: Array, b: Array, selector: Array) -> Array:
    """Four of the eight bytes of two registers."""
    both = (a & np.uint64(0xFFFFFFFF)) | (b << np.uint64(32))
    found = np.zeros_like(a)
    for n in range(4):
        which = (selector >> np.uint64(4 * n)) & np.uint64(15)
        assert (which < 8).all()
        found |= ((both >> (which * np.uint64(8))) & np.uint64(255)) << np.uint64(8 * n)
    return found
