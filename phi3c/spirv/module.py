"""A SPIR-V module under construction: ids, types, constants, and the sections in their order."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from functools import cache

from .opcodes import (
    GL_COMPUTE,
    GLSL450_MEMORY,
    LOCAL_SIZE,
    LOGICAL_ADDRESSING,
    MAGIC,
    VERSION_1_3,
    Capability,
    Op,
    Storage,
)

_DTYPE = re.compile(r"(bool(?!\d)|float(?=\d\d)|u?int(?=\d))(8|16|32|64|)(?:x(\d+))?")
_WIDTH = {("float", 64): Capability.FLOAT64, ("int", 64): Capability.INT64}


class EmitError(Exception):
    """A node that has no SPIR-V here; kernel.py says in which kernel."""


@dataclass(frozen=True)
class DType:
    """kind: float, int, uint or bool; lanes: 1 for a scalar."""

    kind: str
    bits: int
    lanes: int

    @staticmethod
    @cache
    def parse(name: str) -> DType:
        """TVM's name of a dtype. Raises EmitError."""
        if not (match := _DTYPE.fullmatch(name)):
            raise EmitError(f"the dtype {name}")
        kind, bits, lanes = match.groups()
        return DType(kind, 1 if kind == "bool" else int(bits), int(lanes or 1))

    @property
    def element(self) -> DType:
        return DType(self.kind, self.bits, 1)

    @property
    def carried(self) -> DType:
        """What values of the dtype are outside storage buffers: those of 8 and 16 bits have 32, so
        that no kernel needs a device's narrow arithmetic."""
        narrow = self.kind != "bool" and self.bits < 32
        return DType(self.kind, 32, self.lanes) if narrow else self

    def __str__(self) -> str:
        width = "" if self.kind == "bool" else self.bits
        return f"{self.kind}{width}" + (f"x{self.lanes}" if self.lanes > 1 else "")

    def is_a(self, kind: str, bits: int) -> bool:
        return (self.kind, self.bits) == (kind, bits)

    def of_lanes(self, lanes: int) -> DType:
        return DType(self.kind, self.bits, lanes)

    def of(self, kind: str) -> DType:
        return DType(kind, self.bits, self.lanes)


BOOL = DType("bool", 1, 1)
INT32 = DType("int", 32, 1)
UINT32 = DType("uint", 32, 1)


def instruction(op: Op, *operands: int) -> list[int]:
    """Its words."""
    return [(1 + len(operands)) << 16 | op, *operands]


def text(value: str) -> list[int]:
    """A literal string: UTF-8 with a zero at its end, in whole words."""
    data = value.encode() + b"\0"
    data += b"\0" * (-len(data) % 4)
    return list(struct.unpack(f"<{len(data) // 4}I", data))


