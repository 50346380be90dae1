"""Integer dot products of stored weights (unsigned bytes) with int8 activations, per instruction
set: four consecutive input features of each output row in a 32-bit lane.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.script import tirx as T


@dataclass(frozen=True)
class Vpdpbusd:
    """AVX512-VNNI: four products and their sum into a 32-bit lane, one instruction."""

    lanes: int = 16
    acc_dtype = "int32"

    @property
    def acc_len(self) -> int:
        return self.lanes

    def step(self, acc, w, a):
        """acc + w·a; w uint32x<lanes> of four bytes each, a int32 of four int8."""
        octets = f"int8x{4 * self.lanes}"
        return T.call_llvm_pure_intrin(
            f"int32x{self.lanes}",
            f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}",
            acc,
            T.reinterpret(octets, w),
            T.reinterpret(octets, T.broadcast(a, self.lanes)),
        )

    def start(self, offset):
        """The accumulator before the first step; offset: an int32 to be added to the sum."""
        return T.broadcast(offset, self.lanes)

    def finish(self, acc, offset):
        """The sum with its offset, as int32x<lanes>."""
        return acc

    def for_bits(self, bits: int) -> Dot:
        """What to use for stored values of `bits` bits."""
        return self


@dataclass(frozen=True)
class Pmaddubsw:
    """AVX2: pairs of products in 16 bits. A group of 32 stays in range for weights up to 15."""

    lanes: int = 8
    acc_dtype = "int16"

    @property
    def acc_len(self) -> int:
        return 2 * self.lanes

    def step(self, acc, w, a):
        octets = f"int8x{4 * self.lanes}"
        return acc + T.call_llvm_pure_intrin(
            f"int16x{2 * self.lanes}",
            "llvm.x86.avx2.pmadd.ub.sw",
            T.reinterpret(octets, w),
            T.reinterpret(octets, T.broadcast(a, self.lanes)),
        )

    def start(self, offset):
        return T.broadcast(T.int16(0), self.acc_len)

    def finish(self, acc, offset):
        return T.broadcast(offset, self.lanes) + T.call_llvm_pure_intrin(
            f"int32x{self.lanes}",
            "llvm.x86.avx2.pmadd.wd",
            acc,
            T.broadcast(T.int16(1), 2 * self.lanes),
        )

    def for_bits(self, bits: int) -> Dot:
        """Bytes above 15 would overflow 16 bits."""
        return self if bits < 8 else PlainDot(self.lanes)


@dataclass(frozen=True)
class PlainDot:
    """Any CPU: shifts, multiplications and additions of 32-bit lanes."""

    lanes: int
    acc_dtype = "int32"

    @property
    def acc_len(self) -> int:
        return self.lanes

    def step(self, acc, w, a):
        for b in range(4):
            weight = T.bitwise_and(
                T.shift_right(w, T.broadcast(T.uint32(8 * b), self.lanes)),
                T.broadcast(T.uint32(255), self.lanes),
            )
            # Sign-extended byte b of the activations.
            value = T.shift_right(T.shift_left(a, 24 - 8 * b), 24)
            acc = acc + T.reinterpret(f"int32x{self.lanes}", weight) * T.broadcast(
                value, self.lanes
            )
        return acc

    def start(self, offset):
        return T.broadcast(offset, self.lanes)

    def finish(self, acc, offset):
        return acc

    def for_bits(self, bits: int) -> Dot:
        return self


Dot = Vpdpbusd | Pmaddubsw | PlainDot
