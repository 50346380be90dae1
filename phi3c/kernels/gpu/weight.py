"""Reads weights (layout.py) inside a kernel. W is a tuple of the weight's buffers.

A unit is what a thread fetches of a row at once, as it is stored: 16 bytes where the layout has
them together. Its values, float32 and short of a factor (`scale`), come of it a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm.script import tirx as T

from ..layout import GROUP
from ..plain_weight import as_float32
from ..weight_format import GroupFormat, WeightFormat
from .layout import group_shapes
from .limits import VECTOR, GpuLimits

_BYTES = 16  # of a unit


@dataclass(frozen=True)
class WeightReader:
    """What the linears know of a weight `[out, in]`.

    unit, chunk: input features; registers, register_dtype: what holds a unit.
    `fetch(W, raw, at, row, u)`: raw[at …] = unit u of a row, as stored.
    `values(raw, at, c, D, to)`: D[to … to + chunk − 1] = the values of the unit's chunk c.
    `read(W, D, row, c)`: D[0 … chunk − 1] = the values of the row's chunk c.
    `scale(W, row, k)`: the factor of feature k, as stored; None where there is none.
    """

    unit: int
    chunk: int
    registers: int
    register_dtype: str
    fetch: Callable
    values: Callable
    read: Callable
    scale: Callable | None

    def factor(self, W, row, k):
        """That of feature k as a float32 expression."""
        return T.Cast("float32", self.scale(W, row, k)) if self.scale else T.float32(1)


def weight_buffers(
    out_features: int, in_features: int, kind: WeightFormat
) -> list[tuple[tuple[int, ...], str]]:
    """(shape, dtype) of a weight's buffers."""
    if isinstance(kind, GroupFormat):
        q_shape, scale_shape = group_shapes(out_features, in_features, kind.bits)
        return [(q_shape, "uint32"), (scale_shape, kind.scale_dtype)]
    return [((out_features, in_features), kind)]


def weight_reader(limits: GpuLimits, in_features: int, kind: WeightFormat) -> WeightReader:
    if isinstance(kind, GroupFormat):
        return _three_bit_reader(kind) if kind.bits == 3 else _group_reader(kind)
    return _plain_reader(limits, in_features, kind)


def divisor(most: int, features: int) -> int:
    """The largest of most, most/2, …, 1 that features are a multiple of, or 1 for less than 4:
    vectors have 4 values or 8."""
    while features % most:
        most //= 2
    return most if most >= VECTOR else 1