class Module:
    """One compute shader. Types and constants are made once each; their ids are returned."""

    def __init__(self):
        self.variables: list[int] = []  # of the function: they come first in its first block
        self.prologue: list[int] = []  # values that every block may use
        self.body: list[int] = []
        self.interface: list[int] = []
        self._ids = 0
        self._capabilities = {Capability.SHADER}
        self._decorations: list[int] = []
        self._globals: list[int] = []
        self._made: dict[tuple, int] = {}
        self.extended = self.new_id()  # GLSL.std.450

    def new_id(self) -> int:
        self._ids += 1
        return self._ids

    @property
    def capabilities(self) -> list[Capability]:
        return sorted(self._capabilities)

    def need(self, capability: Capability) -> None:
        self._capabilities.add(capability)

    def decorate(self, target: int, *operands: int) -> None:
        self._decorations += instruction(Op.DECORATE, target, *operands)

    def decorate_member(self, target: int, member: int, *operands: int) -> None:
        self._decorations += instruction(Op.MEMBER_DECORATE, target, member, *operands)

    def made_once(self, op: Op, *operands: int) -> int:
        """A type, whose result id comes first."""
        key = (op, *operands)
        if key not in self._made:
            self._made[key] = self.new_id()
            self._globals += instruction(op, self._made[key], *operands)
        return self._made[key]

    def new_type(self, op: Op, *operands: int) -> int:
        """A type of its own, because it is decorated."""
        result = self.new_id()
        self._globals += instruction(op, result, *operands)
        return result

    def type(self, dtype: DType) -> int:
        """Of memory, if it has fewer than 32 bits: only loaded, stored and converted."""
        if dtype.lanes > 1:
            return self.made_once(Op.TYPE_VECTOR, self.type(dtype.element), dtype.lanes)
        if dtype.kind == "bool":
            return self.made_once(Op.TYPE_BOOL)
        width = _WIDTH.get((dtype.kind.removeprefix("u"), dtype.bits))
        if width is not None:
            self.need(width)
        if dtype.kind == "float":
            return self.made_once(Op.TYPE_FLOAT, dtype.bits)
        return self.made_once(Op.TYPE_INT, dtype.bits, int(dtype.kind == "int"))

    def pointer(self, storage: Storage, pointee: int) -> int:
        return self.made_once(Op.TYPE_POINTER, storage, pointee)

    def array(self, dtype: DType, length: int) -> int:
        return self.made_once(Op.TYPE_ARRAY, self.type(dtype), self.constant(UINT32, length))

    def constant(self, dtype: DType, value: int | float | bool) -> int:
        """As it is carried; an integer is taken modulo 2^bits."""
        if dtype.lanes > 1:
            return self.splat(self.constant(dtype.element, value), dtype)
        if dtype != dtype.carried:
            dtype, value = dtype.carried, _fitting(dtype, value)
        result_type = self.type(dtype)
        if dtype.kind == "bool":
            op, words = (Op.CONSTANT_TRUE if value else Op.CONSTANT_FALSE), []
        else:
            op, words = Op.CONSTANT, _words(dtype, value)
        key = (op, result_type, *words)
        if key not in self._made:
            self._made[key] = self.new_id()
            self._globals += instruction(op, result_type, self._made[key], *words)
        return self._made[key]

    def global_variable(self, storage: Storage, pointee: int) -> int:
        result = self.new_id()
        pointer = self.pointer(storage, pointee)
        self._globals += instruction(Op.VARIABLE, pointer, result, storage)
        return result

    def local_variable(self, pointee: int) -> int:
        result = self.new_id()
        pointer = self.pointer(Storage.FUNCTION, pointee)
        self.variables += instruction(Op.VARIABLE, pointer, result, Storage.FUNCTION)
        return result

    def value(self, op: Op, result_type: int, *operands: int) -> int:
        """Appends an instruction with a result to the body."""
        result = self.new_id()
        self.body += instruction(op, result_type, result, *operands)
        return result

    def entry_value(self, op: Op, result_type: int, *operands: int) -> int:
        """The same before the body."""
        result = self.new_id()
        self.prologue += instruction(op, result_type, result, *operands)
        return result

    def splat(self, value: int, dtype: DType) -> int:
        """In every lane."""
        if dtype.lanes == 1:
            return value
        return self.construct(dtype, [value] * dtype.lanes)

    def construct(self, dtype: DType, values: list[int]) -> int:
        return self.value(Op.COMPOSITE_CONSTRUCT, self.type(dtype.carried), *values)

    def do(self, op: Op, *operands: int) -> None:
        """Appends an instruction without one."""
        self.body += instruction(op, *operands)

    def assemble(self, name: str, workgroup: tuple[int, int, int]) -> list[int]:
        """The words of the module, whose entry point has that name. To be called once, last."""
        void = self.made_once(Op.TYPE_VOID)
        function_type = self.made_once(Op.TYPE_FUNCTION, void)
        main, label = self.new_id(), self.new_id()
        words = [MAGIC, VERSION_1_3, 0, self._ids + 1, 0]
        for capability in self.capabilities:
            words += instruction(Op.CAPABILITY, capability)
        if Capability.STORAGE_BUFFER_8_BIT in self._capabilities:
            words += instruction(Op.EXTENSION, *text("SPV_KHR_8bit_storage"))
        words += instruction(Op.EXT_INST_IMPORT, self.extended, *text("GLSL.std.450"))
        words += instruction(Op.MEMORY_MODEL, LOGICAL_ADDRESSING, GLSL450_MEMORY)
        words += instruction(Op.ENTRY_POINT, GL_COMPUTE, main, *text(name), *self.interface)
        words += instruction(Op.EXECUTION_MODE, main, LOCAL_SIZE, *workgroup)
        words += self._decorations + self._globals
        words += instruction(Op.FUNCTION, void, main, 0, function_type)
        words += instruction(Op.LABEL, label)
        words += self.variables + self.prologue + self.body
        words += instruction(Op.RETURN) + instruction(Op.FUNCTION_END)
        return words


def _fitting(dtype: DType, value: int | float) -> int | float:
    """The value that a dtype of 8 or 16 bits has for it."""
    if dtype.kind == "float":
        most = 65504.0  # an infinity stays one
        value = value if abs(value) == float("inf") else max(min(value, most), -most)
        return struct.unpack("<e", struct.pack("<e", value))[0]
    value = int(value) & (1 << dtype.bits) - 1
    negative = dtype.kind == "int" and value >> dtype.bits - 1
    return value - (1 << dtype.bits) if negative else value


def _words(dtype: DType, value: int | float) -> list[int]:
    if dtype.kind == "float":
        form, words = ("<f", "<I") if dtype.bits == 32 else ("<d", "<II")
        return list(struct.unpack(words, struct.pack(form, value)))
    bits = int(value) & (1 << dtype.bits) - 1
    return [bits] if dtype.bits == 32 else [bits & 0xFFFFFFFF, bits >> 32]
