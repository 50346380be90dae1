"""Integer dot products of stored weights (unsigned bytes) with int8 activations, per instruction
set: four consecutive input features of each output row in a 32-bit lane.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from tvm.script import tirx as T


@dataclass(frozen=True)
class Dot(ABC):
    """lanes: output rows at a time. The sum is kept in `acc_len` values of `acc_dtype`."""

    lanes: int
    acc_dtype = "int32"
    by_pairs = False  # whether int8_pairs.py multiplies whole tiles of rows

    @property
    def acc_len(self) -> int:
        return self.lanes

    @property
    def octets(self) -> str:
        return f"int8x{4 * self.lanes}"

    def activation(self, A, at, t):
        """A `[slots, words]` i32 → word t of a slot in every lane, int32x<lanes>.

        t: a constant below 8, once loops are unrolled.
        """
        return T.broadcast(A[at, t], self.lanes)

    @abstractmethod
    def step(self, acc, w, a):
        """acc + w·a; w uint32x<lanes> of four bytes each, a int32x<lanes> of four int8 each."""

    def start(self, offset):
        """The accumulator before the first step; offset: an int32 to be added to the sum."""
        return T.broadcast(offset, self.lanes)

    def finish(self, acc, offset):
        """The sum with its offset, as int32x<lanes>."""
        return acc

    def for_bits(self, bits: int) -> Dot:
        """What to use for stored values of `bits` bits, whose zero point is 2**(bits − 1)."""
        return self


@dataclass(frozen=True)
class Vpdpbusd(Dot):
    """AVX512-VNNI, AVX-VNNI: four products and their sum into a 32-bit lane, one instruction."""

    def step(self, acc, w, a):
        return T.call_llvm_pure_intrin(
            f"int32x{self.lanes}",
            f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}",
            acc,
            T.reinterpret(self.octets, w),
            T.reinterpret(self.octets, a),
        )


@dataclass(frozen=True)
class Pmaddubsw(Dot):
    """AVX2: pairs of products in 16 bits. A group of 32 stays in range for weights up to 15."""

    lanes: int = 8
    acc_dtype = "int16"

    @property
    def acc_len(self) -> int:
        return 2 * self.lanes

    def step(self, acc, w, a):
        return acc + self._pairs(T.reinterpret(self.octets, w), T.reinterpret(self.octets, a))

    def start(self, offset):
        return T.broadcast(T.int16(0), self.acc_len)

    def finish(self, acc, offset):
        return T.broadcast(offset, self.lanes) + self._widened(acc)

    def for_bits(self, bits: int) -> Dot:
        """Bytes above 15 would overflow 16 bits."""
        return self if bits < 8 else SignedPmaddubsw(self.lanes)

    def _pairs(self, unsigned, signed):
        """Sums of two products each, int16x<2·lanes>."""
        return T.call_llvm_pure_intrin(
            f"int16x{2 * self.lanes}", "llvm.x86.avx2.pmadd.ub.sw", unsigned, signed
        )

    def _widened(self, pairs):
        """Sums of two pairs each, int32x<lanes>."""
        ones = T.broadcast(T.int16(1), 2 * self.lanes)
        return T.call_llvm_pure_intrin(f"int32x{self.lanes}", "llvm.x86.avx2.pmadd.wd", pairs, ones)


@dataclass(frozen=True)
class SignedPmaddubsw(Pmaddubsw):
    """AVX2, bytes with the zero point 128: |w − 128| times the activation under its sign.

    A pair of products is at most 2 · 128 · 127, which 16 bits hold; every step is widened to 32.
    """

    acc_dtype = "int32"

    @property
    def acc_len(self) -> int:
        return self.lanes

    def step(self, acc, w, a):
        def under_sign(x, sign):
            return T.call_llvm_pure_intrin(self.octets, "llvm.x86.avx2.psign.b", x, sign)

        weight = _less_128(w, self.lanes)
        # |−128| is −128 again, and 128 where it is read as unsigned.
        magnitude = under_sign(weight, weight)
        pairs = self._pairs(magnitude, under_sign(T.reinterpret(self.octets, a), weight))
        return acc + self._widened(pairs)

    def start(self, offset):
        """Σ(w − 128)a lacks nothing."""
        return T.broadcast(T.int32(0), self.lanes)

    def finish(self, acc, offset):
        return acc


@dataclass(frozen=True)
class Sdot(Dot):
    """NEON dotprod: signed bytes, which stored values up to 15 are as they are.

    centred: stored bytes have the zero point 128, and lose it before they are multiplied.
    """

    lanes: int = 4
    centred: bool = False

    def activation(self, A, at, t):
        return _neon_activation(A, at, t, 4)

    def step(self, acc, w, a):
        weight = _less_128(w, 4) if self.centred else T.reinterpret("int8x16", w)
        return _neon_dot("sdot", acc, weight, a)

    def start(self, offset):
        return T.broadcast(T.int32(0) if self.centred else offset, 4)

    def for_bits(self, bits: int) -> Dot:
        return Sdot(centred=bits == 8)


@dataclass(frozen=True)
class Usdot(Dot):
    """NEON i8mm: unsigned bytes times signed ones, in two vectors."""

    lanes: int = 8
    by_pairs = True

    def activation(self, A, at, t):
        return _neon_activation(A, at, t, 8)

    def step(self, acc, w, a):
        def half(x, first: int):
            return T.Shuffle([x], [first + j for j in range(4)])

        sums = [
            _neon_dot("usdot", half(acc, k), T.reinterpret("int8x16", half(w, k)), half(a, k))
            for k in (0, 4)
        ]
        return T.Shuffle(sums, list(range(8)))


@dataclass(frozen=True)
class PlainDot(Dot):
    """Any CPU: shifts, multiplications and additions of 32-bit lanes."""

    def step(self, acc, w, a):
        def every(value):
            return T.broadcast(value, self.lanes)

        for b in range(4):
            weight = T.bitwise_and(T.shift_right(w, every(T.uint32(8 * b))), every(T.uint32(255)))
            # Sign-extended byte b of the activations.
            value = T.shift_right(T.shift_left(a, every(24 - 8 * b)), every(24))
            acc = acc + T.reinterpret(f"int32x{self.lanes}", weight) * value
        return acc


def _neon_activation(A, at, t, lanes: int):
    # One load for four words: the instructions take a lane of a register for all of theirs.
    words = A[at, T.ramp(t // 4 * 4, 1, 4)]
    return T.Shuffle([words] * (lanes // 4), [t % 4] * lanes)


def _neon_dot(name: str, acc, w, a):
    return T.call_llvm_pure_intrin(
        "int32x4",
        f"llvm.aarch64.neon.{name}.v4i32.v16i8",
        acc,
        w,
        T.reinterpret("int8x16", a),
    )


def _less_128(w, lanes: int):
    """Every byte of w uint32x<lanes> less 128, as int8x<4·lanes>."""
    high_bits = T.broadcast(T.uint32(0x80808080), lanes)
    return T.reinterpret(f"int8x{4 * lanes}", T.bitwise_xor(w, high_bits))