def _plain_reader(limits: GpuLimits, in_features: int, dtype: str) -> WeightReader:
    unit = divisor(_BYTES // np.dtype(dtype).itemsize, in_features)
    vector = min(unit, limits.vector_of(dtype))

    @T.inline
    def fetch(W, raw, at, row, u):
        for w in T.unroll(unit // vector):
            for v in T.vectorized(vector):
                raw[at + w * vector + v] = W[0][row, u * unit + w * vector + v]

    @T.inline
    def values(raw, at, c, D, to):
        for v in T.unroll(unit):
            D[to + v] = as_float32(raw[at + v], dtype)

    @T.inline
    def read(W, D, row, c):
        raw = T.alloc_buffer((unit,), dtype, scope="local")
        fetch(W, raw, 0, row, c)
        values(raw, 0, 0, D, 0)

    return WeightReader(unit, unit, unit, dtype, fetch, values, read, None)


def _power(place: int) -> int:
    """The bits of 2^(23 − place)."""
    return (150 - place) << 23


def _field(word, place: int, bits: int):
    """`bits` of a word from bit `place` on, as a float32 that is 2^(23 − place) too large.

    They stay where they are, in the low bits of a mantissa: one operation, where GPUs shift and
    convert integers at a fraction of the rate of others. (The places are Python's numbers, written
    out below: of a loop's variable TVM would make arguments that the host computes.)
    """
    mask = (2**bits - 1) << place
    return T.bitwise_or(T.bitwise_and(word, T.uint32(mask)), T.uint32(_power(place)))


def _value(field, place: int, zero: int):
    """Exact: both numbers fit a mantissa."""
    return T.reinterpret("float32", field) - T.float32(2 ** (23 - place) + zero)


def _group_reader(kind: GroupFormat) -> WeightReader:
    """Of 4 or 8 bits: a chunk is 8 features, in one word or two."""
    bits, zero, chunk = kind.bits, kind.zero, 8
    words = chunk * bits // 32
    half = 16 // bits  # features in half a word
    unit = _BYTES * 8 // bits
    registers, units, chunks = _BYTES // 4, GROUP // unit, GROUP // chunk

    @T.inline
    def fetch(W, raw, at, row, u):
        for v in T.vectorized(registers):
            raw[at + v] = W[0][row, u // units, u % units * registers + v]

    @T.inline
    def two(word, D, at, place):
        D[at] = _value(_field(word, place, bits), place, zero)
        D[at + 1] = _value(_field(word, place + bits, bits), place + bits, zero)

    @T.inline
    def values(raw, at, c, D, to):
        for h in T.unroll(2 * words):
            stored = T.meta_var(raw[at + c * words + h // 2])
            word = T.meta_var(T.shift_right(stored, T.Cast("uint32", h % 2 * 16)))
            two(word, D, to + h * half, 0)
            if bits == 4:
                two(word, D, to + h * half + 2, 8)

    @T.inline
    def read(W, D, row, c):
        raw = T.alloc_buffer((words,), "uint32", scope="local")
        for v in T.vectorized(words):
            raw[v] = W[0][row, c // chunks, c % chunks * words + v]
        values(raw, 0, 0, D, 0)

    return WeightReader(unit, chunk, registers, "uint32", fetch, values, read, _scale)


def _three_bit_reader(kind: GroupFormat) -> WeightReader:
    """A chunk is 8 features: 16 bits of one of the two low words, and 8 of the third."""
    chunk, registers = 8, 3
    chunks = GROUP // chunk

    @T.inline
    def fetch(W, raw, at, row, u):
        for v in T.unroll(registers):
            raw[at + v] = W[0][row, u, v]

    @T.inline
    def put(low, high, D, to, v):
        """Feature v of the chunk, whose high bit moves above the low two."""
        moved = T.meta_var(T.shift_left(high, T.uint32(v + 2)))
        third = T.meta_var(T.bitwise_and(moved, T.uint32(4 << 2 * v)))
        D[to + v] = _value(T.bitwise_or(_field(low, 2 * v, 2), third), 2 * v, kind.zero)

    @T.inline
    def combine(low_word, high_word, c, D, to):
        word = T.alloc_buffer((2,), "uint32", scope="local")
        word[0] = T.shift_right(low_word, T.Cast("uint32", c % 2 * 16))
        word[1] = T.shift_right(high_word, T.Cast("uint32", c * chunk))
        put(word[0], word[1], D, to, 0)
        put(word[0], word[1], D, to, 1)
        put(word[0], word[1], D, to, 2)
        put(word[0], word[1], D, to, 3)
        put(word[0], word[1], D, to, 4)
        put(word[0], word[1], D, to, 5)
        put(word[0], word[1], D, to, 6)
        put(word[0], word[1], D, to, 7)

    @T.inline
    def values(raw, at, c, D, to):
        combine(raw[at + c // 2], raw[at + 2], c, D, to)

    @T.inline
    def read(W, D, row, c):
        group = T.meta_var(W[0][row, c // chunks, 2])
        combine(W[0][row, c // chunks, c % chunks // 2], group, c % chunks, D, 0)

    return WeightReader(GROUP, chunk, registers, "uint32", fetch, values, read, _scale)


def _scale(W, row, k):
    return W[1][row, k // GROUP]
